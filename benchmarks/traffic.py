"""What SE costs in memory traffic and in memory, counted and not timed.

    python -m benchmarks.traffic

For each network: the plain one, timm's with SE, and the plain one with se-inject's blocks. Counted are

- the bytes of an evaluation, and of one after `se_inject.optimize`, which folds the batch norms of all three and fuses
  our blocks: inputs and outputs of every operator that is not a view, as a TorchDispatchMode sees them;
- those of a training step (forward and backward);
- the bytes that are saved for the backward pass: storages that are no parameters or buffers, as saved-tensor hooks see
  them.

The operators are those that run on the CPU. Writes benchmarks/results/traffic.json and traffic.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from torch import nn

import se_inject
from benchmarks.setting import describe_setting
from se_inject.traffic import ByteCounter, Traffic, measure_traffic

_FOLDER = Path(__file__).parent / "results"
PAIRS = {
    "resnet18": "seresnet18",
    "resnet34": "seresnet34",
    "resnet50": "seresnet50",
    "resnet101": "seresnet101",
    "resnet152": "seresnet152",
    "resnext50_32x4d": "seresnext50_32x4d",
}
"""Plain networks and their counterparts in timm."""
_SIZE = 224


@dataclass(frozen=True)
class Row(Traffic):
    """What was counted of a network, in bytes; `optimized` is an evaluation after `se_inject.optimize`."""

    optimized: int


COLUMNS = {
    "evaluation": "bytes, evaluation",
    "optimized": "bytes, evaluation, optimized",
    "training": "bytes, training step",
    "saved": "bytes saved for backward",
    "peak": "peak of a training step",
}


def measure_pair(name: str, batch_size: int) -> dict[str, Row]:
    """Count the bytes of a plain network, of timm's counterpart, and of the injected one."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "plain": lambda: timm.create_model(name),
        "timm": lambda: timm.create_model(PAIRS[name]),
        "se-inject": lambda: se_inject.inject(timm.create_model(name)),
    }
    images = torch.randn(batch_size, 3, _SIZE, _SIZE)
    found = {}
    for kind, make in makers.items():
        model = make()
        optimized = se_inject.optimize(model)
        with torch.no_grad(), ByteCounter() as counter:
            optimized(images)
        found[kind] = Row(**asdict(measure_traffic(model, images)), optimized=counter.count)
    return found


def write_table(found: Mapping[str, Mapping[str, Row]], setting: Mapping[str, str], batch_size: int) -> str:
    """Write the ratios to the plain network as a table."""
    lines = [
        "# Memory traffic of SE, counted", "",
        f"`python -m benchmarks.traffic --networks {' '.join(found)} --batch-size {batch_size}`", "",
        "; ".join(f"{key} {value}" for key, value in setting.items()) + ".", "",
        f"Batches of {batch_size} images of {_SIZE} pixels, fp32, contiguous. The plain network is 1 (optimized: with",
        "its batch norms folded).", "",
        f"| network | SE | {' | '.join(COLUMNS.values())} |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]  # fmt: skip
    for name, kinds in found.items():
        plain = kinds["plain"]
        for kind in ("timm", "se-inject"):
            ratios = [getattr(kinds[kind], field) / getattr(plain, field) for field in COLUMNS]
            network = f"{name} ({PAIRS[name]})" if kind == "timm" else name
            lines.append(f"| {network} | {kind} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, default=_FOLDER / "traffic.json")
    options = parser.parse_args()
    found = {name: measure_pair(name, options.batch_size) for name in options.networks}
    setting = describe_setting()
    values = {name: {kind: asdict(row) for kind, row in kinds.items()} for name, kinds in found.items()}
    options.out.write_text(json.dumps({"setting": setting, "bytes": values}, indent=1) + "\n")
    table = write_table(found, setting, options.batch_size)
    options.out.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
