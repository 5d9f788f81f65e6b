"""Commands that act on what gates do, or could do: `search`, `simplify`, `eject`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from se_inject import console
from se_inject.arguments import (
    AsJson,
    Device,
    InputSize,
    MaxBad,
    Opened,
    name_data,
    open_model,
    read_validation,
    takes,
    write_words,
)
from se_inject.errors import OptionError
from se_inject.plan_arguments import read_options


@takes(open_model=open_model, name_data=name_data, read_options=read_options)
def run_search(
    open_model: Callable[[], Opened],
    name_data: Callable[[], dict[str, Any]],
    *,
    budget: Annotated[
        str,
        typer.Option(
            "--budget", metavar="N%|N", help="A share of the network without blocks, or a number: parameters or ms."
        ),
    ],
    of: Annotated[
        str, typer.Option("--of", metavar="parameters|latency", help="What is spent; latency is measured here.")
    ] = "parameters",
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Of the fine-tune of the gates alone.")] = 200,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override the recipe short. Repeatable.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", metavar="N", help="Short for --set workers=N.")] = None,
    input_size: InputSize = None,
    max_bad: MaxBad = 0,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write the plan (.json).")] = Path(
        "plan.json"
    ),
    device: Device = "auto",
    read_options: Callable[[], dict[str, Any]],
    as_json: AsJson = False,
) -> None:
    """Find the sites that are worth their blocks, and write a plan that spends a budget on them."""
    from se_inject.budget import Budget
    from se_inject.datasets import open_data
    from se_inject.files import check_target, write_whole
    from se_inject.reading import seed_all
    from se_inject.recipe_files import read_recipe
    from se_inject.search import search
    from se_inject.start import prepare_start
    from se_inject.world import stay_alone

    check_target(out, (".json",))
    overrides = [*(settings or ()), *([] if workers is None else [f"workers={workers}"])]
    amount, recipe, world = Budget.parse(budget, of), read_recipe("short", overrides), stay_alone(device)
    options = name_data()
    data = open_data(**options, seed=recipe.seed)
    seed_all(recipe.seed)
    model, source = open_model()
    start = prepare_start(
        model, source, data.num_classes, classes=data.classes or (), options=read_options(), input_size=input_size
    )
    if start.form.mode != "RGB":
        data = open_data(**options, mode=start.form.mode, seed=recipe.seed)
    with console.show_passes("search") as report:
        found = search(start, data, recipe, world, amount, num_steps=steps, max_bad=max_bad, report=report)
    write_whole(out, lambda file: file.write(found.plan.to_json().encode()))
    if as_json:
        console.print_json({"out": str(out), **found.to_values()})
    else:
        console.print_search(found, out)


@takes(open_model=open_model, read_validation=read_validation)
def run_simplify(
    open_model: Callable[[], Opened],
    read_validation: Callable[[], dict[str, Any]],
    *,
    max_drop: Annotated[
        float, typer.Option("--max-drop", metavar="POINTS", help="How much top-1 may fall, in points of per cent.")
    ] = 0.1,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Where to write (.pt, .pth or .safetensors).")
    ] = Path("smaller.pt"),
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the trade-off (.png, .svg, .pdf).")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Fold blocks whose gates hardly depend on the image into the layers beside them, and shrink the others."""
    from se_inject.artifact import save
    from se_inject.files import check_target
    from se_inject.simplify import check_max_drop, simplify
    from se_inject.simplify_chart import SUFFIXES, draw_steps
    from se_inject.validation import CACHE, open_validation
    from se_inject.world import stay_alone

    check_target(out)
    check_max_drop(max_drop)
    if plot is not None:
        check_target(plot, SUFFIXES)
    world = stay_alone(device)
    model, source, validation = open_validation(open_model, world=world, cache=CACHE, **read_validation())
    with console.show_passes("simplify") as report:
        simplified = simplify(model, validation, max_drop=max_drop, report=report)
    console.print_unreadable(validation.list_unreadable())
    save(simplified.model, out, source=source)
    if plot is not None:
        draw_steps(simplified, plot)
        console.talk(f"wrote {plot}")
    if as_json:
        console.print_json({"out": str(out), **simplified.to_values()})
    else:
        console.print_simplified(simplified, out)


@takes(open_model=open_model, read_validation=read_validation)
def run_eject(
    open_model: Callable[..., Opened],
    read_validation: functools.partial[dict[str, Any]],
    *,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The state dict (.pt, .pth or .safetensors).")
    ] = Path("plain.pt"),
    fold: Annotated[
        bool, typer.Option("--fold", help="Let the weights carry the mean gates over the images of --data.")
    ] = False,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DIR", help="With --fold: images, as for se-inject evaluate.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Write the network without its blocks, as the original's state dict: its present weights, or with folded gates."""
    from se_inject.ejection import eject
    from se_inject.files import check_target, write_tensors
    from se_inject.gate_folding import find_gate_folds
    from se_inject.observation import observe
    from se_inject.rewrite import find_plan
    from se_inject.validation import open_validation
    from se_inject.world import stay_alone

    given = write_words(read_validation)
    if (fold and data is None) or (given and not fold):
        found = "--fold without --data" if fold else f"{given[0]} without --fold"
        raise OptionError(f"{found}; the mean gates of --fold are those of the images of --data")
    check_target(out)
    if not fold:
        network, _ = open_model()
        plain, folded, kept = eject(network), 0, {}
    else:
        network, _, validation = open_validation(open_model, world=stay_alone(device), **read_validation())
        folds = find_gate_folds(network)
        gates = observe(network, validation).gates
        means = {fold.block: gates[fold.block].mean for fold in folds.folds if fold.block in gates}
        plain, folded, kept = eject(network, gates=means), len(means), dict(folds.kept)
        console.print_unreadable(validation.list_unreadable())
    for path, reason in kept.items():
        console.talk(f"{path}: its gate is gone and not folded; {reason}")
    write_tensors(out, plain.state_dict(), {})
    if as_json:
        console.print_json({"out": str(out), "folded": folded, "gone": kept})
    else:
        plan = find_plan(network)
        carried = f" but those of {plan.num_folded} blocks, which they carry" if plan and plan.num_folded else ""
        how = (
            f"with the mean gates of {folded} blocks in its weights"
            if fold
            else f"with its present weights, without gates{carried}"
        )
        console.stdout.out(f"{out}: the state dict of {type(plain).__name__}, {how}; give it as --weights {out}")
