"""Marks: what an injection leaves on modules beside their blocks.

A mark is an attribute of a module's instance, and is copied and pickled with it. A copy or a pickle of an
`fx.GraphModule` is made anew from its graph and loses its own attributes, but keeps the modules that the graph calls,
with theirs: one of these carries its marks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from se_inject.errors import ModelError

PLAN = "_se_inject_plan"
SOURCE = "_se_inject_source"
REMOVED = "_se_inject_removed"
OPTIMIZED = "_se_inject_optimized"
ADAPTERS = "_se_inject_adapters"
_CARRIED = "_se_inject_carried"


@dataclass(frozen=True)
class Removed:
    """What an owner had in the places that its blocks and its new methods took.

    Attributes:
        blocks: Names of the blocks.
        attributes: Attributes of the instance: `se = None`, or a method that was chosen for the instance.
        children: Names that were registered as modules, with None.
    """

    blocks: tuple[str, ...]
    attributes: Mapping[str, object] = field(default_factory=dict)
    children: tuple[str, ...] = ()


def check_kind(model: object) -> None:
    """Refuse what is no network, such as the name of one.

    Raises:
        ModelError: It is no module of torch's.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"found a {type(model).__name__}; expected a torch.nn.Module")


def mark_module(module: nn.Module, name: str, value: object) -> None:
    """Leave a mark on a module; a GraphModule must call a module."""
    if isinstance(module, fx.GraphModule):
        carrier = next((m for m in _iterate_called(module) if _CARRIED in vars(m)), next(_iterate_called(module)))
        carried: dict[str, object] = vars(carrier).setdefault(_CARRIED, {})
        carried[name] = value
    else:
        vars(module)[name] = value


def find_mark(module: nn.Module, name: str) -> object:
    """Return a mark of a module, or None.

    Raises:
        ModelError: It is no module of torch's.
    """
    check_kind(module)
    return next((marks[name] for marks in _find_all(module) if name in marks), None)


def erase_marks(module: nn.Module) -> None:
    """Take all marks off a module."""
    for name in (PLAN, SOURCE, REMOVED, OPTIMIZED, ADAPTERS):
        vars(module).pop(name, None)
    if isinstance(module, fx.GraphModule):
        for called in _iterate_called(module):
            vars(called).pop(_CARRIED, None)


def _find_all(module: nn.Module) -> Iterator[Mapping[str, Any]]:
    if isinstance(module, fx.GraphModule):
        yield from (vars(called)[_CARRIED] for called in _iterate_called(module) if _CARRIED in vars(called))
    else:
        yield vars(module)


def _iterate_called(module: fx.GraphModule) -> Iterator[nn.Module]:
    return (module.get_submodule(str(node.target)) for node in module.graph.nodes if node.op == "call_module")
