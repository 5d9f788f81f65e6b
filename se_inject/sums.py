"""Sums: let a block add the shortcut to which its output is added at once.

Takes the graph of a method and the call of a block in it; edits the graph alone.
"""

from __future__ import annotations

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from se_inject.functions import SUMS
from se_inject.operations import is_map


def take_sum(graph: fx.Graph, block: fx.Node, *, in_order: bool) -> fx.Node:
    """Write the call of a block in the place of the addition that alone reads what it gives.

    Args:
        graph: Is edited.
        block: The call of a block with a single map; its `meta` has a value.
        in_order: Whether what the block gives must come first in the addition. Which layout the sum of two has is a
            matter of the order, and a block that adds goes by its own map's.

    Returns:
        The call, which is another one if it adds now.
    """
    readers = list(block.users)
    shortcut = _find_shortcut(block, readers, in_order=in_order)
    [source, *others] = block.args
    if shortcut is None or others or block.kwargs or not isinstance(source, fx.Node):
        return block
    if is_written_between(graph, source, block, readers[0]):
        return block
    with graph.inserting_before(readers[0]):
        total = graph.call_module(str(block.target), (source,), {"shortcut": shortcut})
    total.meta["value"] = readers[0].meta["value"]
    readers[0].replace_all_uses_with(total)
    graph.erase_node(readers[0])
    graph.erase_node(block)
    return total


def _find_shortcut(block: fx.Node, readers: list[fx.Node], *, in_order: bool) -> fx.Node | None:
    """Find what is added to a block's output, in no other map's place."""
    if len(readers) != 1:
        return None
    [addition] = readers
    is_addition = addition.op != "call_module" and getattr(addition.target, "__name__", addition.target) in SUMS
    if not is_addition or addition.kwargs or len(addition.args) != 2 or addition.args.count(block) != 1:
        return None
    [shortcut] = (x for x in addition.args if x is not block)
    is_elsewhere = any(written is not block for written in addition.meta.get("mutates", ()))
    if is_elsewhere or not isinstance(shortcut, fx.Node) or not is_map(shortcut.meta["value"]):
        return None
    x, y = block.meta["value"], shortcut.meta["value"]
    is_alike = x.shape == y.shape and x.dtype == y.dtype and (addition.args[0] is block or not in_order)
    return shortcut if is_alike else None


def is_written_between(graph: fx.Graph, source: fx.Node, start: fx.Node, stop: fx.Node) -> bool:
    """Tell whether something is written over a map between two of the nodes that could read it."""
    nodes = list(graph.nodes)
    storages = {get_storage(x) for x in list_tensors(source)}
    for node in nodes[nodes.index(start) + 1 : nodes.index(stop)]:
        written = (x for n in node.meta.get("mutates", ()) for x in list_tensors(n))
        if any(get_storage(x) in storages for x in written):
            return True
    return False


def list_tensors(node: fx.Node) -> list[Tensor]:
    """List the tensors of a node's value."""
    return [x for x in tree_leaves(node.meta.get("value")) if isinstance(x, Tensor)]


def get_storage(x: Tensor) -> int:
    """Return what tells memory from other memory."""
    return x.untyped_storage()._cdata  # type: ignore[no-any-return]  # torch's
