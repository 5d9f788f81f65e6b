"""Identity: make a channel attention start as the exact identity, or refuse it.

Takes a new module whose output is its input times gates, gives the same module with each gate exactly 1: the layer
before a gate's activation is zeroed, and the activation is scaled, so that 2 * sigmoid(0) = 1. What is not equal to the
bit afterwards is refused.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from se_inject.borders import write_scaled
from se_inject.calls import Entry
from se_inject.codegen import write_method
from se_inject.errors import ExampleError, OptionError, TraceError
from se_inject.functions import CONVOLUTIONS, LINEARS, NORMS, PRODUCTS
from se_inject.generated import derive_class
from se_inject.probe import probe_model
from se_inject.tracing import trace_entry

_SIZE = 16
_GATES = frozenset({"sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_", "tanh", "tanh_"})
_RESHAPES = frozenset(
    "view reshape expand expand_as unsqueeze squeeze flatten unflatten permute transpose __getitem__ chunk split to "
    "type_as contiguous interpolate clone".split()
)
_COMBINATIONS = frozenset({"add", "add_", "__add__", "__iadd__", "sub", "sub_", "div", "__truediv__"}) | PRODUCTS


def make_identity(block: nn.Module, channels: int, name: str) -> nn.Module:
    """Turn a new attention module into an exact identity, in place.

    Args:
        block: Gives a map (N, C, H, W) for one.
        channels: C.
        name: What the user calls it, for messages.

    Raises:
        OptionError: It cannot be made exact; the message says why.
    """
    mode = block.training
    try:
        if find_difference(block, channels):
            _open(block, _find_gates(block.eval(), channels), channels)
        difference = find_difference(block, channels)
    except (_RefusalError, TraceError, ExampleError) as refusal:
        raise OptionError(f"block {name} cannot be made an exact identity: {refusal}") from refusal
    if difference:
        raise OptionError(f"block {name} cannot be made an exact identity: {difference}")
    return block.train(mode)


def find_difference(block: nn.Module, channels: int) -> str:
    """Say where a module differs from the identity; empty if it is exact, in all modes and formats that it runs in.

    Raises:
        _RefusalError: It does not run, or gives something else than a map of the same shape.
    """
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    layouts = (torch.contiguous_format, torch.channels_last)
    for dtype, training, layout in itertools.product(dtypes, (False, True), layouts):
        twin = copy.deepcopy(block).to(dtype).train(training)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            x = torch.randn(4, channels, _SIZE, _SIZE).to(dtype, memory_format=layout)
            x[2:] *= torch.finfo(dtype).smallest_normal  # halving such a number is not exact
            try:
                y = twin(x.clone())
            except Exception as error:
                if dtype in (torch.float32, torch.float64):
                    raise _RefusalError(f"it does not run on a map {tuple(x.shape)}: {error}") from error
                continue  # not every operation exists in every format on every device
        if not isinstance(y, Tensor) or y.shape != x.shape:
            shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise _RefusalError(f"it gives {shape} for a map {tuple(x.shape)}")
        if y.dtype != x.dtype or not torch.equal(x, y):
            where = f"{str(dtype).removeprefix('torch.')}, {'train' if training else 'eval'} mode"
            return f"its output is not its input times gates that can be set to 1 ({where})"
        if y.stride() != x.stride():
            return "its output has another memory format than its input, so that what follows rounds differently"
    return ""


class _RefusalError(ValueError):
    """Why a module cannot be made an identity."""


@dataclass(frozen=True)
class _Operation:
    """A torch function that ran in a module's own code, or a whole activation module.

    Attributes:
        name: The function's name; "module" for a module.
        inputs: The tensors that it was handed.
        output: What it gave.
        path: The module in whose code it ran, or the activation module.
        index: Its place among the functions of this name in the code of this module.
    """

    name: str
    inputs: list[Tensor]
    output: Tensor
    path: str
    index: int


@dataclass(frozen=True)
class _Gate:
    """An activation whose output scales the map, and the parameters that make its input."""

    operation: _Operation
    parameters: list[nn.Parameter]


class _Recorder(TorchFunctionMode):
    """Records what a module executes, so that one can ask what a tensor was made from."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self._paths: list[str] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._hooks: list[Any] = []
        for path, module in block.named_modules():
            self._hooks.append(module.register_forward_pre_hook(lambda *_, path=path: self._paths.append(path)))
            self._hooks.append(module.register_forward_hook(self._leave))

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        path = self._paths.pop()
        is_activation = not module._modules and not module._parameters and not module._buffers
        if is_activation and len(args) == 1 and isinstance(output, Tensor) and output is not args[0]:
            self.operations = [o for o in self.operations if o.path != path or o.name == "module"]
            self._note("module", [args[0]], output, path)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and self._paths:
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self._note(getattr(func, "__name__", ""), inputs, result, self._paths[-1])
        return result

    def _note(self, name: str, inputs: list[Tensor], output: Tensor, path: str) -> None:
        self.operations.append(_Operation(name, inputs, output, path, self._counts[path, name]))
        self._counts[path, name] += 1


def _find_gates(block: nn.Module, channels: int) -> list[_Gate]:
    """Find the activations that scale the map."""
    x = torch.randn(2, channels, _SIZE, _SIZE)
    recorder = _Recorder(block)
    try:
        with torch.no_grad(), recorder:
            block(x)
    finally:
        recorder.detach()
    operations = recorder.operations
    gates: list[_Gate] = []
    for i, operation in enumerate(operations):
        if operation.name in PRODUCTS and operation.output.shape == x.shape and len(operation.inputs) == 2:
            for factor in operation.inputs:
                found = _find_activation(block, operations[:i], factor)
                if found is not None:
                    parameters = list(_find_parameters(block, operations[:i], found.inputs[0]))
                    gates.append(_Gate(found, parameters))
    if not gates:
        raise _RefusalError("its output is not its input times gates (sigmoid, hard sigmoid or tanh)")
    return gates


def _find_maker(operations: Sequence[_Operation], tensor: Tensor) -> tuple[int, _Operation] | None:
    found = ((i, operations[i]) for i in reversed(range(len(operations))) if operations[i].output is tensor)
    return next(found, None)


def _find_activation(block: nn.Module, operations: Sequence[_Operation], tensor: Tensor) -> _Operation | None:
    """Walk back from a factor, over what only reshapes it, to the activation that made it."""
    made = _find_maker(operations, tensor)
    if made is None:
        return None
    i, operation = made
    if operation.name in _RESHAPES:
        return _find_activation(block, operations[:i], operation.inputs[0])
    is_gate = operation.name in _GATES
    if operation.name == "module":
        is_gate = 0 < _evaluate(block.get_submodule(operation.path))[0] <= 1
    return operation if is_gate else None


def _find_parameters(block: nn.Module, operations: Sequence[_Operation], tensor: Tensor) -> Iterator[nn.Parameter]:
    """Walk back from an activation's input to the layers that make it, and give their parameters."""
    made = _find_maker(operations, tensor)
    if made is None:
        raise _RefusalError("no layer makes the input of its gate")
    i, operation = made
    parameters = [x for x in operation.inputs if isinstance(x, nn.Parameter)]
    if operation.name in CONVOLUTIONS | LINEARS | NORMS:
        if not parameters:
            raise _RefusalError("the layer before its gate has no parameters")
        yield from parameters
        return
    if operation.name == "module" and _evaluate(block.get_submodule(operation.path)) != (0, True):
        raise _RefusalError(f"its gate's input comes from {operation.path}, which passes no gradient at zero")
    if operation.name not in (*_RESHAPES, *_COMBINATIONS, "module"):
        raise _RefusalError(f"its gate's input comes from {operation.name}, which cannot be zeroed")
    for source in operation.inputs:
        yield from _find_parameters(block, operations[:i], source)


def _evaluate(activation: nn.Module) -> tuple[float, bool]:
    """Return an activation's value at zero, and whether it passes a gradient there."""
    with torch.enable_grad():
        zero = torch.zeros(1, 2, 1, 1, requires_grad=True)
        value = activation(zero.clone())
        passes = bool(torch.autograd.grad(value.sum(), zero)[0].all()) if value.requires_grad else False
    return value.flatten()[0].item(), passes


def _open(block: nn.Module, gates: Sequence[_Gate], channels: int) -> None:
    """Zero what makes the activations' inputs, and scale each activation to 1 there."""
    probe = probe_model(block, example=torch.zeros(2, channels, _SIZE, _SIZE))
    for parameter in (p for gate in gates for p in gate.parameters):
        nn.init.zeros_(parameter)
    by_owner: dict[str, list[_Operation]] = {}
    for gate in gates:
        by_owner.setdefault(gate.operation.path, []).append(gate.operation)
    for path, operations in by_owner.items():
        owner = block.get_submodule(path)
        if operations[0].name == "module":
            written = write_scaled(owner, _get_scale(_evaluate(owner)[0]))
        else:
            trace = trace_entry(probe.twin, Entry(path), probe.visits[Entry(path)].calls[0], training=False)
            if trace.reads_mode:
                raise _RefusalError(f"the code of its {type(owner).__name__} depends on the mode")
            _scale(trace.graph, operations)
            written = write_method(owner, [trace])
        note = "a gate is 1 where its last layer is 0"
        owner.__class__ = derive_class(
            type(owner), [note], {"forward": written}, prefix="Open", purpose="with channel attention"
        )


def _get_scale(at_zero: float) -> str:
    scales = {0.0: "1 +", 0.5: "2 *", 1.0: ""}  # what is exact in every float format
    if at_zero not in scales:
        raise _RefusalError(f"its gate is {at_zero:g} at zero; from 0, 0.5 or 1 it can be made exactly 1")
    return scales[at_zero]


def _scale(graph: fx.Graph, operations: Sequence[_Operation]) -> None:
    for operation in {(o.name, o.index): o for o in operations}.values():
        named = [
            n
            for n in graph.nodes
            if n.op in ("call_function", "call_method") and getattr(n.target, "__name__", n.target) == operation.name
        ]
        if operation.index >= len(named):
            raise _RefusalError("its gate's activation is not found in its code")
        node = named[operation.index]
        function, number = (operator.add, 1) if operation.name.startswith("tanh") else (operator.mul, 2)
        with graph.inserting_after(node):
            scaled = graph.call_function(function, (node, number))
        scaled.meta.update(node.meta)
        node.replace_all_uses_with(scaled, lambda user, scaled=scaled: user is not scaled)
