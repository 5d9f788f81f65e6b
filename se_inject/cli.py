"""The command line: `se-inject MODEL --out model.pt`, and the other verbs.

Each command takes its options, calls the stages and prints. Expected failures become one line on stderr and exit code
1.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from se_inject import __version__, console
from se_inject.errors import OptionError, SEInjectError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

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
Include = Annotated[
    list[str] | None, typer.Option("--include", metavar="PATTERN", help="Only these paths, as in 'layer3.*'.")
]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="Not these paths.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@app.callback(invoke_without_command=True)
def show_version(*, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Retrofit squeeze-and-excitation blocks into trained CNNs. `se-inject MODEL` is short for `inject MODEL`."""
    if version:
        console.stdout.out(f"se-inject {__version__}")
        raise typer.Exit


@app.command("inject")
def run_inject(
    model: ModelName,
    *,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Where to write (.pt, .pth or .safetensors).")
    ] = Path("model.pt"),
    r: Ratios = None,
    divisor: Divisor = 8,
    bias: Bias = True,
    include: Include = None,
    exclude: Exclude = None,
    weights: Weights = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    trust_source: TrustSource = False,
    as_json: AsJson = False,
) -> None:
    """Inject blocks into a network, as an exact identity, and write the result to a file."""
    from se_inject.artifact import save
    from se_inject.costs import compare_costs
    from se_inject.files import check_target
    from se_inject.rewrite import get_plan, inject

    check_target(out)  # before a download and not after it
    network, source = _open(model, weights, pretrained, num_classes, trust_source)
    ratios, only, without = _read_ratios(r), include or (), exclude or ()
    injected = inject(network, r=ratios, divisor=divisor, bias=bias, include=only, exclude=without, inplace=True)
    save(injected, out, source=source)
    plan = get_plan(injected)
    before, after = compare_costs(injected, plan)
    if as_json:
        console.print_json({"out": str(out), **_describe_source(source), **console.describe_plan(plan, before, after)})
    else:
        growth = f"{before.parameters:,} -> {after.parameters:,} parameters"
        console.stdout.out(
            f"{out}: {plan.model} with {len(plan.sites)} blocks, {growth}; the same outputs until it is trained"
        )


@app.command("plan")
def run_plan(
    model: ModelName,
    *,
    r: Ratios = None,
    divisor: Divisor = 8,
    bias: Bias = True,
    include: Include = None,
    exclude: Exclude = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    num_classes: NumClasses = None,
    trust_source: TrustSource = False,
    as_json: AsJson = False,
) -> None:
    """Show where the blocks would go, which merges are passed over and why, and the totals; nothing is changed."""
    from se_inject.costs import compare_costs
    from se_inject.rewrite import find_plan, get_plan, inject

    network, source = _open(model, weights, pretrained, num_classes, trust_source)
    if find_plan(network) is None:  # an artifact shows the plan that it was made with
        ratios, only, without = _read_ratios(r), include or (), exclude or ()
        network = inject(network, r=ratios, divisor=divisor, bias=bias, include=only, exclude=without, inplace=True)
    plan = get_plan(network)
    before, after = compare_costs(network, plan)
    if as_json:
        console.print_json({**_describe_source(source), **console.describe_plan(plan, before, after)})
    else:
        console.print_plan(plan, before, after)


@app.command("predict")
def run_predict(
    model: ModelName,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    *,
    top_k: Annotated[int, typer.Option("--top-k", help="How many classes an image.")] = 5,
    weights: Weights = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    trust_source: TrustSource = False,
    as_json: AsJson = False,
) -> None:
    """Name the most probable classes of images, with the model's own preprocessing."""
    from dataclasses import asdict

    from se_inject.images import make_transform, predict_image
    from se_inject.rewrite import find_plan

    network, source = _open(model, weights, pretrained, num_classes, trust_source)
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
    network, _ = _open(model, None, False, None, trust_source)
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


def _open(
    name: str,
    weights: Path | None,
    pretrained: bool,  # noqa: FBT001
    num_classes: int | None,
    trust_source: bool,  # noqa: FBT001
) -> tuple[nn.Module, Source | None]:
    for library in ("timm", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from se_inject.artifact import get_source, load
    from se_inject.files import SUFFIXES
    from se_inject.sources import open_network

    if Path(name).suffix in SUFFIXES and Path(name).is_file():
        if weights is not None or num_classes is not None:
            raise OptionError(
                f"{name} holds its own weights and classifier; --weights and --num-classes go with a model name"
            )
        model = load(name, trust_source=trust_source)
        source = get_source(model)
    else:
        network = open_network(name, pretrained=pretrained, weights=weights, num_classes=num_classes)
        model, source = network.model, network.source
    console.talk(f"{source or name}, weights: {source.weights if source else name}")
    return model, source


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


def _describe_source(source: Source | None) -> dict[str, Any]:
    return {"source": None if source is None else str(source), "weights": None if source is None else source.weights}
