"""Planning: decide which merges receive a block.

Takes a model and the options, or a plan to be replayed, gives a `Survey`: the plan and the traced code of every owner
in it. Everything that can fail fails here or in the code generation, before a model is changed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from se_inject.attention import Recipe, count_block, find_recipe
from se_inject.block import Gate, Squeeze
from se_inject.calls import METHODS, Call, Entry, decode_call, describe_form, encode_call
from se_inject.errors import EmptyPlanError, PlanError, TraceError
from se_inject.inspection import Inspection, inspect_border, inspect_entry, write_entry
from se_inject.layers import LAYER_SIDES, choose_layers
from se_inject.operations import count_positions, is_map
from se_inject.placements import Placement
from se_inject.places import Joining, Kind, LayerKind, Place, Placing
from se_inject.plan import DEFAULT_R, SE, Options, PassedOver, Plan, Site
from se_inject.probe import LayerVisit, Probe, Visit, probe_model
from se_inject.selection import check_options, filter_sites, read_ratios, set_ratios
from se_inject.twin import Twin, check_model, get_dtype, make_twin

_MERGE_KINDS: tuple[Kind, ...] = ("residual", "concat")
_HIDDEN = "it runs inside a function that torch.fx records as one operation"
_LAYER_NOTES = {
    "stage": "before each downsampling",
    "depthwise": "after each depthwise convolution, before the pointwise one",
    "conv": "after each convolution",
}


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
        example: An input (N, C, H, W), a tuple of arguments or a dict of keyword arguments; found if None.

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


@dataclass
class _Draft:
    """A plan in the making."""

    probe: Probe
    placing: Placing
    sites: list[Site] = field(default_factory=list)
    passed: list[PassedOver] = field(default_factory=list)
    inspections: dict[Entry, Inspection] = field(default_factory=dict)
    names: dict[str, set[str]] = field(default_factory=dict)
    gated: dict[Entry, set[tuple[str, str]]] = field(default_factory=dict)
    """The edges of each entry's graph that have a block."""

    def add(self, place: Place, kind: Kind, num_calls: int) -> None:
        """Make a place a site, or pass over it."""
        entry, num = place.entry, place.num_merges * num_calls
        reason = place.reason
        if not reason and kind not in self.placing.at:
            reason = f"not asked for: at is {', '.join(self.placing.at)}"
        gated = self.gated.setdefault(entry, set())
        edges = {(edge.node, consumer) for edge in place.edges for consumer in edge.consumers}
        if not reason and edges & gated:  # the second block's output would have no reader
            reason = "what it would gate is gated by the block of another place"
        if reason:
            self.passed.append(PassedOver(entry.path, entry.method, kind, place.code, reason, num))
            return
        gated |= edges
        owner = self.probe.twin.model.get_submodule(entry.path)
        name = _choose_name(owner, self.names.setdefault(entry.path, set()))
        self.sites.append(_make_site(place, kind, name, num, _count_halvings(self.probe, place)))


@torch.inference_mode(False)  # its tensors do not tell what is written on them
def survey_model(model: nn.Module, options: Options, *, example: object = None) -> Survey:
    """Make a plan and keep the traces; the errors are those of `make_plan`."""
    check_options(options)
    ratios = read_ratios(options.r)
    recipe = find_recipe(options.block)
    probe = probe_model(model, example=example)
    concat = options.concat if recipe is None else "separate"
    draft = _Draft(probe, Placing(options.placement, concat, tuple(dict.fromkeys(options.at)) or _MERGE_KINDS))
    note = _find_sites(draft, is_given=bool(tuple(options.at)))
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


def _find_sites(draft: _Draft, *, is_given: bool) -> str:
    """Fill a draft; returns what the user should know of how the places were chosen."""
    probe, note = draft.probe, ""
    for entry, visit in probe.visits.items():
        inspection, lost = _inspect(draft, entry, visit)
        draft.passed += lost
        for place in inspection.places if inspection else ():
            if place.operations:
                draft.add(place, place.kind, len(visit.calls))  # type: ignore[arg-type]  # of a merge
    # Channel attention that is there already is reported, and a transformer is not gated at its patches.
    is_settled = any(m.kind == "residual" and m.reason for m in draft.passed)
    if not is_given and not draft.sites and not is_settled:
        kind: LayerKind = "depthwise" if choose_layers(probe.layers, "depthwise") else "stage"
        draft.placing = replace(draft.placing, at=(*draft.placing.at, kind))
        note = f"no merge to gate, so the blocks stand {_LAYER_NOTES[kind]} ({kind})"
    for kind in get_args(LayerKind):
        for layer in choose_layers(probe.layers, kind) if kind in draft.placing.at else ():
            _add_layer(draft, layer, kind)
    return note if draft.sites else ""


def _add_layer(draft: _Draft, visit: LayerVisit, kind: LayerKind) -> None:
    """Add the place at a layer: at the border of a module that is one layer or begins a stage, else in the code."""
    side, border = LAYER_SIDES[kind]
    probe, entry = draft.probe, visit.entry
    if kind == "stage" and visit.block is not None:
        entry = visit.block
    is_border = entry != visit.entry or not probe.twin.model.get_submodule(entry.path)._modules
    try:
        call = _get_only_call(probe.visits[entry])
        if entry not in draft.inspections:
            inspect = inspect_border(probe.twin, entry, call) if is_border else None
            draft.inspections[entry] = inspect or inspect_entry(probe.twin, entry, call, draft.placing)
        inspection = draft.inspections[entry]
        place = inspection.get_place(border) if is_border else inspection.get_place(side, visit.index)
        _check_code(draft, entry, [place] if place else [], call)
        reason = "" if place else _HIDDEN
    except TraceError as error:
        place, reason = None, str(error)
    if place is None:
        draft.passed.append(PassedOver(entry.path, entry.method, kind, visit.call.kind, reason, 0))
    elif not any(
        (site.owner, site.method, site.index) == (entry.path, entry.method, place.index) for site in draft.sites
    ):
        draft.add(place, kind, len(probe.visits[entry].calls))  # else stage and depthwise are one place


def _count_halvings(probe: Probe, place: Place) -> int:
    """Count how often a place's maps are halved in comparison with the network's input."""
    call = probe.visits[Entry("")].calls[0]
    image = next((x for x in tree_leaves((call.args, call.kwargs)) if is_map(x)), None)
    if image is None:
        return 0
    return round(math.log2(max(1, count_positions(image)) / max(1, place.positions)) / (image.ndim - 2))


def _refuse_other_layouts(plan: Plan) -> Plan:
    """Pass over maps that are not (N, C, H, W); only our own block takes others."""
    fits = {site.path: (site.num_spatial, site.channel_dim) == (2, 1) for site in plan.sites}
    reason = f"{plan.block} takes maps (N, C, H, W) alone"
    dropped = [PassedOver(s.owner, s.method, s.kind, s.merge, reason, s.num_merges) for s in plan.sites]
    return replace(
        plan,
        sites=tuple(s for s in plan.sites if fits[s.path]),
        passed_over=(*plan.passed_over, *(d for d, s in zip(dropped, plan.sites, strict=True) if not fits[s.path])),
    )


@torch.inference_mode(False)
def replay_plan(model: nn.Module, plan: Plan, *, block: Callable[[int], nn.Module] | None = None) -> Survey:
    """Trace the owners that a plan names, from the calls that it recorded; the network is not run.

    Args:
        model: The network.
        plan: The plan.
        block: Makes the blocks, where the plan was made with a factory of the user's.

    Raises:
        ModelError: The model cannot be changed.
        PlanError: The plan was made for another network.
    """
    check_model(model)
    recipe = find_recipe(block or plan.block)
    twin = make_twin(model)
    inspections = {}
    for entry, sites in plan.iterate_entries():
        where = f"the plan does not fit {type(model).__name__} at {entry}"
        if entry.method not in METHODS:
            raise PlanError(f"{where}: {entry.method} is none of {', '.join(METHODS)}")
        try:
            call = decode_call(plan.calls[entry.key], twin)
            is_border = any(site.is_border for site in sites)
            inspections[entry] = (
                inspect_border(twin, entry, call) if is_border else inspect_entry(twin, entry, call, plan.placing)
            )
            places = inspections[entry].places
            difference = next(filter(None, (_compare(site, places, plan, recipe) for site in sites)), "")
        except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError, TraceError) as error:
            raise PlanError(f"{where}: {error}; make a new one") from error
        if difference:
            raise PlanError(f"{where}: {difference}; make a new one")
    return Survey(plan, twin, inspections, recipe)


def _compare(site: Site, places: list[Place], plan: Plan, recipe: Recipe | None) -> str:
    """Tell in what a site of a plan differs from the places that the network has."""
    place = places[site.index] if 0 <= site.index < len(places) else None
    if place is None:
        return f"it says {site.kind} number {site.index}, found {len(places)} places"
    if (place.num_spatial, place.channel_dim) != (site.num_spatial, site.channel_dim):
        return "the maps have other dimensions"
    expected = next((sides for kind, sides in LAYER_SIDES.items() if kind == site.kind), (site.kind,))
    if place.kind not in expected or place.channels != site.channels:
        return f"it says {site.kind} of {site.channels} channels, found {place.kind} of {place.channels}"
    if not site.r >= 1 or site != count_block(site, plan, recipe):
        return f"{site.hidden} hidden channels are not what r={site.r:g} gives"
    return place.reason


def _inspect(draft: _Draft, entry: Entry, visit: Visit) -> tuple[Inspection | None, list[PassedOver]]:
    """Trace an entry; merges that ran but are not in its graph are passed over with the reason."""
    if not visit.merges:
        return None, []
    ran = Counter(merge.kind for merge in visit.merges)
    inspection = None
    reason = _HIDDEN
    try:
        found = inspect_entry(draft.probe.twin, entry, _get_only_call(visit), draft.placing)
        draft.inspections[entry] = found
        merges = [place for place in found.places if place.operations]
        _check_code(draft, entry, merges, visit.calls[0])
        for merge in merges:
            ran["concat" if merge.kind == "concat" else "sum"] -= merge.num_merges * len(visit.calls)
        inspection, reason = found, found.difference or found.traces[0].doubt or reason
    except TraceError as error:
        reason = str(error)
    return inspection, [PassedOver(entry.path, entry.method, kind, "", reason, n) for kind, n in ran.items() if n > 0]


def _check_code(draft: _Draft, entry: Entry, places: list[Place], call: Call) -> None:
    """Find out now, and not when the model is about to be changed, what cannot be recorded or written down.

    Raises:
        TraceError: The call cannot be recorded, or the code cannot be written.
    """
    if blocks := [("se", place) for place in places if not place.reason]:
        encode_call(call, torch.float32)
        write_entry(draft.probe.twin.model.get_submodule(entry.path), draft.inspections[entry], blocks)


def _get_only_call(visit: Visit) -> Call:
    """Return an entry's call, if its calls are alike."""
    if len({describe_form(call) for call in visit.calls}) > 1:
        raise TraceError("its owner is called with different arguments at different times")
    return visit.calls[0]


def _make_site(place: Place, kind: Kind, name: str, num_merges: int, stage: int) -> Site:
    return Site(
        owner=place.entry.path,
        method=place.entry.method,
        name=name,
        kind=kind,
        index=place.index,
        merge=place.code,
        branches=tuple(edge.label for edge in place.edges),
        channels=place.channels,
        hidden=0,
        r=DEFAULT_R,
        num_merges=num_merges,
        stage=stage,
        is_border=not place.edges,
        num_spatial=place.num_spatial,
        channel_dim=place.channel_dim,
    )


def _choose_name(owner: nn.Module, taken: set[str]) -> str:
    """Choose "se", or "se2" and so on."""
    names = (f"se{i}" if i > 1 else "se" for i in range(1, 10_000))
    name = next(n for n in names if n not in taken and is_free(owner, n))
    taken.add(name)
    return name


def is_free(owner: nn.Module, name: str) -> bool:
    """Tell whether an owner has room for a block of this name; an attribute that is None, as in timm, is room."""
    in_place = name in vars(owner) or name in owner._modules
    return not hasattr(owner, name) or (in_place and getattr(owner, name) is None)


def _explain_empty(plan: Plan) -> str:
    seen = {item.kind for item in plan.passed_over}
    missing = [kind for kind in plan.at if kind in _LAYER_NOTES and kind not in seen]
    if missing and len(plan.at) == len(missing):
        return f"{plan.model} has no place for a block: no layer for {' or '.join(missing)} ran; ask for other kinds"
    if not plan.passed_over:
        return (
            f"{plan.model} has no place for a block: no residual addition, channel concatenation or downsampling of "
            f"feature maps (N, C, ...) ran"
        )
    reasons = "; ".join(f"{num} x {kind}: {reason}" for (kind, reason), num in plan.count_reasons().items())
    return f"{plan.model} has no place that can receive a block: {reasons}"
