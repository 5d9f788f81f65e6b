"""Proxies: stand-ins for the values of code that is being recorded, which know these values.

Takes nodes whose `meta` holds a value, gives objects that the user's code works with as if they were tensors, shapes or
numbers. What only a value can answer is noted with the tracer.
"""

from __future__ import annotations

import dis
import functools
import inspect
import operator
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute

if TYPE_CHECKING:
    from se_inject.recording import ShallowTracer


_UNPACK = dis.opmap["UNPACK_SEQUENCE"]


class ValueProxy(fx.Proxy):
    """A proxy that knows the value it stands for, so that code which asks for types, lengths or truth goes on."""

    tracer: ShallowTracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        value = _peek(self)
        frame = inspect.currentframe()
        asking = frame.f_back if frame else None
        if asking is None or not isinstance(value, (Tensor, tuple, list, dict)) or not _is_asked_by_python(asking):
            return ValueProxy
        if isinstance(value, Tensor):
            if self.node in self.tracer.optional:
                self.tracer.note_condition(self.node)
            return torch.Tensor
        if asking.f_globals.get("__name__", "").startswith(("torch.", "se_inject.")):
            return ValueProxy  # torch.fx goes through containers, and this is one node
        self.tracer.note_condition(self.node)  # a child may give another one in the other mode
        return type(value)

    def __getattr__(self, name: str) -> Any:
        node = vars(self).get("node")
        if name == "_is_param" or (node is not None and not hasattr(node.meta.get("value"), name)):
            raise AttributeError(name)  # isinstance(x, nn.Parameter) asks for _is_param
        value = getattr(_peek(self), name, None)
        return self.tracer.tell_text(value) if isinstance(value, str) else ValueAttribute(self, name)

    def __setitem__(self, index: object, value: object) -> None:
        if not isinstance(self.node.meta["value"], Tensor):
            raise TypeError(f"{type(self.node.meta['value']).__name__} does not support item assignment in a graph")
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        self.tracer.note_length(self.node)
        return len(self.node.meta["value"])

    def __iter__(self) -> Iterator[Any]:
        frame = inspect.currentframe()
        asking = frame.f_back if frame else None
        # `a, b = x` says itself how many there are
        is_unpacked = asking is not None and asking.f_code.co_code[asking.f_lasti] == _UNPACK
        if not is_unpacked:
            self.tracer.note_length(self.node)
        return self.tracer.iter(self)

    def __index__(self) -> int:
        self.tracer.note_condition(self.node)
        return int(self.node.meta["value"])

    __int__ = __index__

    def __hash__(self) -> int:
        value = self.node.meta.get("value")
        if value is None or isinstance(value, Tensor):
            return id(self)
        self.tracer.note_condition(self.node)
        return hash(value)

    # Not noted as conditions: nearly all texts are those of assertions that hold.
    def __str__(self) -> str:
        value = _peek(self)
        return repr(self) if isinstance(value, Tensor) else str(value)

    def __format__(self, form: str) -> str:
        value = _peek(self)
        return format(repr(self) if isinstance(value, Tensor) else value, form)

    def __float__(self) -> float:
        self.tracer.note_condition(self.node)
        return float(self.node.meta["value"])


def _define_in_place(operation: str) -> None:
    function = getattr(operator, operation)

    def record(self: ValueProxy, other: object) -> Any:
        if not isinstance(self.node.meta["value"], Tensor):
            return NotImplemented  # a number: Python goes on with the plain operator
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(ValueProxy, f"__{operation}__", record)


# Without these `out += x` would be recorded as `out + x`, and whoever sees the same tensor would miss the sum.
_IN_PLACE = "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift"
for _operation in _IN_PLACE.split():
    _define_in_place(_operation)


class ValueAttribute(Attribute, ValueProxy):
    """An attribute of a proxy: a method that is called next, or a value such as a shape."""


def is_proxy(value: object) -> bool:
    """Tell whether an object is a proxy, whatever it says of its class."""
    return issubclass(type(value), fx.Proxy)


def _is_asked_by_python(frame: FrameType) -> bool:
    """Tell whether a frame's own code asks for the class of an object, with `isinstance`, for one.

    Functions in C that it calls ask too, those of TorchScript and vmap among them, and would take the memory of what
    says that it is a tensor for a tensor's.
    """
    code = frame.f_code
    return code.co_name == "__instancecheck__" or frame.f_lasti not in _find_other_calls(code)


@functools.lru_cache
def _find_other_calls(code: CodeType) -> frozenset[int]:
    """Find where code calls something else than `isinstance`. A call begins where the name of what it calls does."""
    instructions = [(i, i.positions and i.positions[0::2]) for i in dis.get_instructions(code)]
    asking = {start for i, start in instructions if i.argval == "isinstance"}
    return frozenset(i.offset for i, start in instructions if "CALL" in i.opname and start not in asking)


def _peek(proxy: Any) -> Any:
    """Return the value that a proxy stands for, without recording that an attribute was used."""
    if issubclass(type(proxy), Attribute):  # `isinstance` would ask for the class that is told by this value
        return getattr(_peek(proxy.root), proxy.attr)
    node = vars(proxy).get("node")
    return None if node is None else node.meta.get("value")
