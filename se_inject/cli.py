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
from se_inject.arguments import AsJson, ModelName, Opened, TrustSource, open_model, read_options, takes
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
    predictions = {str(path): predict_image(network, path, transform, top_k=top_k) for path in images}
    if as_json:
        console.print_json({path: [asdict(item) for item in classes] for path, classes in predictions.items()})
    else:
        console.print_predictions(predictions)


@app.command("export")
def run_export(
    model: ModelName,
    *,
    to: Annotated[str, typer.Option("--to", metavar="timm:NAME", help="timm's SE network, as in timm:seresnet50.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to write (.pt, .pth or .safetensors); NAME.pt.")
    ] = None,
    trust_source: TrustSource = False,
    as_json: AsJson = False,
) -> None:
    """Write an injected network as a state dict of timm's own SE network, after comparing the two."""
    from se_inject.export import export_to_timm
    from se_inject.files import check_target, write_tensors

    library, _, name = to.partition(":")
    if library != "timm" or not name:
        raise OptionError(f"--to is {to!r}; expected timm:NAME, as in timm:seresnet50")
    target = out or Path(f"{name}.pt")
    check_target(target)
    network, _ = open_model(model, pretrained=False, trust_source=trust_source)
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


def _describe_source(source: Source | None) -> dict[str, Any]:
    return {"source": None if source is None else str(source), "weights": None if source is None else source.weights}
