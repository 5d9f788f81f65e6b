"""Planning: decide which merges receive a block.

Takes a model and the options, gives a `Survey`: the plan and the traced code of every owner. Everything that can fail
fails here or in the code generation, before a model is changed. `draft` collects the sites, `replay` follows a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from se_inject.attention import Recipe, count_block, find_recipe
from se_inject.block import Gate, Squeeze
from se_inject.calls import Entry, encode_call
from se_inject.draft import LAYER_NOTES, Draft, fill_draft
from se_inject.errors import EmptyPlanError
from se_inject.inspection import Inspection
from se_inject.placements import Placement
from se_inject.places import Joining, Kind, Placing
from se_inject.plan import DEFAULT_R, SE, Options, Plan
from se_inject.probe import probe_model
from se_inject.selection import check_options, filter_sites, read_ratios, set_ratios
from se_inject.twin import Twin, alone, get_dtype

_MERGE_KINDS: tuple[Kind, ...] = ("residual", "concat")


@dataclass(frozen=True)
class Survey:
    """A plan and what it was made from.

    Attributes:
        plan: The plan.
        twin: The fake twin that was inspected.
        inspections: The traced code of every entry that has a merge or a site.
        recipe: How its blocks are made; None for our own.
    """

    plan: Plan
    twin: Twin
    inspections: Mapping[Entry, Inspection]
    recipe: Recipe | None = None


def make_plan(
    model: nn.Module,
    *,
    r: float | Mapping[str, float] = DEFAULT_R,
    divisor: int = 8,
    bias: bool = True,
    squeeze: Squeeze = "mean",
    gate: Gate = "sigmoid",
    block: str | Callable[[int], nn.Module] = SE,
    placement: Placement = "standard",
    concat: Joining = "joint",
    at: Iterable[Kind] = (),
    stages: Iterable[int] = (),
    skip_last_stage: bool = False,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    example: object = None,
) -> Plan:
    """Plan where the blocks go; the model is not changed and not run.

    Args:
        model: The trained network.
        r: The reduction ratio; or one by pattern, `{"layer4.*": 32}` (the last match counts, 16 where none does).
        divisor: Hidden channels are rounded to a multiple of this.
        bias: Whether the blocks' layers have biases.
        squeeze: What a block squeezes a map to: its "mean" or its "max".
        gate: The activation of a gate: "sigmoid", "hard_sigmoid" or "tanh".
        block: "se"; another channel attention of timm's `create_attn`, such as "eca"; or a function that makes a module
            for a number of channels. It must be an exact identity when new, or be one that can be made so.
        placement: Where the block stands at a merge: "standard" on the branch just before it, "pre" on what enters the
            branch, "post" on the joined map after its activation, "identity" on the shortcut, "conv3x3" after the
            branch's middle spatial convolution (Hu et al., arXiv 1709.01507, figure 5).
        concat: "joint" squeezes the branches of a merge together, "separate" gives each a block of its own.
        at: The kinds of places: "residual", "concat", "fusion" (sums without a shortcut), and of layers "stage" (before
            each downsampling), "conv" (after each convolution), "depthwise" (before the pointwise layer that follows a
            depthwise one). By default residual and concat; where a network has none, depthwise or stage.
        stages: The stages that alone receive blocks, counted as in the paper: the maps of stage s are `2 ** s` times
            smaller than the input, so that a ResNet-50 has 2 to 5. All if empty.
        skip_last_stage: Leave out the last stage, which has most of the parameters.
        include: Patterns of paths that alone receive blocks, as in `layer3.*`; all if empty.
        exclude: Patterns of paths that receive none.
        example: An input (N, C, H, W), a tuple of arguments, a dict of keyword arguments, or the height and width of
            images; found if None.

    Raises:
        ModelError: The model cannot be changed (wrapped, compiled, scripted, quantised, injected already).
        ExampleError: The network does not run on the example.
        OptionError: An option is out of range, or a pattern matches nothing.
        EmptyPlanError: No merge can receive a block; the message lists the reasons.

    Example:
        >>> import timm
        >>> plan = make_plan(timm.create_model("resnet18"), r=16)
        >>> len(plan.sites), plan.sites[0].path, plan.num_parameters
        (8, 'layer1.0.se', 90112)
    """
    options = Options(
        r, divisor, bias, squeeze, gate, block, placement, concat, at, stages, skip_last_stage, include, exclude
    )
    return survey_model(model, options, example=example).plan


@alone()
@torch.inference_mode(False)  # its tensors do not tell what is written on them
def survey_model(model: nn.Module, options: Options, *, example: object = None) -> Survey:
    """Make a plan and keep the traces; the errors are those of `make_plan`."""
    check_options(options)
    ratios = read_ratios(options.r)
    recipe = find_recipe(options.block)
    probe = probe_model(model, example=example)
    concat = options.concat if recipe is None else "separate"
    draft = Draft(probe, Placing(options.placement, concat, tuple(dict.fromkeys(options.at)) or _MERGE_KINDS))
    note = fill_draft(draft, is_given=bool(tuple(options.at)))
    sites, dropped = filter_sites(draft.sites, options)
    plan = Plan(
        model=type(model).__name__,
        sites=tuple(set_ratios(sites, ratios, options.divisor)),
        passed_over=(*draft.passed, *dropped),
        divisor=options.divisor,
        bias=options.bias,
        squeeze=options.squeeze,
        gate=options.gate,
        block=SE if recipe is None else recipe.name,
        placement=options.placement,
        concat=concat,
        at=draft.placing.at,
        note=note,
    )
    if recipe is not None:
        plan = _refuse_other_layouts(plan)
    if not plan.sites:
        raise EmptyPlanError(_explain_empty(plan), plan.passed_over)
    plan = replace(plan, sites=tuple(count_block(site, plan, recipe) for site in plan.sites))
    used = [entry for entry, _ in plan.iterate_entries()]
    calls = {entry.key: encode_call(probe.visits[entry].calls[0], get_dtype(model)) for entry in [Entry(""), *used]}
    return Survey(replace(plan, calls=calls), probe.twin, draft.inspections, recipe)


def _refuse_other_layouts(plan: Plan) -> Plan:
    """Pass over maps that are not (N, C, H, W); only our own block takes others."""
    others = [site.path for site in plan.sites if (site.num_spatial, site.channel_dim) != (2, 1)]
    return plan.leave_out(dict.fromkeys(others, f"{plan.block} takes maps (N, C, H, W) alone"))


def _explain_empty(plan: Plan) -> str:
    seen = {item.kind for item in plan.passed_over}
    missing = [kind for kind in plan.at if kind in LAYER_NOTES and kind not in seen]
    if missing and len(plan.at) == len(missing):
        return f"{plan.model} has no place for a block: no layer for {' or '.join(missing)} ran; ask for other kinds"
    if not plan.passed_over:
        return (
            f"{plan.model} has no place for a block: no residual addition, channel concatenation or downsampling of "
            f"feature maps (N, C, ...) ran"
        )
    reasons = "; ".join(f"{num} x {kind}: {reason}" for (kind, reason), num in plan.count_reasons().items())
    return f"{plan.model} has no place that can receive a block: {reasons}"
