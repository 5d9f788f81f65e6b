"""What SE costs in memory traffic and in memory, counted and not timed.

    python -m benchmarks.traffic

For each network: the plain one, timm's with SE, and the plain one with se-inject's blocks. Counted are

- the bytes of an evaluation and of a training step (forward and backward): inputs and outputs of every operator that
  is not a view, as a TorchDispatchMode sees them;
- the bytes that are saved for the backward pass: storages that are no parameters or buffers, as saved-tensor hooks see
  them.

The operators are those that run on the CPU. Writes benchmarks/results/traffic.json and traffic.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import se_inject
from benchmarks.setting import describe_setting

_FOLDER = Path(__file__).parent / "results"
PAIRS = {
    "resnet18": "legacy_seresnet18",
    "resnet50": "seresnet50",
    "resnet101": "seresnet101",
    "resnet152": "seresnet152",
    "resnext50_32x4d": "seresnext50_32x4d",
}
"""Plain networks and their counterparts in timm."""
_BATCH_SIZE, _SIZE = 8, 224
_UNWRITTEN = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default)


@dataclass(frozen=True)
class Traffic:
    """What was counted, in bytes.

    Attributes:
        evaluation: Read and written by a forward pass in eval mode.
        training: Read and written by a forward and a backward pass in train mode.
        saved: Kept between the two.
    """

    evaluation: int
    training: int
    saved: int


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of the inputs and outputs of every operator that is not a view.

    What an operator writes into because it was told to (`out=`) is an output alone; it is not read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func not in _UNWRITTEN:
            read = {name: value for name, value in (kwargs or {}).items() if not name.startswith("out")}
            tensors = [x for x in tree_leaves((args, read, result)) if isinstance(x, Tensor)]
            self.count += sum(x.numel() * x.element_size() for x in tensors)
        return result


def measure_traffic(model: nn.Module, images: Tensor) -> Traffic:
    """Count the bytes of a network, which is left in train mode and without gradients.

    Args:
        model: On the images' device.
        images: (N, C, H, W).
    """
    model.eval()
    with torch.no_grad(), ByteCounter() as evaluation:
        model(images)
    model.train()
    with ByteCounter() as training:
        model(images).sum().backward()
    model.zero_grad()
    return Traffic(evaluation.count, training.count, count_saved(model, images))


def count_saved(model: nn.Module, images: Tensor) -> int:
    """Count the bytes of the storages that a forward pass keeps, but for parameters and buffers."""
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own:
            saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        outputs = model(images)
    del outputs
    return sum(saved.values())


def measure_pair(name: str) -> dict[str, Traffic]:
    """Count the bytes of a plain network, of timm's counterpart, and of the injected one."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "plain": lambda: timm.create_model(name),
        "timm": lambda: timm.create_model(PAIRS[name]),
        "se-inject": lambda: se_inject.inject(timm.create_model(name)),
    }
    found = {}
    for kind, make in makers.items():
        found[kind] = measure_traffic(make(), torch.randn(_BATCH_SIZE, 3, _SIZE, _SIZE))
    return found


def write_table(found: Mapping[str, Mapping[str, Traffic]], setting: Mapping[str, str]) -> str:
    """Write the ratios to the plain network as a table."""
    lines = [
        "# Memory traffic of SE, counted", "", f"`python -m benchmarks.traffic --networks {' '.join(found)}`", "",
        "; ".join(f"{key} {value}" for key, value in setting.items()) + ".", "",
        f"Batches of {_BATCH_SIZE} images of {_SIZE} pixels, fp32, contiguous; the plain network is 1.", "",
        "| network | SE | bytes, evaluation | bytes, training step | bytes saved for backward |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, kinds in found.items():
        plain = kinds["plain"]
        for kind in ("timm", "se-inject"):
            ratios = [getattr(kinds[kind], f) / getattr(plain, f) for f in ("evaluation", "training", "saved")]
            network = f"{name} ({PAIRS[name]})" if kind == "timm" else name
            lines.append(f"| {network} | {kind} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--out", type=Path, default=_FOLDER / "traffic.json")
    options = parser.parse_args()
    found = {name: measure_pair(name) for name in options.networks}
    setting = describe_setting()
    values = {name: {kind: asdict(traffic) for kind, traffic in kinds.items()} for name, kinds in found.items()}
    options.out.write_text(json.dumps({"setting": setting, "bytes": values}, indent=1) + "\n")
    table = write_table(found, setting)
    options.out.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
