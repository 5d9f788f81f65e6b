"""Speed: what SE costs in time and memory, beside the plain network and beside a peer, in one run.

Takes networks and a setting, gives what was counted and what was timed. Times are taken in rounds in which each network
runs once, in another order each time, so that a ratio holds on a machine that other work makes faster and slower.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from se_inject.calls import Entry, decode_call
from se_inject.ejection import eject
from se_inject.entrants import (
    INJECTED,
    OPTIMIZED,
    PLAIN,
    PLAIN_OPTIMIZED,
    Entrant,
    name_optimized,
    prepare_entrants,
    refuse_size,
)
from se_inject.errors import ExampleError, ModelError, OptionError, get_first_line
from se_inject.optimization import find_optimization
from se_inject.rewrite import get_plan
from se_inject.scores import is_out_of_memory, lacks_statistics
from se_inject.start import inject_once
from se_inject.timing import Conditions, Timing, cast_maps, make_run, take_timings
from se_inject.traffic import ByteCounter, measure_traffic
from se_inject.twin import make_twin
from se_inject.world import name_device

COUNTED_STEP = "training step, counted"
"""Among the failures of a row: why nothing was counted of a training step."""


@dataclass(frozen=True)
class Row:
    """What was measured of a network.

    Attributes:
        name: "plain", "injected", "optimized", or a peer's name.
        base: The name of the row that it is compared to: the plain network, or for those that are optimized the plain
            one whose batch norms are folded. These two are their own.
        parameters: How many.
        flops: For one image, two for a multiply-accumulate.
        bytes_moved: Read and written by an evaluation.
        bytes_training: Read and written by a training step; None for networks that are not, or cannot be, trained.
        bytes_saved: Kept for the backward pass of it.
        peak: Bytes that an evaluation holds at once beside parameters: on CUDA what the allocator gives, elsewhere the
            tensors that are made.
        peak_training: Likewise of a training step, with the gradients.
        timings: By the way of running.
        failures: Of ways of running that did not work, the reasons.
    """

    name: str
    base: str
    parameters: int
    flops: int
    bytes_moved: int
    bytes_training: int | None
    bytes_saved: int | None
    peak: int
    peak_training: int | None
    timings: Mapping[str, Timing] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What was measured, and with what.

    Attributes:
        rows: A network each.
        injection: What the blocks are: the settings of their plan, and the reduction ratio of each by its path.
        conditions: How networks were run.
        shape: (N, C, H, W) of the input.
        hardware: The name of the GPU or the CPU.
        threads: Of the CPU.
    """

    rows: list[Row]
    injection: Mapping[str, Any]
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
        peers: Other networks that are measured beside it, by name; not by that of another row.
        options: For `inject`, if the network has no blocks.
        report: Is told what happens.

    Raises:
        ModelError: A network is optimized already, or cannot be; or the network cannot be injected.
        EmptyPlanError: It has no place for a block.
        OptionError: It has its blocks already, and options are given; a peer has the name of another row; or the images
            do not fit the layout or into memory.
        ExampleError: A network does not run on the input.
    """
    _check_networks(network, peers or {})
    injected = inject_once(network, options or {}, input_size=conditions.input_size)
    networks = {PLAIN: eject(injected), INJECTED: injected, **(peers or {})}
    shape = _choose_shape(injected, conditions)
    before = torch.get_num_threads()
    torch.set_num_threads(conditions.threads or before)
    try:
        rows = compare_speed(networks, shape, conditions, report=report)
        hardware = name_device(torch.device(conditions.device))
        return Measured(rows, _describe_blocks(injected), conditions, shape, hardware, torch.get_num_threads())
    finally:
        torch.set_num_threads(before)


def _check_networks(network: nn.Module, peers: Mapping[str, nn.Module]) -> None:
    taken = {PLAIN, PLAIN_OPTIMIZED, INJECTED, OPTIMIZED}
    for name in peers:
        own = {name, name_optimized(name)}
        if own & taken:
            raise OptionError(f"a peer is named {name!r}, as another row is; give it a name of its own")
        taken |= own
    for name, each in ((type(network).__name__, network), *peers.items()):
        if find_optimization(each) is not None:
            raise ModelError(f"{name} is optimized; bench takes the network that it was made from")


def _describe_blocks(injected: nn.Module) -> dict[str, Any]:
    plan = get_plan(injected)
    return {**plan.to_settings(), "r": {site.path: site.r for site in plan.sites}}


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
        ModelError: A network cannot be copied or optimized.
        OptionError: The images do not fit the layout or into memory.
        ExampleError: A network does not run on the input.
    """
    entrants: dict[str, Entrant] = {}
    rows: dict[str, Row] = {}
    for entrant in prepare_entrants(networks, shape, conditions):
        report(f"counting {entrant.name}")
        entrants[entrant.name], rows[entrant.name] = entrant, _count(entrant, conditions)
    bases = {name: entrant.base for name, entrant in entrants.items()}
    for mode in conditions.list_modes():
        runs = {}
        for name, entrant in entrants.items():
            if mode == "training" and not entrant.trains:
                continue
            report(f"warming up {name}, {mode}")
            try:
                runs[name] = make_run(entrant.model, entrant.images, mode, conditions)
            except Exception as error:  # noqa: BLE001  a compiler's errors are of all kinds; the row says what
                failures = {**rows[name].failures, mode: _explain(error, shape)}
                rows[name] = replace(rows[name], failures=failures)
        report(f"timing {len(runs)} networks, {mode}, {conditions.rounds} rounds")
        for name, timing in take_timings(runs, bases, conditions).items():
            rows[name] = replace(rows[name], timings={**rows[name].timings, mode: timing})
    return list(rows.values())


def _explain(error: Exception, shape: tuple[int, ...]) -> str:
    hint = "; try --batch 2" if shape[0] == 1 and lacks_statistics(error) else ""
    return get_first_line(error) + hint


def _count(entrant: Entrant, conditions: Conditions) -> Row:
    model, images = entrant.model, entrant.images
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            model(images)
        with torch.no_grad(), cast_maps(conditions), ByteCounter() as counter:
            model(images)
        peak = _measure_peak(make_run(model, images, "eager", conditions), images) if images.is_cuda else counter.peak
    except Exception as error:
        shape = tuple(images.shape)
        if is_out_of_memory(error):
            raise refuse_size(shape) from error
        line = get_first_line(error)
        raise ExampleError(f"{entrant.name} does not run on an input of shape {shape}: {line}") from error
    row = Row(
        entrant.name,
        entrant.base,
        parameters=sum(p.numel() for p in model.parameters()),
        flops=flops.get_total_flops() // len(images),
        bytes_moved=counter.count,
        bytes_training=None,
        bytes_saved=None,
        peak=peak,
        peak_training=None,
    )
    return _count_step(row, entrant, conditions) if entrant.trains else row


def _count_step(row: Row, entrant: Entrant, conditions: Conditions) -> Row:
    """Add what is counted of a training step, or the reason why there is none."""
    model, images = entrant.model, entrant.images
    try:
        with cast_maps(conditions):
            traffic = measure_traffic(copy.deepcopy(model), images)
        peak = traffic.peak
        if images.is_cuda:
            peak = _measure_peak(make_run(model, images, "training", conditions), images)
    except Exception as error:  # noqa: BLE001  a network may do anything in train mode; the row says what
        return replace(row, failures={COUNTED_STEP: _explain(error, tuple(images.shape))})
    return replace(row, bytes_training=traffic.training, bytes_saved=traffic.saved, peak_training=peak)


def _measure_peak(run: Callable[[], object], images: Tensor) -> int:
    torch.cuda.reset_peak_memory_stats(images.device)
    before = torch.cuda.memory_allocated(images.device)
    run()
    return int(torch.cuda.max_memory_allocated(images.device) - before)
