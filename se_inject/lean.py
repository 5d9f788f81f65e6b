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
    with torch.no_grad():
        squeezed = _squeeze_inner(x)
    return _Squeeze.apply(x, link, squeezed)  # type: ignore[no-any-return]  # torch's


def _squeeze_inner(x: Tensor) -> Tensor | None:
    """Squeeze a map through the 1x1 convolution and the batch norm that made it, where that reads less.

    Both act on every position alike, so the mean may be taken before them.

    Returns:
        (N, C), or None if something else made the map.
    """
    norm, origin = _find_norm(x)
    found = _find_convolution(x) if norm is not None else None
    if found is None:
        return None
    inner, weight, bias, groups = found
    if weight.numel() + inner.numel() >= x.numel():
        return None
    _, mean, inverse, scale, shift = origin
    z = inner.mean(tuple(range(2, x.ndim)), dtype=mean.dtype).view(len(x), groups, -1)
    z = torch.einsum("ngi,goi->ngo", z, weight.to(mean.dtype).view(groups, -1, z.shape[-1])).flatten(1)
    z = z - mean if bias is None else z + (bias - mean)
    return torch.addcmul(shift, z, inverse * scale).to(x.dtype)


def _find_convolution(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, int] | None:
    """Find the 1x1 convolution that made a batch norm's input: its own input, weight, bias and number of groups."""
    norm: Any = x.grad_fn
    node = norm.next_functions[0][0]
    if node is None or node.name() != "ConvolutionBackward0" or node._saved_transposed:
        return None
    try:
        inner, weight = node._saved_input, node._saved_weight
    except RuntimeError:
        return None
    bias = node.next_functions[2][0]
    is_pointwise = weight.shape[2:].numel() == 1 and set(node._saved_stride) == {1} and not any(node._saved_padding)
    if not is_pointwise or (bias is not None and not hasattr(bias, "variable")):
        return None
    return inner, weight, None if bias is None else bias.variable, node._saved_groups


def scale_map(squeezed: Tensor, x: Tensor, gate: Tensor, link: Link, shortcut: Tensor | None = None) -> Tensor:
    """Scale a map, and add another one to it.

    Args:
        squeezed: The map as `squeeze_map` gave it.
        x: The map as `squeeze_map` was given it.
        gate: With the map's number of dimensions, and of its type.
        link: That of `squeeze_map`.
        shortcut: What is added, if anything.
    """
    link.norm, origin = _find_norm(x)
    is_alike = shortcut is not None and are_alike(x, shortcut)
    scaled: Tensor = _Scale.apply(squeezed, x, gate, link, shortcut if is_alike else None, *origin)
    return scaled if shortcut is None or is_alike else scaled + shortcut


def multiply(x: Tensor, gate: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """Multiply a map by its gate, and add another one to it, by plain operators."""
    if shortcut is None:
        return x * gate
    return torch.addcmul(shortcut, x, gate) if are_alike(x, shortcut) else x * gate + shortcut


def are_alike(x: Tensor, shortcut: Tensor) -> bool:
    """Tell whether `addcmul` gives what a product and a sum give: the same type and memory format."""
    if not (isinstance(x, Tensor) and isinstance(shortcut, Tensor)):
        return True  # torch.fx's proxies, which cannot be asked
    if x.dtype != shortcut.dtype or x.stride() != shortcut.stride():
        return False
    # While TorchScript traces, sizes are tensors: a comparison would warn that the trace may not hold for others.
    return torch.jit.is_tracing() or x.shape == shortcut.shape  # type: ignore[attr-defined, no-untyped-call]


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
    norm = Norm(node._saved_training, node._saved_eps if node.name() == _NORMS[0] else node._saved_epsilon)
    try:
        source, weight = node._saved_input, node._saved_weight
        if norm.training:
            mean, inverse = node._saved_result1, node._saved_result2
        else:
            mean, inverse = node._saved_running_mean, (node._saved_running_var + norm.epsilon).rsqrt()
    except RuntimeError:  # they were freed, by a backward pass, or written over
        return None, (x,)
    if weight is None or bias is None:
        return None, (x,)
    return norm, (source, mean, inverse, weight, bias)


def _is_checkpointing() -> bool:
    """Tell whether activation checkpointing runs, which keeps nothing anyway and lets nothing be looked at twice."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


class _Squeeze(Function):
    """Gives z = mean(x) and x. Its gradient is `gate * g + dz / positions`, in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, link: Link, squeezed: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.link, ctx.shape = link, x.shape
        ctx.set_materialize_grads(False)
        return x.mean(link.dims) if squeezed is None else squeezed, x

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        gate, ctx.link.gate = ctx.link.gate, None
        if grad_z is not None:
            positions = torch.Size([ctx.shape[dim] for dim in ctx.link.dims]).numel()
            for dim in ctx.link.dims:
                grad_z = grad_z.unsqueeze(dim)
            grad_z = grad_z / positions
        if grad is None:
            return None if grad_z is None else grad_z.expand(ctx.shape), None, None
        return grad * gate if grad_z is None else torch.addcmul(grad_z.to(grad.dtype), grad, gate), None, None


class _Scale(Function):
    """Gives x * gate, or shortcut + x * gate.

    What it hands to `_Squeeze` as the map's gradient is not multiplied by the gate yet. It keeps the map, or what the
    map was made from. A second derivative goes through these, which is why they are arguments of their own.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  an autograd function takes no keywords
        ctx: Any,
        squeezed: Tensor,  # noqa: ARG004  the gradient's way to `_Squeeze`
        x: Tensor,
        gate: Tensor,
        link: Link,
        shortcut: Tensor | None,
        *origin: Tensor,
    ) -> Tensor:
        ctx.link = link
        ctx.save_for_backward(gate, *origin)
        return x * gate if shortcut is None else torch.addcmul(shortcut, x, gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, *origin = ctx.saved_tensors
        ctx.link.gate = gate
        grad_gate = None
        if ctx.needs_input_grad[2]:
            grad_gate = _sum(grad, origin, ctx.link).view_as(gate).to(gate.dtype)
        return grad, None, grad_gate, None, grad if ctx.needs_input_grad[4] else None, *(None for _ in origin)


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
