"""Recording: a torch.fx tracer for which every child is a leaf, and which executes what it records.

Takes a module of the fake twin and a call, records a graph whose nodes carry values (fake tensors) and work. Because
values are at hand, code that asks for types, lengths and numbers of dimensions goes on; what it asked is noted.
"""

from __future__ import annotations

import copy
import inspect
import operator
import threading
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from se_inject.calls import Call
from se_inject.faithful import CONSTANT, find_odd_containers, get_modes, is_cut
from se_inject.frames import find_place, find_user_frame, read_user_code, runs_childs_method
from se_inject.operations import Watch, Work
from se_inject.proxies import ValueProxy, is_proxy
from se_inject.readings import Number, make_numbers
from se_inject.twin import Twin

# They take sizes and no tensor, so that torch.fx does not see them by itself.
_FACTORIES = (
    torch.arange,
    torch.empty,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.rand,
    torch.randn,
    torch.tensor,
    torch.zeros,
)


class ShallowTracer(fx.Tracer):
    """A tracer for which every child is a leaf, and which executes each node over fake tensors as it records it."""

    def __init__(self, twin: Twin, method: str, call: Call) -> None:
        self._thread = threading.get_ident()
        super().__init__(autowrap_functions=_FACTORIES)
        self._autowrap_search.append(torch)
        self.proxy_buffer_attributes = True
        self.traced_func_name = method
        self.conditions: list[fx.Node] = []
        self.optional: set[fx.Node] = set()  # arguments without which the code may have a way
        self.doubts: list[str] = []
        self._unknown: list[fx.Node] = []
        self.fixed: dict[str, object] = {}
        self.containers: list[tuple[str, Any, Any]] = []
        self._handed: dict[str, object] = {}
        self._twin = twin
        self._call = call
        self._executing = False
        self._modes: tuple[object, ...] | None = None
        self._flags: dict[str, object] = {}
        self._numbers: dict[str, Number] = {}
        self.asked: set[str] = set()
        self._code: CodeType | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        """Treat every child as a leaf."""
        return True

    @property
    def is_idle(self) -> bool:
        """Whether what runs is not to be recorded: what a child does, or another thread's network.

        torch.fx replaces `nn.Module.__call__` and `__getattr__` for as long as it traces, and so for all threads.
        """
        return self._executing or threading.get_ident() != self._thread

    @property
    def _autowrap_function_ids(self) -> set[int]:
        """Which functions torch.fx replaces in the modules whose code runs; in another thread it would not undo it."""
        return self._wrapped if threading.get_ident() == self._thread else set()

    @_autowrap_function_ids.setter
    def _autowrap_function_ids(self, ids: set[int]) -> None:
        self._wrapped = ids

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record the call of a child; while a child is being executed, its own children just run."""
        if self.is_idle:
            return forward(*args, **kwargs)
        result = super().call_module(m, forward, args, kwargs)
        for key, items in result.node.meta["changed"].items():
            # What the child put into the list is not known by name; whoever reads it is in doubt.
            handed = args[key] if isinstance(key, int) else kwargs[key]
            handed[:] = [self._make_unknown(item, [result, *handed]) for item in items]
        return result

    def _make_unknown(self, value: object, sources: list[Any]) -> Any:
        def read_changed_item(*_: object) -> object:
            return value

        proxy = self.create_proxy("call_function", read_changed_item, tuple(sources), {})
        self._unknown.append(proxy.node)
        return proxy

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Record the use of a parameter or buffer."""
        return attr_val if self.is_idle else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Wrap a node in a proxy that knows its value."""
        return ValueProxy(node, self)

    def create_node(self, kind: str, target: Any, *rest: Any, **options: Any) -> fx.Node:
        """Record an operation and execute it."""
        if self._modes is not None and get_modes() != self._modes:
            self.doubts.append("its code switches gradients or autocast for a part of itself")
        if self._code is not None and runs_childs_method(self._code, self.root):
            self.doubts.append("its code runs a method of a child that asks for the child's mode")
        node = super().create_node(kind, target, *rest, **options)
        if kind not in ("placeholder", "output"):
            try:
                self._execute(node)
            except BaseException:
                self.graph.erase_node(node)  # the code may catch it and go on
                raise
        return node

    def create_arg(self, a: Any) -> Any:
        """Turn an argument into a node or a plain value."""
        if is_proxy(a):
            return a.node
        if isinstance(a, Number):
            return self.create_node("get_attr", a.name, (), {}) if self._numbers.get(a.name) is a else a.plain
        try:
            return super().create_arg(a.item() if isinstance(a, np.generic) else a)
        except NotImplementedError:  # an object that is handed on as it is
            name = f"{CONSTANT}_object{len(vars(self.root))}"
            setattr(self.root, name, a)
            return self.create_node("get_attr", name, (), {})

    def is_recording(self) -> bool:
        """Tell whether the user's code is running, rather than torch's or a child's."""
        caller = inspect.currentframe()
        for _ in range(2):
            caller = caller.f_back if caller else None
        module = caller.f_globals.get("__name__", "") if caller else ""
        return not self.is_idle and not module.startswith(("torch.", "se_inject."))

    def call_method(self, name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record the call of a method that is rewritten on its own, as `self.forward_features(x)`."""
        return method(*args, **kwargs) if self.is_idle else self.create_proxy("call_module", name, args, kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: Any, concrete_args: Any = None) -> Any:  # noqa: ARG002
        """Make a proxy for each tensor that the method is handed."""
        self._modes = get_modes()  # those of the trace, whatever the caller's were when the tracer was made
        method = getattr(self.root, self.traced_func_name)
        self.signature = inspect.signature(method)
        code = getattr(inspect.unwrap(getattr(method, "__func__", method)), "__code__", None)
        bound = self.signature.bind(*self._call.args, **self._call.kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            bound.arguments[name] = self._open_argument(name, value)
        # Where the code hands `self.training` on, as in `dropout(x, p, self.training)`, the graph does the same.
        own = vars(self.root)
        self._flags = {"training": self.root.training}
        own["training"] = self.create_proxy("get_attr", "training", (), {})
        self._numbers = make_numbers(self.root, self._note_number)

        def run(_: nn.Module) -> Any:
            plain = {name: own[name] for name in self._numbers}
            own.update(self._numbers)
            self._code = code  # it is running from here on
            try:
                result = method(*bound.args, **bound.kwargs)
            finally:
                self._code = None
                own.update({name: plain[name] for name, number in self._numbers.items() if own.get(name) is number})
            self.doubts += find_odd_containers(result)
            return result

        return run, [self.root]

    def to_bool(self, obj: Any) -> bool:
        """Answer a condition with its outcome in the probe, and note it."""
        self.note_condition(obj.node)
        return bool(obj.node.meta["value"])

    def iter(self, obj: Any) -> Iterator[Any]:
        """Go through a tuple, or through the first dimension of a tensor."""
        value = obj.node.meta["value"]
        is_text = not isinstance(value, Tensor) and any(isinstance(item, str) for item in value)
        if not isinstance(value, Tensor):
            obj.node.meta["unpacked"] = len(value)
        return iter([self.tell_text(v) if is_text and isinstance(v, str) else obj[i] for i, v in enumerate(value)])

    def tell_text(self, text: str) -> str:
        """Give a text, such as a device's type or a name that a child returned, as it was in the probe."""
        self.doubts.append("its code uses a text that depends on its input")
        return text

    def note_length(self, node: fx.Node) -> None:
        """Note that the code goes by the number of parts of a tensor, or of what one was cut into."""
        if isinstance(node.meta["value"], Tensor) or is_cut(node):
            self.note_condition(node)

    def _note_number(self, name: str) -> None:
        """Note that the code goes by one of the module's numbers."""
        if not self.is_idle:
            self.asked.add(name)

    def note_condition(self, node: fx.Node) -> None:
        """Note that the code asked for the value of a node."""
        self.conditions.append(node)

    def _open_argument(self, name: str, value: object) -> object:
        leaves, _ = tree_flatten(value)
        is_default = not any(isinstance(x, Tensor) for x in leaves) and value == self.signature.parameters[name].default
        if is_default or not any(map(_is_open, leaves)):
            self.fixed[name] = value
            self._handed[name] = copy.copy(value) if isinstance(value, (list, dict, set)) else value
            return self._handed[name]
        placeholder = self.create_proxy("placeholder", name, (), {})
        placeholder.node.meta.update(value=value, work=Work(), mutates=())
        parameter = self.signature.parameters[name]
        is_first = parameter is next(iter(self.signature.parameters.values()))
        if not is_first or not (parameter.default is parameter.empty or _is_open(parameter.default)):
            self.optional.add(placeholder.node)
        if _is_open(value):
            return placeholder
        if not all(map(_is_open, leaves)):
            self.doubts.append(f"its argument {name!r} holds tensors or numbers, and other values")
        opened = _open_container(placeholder, value)
        self.containers.append((name, opened, tree_map(lambda x: x, opened, is_leaf=is_proxy)))
        return opened

    def write_back(self) -> None:
        """Record what the code put into a list that it was handed, so that the caller sees it."""
        output = next(iter(reversed(self.graph.nodes)))
        changed = [name for name, value in self.fixed.items() if not _same(self._handed[name], value)]
        self.doubts += [f"it changes the {type(self.fixed[n]).__name__} {n!r} that it is handed" for n in changed]
        for name, opened, before in self.containers:
            if _same(opened, before):
                continue
            if type(opened) is not list or len(opened) < len(before) or not all(map(is_proxy, opened)):
                self.doubts.append(f"it changes the {type(opened).__name__} {name!r} that it is handed")
                continue
            handed = next(n for n in self.graph.nodes if n.op == "placeholder" and n.target == name)
            with self.graph.inserting_before(output):
                for i, item in enumerate(opened):
                    if i >= len(before):
                        node = self.graph.call_method("append", (handed, item.node))
                    elif item is not before[i]:
                        node = self.graph.call_function(operator.setitem, (handed, i, item.node))
                    else:
                        continue
                    node.meta.update(value=None, work=Work(), mutates=())
        for node in reversed(self._unknown):
            if node.users:
                self.doubts.append("it reads a list that a child changed")
            else:
                self.graph.erase_node(node)
        if isinstance(self.root, fx.GraphModule) and self.fixed:
            self.doubts.append("it is a GraphModule with arguments that are no tensors")

    def _execute(self, node: fx.Node) -> None:
        args, kwargs = _get_values(node.args), _get_values(node.kwargs)
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta["value"], Tensor)]
        versions = [n.meta["value"]._version for n in inputs]
        lists = [(k, v, list(v)) for k, v in (*enumerate(args), *kwargs.items()) if isinstance(v, list)]
        self._executing = True
        own = vars(self.root)
        recorded = {key: own[key] for key in self._flags}
        own.update(self._flags)  # a method of the root that is executed asks for the flag itself
        try:
            with torch.no_grad(), self._twin.mode, Watch() as watch:
                value = self._run(node, args, kwargs)
        finally:
            own.update(recorded)
            self._executing = False
        written = [n for n, v in zip(inputs, versions, strict=True) if n.meta["value"]._version != v]
        changed = {key: now for key, now, was in lists if not _holds(now, was)}
        node.meta.update(value=value, work=watch.work, mutates=tuple(written), changed=changed)
        if watch.work.merges and node.op != "call_module":
            frame = find_user_frame()
            node.meta.update(code=read_user_code(frame), place=find_place(frame))

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        target = str(node.target)
        if target in self._numbers and node.op == "get_attr":
            return self._numbers[target].plain
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        value = operator.attrgetter(target)(self.root)
        return value(*args, **kwargs) if node.op == "call_module" else value


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


def _holds(now: list[Any], was: list[Any]) -> bool:
    return len(now) == len(was) and all(map(operator.is_, now, was))


def _is_open(value: object) -> bool:
    """Tell whether an argument may differ from call to call: a tensor, or a number such as a height."""
    return isinstance(value, (Tensor, int, float)) and not isinstance(value, bool)


def _open_container(proxy: Any, value: Any) -> Any:
    """Mirror a list, tuple or dict of tensors and numbers with one proxy each."""
    if _is_open(value):
        return proxy
    if isinstance(value, dict):
        return type(value)((k, _open_container(proxy[k], v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        items = [_open_container(proxy[i], v) for i, v in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _same(left: Any, right: Any) -> bool:
    if is_proxy(left) or is_proxy(right):
        return left is right
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)
