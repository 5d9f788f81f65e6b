"""The command line: `se-inject MODEL --out model.pt`, and the other verbs.

Each command takes its options, calls the stages and prints. Expected failures become one line on stderr and exit code
1.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from se_inject import __version__, console
from se_inject.errors import OptionError, SEInjectError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from se_inject.sources import Source

Opened = tuple[Any, Any]
"""A network and its `Source` or None; their types live in modules that load when they are used."""
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

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A timm or torchvision name (resnet50, timm:resnet50.a1_in1k, torchvision:resnet50, hf-hub:USER/NAME), a "
        "package.module:factory, or a file that se-inject wrote.",
    ),
]
Weights = Annotated[
    Path | None, typer.Option("--weights", metavar="FILE", help="A state dict to load (.pt, .pth, .safetensors).")
]
Pretrained = Annotated[bool, typer.Option("--pretrained/--no-pretrained", help="Fetch the library's weights.")]
NumClasses = Annotated[
    int | None, typer.Option("--num-classes", metavar="N", help="Replace the classifier by one for N classes.")
]
TrustSource = Annotated[bool, typer.Option("--trust-source", help="Import the factory that a file of ours names.")]
Ratios = Annotated[
    list[str] | None,
    typer.Option(
        "--r",
        metavar="R|PATTERN=R",
        help="Reduction ratio for all blocks (16), or for some: 'layer4.*=32'. Repeatable.",
    ),
]
Divisor = Annotated[
    int, typer.Option("--divisor", help="Hidden channels are rounded to a multiple of this; 1 is the paper's.")
]
Bias = Annotated[bool, typer.Option("--bias/--no-bias", help="Biases in the blocks' layers.")]
Squeeze = Annotated[str, typer.Option("--squeeze", metavar="mean|max", help="What a map is squeezed to.")]
Gate = Annotated[str, typer.Option("--gate", metavar="sigmoid|hard_sigmoid|tanh", help="The gate's activation.")]
Block = Annotated[
    str, typer.Option("--block", metavar="NAME", help="se, or another attention of timm's: eca, ge, gc, cbam, ...")
]
Placement = Annotated[
    str,
    typer.Option(
        "--placement",
        metavar="standard|pre|post|identity|conv3x3",
        help="Where at a merge: the end of the branch, its input, the joined map, the shortcut, its middle.",
    ),
]
Concat = Annotated[
    str, typer.Option("--concat", metavar="joint|separate", help="One block for all branches of a merge, or one each.")
]
At = Annotated[
    str,
    typer.Option(
        "--at",
        metavar="KIND,...",
        help="Of residual, concat, fusion, stage, conv, depthwise. By default residual,concat; where a network has "
        "neither, depthwise or stage.",
    ),
]
Stages = Annotated[
    str,
    typer.Option("--stages", metavar="N,...", help="Only maps that are 2^N times smaller than the input, as in 2,3,4."),
]
SkipLastStage = Annotated[
    bool, typer.Option("--skip-last-stage", help="Leave out the last stage, with most of the parameters.")
]
Include = Annotated[
    list[str] | None, typer.Option("--include", metavar="PATTERN", help="Only these paths, as in 'layer3.*'.")
]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="Not these paths.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def _read_options(
    *,
    r: Ratios = None,
    divisor: Divisor = 8,
    bias: Bias = True,
    squeeze: Squeeze = "mean",
    gate: Gate = "sigmoid",
    block: Block = "se",
    placement: Placement = "standard",
    concat: Concat = "joint",
    at: At = "",
    stages: Stages = "",
    skip_last_stage: SkipLastStage = False,
    include: Include = None,
    exclude: Exclude = None,
) -> dict[str, Any]:
    """Read the options of a plan, as `inject` and `make_plan` take them."""
    return {
        "r": _read_ratios(r),
        "divisor": divisor,
        "bias": bias,
        "squeeze": squeeze,
        "gate": gate,
        "block": block,
        "placement": placement,
        "concat": concat,
        "at": [kind.strip() for kind in at.split(",") if kind.strip()],
        "stages": _read_stages(stages),
        "skip_last_stage": skip_last_stage,
        "include": include or (),
        "exclude": exclude or (),
    }


def _open(
    model: ModelName,
    *,
    weights: Weights = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    trust_source: TrustSource = False,
) -> Opened:
    """Open the network that is named, with its source."""
    for library in ("timm", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from se_inject.artifact import get_source, load
    from se_inject.files import SUFFIXES
    from se_inject.sources import open_network

    if Path(model).suffix in SUFFIXES and Path(model).is_file():
        if weights is not None or num_classes is not None:
            raise OptionError(
                f"{model} holds its own weights and classifier; --weights and --num-classes go with a model name"
            )
        network = load(model, trust_source=trust_source)
        source = get_source(network)
    else:
        opened = open_network(model, pretrained=pretrained, weights=weights, num_classes=num_classes)
        network, source = opened.model, opened.source
    console.talk(f"{source or model}, weights: {source.weights if source else model}")
    return network, source


def _with(**readers: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a reader in place of a parameter, which gets a function that reads them."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        inner = {name: inspect.signature(reader, eval_str=True).parameters for name, reader in readers.items()}
        merged: dict[str, inspect.Parameter] = {}
        for name, parameter in own.parameters.items():
            merged.update(inner.get(name, {name: parameter}))

        @functools.wraps(command)
        def run(**given: Any) -> None:
            for name, reader in readers.items():
                values = {key: given.pop(key) for key in inner[name]}
                given[name] = functools.partial(reader, **values)
            command(**given)

        ordered = sorted(merged.values(), key=lambda parameter: parameter.kind)
        vars(run)["__signature__"] = own.replace(parameters=ordered)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
        return run

    return wrap


@app.callback(invoke_without_command=True)
def show_version(*, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Retrofit squeeze-and-excitation blocks into trained CNNs. `se-inject MODEL` is short for `inject MODEL`."""
    if version:
        console.stdout.out(f"se-inject {__version__}")
        raise typer.Exit


@app.command("inject")
@_with(open_model=_open, read_options=_read_options)
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
@_with(open_model=functools.partial(_open, pretrained=False), read_options=_read_options)
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
@_with(open_model=_open)
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
    network, _ = _open(model, pretrained=False, trust_source=trust_source)
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


def _read_ratios(values: list[str] | None) -> Mapping[str, float]:
    """Read `16` and `layer4.*=32`; what is for all comes first, so that a pattern counts over it."""
    ratios: dict[str, float] = {"*": 16.0}
    for value in values or ():
        pattern, _, number = value.rpartition("=")
        try:
            ratios[pattern or "*"] = float(number)
        except ValueError:
            raise OptionError(
                f"--r is {value!r}; expected a number, as in 16, or PATTERN=NUMBER, as in 'layer4.*=32'"
            ) from None
    return ratios


def _read_stages(value: str) -> list[int]:
    try:
        return [int(stage) for stage in value.split(",") if stage.strip()]
    except ValueError:
        raise OptionError(f"--stages is {value!r}; expected numbers, as in 2,3,4") from None


def _describe_source(source: Source | None) -> dict[str, Any]:
    return {"source": None if source is None else str(source), "weights": None if source is None else source.weights}
