"""What SE costs in time, beside timm's SE networks, in interleaved rounds.

    python -m benchmarks.latency

Runs `se-inject bench` for ResNet-50 (on CUDA for ResNet-152 too) at several batch sizes and layouts, eager and
compiled, with steps of training. Every number is the median over rounds of a ratio to the plain network in the same
round; where both are optimized, to the plain one with its batch norms folded. Writes benchmarks/results/latency.json
and latency.md; on CUDA latency-cuda.json and latency-cuda.md. Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.setting import describe_setting
from benchmarks.traffic import PAIRS
from se_inject.speed import Conditions, Measured, measure_network

_FOLDER = Path(__file__).parent / "results"


def list_conditions(options: argparse.Namespace) -> list[Conditions]:
    """List the conditions under which networks are measured."""
    if options.device == "cuda":
        return [
            Conditions(n, 224, options.rounds, channels_last=True, precision="bf16", device="cuda", training=n > 1)
            for n in options.batches
        ]
    return [
        Conditions(n, 224, options.rounds, compiled=options.compiled, channels_last=last, threads=2, training=n > 1)
        for n, last in itertools.product(options.batches, (False, True))
    ]


def write_table(found: Sequence[Mapping[str, Any]], setting: Mapping[str, str]) -> str:
    """Write the ratios as a table."""
    lines = [
        "# Time that SE costs", "", "`python -m benchmarks.latency`", "",
        "; ".join(f"{key} {value}" for key, value in setting.items()) + ".", "",
        "The median over interleaved rounds of the time in relation to the plain network's in the same round. Where a",
        "network is optimized, the plain one is too: its batch norms are folded. The plain network's milliseconds are",
        "those of both.", "",
        "| network | batch, layout | mode | plain (ms) | injected | timm's SE | optimized | timm's SE, folded |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for measured in found:
        rows = {row["name"]: row for row in measured["rows"]}
        peer = next(name for name in rows if name.startswith("timm:") and not name.endswith("optimized"))
        conditions = measured["conditions"]
        layout = "channels-last" if conditions["channels_last"] else "contiguous"
        for mode in rows["plain"]["timings"]:
            names = ("injected", peer, "optimized", f"{peer}, optimized")
            timings = [rows[name]["timings"].get(mode) for name in names]
            ratios = ["" if timing is None else f"{timing['ratio']:.3f}" for timing in timings]
            milliseconds = [rows[name]["timings"].get(mode) for name in ("plain", "plain, optimized")]
            plain = " / ".join(f"{timing['p50']:.1f}" for timing in milliseconds if timing is not None)
            size = f"{conditions['batch_size']}, {layout}"
            lines.append(f"| {measured['network']} | {size} | {mode} | {plain} | {' | '.join(ratios)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(PAIRS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    is_cuda = options.device == "cuda"
    options.batches = options.batches or ([1, 32, 256] if is_cuda else [1, 16])
    out = options.out or _FOLDER / ("latency-cuda.json" if is_cuda else "latency.json")
    found = []
    for name in options.networks or (["resnet50", "resnet152"] if is_cuda else ["resnet50"]):
        peers = {f"timm:{PAIRS[name]}": timm.create_model(PAIRS[name])}
        for conditions in list_conditions(options):
            measured: Measured = measure_network(timm.create_model(name), conditions, peers=peers, report=print)
            print(measured.describe())
            found.append({"network": name, **measured.to_values()})
            setting = {**describe_setting(), "hardware": measured.hardware}
            out.write_text(json.dumps({"setting": setting, "measured": found}, indent=1) + "\n")
            out.with_suffix(".md").write_text(write_table(found, setting))
    print(out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
