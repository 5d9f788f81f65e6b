"""Whether the Triton kernels of a block win over plain operators on a GPU; nobody has run it yet.

    python -m benchmarks.kernels --out benchmarks/results/kernels.json

For the blocks of a ResNet-50 at 224 pixels, bf16 with the channels last: each step of a block, and the block as a
whole, by torch's operators and by the Triton kernel. The two take turns; each turn is timed by CUDA events over as many
calls as take some milliseconds, and the median of the turns is what counts. `eager` is with what Python costs, `graph`
is a replayed CUDA graph, which is the GPU's time alone. Inputs that fit stay in the GPU's cache from call to call, as
in a network, where the layer before has just written them. Errors are the largest one to fp64 as a part of the largest
value, over the first images.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.setting import describe_setting
from se_inject import SqueezeExcite, kernels
from se_inject.fused import FusedSqueezeExcite

_STAGES = {"layer1": (64, 56), "layer2": (128, 28), "layer3": (256, 14), "layer4": (512, 7)}
"""C_in and size of the maps that the last convolutions of a ResNet-50's bottlenecks are handed; C is 4 C_in."""
_BATCH_SIZES = (1, 32, 256)
_NUM_CHECKED = 4
_MILLISECONDS = 3.0
"""About how long one turn takes."""


@dataclass(frozen=True)
class Step:
    """A step of a block in two ways, without arguments so that it can be called again and again.

    Attributes:
        plain: By torch's operators, as `FusedSqueezeExcite` does without kernels.
        kernel: By an operator of `se_inject.kernels`.
        exact: The first images in double precision.
        num_bytes: What has to be read and written at least, of maps and weights.
    """

    plain: Callable[[], Tensor]
    kernel: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    num_bytes: int


def make_block(inner: int, *, device: str, dtype: torch.dtype) -> FusedSqueezeExcite:
    """Make a block with its 1x1 convolution of `inner` to four times as many channels, and a ReLU."""
    block = SqueezeExcite(4 * inner, 16)
    nn.init.normal_(block.fc2.weight, std=0.1)
    fused = FusedSqueezeExcite(block, convolution=nn.Conv2d(inner, 4 * inner, 1), activation="relu")
    fused = fused.to(device, dtype).to(memory_format=torch.channels_last)
    return fused.requires_grad_(requires_grad=False).eval()


def make_steps(num: int, inner: int, size: int, *, device: str, dtype: torch.dtype) -> dict[str, Step]:
    """Make the steps of a block, from drawn maps with the channels last.

    Args:
        num: N.
        inner: C_in of the convolution; C is four times that.
        size: H and W.
        device: Where the maps lie.
        dtype: Their type.
    """
    torch.manual_seed(0)
    fused = make_block(inner, device=device, dtype=dtype)
    with_kernels, exact = copy.deepcopy(fused), copy.deepcopy(fused).double()
    with_kernels.kernels = True
    first, second, convolution = fused.fc1, fused.fc2, cast("nn.Conv2d", fused.convolution)
    layers = (first.weight, cast("Tensor", first.bias), second.weight, second.bias)
    matrix, bias = convolution.weight.flatten(1), convolution.bias

    def draw(channels: int) -> Tensor:
        x = torch.randn(num, channels, size, size, device=device).to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def cut(x: Tensor) -> Tensor:
        return x[:_NUM_CHECKED].double()

    def finish(y: Tensor) -> Tensor:
        return F.relu(cut(shortcut) + y * cut(wide_gate))

    h, y, shortcut = draw(inner), draw(4 * inner), draw(4 * inner)
    z, out = h.mean((2, 3)), torch.empty_like(y)
    gate = fused.compute_gate(h)
    wide_gate = gate[:, :, None, None]
    narrow, wide, weights = (_count_bytes(x) for x in ([h], [y], [matrix]))
    return {
        "squeeze": Step(
            plain=lambda: h.mean((2, 3)),
            kernel=lambda: kernels.squeeze(h),
            exact=lambda: cut(h).mean((2, 3)),
            num_bytes=narrow,
        ),
        "excite": Step(
            plain=lambda: fused.gain * torch.sigmoid(second(F.relu(first(z)))),
            kernel=lambda: kernels.excite(z, *layers, kind="sigmoid", gain=1.0),
            exact=lambda: torch.sigmoid(exact.fc2(F.relu(exact.fc1(cut(z))))),
            num_bytes=_count_bytes(layers),
        ),
        "scale": Step(
            plain=lambda: F.relu_(torch.addcmul(shortcut, y, wide_gate, out=out)),
            kernel=lambda: kernels.scale(y, gate, shortcut, relu=True),
            exact=lambda: finish(cut(y)),
            num_bytes=3 * wide,
        ),
        "convolve": Step(
            plain=lambda: F.relu_(torch.addcmul(shortcut, convolution(h), wide_gate, out=out)),
            kernel=lambda: kernels.convolve(h, matrix, bias, gate, shortcut, relu=True),
            exact=lambda: finish(F.conv2d(cut(h), convolution.weight.double(), cast("Tensor", bias).double())),
            num_bytes=narrow + 2 * wide + weights,
        ),
        "block": Step(
            plain=lambda: cast("Tensor", fused(h, shortcut=shortcut)),
            kernel=lambda: cast("Tensor", with_kernels(h, shortcut=shortcut)),
            exact=lambda: cast("Tensor", exact(cut(h), shortcut=cut(shortcut))),
            num_bytes=2 * narrow + 2 * wide + weights + _count_bytes(layers),
        ),
    }


def _count_bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def measure_errors(step: Step) -> dict[str, float]:
    """Return how far the two ways are from double precision, as a part of the largest value."""
    exact = step.exact()

    def measure(run: Callable[[], Tensor]) -> float:
        return ((run()[: len(exact)] - exact).abs().max() / exact.abs().max()).item()

    return {"plain": measure(step.plain), "kernel": measure(step.kernel)}


def time_in_turns(runs: Sequence[Callable[[], object]], *, num_turns: int) -> list[float]:
    """Time functions on a GPU, which take turns; the median milliseconds of a call of each."""
    for run in runs:  # compiles, chooses algorithms, takes memory
        _time(run, num_calls=5)
    nums = [max(1, round(_MILLISECONDS / max(_time(run, num_calls=5), 1e-3))) for run in runs]
    turns = [[_time(run, num_calls=num) for run, num in zip(runs, nums, strict=True)] for _ in range(num_turns)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def _time(run: Callable[[], object], *, num_calls: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(num_calls):
        run()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / num_calls


def capture(run: Callable[[], object]) -> Callable[[], None]:
    """Capture a function, which has run before, as a CUDA graph; what is returned replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure_stage(name: str, num: int, *, num_turns: int) -> list[dict[str, Any]]:
    """Measure all steps of the blocks of one stage at one batch size."""
    rows = []
    with torch.no_grad():
        for step_name, step in make_steps(num, *_STAGES[name], device="cuda", dtype=torch.bfloat16).items():
            row: dict[str, Any] = {"stage": name, "batch": num, "step": step_name, "bytes": step.num_bytes}
            row["error"] = measure_errors(step)
            row["eager_ms"] = _name(time_in_turns([step.plain, step.kernel], num_turns=num_turns))
            graphs = [capture(step.plain), capture(step.kernel)]
            row["graph_ms"] = _name(time_in_turns(graphs, num_turns=num_turns))
            rows.append(row)
            print(_write_line(row), flush=True)
    torch.cuda.empty_cache()
    return rows


def _name(times: Sequence[float]) -> dict[str, float]:
    return dict(zip(("plain", "kernel"), times, strict=True))


def _write_line(row: Mapping[str, Any]) -> str:
    parts = [f"{row['stage']} {row['batch']:4d} {row['step']:8s}"]
    for kind in ("eager_ms", "graph_ms"):
        plain, kernel = row[kind]["plain"], row[kind]["kernel"]
        parts.append(f"{kind} {plain:8.4f} -> {kernel:8.4f} (x{kernel / plain:.2f})")
    speed, errors = row["bytes"] / row["graph_ms"]["kernel"] / 1e6, row["error"]
    return "  ".join([*parts, f"{speed:6.0f} GB/s", f"error {errors['plain']:.1e} -> {errors['kernel']:.1e}"])


def describe_gpu() -> dict[str, str]:
    """Describe the GPU and what drives it."""
    gpu, cuda = torch.cuda.get_device_name(), str(torch.version.cuda)
    return {"gpu": gpu, "cuda": cuda, "triton": version("triton"), "maps": "bf16, channels last"}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=list(_STAGES), default=list(_STAGES))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=list(_BATCH_SIZES))
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs a GPU: torch finds no CUDA device here")
    rows = []
    for name in options.stages:
        for num in options.batch_sizes:
            rows += measure_stage(name, num, num_turns=options.turns)
    values = {
        "command": "python -m benchmarks.kernels",
        "setting": {**describe_setting(), **describe_gpu()},
        "seed": 0,
        "turns": options.turns,
        "rows": rows,
    }
    options.out.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
