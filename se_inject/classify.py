"""Classification: which operands of a merge are branches, and which bypass them.

Takes a merge's operands in a traced graph, gives a verdict. Changes nothing.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx

from se_inject.hazards import get_ancestors, get_label
from se_inject.merges import Merge

MergeKind = Literal["residual", "concat", "fusion"]


@dataclass(frozen=True)
class Verdict:
    """What a merge is.

    Attributes:
        kind: residual, concat or fusion.
        branches: The operands that were computed in the owner; of a fusion all operands.
        shortcuts: The operands that bypass the computation, or pass through.
        reason: Why it cannot receive a block, or what makes it a fusion; empty otherwise.
    """

    kind: MergeKind
    branches: tuple[fx.Node, ...] = ()
    shortcuts: tuple[fx.Node, ...] = ()
    reason: str = ""


def classify_sum(merge: Merge, order: dict[fx.Node, int]) -> Verdict:
    """Tell a residual sum, whose branches have more layers since the fork than its shortcut, from a fusion."""
    operands, fork = merge.operands, merge.fork
    above = [get_ancestors(x) for x in operands]
    since = [nodes - (get_ancestors(fork) if fork else set()) for nodes in above]
    layers = [_measure_depth(nodes, order) for nodes in since]

    bypassing = {i for i, x in enumerate(operands) if any(x in above[j] for j in range(len(operands)) if j != i)}
    if bypassing or fork is not None:
        shortest = {i for i, n in enumerate(layers) if n == min(layers) < max(layers)}
        shortcuts = bypassing | shortest
    else:  # nothing in common: an argument that is handed on bypasses what is computed from another argument
        shortcuts = {i for i, n in enumerate(layers) if n == 0}
        if _are_from_one_list(operands):
            return _make_fusion(operands, "its operands are peers from one list, neither bypasses the other")
    branches = [i for i in range(len(operands)) if i not in shortcuts]
    if not branches or not shortcuts:
        return _make_fusion(operands, "neither operand is a shortcut of the other")
    linear = max(layers) <= 1 and not any(_count(nodes, "activations") for nodes in since)
    if linear and (len(branches) > 1 or any(_count(since[i], "norms") for i in shortcuts)):
        return _make_fusion(operands, "parallel linear layers, as in a re-parameterised block")
    chosen = tuple(operands[i] for i in branches)
    bypass = tuple(operands[i] for i in sorted(shortcuts))
    if not all(_count(since[i], "convolutions") for i in branches):
        return Verdict("residual", chosen, bypass, "its branch holds no convolution")
    attention = next(filter(None, (_find_attention(since[i]) for i in branches)), "")
    return Verdict("residual", chosen, bypass, attention)


def _make_fusion(operands: list[fx.Node], reason: str) -> Verdict:
    return Verdict("fusion", tuple(dict.fromkeys(operands)), reason=reason)


def classify_concat(operands: list[fx.Node], gated: set[fx.Node]) -> Verdict:
    """Tell which operands of a concatenation were computed in the owner; `gated` are sums whose branch is gated."""
    computed = tuple(x for x in operands if _count(get_ancestors(x), "layers"))
    computed = tuple(x for x in computed if x not in gated) or computed  # a sum whose branch is gated needs no more
    from_list = any(_comes_from_list(x) for x in operands)
    if not computed and from_list:
        return Verdict(
            "concat", reason="it joins a list that it is handed; those features are merged again by its parent"
        )
    branches = computed or tuple(operands)
    common = set.intersection(*(get_ancestors(x) for x in operands))
    attention = next(filter(None, (_find_attention(get_ancestors(x) - common) for x in computed)), "")
    bypass = tuple(x for x in dict.fromkeys(operands) if x not in branches)
    return Verdict("concat", tuple(dict.fromkeys(branches)), bypass, attention)


def _count(nodes: set[fx.Node], what: Literal["layers", "convolutions", "norms", "activations"]) -> int:
    return sum(getattr(n.meta["work"], what) for n in nodes)


def _measure_depth(nodes: set[fx.Node], order: dict[fx.Node, int]) -> int:
    """Measure the largest number of layers that one of the nodes' values passes through."""
    depth: dict[fx.Node, int] = {}
    for node in sorted(nodes, key=order.__getitem__):
        depth[node] = node.meta["work"].layers + max((depth.get(n, 0) for n in node.all_input_nodes), default=0)
    return max(depth.values(), default=0)


def _find_attention(nodes: set[fx.Node]) -> str:
    for node in sorted(nodes):  # the first in the graph: a plan is the same each time
        # A child that merges maps of its own is a stretch of network, not a layer of this branch; CBAM, which sums
        # squeezed vectors and joins a mean and a maximum over the channels, is still one layer.
        merges = [m for m in node.meta["work"].merges if m.shape[2:] != (1, 1) and m.shape[1] > 2]
        if node.meta["work"].attentions and not (node.op == "call_module" and merges):
            return f"its branch already carries channel attention ({get_label(node)})"
    return ""


def _comes_from_list(node: fx.Node) -> bool:
    return (
        node.target is operator.getitem
        and isinstance(node.args[0], fx.Node)
        and node.args[0].op == "placeholder"
        and (not isinstance(node.args[0].meta["value"], Tensor))
    )


def _are_from_one_list(operands: list[fx.Node]) -> bool:
    lists = [{n.args[0] for n in get_ancestors(x) if _comes_from_list(n)} for x in operands]
    return bool(set.intersection(*lists))
