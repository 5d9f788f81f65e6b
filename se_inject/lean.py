"""Lean scaling: what a block does to a map in training, in few passes over the map.

Takes a map and its gate, gives their product, with gradients for both. Plain autograd goes over a map fourteen times to
squeeze, scale and come back: it multiplies out `grad * x` to add it up, spreads the mean's gradient over a map of its
own, and adds two maps. Here the products are added up as they are made, and one pass makes the map's gradient.
Nor is the map kept where a batch norm made it, which keeps its own input: what a plain network keeps is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn import functional as F

_MIN_POSITIONS = 100
"""Below as many positions a map, a call an image costs more than the passes that it saves."""
_BACKWARD = torch.ops.aten.native_batch_norm_backward
_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0")


@dataclass(frozen=True)
class Norm:
    """A batch norm that made a map: whether by the batch's statistics, and what was added to the variance."""

    training: bool
    epsilon: float


@dataclass
class Link:
    """One map's way through a block, and what its two ends tell each other in the backward pass.

    Attributes:
        dims: The map's spatial dimensions.
        norm: What made the map, if it is kept in the form of that norm's input.
        gate: By which the map's gradient is still to be multiplied.
    """

    dims: tuple[int, ...]
    norm: Norm | None = None
    gate: Tensor | None = None


def is_lean(x: Tensor) -> bool:
    """Tell whether a map can go through `squeeze_map` and `scale_map`: eager autograd, which sees them as they are."""
    return (
        isinstance(x, Tensor)
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
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
    link.norm, origin = _find_norm(x)
    return _Scale.apply(squeezed, x, gate, link, *origin)  # type: ignore[no-any-return]  # torch's


def _find_norm(x: Tensor) -> tuple[Norm | None, tuple[Tensor, ...]]:
    """Find what a batch norm made a map from, and keeps for its own backward pass, so that the map need not be kept.

    Returns:
        The norm, with its input, the mean and the inverse deviation by which that was normalised, weight and bias; or
        None with the map, if something else made it or if not all of it can be had.
    """
    node: Any = x.grad_fn
    if node is None or node.name() not in _NORMS or _is_checkpointing():
        return None, (x,)
    bias = getattr(node.next_functions[2][0], "variable", None)
    if node._saved_weight is None or bias is None:
        return None, (x,)
    norm = Norm(node._saved_training, node._saved_eps if node.name() == _NORMS[0] else node._saved_epsilon)
    if norm.training:
        mean, inverse = node._saved_result1, node._saved_result2
    else:
        mean, inverse = node._saved_running_mean, (node._saved_running_var + norm.epsilon).rsqrt()
    return norm, (node._saved_input, mean, inverse, node._saved_weight, bias)


def _is_checkpointing() -> bool:
    """Tell whether activation checkpointing runs, which keeps nothing anyway and lets nothing be looked at twice."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


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

    It keeps the map, or what the map was made from. A second derivative goes through these, which is why they are
    arguments of their own.
    """

    @staticmethod
    def forward(ctx: Any, squeezed: Tensor, x: Tensor, gate: Tensor, link: Link, *origin: Tensor) -> Tensor:  # noqa: ARG004
        ctx.link = link
        ctx.save_for_backward(gate, *origin)
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, *origin = ctx.saved_tensors
        ctx.link.gate = gate
        grad_gate = None
        if ctx.needs_input_grad[2]:
            grad_gate = _sum(grad, origin, ctx.link).view_as(gate).to(gate.dtype)
        return grad, None, grad_gate, None, *(None for _ in origin)


def _sum(grad: Tensor, origin: Sequence[Tensor], link: Link) -> Tensor:
    """Add up `grad * x`, (N, C), from x or from what it was made from."""
    x, *norm = origin
    if not torch.is_grad_enabled():  # else what is computed here is differentiated again
        found = sum_products(grad, x, link.dims, *norm[:2])
        if found is not None:
            return norm[2] * found[0] + norm[3] * found[1] if norm else found[0]
    return (grad * (x if link.norm is None else _normalise(link.norm, origin))).sum(link.dims)


def _normalise(norm: Norm, origin: Sequence[Tensor]) -> Tensor:
    """Normalise again; where it is to be differentiated, as a function of the input and the parameters."""
    x, mean, inverse, weight, bias = origin
    if norm.training and torch.is_grad_enabled():
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=norm.epsilon)
    shape = [-1, *[1] * (x.ndim - 2)]
    scale = weight * inverse
    return torch.addcmul((bias - mean * scale).to(x.dtype).view(shape), x, scale.to(x.dtype).view(shape))


def sum_products(
    a: Tensor, b: Tensor, dims: tuple[int, ...], mean: Tensor | None = None, inverse: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Add up the products of two maps over their spatial dimensions, in one pass over both.

    A batch norm's backward operator makes `sum(grad * (x - mean) * inverse)` and `sum(grad)` for its weight and bias.
    It takes each channel of each image for a channel of its own.

    Args:
        a: The one map.
        b: The other one, of the same shape.
        dims: The spatial dimensions.
        mean: (C,), what is taken off `b`; 0 if None.
        inverse: (C,), by what it is multiplied then; 1 if None.

    Returns:
        The sums of `a * (b - mean) * inverse`, and of `a`, (N, C) each; None where that is not known to be faster: on
        a GPU, for maps that lie otherwise, and for small ones with the channels last.
    """
    if a.device.type != "cpu" or a.dtype != b.dtype:
        return None
    if 1 in dims:  # the channels come last
        a, b = a.movedim(-1, 1), b.movedim(-1, 1)
    num, channels, positions = *a.shape[:2], a.shape[2:].numel()
    kind = torch.promote_types(a.dtype, torch.float32)
    mean = torch.zeros(channels, dtype=kind) if mean is None else mean.to(kind)
    inverse = torch.ones(channels, dtype=kind) if inverse is None else inverse.to(kind)
    if a.is_contiguous() and b.is_contiguous():
        left, right = (x.view(1, num * channels, positions) for x in (a, b))
        products, sums = _dot(left, right, mean.repeat(num), inverse.repeat(num))
        return products.view(num, channels), sums.view(num, channels)
    last = a.movedim(1, -1), b.movedim(1, -1)
    if positions < _MIN_POSITIONS or not all(x.is_contiguous() for x in last):
        return None
    left, right = (x.reshape(num, positions, 1, channels).movedim(-1, 1) for x in last)
    each = [_dot(left[i : i + 1], right[i : i + 1], mean, inverse) for i in range(num)]
    return torch.stack([x for x, _ in each]), torch.stack([x for _, x in each])


def _dot(a: Tensor, b: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the products of (1, C, ...) for each channel."""
    _, products, sums = _BACKWARD(a, b, None, None, None, mean, inverse, True, 0.0, [False, True, True])
    return products, sums
