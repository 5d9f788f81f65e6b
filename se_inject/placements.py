"""Placements: which values in a graph are gated at a merge.

Takes a classified merge, gives the cuts: each a value and those of its consumers that are to read the gated copy.
Changes nothing. The placements are those of Hu et al., arXiv 1709.01507, figure 5 and tables 14 and 15.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import fx

from se_inject.classify import Verdict
from se_inject.functions import PRODUCTS
from se_inject.hazards import get_ancestors, get_label
from se_inject.merges import Merge
from se_inject.operations import is_map

Placement = Literal["standard", "pre", "post", "identity", "conv3x3"]

# What dropout, drop path and layer scale are made of: elementwise, and without anything learned but a scale.
_SCALINGS = PRODUCTS | frozenset(
    "div div_ __truediv__ dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout bernoulli_ new_empty "
    "empty rand rand_like new_ones ones reshape view unsqueeze expand expand_as floor floor_ to type_as".split()
)


@dataclass(frozen=True)
class Cut:
    """A value, and the consumers of it that are to read its gated copy."""

    source: fx.Node
    consumers: tuple[fx.Node, ...]
    label: str = ""
    """What the gated value is called; by default after the layer that made it."""

    def __str__(self) -> str:
        return self.label or get_label(self.source)


@dataclass(frozen=True)
class Cuts:
    """What a placement gates at a merge, or the reason why it can gate nothing."""

    cuts: tuple[Cut, ...] = ()
    reason: str = ""
    child: str = ""
    """Path, relative to the owner, of the child in which what is to be gated stands."""


def find_cuts(merge: Merge, verdict: Verdict, placement: Placement, *, joint: bool = True) -> Cuts:
    """Find what is gated at a merge, by one block that squeezes it jointly or by a block for each cut.

    A joined map has neither shortcut nor middle convolution: there `identity` and `conv3x3` are as `standard`. A fusion
    has no shortcut either; all that it joins is gated, whatever the placement.
    """
    if verdict.kind == "fusion" or (verdict.kind == "concat" and placement in ("identity", "conv3x3")):
        placement = "standard"
    if not verdict.branches:
        return Cuts()
    found = _FINDERS[placement](merge, verdict)
    if placement == "standard" and not (joint and len(found.cuts) > 1):
        return Cuts(tuple(_skip_scalings(cut, merge) for cut in found.cuts))
    return found


def _cut_branches(merge: Merge, verdict: Verdict) -> Cuts:
    """Gate the branches after their last layer, before drop path, just before they meet."""
    return Cuts(tuple(Cut(branch, (_get_consumer(branch, merge),)) for branch in verdict.branches))


def _cut_shortcuts(merge: Merge, verdict: Verdict) -> Cuts:
    """Gate what bypasses the branch."""
    return Cuts(
        tuple(Cut(x, (_get_consumer(x, merge),), f"shortcut {get_label(x)}") for x in dict.fromkeys(verdict.shortcuts))
    )


def _cut_entering(_: Merge, verdict: Verdict) -> Cuts:
    """Gate what enters the branches; the shortcut keeps the raw input."""
    above = [get_ancestors(x) for x in verdict.branches]
    rest = [get_ancestors(x) for x in verdict.shortcuts] or [set.intersection(*above)]
    inside = set[fx.Node]().union(*above).difference(*rest)
    entering: dict[fx.Node, list[fx.Node]] = {}
    for node in verdict.branches[0].graph.nodes:
        for source in node.all_input_nodes if node in inside else ():
            if source not in inside and is_map(source.meta["value"]):
                entering.setdefault(source, []).append(node)
    if not entering:  # one part of a split, taken from a tuple
        parts = [n for n in inside if is_map(n.meta["value"]) and not inside.intersection(n.all_input_nodes)]
        entering = {part: [user for user in part.users if user in inside] for part in parts}
    if len(entering) != 1 or not all(entering.values()):  # an argument that is joined as it is enters no branch
        found = f"{len(entering)}" if len(entering) > 1 else "none"
        return Cuts(reason=f"one map must enter its branches for placement pre, found {found}")
    (source, users) = entering.popitem()
    return Cuts((Cut(source, tuple(users), f"input of {get_label(users[0])}"),))


def _cut_joined(merge: Merge, _: Verdict) -> Cuts:
    """Gate the joined map, after its activation."""
    node = merge.node
    users = list(node.users)
    if len(users) == 1 and _is_activation(users[0]):
        node, users = users[0], list(users[0].users)
    if not users:
        return Cuts(reason="what it joins is not read again in its owner")
    return Cuts((Cut(node, tuple(users)),))


def _cut_middle(_: Merge, verdict: Verdict) -> Cuts:
    """Gate the output of the branch's middle spatial convolution, after its norm and activation."""
    above = [get_ancestors(x) for x in verdict.branches]
    inside = set[fx.Node]().union(*above).difference(*(get_ancestors(x) for x in verdict.shortcuts))
    convolutions = [n for n in verdict.branches[0].graph.nodes if n in inside and _is_spatial(n)]
    single = [n for n in convolutions if n.meta["work"].convolutions == 1]
    if len(verdict.branches) > 1 or not convolutions:
        return Cuts(reason="for placement conv3x3 it must have one branch with a spatial convolution")
    if len(single) < len(convolutions):
        child = next(n for n in convolutions if n not in single)
        reason = f"its convolutions stand inside of {get_label(child)}, not in its owner's code"
        return Cuts(reason=reason, child=str(child.target) if len(convolutions) == 1 else "")
    node = convolutions[(len(convolutions) - 1) // 2]
    while len(node.users) == 1 and _is_elementwise(user := next(iter(node.users))) and user in inside:
        node = user
    return Cuts((Cut(node, tuple(node.users)),))


_FINDERS: dict[Placement, Callable[[Merge, Verdict], Cuts]] = {
    "standard": _cut_branches,
    "pre": _cut_entering,
    "post": _cut_joined,
    "identity": _cut_shortcuts,
    "conv3x3": _cut_middle,
}


def _is_activation(node: fx.Node) -> bool:
    return _is_elementwise(node) and node.meta["work"].activations == 1


def _is_spatial(node: fx.Node) -> bool:
    return any(call.is_spatial for call in node.meta["work"].layer_calls)


def _is_elementwise(node: fx.Node) -> bool:
    """Tell whether a node is a norm or an activation of one map."""
    work = node.meta["work"] if node.op in ("call_module", "call_function", "call_method") else None
    if work is None or work.layers or work.merges or not (work.norms or work.activations):
        return False
    maps = [n for n in node.all_input_nodes if is_map(n.meta["value"])]
    return len(maps) == 1 and is_map(node.meta["value"]) and node.meta["value"].shape == maps[0].meta["value"].shape


def _skip_scalings(cut: Cut, merge: Merge) -> Cut:
    """Walk back over drop path, dropout and layer scale to the last layer."""
    branch, consumers = cut.source, cut.consumers
    while (source := _get_scaled(branch)) is not None and source not in merge.operands:
        branch, consumers = source, (branch,)
    return Cut(branch, consumers)


def _get_consumer(operand: fx.Node, merge: Merge) -> fx.Node:
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
    return all(n.op == "get_attr" for n in get_ancestors(node) if not n.all_input_nodes)
