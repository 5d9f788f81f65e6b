"""Speed: what SE costs in time and memory, beside the plain network and beside a peer, in one run.

Takes networks and a setting, gives what was counted and what was timed. Times are taken in rounds in which each network
runs once, in another order each time, so that a ratio holds on a machine that other work makes faster and slower.
"""

from __future__ import annotations

import copy
import operator
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from se_inject.calls import Entry, decode_call
from se_inject.ejection import eject
from se_inject.errors import ExampleError, OptionError
from se_inject.optimization import optimize
from se_inject.rewrite import find_plan, get_plan, inject
from se_inject.traffic import ByteCounter, add_up, measure_traffic
from se_inject.twin import get_first_line, make_twin, set_training

Mode = Literal["eager", "compiled", "graph", "training"]
"""Of running a network: as it is, through torch.compile, replayed as a CUDA graph; or a step forward and back."""
PLAIN, PLAIN_OPTIMIZED = "plain", "plain, optimized"
_WARM_UPS = 3


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
        for name in ("batch_size", "input_size", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is {value}; expected at least 1")
        if self.precision not in ("fp32", "bf16"):
            raise OptionError(f"precision is {self.precision!r}; expected fp32 or bf16")

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
        ratio: The median over rounds of the time in relation to the plain network's of the same round; None if that
            did not run.
    """

    p50: float
    p95: float
    images_per_second: float
    ratio: float | None


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
        EmptyPlanError: It has no place for a block.
        ExampleError: A network does not run on the input.
    """
    injected = inject(network, **(options or {})) if find_plan(network) is None else network
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
                runs[name] = _make_run(model, images, mode, conditions)
            except Exception as error:  # noqa: BLE001  a compiler's errors are of all kinds; the row says what
                failures[name][mode] = get_first_line(error)
        report(f"timing {len(runs)} networks, {mode}, {conditions.rounds} rounds")
        for name, timing in _time(runs, conditions).items():
            timings[name][mode] = timing
    return [Row(name, **counted[name], timings=timings[name], failures=failures[name]) for name in models]


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
        runs = {name: _make_run(model, images, "eager", conditions) for name, model in networks.items()}
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
        The median milliseconds that each takes in an evaluation.
    """
    spans: dict[str, list[float]] = {name: [] for name in blocks}
    begun: dict[str, float] = {}

    def begin(name: str) -> None:
        begun[name] = _read_clock(images)

    def end(name: str) -> None:
        totals[name] += _read_clock(images) - begun[name]

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(set_training(model, False))
        for name, block in blocks.items():
            stack.callback(block.register_forward_pre_hook(lambda *_, name=name: begin(name)).remove)
            stack.callback(block.register_forward_hook(lambda *_, name=name: end(name)).remove)
        for i in range(_WARM_UPS + rounds):
            totals = dict.fromkeys(blocks, 0.0)
            model(images)
            for name, total in totals.items() if i >= _WARM_UPS else ():
                spans[name].append(1000 * total)
    return {name: statistics.median(values) for name, values in spans.items()}


def _read_clock(images: Tensor) -> float:
    """Read the clock, in seconds, once the device has done what it was given."""
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter()


def get_base(name: str) -> str:
    """Return the name of the row that a row is compared to."""
    return PLAIN_OPTIMIZED if name.endswith("optimized") else PLAIN


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
    with torch.no_grad(), _casting(conditions), ByteCounter() as counter:
        model(images)
    traffic, peak, peak_training = None, counter.peak, None
    if trains:
        with _casting(conditions):
            traffic = measure_traffic(copy.deepcopy(model), images)
        peak_training = traffic.peak
    if images.is_cuda:
        peak = _measure_peak(_make_run(model, images, "eager", conditions), images)
        if trains:
            peak_training = _measure_peak(_make_run(model, images, "training", conditions), images)
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


def _casting(conditions: Conditions) -> Any:
    if conditions.precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(conditions.device).type, torch.bfloat16)


def _make_run(model: nn.Module, images: Tensor, mode: Mode, conditions: Conditions) -> Callable[[], object]:
    called = torch.compile(model) if mode == "compiled" else model
    if mode == "training":
        return _make_step(copy.deepcopy(model), images, conditions)

    def run() -> object:
        with torch.no_grad(), _casting(conditions):
            return called(images)

    for _ in range(_WARM_UPS):
        run()
    if mode != "graph":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _make_step(model: nn.Module, images: Tensor, conditions: Conditions) -> Callable[[], object]:
    model.train()

    def run() -> None:
        with _casting(conditions):
            loss = add_up(model(images))
        loss.backward()  # type: ignore[no-untyped-call]  # torch
        model.zero_grad()

    for _ in range(_WARM_UPS):
        run()
    return run


def _time(runs: Mapping[str, Callable[[], object]], conditions: Conditions) -> dict[str, Timing]:
    seconds = _take_times(runs, conditions)
    return {name: _summarise(name, seconds, conditions.batch_size) for name in runs}


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


def _summarise(name: str, seconds: Mapping[str, list[float]], num_images: int) -> Timing:
    own = seconds[name]
    base = seconds.get(get_base(name))
    median = statistics.median(own)
    return Timing(
        p50=1000 * median,
        p95=1000 * sorted(own)[min(len(own) - 1, int(0.95 * len(own)))],
        images_per_second=num_images / median,
        ratio=statistics.median(map(operator.truediv, own, base)) if base else None,
    )
