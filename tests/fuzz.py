"""A fuzzer of our files: `python -m tests.fuzz --files 20000 --jobs 2 --out benchmarks/results/fuzz.json`.

Real files are changed: their bytes, what is inside their containers (checksums and lengths right), or the values and
tensors (the digest right too, so that the change reaches the code behind it). Each is read as a user reads it. It must
be read, or refused with one printable line; nothing may run, hang, take more calls of functions than twice what the
most demanding file takes unchanged, or more memory than twice the file and what a network of its size takes. Calls are
counted, not timed: the count does not depend on what else the machine does.
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
    """Listens to what the interpreter does while a file is read, and counts the calls."""

    def __init__(self) -> None:
        self.active = False
        self.found: list[str] = []
        self.num_calls, self.most_calls = 0, sys.maxsize
        sys.addaudithook(self._hear)

    @contextmanager
    def listen(self) -> Iterator[None]:
        self.found, self.num_calls, self.active = [], 0, True
        sys.setprofile(self._count)
        try:
            yield
        finally:
            sys.setprofile(None)
            self.active = False

    def _count(self, _frame: object, event: str, _: object) -> None:
        self.num_calls += event in {"call", "c_call"}

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


def read_file(path: Path, seed: str, network: nn.Module, watch: Watch) -> tuple[str, int]:
    """Read a file as a user does; what it gave and the bytes beyond twice its size. The watch has counted the calls."""
    readers: dict[str, Callable[[], object]] = {
        "adapter": lambda: load_adapter(network, path), "state": lambda: read_state_dict(path),
    }  # fmt: skip
    read = readers.get(seed.partition("-")[0], lambda: load(path))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = read_memory("VmRSS")
    outcome = "read"
    with limited(HANG), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with watch.listen():
                read()
        except SEInjectError as error:
            line = str(error)
            outcome = f"refused: {type(error).__name__}"
            if not line.isprintable() or len(line) > 1500:
                raise Violation(f"the message is no printable line: {line!r:.300}") from error
    excess = read_memory("VmHWM") - before - 2 * path.stat().st_size
    if watch.found:
        raise Violation(f"it made happen: {'; '.join(watch.found[:3])}")
    if watch.num_calls > watch.most_calls:
        raise Violation(f"it took {watch.num_calls:,} calls, of {watch.most_calls:,}")
    if excess > SPARE:
        raise Violation(f"it took {excess >> 20} MiB beyond twice its size")
    return outcome, excess


def count_calls(paths: list[Path], network: nn.Module, watch: Watch) -> int:
    """Count the calls that the most demanding of unchanged files takes."""
    counts = []
    for path in paths:
        read_file(path, path.name, network, watch)
        counts.append(watch.num_calls)
    return max(counts)


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
    maxima = {"most_calls": 0, "most_excess_bytes": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeds = list_seeds(folder)
        count_calls(seeds, network, watch)  # what is imported and cached once
        watch.most_calls = 2 * count_calls(seeds, network, watch)
        for number in range(first, first + num_files):
            rng = random.Random(number)
            level = rng.choices(LEVELS, SHARES)[0]
            path = make_file(folder, seeds, level, rng)
            kind = path.with_suffix(".kind").read_text()
            try:
                outcome, excess = read_file(path, kind, network, watch)
                now = {"most_calls": watch.num_calls, "most_excess_bytes": excess}
                maxima = {key: max(maxima[key], now[key]) for key in now}
            except Exception as error:  # noqa: BLE001  each is a finding
                outcome = "violation"
                text = str(error) if isinstance(error, Violation) else "".join(traceback.format_exception(error)[-6:])
                violations.append({"number": number, "level": level, "file": kind, "what": text})
                if keep is not None:
                    keep.mkdir(exist_ok=True)
                    (keep / f"{number}-{kind}{path.suffix}").write_bytes(path.read_bytes())
            counts[f"{level}, {outcome}"] += 1
    return {"counts": dict(counts), "violations": violations, **maxima}


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
        "most_calls": max(part["most_calls"] for part in found),
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
