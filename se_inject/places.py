"""Places: where in an entry's code a block can stand.

Takes an entry of the fake twin and its call, gives its places: at each merge as the placement says, and before and
after each layer that runs in its own code. Each is free to receive a block, or has the reason why not. Changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx, nn

from se_inject.calls import Call, Entry
from se_inject.classify import MergeKind, Verdict, classify_concat, classify_sum
from se_inject.errors import TraceError
from se_inject.hazards import find_overwriting, find_writing_between, get_ancestors
from se_inject.merges import Merge, find_merges
from se_inject.operations import Watch, count_positions, get_channel_dim, is_map, set_channel_dim
from se_inject.placements import Cut, Cuts, Placement, find_cuts
from se_inject.tracing import Trace, trace_entry
from se_inject.twin import Twin, quiet, set_training

LayerKind = Literal["stage", "conv", "depthwise"]
Kind = Literal["residual", "concat", "fusion", "stage", "conv", "depthwise"]
Joining = Literal["joint", "separate"]
Side = Literal["before", "after"]


@dataclass(frozen=True)
class Placing:
    """How the places at merges are chosen.

    Attributes:
        placement: Where the block stands at a merge.
        concat: Whether the branches of a merge get one block that squeezes them jointly, or a block each.
        at: The kinds of merges that are to be gated.
    """

    placement: Placement = "standard"
    concat: Joining = "joint"
    at: tuple[Kind, ...] = ("residual", "concat")


@dataclass(frozen=True)
class Edge:
    """A value to be gated, and the nodes of the graph that are to read its gated copy."""

    node: str
    consumers: tuple[str, ...]
    channels: int
    label: str
    """Path of the layer that made the map, relative to the owner, or the operation's name."""


@dataclass(frozen=True)
class Place:
    """A place in the code of an entry.

    Attributes:
        entry: The owner and its method.
        index: Its place among those of the entry, from 0.
        kind: The merge's kind, or the side of a layer.
        code: The line of the owner's source, or the node's name where the line cannot be shown.
        edges: What is gated; several are squeezed jointly. None for a layer of one piece, whose input or output is
            gated.
        operations: The nodes of the merge, the last of them its result; a sum of three is two additions.
        num_merges: The number of merges that run at it; of several places at a merge the first has it.
        channels: Channels of all edges together.
        positions: Number of positions (H x W) of the joined map, or of a layer's gated map.
        num_spatial: How many spatial dimensions the maps have.
        channel_dim: Where the maps have their channels: 1, or -1 for (N, H, W, C).
        reason: Why it cannot receive a block; empty if it can.
    """

    entry: Entry
    index: int
    kind: MergeKind | Side
    code: str
    edges: tuple[Edge, ...]
    operations: tuple[str, ...]
    num_merges: int
    channels: int
    positions: int
    num_spatial: int
    channel_dim: Literal[1, -1]
    reason: str = ""


@dataclass(frozen=True)
class Inspection:
    """What an entry's code does: its graph and places, once, or once a mode if the code reads `self.training`."""

    traces: tuple[Trace, ...]
    """Empty for a layer of one piece."""
    found: tuple[list[Place], ...]
    """The places in each trace."""

    @property
    def difference(self) -> str:
        """A reason, if the merges of the modes are not alike."""
        forms = {tuple((p.kind, p.channels) for p in places) for places in self.found}
        return "its merges differ between train and eval mode" if len(forms) > 1 else ""

    @property
    def places(self) -> list[Place]:
        """The places in terms of the first trace; one that is not free in every mode has the reason."""
        first, *others = self.found
        if self.difference:
            return [replace(p, reason=p.reason or self.difference) for p in first]
        for other in others:
            first = [replace(p, reason=p.reason or o.reason) for p, o in zip(first, other, strict=True)]
        return first

    def get_layer_place(self, index: int, side: Side) -> Place | None:
        """Return the place on a side of the `index`-th layer that runs in the entry's own code."""
        sides = [p for p in self.places if p.kind == side]
        return sides[index] if index < len(sides) else None


def inspect_entry(twin: Twin, entry: Entry, call: Call, placing: Placing) -> Inspection:
    """Find the places in an entry's code, in eval mode, and in train mode too if the code asks for the mode.

    Raises:
        TraceError: The code cannot be followed in one of the modes.
    """
    owner = twin.model.get_submodule(entry.path)
    if not owner._modules and not isinstance(owner, fx.GraphModule) and (places := _inspect_layer(twin, entry, call)):
        return Inspection((), (places,))
    traces = [trace_entry(twin, entry, call, training=False)]
    if traces[0].reads_mode:
        traces.append(trace_entry(twin, entry, call, training=True))
    return Inspection(tuple(traces), tuple(find_places(trace, placing) for trace in traces))


def find_places(trace: Trace, placing: Placing) -> list[Place]:
    """Find the places in a traced entry: those at merges in the order in which they run, then those at layers."""
    order = {node: i for i, node in enumerate(trace.graph.nodes)}
    merges = find_merges(trace)
    found: list[list[Place]] = []
    gated: set[fx.Node] = set()
    for merge in merges:
        verdict = classify_concat(merge.operands, gated) if merge.is_concat else classify_sum(merge, order)
        found.append(_place_merge(trace, merge, verdict, placing))
        if verdict.kind == "residual" and "residual" in placing.at and not any(p.reason for p in found[-1]):
            gated.add(merge.node)
    found = [_defer(places, i, merges, found, gated) for i, places in enumerate(found)]
    places = [place for group in found for place in group]
    places += [place for node in trace.graph.nodes for place in _place_layer(trace, node)]
    return [replace(place, index=i) for i, place in enumerate(places)]


def _defer(
    places: list[Place], i: int, merges: list[Merge], found: list[list[Place]], gated: set[fx.Node]
) -> list[Place]:
    """Pass over a concatenation on the branch of a residual block: the branch is gated once, at its end."""
    this = merges[i]
    for later, other in zip(found, merges, strict=True):
        is_inside = this.node is not other.node and this.node in get_ancestors(other.node)
        closes_same_fork = is_inside and other.fork is this.fork is not None
        if this.is_concat and other.node in gated and closes_same_fork:
            return [replace(p, reason=f"it lies on the branch of `{later[0].code}`, which is gated") for p in places]
    return places


def _place_merge(trace: Trace, merge: Merge, verdict: Verdict, placing: Placing) -> list[Place]:
    joint = placing.concat == "joint"
    found = find_cuts(merge, verdict, placing.placement, joint=joint)
    reason = verdict.reason if verdict.kind != "fusion" or "fusion" not in placing.at else ""
    groups = [found.cuts] if joint or not found.cuts else [(cut,) for cut in found.cuts]
    places = [_make_place(trace, merge.node, Cuts(cuts, reason or found.reason), verdict.kind) for cuts in groups]
    if len(found.cuts) > 1 and joint and not places[0].reason:
        places = [replace(places[0], reason=find_writing_between(trace, merge.operations, merge.operands))]
    operations = tuple(n.name for n in merge.operations)
    counts = [len(operations), *[0] * (len(places) - 1)]
    return [replace(p, operations=operations, num_merges=n) for p, n in zip(places, counts, strict=True)]


def _make_place(trace: Trace, node: fx.Node, found: Cuts, kind: MergeKind | Side) -> Place:
    reason = found.reason or next(
        filter(None, (find_overwriting(trace, cut.source, cut.consumers) for cut in found.cuts)), ""
    )
    maps = [cut.source.meta["value"] for cut in found.cuts] or [node.meta["value"]]
    joined = [] if kind in ("before", "after") else [node.meta["value"]]
    layouts = {get_channel_dim(x) for x in joined + maps}
    dim = layouts.pop()
    is_last = dim == maps[0].ndim - 1
    if not reason and (layouts or not (is_last or dim == 1) or len({x.ndim for x in maps}) > 1):
        reason = "its maps are laid out in different ways"
    edges = tuple(_make_edge(cut, dim) for cut in found.cuts)
    return Place(
        entry=trace.entry,
        index=0,
        kind=kind,
        code=node.meta.get("code") or node.name,
        edges=edges,
        operations=(),
        num_merges=0,
        channels=sum(edge.channels for edge in edges),
        positions=count_positions((joined + maps)[0]),
        num_spatial=maps[0].ndim - 2,
        channel_dim=-1 if is_last else 1,
        reason=reason,
    )


def _make_edge(cut: Cut, dim: int) -> Edge:
    return Edge(cut.source.name, tuple(c.name for c in cut.consumers), cut.source.meta["value"].shape[dim], str(cut))


def _place_layer(trace: Trace, node: fx.Node) -> list[Place]:
    """Make the places before and after a layer that is called as a function, such as `F.max_pool2d`."""
    if node.op not in ("call_function", "call_method") or not node.meta["work"].layer_calls:
        return []
    source = next(n for n in node.all_input_nodes if is_map(n.meta["value"]))
    before = Cuts((Cut(source, (node,)),))
    after = Cuts((Cut(node, tuple(node.users)),)) if node.users and is_map(node.meta["value"]) else None
    after = after or Cuts(reason="its output is no map that is read again")
    return [_make_place(trace, node, before, "before"), _make_place(trace, node, after, "after")]


def _inspect_layer(twin: Twin, entry: Entry, call: Call) -> list[Place]:
    """Make the places before and after a module that is one layer, such as `nn.MaxPool2d`; none for any other module.

    Its code need not be traced: the block takes what it is handed, or what it returns.
    """
    owner = twin.model.get_submodule(entry.path)
    x = call.args[0] if call.args else None
    if entry.method != "forward" or not isinstance(x, Tensor) or not is_map(x):
        return []
    with set_training(owner, False), quiet(), twin.mode, torch.no_grad(), Watch() as watch:
        try:
            y = getattr(owner, entry.method)(*call.args, **call.kwargs)
        except Exception as error:
            raise TraceError(f"its {entry.method} does not run on its own: {error}") from error
    if len(watch.work.layer_calls) != 1 or watch.work.merges:
        return []
    if watch.work.layer_calls[0].kind == "linear":
        x = set_channel_dim(x, x.ndim - 1)
    return [_make_border(entry, x, "before", owner), _make_border(entry, y, "after", owner)]


def _make_border(entry: Entry, value: object, side: Side, owner: nn.Module) -> Place:
    name = f"{'input' if side == 'before' else 'output'} of {type(owner).__name__}"
    place = Place(entry, side == "after", side, name, (), (), 0, 0, 0, 2, 1, "its output is no map")
    if not is_map(value):
        return place
    dim = get_channel_dim(value)
    return replace(
        place,
        channels=value.shape[dim],
        positions=count_positions(value),
        num_spatial=value.ndim - 2,
        channel_dim=-1 if dim == value.ndim - 1 else 1,
        reason="",
    )
