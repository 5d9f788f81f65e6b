"""Kernels: what a block does to a map in evaluation, each step as one operator that torch knows as a whole.

`se_inject::squeeze`, `excite`, `scale` and `convolve` run as Triton kernels on a GPU, where triton is installed and the
tensors are dense maps of fp32, bf16 or fp16; everywhere else they run as plain operators of torch, with the same
results up to rounding. The choice is made at each call. They have no gradients, torch.compile sees them from the
outside alone, and ONNX has none of them. A program exported with them needs `import se_inject.kernels` where it is
loaded. The kernels add up in fp32, and fp32 is not rounded to TF32, as torch's convolutions on a GPU do.

The Triton kernels are tested in Triton's interpreter and compiled for GPUs, and were never timed on one: nothing uses
them by default.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from se_inject.lean import is_transformed

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HIDDEN = 256
"""More outputs of the first layer than these do not fit into a multiprocessor at once."""


def can_run(x: Tensor, shortcut: Tensor | None, parameters: Sequence[Tensor], *, channels: int) -> bool:
    """Tell whether the operators may stand for plain ones, which promote types, broadcast and can be differentiated.

    Args:
        x: The map that a block is handed.
        shortcut: What is added to a map of H and W of `x`, if anything.
        parameters: All that are used.
        channels: C of the map that it is added to.
    """
    tensors = [x, *([] if shortcut is None else [shortcut]), *parameters]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return False  # torch.fx's proxies
    is_alike = x.ndim == 4 and all(tensor.dtype == x.dtype and tensor.device == x.device for tensor in tensors)
    if not is_alike or (shortcut is not None and shortcut.shape != (x.shape[0], channels, *x.shape[2:])):
        return False
    is_differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return not (is_differentiated or is_transformed() or is_traced or torch.is_autocast_enabled(x.device.type))


@torch.library.custom_op("se_inject::squeeze", mutates_args=())
def squeeze(x: Tensor) -> Tensor:
    """Take the mean of a map (N, C, H, W) over H and W, (N, C)."""
    z = _make_squeezed(x)
    triton_kernels = _find_kernels(x)
    if triton_kernels is None:
        return torch.mean(x, (2, 3), out=z)
    triton_kernels.squeeze(x, z)
    return z


@torch.library.custom_op("se_inject::excite", mutates_args=())
def excite(
    z: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None, *, kind: str, gain: float
) -> Tensor:
    """Compute the gate (N, C) from the squeezed map.

    Args:
        z: (N, C_in).
        weight1: (hidden, C_in).
        bias1: (hidden,).
        weight2: (C, hidden).
        bias2: (C,), if any.
        kind: The activation, as in `SqueezeExcite`: "sigmoid", "hard_sigmoid" or "tanh".
        gain: By which a sigmoid is multiplied.
    """
    gate = _make_gate(z, weight1, bias1, weight2, bias2)
    triton_kernels = _find_kernels(z, weight1, bias1, weight2, bias2)
    if triton_kernels is not None and len(weight1) <= _MAX_HIDDEN:
        triton_kernels.excite(z, weight1, bias1, weight2, bias2, kind=kind, gain=gain, gate=gate)
        return gate
    excited = F.linear(F.relu(F.linear(z, weight1, bias1)), weight2, bias2)
    if kind == "tanh":
        return torch.add(torch.tanh(excited), 1, out=gate)
    return torch.mul(torch.sigmoid(excited) if kind == "sigmoid" else F.hardsigmoid(excited), gain, out=gate)


@torch.library.custom_op("se_inject::scale", mutates_args=())
def scale(y: Tensor, gate: Tensor, shortcut: Tensor | None, *, relu: bool) -> Tensor:
    """Compute `relu?(shortcut + gate * y)`, which lies as y does.

    Args:
        y: (N, C, H, W).
        gate: (N, C).
        shortcut: (N, C, H, W), if any.
        relu: Whether a ReLU follows.
    """
    out = _make_scaled(y, gate, shortcut)
    triton_kernels = _find_kernels(y, gate, shortcut)
    if triton_kernels is None:
        return _scale_plainly(y, gate, shortcut, relu=relu, out=out)
    triton_kernels.scale(y, gate, shortcut, relu=relu, out=out)
    return out


@torch.library.custom_op("se_inject::convolve", mutates_args=())
def convolve(
    h: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shortcut: Tensor | None, *, relu: bool
) -> Tensor:
    """Compute `relu?(shortcut + gate * (W h + b))`, (N, C, H, W), contiguous or with the channels last as h is.

    Args:
        h: (N, C_in, H, W).
        weight: W (C, C_in) of a 1x1 convolution of one group.
        bias: b (C,), if any.
        gate: (N, C).
        shortcut: (N, C, H, W), if any.
        relu: Whether a ReLU follows.
    """
    out = _make_convolved(h, weight, bias, gate, shortcut)
    triton_kernels = _find_kernels(h, weight, bias, gate, shortcut)
    if triton_kernels is None:
        y = F.conv2d(h, weight[:, :, None, None], bias)
        return _scale_plainly(y, gate, shortcut, relu=relu, out=out)
    triton_kernels.convolve(h, weight, bias, gate, shortcut, relu=relu, out=out)
    return out


def _make_squeezed(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2])


def _make_gate(z: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None, **_: Any) -> Tensor:
    (num, inner), (channels, hidden) = z.shape, weight2.shape
    _check_shape("weight1", weight1, (hidden, inner))
    _check_shape("bias1", bias1, (hidden,))
    _check_shape("bias2", bias2, (channels,))
    return z.new_empty(num, channels)


def _make_scaled(y: Tensor, gate: Tensor, shortcut: Tensor | None, **_: Any) -> Tensor:
    _check_shape("gate", gate, y.shape[:2])
    _check_shape("shortcut", shortcut, y.shape)
    return torch.empty_like(y)


def _make_convolved(
    h: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, shortcut: Tensor | None, **_: Any
) -> Tensor:
    (num, inner, height, width), channels = h.shape, weight.shape[0]
    _check_shape("weight", weight, (channels, inner))
    _check_shape("bias", bias, (channels,))
    _check_shape("gate", gate, (num, channels))
    _check_shape("shortcut", shortcut, (num, channels, height, width))
    is_last = h.is_contiguous(memory_format=torch.channels_last) and not h.is_contiguous()
    memory_format = torch.channels_last if is_last else torch.contiguous_format
    return torch.empty((num, channels, height, width), dtype=h.dtype, device=h.device, memory_format=memory_format)


squeeze.register_fake(_make_squeezed)
excite.register_fake(_make_gate)
scale.register_fake(_make_scaled)
convolve.register_fake(_make_convolved)


def _scale_plainly(y: Tensor, gate: Tensor, shortcut: Tensor | None, *, relu: bool, out: Tensor) -> Tensor:
    gate = gate[:, :, None, None]
    scaled = torch.mul(y, gate, out=out) if shortcut is None else torch.addcmul(shortcut, y, gate, out=out)
    return torch.relu_(scaled) if relu else scaled


def _find_kernels(first: Tensor, *others: Tensor | None) -> ModuleType | None:
    """Return the Triton kernels where they can take these tensors, of which the first is a map or made from one."""
    tensors = [first, *(x for x in others if x is not None)]
    is_alike = {x.dtype for x in tensors} == {first.dtype} and {x.device for x in tensors} == {first.device}
    if not is_alike or first.dtype not in _TYPES or not first.numel() or not all(map(_is_dense, tensors)):
        return None
    triton_kernels = _load_kernels()
    if triton_kernels is None or not (first.is_cuda or triton_kernels.IS_INTERPRETED):
        return None
    return triton_kernels


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


@functools.cache
def _load_kernels() -> ModuleType | None:
    try:
        return importlib.import_module("se_inject.triton_kernels")
    except ImportError:  # there is no triton for macOS
        return None


def _check_shape(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError on a tensor of another shape: a kernel would read what does not belong to it."""
    if x is not None and x.shape != shape:
        raise ValueError(f"{name}: found a tensor of shape {tuple(x.shape)}; expected {tuple(shape)}")
