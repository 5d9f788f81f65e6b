"""The world: the processes that train together, and the device of this one.

Takes what torchrun (or SLURM) has set in the environment, gives a `World`. timm sets the processes up.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor
from torch import distributed as dist

from se_inject.downloads import get_sentence
from se_inject.errors import OptionError, SEInjectError, TrainingError

_CPUINFO = Path("/proc/cpuinfo")
_T = TypeVar("_T")
_LOST = ("gloo/transport", "connection closed by peer", "connection reset by peer", "ncclremoteerror")
"""What gloo and NCCL say where a process that they talk to is no more."""


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        device: Of this process.
        rank: Number of this process, from 0.
        size: How many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that talks and writes."""
        return self.rank == 0

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.type == "cuda"

    @property
    def computes_bf16(self) -> bool:
        """Whether the device is a GPU that computes in bf16; those before Ampere emulate it, slower than fp32."""
        return self.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)

    def add_up(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Gather tensors (N, ...) of equal shapes from all processes into one (N * size, ...), the same in all."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)

    def collect(self, value: _T) -> list[_T]:
        """Collect a value that can be pickled from all processes, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_world(device: str = "auto") -> Iterator[World]:
    """Join the processes that were started together, for as long as the context lasts.

    Args:
        device: "cpu", "cuda" or another name of torch; "auto" is CUDA where there is one.

    Raises:
        OptionError: There is no such device.
        TrainingError: Another process has ended.
    """
    found = init_distributed_device_so(choose_device(device))
    try:
        yield World(torch.device(found["device"]), found["global_rank"], found["world_size"])
    except RuntimeError as error:
        is_ours = isinstance(error, SEInjectError)
        if is_ours or not found["distributed"] or not any(sign in str(error).lower() for sign in _LOST):
            raise
        raise TrainingError(
            f"another of the {found['world_size']} processes has ended; start them again, a fine-tune with --resume"
        ) from error
    finally:
        if found["distributed"]:
            dist.destroy_process_group()


def stay_alone(device: str = "auto") -> World:
    """Make the world of a single process.

    Args:
        device: See `join_world`.

    Raises:
        OptionError: There is no such device.
    """
    return World(torch.device(choose_device(device)))


def choose_device(device: str) -> str:
    """Choose a device that can be used.

    Args:
        device: "cpu", "cuda" or another name of torch; "auto" is CUDA where there is one.

    Raises:
        OptionError: There is no such device.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # of a device whose package is not installed
        raise OptionError(f"device is {device!r}, which cannot be used here: {get_sentence(error)}") from error
    return name


def name_device(device: torch.device) -> str:
    """Name a device: the model of the GPU or of the CPU, or else the type of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return cpu or platform.processor() or platform.machine()
