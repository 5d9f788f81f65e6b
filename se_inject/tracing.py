"""Tracing: turn the forward of one module into a small torch.fx graph.

Takes a module of the fake twin and a call that the probe recorded, gives a graph in which every child is a leaf and
every node carries the value (a fake tensor) and the work (layers, merges) that it stood for. Never changes a model.
"""

from __future__ import annotations

import functools
import inspect
import operator
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from se_inject.calls import METHODS, Call, Entry
from se_inject.errors import TraceError, get_first_line
from se_inject.faithful import (
    CONSTANT,
    SHAPE_READS,
    find_condition,
    kept_attributes,
    kept_random_state,
    reads_mode,
)
from se_inject.instructions import (
    asks_identity,
    asks_identity_of_local,
    find_class_read,
    find_global_write,
    find_handler,
    find_mode_read,
)
from se_inject.interception import intercepted
from se_inject.readings import fix_numbers
from se_inject.recording import ShallowTracer
from se_inject.twin import Twin, apart, set_training

_QUESTIONS = (
    "is_grad_enabled",
    "is_inference_mode_enabled",
    "is_autocast_enabled",
    "is_autocast_cpu_enabled",
    "get_autocast_dtype",
    "get_autocast_cpu_dtype",
    "get_autocast_gpu_dtype",
)
"""Functions of torch's that tell in which mode code runs."""


@dataclass(frozen=True)
class Trace:
    """The graph of an entry in one mode.

    Attributes:
        entry: Whose method was traced.
        training: The mode that the module was in.
        graph: The graph; each node's `meta` holds "value" (fake), "work" (a `Work`) and "mutates" (the input nodes
            that it writes on).
        signature: The method's own signature.
        fixed: Arguments that are not tensors, and the value they had; the graph holds for these values alone.
        opened: Arguments that are lists, tuples or dicts of tensors: the length, or the keys.
        method: The method itself, as the class defines it.
        reads_mode: Whether the code branches on `self.training`, so that the other mode has a graph of its own.
        doubt: Why the graph does less than the code (for another input, say), so that it shows what ran but must not
            take the code's place; empty if it may.
    """

    entry: Entry
    training: bool
    graph: fx.Graph
    signature: inspect.Signature
    fixed: dict[str, object]
    opened: dict[str, int | list[object]]
    method: Callable[..., Any]
    reads_mode: bool
    doubt: str = ""


def trace_entry(twin: Twin, entry: Entry, call: Call, *, training: bool) -> Trace:
    """Trace one method of one module, alone.

    Args:
        twin: The fake twin that holds the module.
        entry: The module's path and the method.
        call: What the method was called with.
        training: The mode to trace in.

    Raises:
        TraceError: torch.fx cannot follow the code.
    """
    owner = twin.model.get_submodule(entry.path)
    own = vars(owner).get(entry.method)
    if own is not None and getattr(own, "__self__", None) is not owner:
        raise TraceError(f"its {entry.method} was replaced on the instance, by a {type(own).__name__}")
    method = getattr(owner, entry.method)
    torch.overrides.get_overridable_functions()  # torch keeps this table, which must not hold what is replaced below
    with torch.enable_grad():  # the mode that the code is recorded in, whatever the caller's is
        tracer = ShallowTracer(twin, entry.method, call)
    graph = None
    try:
        with (
            set_training(owner, training),
            apart(owner, refuse_traced=True),
            torch.enable_grad(),
            kept_random_state(refuse_draws=True),
            kept_attributes(owner),
            _opaque_methods(tracer, owner, entry.method),
            _noted_questions(tracer),
            _noted_mode_switches(tracer),
            _noted_attribute_writes(tracer, owner),
            _refused_functions(),
        ):
            graph = tracer.trace(owner)
    except Exception as error:
        if graph is None and isinstance(error, TraceError):
            raise
        if graph is None:
            raise TraceError(f"torch.fx cannot follow its {entry.method}: {_explain(error)}") from error
        tracer.doubts.append(str(error))
    tracer.write_back()
    fix_numbers(graph, tracer.asked)
    _collect_doubts(tracer, graph, owner, method)
    _name_written_values(graph)
    _drop_unused(graph)
    return Trace(
        entry=entry,
        training=training,
        graph=graph,
        signature=tracer.signature,
        fixed=tracer.fixed,
        opened={name: list(was) if isinstance(was, dict) else len(was) for name, _, was in tracer.containers},
        method=inspect.unwrap(getattr(method, "__func__", method)),
        reads_mode=reads_mode(tracer.conditions),
        doubt=next(iter(tracer.doubts), ""),
    )


def _explain(error: Exception) -> str:
    """Say in one line what torch.fx cannot follow."""
    modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    if "torch.utils.checkpoint" in modules:
        return "it checkpoints activations; turn that off to inject, and on again after"
    return get_first_line(error)


def _collect_doubts(tracer: ShallowTracer, graph: fx.Graph, owner: nn.Module, method: Callable[..., Any]) -> None:
    """Note all that the graph would leave out."""
    returned = (n for n in graph.nodes if n.op == "call_module" or n.target is operator.getitem)
    has_none = any(n.meta.get("value", n) is None for n in returned)
    if has_none and asks_identity(owner, method):  # a proxy is never None
        tracer.doubts.append("its code may ask whether what a child returns is None")
    if tracer.optional and asks_identity_of_local(owner, method):
        tracer.doubts.append("its code may ask whether an argument is None")
    found = (find(owner, method) for find in (find_mode_read, find_class_read, find_global_write, find_handler))
    tracer.doubts += filter(None, (find_condition(tracer.conditions), *found))
    if any(n.op == "get_attr" and str(n.target).startswith(CONSTANT) for n in graph.nodes):
        tracer.doubts.append("it makes a constant tensor while it runs")


@contextmanager
def _opaque_methods(tracer: ShallowTracer, owner: nn.Module, entered: str) -> Iterator[None]:
    """Let calls of methods that are entries of their own be leaves, in the owner and below it."""
    undo: list[tuple[nn.Module, str]] = []
    try:
        for path, module in owner.named_modules():
            for name in METHODS[1:]:
                method = getattr(type(module), name, None)
                if method is None or name in vars(module) or (module is owner and name == entered):
                    continue
                full = f"{path}.{name}" if path else name
                bound = method.__get__(module)
                vars(module)[name] = functools.partial(_call_opaque, tracer, full, bound)
                undo.append((module, name))
        yield
    finally:
        for module, name in undo:
            del vars(module)[name]


@contextmanager
def replaced(holder: Any, name: str, value: object) -> Iterator[None]:
    """Let an attribute of torch's be another one for as long as the context lasts."""
    original = vars(holder)[name]
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, original)


@contextmanager
def _noted_questions(tracer: ShallowTracer) -> Iterator[None]:
    """Note that code asks which of torch's modes it runs in; the graph holds the answer of the trace."""

    def note(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if tracer.is_recording():
            tracer.doubts.append(f"its code asks for torch.{original.__name__}()")
        return original(*args, **kwargs)

    with ExitStack() as stack:
        for name in filter(vars(torch).__contains__, _QUESTIONS):  # some are to go
            stack.enter_context(replaced(torch, name, functools.partial(note, getattr(torch, name))))
        yield


def _noted_mode_switches(tracer: ShallowTracer) -> AbstractContextManager[None]:
    """Note that code puts a module into train or eval mode, which is no operation that a graph holds."""

    def train(original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not tracer.is_idle:
            tracer.doubts.append("its code puts a module into train or eval mode")
        return original(module, *args, **kwargs)

    return intercepted("train", train)


@contextmanager
def _noted_attribute_writes(tracer: ShallowTracer, owner: nn.Module) -> Iterator[None]:
    """Note that code sets an attribute of another module, and put it back; its own are looked at by themselves."""
    written: dict[nn.Module, list[tuple[dict[str, Any], dict[str, Any]]]] = {}

    def write(original: Callable[..., Any], module: nn.Module, name: str, value: Any) -> None:
        if module is not owner and not tracer.is_idle and module not in written:
            tracer.doubts.append("its code sets an attribute of another module")
            held = (vars(module), module._parameters, module._buffers, module._modules)
            written[module] = [(place, dict(place)) for place in held]
        original(module, name, value)

    try:
        with intercepted("__setattr__", write):
            yield
    finally:
        for place, before in (pair for pairs in written.values() for pair in pairs):
            place.clear()
            place.update(before)


def _refused_functions() -> AbstractContextManager[None]:
    """Refuse calls of autograd functions: what they do forward would be recorded, without their own gradients."""
    original = vars(torch.autograd.Function)["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if any(issubclass(type(x), fx.Proxy) for x in (*args, *kwargs.values())):
            raise TraceError(f"its code calls the autograd function {cls.__name__}")
        return original.__get__(None, cls)(*args, **kwargs)

    return replaced(torch.autograd.Function, "apply", classmethod(apply))


def _call_opaque(tracer: ShallowTracer, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return tracer.call_method(name, method, args, kwargs)


def _name_written_values(graph: fx.Graph) -> None:
    """Let whatever comes after an in-place operation use its result: after `out.add_(x)`, `out` means the sum."""
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        for source in node.meta.get("mutates", ()):
            if source.meta["value"] is node.meta["value"]:
                source.replace_all_uses_with(node, lambda user, node=node: order[user] > order[node])
                for later in nodes[order[node] + 1 :]:
                    written = later.meta.get("mutates", ())
                    later.meta["mutates"] = tuple(node if n is source else n for n in written)


def _drop_unused(graph: fx.Graph) -> None:
    """Drop what the code asked but did not use: shapes, comparisons, list items."""
    asked = {getattr, operator.getitem, *(getattr(operator, n) for n in ("eq", "ne", "lt", "le", "gt", "ge", "mod"))}
    methods = SHAPE_READS | {"dim", "ndimension", "is_floating_point"}
    for node in reversed(list(graph.nodes)):
        harmless = (
            node.target in asked or node.op == "get_attr" or (node.op == "call_method" and node.target in methods)
        )
        if harmless and not node.users:
            graph.erase_node(node)
