"""Readings: numbers of a module, such as a rate, that a recorded graph reads anew each time.

Takes the numbers that a module has, gives floats that know their names and note what traced code asks of them. What is
handed on as it is, as in `dropout(x, self.p)`, can be read again; of what the code goes by or computes with, a graph
holds the outcome, and then the number stays what it was in all places.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable
from typing import Any

from torch import fx, nn

_ASKED = (
    "lt le gt ge eq ne bool hash add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow "
    "divmod rdivmod neg pos abs int float round trunc floor ceil str repr format"
)


class Number(float):
    """A number of a module's, which code takes for a float.

    Args:
        value: The number.
        name: The module's name for it; what code makes of it has none.
        note: Is called where the code asks for it, with the name.
    """

    def __new__(cls, value: float, name: str = "", note: Callable[[str], object] = str) -> Number:
        """Make a float that has a name."""
        number = super().__new__(cls, value)
        number.name, number.note = name, note
        return number

    name: str
    note: Callable[[str], object]

    @property
    def plain(self) -> float:
        """The number without a name."""
        return float.__pos__(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be copied and pickled as a plain float."""
        return float, (self.plain,)


def _define(operation: str) -> None:
    original: Callable[..., Any] = getattr(float, operation)

    def ask(self: Number, *args: object) -> Any:
        outcome = original(self, *args)
        if outcome is not NotImplemented:  # else the other operand goes on with it, a proxy, say
            self.note(self.name)
        return outcome

    setattr(Number, operation, ask)


for _operation in _ASKED.split():
    _define(f"__{_operation}__")


def make_numbers(owner: nn.Module, note: Callable[[str], None]) -> dict[str, Number]:
    """Make a number of each float among a module's attributes; a GraphModule's graph has read them already."""
    if isinstance(owner, fx.GraphModule):
        return {}
    floats = {name: value for name, value in vars(owner).items() if type(value) is float}
    names = [name for name in floats if name.isidentifier() and not keyword.iskeyword(name)]
    return {name: Number(floats[name], name, note) for name in names}


def fix_numbers(graph: fx.Graph, names: set[str]) -> None:
    """Write some numbers that a graph reads down as the values that they had."""
    read = {node: node.meta["value"] for node in graph.nodes if node.op == "get_attr" and node.target in names}

    def fix(node: fx.Node) -> Any:
        return read.get(node, node)

    for user in {user for node in read for user in node.users}:
        user.args, user.kwargs = fx.map_arg(user.args, fix), fx.map_arg(user.kwargs, fix)
    for node in read:
        graph.erase_node(node)
