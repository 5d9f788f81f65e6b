"""Drafting: go through all that ran, and make each place a site or pass over it with the reason.

Takes the probe of a network and the placing, fills a `Draft`. Changes no model.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from se_inject.calls import Call, Entry, describe_form, encode_call
from se_inject.errors import TraceError
from se_inject.inspection import Inspection, inspect_border, inspect_entry, write_entry
from se_inject.layers import LAYER_SIDES, choose_layers, find_reader
from se_inject.operations import count_positions, is_map
from se_inject.places import Kind, LayerKind, Place, Placing
from se_inject.plan import DEFAULT_R, PassedOver, Site
from se_inject.probe import LayerVisit, Probe, Visit

LAYER_NOTES = {
    "stage": "before each downsampling",
    "depthwise": "after each depthwise convolution, before the pointwise one",
    "conv": "after each convolution",
}
_HIDDEN = "it runs inside a function that torch.fx records as one operation"


@dataclass
class Draft:
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


def fill_draft(draft: Draft, *, is_given: bool) -> str:
    """Find the sites of a network, and the reasons of what is passed over.

    Args:
        draft: Is filled.
        is_given: Whether the user said at which kinds of places.

    Returns:
        What the user should know of how the places were chosen.
    """
    probe, note = draft.probe, ""
    for entry, visit in probe.visits.items():
        inspection, lost = _inspect(draft, entry, visit)
        draft.passed += lost
        for place in inspection.places if inspection else ():
            if place.operations:
                kind: Kind = place.kind  # type: ignore[assignment]  # that of a merge
                draft.add(_enter_child(draft, place), kind, len(visit.calls))
    # Channel attention that is there already is reported, and a transformer is not gated at its patches.
    is_settled = any(m.kind == "residual" and m.reason for m in draft.passed)
    if not is_given and not draft.sites and not is_settled:
        chosen: LayerKind = "depthwise" if choose_layers(probe.layers, "depthwise") else "stage"
        draft.placing = replace(draft.placing, at=(*draft.placing.at, chosen))
        note = f"no merge to gate, so the blocks stand {LAYER_NOTES[chosen]} ({chosen})"
    for layer_kind in get_args(LayerKind):
        for layer in choose_layers(probe.layers, layer_kind) if layer_kind in draft.placing.at else ():
            _add_layer(draft, layer, layer_kind)
    return note if draft.sites else ""


def _enter_child(draft: Draft, place: Place) -> Place:
    """Find what placement conv3x3 gates inside of a child: the input of the layer that reads its middle convolution."""
    if not place.child:
        return place
    probe = draft.probe
    reader = find_reader(probe.layers, f"{place.entry.path}.{place.child}".removeprefix("."))
    if reader is None or probe.twin.model.get_submodule(reader.entry.path)._modules:
        return place
    try:
        call = _get_only_call(probe.visits[reader.entry])
        if len(probe.visits[reader.entry].calls) != len(probe.visits[place.entry].calls):
            return place  # something else calls it too
        found = draft.inspections.setdefault(reader.entry, inspect_border(probe.twin, reader.entry, call))
        (inside,) = (p for p in found.places if p.kind == "input")
        _check_code(draft, reader.entry, [inside], call)
    except TraceError as error:
        return replace(place, reason=str(error))
    return replace(inside, operations=place.operations, num_merges=place.num_merges, positions=place.positions)


def _add_layer(draft: Draft, visit: LayerVisit, kind: LayerKind) -> None:
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


def _inspect(draft: Draft, entry: Entry, visit: Visit) -> tuple[Inspection | None, list[PassedOver]]:
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


def _check_code(draft: Draft, entry: Entry, places: list[Place], call: Call) -> None:
    """Find out now, and not when the model is about to be changed, what cannot be recorded or written down.

    Raises:
        TraceError: The call cannot be recorded, or the code cannot be written.
    """
    if blocks := [("se", place) for place in places if not place.reason]:
        encode_call(call, torch.float32)
        if not draft.inspections[entry].is_written:  # else it was, when it was inspected
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
