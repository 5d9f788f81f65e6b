"""Layouts: which dimension of a tensor holds the channels.

Takes a torch function that ran, with its operands and its result, and notes on the result where its channels are:
convolutions make maps (N, C, H, W), linear layers make tokens (N, L, C), and everything else moves them about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from se_inject.functions import CONVOLUTIONS, LINEARS, NORMS

_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten"})
_PRODUCTS_OF_MATRICES = frozenset({"matmul", "__matmul__", "bmm"})
_PERMUTATIONS = frozenset({"permute", "transpose", "movedim", "swapaxes", "swapdims"})
_SELECTIONS = frozenset({"unbind", "select", "__getitem__"})
_LAYOUT = "se_inject_channel_dim"
_PARTS = "se_inject_channel_parts"
UNKNOWN = 0
"""Where the channels of (N, H * W * A, K) are, which were mixed with positions; no map has them there."""


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


def note_layout(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """Note on a result which dimension holds its channels, where the operation or an operand tells."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    source = next((x for x in given if find_channel_dim(x) is not None), None)
    dim: int | None = None
    if name in _PRODUCTS_OF_MATRICES and len(given) == 2 and given[0].ndim == given[1].ndim > 2:
        _set_parts(result, _follow_product(*given))
        return
    if name in LINEARS or (name in ("layer_norm", "rms_norm") and (source is None or _is_over_last(args, kwargs))):
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
    elif name in _SELECTIONS and result.ndim == source.ndim - 1 and source is given[0]:
        dropped = _find_dropped(name, args, kwargs) % source.ndim
        _set_parts(result, {part - (part > dropped) for part in _get_parts(source) if part != dropped})
        return
    elif result.ndim and get_channel_dim(source) == source.ndim - 1 and source.shape[-1] == result.shape[-1]:
        dim = result.ndim - 1  # tokens (N, L, C) laid out as (N, H, W, C), and back
    else:
        dim = 1
    set_channel_dim(result, dim)


def _is_over_last(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a norm is over the last dimension alone, which then is the channels, and not over a whole map."""
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    return len(shape) == 1


def note_layout_of_parts(args: tuple[Any, ...], kwargs: dict[str, Any], results: Sequence[Tensor]) -> None:
    """Note on the pieces of a map what is known of the whole."""
    source = args[0] if args else next(iter(kwargs.values()))
    if find_channel_dim(source) is not None:
        for piece in results:
            _set_parts(piece, _get_parts(source))


def is_split(value: Tensor) -> bool:
    """Tell whether the channels of a tensor lie in several dimensions, as in (N, heads, L, C / heads)."""
    return len(_get_parts(value)) > 1


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


def _find_dropped(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tell which dimension is gone after `x.unbind(0)`, `x.select(1, 0)` or `x[:, 0]`."""
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return next((i for i, item in enumerate(index) if isinstance(item, int)), 0)
    dim: int = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return dim


def _follow_permutation(name: str, dims: list[int], channel_dim: int, ndim: int) -> int:
    axes = torch.empty([i + 2 for i in range(ndim)], device="meta")  # the sizes show where each axis goes
    try:
        moved = axes.permute(dims) if name == "permute" else getattr(axes, name)(*dims)
    except (TypeError, RuntimeError):
        return channel_dim
    return list(moved.shape).index(channel_dim + 2)
