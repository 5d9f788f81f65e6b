"""Merges: find where feature maps meet in a traced graph.

Takes a `Trace`, gives the operations that join maps, with what they join. `classify` tells what sort of merge each is,
`places` where a block can stand. Changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from se_inject.functions import CONCATENATIONS
from se_inject.hazards import get_ancestors
from se_inject.operations import is_map
from se_inject.tracing import Trace


@dataclass(frozen=True)
class Merge:
    """A merge in the graph.

    Attributes:
        node: The last operation of it, whose value is the joined map.
        operands: The maps that it joins.
        operations: The operations that it stands for, the last of them `node`; a sum of three is two additions.
        fork: The last tensor that all operands were computed from.
    """

    node: fx.Node
    operands: list[fx.Node]
    operations: list[fx.Node]
    fork: fx.Node | None

    @property
    def is_concat(self) -> bool:
        """Whether it is a concatenation and not a sum."""
        return _is_concat(self.node)


def find_merges(trace: Trace) -> list[Merge]:
    """Find the merges of a traced entry, in the order in which they run.

    Sums of three or more maps, written as a chain of additions, are one merge.
    """
    order = {node: i for i, node in enumerate(trace.graph.nodes)}
    chained: set[fx.Node] = set()
    found: list[Merge] = []
    for node in reversed(list(trace.graph.nodes)):
        if _is_merge(node) and node not in chained:
            operands, operations = _collect_operands(node)
            chained.update(operations)
            operations.sort(key=order.__getitem__)
            found.insert(0, Merge(node, operands, operations, _find_fork(operands, order)))
    return found


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
    maps = (x for x in args if isinstance(x, fx.Node) and is_map(x.meta["value"]))
    return list(dict.fromkeys(maps))  # in `x + x` one operand comes twice


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
