"""Probe: find out what each module is called with, without computing anything.

Takes a model and an example input, gives the calls and the merges of one forward pass a mode. The pass runs over fake
tensors (shapes without storage) through a fake twin of the model, so the model itself is never run, changed or copied
in memory.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_leaves, tree_map

from se_inject.block import SqueezeExcite
from se_inject.errors import ExampleError, ModelError
from se_inject.faithful import kept_random_state
from se_inject.operations import MergeCall, Watch

METHODS = ("forward", "forward_features")
"""Methods that are entered from outside and so are rewritten on their own (timm's networks have both)."""

# By the number of spatial dimensions: lengths (audio, ECG), images, and clips or volumes.
_USUAL_SIZES: dict[int, list[tuple[int, ...]]] = {
    1: [(n,) for n in (1024, 4096, 16000, 5000, 256, 128)],
    2: [(n, n) for n in (224, 32, 64, 128, 256, 299, 384, 512, 28)],
    3: [(16, 112, 112), (8, 64, 64), (32, 32, 32), (64, 64, 64), (16, 224, 224)],
}


@dataclass(frozen=True)
class Entry:
    """A method of a module: the place in the code where a merge is written."""

    path: str
    method: str = "forward"

    @property
    def key(self) -> str:
        """Name of the entry in a plan's calls."""
        return f"{self.path}:{self.method}"

    def __str__(self) -> str:
        path = self.path or "(root)"
        return path if self.method == "forward" else f"{path}.{self.method}()"


@dataclass(frozen=True)
class Call:
    """The arguments of one call; tensors are fake."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Visit:
    """What the probe saw of an entry: its calls, and the merges that ran in its own code (not in its children's)."""

    calls: list[Call] = field(default_factory=list)
    merges: list[MergeCall] = field(default_factory=list)


@dataclass(frozen=True)
class Twin:
    """A copy of a model whose tensors are fake, and the mode that they live in."""

    model: nn.Module
    mode: FakeTensorMode

    def make_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make a fake tensor on the model's device."""
        with self.mode:
            return torch.empty(tuple(shape), dtype=dtype, device=get_device(self.model))


@dataclass(frozen=True)
class Probe:
    """The result of a probe.

    Attributes:
        twin: A fake twin, for the modules' code; it has not been run.
        visits: What was seen of each entry, in the order in which they were first called.
        example: What the network was called with.
    """

    twin: Twin
    visits: dict[Entry, Visit]
    example: Call


def get_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer (the CPU if it has none)."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def get_dtype(model: nn.Module) -> torch.dtype:
    """Return the type of the model's first floating point parameter (torch's default if it has none)."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be changed from inside.

    Raises:
        ModelError: The model is no module, or is wrapped, compiled, scripted, quantised or injected already.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"found a {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ModelError(f"the model is wrapped in {type(model).__name__}; inject first (model.module), wrap after")
    for path, module in model.named_modules():
        where = path or "the model"
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule) and not path:
            raise ModelError("the model is scripted (TorchScript); inject first, script after")
        if kind.__module__.startswith("torch._dynamo") or module._compiled_call_impl is not None:
            raise ModelError(f"{where} is compiled; inject first (the model before torch.compile), compile after")
        # A FloatFunctional stands in float networks that are to be quantised later, torchvision's quantizable ones.
        if "quantized" in kind.__module__.split(".") and kind.__name__ != "FloatFunctional":
            raise ModelError(f"{where} is quantised ({kind.__name__}); inject first, quantise after")
        if isinstance(vars(module).get("forward"), types.FunctionType):
            raise ModelError(
                f"{where} has a function as its forward, which a copy would share; make it a method of a class"
            )
        if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
            raise ModelError(f"{where} is a lazy layer without weights; run the network once first")
        if hasattr(kind, "_se_inject_code") or isinstance(module, SqueezeExcite):
            raise ModelError(f"the model is injected already ({where}); inject into the original network")


def make_twin(model: nn.Module, mode: FakeTensorMode | None = None) -> Twin:
    """Copy a model with all its tensors replaced by fake ones, which take no memory.

    Args:
        model: The network; it is neither run nor changed.
        mode: The mode to make the tensors in; a new one if None.

    Raises:
        ModelError: The model holds something that cannot be copied.
    """
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    tensors = {id(t): t for m in model.modules() for t in _get_own_tensors(m)}
    memo: dict[int, Any] = {}
    try:
        for key, tensor in tensors.items():
            fake = mode.from_tensor(tensor.detach(), static_shapes=True)
            memo[key] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        return Twin(copy.deepcopy(model, memo), mode)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        message = f"{type(model).__name__} cannot be copied ({_first_line(error)}); it must work with copy.deepcopy"
        raise ModelError(message) from error


def probe_model(model: nn.Module, *, example: object = None) -> Probe:
    """Run a network once in eval and once in train mode over fake tensors, and record every call.

    Hooks that the user registered run too, on fake tensors.

    Args:
        model: The network; it is neither run nor changed.
        example: An input (N, C, H, W), a tuple of positional arguments, a dict of keyword arguments, or None to find
            one: from the configuration that timm's networks carry, or by trying usual sizes.

    Raises:
        ModelError: The model cannot be copied.
        ExampleError: The network does not run on the example, or on none of the usual sizes.
    """
    check_model(model)
    twin = make_twin(model)
    tries = [_fake_example(twin, example)] if example is not None else list(_propose_examples(twin))
    failures: list[tuple[Call, Exception]] = []
    for call in tries:
        visits: dict[Entry, Visit] = {}
        try:
            _run(twin, call, visits, training=False)
        except Exception as error:  # noqa: BLE001  whatever the user's forward raises means: not this input
            failures.append((call, error))
            continue
        _visit_training(twin, call, visits)
        # The twin that ran may hold what its forward left behind, such as a cache; the code is read from a fresh one.
        return Probe(make_twin(model, twin.mode), visits, call)
    hint = "give example= with the shape that it is trained on"
    if not failures:
        raise ExampleError(f"{type(model).__name__} has no convolution to tell its input channels; {hint}")
    first, reason = failures[0]
    message = f"{type(model).__name__} does not run on an input of {_describe(first)}: {_first_line(reason)}; {hint}"
    raise ExampleError(message) from reason


def _visit_training(twin: Twin, call: Call, visits: dict[Entry, Visit]) -> None:
    # Modules and merges that run in train mode alone, auxiliary heads for one. A network that needs targets in train
    # mode stops somewhere on the way; what it called until then counts.
    training: dict[Entry, Visit] = {}
    with suppress(Exception):
        _run(twin, call, training, training=True)
    for entry, visit in training.items():
        seen = visits.setdefault(entry, visit)
        seen.merges = seen.merges or visit.merges


def _run(twin: Twin, call: Call, visits: dict[Entry, Visit], *, training: bool) -> None:
    recorder = _Recorder(visits)
    recorder.attach(twin.model)
    try:
        with set_training(twin.model, training), kept_random_state(), twin.mode, torch.set_grad_enabled(training):
            args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (call.args, call.kwargs))
            with Watch(recorder.note_merge):
                twin.model(*args, **kwargs)
    finally:
        recorder.detach()


@contextmanager
def set_training(model: nn.Module, training: bool) -> Iterator[None]:  # noqa: FBT001
    """Put a whole model in train or eval mode, and every module back as it was afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


class _Recorder:
    """Hooks on a twin that note each call, with the entry that is being executed on top of a stack."""

    def __init__(self, visits: dict[Entry, Visit]) -> None:
        self._visits = visits
        self._stack: list[Entry] = []
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

    def note_merge(self, merge: MergeCall) -> None:
        if self._stack:  # a hook of the root runs before any entry
            self._visits[self._stack[-1]].merges.append(merge)

    def _enter(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stack.append(entry)
        call = Call(*tree_map(lambda x: x, (args, kwargs)))  # containers are copied: a network may change them
        self._visits.setdefault(entry, Visit()).calls.append(call)

    def _enter_module(self, entry: Entry, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._enter(entry, args, kwargs)

    def _leave(self, *_: object) -> None:
        self._stack.pop()

    def _wrap(self, module: nn.Module, entry: Entry) -> None:
        method = getattr(module, entry.method)

        def run(*args: Any, **kwargs: Any) -> Any:
            self._enter(entry, args, kwargs)
            try:
                return method(*args, **kwargs)
            finally:
                self._leave()

        setattr(module, entry.method, run)
        self._undo.append(lambda: delattr(module, entry.method))


def _get_own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None)
    yield from (v for v in vars(module).values() if isinstance(v, Tensor))


def _fake_example(twin: Twin, example: object) -> Call:
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    args = example if isinstance(example, tuple) else () if kwargs else (example,)
    leaves = tree_leaves((args, kwargs))
    if not any(isinstance(x, Tensor) for x in leaves):
        raise ExampleError(
            f"example= is a {type(example).__name__} without a tensor; give an input (N, C, H, W) or a tuple"
        )

    def fake(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        # A batch of one breaks batch norm on 1 x 1 maps in train mode, and hides which tensors differ between images.
        shape = (2, *x.shape[1:]) if len(leaves) == 1 and x.ndim > 1 and x.shape[0] == 1 else x.shape
        return twin.make_tensor(shape, get_dtype(twin.model) if x.is_floating_point() else x.dtype)

    return Call(*tree_map(fake, (args, kwargs)))


def _propose_examples(twin: Twin) -> Iterator[Call]:
    stem = next((m for m in twin.model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    if stem is None:
        return
    config = getattr(twin.model, "pretrained_cfg", None) or getattr(twin.model, "default_cfg", None)
    known = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
    sizes: list[tuple[int, ...]] = list(_USUAL_SIZES[len(stem.kernel_size)])
    channels = [stem.in_channels]
    if known is not None:
        sizes.insert(0, tuple(known[1:]))
        channels.append(known[0])  # the first convolution sees more where a network folds space into channels
    for size in dict.fromkeys(sizes):
        for num in dict.fromkeys((*channels, 3, 1)):
            yield Call((twin.make_tensor((2, num, *size), get_dtype(twin.model)),), {})


def _describe(call: Call) -> str:
    leaves = tree_leaves((call.args, call.kwargs))
    return "shape " + ", ".join(str(tuple(x.shape)) for x in leaves if isinstance(x, Tensor))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
