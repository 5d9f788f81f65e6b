"""Lean scaling: what a block does to a map in training, with as few passes over the map as there can be.

Takes a map and its gate, gives their product, with gradients for both. Plain autograd goes over a map fourteen times to
squeeze, scale and come back: it multiplies out `grad * x` to add it up, spreads the mean's gradient over a map of its
own, and adds two maps. Here the products are added up as they are made, and one pass makes the map's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

_MIN_POSITIONS = 100
"""Below as many positions a map, a call an image costs more than the passes that it saves."""
_DOT = torch.ops.aten.native_batch_norm_backward


@dataclass
class Link:
    """One map's way through a block, and what its two ends tell each other in the backward pass.

    Attributes:
        dims: The map's spatial dimensions.
        gate: By which the map's gradient is still to be multiplied.
    """

    dims: tuple[int, ...]
    gate: Tensor | None = None


def is_lean(x: Tensor) -> bool:
    """Tell whether a map can go through `squeeze_map` and `scale_map`: eager autograd, which sees them as they are."""
    return (
        isinstance(x, Tensor)
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch._C._are_functorch_transforms_active()  # noqa: SLF001  there is no public way
        and forward_ad._current_level < 0  # noqa: SLF001  likewise
    )


def squeeze_map(x: Tensor, link: Link) -> tuple[Tensor, Tensor]:
    """Squeeze a map.

    Args:
        x: (N, C, ...), or with the channels last.
        link: A new one, for `scale_map`.

    Returns:
        The mean (N, C), and the map again, as it is to be scaled; it must have no other use.
    """
    return _Squeeze.apply(x, link)  # type: ignore[no-any-return]  # torch's


def scale_map(squeezed: Tensor, x: Tensor, gate: Tensor, link: Link) -> Tensor:
    """Scale a map.

    Args:
        squeezed: The map as `squeeze_map` gave it.
        x: The map as `squeeze_map` was given it.
        gate: With the map's number of dimensions, and of its type.
        link: That of `squeeze_map`.
    """
    return _Scale.apply(squeezed, x, gate, link)  # type: ignore[no-any-return]  # torch's


class _Squeeze(Function):
    """Gives z = mean(x) and x. Its gradient is `gate * g + dz / positions`, in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        ctx.link, ctx.shape = link, x.shape
        ctx.set_materialize_grads(False)
        return x.mean(link.dims), x

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, None]:
        gate, ctx.link.gate = ctx.link.gate, None
        if grad_z is not None:
            positions = torch.Size([ctx.shape[dim] for dim in ctx.link.dims]).numel()
            for dim in ctx.link.dims:
                grad_z = grad_z.unsqueeze(dim)
            grad_z = grad_z / positions
        if grad is None:
            return None if grad_z is None else grad_z.expand(ctx.shape), None
        return grad * gate if grad_z is None else torch.addcmul(grad_z.to(grad.dtype), grad, gate), None


class _Scale(Function):
    """Gives x * gate. What it hands to `_Squeeze` as the map's gradient is not multiplied by the gate yet.

    A second derivative goes through the map that is kept, which is therefore not the one that `_Squeeze` gave.
    """

    @staticmethod
    def forward(ctx: Any, squeezed: Tensor, x: Tensor, gate: Tensor, link: Link) -> Tensor:  # noqa: ARG004
        ctx.link = link
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        x, gate = ctx.saved_tensors
        ctx.link.gate = gate
        grad_gate = None
        if ctx.needs_input_grad[2]:
            # With create_graph the sum is differentiated again, which the batch norm's operator below is not made for.
            sums = (grad * x).sum(ctx.link.dims) if torch.is_grad_enabled() else sum_products(grad, x, ctx.link.dims)
            grad_gate = sums.view_as(gate).to(gate.dtype)
        return grad, None, grad_gate, None


def sum_products(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Add up the products of two maps over their spatial dimensions, (N, C), in one pass over both where that is known.

    A batch norm's gradient for its weight is `sum(grad * (x - mean) / deviation)`; with a mean of 0 and a deviation of
    1 it is this sum. It takes each channel of each image for a channel of its own.
    """
    if 1 in dims:  # the channels come last
        a, b = a.movedim(-1, 1), b.movedim(-1, 1)
    num, channels = a.shape[:2]
    positions = a.shape[2:].numel()
    if a.device.type == "cpu" and a.dtype == b.dtype and a.is_floating_point():
        if a.is_contiguous() and b.is_contiguous():
            return _dot(a.view(1, num * channels, positions), b.view(1, num * channels, positions)).view(num, channels)
        last = a.movedim(1, -1), b.movedim(1, -1)
        if positions >= _MIN_POSITIONS and all(t.is_contiguous() for t in last):
            left, right = (t.reshape(num, positions, 1, channels).movedim(-1, 1) for t in last)
            return torch.stack([_dot(left[i : i + 1], right[i : i + 1]) for i in range(num)])
    return (a * b).sum(tuple(range(2, a.ndim)))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Add up the products of (1, C, ...) for each channel."""
    kind = torch.promote_types(a.dtype, torch.float32)
    zeros, ones = torch.zeros(a.shape[1], dtype=kind), torch.ones(a.shape[1], dtype=kind)
    result: Tensor = _DOT(a, b, None, None, None, zeros, ones, True, 0.0, [False, True, False])[1]
    return result
