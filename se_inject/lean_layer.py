"""The gradients of a 1x1 convolution, its batch norm and a block's gate at once, in closed form.

The map y = norm(W u) that a block scales is the widest of a bottleneck. Plain autograd keeps what the norm was given,
and goes over maps of that width eleven times on the way back. But what is wanted are sums over positions and images,
and as y is linear in the narrow map u, these can be had from u. With g the gradient of the block's output, q its gate,
and G_n = g_n u_n^T what the weight's gradient would be of image n alone,

    sum(g y)  = norm(W G_n)                                           the gate's gradient
    grad W    = sum_n (s q_n) G_n + d_n sum(u_n)^T + b W u_n u_n^T
    grad u_n  = (s q_n W)^T g_n + W^T d_n + W^T b W u_n

with s = weight / deviation. What the squeeze and the norm's two means give back is d (N, C) and b (C), which follow
from the same sums (Ioffe and Szegedy, arXiv 1502.03167, section 3, with W u for x). So the wide map is neither kept nor
read again, and no gradient of its size is made. The squeeze goes that way too: mean(norm(W u)) = norm(W mean(u)).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from se_inject.origins import Convolution, Norm, normalise

_BACKWARD = torch.ops.aten.convolution_backward
_NARROW = 4
"""How much narrower u has to be: two products with K x K matrices come on top of a convolution's with C x K."""


class Sums(NamedTuple):
    """What a gradient g (N, C, ...) of a block's output adds up to.

    Attributes:
        back: (s q W)^T g (N, K, ...), or None if u needs no gradient.
        outer: g u^T of each image (N, C, K).
        inner: g W u over the positions of each image (N, C).
        total: g over the positions of each image (N, C).
    """

    back: Tensor | None
    outer: Tensor
    inner: Tensor
    total: Tensor


@dataclass
class Layer:
    """The layers that made a map, and what the two ends of its way through a block tell each other on the way back.

    Attributes:
        norm: The batch norm.
        mean: (C,), by which it normalised.
        inverse: (C,), the inverse deviation by which it did.
        gate: By which the gradient is still to be multiplied.
        sums: Of that gradient.
    """

    norm: Norm
    mean: Tensor
    inverse: Tensor
    gate: Tensor | None = field(default=None, init=False)
    sums: Sums | None = field(default=None, init=False)


class Narrow(NamedTuple):
    """What a map was made from: u (N, K, ...), W (C, K, 1, ...), and the batch norm's two parameters (C,)."""

    inner: Tensor
    kernel: Tensor
    weight: Tensor
    bias: Tensor


def is_closed(x: Tensor, source: Tensor, convolution: Convolution) -> bool:
    """Tell whether the closed form is to be used: where it is exact, no slower, and missed by nobody.

    Args:
        x: The map (N, C, ...).
        source: What its batch norm was given.
        convolution: The one that gave it.
    """
    inner, kernel = convolution.inner, convolution.weight
    return (
        x.device.type == "cpu"  # it was not timed on a GPU
        and x.numel() > 0
        and x.dtype in (torch.float32, torch.float64)
        and x.dtype == source.dtype == inner.dtype == kernel.dtype
        and convolution.bias is None
        and convolution.groups == 1
        and _NARROW * inner.shape[1] <= x.shape[1]
        and 2 * inner.shape[1] <= x.shape[2:].numel()  # else G is larger than what it saves
        and not any(tensor._backward_hooks or tensor.retains_grad for tensor in (x, source))
    )


def squeeze_layer(
    x: Tensor, squeezed: Tensor, inner_mean: Tensor, narrow: Narrow, layer: Layer
) -> tuple[Tensor, Tensor]:
    """Squeeze a map whose gradient goes past it, to what it was made from.

    Args:
        x: The map (N, C, ...).
        squeezed: Its mean (N, C).
        inner_mean: The mean of u (N, K).
        narrow: What it was made from.
        layer: A new one, for `scale_layer`.

    Returns:
        The mean, and the map again, as it is to be scaled; it must have no other use.
    """
    return _Squeeze.apply(*narrow, x.detach(), squeezed, inner_mean, layer)  # type: ignore[no-any-return]  # torch's


def scale_layer(squeezed: Tensor, gate: Tensor, shortcut: Tensor | None, narrow: Narrow, layer: Layer) -> Tensor:
    """Scale a map, and add another one to it.

    Args:
        squeezed: The map as `squeeze_layer` gave it.
        gate: With the map's number of dimensions, and of its type.
        shortcut: What is added, if anything, of the map's layout and type.
        narrow: What the map was made from.
        layer: That of `squeeze_layer`.
    """
    return _Scale.apply(squeezed, gate, shortcut, layer, *narrow)  # type: ignore[no-any-return]  # torch's


class _Squeeze(Function):
    """Gives z and the map. Its gradients are those of what the map was made from."""

    @staticmethod
    def forward(  # noqa: PLR0917  an autograd function takes no keywords
        ctx: Any,
        inner: Tensor,
        kernel: Tensor,
        weight: Tensor,
        bias: Tensor,
        x: Tensor,
        squeezed: Tensor,
        inner_mean: Tensor,
        layer: Layer,
    ) -> tuple[Tensor, Tensor]:
        ctx.layer, ctx.shape = layer, x.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inner, kernel, weight, bias, inner_mean)
        return squeezed, x

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        inner_mean, narrow = ctx.saved_tensors[-1], Narrow(*ctx.saved_tensors[:-1])
        layer = ctx.layer
        gate, sums, layer.gate, layer.sums = layer.gate, layer.sums, None, None
        if grad is None:  # the scaled map is not used; what there is, is left from a pass that did not come this far
            grad, gate, sums = narrow.inner.new_zeros(ctx.shape), None, None
        gate = grad.new_ones(ctx.shape[:2]) if gate is None else gate.view(ctx.shape[:2])
        share = torch.zeros_like(gate) if grad_z is None else grad_z / ctx.shape[2:].numel()
        if torch.is_grad_enabled():  # what is computed here is differentiated again
            found = _differentiate(layer, narrow, _spread(gate, grad) * grad + _spread(share, grad))
        else:
            sums = _add_up(layer, narrow, grad, gate) if sums is None else sums
            found = _solve(layer, narrow, sums, inner_mean=inner_mean, gate=gate, share=share)
        needed = (x if is_needed else None for x, is_needed in zip(found, ctx.needs_input_grad, strict=False))
        return *needed, None, None, None, None


class _Scale(Function):
    """Gives x * gate, or shortcut + x * gate; what it hands to `_Squeeze` is not multiplied by the gate yet."""

    @staticmethod
    def forward(
        ctx: Any, squeezed: Tensor, gate: Tensor, shortcut: Tensor | None, layer: Layer, *narrow: Tensor
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(gate, *narrow)  # a second derivative goes through these
        return squeezed * gate if shortcut is None else torch.addcmul(shortcut, squeezed, gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, narrow = ctx.saved_tensors[0], Narrow(*ctx.saved_tensors[1:])
        layer = ctx.layer
        layer.gate = gate
        if torch.is_grad_enabled():
            grad_gate = (_flatten(grad) * _repeat(layer, narrow)).sum(2)
        else:
            layer.sums = sums = _add_up(layer, narrow, grad, gate.view(grad.shape[:2]))
            scale = narrow.weight * layer.inverse
            grad_gate = scale * sums.inner + (narrow.bias - scale * layer.mean) * sums.total
        return grad, grad_gate.view_as(gate), grad if ctx.needs_input_grad[2] else None, None, *(None for _ in narrow)


def _add_up(layer: Layer, narrow: Narrow, grad: Tensor, gate: Tensor) -> Sums:
    """Add up a gradient in one pass.

    It goes back through a convolution with weights of each image's own, by its gate (N, C). The images are its groups;
    where the channels come last these would lie scattered, and each image has a convolution of its own.
    """
    inner, kernel = narrow.inner, narrow.kernel
    kernels = kernel * _spread(narrow.weight * layer.inverse * gate, kernel.unsqueeze(0))
    if inner.is_contiguous():
        maps = [(_join(grad.contiguous()), _join(inner), _join(kernels)[0])]
    else:
        maps = [(grad[i : i + 1], inner[i : i + 1], kernels[i]) for i in range(len(inner))]
    needed = [inner.requires_grad, True, True]
    found = (_convolve_back(*each, needed, groups=len(inner) // len(maps)) for each in maps)
    backs, outers, totals = zip(*found, strict=True)
    outer, total = torch.cat(outers).view(*grad.shape[:2], -1), torch.cat(totals).view(grad.shape[:2])
    products = (outer * kernel.flatten(1)).sum(2)
    if not inner.requires_grad:
        return Sums(None, outer, products, total)
    return Sums(backs[0].view_as(inner) if len(maps) == 1 else torch.cat(backs), outer, products, total)


def _convolve_back(
    grad: Tensor, inner: Tensor, kernel: Tensor, needed: list[bool], *, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Give those of the gradients of a 1x1 convolution's input, weight and bias that are needed."""
    ones, zeros = [1] * (inner.ndim - 2), [0] * (inner.ndim - 2)
    return _BACKWARD(grad, inner, kernel, [len(kernel)], ones, zeros, ones, False, zeros, groups, needed)  # type: ignore[no-any-return]  # torch's


def _solve(
    layer: Layer, narrow: Narrow, sums: Sums, *, inner_mean: Tensor, gate: Tensor, share: Tensor
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Solve for the gradients of u, W, and the norm's weight and bias; `share` (N, C) is what a position has of z's."""
    inner, kernel, weight, _ = narrow
    matrix, num = kernel.flatten(1), inner.shape[2:].numel()
    scale = weight * layer.inverse
    of_bias = (gate * sums.total + num * share).sum(0)
    of_product = (gate * sums.inner + num * share * (inner_mean @ matrix.t())).sum(0)
    of_weight = layer.inverse * (of_product - layer.mean * of_bias)
    constant, back = scale * share, sums.back
    of_kernel = (sums.outer * (scale * gate).unsqueeze(2)).sum(0)
    if layer.norm.training:
        count = num * len(inner)
        slope = -scale * layer.inverse * of_weight / count
        constant = constant - scale * of_bias / count - slope * layer.mean
        square = (matrix.t() @ (slope[:, None] * matrix)).view(-1, *inner.shape[1:2], *kernel.shape[2:])
        sloped, gram, _ = _convolve_back(inner, inner, square, [back is not None, True, False])
        of_kernel += slope[:, None] * (matrix @ gram.view(len(gram), -1))
        back = None if back is None else back.add_(sloped)
    of_kernel += num * constant.t() @ inner_mean
    back = None if back is None else back.add_(_spread(constant @ matrix, back))
    return back, of_kernel.view_as(kernel), of_weight, of_bias


def _differentiate(layer: Layer, narrow: Narrow, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate y by what it was made from, so that it can be done again."""
    aliases = Narrow(*(x.view_as(x) for x in narrow))  # u may itself be made from W
    wanted = [x for x in aliases if x.requires_grad]
    found = iter(torch.autograd.grad(_repeat(layer, aliases), wanted, _flatten(grad), create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in aliases)


def _repeat(layer: Layer, narrow: Narrow) -> Tensor:
    """Make the map again, (N, C, positions)."""
    source = narrow.kernel.flatten(1) @ _flatten(narrow.inner)
    return normalise(layer.norm, source, (layer.mean, layer.inverse), (narrow.weight, narrow.bias))


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """Give (N, C) the number of dimensions of a map, or of a weight for each image."""
    return values.view(*values.shape, *[1] * (x.ndim - 2))


def _join(x: Tensor) -> Tensor:
    """View the channels of all images (N, C, ...) as those of one, (1, N C, ...)."""
    return x.reshape(1, -1, *x.shape[2:])


def _flatten(x: Tensor) -> Tensor:
    """View a map (N, C, ...) as (N, C, positions), without a copy where the channels come last, too."""
    if x.is_contiguous():
        return x.reshape(*x.shape[:2], -1)
    last = x.movedim(1, -1)
    return last.reshape(len(x), -1, x.shape[1]).transpose(1, 2)
