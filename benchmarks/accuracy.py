"""Whether SE blocks help a trained network, after equal budgets and against honest controls.

    python -m benchmarks.accuracy --network resnet20 --data DIR --weights FILE --epochs 1 3 --share 1 0.1 0.01 --seeds 3

The arms start from the same trained network and see the same images in the same order:

- `control`: the network as it is, fine-tuned as a whole with the recipe's settings, from the labels alone.
- `se`: se-inject's blocks, an exact identity at first, and the recipe with its stages, rates and distillation.
- `default`: blocks at the same sites with torch's default initialisation and a plain sigmoid, trained as pasted in: no
  stage of their own, the backbone's rate, no distillation.
- `every_conv`: the same, with a block after every convolution.
- `control_distill`, on request: the control with the recipe's distillation, to tell its share from the blocks'.
- `search`, on request: as `se`, with the blocks alone that `se_inject.search` chooses for half of their parameters.

Rows are appended to OUT.jsonl as they come; the same command goes on where it was stopped. `--set-all` changes the
recipe for all arms, `--set` for `se` alone; `--set-all label_temperature=1 --set label_temperature=0` compares `short`
with fine-tuning as it is usually done. `--choosing` scores on every second test image alone: settings are chosen
by these, and the table shows the differences on the other half too. (Held-out training images will not do: the CIFAR
ResNets know their originals, which favours what stays near to the start.) `--throughput` compares the speed of the loop
with timm's bare step. Writes OUT and OUT.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.accuracy_networks import ARMS, NAMES, PASTED, make_model, open_pretrained
from benchmarks.accuracy_report import ONLY_SE, summarise, write_table
from benchmarks.accuracy_runs import Files, Run, perform
from benchmarks.accuracy_speed import measure_throughput
from benchmarks.setting import describe_setting
from se_inject.errors import OptionError
from se_inject.places import Kind
from se_inject.recipe import Recipe
from se_inject.recipe_files import DEFAULT_RECIPE, read_recipe
from se_inject.world import join_world, name_device

_FOLDER = Path(__file__).parent / "results"
_IN_MEMORY = "workers=0"


def make_recipe_of(arm: str, name: str, shared: list[str], own: list[str]) -> Recipe:
    """Make the recipe of an arm.

    Args:
        arm: The arm.
        name: The recipe that all begin with.
        shared: Overrides for all arms.
        own: Overrides for `se`.

    Raises:
        RecipeError: The recipe or an override is wrong.
    """
    tuned = read_recipe(name, [_IN_MEMORY, *shared, *own])
    base = read_recipe(name, [_IN_MEMORY, *shared])
    if arm in ("se", "search"):
        return tuned
    if arm == "control_distill":
        return replace(base, distill=tuned.distill, temperature=tuned.temperature)
    plain = replace(base, distill=0.0)
    return plain if arm == "control" else replace(plain, train="all", gates_share=0.0)


def list_runs(options: argparse.Namespace) -> list[Run]:
    """List the runs of a command, the arms of a seed side by side."""
    recipes = {arm: make_recipe_of(arm, options.recipe, options.set_all, options.set) for arm in options.arms}
    return [
        Run(
            options.network, arm, share, epochs, seed,
            replace(recipes[arm], epochs=epochs, seed=seed).to_values(),
            options.r, options.input_size, options.choosing, tuple(options.at),
        )
        for share in sorted(options.share) for epochs in sorted(options.epochs)
        for seed in range(options.first_seed, options.first_seed + options.seeds) for arm in options.arms
    ]  # fmt: skip


def perform_all(runs: list[Run], files: Files, *, num_jobs: int, log: Path) -> list[dict[str, Any]]:
    """Perform the runs that the log does not hold, side by side, and append them to it.

    Returns:
        The rows of all runs, in their order.
    """
    rows = {}
    for line in log.read_text().splitlines() if log.is_file() else []:
        row = json.loads(line)
        rows[_get_key(row)] = row
    missing = [run for run in runs if _get_key(asdict(run)) not in rows]
    commit = describe_setting()["commit"]
    with log.open("a") as file:
        for row in _perform_each(missing, files, num_jobs):
            file.write(json.dumps({**row, "commit": commit}) + "\n")
            file.flush()
            rows[_get_key(row)] = {**row, "commit": commit}
            what = f"{row['network']} {row['share']:.0%} {row['epochs']:g} epochs, seed {row['seed']}, {row['arm']}"
            score = f"{row['before']:.2f} -> {row['top1']:.2f}"
            print(f"{what}: {score} ({row['images_per_second']:.0f} images/s)", file=sys.stderr, flush=True)
    return [rows[_get_key(asdict(run))] for run in runs]


def _perform_each(runs: list[Run], files: Files, num_jobs: int) -> Iterator[dict[str, Any]]:
    if num_jobs == 1:
        yield from (perform(run, files) for run in runs)
        return
    with ProcessPoolExecutor(num_jobs, multiprocessing.get_context("spawn")) as pool:
        futures: list[Future[dict[str, Any]]] = [pool.submit(perform, run, files) for run in runs]
        for future in as_completed(futures):
            yield future.result()


def _get_key(row: Mapping[str, Any]) -> str:
    """Return what tells runs apart."""
    ignored = ("workers", "checkpoint_minutes", *(ONLY_SE if row["arm"] in ("control", *PASTED) else ()))
    values = {name: row[name] for name in Run.__dataclass_fields__ if name != "at"}
    values["at"] = list(row.get("at", ()))  # older rows are of the usual places
    values["recipe"] = {key: value for key, value in row["recipe"].items() if key not in ignored}
    return json.dumps(values, sort_keys=True)


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NAMES, default="resnet20")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="State dict of a CIFAR ResNet.")
    parser.add_argument("--epochs", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--share", type=float, nargs="+", default=[1.0, 0.1, 0.01], help="Of the training images.")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS[:4]))
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, metavar="NAME|FILE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="Of the arm se.")
    parser.add_argument("--set-all", action="append", default=[], metavar="KEY=VALUE", help="Of all arms.")
    parser.add_argument("--r", type=float, default=16, help="The blocks' reduction ratio.")
    parser.add_argument("--at", nargs="+", choices=get_args(Kind), default=[], help="Kinds of places of the blocks.")
    parser.add_argument("--choosing", action="store_true", help="Score on every second test image alone.")
    parser.add_argument("--input-size", type=int, default=64, help="Of EfficientNet-Lite0's images.")
    parser.add_argument("--throughput", action="store_true", help="Measure the speed alone.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="Processes side by side.")
    parser.add_argument("--threads", type=int, default=1, help="Of each process.")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="Where tuned networks with blocks go.")
    parser.add_argument("--out", type=Path, default=_FOLDER / "accuracy.json")
    options = parser.parse_args()
    if not all(0 < share <= 1 for share in options.share):
        raise OptionError(f"--share is {options.share}; expected numbers above 0 and at most 1")
    return options


def main() -> None:
    """Run what is missing, then summarise, print and write."""
    options = read_arguments()
    torch.set_num_threads(options.threads)
    files = Files(options.data, options.weights, options.device, options.threads, options.keep)
    rows, throughput = [], {}
    if options.throughput:
        recipe = make_recipe_of("control", options.recipe, options.set_all, [])
        opened = open_pretrained(options.network, weights=options.weights, input_size=options.input_size, seed=0)
        with join_world(options.device) as world:
            for arm in ("control", "se"):
                model = make_model(opened.model, arm, r=options.r, size=opened.form.size, at=options.at)
                model.to(world.device)
                throughput[f"{options.network}, {arm}"] = measure_throughput(model, opened.form, recipe, world)
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        log = options.out.with_suffix(".jsonl")
        rows = perform_all(list_runs(options), files, num_jobs=options.jobs, log=log)
    device = "cuda" if torch.cuda.is_available() and options.device in ("auto", "cuda") else "cpu"
    setting = describe_setting() | {
        "device": name_device(torch.device(device)), "cores": str(os.cpu_count()), "jobs": str(options.jobs),
        "threads": str(options.threads),
    }  # fmt: skip
    command = f"python -m benchmarks.accuracy {shlex.join(sys.argv[1:])}"
    result = {
        "command": command, "setting": setting, "throughput": throughput, "summary": summarise(rows), "rows": rows,
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table := write_table(result))
    print(table)


if __name__ == "__main__":
    main()
