"""What SE costs in time, beside timm's SE networks, in interleaved rounds.

    python -m benchmarks.latency

Runs `se-inject bench` for ResNet-50 (on CUDA for ResNet-152 too) at several batch sizes and layouts, eager and
compiled, and with --training also steps of training. Every number is the median over rounds of a ratio to the plain
network in the same round; where both are optimized, to the plain one with its batch norms folded. Writes
benchmarks/results/latency.json and latency.md; on CUDA latency-cuda.json and latency-cuda.md. Nothing else should run
beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.setting import describe_setting
from benchmarks.traffic import PAIRS
from se_inject.speed import Measured, measure_network
from se_inject.timing import Conditions

_FOLDER = Path(__file__).parent / "results"
_MIN_ROUNDS = 7
_NUM_ADDED = 2**25


def list_conditions(options: argparse.Namespace) -> list[Conditions]:
    """List the conditions under which networks are measured."""
    if options.device == "cuda":
        return [
            Conditions(
                batch_size=n,
                input_size=224,
                rounds=options.rounds,
                training=options.training,
                channels_last=True,
                precision="bf16",
                device="cuda",
            )
            for n in options.batches
        ]
    return [
        Conditions(
            batch_size=n,
            input_size=224,
            rounds=options.rounds if n == 1 else max(_MIN_ROUNDS, options.rounds // 3),
            compiled=options.compiled,
            training=options.training,
            channels_last=is_last,
            threads=2,
        )
        for n, is_last in itertools.product(options.batches, (False, True))
    ]


def measure_bandwidth(device: str) -> float:
    """Measure how many bytes a second an addition in place reads and writes; the median of 20."""
    x, y = (torch.ones(_NUM_ADDED, device=device) for _ in range(2))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        x.add_(y)
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 3 * x.numel() * x.element_size() / statistics.median(seconds)


def write_table(found: Sequence[Mapping[str, Any]], setting: Mapping[str, str], bandwidth: float) -> str:
    """Write the ratios as a table, and what the bytes that SE adds would take at the bandwidth that was measured."""
    lines = [
        "# Time that SE costs", "", "`python -m benchmarks.latency`", "",
        "; ".join(f"{key} {value}" for key, value in setting.items()) + ".", "",
        "The median over interleaved rounds of the time in relation to the plain network's in the same round. Where a",
        "network is optimized, the plain one is too: its batch norms are folded. The plain network's milliseconds are",
        "those of both. `by bytes` is what the optimized network would be if the bytes that it moves beyond the plain",
        f"one took their time and nothing else did, at {bandwidth / 1e9:.1f} GB/s (an addition in place, measured).",
        "",
        "| network | batch, layout | mode | plain (ms) | injected | timm's | optimized | by bytes | timm's, folded |",
        "|---|---|---|---|---|---|---|---|---|",
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
            extra = rows["optimized"]["bytes_moved"] - rows["plain, optimized"]["bytes_moved"]
            base = milliseconds[1]
            ratios.insert(3, "" if base is None else f"{1 + extra / bandwidth / base['p50'] * 1000:.3f}")
            size = f"{conditions['batch_size']}, {layout}"
            lines.append(f"| {measured['network']} | {size} | {mode} | {plain} | {' | '.join(ratios)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(PAIRS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, default=21, help="at batch 1; on a CPU a third of it otherwise")
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--training", action="store_true", help="time steps of training too")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    is_cuda = options.device == "cuda"
    options.batches = options.batches or ([1, 32, 256] if is_cuda else [1, 16])
    out = options.out or _FOLDER / ("latency-cuda.json" if is_cuda else "latency.json")
    found = []
    torch.set_num_threads(2)
    bandwidth = measure_bandwidth(options.device)
    for name in options.networks or (["resnet50", "resnet152"] if is_cuda else ["resnet50"]):
        peers = {f"timm:{PAIRS[name]}": timm.create_model(PAIRS[name])}
        for conditions in list_conditions(options):
            measured: Measured = measure_network(timm.create_model(name), conditions, peers=peers, report=print)
            print(measured.describe())
            found.append({"network": name, **measured.to_values()})
            setting = {**describe_setting(), "hardware": measured.hardware}
            values = {"setting": setting, "bytes_per_second": bandwidth, "measured": found}
            out.write_text(json.dumps(values, indent=1) + "\n")
            out.with_suffix(".md").write_text(write_table(found, setting, bandwidth))
    print(out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
