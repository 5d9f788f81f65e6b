"""Places: where in an entry's code a block can stand.

Takes a trace, gives its places: at each merge as the placement says, before and after each layer that runs in its own
code, and where it is handed a map. Each is free to receive a block, or has the reason why not. Changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import fx

from se_inject.calls import Entry
from se_inject.classify import MergeKind, Verdict, classify_concat, classify_sum
from se_inject.hazards import find_overwriting, find_writing_between, get_ancestors
from se_inject.layouts import get_channel_dim, is_split
from se_inject.merges import Merge, find_merges
from se_inject.operations import count_positions, is_map
from se_inject.placements import Cut, Cuts, Placement, find_cuts
from se_inject.tracing import Trace

LayerKind = Literal["stage", "conv", "depthwise"]
Kind = Literal["residual", "concat", "fusion", "stage", "conv", "depthwise"]
Joining = Literal["joint", "separate"]
Side = Literal["before", "after"]
"""Of a layer that an entry's code calls as a function."""
Border = Literal["input", "output"]
"""Of an entry itself."""


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
        kind: The merge's kind, the side of a layer, or the entry's border.
        code: The line of the owner's source, or the node's name where the line cannot be shown.
        edges: What is gated; several are squeezed jointly. None where the entry's code is not looked into, and what
            it is handed or returns is gated.
        operations: The nodes of the merge, the last of them its result; a sum of three is two additions.
        num_merges: The number of merges that run at it; of several places at a merge the first has it.
        channels: Channels of all edges together.
        positions: Number of positions (H x W) of the joined map, or of a layer's gated map.
        num_spatial: How many spatial dimensions the maps have.
        channel_dim: Where the maps have their channels: 1, or -1 for (N, H, W, C).
        reason: Why it cannot receive a block; empty if it can.
        child: Path, relative to the owner, of the child in which what is to be gated stands.
    """

    entry: Entry
    index: int
    kind: MergeKind | Side | Border
    code: str
    edges: tuple[Edge, ...]
    operations: tuple[str, ...]
    num_merges: int
    channels: int
    positions: int
    num_spatial: int
    channel_dim: Literal[1, -1]
    reason: str = ""
    child: str = ""


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
    first = next((node for node in trace.graph.nodes if node.op == "placeholder"), None)
    if first is not None and first.users and is_map(first.meta["value"]):
        cuts = Cuts((Cut(first, tuple(first.users)),))
        places.append(replace(_make_place(trace, first, cuts, "input"), code=f"input of {trace.entry}"))
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
    child = "" if reason else found.child
    places = [_make_place(trace, merge.node, Cuts(cuts, reason or found.reason), verdict.kind) for cuts in groups]
    if len(found.cuts) > 1 and joint and not places[0].reason:
        places = [replace(places[0], reason=find_writing_between(trace, merge.operations, merge.operands))]
    operations = tuple(n.name for n in merge.operations)
    counts = [len(operations), *[0] * (len(places) - 1)]
    return [replace(p, operations=operations, num_merges=n, child=child) for p, n in zip(places, counts, strict=True)]


def _make_place(trace: Trace, node: fx.Node, found: Cuts, kind: MergeKind | Side | Border) -> Place:
    reason = found.reason or next(
        filter(None, (find_overwriting(trace, cut.source, cut.consumers) for cut in found.cuts)), ""
    )
    maps = [cut.source.meta["value"] for cut in found.cuts] or [node.meta["value"]]
    joined = [node.meta["value"]] if kind in get_args(MergeKind) else []
    layouts = {get_channel_dim(x) for x in maps}
    dim = layouts.pop()
    is_last = dim == maps[0].ndim - 1
    if not reason and (layouts or not (is_last or dim == 1) or len({x.ndim for x in maps}) > 1):
        reason = "its maps are laid out in different ways"
    if not reason and any(map(is_split, maps)):
        reason = "its channels are split over several dimensions, as those of attention heads"
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
