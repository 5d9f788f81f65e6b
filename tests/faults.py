"""Kills writers of our files at any time: `python -m tests.faults FOLDER`, which prints what was found as JSON.

A process that has loaded everything forks writers, each of which writes one of two states over and over, until it is
killed with SIGKILL after a time drawn from a seeded generator. After each kill the file must be there, whole, and one
of the two.
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from se_inject import blocks, inject, load, optimize, save, save_adapter
from se_inject.adapters import read_adapter
from se_inject.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from se_inject.deployment import deploy
from tests import nets

A, B = 0.25, 0.5


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        path: The file.
        write: Writes a state.
        read: Gives the state that is there; raises if there is none, whole.
        kills: How many writers are killed.
        seconds: How long one write takes, at most about.
    """

    path: Path
    write: Callable[[float], object]
    read: Callable[[], float]
    kills: int
    seconds: float


def make_model(value: float) -> nn.Module:
    """Make a network all of whose weights are the same number."""
    model = inject(nets.TwoBranches(), r=4, example=torch.zeros(2, 3, 16, 16)).eval()
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


def take_one(tensors: Any) -> float:
    """Return the number that all tensors consist of."""
    values = {number for tensor in tensors for number in tensor.unique().tolist()}
    assert len(values) == 1, f"a mix of {values}"
    return values.pop()


def list_targets(folder: Path) -> dict[str, Target]:
    models = {value: make_model(value) for value in (A, B)}
    base = nets.TwoBranches()
    large = {value: {f"{i}": torch.full((64, 64, 9), value) for i in range(20)} for value in (A, B)}

    def write_run(value: float) -> None:
        write_checkpoint(folder, Checkpoint(1, large[value], None, {}, {"lr": value}, [], 0.0))

    def write_optimized(model: nn.Module, path: Path) -> None:
        save(optimize(model), path)

    def read_run() -> float:
        found = next(filter(None, (_read_run(folder, value) for value in (A, B))))
        return take_one(found.model.values())

    def read_network(path: Path) -> float:
        return take_one(list(load(path, base=base).parameters()))

    def read_blocks() -> float:
        return take_one(list(read_adapter(folder / "a.pt").state.values()))

    def read_program() -> float:
        module = torch.export.load(folder / "x.pt2").module()
        return take_one([p for p in module.parameters() if p.ndim == 4])

    def read_onnx() -> float:
        import onnx

        model = onnx.load(folder / "x.onnx")
        onnx.checker.check_model(model)
        kept = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer]
        return take_one([torch.from_numpy(t.copy()) for t in kept if t.ndim == 4])

    def make(name: str, write: Callable[[nn.Module, Path], object], *rest: Any) -> Target:
        path = folder / name
        return Target(path, lambda value: write(models[value], path), *rest)

    return {
        "artifact .pt": make("x.pt", save, lambda: read_network(folder / "x.pt"), 50, 0.03),
        "artifact .safetensors": make("x.safetensors", save, lambda: read_network(folder / "x.safetensors"), 40, 0.03),
        "adapter": make("a.pt", save_adapter, read_blocks, 40, 0.03),
        "checkpoint": Target(folder / "checkpoint.pt", write_run, read_run, 50, 0.03),
        "optimized": make("o.pt", write_optimized, lambda: _read_optimized(folder / "o.pt", base), 12, 0.3),
        "program .pt2": make("x.pt2", deploy, read_program, 6, 1.0),
        "program .onnx": make("x.onnx", deploy, read_onnx, 4, 2.0),
    }  # fmt: skip


def _read_run(folder: Path, value: float) -> Checkpoint | None:
    try:
        return read_checkpoint(folder, {"lr": value})
    except RuntimeError:  # of the other run
        return None


def _read_optimized(path: Path, base: nn.Module) -> float:
    return take_one([block.fc2.weight for block in blocks(load(path, base=base)).values()])


def kill_writer(target: Target, rng: random.Random) -> None:
    """Fork a process that writes, and kill it at some time of its first three writes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, b"x")
            while True:
                for value in (B, A):
                    target.write(value)
        finally:
            os._exit(1)
    os.read(reader, 1)
    time.sleep(rng.random() * 3 * target.seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    assert os.WIFSIGNALED(status), "the writer ended by itself"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rng = random.Random(0)
    found: dict[str, Any] = {}
    for name, target in list_targets(folder).items():
        target.write(A)
        assert target.read() == A
        states: collections.Counter[str] = collections.Counter()
        for _ in range(target.kills):
            kill_writer(target, rng)
            states[{A: "old", B: "new"}[target.read()]] += 1
        parts = list(folder.glob(".*.part"))
        found[name] = {"kills": sum(states.values()), **states, "parts left": len(parts)}
        for part in parts:
            part.unlink()
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
