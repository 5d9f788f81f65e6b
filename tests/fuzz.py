"""A fuzzer of our files: `python -m tests.fuzz --files 20000 --jobs 2 --out benchmarks/results/fuzz.json`.

Real files are changed: their bytes, what is inside their containers (checksums and lengths right), or the values and
tensors (the digest right too, so that the change reaches the code behind it). Each is read as a user reads it. It must
be read, or refused with one printable line; nothing may run, hang, or take more memory than twice the file and what a
network of its size takes.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.setting import describe_setting
from se_inject import load, load_adapter
from se_inject.errors import SEInjectError
from se_inject.files import read_state_dict
from tests.golden.write import FOLDER, build_network
from tests.mutations import LEVELS, make_file

SECONDS = 2.0
"""Of the processor, a file."""
SPARE = 32 << 20
"""Bytes that reading a file may take beside twice its size: Python's own, for a network that is built and traced."""
HANG = 30
SHARES = (0.4, 0.3, 0.3)
ALLOWED_CODE = re.compile(
    r"<se_inject\.generated|<string>|<eval_with_key>|<frozen|\.py$|^<fx|^<__array_function__|^<lambdifygenerated"
)
FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "socket.connect",
             "socket.getaddrinfo", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree",
             "ctypes.dlopen", "pty.spawn", "webbrowser.open", "code.__new__"}  # fmt: skip


class Violation(Exception):  # noqa: N818
    """Something happened that no file may make happen."""


class Watch:
    """Listens to what the interpreter does while a file is read."""

    def __init__(self) -> None:
        self.active = False
        self.found: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in FORBIDDEN:
            self.found.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
            self.found.append(f"open {args!r:.200}")
        elif event == "exec" and not ALLOWED_CODE.search(args[0].co_filename):
            self.found.append(f"exec {args[0].co_filename}")


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Violation(f"it hangs, for more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_memory(key: str) -> int:
    return next(
        int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if key in line
    )


def read_file(path: Path, seed: str, network: nn.Module, watch: Watch) -> tuple[str, float, int]:
    """Read a file as a user does; what it gave, the processor's seconds and the bytes beyond twice its size."""
    readers: dict[str, Callable[[], object]] = {
        "adapter": lambda: load_adapter(network, path), "state": lambda: read_state_dict(path),
    }  # fmt: skip
    read = readers.get(seed.partition("-")[0], lambda: load(path))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = read_memory("VmRSS"), time.process_time()
    outcome = "read"
    with limited(HANG), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watch.found, watch.active = [], True
        try:
            read()
        except SEInjectError as error:
            line = str(error)
            outcome = f"refused: {type(error).__name__}"
            if not line.isprintable() or len(line) > 1500:
                raise Violation(f"the message is no printable line: {line!r:.300}") from error
        finally:
            watch.active = False
    seconds = time.process_time() - start
    excess = read_memory("VmHWM") - before - 2 * path.stat().st_size
    if watch.found:
        raise Violation(f"it made happen: {'; '.join(watch.found[:3])}")
    if seconds > SECONDS:
        raise Violation(f"it took {seconds:.1f} s of the processor")
    if excess > SPARE:
        raise Violation(f"it took {excess >> 20} MiB beyond twice its size")
    return outcome, seconds, excess


def list_seeds(folder: Path) -> list[Path]:
    """List the files that are changed: ours, and state dicts of torch in its new and its old form."""
    state = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict()
    torch.save(state, folder / "state-new.pth")
    torch.save({"state_dict": state, "epoch": 3}, folder / "state-old.pth", _use_new_zipfile_serialization=False)
    golden = [p for p in FOLDER.iterdir() if p.suffix in (".pt", ".safetensors")]
    return sorted([*golden, *folder.glob("state-*.pth")], key=lambda p: p.name)


def fuzz(num_files: int, first: int, *, keep: Path | None = None) -> dict[str, Any]:
    """Change and read files, each of a seed of its own; the violations are kept."""
    torch.set_num_threads(1)
    watch, network = Watch(), build_network()
    counts: collections.Counter[str] = collections.Counter()
    violations: list[dict[str, Any]] = []
    slowest, largest = 0.0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeds = list_seeds(folder)
        for seed in seeds:  # what is imported and cached once
            read_file(seed, seed.name, network, Watch()) if seed.suffix != ".pth" else read_state_dict(seed)
        for number in range(first, first + num_files):
            rng = random.Random(number)
            level = rng.choices(LEVELS, SHARES)[0]
            path = make_file(folder, seeds, level, rng)
            kind = path.with_suffix(".kind").read_text()
            try:
                outcome, seconds, excess = read_file(path, kind, network, watch)
                slowest, largest = max(slowest, seconds), max(largest, excess)
            except Exception as error:  # noqa: BLE001  each is a finding
                outcome = "violation"
                text = str(error) if isinstance(error, Violation) else "".join(traceback.format_exception(error)[-6:])
                violations.append({"number": number, "level": level, "file": kind, "what": text})
                if keep is not None:
                    keep.mkdir(exist_ok=True)
                    (keep / f"{number}-{kind}{path.suffix}").write_bytes(path.read_bytes())
            counts[f"{level}, {outcome}"] += 1
    return {"counts": dict(counts), "violations": violations, "slowest_s": slowest, "most_excess_bytes": largest}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the first file's number, which is its seed")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a folder for the files that were not taken well")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    share = -(-options.files // options.jobs)
    tasks = [(share, options.first + i * share) for i in range(options.jobs)]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        parts = [pool.apply_async(fuzz, task, {"keep": options.keep}) for task in tasks]
        found = [part.get() for part in parts]
    counts: collections.Counter[str] = collections.Counter()
    for part in found:
        counts.update(part["counts"])
    violations = [violation for part in found for violation in part["violations"]]
    result = {
        "environment": describe_setting(),
        "command": "python -m tests.fuzz " + " ".join(sys.argv[1:]),
        "files": sum(counts.values()), "counts": dict(sorted(counts.items())), "violations": violations,
        "slowest_s": max(part["slowest_s"] for part in found),
        "most_excess_bytes": max(part["most_excess_bytes"] for part in found),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10,
    }  # fmt: skip
    text = json.dumps(result, indent=1) + "\n"
    sys.stdout.write(text)
    if options.out:
        options.out.write_text(text)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
