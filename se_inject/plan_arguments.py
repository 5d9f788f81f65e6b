"""Options of a plan on the command line, and how they are read.

Takes words from the command line, gives options as `inject` takes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from se_inject.errors import OptionError

Ratios = Annotated[
    list[str] | None,
    typer.Option(
        "--r",
        "--reduction-ratio",  # torchrun's parser takes --r for one of its own
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
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="A plan to cut by, in place of the options: search writes one."),
]


def read_options(
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
    plan: PlanFile = None,
) -> dict[str, Any]:
    """Read the options of a plan, as `inject` takes them; those that are its defaults are left out."""
    from se_inject.rewrite import inject

    values = {
        "r": _read_ratios(r) if r else 16,
        "divisor": divisor,
        "bias": bias,
        "squeeze": squeeze,
        "gate": gate,
        "block": block,
        "placement": placement,
        "concat": concat,
        "at": tuple(kind.strip() for kind in at.split(",") if kind.strip()),
        "stages": _read_stages(stages),
        "skip_last_stage": skip_last_stage,
        "include": tuple(include or ()),
        "exclude": tuple(exclude or ()),
    }
    parameters = inspect.signature(inject).parameters
    options = {name: value for name, value in values.items() if value != parameters[name].default}
    if plan is None:
        return options
    if options:
        name = next(iter(options)).replace("_", "-")
        raise OptionError(f"--plan holds all options already; leave out --{name}, or --plan")
    return {"plan": _read_plan(plan)}


def _read_plan(path: Path) -> Any:
    from se_inject.errors import PlanError
    from se_inject.plan import Plan

    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} cannot be read as a plan: {getattr(error, 'strerror', None) or error}") from error


def _read_ratios(values: list[str]) -> Mapping[str, float]:
    """Read `16` and `layer4.*=32`; what is for all comes first, so that a pattern counts over it."""
    ratios: dict[str, float] = {"*": 16.0}
    for value in values:
        pattern, _, number = value.rpartition("=")
        try:
            ratios[pattern or "*"] = float(number)
        except ValueError:
            raise OptionError(
                f"--r is {value!r}; expected a number, as in 16, or PATTERN=NUMBER, as in 'layer4.*=32'"
            ) from None
    return ratios


def _read_stages(value: str) -> tuple[int, ...]:
    try:
        return tuple(int(stage) for stage in value.split(",") if stage.strip())
    except ValueError:
        raise OptionError(f"--stages is {value!r}; expected numbers, as in 2,3,4") from None
