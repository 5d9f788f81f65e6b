"""Twins: copies of a model whose tensors are fake, and questions about a model that need no run.

Takes a model, gives a `Twin` that behaves like it over shapes alone, or refuses the model. Never changes or runs it.
"""

from __future__ import annotations

import copy
import gc
import logging
import threading
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from se_inject.block import is_block
from se_inject.caches import kept_caches
from se_inject.errors import ModelError, get_first_line
from se_inject.fakes import FakeMode
from se_inject.interception import intercepting
from se_inject.marks import check_kind

_ALONE = threading.RLock()


@dataclass(frozen=True)
class Twin:
    """A copy of a model whose tensors are fake, and the mode that they live in."""

    model: nn.Module
    mode: FakeMode
    differences: dict[object, str] = field(default_factory=dict, compare=False)
    """In what written methods were found to differ from those of its modules."""

    def make_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make a fake tensor on the model's device."""
        with self.mode:
            return torch.empty(tuple(shape), dtype=dtype, device=get_device(self.model))


@contextmanager
def alone() -> Iterator[None]:
    """Let one thread at a time look at a network's code, or write code.

    Loggers, random states and what torch.fx replaces while it traces are those of all threads, and Python 3.11 fails
    where two threads use `ast` at once. Meanwhile Python's collector rests: to go over all objects, of which there are
    some 400,000 with torch and timm, takes a quarter of a second, and what is made in here would send it off.
    """
    with _ALONE, intercepting():
        is_collecting = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if is_collecting:
                gc.enable()


@contextmanager
def apart(model: nn.Module, *, refuse_traced: bool = False) -> Iterator[None]:
    """Let a twin run, and leave nothing of it outside: neither in the log, nor in what its code shares with the model.

    Of each input that a network does not run on torch logs a traceback; the error is reported once.

    Args:
        model: The twin's, or a copy of the network.
        refuse_traced: Raise if what was traced was kept in such a place; see `kept_caches`.

    Raises:
        TraceError: It was.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    with alone(), kept_caches(model, refuse_traced=refuse_traced):
        is_disabled = logger.disabled
        logger.disabled = True
        try:
            yield
        finally:
            logger.disabled = is_disabled


def get_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer (the CPU if it has none)."""
    return next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def get_dtype(model: nn.Module) -> torch.dtype:
    """Return the type of the model's first floating point parameter (torch's default if it has none)."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be changed from inside.

    Raises:
        ModelError: The model is no module, or is wrapped, compiled, scripted, quantised or injected already.
    """
    check_kind(model)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ModelError(f"the model is wrapped in {type(model).__name__}; inject first (model.module), wrap after")
    if any(type(x).__name__ == "DTensor" for x in model.parameters()):
        raise ModelError("the model's parameters are sharded (DTensor); inject first, shard after")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("the model is scripted (TorchScript); inject first, trace or export after")
    for path, module in model.named_modules():
        _check_module(module, path or "the model")


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is one of `torch.compile`'s, or was compiled in place."""
    return type(module).__module__.startswith("torch._dynamo") or module._compiled_call_impl is not None


def _check_module(module: nn.Module, where: str) -> None:
    kind = type(module)
    if is_compiled(module):
        raise ModelError(f"{where} is compiled; inject first (the model before torch.compile), compile after")
    # A FloatFunctional stands in float networks that are to be quantised later, torchvision's quantizable ones.
    if "quantized" in kind.__module__.split(".") and kind.__name__ != "FloatFunctional":
        raise ModelError(f"{where} is quantised ({kind.__name__}); inject first, quantise after")
    # Each time that the mode is changed, it takes a graph that it keeps, and which an injection would not reach.
    if any(base.__name__ == "DualGraphModule" for base in kind.__mro__):
        raise ModelError(f"{where} is a feature extractor of torchvision's; inject first, make one of the result after")
    if isinstance(vars(module).get("forward"), types.FunctionType):
        raise ModelError(
            f"{where} has a function as its forward, which a copy would share; make it a method of a class"
        )
    if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
        raise ModelError(f"{where} is a lazy layer without weights; run the network once first")
    if hasattr(kind, "_se_inject_code") or is_block(module):
        raise ModelError(f"the model is injected already ({where}); inject into the original network")


def make_twin(model: nn.Module, mode: FakeMode | None = None) -> Twin:
    """Copy a model with all its tensors replaced by fake ones, which take no memory.

    Args:
        model: The network; it is neither run nor changed.
        mode: The mode to make the tensors in; a new one if None.

    Raises:
        ModelError: The model holds something that cannot be copied.
    """
    mode = mode or FakeMode(allow_non_fake_inputs=True)
    tensors = {id(t): t for m in model.modules() for t in _get_own_tensors(m)}
    memo: dict[int, Any] = {}
    try:
        for key, tensor in tensors.items():
            fake = mode.from_tensor(tensor.detach(), static_shapes=True)
            memo[key] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        return Twin(copy.deepcopy(model, memo), mode)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, AssertionError) as error:
        message = f"{type(model).__name__} cannot be copied ({get_first_line(error)}); it must work with copy.deepcopy"
        raise ModelError(message) from error


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


def _get_own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None)
    yield from (v for v in vars(module).values() if isinstance(v, Tensor))
