"""Speed: what SE costs in time and memory, beside the plain network and beside a peer, in one run.

Takes networks and a setting, gives what was counted and what was timed. Times are taken in rounds in which each network
runs once, in another order each time, so that a ratio holds on a machine that other work makes faster and slower.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from se_inject.calls import Entry, decode_call
from se_inject.ejection import eject
from se_inject.errors import ExampleError, get_first_line
from se_inject.optimization import optimize
from se_inject.rewrite import get_plan
from se_inject.start import inject_once
from se_inject.timing import PLAIN, Conditions, Timing, cast_maps, make_run, take_timings
from se_inject.traffic import ByteCounter, measure_traffic
from se_inject.twin import make_twin


@dataclass(frozen=True)
class Row:
    """What was measured of a network.

    Attributes:
        name: "plain", "injected", "optimized", or a peer's name; those that are optimized are compared to the plain one
            whose batch norms are folded.
        parameters: How many.
        flops: For one image, two for a multiply-accumulate.
        bytes_moved: Read and written by an evaluation.
        bytes_training: Read and written by a training step; None for networks that are not to be trained.
        bytes_saved: Kept for the backward pass of it.
        peak: Bytes that an evaluation holds at once beside parameters: on CUDA what the allocator gives, elsewhere the
            tensors that are made.
        peak_training: Likewise of a training step, with the gradients.
        timings: By the way of running.
        failures: Of ways of running that did not work, the reasons.
    """

    name: str
    parameters: int
    flops: int
    bytes_moved: int
    bytes_training: int | None
    bytes_saved: int | None
    peak: int
    peak_training: int | None
    timings: Mapping[str, Timing]
    failures: Mapping[str, str]


@dataclass(frozen=True)
class Measured:
    """What was measured, and with what: (N, C, H, W) of the input, the device's name, the number of threads."""

    rows: list[Row]
    conditions: Conditions
    shape: tuple[int, ...]
    hardware: str
    threads: int

    def describe(self) -> str:
        """Say what it was measured with, in one line."""
        layout = "channels-last" if self.conditions.channels_last else "contiguous"
        size = " x ".join(map(str, self.shape))
        return (
            f"{size}, {self.conditions.precision}, {layout}, {self.hardware}, {self.threads} threads, "
            f"{self.conditions.rounds} rounds, torch {torch.__version__}"
        )

    def to_values(self) -> dict[str, Any]:
        """Turn into plain values."""
        return {**asdict(self), "torch": torch.__version__}


def measure_network(
    network: nn.Module,
    conditions: Conditions,
    *,
    peers: Mapping[str, nn.Module] | None = None,
    options: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Measure a network without blocks, with them, and optimized, side by side.

    Args:
        network: Injected or not; on the CPU. It is not changed.
        conditions: How networks are run.
        peers: Other networks that are measured beside it, by name.
        options: For `inject`, if the network has no blocks.
        report: Is told what happens.

    Raises:
        ModelError: The network is optimized, or cannot be injected.
        OptionError: It has its blocks already, and options are given.
        EmptyPlanError: It has no place for a block.
        ExampleError: A network does not run on the input.
    """
    injected = inject_once(network, options or {})
    networks = {PLAIN: eject(injected), "injected": injected, **(peers or {})}
    shape = _choose_shape(injected, conditions)
    before = torch.get_num_threads()
    torch.set_num_threads(conditions.threads or before)
    try:
        rows = compare_speed(networks, shape, conditions, report=report)
        is_cuda = torch.device(conditions.device).type == "cuda"
        hardware = torch.cuda.get_device_name(conditions.device) if is_cuda else conditions.device
        return Measured(rows, conditions, shape, hardware, torch.get_num_threads())
    finally:
        torch.set_num_threads(before)


def _choose_shape(injected: nn.Module, conditions: Conditions) -> tuple[int, ...]:
    twin = make_twin(injected)
    call = decode_call(get_plan(injected).calls[Entry("").key], twin)
    tensors = [x for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)]
    if len(tensors) != 1:
        raise ExampleError(
            f"{type(injected).__name__} takes {len(tensors)} tensors; a network of one input is measured"
        )
    channels, *sizes = tensors[0].shape[1:]
    return (conditions.batch_size, channels, *(conditions.input_size or size for size in sizes))


def compare_speed(
    networks: Mapping[str, nn.Module],
    shape: tuple[int, ...],
    conditions: Conditions,
    *,
    report: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure networks side by side; each also optimized.

    Args:
        networks: "plain" first, then others by name, on the CPU. They are copied.
        shape: (N, C, H, W) of the input.
        conditions: How they are run.
        report: Is told what happens.

    Raises:
        ExampleError: A network does not run on the input.
    """
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(conditions.device)
    if conditions.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    models = dict(_prepare(networks, shape, conditions))
    counted = {}
    for name, model in models.items():
        report(f"counting {name}")
        counted[name] = _count(model, images, conditions, trains=name in networks)
    timings: dict[str, dict[str, Timing]] = {name: {} for name in models}
    failures: dict[str, dict[str, str]] = {name: {} for name in models}
    for mode in conditions.list_modes():
        runs = {}
        for name, model in models.items():
            if mode == "training" and name not in networks:
                continue
            report(f"warming up {name}, {mode}")
            try:
                runs[name] = make_run(model, images, mode, conditions)
            except Exception as error:  # noqa: BLE001  a compiler's errors are of all kinds; the row says what
                failures[name][mode] = get_first_line(error)
        report(f"timing {len(runs)} networks, {mode}, {conditions.rounds} rounds")
        for name, timing in take_timings(runs, conditions).items():
            timings[name][mode] = timing
    return [Row(name, **counted[name], timings=timings[name], failures=failures[name]) for name in models]


def _prepare(
    networks: Mapping[str, nn.Module], shape: tuple[int, ...], conditions: Conditions
) -> Iterator[tuple[str, nn.Module]]:
    example = torch.zeros(2, *shape[1:])
    for name, network in networks.items():
        for label, model in ((name, copy.deepcopy(network)), (_name_optimized(name), optimize(network, example))):
            placed = model.to(conditions.device).eval()
            yield label, placed.to(memory_format=torch.channels_last) if conditions.channels_last else placed


def _name_optimized(name: str) -> str:
    return "optimized" if name == "injected" else f"{name}, optimized"


def _count(model: nn.Module, images: Tensor, conditions: Conditions, *, trains: bool) -> dict[str, Any]:
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(images)
    with torch.no_grad(), cast_maps(conditions), ByteCounter() as counter:
        model(images)
    traffic, peak, peak_training = None, counter.peak, None
    if trains:
        with cast_maps(conditions), suppress(ValueError):  # torch's batch norm of one value a channel cannot train
            traffic = measure_traffic(copy.deepcopy(model), images)
        peak_training = traffic and traffic.peak
    if images.is_cuda:
        peak = _measure_peak(make_run(model, images, "eager", conditions), images)
        if traffic is not None:
            peak_training = _measure_peak(make_run(model, images, "training", conditions), images)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": flops.get_total_flops() // len(images),
        "bytes_moved": counter.count,
        "bytes_training": traffic and traffic.training,
        "bytes_saved": traffic and traffic.saved,
        "peak": peak,
        "peak_training": peak_training,
    }


def _measure_peak(run: Callable[[], object], images: Tensor) -> int:
    torch.cuda.reset_peak_memory_stats(images.device)
    before = torch.cuda.memory_allocated(images.device)
    run()
    return int(torch.cuda.max_memory_allocated(images.device) - before)
