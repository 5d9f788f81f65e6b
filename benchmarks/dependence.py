"""How far the images want gates of their own, by `se_inject.dependence`, which the rate of the blocks goes by.

    python -m benchmarks.dependence --network resnet20 --data DIR [DIR ...] --weights FILE --out OUT

For each folder, share of the training images and seed: the figure that `calibrate` finds before the first step of the
recipe `short`, with the settings of the tables in recipes/README.md, the rate that follows, and the time that it takes.
Writes OUT and OUT.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import se_inject
from benchmarks.accuracy_networks import NAMES, make_data, open_pretrained
from benchmarks.setting import describe_setting
from se_inject.calibration import calibrate
from se_inject.contents import count_images
from se_inject.loaders import TrainLoader
from se_inject.recipe_files import read_recipe
from se_inject.tasks import autocast
from se_inject.world import World


def measure(options: argparse.Namespace, folder: Path, share: float, seed: int) -> dict[str, Any]:
    """Measure one; gives its row."""
    world = World(torch.device("cpu"))
    recipe = read_recipe("short", ["crop=padded", "precision=bf16", "workers=0", f"seed={seed}"])
    data = make_data(options.network, folder, share=share, seed=seed)
    assert data.train is not None
    opened = open_pretrained(options.network, weights=options.weights, input_size=64, seed=seed)
    model = se_inject.inject(opened.model)
    loader = TrainLoader(data, opened.form, recipe, world)
    start = time.perf_counter()
    settled, dependence = calibrate(
        model, loader, recipe, world, fresh=opened.fresh, compute=partial(autocast, recipe, world)
    )
    return {
        "network": options.network,
        "data": folder.name,
        "num_train": count_images(data.train),
        "seed": seed,
        "dependence": dependence,
        "se_lr": settled.se_lr,
        "label_temperature": settled.label_temperature,
        "seconds": time.perf_counter() - start,
    }


def write_table(rows: list[dict[str, Any]]) -> str:
    """Write the rows as a table, one line for all seeds of a folder and a number of images."""
    lines = [
        "| network | data | training images | dependence by seed, % | rate of the blocks |",
        "|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row["network"], row["data"], row["num_train"]) for row in rows):
        own = [row for row in rows if (row["network"], row["data"], row["num_train"]) == key]
        shares = ", ".join(f"{100 * row['dependence']:.2f}" for row in own)
        rates = ", ".join(dict.fromkeys(f"{row['se_lr']:g}" for row in own))
        lines.append(f"| {key[0]} | {key[1]} | {key[2]:,} | {shares} | {rates} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NAMES, default="resnet20")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="State dict of a CIFAR ResNet.")
    parser.add_argument("--share", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for folder in options.data:
        for share in options.share:
            for seed in range(options.seeds):
                rows.append(measure(options, folder, share, seed))
                print(rows[-1], flush=True)
    setting, command = describe_setting(), f"python -m benchmarks.dependence {shlex.join(sys.argv[1:])}"
    options.out.write_text(json.dumps({"command": command, "setting": setting, "rows": rows}, indent=1))
    told = "; ".join(f"{key} {value}" for key, value in setting.items())
    options.out.with_suffix(".md").write_text(f"`{command}`\n\n{told}\n\n{write_table(rows)}\n")


if __name__ == "__main__":
    main()
