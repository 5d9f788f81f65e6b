"""Merges: find where feature maps meet in a traced graph, and the branches that could be gated.

Takes a `Trace`, gives its merges, each classified and either free to receive a block or with the reason why not.
Changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, fx

from se_inject.calls import Entry
from se_inject.classify import FoundMerge, Kind, classify_concat, classify_sum
from se_inject.hazards import find_overwriting, find_writing_between, get_ancestors, get_label
from se_inject.operations import CONCATENATIONS, PRODUCTS, get_channel_dim, is_map
from se_inject.tracing import Trace

# What dropout, drop path and layer scale are made of: elementwise, and without anything learned but a scale.
_SCALINGS = PRODUCTS | frozenset(
    "div div_ __truediv__ dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout bernoulli_ new_empty "
    "empty rand rand_like new_ones ones reshape view unsqueeze expand expand_as floor floor_ to type_as".split()
)


@dataclass(frozen=True)
class Branch:
    """An operand to be gated: the edge from `node` to `consumer` in the graph."""

    node: str
    consumer: str
    channels: int
    label: str
    """Path of the layer that made the map, relative to the owner, or the operation's name."""


@dataclass(frozen=True)
class Merge:
    """A merge in the code of an entry.

    Attributes:
        entry: The owner and its method.
        index: Its place among the merges of the entry, from 0.
        kind: residual, concat or fusion.
        node: The operation's node in the graph.
        code: The line of the owner's source, or the node's name where the line cannot be shown.
        operations: The nodes that it stands for, the last of them `node`; a sum of three is two additions.
        num_spatial: How many spatial dimensions the maps have.
        channel_dim: Where the maps have their channels: 1, or -1 for (N, H, W, C).
        branches: The operands to gate, in the order of the merge.
        reason: Why it cannot receive a block; empty if it can.
    """

    entry: Entry
    index: int
    kind: Kind
    node: str
    code: str
    operations: tuple[str, ...]
    num_spatial: int
    channel_dim: Literal[1, -1]
    branches: tuple[Branch, ...]
    reason: str = ""

    @property
    def channels(self) -> int:
        """Number of channels of all branches together."""
        return sum(branch.channels for branch in self.branches)


@dataclass(frozen=True)
class Inspection:
    """What an entry's code does: its graph and merges, once, or once a mode if the code reads `self.training`."""

    traces: tuple[Trace, ...]
    found: tuple[list[Merge], ...]
    """The merges of each trace."""

    @property
    def difference(self) -> str:
        """A reason, if the merges of the modes are not alike."""
        forms = {tuple((m.kind, m.channels) for m in merges) for merges in self.found}
        return "its merges differ between train and eval mode" if len(forms) > 1 else ""

    @property
    def merges(self) -> list[Merge]:
        """The merges in terms of the first trace; one that is not free in every mode has the reason."""
        first, *others = self.found
        if self.difference:
            return [replace(m, reason=m.reason or self.difference) for m in first]
        for other in others:
            first = [replace(m, reason=m.reason or o.reason) for m, o in zip(first, other, strict=True)]
        return first


def find_merges(trace: Trace) -> list[Merge]:
    """Find the merges of a traced entry, in the order in which they run.

    Sums of three or more maps, written as a chain of additions, are one merge.
    """
    order = {node: i for i, node in enumerate(trace.graph.nodes)}
    chained: set[fx.Node] = set()
    found: list[FoundMerge] = []
    for node in reversed(list(trace.graph.nodes)):
        if _is_merge(node) and node not in chained:
            operands, operations = _collect_operands(node)
            chained.update(operations)
            operations.sort(key=order.__getitem__)
            found.insert(0, FoundMerge(node, operands, operations, _find_fork(operands, order)))
    merges: list[Merge] = []
    gated: set[fx.Node] = set()
    for index, this in enumerate(found):
        merges.append(_make_merge(trace, order, this, index, gated))
        if merges[-1].kind == "residual" and not merges[-1].reason:
            gated.add(this.node)
    return [_defer(merge, this, merges, found) for merge, this in zip(merges, found, strict=True)]


def _defer(merge: Merge, this: FoundMerge, merges: list[Merge], found: list[FoundMerge]) -> Merge:
    """Pass over a concatenation on the branch of a residual block: the branch is gated once, at its end."""
    for later, other in zip(merges, found, strict=True):
        is_inside = this.node is not other.node and this.node in get_ancestors(other.node)
        closes_same_fork = is_inside and other.fork is this.fork is not None
        if merge.kind == "concat" and later.kind == "residual" and not later.reason and closes_same_fork:
            return replace(merge, reason=f"it lies on the branch of `{later.code}`, which is gated")
    return merge


def _make_merge(trace: Trace, order: dict[fx.Node, int], merge: FoundMerge, index: int, gated: set[fx.Node]) -> Merge:
    node, is_concat = merge.node, _is_concat(merge.node)
    verdict = classify_concat(merge.operands, gated) if is_concat else classify_sum(merge, order)
    edges = [(branch, _get_consumer(branch, merge)) for branch in verdict.branches]
    if len(edges) == 1:
        edges = [_skip_scalings(*edges[0], merge)]
    reason = verdict.reason or next(filter(None, (find_overwriting(trace, *edge) for edge in edges)), "")
    if len(edges) > 1:
        reason = reason or find_writing_between(trace, merge.operations, merge.operands)
    layouts = {get_channel_dim(x.meta["value"]) for x in (node, *(branch for branch, _ in edges))}
    dim = layouts.pop()
    is_last = dim == node.meta["value"].ndim - 1
    if not reason and (layouts or not (is_last or dim == 1)):
        reason = "its maps are laid out in different ways"
    return Merge(
        entry=trace.entry,
        index=index,
        kind=verdict.kind,
        node=node.name,
        code=node.meta.get("code") or node.name,
        operations=tuple(n.name for n in merge.operations),
        num_spatial=node.meta["value"].ndim - 2,
        channel_dim=-1 if is_last else 1,
        branches=tuple(Branch(b.name, c.name, b.meta["value"].shape[dim], get_label(b)) for b, c in edges),
        reason=reason,
    )


def _is_merge(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method") and len(node.meta["work"].merges) == 1 and bool(_get_operands(node))
    )


def _is_concat(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") in CONCATENATIONS


def _get_operands(node: fx.Node) -> list[fx.Node]:
    args = [*node.args, *node.kwargs.values()]
    if _is_concat(node):
        args = list(args[0]) if isinstance(args[0], (list, tuple)) else []
    return [x for x in args if isinstance(x, fx.Node) and is_map(x.meta["value"])]


def _collect_operands(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Collect what a chain of additions adds up, and the additions themselves."""
    operands: list[fx.Node] = []
    additions = [node]
    for operand in _get_operands(node):
        is_link = _is_merge(operand) and not _is_concat(operand) and len(operand.users) == 1
        if is_link and not _is_concat(node):
            inner, links = _collect_operands(operand)
            operands += inner
            additions += links
        else:
            operands.append(operand)
    return operands, additions


def _find_fork(operands: list[fx.Node], order: dict[fx.Node, int]) -> fx.Node | None:
    common = set.intersection(*(get_ancestors(x) for x in operands))
    return max((n for n in common if isinstance(n.meta["value"], Tensor)), key=order.__getitem__, default=None)


def _skip_scalings(branch: fx.Node, consumer: fx.Node, merge: FoundMerge) -> tuple[fx.Node, fx.Node]:
    """Walk back over drop path, dropout and layer scale to the last layer; return it and what consumes it."""
    while (source := _get_scaled(branch)) is not None and source not in merge.operands:
        branch, consumer = source, branch
    return branch, consumer


def _get_consumer(operand: fx.Node, merge: FoundMerge) -> fx.Node:
    """Return the operation of the merge that takes the operand."""
    return next(operation for operation in merge.operations if operand in operation.all_input_nodes)


def _get_scaled(node: fx.Node) -> fx.Node | None:
    """Return the map that a node only scales or drops, or None if the node does more."""
    work = node.meta["work"]
    if node.op not in ("call_module", "call_function", "call_method") or not work.names <= _SCALINGS or work.attentions:
        return None
    maps = [
        n for n in node.all_input_nodes if is_map(n.meta["value"]) and n.meta["value"].shape == node.meta["value"].shape
    ]
    rest = [n for n in node.all_input_nodes if n not in maps]
    return maps[0] if len(maps) == 1 and all(map(_is_scale, rest)) else None


def _is_scale(node: fx.Node) -> bool:
    """Tell whether a value is made from parameters alone, such as a reshaped layer scale."""
    sources = [n for n in get_ancestors(node) if not n.all_input_nodes]
    return all(n.op == "get_attr" for n in sources)
