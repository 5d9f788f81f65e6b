"""Commands that look at a network and cut it: `inject`, `plan`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from se_inject import console
from se_inject.arguments import AsJson, InputSize, Opened, open_model, takes
from se_inject.errors import OptionError
from se_inject.plan_arguments import read_options
from se_inject.plan_tables import describe_plan, print_plan

if TYPE_CHECKING:
    from se_inject.provenance import Source


@takes(open_model=open_model, read_options=read_options)
def run_inject(
    open_model: Callable[[], Opened],
    *,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Where to write (.pt, .pth or .safetensors).")
    ] = Path("model.pt"),
    input_size: InputSize = None,
    read_options: Callable[[], dict[str, Any]],
    as_json: AsJson = False,
) -> None:
    """Inject blocks into a network, as an exact identity, and write the result to a file."""
    from se_inject.artifact import save
    from se_inject.costs import compare_costs
    from se_inject.files import check_target
    from se_inject.reading import seed_all
    from se_inject.rewrite import get_plan, inject

    options = _read_sized(read_options, input_size)
    check_target(out)  # before a download and not after it
    seed_all(0)  # blocks, and weights that are not fetched, are drawn: the same command gives the same file
    network, source = open_model()
    injected = inject(network, inplace=True, example=input_size, **options)
    plan = get_plan(injected)
    before, after = compare_costs(injected, plan)  # runs it, before anything is written
    save(injected, out, source=source)
    if as_json:
        console.print_json({"out": str(out), **_describe_source(source), **describe_plan(plan, before, after)})
        return
    growth = f"{before.parameters:,} -> {after.parameters:,} parameters"
    if plan.note:
        console.talk(plan.note)
    console.stdout.out(
        f"{out}: {plan.model} with {len(plan.sites)} blocks, {growth}; the same outputs until it is trained"
    )


@takes(open_model=functools.partial(open_model, pretrained=False), read_options=read_options)
def run_plan(
    open_model: Callable[[], Opened],
    *,
    input_size: InputSize = None,
    read_options: Callable[[], dict[str, Any]],
    graph: Annotated[Path | None, typer.Option("--graph", metavar="FILE", help="Draw the plan as an SVG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show where the blocks would go, which merges are passed over and why, and the totals; nothing is changed."""
    from se_inject.costs import compare_costs
    from se_inject.files import check_target
    from se_inject.picture import SVG, draw_network
    from se_inject.rewrite import find_plan, get_plan
    from se_inject.start import inject_once

    options = _read_sized(read_options, input_size)
    if graph is not None:
        check_target(graph, (SVG,))
    network, source = open_model()
    if input_size is not None and find_plan(network) is not None:
        raise OptionError(f"{type(network).__name__} has its blocks already; leave out --input-size")
    # An artifact shows the plan that it was made with.
    network = inject_once(network, options, input_size=input_size, inplace=True)
    if graph is not None:
        draw_network(network, graph)
        console.talk(f"wrote {graph}")
    plan = get_plan(network)
    before, after = compare_costs(network, plan)
    if as_json:
        console.print_json({**_describe_source(source), **describe_plan(plan, before, after)})
    else:
        print_plan(plan, before, after)


def _read_sized(read_options: Callable[[], dict[str, Any]], input_size: int | None) -> dict[str, Any]:
    options = read_options()
    if input_size is not None and "plan" in options:
        raise OptionError("--plan holds the size of the images already; leave out --input-size, or --plan")
    return options


def _describe_source(source: Source | None) -> dict[str, Any]:
    return {"source": None if source is None else str(source), "weights": None if source is None else source.weights}
