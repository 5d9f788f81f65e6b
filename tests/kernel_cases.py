"""How far the operators of `se_inject.kernels` are from fp64, for maps of many shapes.

    TRITON_INTERPRET=1 python -m tests.kernel_cases

prints it as JSON for the Triton kernels, run by Triton's interpreter; it must be told before they are defined, so in a
process of its own. What is expected is computed here, in double precision, by other means.
"""

import itertools
import json
import sys
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from se_inject import SqueezeExcite, kernels
from se_inject.fused import FusedSqueezeExcite

LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of the largest value: a rounding of fp16 is 2^-11 of a value. Triton's interpreter cuts bf16 off, by up to 2^-7."""
GATES = ("sigmoid", "hard_sigmoid", "tanh")


@dataclass(frozen=True)
class Case:
    """Maps (N, C_in, H, W) and (N, C, H, W), and what they are.

    `num_programs` is for how many programs a launch is cut into small pieces; with 1, none is.
    """

    num: int
    inner: int
    channels: int
    size: tuple[int, int]
    dtype: torch.dtype = torch.float32
    is_last: bool = False
    num_programs: int = 264

    def __str__(self):
        lies = "last" if self.is_last else "contiguous"
        shape = f"{self.num}x{self.inner}-{self.channels}x{self.size[0]}x{self.size[1]}"
        return f"{shape} {str(self.dtype).removeprefix('torch.')} {lies}" + (" whole" if self.num_programs == 1 else "")


_SHAPES = ((2, 24, 40, (7, 5)), (1, 70, 130, (9, 11)), (3, 16, 64, (1, 1)), (5, 1, 3, (4, 4)))
CASES = [
    *(Case(*shape, dtype, is_last) for shape, dtype, is_last in itertools.product(_SHAPES, LIMITS, (False, True))),
    Case(1, 3, 5, (37, 41)),
    Case(1, 3, 5, (37, 41), is_last=True),
    Case(2, 66, 140, (12, 12), torch.float16, num_programs=1),
    Case(2, 66, 140, (12, 12), torch.float16, is_last=True, num_programs=1),
]


def measure(case, device):
    """Return the largest error of each operator, as a part of the largest value."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        x = torch.randn(shape, generator=generator).to(device, case.dtype)
        return x.contiguous(memory_format=torch.channels_last) if case.is_last and len(shape) == 4 else x

    num, inner, channels, hidden = case.num, case.inner, case.channels, 12
    h, y, shortcut = draw(num, inner, *case.size), draw(num, channels, *case.size), draw(num, channels, *case.size)
    other = shortcut.contiguous() if case.is_last else shortcut.contiguous(memory_format=torch.channels_last)
    weight, bias, gate = draw(channels, inner) / inner**0.5, draw(channels), draw(num, channels)
    first, second = (draw(hidden, inner), draw(hidden)), (draw(channels, hidden) / hidden**0.5, draw(channels))
    found, wide = {}, torch.double
    found["squeeze"] = (kernels.squeeze(h), h.to(wide).sum((2, 3)) / h[0, 0].numel())
    z = draw(num, inner) / inner**0.5
    hidden_values = (z.to(wide) @ first[0].to(wide).T + first[1]).clamp(min=0)
    for kind, bias2, gain in (*((kind, second[1], 1.5) for kind in GATES), ("sigmoid", None, 1.0)):
        e = hidden_values @ second[0].to(wide).T + (0 if bias2 is None else bias2)
        exact = {
            "sigmoid": gain / (1 + (-e).exp()),
            "hard_sigmoid": gain * (e + 3).clamp(0, 6) / 6,
            "tanh": 1 + e.tanh(),
        }
        name = f"excite {kind}" + ("" if bias2 is not None else " without bias")
        found[name] = (kernels.excite(z, *first, second[0], bias2, kind=kind, gain=gain), exact[kind])
    convolved = torch.einsum("oi,nihw->nohw", weight.to(wide), h.to(wide))
    memory_format = torch.channels_last if case.is_last and inner > 1 else torch.contiguous_format
    for name, relu in (("none", False), ("same", True), ("other", False)):
        added = {"none": None, "same": shortcut, "other": other}[name]
        rest = f" shortcut {name}" + (" relu" if relu else "")
        exact = [
            scale(x, gate, added, relu)
            for x in (y.to(wide), convolved + (0 if added is other else bias[:, None, None]))
        ]
        found["scale" + rest] = (kernels.scale(y, gate, added, relu=relu), exact[0])
        result = kernels.convolve(h, weight, None if added is other else bias, gate, added, relu=relu)
        found["convolve" + rest] = (result, exact[1])
        assert result.is_contiguous(memory_format=memory_format)
    assert all(result.dtype == case.dtype for result, _ in found.values())
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in found.items()}


def scale(x, gate, shortcut, relu):
    scaled = x * gate[:, :, None, None] + (0 if shortcut is None else shortcut)
    return scaled.clamp(min=0) if relu else scaled


def measure_block(device):
    """Return how far a whole block is from fp64, and whether it lets NaN through, as the plain one does."""
    torch.manual_seed(0)
    block, convolution = SqueezeExcite(32, 4), nn.Conv2d(8, 32, 1)
    nn.init.normal_(block.fc2.weight)
    fused = FusedSqueezeExcite(block, convolution=convolution, activation="relu", kernels=True).eval().to(device)
    x, shortcut = torch.randn(2, 8, 6, 6, device=device), torch.randn(2, 32, 6, 6, device=device)
    with torch.no_grad():
        found = fused(x, shortcut=shortcut)
        exact = fused.double()(x.double(), shortcut=shortcut.double())
        broken = fused.float()(x.fill_(torch.nan), shortcut=shortcut)
    return {"block": ((found - exact).abs().max() / exact.abs().max()).item(), "nan": broken.isnan().all().item()}


def main():
    from se_inject import triton_kernels

    assert triton_kernels.IS_INTERPRETED
    warnings.filterwarnings("ignore", "overflow encountered in exp", RuntimeWarning)  # the gate is 0 then, as it should
    found = {}
    for case in CASES:
        triton_kernels._NUM_PROGRAMS = case.num_programs
        found[str(case)] = measure(case, "cpu")
    sys.stdout.write(json.dumps({"cases": found, **measure_block("cpu")}))


if __name__ == "__main__":
    main()
