"""Hazards: in-place operations to which a gated copy of a branch would make a difference.

Takes a trace's nodes (which know what they write on), gives a reason, or nothing where the branch can be gated. Changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from se_inject.tracing import Trace


def find_overwriting(trace: Trace, source: fx.Node, consumers: Sequence[fx.Node]) -> str:
    """Find what would no longer reach, or would spoil, a map once its gated copy goes on to its consumers."""
    nodes = list(trace.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    storage = _get_storage(source)
    sharing = {n for n in nodes if _shares(n, storage)}
    aliases = sharing.difference(*map(get_descendants, consumers))
    for node in nodes[min(order[consumer] for consumer in consumers) :]:
        written = sharing.intersection(node.meta.get("mutates", ()))
        if written and not _keeps_strides(source):
            return f"its branch is a part of a larger map, which is written on in place ({get_label(node)})"
        if written & aliases and node not in consumers:
            return f"its branch is overwritten in place afterwards ({get_label(node)})"
        for alias in sorted(aliases) if written else ():
            read_later = any(order[user] > order[node] for user in alias.users if user not in consumers)
            if alias.op == "placeholder" or read_later:
                return f"its sum is written over {get_label(alias)}, which is read again"
    return ""


def find_writing_between(trace: Trace, operations: list[fx.Node], operands: list[fx.Node]) -> str:
    """Find what forbids that a chain of additions waits until all branches, which are gated together, are there."""
    nodes = list(trace.graph.nodes)
    between = nodes[nodes.index(operations[0]) : nodes.index(operations[-1])]
    storages = {_get_storage(x) for x in operands}
    for node in between:
        written = [n for n in node.meta["mutates"] if any(_shares(n, storage) for storage in storages)]
        if written and (node not in operations or any(set(n.users) & set(between) - {node} for n in written)):
            return f"its branches are written over between the additions ({get_label(node)})"
    return ""


def get_ancestors(node: fx.Node) -> set[fx.Node]:
    """Return the node and all that it was computed from."""
    return _collect(node, lambda n: n.all_input_nodes)


def get_descendants(node: fx.Node) -> set[fx.Node]:
    """Return the node and all that is computed from it."""
    return _collect(node, lambda n: n.users)


def _collect(node: fx.Node, get_next: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += get_next(current)
    return seen


def get_label(node: fx.Node) -> str:
    """Return a layer's path relative to the owner, or an operation's name."""
    return str(node.target) if node.op == "call_module" else node.name


def _get_storage(node: fx.Node) -> int:
    storage: int = node.meta["value"].untyped_storage()._cdata
    return storage


def _keeps_strides(node: fx.Node) -> bool:
    """Tell whether a copy lies in memory as the map does; if not, `contiguous` no longer copies what is made of it."""
    value: Tensor = node.meta["value"]
    return torch.empty_like(value).stride() == value.stride()


def _shares(node: fx.Node, storage: int) -> bool:
    leaves = tree_leaves(node.meta.get("value"))
    return any(isinstance(x, Tensor) and x.untyped_storage()._cdata == storage for x in leaves)
