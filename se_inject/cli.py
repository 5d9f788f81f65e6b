"""The command line: `se-inject MODEL --out model.pt`, and the other verbs.

Each command takes its options, calls the stages and prints. Expected failures become one line on stderr and exit code
1.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from se_inject import __version__, console
from se_inject.arguments import (
    AsJson,
    Device,
    InputSize,
    MaxBad,
    Opened,
    name_data,
    open_model,
    read_options,
    takes,
)
from se_inject.errors import OptionError, SEInjectError

if TYPE_CHECKING:
    from se_inject.sources import Source

DEFAULT_VERB = "inject"
_ROOT_OPTIONS = ("--help", "-h", "--version", "--install-completion", "--show-completion")


class _DefaultGroup(TyperGroup):
    """A group of commands for which `se-inject MODEL ...` is short for `se-inject inject MODEL ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in _ROOT_OPTIONS:
            args = [DEFAULT_VERB, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DefaultGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def show_version(*, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Retrofit squeeze-and-excitation blocks into trained CNNs. `se-inject MODEL` is short for `inject MODEL`."""
    if version:
        console.stdout.out(f"se-inject {__version__}")
        raise typer.Exit


@app.command("inject")
@takes(open_model=open_model, read_options=read_options)
def run_inject(
    open_model: Callable[[], Opened],
    *,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Where to write (.pt, .pth or .safetensors).")
    ] = Path("model.pt"),
    read_options: Callable[[], dict[str, Any]],
    as_json: AsJson = False,
) -> None:
    """Inject blocks into a network, as an exact identity, and write the result to a file."""
    from se_inject.artifact import save
    from se_inject.costs import compare_costs
    from se_inject.files import check_target
    from se_inject.rewrite import get_plan, inject

    options = read_options()
    check_target(out)  # before a download and not after it
    network, source = open_model()
    injected = inject(network, inplace=True, **options)
    save(injected, out, source=source)
    plan = get_plan(injected)
    before, after = compare_costs(injected, plan)
    if as_json:
        console.print_json({"out": str(out), **_describe_source(source), **console.describe_plan(plan, before, after)})
        return
    growth = f"{before.parameters:,} -> {after.parameters:,} parameters"
    if plan.note:
        console.talk(plan.note)
    console.stdout.out(
        f"{out}: {plan.model} with {len(plan.sites)} blocks, {growth}; the same outputs until it is trained"
    )


@app.command("plan")
@takes(open_model=functools.partial(open_model, pretrained=False), read_options=read_options)
def run_plan(
    open_model: Callable[[], Opened],
    *,
    read_options: Callable[[], dict[str, Any]],
    graph: Annotated[Path | None, typer.Option("--graph", metavar="FILE", help="Draw the plan as an SVG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show where the blocks would go, which merges are passed over and why, and the totals; nothing is changed."""
    from se_inject.costs import compare_costs
    from se_inject.files import check_target
    from se_inject.picture import SVG, draw_network
    from se_inject.rewrite import find_plan, get_plan, inject

    options = read_options()
    if graph is not None:
        check_target(graph, (SVG,))
    network, source = open_model()
    if graph is not None:
        draw_network(network, graph, **options)
        console.talk(f"wrote {graph}")
    if find_plan(network) is None:  # an artifact shows the plan that it was made with
        network = inject(network, inplace=True, **options)
    plan = get_plan(network)
    before, after = compare_costs(network, plan)
    if as_json:
        console.print_json({**_describe_source(source), **console.describe_plan(plan, before, after)})
    else:
        console.print_plan(plan, before, after)


@app.command("finetune")
@takes(open_model=open_model, name_data=name_data, read_options=read_options)
def run_finetune(
    open_model: Callable[[], Opened],
    name_data: Callable[[], dict[str, Any]],
    *,
    recipe: Annotated[
        str,
        typer.Option("--recipe", metavar="NAME|FILE", help="One of ours (short, se_only, ...), or a .yaml file."),
    ] = "short",
    epochs: Annotated[float | None, typer.Option("--epochs", metavar="N", help="Short for --set epochs=N.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override the recipe. Repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write the tuned network.")] = Path(
        "tuned.pt"
    ),
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="FOLDER", help="For checkpoints, logs, results; runs/NAME of --out."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the folder.")] = False,
    control: Annotated[
        bool, typer.Option("--compare", help="Train the network without blocks beside it, on the same budget.")
    ] = False,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Repeat with N seeds.")] = 1,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the steps with torch.compile.")] = False,
    input_size: InputSize = None,
    max_bad: MaxBad = 0,
    device: Device = "auto",
    read_options: Callable[[], dict[str, Any]],
    as_json: AsJson = False,
) -> None:
    """Fine-tune a network on your images; a network without blocks is injected first."""
    from se_inject.experiment import Request
    from se_inject.finetune import finetune
    from se_inject.recipe import read_recipe
    from se_inject.world import join_world

    overrides = [*(settings or ()), *([] if epochs is None else [f"epochs={epochs}"])]
    request = Request(
        recipe=read_recipe(recipe, overrides),
        data=name_data(),
        options=read_options(),
        out=out,
        folder=run or Path("runs") / out.stem,
        has_control=control,
        num_seeds=seeds,
        input_size=input_size,
        max_bad=max_bad,
        compiled=compiled,
        resume=resume,
    )
    with join_world(device) as world:
        tuned = finetune(open_model, request, world, console.make_progress() if world.is_main else None)
        if world.is_main and as_json:
            console.print_json(tuned.to_values())
        elif world.is_main:
            console.print_tuned(tuned)


@app.command("evaluate")
@takes(open_model=open_model, name_data=name_data)
def run_evaluate(
    open_model: Callable[[], Opened],
    name_data: Callable[[], dict[str, Any]],
    *,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Images at once.")] = 64,
    workers: Annotated[int, typer.Option("--workers", metavar="N", help="Processes that read images.")] = 2,
    input_size: InputSize = None,
    max_bad: MaxBad = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure how well a network classifies: top-1, top-5, by class, and which classes it takes for which."""
    from se_inject.finetune import score_network
    from se_inject.world import join_world

    with join_world(device) as world:
        scores, names = score_network(
            open_model,
            name_data(),
            world,
            batch_size=batch_size,
            workers=workers,
            input_size=input_size,
            max_bad=max_bad,
            progress=console.make_progress() if world.is_main else None,
        )
        if world.is_main and as_json:
            console.print_json({**scores.to_values(), "unreadable": names})
        elif world.is_main:
            console.print_scores(scores, names)


@app.command("predict")
@takes(open_model=open_model)
def run_predict(
    open_model: Callable[[], Opened],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    *,
    top_k: Annotated[int, typer.Option("--top-k", help="How many classes an image.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Name the most probable classes of images, with the model's own preprocessing."""
    from dataclasses import asdict

    from se_inject.images import make_transform, predict_image
    from se_inject.rewrite import find_plan

    network, source = open_model()
    transform = make_transform(source, find_plan(network))
    names = source.classes if source is not None else ()
    predictions = {str(path): predict_image(network, path, transform, classes=names, top_k=top_k) for path in images}
    if as_json:
        console.print_json({path: [asdict(item) for item in classes] for path, classes in predictions.items()})
    else:
        console.print_predictions(predictions)


@app.command("export")
@takes(open_model=open_model)
def run_export(
    open_model: Callable[..., Opened],
    *,
    optimized: Annotated[
        bool,
        typer.Option("--optimize", help="Make it fast first: norms folded, blocks run with the layers around them."),
    ] = False,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="timm:NAME", help="The weights of timm's own SE network, as in timm:seresnet50."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="A program: .pt2 (torch.export) or .onnx; with --optimize or --to also .pt, .pth or .safetensors. "
            "model.pt2; fast.pt2 with --optimize; NAME.pt with --to.",
        ),
    ] = None,
    input_size: InputSize = None,
    as_json: AsJson = False,
) -> None:
    """Write a network as a program that runs without its code, or as timm's own SE network, after comparing the two."""
    if to is not None:
        if optimized or input_size is not None:
            found = "--optimize" if optimized else "--input-size"
            raise OptionError(f"--to writes timm's network, and {found} has no part in it; leave out one of the two")
        _export_to_timm(open_model, to, out, as_json=as_json)
        return
    from se_inject.deployment import check_deployment, deploy
    from se_inject.files import SUFFIXES

    target = out or Path("fast.pt2" if optimized else "model.pt2")
    check_deployment(target)
    if target.suffix in SUFFIXES and not optimized:
        raise OptionError(
            f"{target} would hold the same network again; give --optimize, --to timm:NAME, or a program (.pt2, .onnx)"
        )
    network, source = open_model()
    deployment = deploy(network, target, optimized=optimized, input_size=input_size, source=source)
    for note in deployment.notes:
        console.talk(note)
    if as_json:
        console.print_json({"out": str(target), **deployment.to_values()})
    else:
        console.stdout.out(f"{target}: {deployment}")


@app.command("bench")
@takes(open_model=open_model, read_options=read_options)
def run_bench(
    open_model: Callable[[], Opened],
    *,
    batch_size: Annotated[int, typer.Option("--batch", metavar="N", help="Images at once.")] = 1,
    input_size: InputSize = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare", metavar="NAME", help="A network to measure beside it, as timm:seresnet50. Repeatable."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="How often each is timed, in turn.")] = 20,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Through torch.compile too.")] = True,
    training: Annotated[bool, typer.Option("--training", help="Time steps of training too.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Maps with the channels last.")] = False,
    precision: Annotated[str, typer.Option("--precision", metavar="fp32|bf16", help="bf16 is autocast.")] = "fp32",
    threads: Annotated[int | None, typer.Option("--threads", metavar="N", help="Of the CPU; torch's choice.")] = None,
    device: Device = "auto",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw a chart (.png, .svg, .pdf).")
    ] = None,
    read_options: Callable[[], dict[str, Any]],
    as_json: AsJson = False,
) -> None:
    """Measure what SE costs: bytes, memory and time of the plain, the injected, the optimized network and of peers."""
    from se_inject.sources import open_network
    from se_inject.speed import Conditions, measure_network
    from se_inject.world import choose_device

    if plot is not None:
        from se_inject.files import check_target
        from se_inject.speed_chart import SUFFIXES, draw_speed

        check_target(plot, SUFFIXES)
    conditions = Conditions(
        batch_size, input_size, rounds, compiled, training, channels_last, precision, threads, choose_device(device)
    )
    network, source = open_model()
    peers = {name: open_network(name, pretrained=False).model for name in compare or ()}
    options = read_options()
    measured = measure_network(network, conditions, peers=peers, options=options, report=console.talk)
    if plot is not None:
        draw_speed(measured.rows, f"{source or type(network).__name__}, {measured.describe()}", plot)
        console.talk(f"wrote {plot}")
    if as_json:
        console.print_json(measured.to_values())
    else:
        console.print_speed(measured.rows)
        console.talk(measured.describe())


@app.command("demo")
def run_demo(
    *,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write the network.")] = Path("model.pt"),
) -> None:
    """Inject into a real ImageNet network that needs no download, and show that nothing changes."""
    from se_inject.demo import run

    run(out)


def main() -> None:
    """Run the command line; expected failures end with one line and exit code 1."""
    try:
        app()
    except SEInjectError as error:
        console.stderr.print(f"[bold red]error:[/] {escape(' '.join(str(error).split()))}")
        sys.exit(1)


def _export_to_timm(open_model: Callable[..., Opened], to: str, out: Path | None, *, as_json: bool) -> None:
    from se_inject.export import export_to_timm
    from se_inject.files import check_target, write_tensors

    library, _, name = to.partition(":")
    if library != "timm" or not name:
        raise OptionError(f"--to is {to!r}; expected timm:NAME, as in timm:seresnet50")
    target = out or Path(f"{name}.pt")
    check_target(target)
    network, _ = open_model(pretrained=False)
    export = export_to_timm(network, name)
    write_tensors(target, export.model.state_dict(), {})
    if as_json:
        values = {"out": str(target), "to": to, "options": export.options, "difference": export.difference}
        console.print_json(values)
    else:
        options = "".join(f", {key}={value}" for key, value in export.options.items())
        console.stdout.out(
            f"{target}: timm.create_model({export.name!r}{options}, checkpoint_path={str(target)!r}); "
            f"outputs differ by {export.difference:.1g} of the largest"
        )


def _describe_source(source: Source | None) -> dict[str, Any]:
    return {"source": None if source is None else str(source), "weights": None if source is None else source.weights}
