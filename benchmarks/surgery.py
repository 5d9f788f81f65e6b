"""How long an injection and an optimization take, and how much memory.

    python -m benchmarks.surgery --out benchmarks/results/surgery.json

Each network is injected in processes of their own, so that the first call counts, with all that it imports and warms
up. Modules are compiled to bytecode before, as pip does where it installs a package. Times are seconds of the wall
clock; memory is the growth of the peak of resident memory in MiB, beside the sizes of the model (whose copy is made)
and of the blocks. Shared machines are noisy: the median of the runs is what to quote.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.setting import describe_setting

_NETWORKS = ("resnet50", "densenet201", "wide_resnet101_2")
_SCRIPT = """
import json, resource, sys, time
import timm, torch
torch.set_num_threads(2)
model = timm.create_model(sys.argv[1])
import se_inject
size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
injected = se_inject.inject(model, r=16)
first = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
se_inject.inject(model, r=16)
second = time.perf_counter() - start
start = time.perf_counter()
se_inject.optimize(injected)
optimized = time.perf_counter() - start
blocks = sum(p.numel() * p.element_size() for b in se_inject.blocks(injected).values() for p in b.parameters())
print(json.dumps({
    "first_s": first, "second_s": second, "optimize_s": optimized, "peak_growth_mb": (peak - before) / 1024,
    "model_mb": size / 2**20, "blocks_mb": blocks / 2**20, "num_blocks": len(se_inject.blocks(injected)),
    "parameters": sum(p.numel() for p in injected.parameters()),
}))
"""


def measure(network: str, runs: int) -> dict[str, float]:
    """Inject into a network in `runs` fresh processes and take the medians."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    results = []
    for _ in range(runs + 1):
        command = [sys.executable, "-c", _SCRIPT, network]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        results.append(json.loads(done.stdout))
    del results[0]  # which wrote the bytecode
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def time_help(runs: int) -> float:
    """Time `se-inject --help` as a whole process, in seconds, and take the median."""
    script = "import subprocess, sys, time; t = time.perf_counter(); subprocess.run(sys.argv[1:], capture_output=True)"
    command = [
        sys.executable,
        "-c",
        script + "; print(time.perf_counter() - t)",
        sys.executable,
        "-m",
        "se_inject",
        "-h",
    ]
    return statistics.median(float(subprocess.check_output(command, text=True)) for _ in range(runs))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {
        "command": "python -m benchmarks.surgery",
        "setting": {"threads": "2", **describe_setting()},
        "runs": options.runs,
        "help_s": time_help(options.runs),
        "inject": {network: measure(network, options.runs) for network in _NETWORKS},
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
