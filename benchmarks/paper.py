"""Whether the blocks have the parameters and operations that the paper states.

    python -m benchmarks.paper

Hu, Shen, Albanie, Sun, Wu, Squeeze-and-Excitation Networks, arXiv 1709.01507: section 4 (parameters and FLOPs), tables
10 (reduction ratios), 14, 15 (conv3x3) and 16 (stages). The paper's ResNet-50 has the stride in the 1x1 convolution;
that is torchvision's with the strides moved. Counted are the tensors of injected networks (`divisor=1`, the paper's
C/r), and the multiply-accumulates of one image of 224 x 224, which the paper calls FLOPs. Writes
benchmarks/results/paper.json and paper.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

import se_inject
from benchmarks.setting import describe_setting
from se_inject.placements import Placement

_FOLDER = Path(__file__).parent / "results"
ROUNDINGS: dict[str, Callable[[float], float]] = {"nearest": round, "up": math.ceil}


@dataclass(frozen=True)
class Figure:
    """A figure of the paper, and which ways of counting give it.

    Attributes:
        name: What is counted.
        published: The figure, in millions of parameters.
        digits: How many decimals the paper gives.
        with_biases: What se-inject's network has with biases.
        without_biases: And without.
        reproduced_by: The biases and roundings that give the published figure.
    """

    name: str
    published: float
    digits: int
    with_biases: int
    without_biases: int
    reproduced_by: tuple[str, ...]


@dataclass(frozen=True)
class OperationCount:
    """The operations of a ResNet-50 without and with blocks, counted in one way, in multiply-accumulates an image."""

    name: str
    plain: int
    injected: int
    published: tuple[str, str] = ("3.86", "3.87")

    @property
    def rounded(self) -> tuple[str, str]:
        """Both in GFLOPs as the paper gives them, to two decimals."""
        return f"{self.plain / 1e9:.2f}", f"{self.injected / 1e9:.2f}"

    @property
    def growth(self) -> float:
        """Exact growth in per cent."""
        return (self.injected / self.plain - 1) * 100


def build_resnet50() -> nn.Module:
    """Build the paper's ResNet-50: the stride is in the 1x1 convolution that comes first, not in the 3x3 one."""
    model: nn.Module = torchvision.models.resnet50()
    for block in model.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    return model


def count_parameters(model: nn.Module) -> int:
    """Count the parameters of a network."""
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def count_injected(
    network: str, *, r: float = 16, stages: tuple[int, ...] = (), placement: Placement = "standard"
) -> tuple[int, int]:
    """Count the parameters of a network of torchvision with blocks of exactly C/r hidden channels.

    Returns:
        The count, and the count without the blocks' biases.
    """
    with torch.device("meta"):  # sizes are all that counts
        model = torchvision.models.get_model(network)
    injected = se_inject.inject(model, r=r, divisor=1, stages=stages, placement=placement, inplace=True)
    blocks = se_inject.blocks(injected).values()
    biases = sum(p.numel() for block in blocks for name, p in block.named_parameters() if name.endswith("bias"))
    return count_parameters(injected), count_parameters(injected) - biases


def compute_figures() -> list[Figure]:
    """Compute every parameter figure of the paper that an injection gives."""
    found = [
        _compare("SE-ResNet-50, r=16", 28.09, 2, count_injected("resnet50")),
        _compare("SE-ResNet-101, r=16", 49.33, 2, count_injected("resnet101")),
    ]
    for r, published in ((2, 45.7), (4, 35.7), (8, 30.7), (16, 28.1), (32, 26.9)):
        found.append(_compare(f"SE-ResNet-50, r={r}", published, 1, count_injected("resnet50", r=r)))
    for stage, published in ((2, 25.6), (3, 25.7), (4, 26.4)):
        counts = count_injected("resnet50", stages=(stage,))
        found.append(_compare(f"SE in stage {stage} alone", published, 1, counts))
    found.append(_compare("SE on the 3x3 convolutions", 25.8, 1, count_injected("resnet50", placement="conv3x3")))
    return found


def _compare(name: str, published: float, digits: int, counted: tuple[int, int]) -> Figure:
    counts = dict(zip(("with biases", "without biases"), counted, strict=True))
    unit = 10**digits
    ways = [
        f"{biases}, rounded {'up' if rounding == 'up' else 'to nearest'}"
        for biases, number in counts.items()
        for rounding, apply in ROUNDINGS.items()
        if apply(number / 1e6 * unit) == round(published * unit)
    ]
    return Figure(name, published, digits, *counted, tuple(ways))


def count_operations() -> list[OperationCount]:
    """Count a ResNet-50 with and without blocks in the ways that a paper may mean."""
    plain, injected = _count_layers(build_resnet50()), _count_layers(se_inject.inject(build_resnet50(), divisor=1))
    base = plain["layers"]
    layers = injected["layers"]
    ways = (
        ("convolutions and fully connected layers", 0),
        ("the same, and the squeeze: one addition a position", 1),
        ("the same, and the scaling: one product a position", 2),
    )
    return [OperationCount(name, base, layers + num * injected["squeezed"]) for name, num in ways]


def _count_layers(model: nn.Module) -> dict[str, int]:
    counts = {"layers": 0, "squeezed": 0}

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            counts["layers"] += output.numel() * module.weight[0].numel()
        elif isinstance(module, se_inject.SqueezeExcite):
            counts["squeezed"] += args[0].numel()

    for module in model.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 224, 224))
    return counts


def write_table(figures: Iterable[Figure], operations: Iterable[OperationCount], setting: dict[str, str]) -> str:
    """Write the comparison as Markdown."""
    lines = [
        "# The paper's figures, and se-inject's",
        "",
        "Hu et al., arXiv 1709.01507. `python -m benchmarks.paper`; "
        + ", ".join(f"{key} {value}" for key, value in setting.items())
        + ". Nothing is random here: counts of tensors and operations. `divisor=1`.",
        "",
        "| parameters | paper (M) | with biases | without biases | reproduced |",
        "|---|---|---|---|---|",
    ]
    for item in figures:
        ways = "; ".join(item.reproduced_by) or "no"
        counts = f"{item.with_biases:,} | {item.without_biases:,}"
        lines.append(f"| {item.name} | {item.published:.{item.digits}f} | {counts} | {ways} |")
    lines += [
        "",
        "| FLOPs, ResNet-50 to SE-ResNet-50 | paper (G) | counted (G) | growth, exact | of the rounded figures |",
        "|---|---|---|---|---|",
    ]
    for count in operations:
        plain, injected = count.rounded
        growth = (float(injected) / float(plain) - 1) * 100
        lines.append(
            f"| {count.name} | {' -> '.join(count.published)} | "
            f"{count.plain / 1e9:.4f} -> {count.injected / 1e9:.4f} | {count.growth:+.3f} % | {growth:+.2f} % |"
        )
    lines += [
        "",
        "Biases and rounding up give every figure. The paper's +0.26 % is the quotient of its rounded figures,",
        "3.87 / 3.86: the squeeze has to be counted for them, the scaling may be or not. The ResNet-50 is the paper's,",
        "with the stride in the 1x1 convolution.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=_FOLDER / "paper.json")
    options = parser.parse_args()
    figures, operations, setting = compute_figures(), count_operations(), describe_setting()
    table = write_table(figures, operations, setting)
    result = {
        "command": "python -m benchmarks.paper",
        "setting": setting,
        "parameters": [asdict(item) for item in figures],
        "operations": [{**asdict(item), "growth_percent": item.growth} for item in operations],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
