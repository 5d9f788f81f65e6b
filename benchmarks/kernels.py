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
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.setting import describe_setting
from se_inject import SqueezeExcite, kernels
from se_inject.fused import FusedSqueezeExcite

_STAGES = {"layer1": (64, 56), "layer2": (128, 28), "layer3": (256, 14), "layer4": (512, 7)}
"""C_in and size of the maps that the last convolutions of a ResNet-50's bottlenecks are handed; they make C = 4 C_in."""
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


def make_steps(num: int, inner: int, size: int, *, device: str, dtype: torch.dtype) -> dict[str, Step]:
    """Make the steps of a block with its 1x1 convolution, shortcut and ReLU, from drawn maps (N, C, H, W).

    Args:
        num: N.
        inner: C_in of the convolution; C is four times that.
        size: H and W.
        device: Where the maps lie.
        dtype: Their type.
    """
    torch.manual_seed(0)
    channels = 4 * inner
    block = SqueezeExcite(channels, 16)
    nn.init.normal_(block.fc2.weight, std=0.1)
    fused = FusedSqueezeExcite(block, convolution=nn.Conv2d(inner, channels, 1), activation="relu")
    fused = fused.to(device, dtype).to(memory_format=torch.channels_last).requires_grad_(requires_grad=False).eval()
    convolution, layers = fused.convolution, (fused.fc1.weight, fused.fc1.bias, fused.fc2.weight, fused.fc2.bias)
    assert convolution is not None
    assert fused.fc1.bias is not None

    def draw(num_channels: int) -> Tensor:
        x = torch.randn(num, num_channels, size, size, device=device).to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    h, y, shortcut = draw(inner), draw(channels), draw(channels)
    z, out = h.mean((2, 3)), torch.empty_like(y)
    gate = kernels.excite(z, *layers, kind="sigmoid", gain=1.0)
    weight, bias, wide_gate = convolution.weight, convolution.bias, gate[:, :, None, None]
    with_kernels = FusedSqueezeExcite(block, activation="relu", kernels=True)
    with_kernels.load_state_dict({k: v for k, v in fused.state_dict().items() if "conv" not in k}, assign=True)
    with_kernels.convolution, with_kernels.gain = convolution, fused.gain

    def run_block() -> Tensor:
        made = fused(h, shortcut=shortcut)
        assert isinstance(made, Tensor)
        return made

    def run_block_of_kernels() -> Tensor:
        made = with_kernels(h, shortcut=shortcut)
        assert isinstance(made, Tensor)
        return made

    def cut(*tensors: Tensor) -> list[Tensor]:
        return [x[:_NUM_CHECKED].double() for x in tensors]

    def excite_exactly(z: Tensor) -> Tensor:
        first, bias1, second, bias2 = (x.double() for x in layers if x is not None)
        return torch.sigmoid(F.linear(F.relu(F.linear(z, first, bias1)), second, bias2))

    def convolve_exactly(h: Tensor, gate: Tensor, shortcut: Tensor) -> Tensor:
        made = F.conv2d(h, weight.double(), None if bias is None else bias.double())
        return F.relu(shortcut + made * gate[:, :, None, None])

    def run_block_exactly() -> Tensor:
        narrow, added = cut(h, shortcut)
        return convolve_exactly(narrow, excite_exactly(narrow.mean((2, 3))), added)

    map_bytes, wide_bytes = (x.numel() * x.element_size() for x in (h, y))
    layer_bytes = sum(x.numel() * x.element_size() for x in layers if x is not None)
    weight_bytes = weight.numel() * weight.element_size()
    return {
        "squeeze": Step(
            lambda: h.mean((2, 3)), lambda: kernels.squeeze(h), lambda: cut(h)[0].mean((2, 3)), map_bytes
        ),
        "excite": Step(
            lambda: torch.sigmoid(fused.fc2(F.relu(fused.fc1(z)))),
            lambda: kernels.excite(z, *layers, kind="sigmoid", gain=1.0),
            lambda: excite_exactly(*cut(z)),
            layer_bytes,
        ),
        "scale": Step(
            lambda: F.relu_(torch.addcmul(shortcut, y, wide_gate, out=out)),
            lambda: kernels.scale(y, gate, shortcut, relu=True),
            lambda: F.relu(cut(shortcut)[0] + cut(y)[0] * cut(wide_gate)[0]),
            3 * wide_bytes,
        ),
        "convolve": Step(
            lambda: F.relu_(torch.addcmul(shortcut, F.conv2d(h, weight, bias), wide_gate, out=out)),
            lambda: kernels.convolve(h, weight.flatten(1), bias, gate, shortcut, relu=True),
            lambda: convolve_exactly(*cut(h, gate, shortcut)),
            map_bytes + 2 * wide_bytes + weight_bytes,
        ),
        "block": Step(
            run_block, run_block_of_kernels, run_block_exactly,
            2 * map_bytes + 2 * wide_bytes + weight_bytes + layer_bytes,
        ),
    }  # fmt: skip


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
    return start.elapsed_time(stop) / num_calls


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
    speed = row["bytes"] / row["graph_ms"]["kernel"] / 1e6
    return "  ".join(
        [*parts, f"{speed:6.0f} GB/s", f"error {row['error']['plain']:.1e} -> {row['error']['kernel']:.1e}"]
    )


def describe_gpu() -> dict[str, str]:
    """Describe the GPU and what drives it."""
    cuda = str(torch.version.cuda)
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": cuda,
        "triton": version("triton"),
        "type": "bf16, channels last",
    }


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
