"""The Triton kernels of `se_inject.kernels`, which loads this module where triton is installed.

Each function launches one kernel over tensors on a GPU, or in Triton's interpreter, and writes what it makes into its
last tensor. Maps (N, C, H, W) are dense, contiguous or with the channels last, of fp32, bf16 or fp16; sums are fp32.
Checks nothing: `se_inject.kernels` does.

None of these was timed on a GPU yet; block sizes are those that compile without spilled registers.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run in Triton's interpreter, which Triton too decides when they are defined."""
_NUM_PROGRAMS = 264
"""Two for each of the 132 multiprocessors of an H100: with fewer, work is cut into smaller pieces."""


@triton.jit
def _add_up(
    x, out, divisor, num_images, channels, positions, step_c, step_p, span,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(channels, BLOCK_C)
    image = (tl.program_id(0) // num_blocks).to(tl.int64)
    c = tl.program_id(0) % num_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * span
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(first, tl.minimum(first + span, positions), BLOCK_P):  # whole blocks, but for the map's last one
        p = start + tl.arange(0, BLOCK_P)
        spots = x + image * channels * positions + c[:, None] * step_c + p[None, :] * step_p
        total += tl.load(spots, mask=(c < channels)[:, None] & (p < positions)[None, :], other=0).to(tl.float32)
    spots = out + (tl.program_id(1) * num_images + image) * channels + c
    tl.store(spots, (tl.sum(total, 1) / divisor).to(out.dtype.element_ty), mask=c < channels)


def squeeze(x: Tensor, z: Tensor) -> None:
    """Take the mean of a map (N, C, H, W) over H and W into z (N, C).

    Traffic: one pass over the map, read. Where N and C alone make too little work, the positions are cut into S spans,
    whose (S, N, C) fp32 sums are written, and read by a second launch.
    """
    num, channels, positions = _measure(x)
    step_c, step_p = _find_steps(x)
    block_p = min(1024, triton.next_power_of_2(positions)) if step_p == 1 else 128
    block_c = min(4096 // block_p, triton.next_power_of_2(channels))
    num_programs = num * triton.cdiv(channels, block_c)
    num_spans = max(1, min(_NUM_PROGRAMS // num_programs, triton.cdiv(positions, block_p)))
    span = triton.cdiv(triton.cdiv(positions, num_spans), block_p) * block_p
    num_spans = triton.cdiv(positions, span)
    out = z if num_spans == 1 else z.new_empty(num_spans, num, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _add_up[num_programs, num_spans](
            x, out, positions, num, channels, positions, step_c, step_p, span, BLOCK_C=block_c, BLOCK_P=block_p
        )
        if num_spans > 1:
            _add_up[triton.cdiv(num * channels, 32), 1](
                out, z, 1, 1, num * channels, num_spans, 1, num * channels, 64 * num_spans, BLOCK_C=32, BLOCK_P=64
            )


@triton.jit
def _rectify(x):
    return tl.where(x < 0, 0.0, x)  # unlike a maximum, it lets NaN through


@triton.jit
def _multiply(a, b, total, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter keeps bf16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _activate(x, gain, GATE: tl.constexpr):
    if GATE == "hard_sigmoid":
        y = x / 6 + 0.5
        gate = gain * tl.where(y < 0, 0.0, tl.where(y > 1, 1.0, y))
    elif GATE == "tanh":
        gate = 2 * tl.sigmoid(2 * x)  # 1 + tanh(x)
    else:
        gate = gain * tl.sigmoid(x)
    return gate


@triton.jit
def _excite(
    z, weight1, bias1, weight2, bias2, gate, gain, num_images, inner, hidden, channels,
    GATE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(channels, BLOCK_C)
    n = tl.program_id(0) // num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(0) % num_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    h = tl.arange(0, BLOCK_H)
    first = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left_mask = (n < num_images)[:, None] & (k < inner)[None, :]
        left = tl.load(z + n[:, None] * inner + k[None, :], mask=left_mask, other=0)
        right_mask = (k < inner)[:, None] & (h < hidden)[None, :]
        right = tl.load(weight1 + h[None, :] * inner + k[:, None], mask=right_mask, other=0)
        first = _multiply(left, right, first, UPCAST)
    first += tl.load(bias1 + h, mask=h < hidden, other=0).to(tl.float32)[None, :]
    mask = (h < hidden)[:, None] & (c < channels)[None, :]
    right = tl.load(weight2 + c[None, :] * hidden + h[:, None], mask=mask, other=0)
    second = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    second = _multiply(_rectify(first).to(right.dtype), right, second, UPCAST)
    if bias2 is not None:
        second += tl.load(bias2 + c, mask=c < channels, other=0).to(tl.float32)[None, :]
    mask = (n < num_images)[:, None] & (c < channels)[None, :]
    made = _activate(second, gain, GATE).to(gate.dtype.element_ty)
    tl.store(gate + n[:, None] * channels + c[None, :], made, mask=mask)


def excite(
    z: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    kind: str,
    gain: float,
    gate: Tensor,
) -> None:
    """Run the two layers of a block on z (N, C_in) and activate, into the gate (N, C).

    Traffic: no map at all. z and W1 are read again for each 64 channels of the gate (32 in fp32), W1 and W2 for each 16
    images; they are small enough to come from the cache but for the first time.
    """
    (num, inner), (channels, hidden) = z.shape, weight2.shape
    block_c = 32 if z.dtype == torch.float32 else 64
    with torch.cuda.device_of(z):
        _excite[(triton.cdiv(num, 16) * triton.cdiv(channels, block_c),)](
            z, weight1, bias1, weight2, bias2, gate, gain, num, inner, hidden, channels,
            GATE=kind, UPCAST=IS_INTERPRETED,
            BLOCK_N=16, BLOCK_K=32, BLOCK_H=max(16, triton.next_power_of_2(hidden)), BLOCK_C=block_c,
            num_warps=8,
        )  # fmt: skip


@triton.jit
def _scale(
    y, gate, shortcut, out, channels, positions, step_c, step_p, shortcut_c, shortcut_p,
    RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    num_blocks_c, num_blocks_p = tl.cdiv(channels, BLOCK_C), tl.cdiv(positions, BLOCK_P)
    block = tl.program_id(0) % (num_blocks_c * num_blocks_p)
    image = (tl.program_id(0) // (num_blocks_c * num_blocks_p)).to(tl.int64)
    c = block % num_blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p = block // num_blocks_c * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (c < channels)[:, None] & (p < positions)[None, :]
    image_at = image * channels * positions
    at = image_at + c[:, None] * step_c + p[None, :] * step_p
    made = tl.load(y + at, mask=mask).to(tl.float32)
    made *= tl.load(gate + image * channels + c, mask=c < channels).to(tl.float32)[:, None]
    if shortcut is not None:
        shortcut_at = image_at + c[:, None] * shortcut_c + p[None, :] * shortcut_p
        made += tl.load(shortcut + shortcut_at, mask=mask).to(tl.float32)
    if RELU:
        made = _rectify(made)
    tl.store(out + at, made.to(out.dtype.element_ty), mask=mask)


def scale(y: Tensor, gate: Tensor, shortcut: Tensor | None, *, relu: bool, out: Tensor) -> None:
    """Write `relu?(shortcut + gate * y)` into a map (N, C, H, W) that lies as y does.

    Traffic: y and the shortcut are read once, the result is written once. Without a kernel, the ReLU on its own reads
    and writes the result again.
    """
    num, channels, positions = _measure(y)
    step_c, step_p = _find_steps(y)
    shortcut_c, shortcut_p = _find_steps(y if shortcut is None else shortcut)
    block_p = min(1024, triton.next_power_of_2(positions)) if step_p == 1 else 32
    block_c = min(2048 // block_p, triton.next_power_of_2(channels))
    with torch.cuda.device_of(y):
        _scale[(num * triton.cdiv(channels, block_c) * triton.cdiv(positions, block_p),)](
            y, gate, shortcut, out, channels, positions, step_c, step_p, shortcut_c, shortcut_p,
            RELU=relu, BLOCK_C=block_c, BLOCK_P=block_p,
        )  # fmt: skip


@triton.jit
def _convolve(
    h, weight, bias, gate, shortcut, out, num_images, positions, inner, channels,
    inner_c, inner_p, step_c, step_p, shortcut_c, shortcut_p,
    LAST: tl.constexpr, RELU: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(channels, BLOCK_C)  # those of the same positions run together: h comes from the cache
    c = tl.program_id(0) % num_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    block = tl.program_id(0) // num_blocks
    if LAST:  # a position goes on where the image before it ends: a map of 7 x 7 fills no block
        row = block * BLOCK_P + tl.arange(0, BLOCK_P)
        image, p = (row // positions).to(tl.int64), row % positions
    else:
        image = (block // tl.cdiv(positions, BLOCK_P)).to(tl.int64) + tl.zeros((1,), tl.int64)
        p = block % tl.cdiv(positions, BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)
    is_inside = (image < num_images) & (p < positions)
    inner_at = h + (image * inner * positions + p * inner_p)[:, None]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(inner_at + k[None, :] * inner_c, mask=is_inside[:, None] & (k < inner)[None, :], other=0)
        mask = (k < inner)[:, None] & (c < channels)[None, :]
        right = tl.load(weight + c[None, :] * inner + k[:, None], mask=mask, other=0)
        total = _multiply(left, right, total, UPCAST)
    if bias is not None:
        total += tl.load(bias + c, mask=c < channels, other=0).to(tl.float32)[None, :]
    gate_mask = (image < num_images)[:, None] & (c < channels)[None, :]
    total *= tl.load(gate + image[:, None] * channels + c[None, :], mask=gate_mask, other=0).to(tl.float32)
    mask = is_inside[:, None] & (c < channels)[None, :]
    image_at = (image * channels * positions)[:, None]
    if shortcut is not None:
        shortcut_at = image_at + (p * shortcut_p)[:, None] + c[None, :] * shortcut_c
        total += tl.load(shortcut + shortcut_at, mask=mask, other=0).to(tl.float32)
    if RELU:
        total = _rectify(total)
    at = image_at + (p * step_p)[:, None] + c[None, :] * step_c
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def convolve(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    shortcut: Tensor | None,
    *,
    relu: bool,
    out: Tensor,
) -> None:
    """Write `relu?(shortcut + gate * (W h + b))` into a map (N, C, H, W) that lies as h (N, C_in, H, W) does.

    Traffic: h and the shortcut are read once, the result is written once; `W h + b` is never written. h is read again
    for each 64 or 128 channels of the result, right after each other, so from the cache; W (C, C_in), bias and gate
    come from there too. Without a kernel, the result is written by the convolution, read and written by the scaling,
    and read and written by the ReLU.
    """
    num, inner, positions = _measure(h)
    channels = out.shape[1]
    steps = (*_find_steps(h), *_find_steps(out), *_find_steps(out if shortcut is None else shortcut))
    is_last = steps[0] == 1
    is_large = triton.cdiv(num * positions, 128) * triton.cdiv(channels, 128) >= _NUM_PROGRAMS
    # Other maps and fp32 would need more registers than there are.
    block = 128 if is_large and is_last and h.dtype != torch.float32 else 64
    num_blocks = triton.cdiv(num * positions, block) if is_last else num * triton.cdiv(positions, block)
    with torch.cuda.device_of(h):
        _convolve[(num_blocks * triton.cdiv(channels, block),)](
            h, weight, bias, gate, shortcut, out, num, positions, inner, channels, *steps,
            LAST=is_last, RELU=relu, UPCAST=IS_INTERPRETED,
            BLOCK_P=block, BLOCK_C=block, BLOCK_K=32 if h.dtype == torch.float32 else 64,
            num_warps=8 if block == 128 else 4,
        )  # fmt: skip


def _measure(x: Tensor) -> tuple[int, int, int]:
    """Return images, channels and positions of a map."""
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _find_steps(x: Tensor) -> tuple[int, int]:
    """Return how many elements lie from one channel to the next, and from one position to the next."""
    _, channels, positions = _measure(x)
    return (positions, 1) if x.is_contiguous() else (1, channels)
