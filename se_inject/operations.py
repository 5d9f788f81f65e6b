"""What a piece of a network executes, seen from torch's function calls.

`Watch` is a mode under which real or fake tensors run; it counts layers and notes merges and channel attention. The
probe and the tracer both look through it, so that a merge is the same thing at run time and in a traced graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeGuard

from torch import Tensor
from torch.overrides import TorchFunctionMode

from se_inject.functions import (
    ACTIVATIONS,
    ADDITIONS,
    CONCATENATIONS,
    CONVOLUTIONS,
    LINEARS,
    NORMS,
    POOLINGS,
    PRODUCTS,
    SPLITS,
)
from se_inject.layouts import find_channel_dim, get_channel_dim, note_layout, note_layout_of_parts

MergeKind = Literal["sum", "concat"]

_MAP_NDIMS = (3, 4, 5)


@dataclass(frozen=True)
class MergeCall:
    """A merge that was executed: an addition of two maps of equal shape, or a concatenation along the channels."""

    kind: MergeKind
    shape: tuple[int, ...]
    """Shape of the joined map, (N, C, H, W) or another of `is_map`."""


@dataclass(frozen=True)
class LayerCall:
    """A convolution, linear layer or pooling of a map that was executed.

    Attributes:
        kind: conv, linear or pool.
        channels: Channels of the input.
        out_channels: Channels of the output.
        positions: Number of positions (H x W) of the input.
        out_positions: Number of positions of the output.
        is_depthwise: Whether it is a convolution of each channel alone.
        is_spatial: Whether it is a convolution of more than one position.
        is_first: Whether no layer has worked on its input yet.
    """

    kind: Literal["conv", "linear", "pool"]
    channels: int
    out_channels: int
    positions: int
    out_positions: int
    is_depthwise: bool = False
    is_spatial: bool = False
    is_first: bool = False


@dataclass
class Work:
    """What was executed: how many layers of which sort, and the merges."""

    convolutions: int = 0
    linears: int = 0
    norms: int = 0
    activations: int = 0
    attentions: int = 0
    """Products of a map and a per-image tensor (N, C) whose spatial size is one."""
    names: set[str] = field(default_factory=set)
    """Names of all torch functions that gave a tensor."""
    merges: list[MergeCall] = field(default_factory=list)
    layer_calls: list[LayerCall] = field(default_factory=list)

    @property
    def layers(self) -> int:
        """Number of convolutions and linear layers."""
        return self.convolutions + self.linears


def is_map(value: object) -> TypeGuard[Tensor]:
    """Tell whether a value is a feature map: a floating point tensor (N, C, L), (N, C, H, W) or (N, C, D, H, W).

    Tokens (N, L, C) and channels-last maps (N, H, W, C) count; `get_channel_dim` tells the layout.
    """
    return isinstance(value, Tensor) and value.ndim in _MAP_NDIMS and value.is_floating_point()


class Watch(TorchFunctionMode):
    """Run tensors and keep the account of it in `work`.

    Args:
        on_call: Called with each merge and each layer, as it is executed.
    """

    def __init__(self, on_call: Callable[[MergeCall | LayerCall], None] | None = None) -> None:
        super().__init__()
        self.work = Work()
        self._on_call = on_call

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Execute a torch function and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if not isinstance(result, Tensor):
            if name in SPLITS:
                note_layout_of_parts(args, kwargs, result)
            elif isinstance(result, (tuple, list)):
                for part in result:
                    if isinstance(part, Tensor):
                        note_layout(name, args, kwargs, part)
            return result
        work = self.work
        work.names.add(name)
        work.convolutions += name in CONVOLUTIONS
        work.linears += name in LINEARS
        work.norms += name in NORMS
        work.activations += name in ACTIVATIONS
        work.attentions += name in PRODUCTS and _is_attention(args, kwargs)
        source = args[0] if args else kwargs.get("input")
        is_first = not isinstance(source, Tensor) or find_channel_dim(source) is None
        note_layout(name, args, kwargs, result)
        merge = _recognise_merge(name, args, kwargs, result)
        layer = _recognise_layer(name, args, kwargs, result)
        layer = replace(layer, is_first=is_first) if layer else None
        work.merges += [merge] if merge else []
        work.layer_calls += [layer] if layer else []
        for call in (merge, layer):
            if self._on_call is not None and call is not None:
                self._on_call(call)
        return result


def _recognise_merge(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> MergeCall | None:
    if name in ADDITIONS:
        operands = [*args, *(kwargs[k] for k in ("input", "other") if k in kwargs)][:2]
        equal = all(is_map(x) and x.shape == result.shape for x in operands) and len(operands) == 2
        return MergeCall("sum", tuple(result.shape)) if equal else None
    if name in CONCATENATIONS and is_map(result):
        tensors = args[0] if args else kwargs["tensors"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        known = next((x for x in tensors if find_channel_dim(x) is not None), tensors[0])  # a class token is not
        if len(tensors) > 1 and dim % result.ndim == get_channel_dim(known):
            return MergeCall("concat", tuple(result.shape))
    return None


def count_positions(value: Tensor) -> int:
    """Count the positions (H x W) of a map."""
    return value.numel() // value.shape[0] // value.shape[get_channel_dim(value)] if value.numel() else 0


def _recognise_layer(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> LayerCall | None:
    x = args[0] if args else kwargs.get("input")
    if not is_map(x) or not x.numel() or not (is_map(result) or name in ("mean", "amax")):
        return None
    before = (x.shape[get_channel_dim(x)], count_positions(x))
    if name in ("mean", "amax"):  # a squeeze or a global pooling, if nothing but channels is left
        is_global = result.numel() == x.shape[0] * before[0] < x.numel()
        return LayerCall("pool", before[0], before[0], before[1], 1) if is_global else None
    after = (result.shape[get_channel_dim(result)], count_positions(result))
    if name in POOLINGS:
        return LayerCall("pool", before[0], after[0], before[1], after[1])
    if name == "linear":
        return LayerCall("linear", x.shape[-1], after[0], x.numel() // x.shape[0] // x.shape[-1], after[1])
    if name in CONVOLUTIONS:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        is_depthwise = "transpose" not in name and weight.shape[1] == 1 < before[0]
        is_spatial = any(size > 1 for size in weight.shape[2:])
        return LayerCall("conv", before[0], after[0], before[1], after[1], is_depthwise, is_spatial)
    return None


def _is_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    operands = [x for x in (*args, *kwargs.values()) if is_map(x)]
    return len(operands) == 2 and (_is_gate(*operands) or _is_gate(*reversed(operands)))


def _is_gate(gate: Tensor, x: Tensor) -> bool:
    """Tell whether a tensor has one number an image and channel of a map, and none a position."""
    if gate.ndim != x.ndim or gate.shape[0] != x.shape[0] or x.shape[0] == 1:
        return False
    # An expanded gate has the shape of the map, but its spatial strides are zero.
    flat = {d for d in range(1, x.ndim) if x.shape[d] > 1 and (gate.shape[d] == 1 or gate.stride(d) == 0)}
    own = {d for d in range(1, x.ndim) if gate.shape[d] == x.shape[d] > 1} - flat
    # SK and ResNeSt weigh several branches at once, (N, branches, C, H, W).
    return get_channel_dim(x) in own and len(flat) >= min(2, x.ndim - 2)
