"""Tracing: turn the forward of one module into a small torch.fx graph.

Takes a module of the fake twin and a call that the probe recorded, gives a graph in which every child is a leaf and
every node carries the value (a fake tensor) and the work (layers, merges) that it stood for. Never changes a model.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute
from torch.utils._pytree import tree_flatten, tree_map

from se_inject.errors import TraceError
from se_inject.faithful import (
    CONSTANT,
    SHAPE_READS,
    check_conditions,
    check_mode_reads,
    check_output,
    get_modes,
    kept_attributes,
    kept_random_state,
    reads_mode,
)
from se_inject.operations import Watch, Work
from se_inject.probe import METHODS, Call, Entry, Twin, set_training

# They take sizes and no tensor, so that torch.fx does not see them by itself.
_FACTORIES = (torch.arange, torch.empty, torch.full, torch.linspace, torch.ones, torch.rand, torch.randn, torch.zeros)


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
    """

    entry: Entry
    training: bool
    graph: fx.Graph
    signature: inspect.Signature
    fixed: dict[str, object]
    opened: dict[str, int | list[object]]
    method: Callable[..., Any]
    reads_mode: bool


def trace_entry(twin: Twin, entry: Entry, call: Call, *, training: bool) -> Trace:
    """Trace one method of one module, alone.

    Args:
        twin: The fake twin that holds the module.
        entry: The module's path and the method.
        call: What the method was called with.
        training: The mode to trace in.

    Raises:
        TraceError: torch.fx cannot follow the code, or what it would record holds for this input alone.
    """
    owner = twin.model.get_submodule(entry.path)
    own = vars(owner).get(entry.method)
    if own is not None and getattr(own, "__self__", None) is not owner:
        raise TraceError(f"its {entry.method} was replaced on the instance, by a {type(own).__name__}")
    method = getattr(owner, entry.method)
    check_mode_reads(owner, method)
    tracer = _ShallowTracer(twin, entry.method, call)
    try:
        with (
            set_training(owner, training),
            torch.enable_grad(),
            kept_random_state(refuse_draws=True),
            kept_attributes(owner),
            _opaque_methods(tracer, owner, entry.method),
            _refused_grad_reads(tracer),
        ):
            graph = tracer.trace(owner)
    except TraceError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TraceError(f"torch.fx cannot follow its {entry.method}: {line}") from error
    _check_arguments(tracer, owner)
    check_conditions(tracer.conditions)
    if any(n.op == "get_attr" and str(n.target).startswith(CONSTANT) for n in graph.nodes):
        raise TraceError("it makes a constant tensor while it runs")
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
    )


class _ValueProxy(fx.Proxy):
    """A proxy that knows the value it stands for, so that code which asks for types, lengths or truth goes on."""

    tracer: _ShallowTracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        node = vars(self).get("node")  # an attribute has its node made when it is first used
        return torch.Tensor if node is not None and isinstance(node.meta.get("value"), Tensor) else _ValueProxy

    def __getattr__(self, name: str) -> _ValueAttribute:
        node = vars(self).get("node")
        if name == "_is_param" or (node is not None and not hasattr(node.meta.get("value"), name)):
            raise AttributeError(name)  # isinstance(x, nn.Parameter) asks for _is_param
        return _ValueAttribute(self, name)

    def __len__(self) -> int:
        value = self.node.meta["value"]
        if isinstance(value, Tensor):
            self.tracer.note_condition(self.node)
        return len(value)

    def __index__(self) -> int:
        self.tracer.note_condition(self.node)
        return int(self.node.meta["value"])

    __int__ = __index__

    def __float__(self) -> float:
        self.tracer.note_condition(self.node)
        return float(self.node.meta["value"])


def _define_in_place(operation: str) -> None:
    function = getattr(operator, operation)

    def record(self: _ValueProxy, other: object) -> Any:
        if not isinstance(self.node.meta["value"], Tensor):
            return NotImplemented  # a number: Python goes on with the plain operator
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(_ValueProxy, f"__{operation}__", record)


# Without these `out += x` would be recorded as `out + x`, and whoever sees the same tensor would miss the sum.
for _operation in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor"):
    _define_in_place(_operation)


class _ValueAttribute(Attribute, _ValueProxy):
    """An attribute of a proxy: a method that is called next, or a value such as a shape."""


class _ShallowTracer(fx.Tracer):
    """A tracer for which every child is a leaf, and which executes each node over fake tensors as it records it."""

    def __init__(self, twin: Twin, method: str, call: Call) -> None:
        super().__init__(autowrap_functions=_FACTORIES)
        self._autowrap_search.append(torch)
        self.proxy_buffer_attributes = True
        self.traced_func_name = method
        self.conditions: list[fx.Node] = []
        self.fixed: dict[str, object] = {}
        self.containers: list[tuple[str, Any, Any]] = []
        self._twin = twin
        self._call = call
        self._executing = False
        self._modes = get_modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return True

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self._executing else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._executing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ValueProxy(node, self)

    def create_node(self, kind: str, target: Any, *rest: Any, **options: Any) -> fx.Node:
        if get_modes() != self._modes:
            raise TraceError("its code switches gradients or autocast for a part of itself")
        node = super().create_node(kind, target, *rest, **options)
        if kind not in ("placeholder", "output"):
            try:
                self._execute(node)
            except BaseException:
                self.graph.erase_node(node)  # the code may catch it and go on
                raise
        return node

    def create_arg(self, a: Any) -> Any:
        if _is_proxy(a):
            return a.node
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)

    def is_recording(self) -> bool:
        """Tell whether the user's code is running, rather than torch's or a child's."""
        caller = inspect.currentframe()
        for _ in range(2):
            caller = caller.f_back if caller else None
        module = caller.f_globals.get("__name__", "") if caller else ""
        return not self._executing and not module.startswith(("torch.", "se_inject."))

    def call_method(self, name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record the call of a method that is rewritten on its own, as `self.forward_features(x)`."""
        return method(*args, **kwargs) if self._executing else self.create_proxy("call_module", name, args, kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: Any, concrete_args: Any = None) -> Any:  # noqa: ARG002
        method = getattr(self.root, self.traced_func_name)
        self.signature = inspect.signature(method)
        bound = self.signature.bind(*self._call.args, **self._call.kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            bound.arguments[name] = self._open_argument(name, value)
        # Where the code hands `self.training` on, as in `dropout(x, p, self.training)`, the graph does the same.
        vars(self.root)["training"] = self.create_proxy("get_attr", "training", (), {})

        def run(_: nn.Module) -> Any:
            result = method(*bound.args, **bound.kwargs)
            check_output(result)
            return result

        self._modes = get_modes()
        return run, [self.root]

    def to_bool(self, obj: Any) -> bool:
        self.note_condition(obj.node)
        return bool(obj.node.meta["value"])

    def iter(self, obj: Any) -> Iterator[Any]:
        return iter([obj[i] for i in range(len(obj.node.meta["value"]))])

    def note_condition(self, node: fx.Node) -> None:
        self.conditions.append(node)

    def _open_argument(self, name: str, value: object) -> object:
        leaves, _ = tree_flatten(value)
        if not any(isinstance(x, Tensor) for x in leaves):
            self.fixed[name] = value
            return value
        placeholder = self.create_proxy("placeholder", name, (), {})
        with self._twin.mode:
            fake = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, value)
        placeholder.node.meta.update(value=fake, work=Work(), mutates=())
        if isinstance(value, Tensor):
            return placeholder
        if any(not isinstance(x, Tensor) for x in leaves):
            raise TraceError(f"its argument {name!r} holds tensors and other values together")
        opened = _open_container(placeholder, fake)
        self.containers.append((name, opened, tree_map(lambda x: x, opened, is_leaf=_is_proxy)))
        return opened

    def _execute(self, node: fx.Node) -> None:
        args, kwargs = _get_values(node.args), _get_values(node.kwargs)
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta["value"], Tensor)]
        versions = [n.meta["value"]._version for n in inputs]
        self._executing = True
        try:
            with torch.no_grad(), self._twin.mode, Watch() as watch:
                value = self._run(node, args, kwargs)
        finally:
            self._executing = False
        written = [n for n, v in zip(inputs, versions, strict=True) if n.meta["value"]._version != v]
        node.meta.update(value=value, work=watch.work, mutates=tuple(written))
        if watch.work.merges and node.op != "call_module":
            node.meta["code"] = _read_user_code()

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        target = str(node.target)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        value = operator.attrgetter(target)(self.root)
        return value(*args, **kwargs) if node.op == "call_module" else value


def _read_user_code() -> str:
    """Read the expression of the user's code that is being traced; empty if its line is not a statement of its own."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("torch.", "se_inject.")):
        frame = frame.f_back
    line = "" if frame is None else linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    try:
        statement = ast.parse(line.removeprefix("return ")).body[0]
    except (SyntaxError, IndexError):
        return ""
    return ast.unparse(statement.value if isinstance(statement, ast.Assign) and statement.value else statement)


def _get_values(argument: Any) -> Any:
    """Replace the nodes in a node's argument by their values; lists are fresh, so a child may change them."""
    if isinstance(argument, fx.Node):
        return argument.meta["value"]
    if isinstance(argument, slice):
        return slice(*map(_get_values, (argument.start, argument.stop, argument.step)))
    if isinstance(argument, dict):
        return {k: _get_values(v) for k, v in argument.items()}
    if isinstance(argument, (list, tuple)):
        items = [_get_values(v) for v in argument]
        if hasattr(argument, "_fields"):
            return type(argument)(*items)
        return items if isinstance(argument, list) else tuple(items)
    return argument


def _is_proxy(value: object) -> bool:
    return issubclass(type(value), fx.Proxy)


def _open_container(proxy: Any, value: Any) -> Any:
    """Mirror a list, tuple or dict of tensors with one proxy a tensor."""
    if isinstance(value, Tensor):
        return proxy
    if isinstance(value, dict):
        return type(value)((k, _open_container(proxy[k], v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        items = [_open_container(proxy[i], v) for i, v in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


@contextmanager
def _opaque_methods(tracer: _ShallowTracer, owner: nn.Module, entered: str) -> Iterator[None]:
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
def _refused_grad_reads(tracer: _ShallowTracer) -> Iterator[None]:
    """Refuse code that asks whether gradients are on; the graph would hold the answer of the trace."""
    original = torch.is_grad_enabled

    def ask() -> bool:
        if tracer.is_recording():
            raise TraceError("its code asks whether gradients are on")
        return original()

    torch.is_grad_enabled = ask
    try:
        yield
    finally:
        torch.is_grad_enabled = original


def _call_opaque(tracer: _ShallowTracer, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return tracer.call_method(name, method, args, kwargs)


def _check_arguments(tracer: _ShallowTracer, owner: nn.Module) -> None:
    for name, opened, before in tracer.containers:
        if not _same(opened, before):
            raise TraceError(f"it changes the {type(opened).__name__} {name!r} that it is handed")
    if isinstance(owner, fx.GraphModule) and tracer.fixed:
        raise TraceError("it is a GraphModule with arguments that are no tensors")


def _same(left: Any, right: Any) -> bool:
    if _is_proxy(left) or _is_proxy(right):
        return left is right
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)


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
