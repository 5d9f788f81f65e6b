"""Faithfulness: find out whether a traced graph does all that the traced code does, for every input.

Takes an owner and the recorded nodes, gives the reason where the graph would leave something out: a random draw, a
change of state, a switch of modes, a condition on the input. Leaves the owner as it was.
"""

from __future__ import annotations

import operator
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from se_inject.errors import TraceError
from se_inject.layouts import UNKNOWN, find_channel_dim, get_channel_dim
from se_inject.operations import is_map

CONSTANT = "_tensor_constant"
"""What torch.fx calls the tensors that code makes while it runs."""
SHAPE_READS = frozenset({"shape", "size"})
_FIXED_METHODS = frozenset({"dim", "ndimension", "is_floating_point"})


@contextmanager
def kept_random_state(*, refuse_draws: bool = False) -> Iterator[None]:
    """Leave the random states of Python, NumPy and torch as they were.

    Args:
        refuse_draws: Raise if one was drawn from: the graph would hold one outcome for ever.

    Raises:
        TraceError: A random number was drawn.
    """
    python, cpu = random.getstate(), torch.get_rng_state()
    numpy: Any = np.random.get_state()
    try:
        yield
        now: Any = np.random.get_state()
        drawn = python != random.getstate() or not torch.equal(cpu, torch.get_rng_state())
        if refuse_draws and (drawn or numpy[2] != now[2] or not np.array_equal(numpy[1], now[1])):
            raise TraceError("its code draws random numbers to decide what it does")
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


@contextmanager
def kept_attributes(owner: nn.Module) -> Iterator[None]:
    """Put an owner's own tensors and attributes back, and refuse code that changes them: a graph would not.

    Raises:
        TraceError: The code changed an attribute or a buffer other than by an operation that the graph holds.
    """
    attributes = {key: value for key, value in vars(owner).items() if key != "training"}
    contents = _copy_containers(attributes.values())
    versions = {id(t): t._version for t in _get_own_tensors(owner)}
    try:
        yield
        now = {k: v for k, v in vars(owner).items() if k != "training" and not k.startswith(CONSTANT)}
        same = now.keys() == attributes.keys() and all(now[key] is value for key, value in attributes.items())
        same = same and all(_holds_same(container, content) for container, content in contents)
        if not same or any(versions.get(id(t)) != t._version for t in _get_own_tensors(owner)):
            raise TraceError("its code changes an attribute or a buffer of its own")
    finally:
        for key in set(vars(owner)) - set(attributes) - {"training"}:
            del vars(owner)[key]
        vars(owner).update(attributes)
        for container, content in contents:
            _restore_container(container, content)


def watch_state(model: nn.Module) -> Callable[[], bool]:
    """Return a function that tells whether anything but numbers has changed since in what a model's modules hold."""
    contents = _copy_containers(vars(module) for module in model.modules())
    return lambda: not all(_holds_same(container, content) for container, content in contents)


def list_held(module: nn.Module) -> list[Tensor]:
    """List the tensors that a module, without those in it, has in its attributes, in containers and plain objects."""
    own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
    return list_inside([own])


def list_inside(values: Iterable[object]) -> list[Tensor]:
    """List the tensors in containers and plain objects."""
    contents = (content for _, content in _copy_containers(values))
    items = (content.values() if isinstance(content, dict) else content for content in contents)
    return [x for container in items for x in container if isinstance(x, Tensor)]


def get_modes() -> tuple[object, ...]:
    """Return the modes that code can switch for a part of itself: gradients, inference, autocast."""
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def find_condition(conditions: Iterable[fx.Node]) -> str:
    """Find a condition whose outcome can differ for another input; the number of channels is fixed."""
    asked = any(map(_follows_from_input, conditions))
    return "its code depends on the size or type of its input" if asked else ""


def reads_mode(conditions: Iterable[fx.Node]) -> bool:
    """Tell whether a condition follows from `self.training`."""
    waiting = list(conditions)
    while waiting:
        node = waiting.pop()
        if node.op == "get_attr" and node.target == "training":
            return True
        waiting += node.all_input_nodes
    return False


def is_cut(node: fx.Node) -> bool:
    """Tell whether a node cuts a tensor into as many parts as its size asks for, and not along its channels."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    cut: Any = node.args[0] if node.args else None
    if name not in ("unbind", "split", "chunk") or not isinstance(cut, fx.Node):
        return False
    rest = [*node.args[1:], *(value for key, value in node.kwargs.items() if key != "dim")]
    parts = None if name == "unbind" else rest.pop(0)
    dim = node.kwargs.get("dim", rest[0] if rest else 0)
    is_counted = isinstance(parts, int if name == "chunk" else (list, tuple))
    return not is_counted and not _is_channel_dim(cut.meta["value"], dim)


def find_odd_containers(value: object) -> Iterator[str]:
    """Name the containers in a result that the written code would return as another type."""
    if type(value) in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        for item in value:  # type: ignore[attr-defined]
            yield from find_odd_containers(item)
    elif type(value) is dict:
        for item in value.values():
            yield from find_odd_containers(item)
    elif isinstance(value, (list, tuple, dict, set, frozenset)):
        yield f"it returns a {type(value).__name__}"


def _follows_from_input(node: fx.Node) -> bool:
    if _is_channels(node):
        return False
    if isinstance(node.meta["value"], Tensor) or node.op == "placeholder":
        return True
    if node.target is getattr:
        return bool(node.args[1] != "ndim")
    if node.op == "call_method":  # an image may be handed as bytes, what comes after is of the layers' type
        source: Any = node.args[0]
        is_handed = node.target == "is_floating_point" and source.op == "placeholder"
        return is_handed or node.target not in _FIXED_METHODS
    return any(_follows_from_input(n) for n in node.all_input_nodes)


def _is_channels(node: fx.Node) -> bool:
    """Tell whether a node is the number of channels of a map (N, C, H, W): `x.shape[1]` or `x.size(1)`."""
    source: Any = None
    shape: Any = None
    dim: Any = None
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        shape, dim = node.args
        is_shape = shape.target is getattr and shape.args[1] == "shape"
        source = shape.args[0] if is_shape or (shape.op == "call_method" and shape.target == "size") else None
    elif node.op == "call_method" and node.target == "size" and len(node.args) == 2:
        source, dim = node.args
    return _is_channel_dim(source.meta["value"] if isinstance(source, fx.Node) else None, dim)


def _is_channel_dim(value: object, dim: object) -> bool:
    """Tell whether a dimension of a value is the channels of a map (N, C, H, W), whose number is fixed."""
    if not is_map(value) or not isinstance(dim, int) or (find_channel_dim(value) is None and value.ndim != 4):
        return False
    return dim % value.ndim == get_channel_dim(value) != UNKNOWN


def _get_own_tensors(owner: nn.Module) -> list[Tensor]:
    plain = (value for key, value in vars(owner).items() if not key.startswith(CONSTANT))
    held = (*owner._parameters.values(), *owner._buffers.values(), *plain)
    return [value for value in held if issubclass(type(value), Tensor)]


def _copy_containers(values: Iterable[object]) -> list[tuple[Any, Any]]:
    """Copy the containers among a module's attributes, and those in plain objects and containers that it holds."""
    found: dict[int, Any] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        is_store = not isinstance(value, (nn.Module, Tensor, ModuleType, type)) and not callable(value)
        content = getattr(value, "__dict__", value) if is_store else None
        if isinstance(content, (dict, list, deque, set)) and id(content) not in found:
            found[id(content)] = content
            waiting += content.values() if isinstance(content, dict) else content
    return [(container, _copy_container(container)) for container in found.values()]


def _copy_container(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


def _holds_same(container: Any, content: Any) -> bool:
    if isinstance(content, dict):
        return container.keys() == content.keys() and all(container[k] is v for k, v in content.items())
    return len(container) == len(content) and all(map(operator.is_, container, content))


def _restore_container(container: Any, content: Any) -> None:
    if not _holds_same(container, content):
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(content)
