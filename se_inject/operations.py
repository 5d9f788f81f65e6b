"""What a piece of a network executes, seen from torch's function calls.

`Watch` is a mode under which real or fake tensors run; it counts layers and notes merges and channel attention. The
probe and the tracer both look through it, so that a merge is the same thing at run time and in a traced graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
POOLINGS = frozenset(
    f"{kind}{d}d"
    for kind in ("max_pool", "avg_pool", "lp_pool", "fractional_max_pool", "adaptive_max_pool", "adaptive_avg_pool")
    for d in (1, 2, 3)
)
_MAP_NDIMS = (3, 4, 5)
_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten"})
_PRODUCTS_OF_MATRICES = frozenset({"matmul", "__matmul__", "bmm"})
_PERMUTATIONS = frozenset({"permute", "transpose", "movedim", "swapaxes", "swapdims"})
_SPLITS = frozenset({"split", "chunk", "tensor_split", "split_with_sizes"})
_LAYOUT = "se_inject_channel_dim"
_PARTS = "se_inject_channel_parts"
UNKNOWN = 0
"""Where the channels of (N, H * W * A, K) are, which were mixed with positions; no map has them there."""


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


def find_channel_dim(value: Tensor) -> int | None:
    """Tell which dimension holds the channels, if `Watch` saw an operation that tells; None otherwise."""
    dim: int | None = getattr(value, _LAYOUT, None)
    return dim


def set_channel_dim(value: Tensor, dim: int | None) -> Tensor:
    """Note on a tensor which dimension holds its channels, and return it."""
    if dim is not None:
        setattr(value, _LAYOUT, dim)
    return value


def get_channel_dim(value: Tensor) -> int:
    """Tell which dimension holds the channels: 1, unless `Watch` saw that the map was made with another layout."""
    dim = find_channel_dim(value)
    return 1 if dim is None else dim


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
            if name in _SPLITS:
                _note_layout_of_parts(args, kwargs, result)
            elif isinstance(result, (tuple, list)):
                for part in result:
                    if isinstance(part, Tensor):
                        _note_layout(name, args, kwargs, part)
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
        _note_layout(name, args, kwargs, result)
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


def _note_layout(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """Note on a result which dimension holds its channels, where the operation or an operand tells."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    source = next((x for x in given if find_channel_dim(x) is not None), None)
    dim: int | None = None
    if name in _PRODUCTS_OF_MATRICES and len(given) == 2 and given[0].ndim == given[1].ndim > 2:
        _set_parts(result, _follow_product(*given))
        return
    if name in LINEARS or name in ("layer_norm", "rms_norm"):
        dim = result.ndim - 1
    elif name in CONVOLUTIONS or name in NORMS:
        dim = 1
    elif source is None or result.ndim == 0:
        return
    elif name in _PERMUTATIONS and source.ndim == result.ndim:
        rest = [x for x in tree_leaves((args[1:], kwargs)) if isinstance(x, int)]
        _set_parts(result, {_follow_permutation(name, rest, part, result.ndim) for part in _get_parts(source)})
        return
    elif name in _RESHAPES and source is given[0]:
        _set_parts(result, _follow_reshape(source, result))
        return
    elif source.ndim == result.ndim:
        _set_parts(result, _get_parts(source))
        return
    elif result.ndim and get_channel_dim(source) == source.ndim - 1 and source.shape[-1] == result.shape[-1]:
        dim = result.ndim - 1  # tokens (N, L, C) laid out as (N, H, W, C), and back
    else:
        dim = 1
    set_channel_dim(result, dim)


def _note_layout_of_parts(args: tuple[Any, ...], kwargs: dict[str, Any], results: Sequence[Tensor]) -> None:
    """Note on the pieces of a map what is known of the whole."""
    source = args[0] if args else next(iter(kwargs.values()))
    if find_channel_dim(source) is not None:
        for piece in results:
            _set_parts(piece, _get_parts(source))


def _get_parts(value: Tensor) -> set[int]:
    """Return the dimensions that the channels were split into, as (N, groups, C / groups, H, W) has two."""
    parts: set[int] | None = getattr(value, _PARTS, None)
    return {get_channel_dim(value)} if parts is None else parts


def _set_parts(value: Tensor, parts: set[int]) -> None:
    set_channel_dim(value, min(parts, default=UNKNOWN))
    if len(parts) > 1:
        setattr(value, _PARTS, parts)


def _follow_product(left: Tensor, right: Tensor) -> set[int]:
    """Tell where the channels of a product are: rows of the left matrix, columns of the right one, or heads."""
    rows, columns = left.ndim - 2, left.ndim - 1
    known = find_channel_dim(left) is not None and find_channel_dim(right) is not None
    parts = (_get_parts(left) & {rows}) | (_get_parts(right) & {columns})
    heads = _get_parts(left) & _get_parts(right) & set(range(1, rows))
    return (parts | heads if known else parts) or {columns}


def _follow_reshape(source: Tensor, result: Tensor) -> set[int]:
    """Tell which dimensions of a reshaped map hold channels alone."""
    parts = _get_parts(source)
    found: set[int] = set()
    for old, new in _align(source.shape, result.shape):
        if parts.intersection(old):
            # Heads and their channels become the last dimension; anything else that is mixed is lost.
            last = result.ndim - 1
            found |= new if old <= parts else {last} & new
    return found


def _align(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[set[int], set[int]]]:
    """Pair the dimensions of two shapes in the smallest groups that hold equally many numbers."""
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        left = right = 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right and (i < len(old) or j < len(new)):
            if (left < right and i < len(old)) or j == len(new):
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        yield set(range(start_i, i)), set(range(start_j, j))


def _follow_permutation(name: str, dims: list[int], channel_dim: int, ndim: int) -> int:
    axes = torch.empty([i + 2 for i in range(ndim)], device="meta")  # the sizes show where each axis goes
    try:
        moved = axes.permute(dims) if name == "permute" else getattr(axes, name)(*dims)
    except (TypeError, RuntimeError):
        return channel_dim
    return list(moved.shape).index(channel_dim + 2)
