"""Planning: decide which merges receive a block.

Takes a model and the options, or a plan to be replayed, gives a `Survey`: the plan and the traced code of every owner
in it. Everything that can fail fails here or in the code generation, before a model is changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from se_inject.block import count_hidden
from se_inject.calls import METHODS, Call, Entry, decode_call, describe_form, encode_call
from se_inject.errors import EmptyPlanError, OptionError, PlanError, TraceError
from se_inject.inspection import inspect_entry, write_entry
from se_inject.merges import Inspection, Merge
from se_inject.plan import DEFAULT_R, Options, PassedOver, Placement, Plan, Site
from se_inject.probe import Probe, Visit, probe_model
from se_inject.twin import Twin, check_model, get_dtype, make_twin


@dataclass(frozen=True)
class Survey:
    """A plan and what it was made from.

    Attributes:
        plan: The plan.
        twin: The fake twin that was inspected.
        inspections: The traced code of every entry that the plan has a site in.
    """

    plan: Plan
    twin: Twin
    inspections: Mapping[Entry, Inspection]


def make_plan(
    model: nn.Module,
    *,
    r: float | Mapping[str, float] = DEFAULT_R,
    divisor: int = 8,
    bias: bool = True,
    placement: Placement = "standard",
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
        placement: Where the block stands; "standard" is on the branch, just before the merge.
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
    options = Options(r, divisor, bias, placement, include, exclude)
    return survey_model(model, options, example=example).plan


def survey_model(model: nn.Module, options: Options, *, example: object = None) -> Survey:
    """Make a plan and keep the traces; the errors are those of `make_plan`."""
    ratios = _read_ratios(options.r)
    _check_options(options)
    probe = probe_model(model, example=example)
    sites: list[Site] = []
    passed: list[PassedOver] = []
    inspections: dict[Entry, Inspection] = {}
    taken: dict[str, set[str]] = {}
    for entry, visit in probe.visits.items():
        inspection, lost = _inspect(probe, entry, visit)
        passed += lost
        if inspection is None:
            continue
        inspections[entry] = inspection
        for merge in inspection.merges:
            num = len(merge.operations) * len(visit.calls)
            if merge.reason:
                passed.append(PassedOver(entry.path, entry.method, merge.kind, merge.code, merge.reason, num))
                continue
            name = _choose_name(probe.twin.model.get_submodule(entry.path), taken.setdefault(entry.path, set()))
            sites.append(_make_site(merge, name, num))
    sites, excluded = _filter(sites, tuple(options.include), tuple(options.exclude))
    plan = Plan(
        model=type(model).__name__,
        sites=tuple(_set_ratios(sites, ratios, options.divisor)),
        passed_over=(*passed, *excluded),
        divisor=options.divisor,
        bias=options.bias,
        placement=options.placement,
    )
    if not plan.sites:
        raise EmptyPlanError(_explain_empty(plan), plan.passed_over)
    used = [entry for entry, _ in plan.iterate_entries()]
    recorded = [Entry(""), *used]
    calls = {entry.key: encode_call(probe.visits[entry].calls[0], get_dtype(model)) for entry in recorded}
    return Survey(replace(plan, calls=calls), probe.twin, {entry: inspections[entry] for entry in used})


def _check_options(options: Options) -> None:
    divisor = options.divisor
    if isinstance(divisor, bool) or not isinstance(divisor, int) or divisor < 1:
        raise OptionError(f"divisor is {divisor!r}; it must be a whole number of at least 1")
    for name, patterns in (("include", options.include), ("exclude", options.exclude)):
        if isinstance(patterns, str) or not isinstance(patterns, Iterable):
            raise OptionError(f"{name} is {patterns!r}; give a list of patterns, as in ['layer4.*']")
    if options.placement != "standard":
        raise OptionError(f"placement is {options.placement!r}; it must be 'standard'")


def replay_plan(model: nn.Module, plan: Plan) -> Survey:
    """Trace the owners that a plan names, from the calls that it recorded; the network is not run.

    Raises:
        ModelError: The model cannot be changed.
        PlanError: The plan was made for another network.
    """
    check_model(model)
    twin = make_twin(model)
    inspections = {}
    for entry, sites in plan.iterate_entries():
        where = f"the plan does not fit {type(model).__name__} at {entry}"
        if entry.method not in METHODS:
            raise PlanError(f"{where}: {entry.method} is none of {', '.join(METHODS)}")
        try:
            inspections[entry] = inspect_entry(twin, entry, decode_call(plan.calls[entry.key], twin))
            merges = inspections[entry].merges
            difference = next(filter(None, (_compare(site, merges, plan.divisor) for site in sites)), "")
        except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError, TraceError) as error:
            raise PlanError(f"{where}: {error}; make a new one") from error
        if difference:
            raise PlanError(f"{where}: {difference}; make a new one")
    return Survey(plan, twin, inspections)


def _compare(site: Site, merges: list[Merge], divisor: int) -> str:
    """Tell in what a site of a plan differs from the merges that the network has."""
    merge = merges[site.index] if 0 <= site.index < len(merges) else None
    if merge is None:
        return f"it says {site.kind} number {site.index}, found {len(merges)} merges"
    if (merge.num_spatial, merge.channel_dim) != (site.num_spatial, site.channel_dim):
        return "the maps have other dimensions"
    if (merge.kind, merge.channels) != (site.kind, site.channels):
        return f"it says {site.kind} of {site.channels} channels, found {merge.kind} of {merge.channels}"
    if not site.r >= 1 or site.hidden != count_hidden(site.channels, site.r, divisor=divisor):
        return f"{site.hidden} hidden channels are not what r={site.r:g} gives"
    return merge.reason


def _inspect(probe: Probe, entry: Entry, visit: Visit) -> tuple[Inspection | None, list[PassedOver]]:
    """Trace an entry; merges that ran but are not in its graph are passed over with the reason."""
    if not visit.merges:
        return None, []
    ran = Counter(merge.kind for merge in visit.merges)
    inspection = None
    reason = "it runs inside a function that torch.fx records as one operation"
    try:
        found = inspect_entry(probe.twin, entry, _get_only_call(visit))
        if not all(merge.reason for merge in found.merges):
            # What cannot be written down is found out now, and not when the model is about to be changed.
            encode_call(visit.calls[0], torch.float32)
            blocks = [("se", merge) for merge in found.merges if not merge.reason]
            write_entry(probe.twin.model.get_submodule(entry.path), found.traces, blocks)
        for merge in found.merges:
            ran["concat" if merge.kind == "concat" else "sum"] -= len(merge.operations) * len(visit.calls)
        inspection, reason = found, found.difference or found.traces[0].doubt or reason
    except TraceError as error:
        reason = str(error)
    return inspection, [PassedOver(entry.path, entry.method, kind, "", reason, n) for kind, n in ran.items() if n > 0]


def _get_only_call(visit: Visit) -> Call:
    """Return an entry's call, if its calls are alike."""
    if len({describe_form(call) for call in visit.calls}) > 1:
        raise TraceError("its owner is called with different arguments at different times")
    return visit.calls[0]


def _make_site(merge: Merge, name: str, num_merges: int) -> Site:
    return Site(
        owner=merge.entry.path,
        method=merge.entry.method,
        name=name,
        kind=merge.kind,
        index=merge.index,
        merge=merge.code,
        branches=tuple(branch.label for branch in merge.branches),
        channels=merge.channels,
        hidden=0,
        r=DEFAULT_R,
        num_merges=num_merges,
        num_spatial=merge.num_spatial,
        channel_dim=merge.channel_dim,
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


def _matches(site: Site, pattern: str) -> bool:
    return fnmatchcase(site.owner, pattern) or fnmatchcase(site.path, pattern)


def _filter(
    sites: list[Site], include: tuple[str, ...], exclude: tuple[str, ...]
) -> tuple[list[Site], list[PassedOver]]:
    for pattern in (*include, *exclude):
        _check_pattern(pattern, sites)
    kept: list[Site] = []
    dropped: list[PassedOver] = []
    for site in sites:
        excluding = [p for p in exclude if _matches(site, p)]
        if excluding:
            reason = f"excluded by {excluding[0]!r}"
        elif include and not any(_matches(site, p) for p in include):
            reason = "not included by " + ", ".join(map(repr, include))
        else:
            kept.append(site)
            continue
        dropped.append(PassedOver(site.owner, site.method, site.kind, site.merge, reason, site.num_merges))
    return kept, dropped


def _check_pattern(pattern: str, sites: list[Site]) -> None:
    if sites and not any(_matches(site, pattern) for site in sites):
        known = ", ".join(site.owner or "(root)" for site in sites[:3])
        raise OptionError(
            f"the pattern {pattern!r} matches none of the {len(sites)} sites ({known}, ...); give a path with * and ?"
        )


def _read_ratios(r: float | Mapping[str, float]) -> dict[str, float]:
    ratios = dict(r) if isinstance(r, Mapping) else {"*": r}
    for pattern, ratio in ratios.items():
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio >= 1:
            where = "" if pattern == "*" else f" for {pattern!r}"
            raise OptionError(f"r is {ratio!r}{where}; the reduction ratio must be a number of at least 1")
    return ratios


def _set_ratios(sites: list[Site], ratios: dict[str, float], divisor: int) -> list[Site]:
    for pattern in ratios:
        if pattern != "*":
            _check_pattern(pattern, sites)
    chosen = []
    widest: dict[float, int] = {}
    for site in sites:
        r = next((ratios[p] for p in reversed(ratios) if _matches(site, p)), DEFAULT_R)
        widest[r] = max(widest.get(r, 0), site.channels)
        chosen.append(replace(site, r=r, hidden=count_hidden(site.channels, r, divisor=divisor)))
    for r, channels in widest.items():
        if r > channels:
            raise OptionError(f"r is {r:g}, but the widest of its sites has {channels} channels; give a smaller r")
    return chosen


def _explain_empty(plan: Plan) -> str:
    if not plan.passed_over:
        return (
            f"{plan.model} has no merge: no residual addition or channel concatenation of feature maps (N, C, ...) "
            f"ran, so there is no place for a block"
        )
    reasons = "; ".join(f"{num} x {kind}: {reason}" for (kind, reason), num in plan.count_reasons().items())
    return f"{plan.model} has no merge that can receive a block: {reasons}"
