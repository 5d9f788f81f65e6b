"""Timing: how long networks take, in rounds in which each runs once.

Takes networks and conditions, gives seconds. The order differs from round to round, so that a ratio of two networks
holds on a machine that other work makes faster and slower.
"""

from __future__ import annotations

import copy
import math
import operator
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from se_inject.errors import OptionError
from se_inject.traffic import add_up
from se_inject.twin import set_training

Mode = Literal["eager", "compiled", "graph", "training"]
"""Of running a network: as it is, through torch.compile, replayed as a CUDA graph; or a step forward and back."""
_WARM_UPS = 3
_SHORTEST = 1e-4
"""Milliseconds that no module is below, whatever the clock says."""


@dataclass(frozen=True)
class Conditions:
    """How networks are run.

    Attributes:
        batch_size: Images at once.
        input_size: Height and width of an image; that of the injection if None.
        rounds: How often each network is timed.
        compiled: Whether they are run through torch.compile too.
        training: Whether steps of training (forward and backward) are timed too.
        channels_last: Whether maps lie in memory with the channels last.
        precision: "fp32", or "bf16" for autocast.
        threads: Of the CPU; torch's choice if None.
        device: Where; on CUDA they are also replayed as graphs.
    """

    batch_size: int = 1
    input_size: int | None = None
    rounds: int = 20
    compiled: bool = True
    training: bool = False
    channels_last: bool = False
    precision: str = "fp32"
    threads: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check what no type can.

        Raises:
            OptionError: A value is out of range.
        """
        options = {
            "--batch": self.batch_size,
            "--input-size": self.input_size,
            "--rounds": self.rounds,
            "--threads": self.threads,
        }
        for option, value in options.items():
            if value is not None and value < 1:
                raise OptionError(f"{option} is {value}; expected at least 1")
        if self.precision not in ("fp32", "bf16"):
            raise OptionError(f"--precision is {self.precision!r}; expected fp32 or bf16")

    def list_modes(self) -> list[Mode]:
        """List the ways of running."""
        is_cuda = torch.device(self.device).type == "cuda"
        wanted: dict[Mode, bool] = {
            "eager": True,
            "compiled": self.compiled,
            "graph": is_cuda,
            "training": self.training,
        }
        return [mode for mode, is_wanted in wanted.items() if is_wanted]


@dataclass(frozen=True)
class Timing:
    """How long a network takes for a batch.

    Attributes:
        p50: The median, in milliseconds.
        p95: What one batch in twenty takes longer than, in milliseconds.
        images_per_second: By the median.
        ratio: The median over rounds of the time in relation to the base's of the same round; None if that did not run.
    """

    p50: float
    p95: float
    images_per_second: float
    ratio: float | None


def compare_times(networks: Mapping[str, nn.Module], images: Tensor, *, rounds: int) -> dict[str, float]:
    """Time an evaluation of some networks in turns.

    Args:
        networks: By name, on the images' device.
        images: (N, C, H, W).
        rounds: How often each is timed.

    Returns:
        The median seconds of each.
    """
    conditions = Conditions(len(images), rounds=rounds, compiled=False, device=str(images.device))
    with ExitStack() as stack:
        for model in networks.values():
            stack.enter_context(set_training(model, False))
        runs = {name: make_run(model, images, "eager", conditions) for name, model in networks.items()}
        return {name: statistics.median(seconds) for name, seconds in _take_times(runs, conditions).items()}


def time_blocks(
    model: nn.Module, blocks: Mapping[str, nn.Module], images: Tensor, *, rounds: int = 20
) -> dict[str, float]:
    """Time modules where they stand, in evaluations of the network that holds them.

    Args:
        model: On the images' device.
        blocks: Modules of it, by name.
        images: (N, C, H, W).
        rounds: How often.

    Returns:
        The median milliseconds that each takes in an evaluation, beyond a sum that it computes in the network's place.
    """
    spans: dict[str, list[float]] = {name: [] for name in blocks}
    begun: dict[str, float] = {}

    def begin(name: str) -> None:
        begun[name] = _read_clock(images)

    def end(name: str, maps: tuple[Tensor, ...], shortcut: Tensor | None = None) -> None:
        ended = _read_clock(images)
        totals[name] += ended - begun[name]
        if shortcut is not None:
            torch.add(maps[0], shortcut)
            totals[name] -= _read_clock(images) - ended

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(set_training(model, False))
        for name, block in blocks.items():
            stack.callback(block.register_forward_pre_hook(lambda *_, name=name: begin(name)).remove)
            hook = block.register_forward_hook(
                lambda _, args, kwargs, _output, name=name: end(name, args, **kwargs), with_kwargs=True
            )
            stack.callback(hook.remove)
        for i in range(_WARM_UPS + rounds):
            totals = dict.fromkeys(blocks, 0.0)
            model(images)
            for name, total in totals.items() if i >= _WARM_UPS else ():
                spans[name].append(1000 * total)
    return {name: max(_SHORTEST, statistics.median(values)) for name, values in spans.items()}


def _read_clock(images: Tensor) -> float:
    """Read the clock, in seconds, once the device has done what it was given."""
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter()


def cast_maps(conditions: Conditions) -> Any:
    """Make the context in which a network runs: autocast, or nothing."""
    if conditions.precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(conditions.device).type, torch.bfloat16)


def make_run(model: nn.Module, images: Tensor, mode: Mode, conditions: Conditions) -> Callable[[], object]:
    """Make a function that runs a network once, and warm it up.

    Args:
        model: On the images' device.
        images: (N, C, H, W).
        mode: In which way.
        conditions: Under which.
    """
    called = _compile(model) if mode == "compiled" else model
    if mode == "training":
        return _make_step(copy.deepcopy(model), images, conditions)

    def run() -> object:
        with torch.no_grad(), cast_maps(conditions):
            return called(images)

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # noqa: SLF001  as torch documents it
        for _ in range(_WARM_UPS):
            run()
    if mode != "graph":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _compile(model: nn.Module) -> Callable[[Tensor], object]:
    """Compile a network by itself.

    torch keeps what it compiles with the code, which all networks of a class share: each run looks through what the
    others left there, and after eight of them torch runs the rest uncompiled, with a warning.
    """

    def call(images: Tensor) -> object:
        return model(images)

    call.__code__ = call.__code__.replace(co_name=f"call_{id(model)}")
    return torch.compile(call)


def _make_step(model: nn.Module, images: Tensor, conditions: Conditions) -> Callable[[], object]:
    model.train()

    def run() -> None:
        with cast_maps(conditions):
            loss = add_up(model(images))
        loss.backward()  # type: ignore[no-untyped-call]  # torch
        model.zero_grad()

    for _ in range(_WARM_UPS):
        run()
    return run


def take_timings(
    runs: Mapping[str, Callable[[], object]], bases: Mapping[str, str], conditions: Conditions
) -> dict[str, Timing]:
    """Time what `make_run` made, in rounds.

    Args:
        runs: By name.
        bases: The name of what each is compared to, by name.
        conditions: Under which they were made.
    """
    seconds = _take_times(runs, conditions)
    return {
        name: summarise_times(own, seconds.get(bases[name]), conditions.batch_size) for name, own in seconds.items()
    }


def _take_times(runs: Mapping[str, Callable[[], object]], conditions: Conditions) -> dict[str, list[float]]:
    """Take the seconds of each run, in rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(conditions.rounds):
        for name in _rotate(list(runs), i):
            seconds[name].append(_run_once(runs[name], conditions.device))
    return seconds


def _rotate(names: list[str], by: int) -> Iterable[str]:
    """Each network comes at each place, and not always after the same one."""
    start = by % max(1, len(names))
    order = names[start:] + names[:start]
    return order if (by // max(1, len(names))) % 2 == 0 else reversed(order)


def _run_once(run: Callable[[], object], device: str) -> float:
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if is_cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def summarise_times(own: Sequence[float], base: Sequence[float] | None, num_images: int) -> Timing:
    """Summarise the seconds that a network took.

    Args:
        own: Of each round.
        base: Those of what it is compared to, in the same rounds; None if that did not run.
        num_images: Of a batch.
    """
    median = statistics.median(own)
    return Timing(
        p50=1000 * median,
        p95=1000 * sorted(own)[math.ceil(len(own) * 19 / 20) - 1],
        images_per_second=num_images / median,
        ratio=statistics.median(map(operator.truediv, own, base)) if base else None,
    )
