"""What a piece of a network executes, seen from torch's function calls.

`Watch` is a mode under which real or fake tensors run; it counts layers and notes merges and channel attention. The
probe and the tracer both look through it, so that a merge is the same thing at run time and in a traced graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

MergeKind = Literal["sum", "concat"]

ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})
PRODUCTS = frozenset({"mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"})
CONVOLUTIONS = frozenset({f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)})
LINEARS = frozenset({"linear", "matmul", "__matmul__", "bmm", "einsum", "scaled_dot_product_attention"})
NORMS = frozenset({"batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm", "local_response_norm"})
ACTIVATIONS = frozenset(
    "relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid logsigmoid tanh softmax "
    "softplus prelu rrelu threshold clamp clamp_min relu_ leaky_relu_ elu_ selu_ celu_ hardtanh_ sigmoid_ tanh_ rrelu_ "
    "threshold_ clamp_ clamp_min_".split()
)
_MAP_NDIM = 4


@dataclass(frozen=True)
class MergeCall:
    """A merge that was executed: an addition of two maps of equal shape, or a concatenation along the channels."""

    kind: MergeKind
    shape: tuple[int, ...]
    """Shape of the joined map, (N, C, H, W)."""


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

    @property
    def layers(self) -> int:
        """Number of convolutions and linear layers."""
        return self.convolutions + self.linears


def is_map(value: object) -> TypeGuard[Tensor]:
    """Tell whether a value is a feature map: a floating point tensor of shape (N, C, H, W)."""
    return isinstance(value, Tensor) and value.ndim == _MAP_NDIM and value.is_floating_point()


def get_channel_dim(value: Tensor) -> int:
    """Tell which dimension holds the channels: 1, unless `Watch` saw the map being made with another layout."""
    dim: int = getattr(value, "se_inject_channel_dim", 1)
    return dim


class Watch(TorchFunctionMode):
    """Run tensors and keep the account of it in `work`.

    Args:
        on_merge: Called with each merge, as it is executed.
    """

    def __init__(self, on_merge: Callable[[MergeCall], None] | None = None) -> None:
        super().__init__()
        self.work = Work()
        self._on_merge = on_merge

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Execute a torch function and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        name = getattr(func, "__name__", "")
        work = self.work
        work.names.add(name)
        work.convolutions += name in CONVOLUTIONS
        work.linears += name in LINEARS
        work.norms += name in NORMS
        work.activations += name in ACTIVATIONS
        work.attentions += name in PRODUCTS and _is_attention(args, kwargs)
        _note_layout(name, args, kwargs, result)
        merge = _recognise_merge(name, args, kwargs, result)
        if merge is not None:
            work.merges.append(merge)
            if self._on_merge is not None:
                self._on_merge(merge)
        return result


def _recognise_merge(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> MergeCall | None:
    if name in ADDITIONS:
        operands = [*args, *(kwargs[k] for k in ("input", "other") if k in kwargs)][:2]
        equal = all(is_map(x) and x.shape == result.shape for x in operands) and len(operands) == 2
        return MergeCall("sum", tuple(result.shape)) if equal else None
    if name in CONCATENATIONS and is_map(result):
        tensors = args[0] if args else kwargs["tensors"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        if len(tensors) > 1 and dim % result.ndim == get_channel_dim(tensors[0]):
            return MergeCall("concat", tuple(result.shape))
    return None


def _is_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # SK and ResNeSt weigh several branches at once, (N, branches, C, H, W).
    operands = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim >= _MAP_NDIM]
    return len(operands) == 2 and any(
        _is_gate(gate, x) for gate, x in (operands, reversed(operands)) if gate.shape[:-2] == x.shape[:-2]
    )


def _is_gate(gate: Tensor, x: Tensor) -> bool:
    # An expanded gate has the shape of the map, but its spatial strides are zero.
    flat = all(size == 1 or stride == 0 for size, stride in zip(gate.shape[-2:], gate.stride()[-2:], strict=True))
    return flat and x.shape[-2:].numel() > 1 and gate.shape[0] > 1 and gate.shape[1:].numel() > 1


def _note_layout(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    source = next((x for x in args if isinstance(x, Tensor) and x.ndim >= 3), None)
    dim = 1
    if name in LINEARS or name in ("layer_norm", "rms_norm"):
        dim = result.ndim - 1
    elif source is None or name in CONVOLUTIONS or name in NORMS:
        dim = 1
    elif name in ("permute", "transpose", "movedim", "swapaxes", "swapdims") and source.ndim == result.ndim:
        dim = _follow_permutation(name, tree_leaves((args[1:], kwargs)), get_channel_dim(source), result.ndim)
    elif source.ndim == result.ndim:
        dim = get_channel_dim(source)
    elif get_channel_dim(source) == source.ndim - 1 and source.shape[-1] == result.shape[-1]:
        dim = result.ndim - 1  # tokens (N, L, C) laid out as (N, H, W, C), and back
    if dim != get_channel_dim(result):
        result.se_inject_channel_dim = dim  # type: ignore[attr-defined]


def _follow_permutation(name: str, dims: list[int], channel_dim: int, ndim: int) -> int:
    axes = torch.empty([i + 2 for i in range(ndim)], device="meta")  # the sizes show where each axis goes
    try:
        moved = axes.permute(dims) if name == "permute" else getattr(axes, name)(*dims)
    except (TypeError, RuntimeError):
        return channel_dim
    return list(moved.shape).index(channel_dim + 2)
