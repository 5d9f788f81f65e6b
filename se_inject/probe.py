"""Probe: find out what each module is called with, without computing anything.

Takes a model and an example input, gives the calls and the merges of one forward pass a mode. The pass runs over fake
tensors (shapes without storage) through a fake twin of the model, so the model itself is never run, changed or copied
in memory.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_map

from se_inject.calls import METHODS, Call, Entry
from se_inject.errors import ExampleError, get_first_line
from se_inject.examples import describe_shapes, list_calls
from se_inject.faithful import kept_random_state, watch_state
from se_inject.fakes import FakeMode
from se_inject.instructions import lists_children
from se_inject.layouts import find_channel_dim, set_channel_dim
from se_inject.operations import LayerCall, MergeCall, Watch, count_positions, is_map
from se_inject.twin import Twin, apart, check_model, get_device, make_twin, set_training

# What a forward raises over fake tensors where it asks for values.
DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass
class Visit:
    """What the probe saw of an entry: its calls, and the merges that ran in its own code (not in its children's)."""

    calls: list[Call] = field(default_factory=list)
    merges: list[MergeCall] = field(default_factory=list)


@dataclass(frozen=True)
class LayerVisit:
    """A layer that ran.

    Attributes:
        entry: The method in whose own code it ran.
        index: Its place among the layers of this code.
        call: What it did.
        block: The outermost module that was handed a map of the resolution of the layer's input, and so is where a
            stage of the network begins; None if the layer's input was made in the entry's own code.
    """

    entry: Entry
    index: int
    call: LayerCall
    block: Entry | None


@dataclass(frozen=True)
class Probe:
    """The result of a probe.

    Attributes:
        twin: A fake twin, for the modules' code; it holds nothing that a run left behind.
        visits: What was seen of each entry, in the order in which they were first called.
        layers: The layers that ran in eval mode, in their order.
    """

    twin: Twin
    visits: dict[Entry, Visit]
    layers: list[LayerVisit]


def probe_model(model: nn.Module, *, example: object = None) -> Probe:
    """Run a network once in eval and once in train mode over fake tensors, and record every call.

    Hooks that the user registered run too, on fake tensors. A network whose course depends on its data, as detection's
    does, is copied and run once on real zeros instead.

    Args:
        model: The network; it is neither run nor changed.
        example: See `list_calls`.

    Raises:
        ModelError: The model cannot be copied.
        ExampleError: The network does not run on the example, or on none of the usual sizes.
    """
    check_model(model)
    twin = make_twin(model)
    is_changed = watch_state(twin.model)
    tries = list_calls(twin, example)
    failures: list[tuple[Call, Exception]] = []
    for call in tries:
        visits: dict[Entry, Visit] = {}
        try:
            layers = _run(twin, call, visits, training=False)
        except DATA_DEPENDENT:
            visits, layers = _run_real(model, call, twin.mode)
        except Exception as error:  # noqa: BLE001  whatever the user's forward raises means: not this input
            failures.append((call, error))
            continue
        _visit_training(twin, call, visits)
        # A twin that ran may hold what its forward left behind, such as a cache; the code is read from a fresh one.
        return Probe(make_twin(model, twin.mode) if is_changed() else twin, visits, layers)
    hint = "give example= (--input-size) with the shape that it is trained on"
    if not failures:
        raise ExampleError(f"{type(model).__name__} has no convolution to tell its input channels; {hint}")
    first, reason = failures[0]
    message = (
        f"{type(model).__name__} does not run on an input of {describe_shapes(first)}: {get_first_line(reason)}; {hint}"
    )
    raise ExampleError(message) from reason


def _run_real(model: nn.Module, call: Call, mode: FakeMode) -> tuple[dict[Entry, Visit], list[LayerVisit]]:
    """Run a copy of a network whose course depends on its data, as detection's does, on real zeros.

    What its modules are called with is made fake afterwards.

    Raises:
        ExampleError: It does not run on them either.
    """
    twin = Twin(copy.deepcopy(model), mode)

    def make_fake(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        return set_channel_dim(mode.from_tensor(x.detach(), static_shapes=True), find_channel_dim(x))

    visits: dict[Entry, Visit] = {}
    try:
        layers = _run(twin, make_zeros(call, model), visits, training=False, is_fake=False)
    except Exception as error:
        message = f"{type(model).__name__} does not run on an input of {describe_shapes(call)}: {get_first_line(error)}"
        raise ExampleError(f"{message}; give example= with one that it runs on") from error
    for visit in visits.values():
        visit.calls = [Call(*tree_map(make_fake, (c.args, c.kwargs))) for c in visit.calls]
    return visits, layers


def make_zeros(call: Call, model: nn.Module) -> Call:
    """Make a call with real zeros of a call's shapes, on a model's device."""

    def make(x: object) -> object:
        return torch.zeros(x.shape, dtype=x.dtype, device=get_device(model)) if isinstance(x, Tensor) else x

    return Call(*tree_map(make, (call.args, call.kwargs)))


def _visit_training(twin: Twin, call: Call, visits: dict[Entry, Visit]) -> None:
    # Modules and merges that run in train mode alone, auxiliary heads for one. A network that needs targets in train
    # mode stops somewhere on the way; what it called until then counts.
    training: dict[Entry, Visit] = {}
    with suppress(Exception):
        _run(twin, call, training, training=True)
    for entry, visit in training.items():
        seen = visits.setdefault(entry, visit)
        seen.merges = seen.merges or visit.merges


def _run(
    twin: Twin, call: Call, visits: dict[Entry, Visit], *, training: bool, is_fake: bool = True
) -> list[LayerVisit]:
    recorder = _Recorder(visits)
    recorder.attach(twin.model)
    try:
        mode = twin.mode if is_fake else nullcontext()
        with (
            set_training(twin.model, training),
            apart(twin.model),
            kept_random_state(),
            mode,
            torch.set_grad_enabled(training),
        ):
            args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (call.args, call.kwargs))
            with Watch(recorder.note):
                twin.model(*args, **kwargs)
    finally:
        recorder.detach()
    return recorder.layers


@dataclass
class _Frame:
    """A call that is being executed."""

    entry: Entry
    positions: int
    """Number of positions of the map that it was handed first; 0 if that is no map on which a layer has worked."""
    num_layers: int = 0


class _Recorder:
    """Hooks on a twin that note each call, with the entry that is being executed on top of a stack."""

    def __init__(self, visits: dict[Entry, Visit]) -> None:
        self._visits = visits
        self.layers: list[LayerVisit] = []
        self._stack: list[_Frame] = []
        self._listing: dict[tuple[type, str], bool] = {}
        self._undo: list[Callable[[], object]] = []

    def attach(self, model: nn.Module) -> None:
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it has no hooks with keywords, and what it runs is not seen
            before = functools.partial(self._enter_module, Entry(path))
            self._undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            self._undo.append(module.register_forward_hook(self._leave, always_call=True).remove)
            for method in METHODS[1:]:
                if callable(getattr(type(module), method, None)):
                    self._wrap(module, Entry(path, method))

    def detach(self) -> None:
        for undo in self._undo:
            undo()

    def note(self, call: MergeCall | LayerCall) -> None:
        if not self._stack:
            return  # a hook of the root runs before any entry
        if isinstance(call, MergeCall):
            self._visits[self._stack[-1].entry].merges.append(call)
        else:
            frame = self._stack[-1]
            blocks = (f.entry for f in self._stack if f.positions == call.positions)
            self.layers.append(LayerVisit(frame.entry, frame.num_layers, call, next(blocks, None)))
            frame.num_layers += 1

    def _enter(self, entry: Entry, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stack.append(_Frame(entry, self._count_input(entry, module, args)))
        call = Call(*tree_map(lambda x: x, (args, kwargs)))  # containers are copied: a network may change them
        self._visits.setdefault(entry, Visit()).calls.append(call)

    def _count_input(self, entry: Entry, module: nn.Module, args: tuple[Any, ...]) -> int:
        if not (args and is_map(args[0]) and find_channel_dim(args[0]) is not None):
            return 0
        key = type(module), entry.method
        if key not in self._listing:
            self._listing[key] = lists_children(*key)  # it would run a block as a layer
        return 0 if self._listing[key] else count_positions(args[0])

    def _enter_module(self, entry: Entry, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._enter(entry, module, args, kwargs)

    def _leave(self, *_: object) -> None:
        self._stack.pop()

    def _wrap(self, module: nn.Module, entry: Entry) -> None:
        method = getattr(module, entry.method)

        def run(*args: Any, **kwargs: Any) -> Any:
            self._enter(entry, module, args, kwargs)
            try:
                return method(*args, **kwargs)
            finally:
                self._leave()

        setattr(module, entry.method, run)
        self._undo.append(lambda: delattr(module, entry.method))
