"""Sums: let a block add the shortcut to which its output is added at once.

Takes the graph of a method and the call of a block in it; edits the graph alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from se_inject.functions import SUMS
from se_inject.operations import is_map


def find_shortcut(branch: fx.Node, readers: Sequence[fx.Node]) -> fx.Node | None:
    """Find what a branch is added to at once, and in no other map's place, so that its block can add it.

    Args:
        branch: The map that is gated, or the block that gates it.
        readers: What reads its gated copy.
    """
    if len(readers) != 1:
        return None
    [addition] = readers
    is_addition = addition.op != "call_module" and getattr(addition.target, "__name__", addition.target) in SUMS
    if not is_addition or addition.kwargs or len(addition.args) != 2 or addition.args.count(branch) != 1:
        return None
    [shortcut] = (x for x in addition.args if x is not branch)
    is_elsewhere = any(written is not branch for written in addition.meta.get("mutates", ()))
    if is_elsewhere or not isinstance(shortcut, fx.Node) or not is_map(shortcut.meta["value"]):
        return None
    x, y = branch.meta["value"], shortcut.meta["value"]
    # Of two layouts, which one the sum has is a matter of the order.
    is_alike = x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()
    return shortcut if is_alike else None


def replace_sum(graph: fx.Graph, block: str, branch: fx.Node, shortcut: fx.Node, addition: fx.Node) -> fx.Node:
    """Write the call of a block in an addition's place, which is no longer there."""
    with graph.inserting_before(addition):
        node = graph.call_module(block, (branch,), {"shortcut": shortcut})
    node.meta["value"] = addition.meta["value"]
    addition.replace_all_uses_with(node)
    graph.erase_node(addition)
    return node
