"""Lean scaling: what a block does to a map in training, in few passes over the map.

Takes a map and its gate, gives their product, with gradients for both. Plain autograd goes over a map fourteen times to
squeeze, scale and come back: it multiplies out `grad * x` to add it up, spreads the mean's gradient over a map of its
own, and adds two maps. Here the products are added up as they are made, and one pass makes the map's gradient.
Nor is the map kept where a batch norm made it, which keeps its own input: what a plain network keeps is enough.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from se_inject.lean_layer import Layer, Narrow, is_closed, scale_layer, squeeze_layer
from se_inject.origins import Convolution, Norm, find_convolution, find_norm, normalise

_MIN_POSITIONS = 100
"""Below as many positions a map, a call an image costs more than the passes that it saves."""
_BACKWARD = torch.ops.aten.native_batch_norm_backward
_IS_PLAIN: ContextVar[bool] = ContextVar("is_plain", default=False)


@dataclass
class Link:
    """One map's way through a block, and what its two ends tell each other in the backward pass.

    Attributes:
        dims: The map's spatial dimensions.
        is_training: Whether the block is in training mode, where no gradient of the map itself need be had.
        norm: What made the map, if it is kept in the form of that norm's input.
        origin: The map, or what it was made from.
        layer: That of `lean_layer`, if the gradients are had in closed form.
        gate: By which the map's gradient is still to be multiplied.
    """

    dims: tuple[int, ...]
    is_training: bool
    norm: Norm | None = None
    origin: tuple[Tensor, ...] = ()
    layer: Layer | None = None
    gate: Tensor | None = None


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Let blocks that run in here be differentiated as torch's operators are, one by one.

    In training, a block takes the gradients of the 1x1 convolution and the batch norm before it together with its own,
    where that needs less memory. They are the same numbers, but the maps in between get none: `torch.autograd.grad`
    finds those unused, and hooks that are set later, or on autograd's nodes, do not run. (Maps that have a hook or
    `retain_grad` when the block runs get theirs in any case, as do all maps in evaluation mode.) It is also the way
    where something writes into these maps through `.data`, which neither autograd nor a block sees.

    Example:
        >>> with plain_autograd():
        ...     y = model(images)
    """
    token = _IS_PLAIN.set(True)
    try:
        yield
    finally:
        _IS_PLAIN.reset(token)


def is_lean(x: Tensor) -> bool:
    """Tell whether a map can go through `squeeze_map` and `scale_map`: eager autograd, which sees them as they are."""
    return (
        isinstance(x, Tensor)
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not _IS_PLAIN.get()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not is_transformed()
    )


def is_transformed() -> bool:
    """Tell whether torch.func or forward-mode differentiation is at work, which want operators that they know."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def squeeze_map(x: Tensor, link: Link) -> tuple[Tensor, Tensor]:
    """Squeeze a map.

    Args:
        x: (N, C, ...), or with the channels last.
        link: A new one, for `scale_map`.

    Returns:
        The mean (N, C), and the map again, as it is to be scaled; it must have no other use.
    """
    link.norm, link.origin = find_norm(x)
    convolution = None if link.norm is None else find_convolution(x)
    if link.norm is None or convolution is None or not _is_narrow(x, convolution):
        return _Squeeze.apply(x, link, None)  # type: ignore[no-any-return]  # torch's
    source, mean, inverse, weight, bias = link.origin
    with torch.no_grad():
        inner_mean = convolution.inner.mean(tuple(range(2, x.ndim)), dtype=mean.dtype)
        squeezed = _pass_on(inner_mean, convolution, link.origin).to(x.dtype)
    if not (link.is_training and is_closed(x, source, convolution)):
        return _Squeeze.apply(x, link, squeezed)  # type: ignore[no-any-return]  # torch's
    # In evaluation mode the mean is the norm's buffer, which may be written over before the backward pass.
    link.layer = Layer(link.norm, mean if link.norm.training else mean.clone(), inverse)
    link.origin = narrow = Narrow(convolution.inner, convolution.weight, weight, bias)
    return squeeze_layer(x, squeezed, inner_mean, narrow, link.layer)


def _is_narrow(x: Tensor, convolution: Convolution) -> bool:
    """Tell whether to squeeze a map through the convolution and the norm that made it reads less."""
    return convolution.weight.numel() + convolution.inner.numel() < x.numel()


def _pass_on(inner_mean: Tensor, convolution: Convolution, origin: tuple[Tensor, ...]) -> Tensor:
    """Give the mean (N, C) of a map from that of its convolution's input: both layers act on each position alike."""
    _, mean, inverse, scale, shift = origin
    groups, weight = convolution.groups, convolution.weight.to(mean.dtype)
    z = inner_mean.view(len(inner_mean), groups, -1)
    with _all_bits(z.device.type):  # the mean is taken off below
        z = torch.einsum("ngi,goi->ngo", z, weight.view(groups, -1, z.shape[-1])).flatten(1)
    z = z - mean if convolution.bias is None else z + (convolution.bias - mean)
    return torch.addcmul(shift, z, inverse * scale)


def _all_bits(device: str) -> contextlib.AbstractContextManager[Any]:
    """Compute without autocast, which the meta device does not have."""
    return (
        torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()
    )


def scale_map(squeezed: Tensor, x: Tensor, gate: Tensor, link: Link, shortcut: Tensor | None = None) -> Tensor:
    """Scale a map, and add another one to it.

    Args:
        squeezed: The map as `squeeze_map` gave it.
        x: The map as `squeeze_map` was given it.
        gate: With the map's number of dimensions, and of its type.
        link: That of `squeeze_map`.
        shortcut: What is added, if anything.
    """
    is_alike = shortcut is not None and are_alike(x, shortcut)
    added = shortcut if is_alike else None
    origin, link.origin = link.origin, ()  # from here on it is autograd that keeps it
    if link.layer is not None:
        scaled = scale_layer(squeezed, gate, added, Narrow(*origin), link.layer)
    else:
        scaled = _Scale.apply(squeezed, x, gate, link, added, *origin)
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
    y = x if link.norm is None else normalise(link.norm, x, (norm[0], norm[1]), (norm[2], norm[3]))
    return (grad * y).sum(link.dims)


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
    if a.device.type != "cpu" or a.dtype != b.dtype or not a.numel():  # torch divides by the number of images
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
