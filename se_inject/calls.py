"""Entries and calls: where a merge is written, and what that code was called with.

Calls turn into plain values and back, so that a plan can record and replay them. Knows nothing of graphs and sites.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from se_inject.errors import PlanError, TraceError
from se_inject.layouts import find_channel_dim, set_channel_dim
from se_inject.twin import Twin, get_dtype

MAX_NUMBERS = 1 << 31
METHODS = ("forward", "forward_features")
"""Methods that are entered from outside and so are rewritten on their own (timm's networks have both)."""


@dataclass(frozen=True)
class Entry:
    """A method of a module: the place in the code where a merge is written."""

    path: str
    method: str = "forward"

    @property
    def key(self) -> str:
        """Name of the entry in a plan's calls."""
        return f"{self.path}:{self.method}"

    def __str__(self) -> str:
        path = self.path or "(root)"
        return path if self.method == "forward" else f"{path}.{self.method}()"


@dataclass(frozen=True)
class Call:
    """The arguments of one call; tensors are fake."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def encode_call(call: Call, dtype: torch.dtype) -> Any:
    """Turn a call into plain values; tensors become shape and type, with `dtype` (the model's own) as "model".

    Raises:
        TraceError: An argument is neither a tensor, a plain value, nor a container of these.
    """
    return {
        "args": [_encode(x, dtype) for x in call.args],
        "kwargs": {k: _encode(v, dtype) for k, v in call.kwargs.items()},
    }


def decode_call(values: Any, twin: Twin) -> Call:
    """Turn plain values back into a call with fake tensors.

    Raises:
        PlanError: They are not what `encode_call` gives.
    """
    if not isinstance(values, dict) or type(values.get("args")) is not list or type(values.get("kwargs")) is not dict:
        raise PlanError(f"not a plan of se-inject: {values!r:.80} is no call")
    kwargs = {k: _decode(v, twin) for k, v in values["kwargs"].items()}
    return Call(tuple(_decode(x, twin) for x in values["args"]), kwargs)


def describe_form(call: Call) -> str:
    """Describe a call up to batch and spatial sizes."""

    def describe(x: object) -> Any:
        return ("tensor", x.ndim, x.shape[1] if x.ndim > 1 else None, str(x.dtype)) if isinstance(x, Tensor) else x

    leaves, spec = tree_flatten((call.args, call.kwargs))
    return repr(([describe(x) for x in leaves], spec))


def _encode(value: Any, dtype: torch.dtype) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        name = "model" if value.dtype == dtype else str(value.dtype).removeprefix("torch.")
        return {"tensor": list(value.shape), "dtype": name, "channel_dim": find_channel_dim(value)}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(x, dtype) for x in value]}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: _encode(v, dtype) for k, v in value.items()}}
    raise TraceError(f"it is called with a {type(value).__name__}, which a plan cannot record")


def _decode(value: Any, twin: Twin) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    match value:
        case {"tensor": list(shape), "dtype": str(name)}:
            return _decode_tensor(shape, name, value.get("channel_dim"), twin)
        case {"dict": dict(items)}:
            return {k: _decode(v, twin) for k, v in items.items()}
        case {"list": list(items)}:
            return [_decode(x, twin) for x in items]
        case {"tuple": list(items)}:
            return tuple(_decode(x, twin) for x in items)
    raise PlanError(f"not a plan of se-inject: {value!r:.80} is nothing that a call has")


def _decode_tensor(shape: list[Any], name: str, channel_dim: object, twin: Twin) -> Tensor:
    dtype = get_dtype(twin.model) if name == "model" else vars(torch).get(name)
    if not isinstance(dtype, torch.dtype):
        raise PlanError(f"not a plan of se-inject: {name!r:.80} is no type of a tensor")
    is_shape = all(type(size) is int and size >= 0 for size in shape) and math.prod(shape) <= MAX_NUMBERS
    if not is_shape or not (channel_dim is None or (type(channel_dim) is int and -5 <= channel_dim < 5)):
        raise PlanError(f"not a plan of se-inject: {shape!r:.80} is no shape of a tensor")
    return set_channel_dim(twin.make_tensor(shape, dtype), channel_dim)
