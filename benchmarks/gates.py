"""What gates show, and what can be done about them.

    python -m benchmarks.gates --parts folding
    python -m benchmarks.gates --parts watching simplify --model TUNED --data DIR

- `folding`: how far a network with folded gates is from the one whose gates are fixed to the same values, in fp64 and
  in fp32, in relation to the largest output.
- `watching`: the speed of the pass that collects gates in relation to a plain evaluation, in interleaved pairs, on
  images that are decoded already; and what is held for it, which does not grow with the images.
- `simplify`: `se_inject.simplify` on every second test image, and what it did to the others.

TUNED is what `python -m benchmarks.accuracy ... --keep FOLDER` wrote. Adds its parts to OUT, and writes OUT.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.data import Subset

import se_inject
from benchmarks.accuracy_networks import make_data
from benchmarks.setting import describe_setting
from se_inject.artifact import get_source
from se_inject.datasets import Data
from se_inject.gate_folding import find_gate_folds
from se_inject.gates import fix_gates, get_own_blocks
from se_inject.loaders import EvalLoader
from se_inject.observation import observe
from se_inject.restriction import fold_gates
from se_inject.simplify import simplify
from se_inject.start import read_model_format
from se_inject.validation import CACHE, Validation
from se_inject.world import World, stay_alone

_FOLDER = Path(__file__).parent / "results"
_NETWORKS = ("resnet18", "resnet50", "resnext50_32x4d", "mobilenetv2_100", "convnext_tiny", "inception_v4", "dla34")
_SEED = 0


def measure_folding() -> list[dict[str, Any]]:
    """Measure how exact folding is, on networks with random weights and random gates between 0.5 and 1.5."""
    rows = []
    for name in _NETWORKS:
        torch.manual_seed(_SEED)
        model = se_inject.inject(timm.create_model(name).eval())
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # timm starts the last ones at zero
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.uniform_(module.bias, -0.2, 0.2)
        own, folds = get_own_blocks(model), find_gate_folds(model)
        gates = {fold.block: 0.5 + torch.rand(own[fold.block].channels) for fold in folds.folds}
        x = torch.randn(2, 3, 224, 224)
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            with fix_gates(exact, gates):
                expected = exact(x.double())
            with fix_gates(model, gates):
                fixed = model(x)
            largest = expected.abs().max()
            rows.append({
                "network": name, "blocks": len(own), "folded": len(gates), "kept": len(folds.kept),
                "double": float((fold_gates(exact, gates)(x.double()) - expected).abs().max() / largest),
                "single": float((fold_gates(model, gates)(x) - expected).abs().max() / largest),
                "single_fixed": float((fixed - expected).abs().max() / largest),
            })  # fmt: skip
            print(rows[-1], file=sys.stderr)
    return rows


def make_validation(model: nn.Module, images: Data, part: range, world: World, batch_size: int) -> Validation:
    """Make a validation of some of the test images."""
    form = read_model_format(model, get_source(model), 32)
    subset = Subset(images.val, part)
    loader = EvalLoader(subset, form, batch_size=batch_size, workers=0, world=world, cache=CACHE)
    return Validation(images, loader, world, images.num_classes)


def measure_watching(model: nn.Module, validation: Validation, pairs: int) -> dict[str, Any]:
    """Measure the pass that collects gates against one that only scores, in turns."""
    kinds: dict[str, Callable[[], object]] = {
        "plain": lambda: validation.score(model), "watching": lambda: observe(model, validation)
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for i in range(pairs + 1):
        for name in list(kinds) if i % 2 else reversed(list(kinds)):
            start = time.perf_counter()
            kinds[name]()
            if i:  # the first pair decodes
                seconds[name].append(time.perf_counter() - start)
    ratios = [plain / watched for plain, watched in zip(*seconds.values(), strict=True)]
    return {
        "images": validation.loader.num_images, "batch_size": validation.loader.batch_size, "pairs": pairs,
        "speed": statistics.median(ratios), "images_per_second": validation.loader.num_images
        / statistics.median(seconds["watching"]),
    }  # fmt: skip


def measure_simplify(model: nn.Module, choosing: Validation, testing: Validation, max_drop: float) -> dict[str, Any]:
    """Simplify by one half of the images, and score the result on the other one."""

    def report(what: str, done: int, total: int) -> None:
        print(f"{done}/{total} {what}", file=sys.stderr, flush=True)

    found = simplify(model, choosing, max_drop=max_drop, report=report)
    before, after = testing.score(model), testing.score(found.model)
    assert before.hits is not None
    assert after.hits is not None
    change = 100 * (after.hits - before.hits).double()
    return {
        "max_drop": max_drop, **found.to_values(),
        "test": {
            "num_images": before.num_images, "before": before.top1, "after": after.top1,
            "difference": float(change.mean()), "standard_error": float(change.std() / len(change) ** 0.5),
        },
    }  # fmt: skip


def _write_folding(found: list[dict[str, Any]]) -> list[str]:
    header = "| network | blocks | folded | fp64 | fp32 | fp32, gates fixed and not folded |"
    return [header, "|---|---|---|---|---|---|"] + [
        f"| {row['network']} | {row['blocks']} | {row['folded']} | {row['double']:.1e} | {row['single']:.1e} | "
        f"{row['single_fixed']:.1e} |"
        for row in found
    ]


def _write_watching(found: dict[str, Any]) -> list[str]:
    what = f"{found['images']:,} images, batches of {found['batch_size']}"
    return [f"{what}: {found['speed']:.3f} of the images/s of a plain evaluation (median of {found['pairs']} pairs)"]


def _write_simplify(found: dict[str, Any]) -> list[str]:
    before, after, test = found["before"]["top1"], found["after"]["top1"], found["test"]
    summary = (
        f"{found['num_folded']} of {found['num_blocks']} blocks folded; top-1 on {found['num_images']:,} images that "
        f"chose them: {before:.2f} -> {after:.2f} %; on {test['num_images']:,} others: {test['before']:.2f} -> "
        f"{test['after']:.2f} % ({test['difference']:+.2f}, standard error {test['standard_error']:.2f})"
    )
    lines = [summary, "", "| block | | top-1 | parameters | images/s |", "|---|---|---|---|---|"]
    for step in found["steps"]:
        what = f"{step['action']} {step['hidden'] or ''}".strip()
        size = f"{step['parameters']:,}"
        lines.append(f"| {step['path']} | {what} | {step['top1']:.2f} | {size} | x{step['speed']:.2f} |")
    return lines


_WRITERS: dict[str, Callable[[Any], list[str]]] = {
    "folding": _write_folding, "watching": _write_watching, "simplify": _write_simplify
}  # fmt: skip


def write_tables(result: dict[str, Any], path: Path) -> None:
    """Write what was measured as Markdown."""
    lines = ["# Gates", ""]
    for part, values in result.items():
        setting = ", ".join(f"{key} {value}" for key, value in values["setting"].items())
        lines.extend([f"## {part}", "", f"`{values['command']}` ({setting})", ""])
        lines += _WRITERS[part](values["found"])
        lines.append("")
    path.write_text("\n".join(lines))


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("folding", "watching", "simplify"), default=["folding"])
    parser.add_argument("--model", type=Path, metavar="FILE", help="A tuned CIFAR ResNet.")
    parser.add_argument("--data", type=Path, metavar="DIR", help="CIFAR-10 (JPEG), with train/ and test/.")
    parser.add_argument("--max-drop", type=float, default=0.1)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=_FOLDER / "gates.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = json.loads(options.out.read_text()) if options.out.is_file() else {}
    world = stay_alone("cpu")
    for part in options.parts:
        if part == "folding":
            found: Any = measure_folding()
        else:
            model = se_inject.load(options.model, trust_source=True)
            images = make_data("resnet56", options.data, share=1, seed=0)
            num = len(images.val)  # type: ignore[arg-type]
            whole, first, second = (
                make_validation(model, images, each, world, options.batch_size)
                for each in (range(num), range(0, num, 2), range(1, num, 2))
            )
            if part == "watching":
                found = measure_watching(model, whole, options.pairs)
            else:
                found = measure_simplify(model, first, second, options.max_drop)
        setting = describe_setting() | {"threads": str(options.threads), "seed": str(_SEED)}
        command = f"python -m benchmarks.gates {shlex.join(sys.argv[1:])}"
        result[part] = {"command": command, "setting": setting, "found": found}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        write_tables(result, options.out.with_suffix(".md"))
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
