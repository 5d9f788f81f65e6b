"""Scaling: find the parameters that, multiplied by a positive number, multiply a map by it, or undo that it is not.

Takes the traced graph of a method and one of its nodes, gives the names of the parameters of the affine layers (a norm,
a convolution, a linear layer, a layer scale) from which the map comes through operations that commute with a positive
factor (ReLU, dropout, pooling), or into which it goes, or the reason why there are none. Changes nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from se_inject.calls import Call, Entry
from se_inject.errors import TraceError
from se_inject.folding import has_hooks
from se_inject.functions import (
    CONCATENATIONS,
    CONVOLUTIONS,
    HOMOGENEOUS,
    MIXING,
    NORMS,
    PRODUCTS,
    QUOTIENTS,
    READS,
    SUMS,
)
from se_inject.hazards import get_ancestors
from se_inject.tracing import Trace, trace_entry
from se_inject.twin import Twin

_AFFINE_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(_BatchNorm, nn.SyncBatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
)
# A subclass with a forward of its own (weight standardisation, a norm with an activation) is looked into instead.
_AFFINE_FORWARDS = frozenset(layer.forward for layer in _AFFINE_LAYERS)
_LINEAR_FORWARDS = frozenset(layer.forward for layer in _AFFINE_LAYERS[:7])
_AFFINE_FUNCTIONS = {  # the places of weight and bias among the arguments
    **dict.fromkeys((*CONVOLUTIONS, "linear"), (1, 2)),
    **dict.fromkeys(("batch_norm", "instance_norm"), (3, 4)),
    **dict.fromkeys(("layer_norm", "group_norm", "rms_norm"), (2, 3)),
}
_ADDITIONS = SUMS | {"sub", "sub_", "__sub__", "__isub__", "isub"}
_PRODUCTS = PRODUCTS | {"imul"}


@dataclass(frozen=True)
class Search:
    """Where a factor is looked for, and what kind of one.

    Attributes:
        twin: The fake twin that holds the traced modules.
        is_channelwise: Whether each channel has a factor of its own, which nothing on the way may mix or move.
    """

    twin: Twin
    is_channelwise: bool = False

    @property
    def passing(self) -> frozenset[str]:
        """Names of the operations through which the factor passes."""
        return HOMOGENEOUS - MIXING if self.is_channelwise else HOMOGENEOUS


class UnreachableError(Exception):
    """There is no set of parameters that scales the map; the message is the reason."""


@dataclass(frozen=True)
class Scale:
    """What scales a map: parameters by their full names, or the arguments of the method that have to be scaled."""

    parameters: frozenset[str]
    arguments: frozenset[str] = frozenset()

    def __or__(self, other: Scale) -> Scale:
        """Join two scales, of maps that are added or concatenated."""
        if self.parameters & other.parameters:
            raise UnreachableError(f"{min(self.parameters & other.parameters)} is used twice for it")
        return Scale(self.parameters | other.parameters, self.arguments | other.arguments)


def find_scale(search: Search, trace: Trace, node: fx.Node, user: fx.Node) -> Scale:
    """Find what scales a node's value, given that one operation alone uses it.

    Args:
        search: The fake twin that holds the traced module, and whether channels are told apart.
        trace: The graph of a method.
        node: The node of the map.
        user: The operation that takes the scaled map; no other may use it.

    Raises:
        UnreachableError: Nothing does; the message says why.

    Example:
        >>> find_scale(search, trace, node, block)  # doctest: +SKIP
        Scale(parameters=frozenset({'layer1.0.bn3.weight', 'layer1.0.bn3.bias'}), arguments=frozenset())
    """
    others = [other for other in node.users if other is not user and not _only_reads(other)]
    if others:
        raise UnreachableError(f"`{node.name}` is used by `{others[0].name}` too")
    if node.op == "placeholder":
        return Scale(frozenset(), frozenset({str(node.target)}))
    if node.op == "get_attr":
        return _scale_parameters(search, trace, (node,))
    if node.op == "call_module":
        return _scale_child(search, trace, node)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return _scale_operation(search, trace, node, str(name))


def find_reader(search: Search, trace: Trace, node: fx.Node) -> Scale:
    """Find the weight that makes up for a factor that a node's value no longer has: that of the layer that reads it.

    Args:
        search: The fake twin that holds the traced module, and whether channels are told apart.
        trace: The graph of a method.
        node: The node of the map.

    Raises:
        UnreachableError: No single convolution, linear layer or layer scale reads it; the message says what does.
    """
    readers = [user for user in node.users if not _only_reads(user)]
    if len(readers) != 1 or readers[0].op == "output":
        raise UnreachableError(f"`{node.name}` is not read by one layer alone")
    reader = readers[0]
    name = reader.target if isinstance(reader.target, str) else getattr(reader.target, "__name__", "")
    is_first = _list_arguments(reader)[0] is node and _list_arguments(reader).count(node) == 1
    if reader.op == "call_module":
        return _find_reader_inside(search, trace, node, reader)
    if is_first and name in (*CONVOLUTIONS, "linear"):
        return _scale_parameters(search, trace, [_get_argument(reader, 1, "weight")])
    if is_first and name in search.passing:
        return find_reader(search, trace, reader)
    others = [other for other in reader.all_input_nodes if other is not node]
    if name in _PRODUCTS and len(others) == 1 and not _is_computed(others[0]):  # a layer scale
        return find_scale(search, trace, others[0], reader)
    raise UnreachableError(f"`{reader.name}` reads it, which is no convolution, linear layer or layer scale")


def _find_reader_inside(search: Search, trace: Trace, node: fx.Node, reader: fx.Node) -> Scale:
    path, child = _get_child(search, trace, reader)
    if type(child).forward in _LINEAR_FORWARDS and "forward" not in vars(child):
        return _check_uses(search, trace, Scale(frozenset({_find_weight(child, path)})))
    if _is_homogeneous(search, child, reader):
        return find_reader(search, trace, reader)
    inner = _trace_child(search, trace, reader, Entry(path))
    bound = inner.signature.bind(*reader.args, **reader.kwargs).arguments
    names = {name for name, value in bound.items() if value is node}
    handed = [n for n in inner.graph.nodes if n.op == "placeholder" and n.target in names]
    if len(handed) != 1:
        raise UnreachableError(f"{path} takes the map in another way than as one argument")
    return _check_uses(search, trace, find_reader(search, inner, handed[0]))


def _scale_operation(search: Search, trace: Trace, node: fx.Node, name: str) -> Scale:
    if name in _AFFINE_FUNCTIONS:
        arguments = [_get_argument(node, *place) for place in zip(_AFFINE_FUNCTIONS[name], ("weight", "bias"))]  # noqa: B905
        if name in NORMS and arguments[0] is None:
            raise UnreachableError(f"`{node.name}` is a norm without a scale")
        return _scale_parameters(search, trace, [x for x in arguments if x is not None])
    operands = [n for n in node.all_input_nodes if isinstance(n.meta["value"], Tensor)]
    if name in _ADDITIONS or (name in CONCATENATIONS and not search.is_channelwise):
        scales = [find_scale(search, trace, operand, node) for operand in operands]
        if name in _ADDITIONS and len(scales) < 2:
            raise UnreachableError(f"`{node.name}` adds a number")
        result = scales[0]
        for scale in scales[1:]:
            result |= scale
        return result
    if name in _PRODUCTS:
        return _scale_factor(search, trace, node, operands)
    if name in search.passing or name in QUOTIENTS or (name in HOMOGENEOUS and _is_vector(node)):
        source = _list_arguments(node)[0]
        if isinstance(source, fx.Node) and isinstance(source.meta["value"], Tensor):
            return find_scale(search, trace, source, node)
    raise UnreachableError(f"`{node.name}` is no affine layer, and a factor does not pass through it")


def _scale_factor(search: Search, trace: Trace, node: fx.Node, operands: list[fx.Node]) -> Scale:
    """Scale one factor of a product: a parameter (a layer scale), or else the map."""
    if sum(isinstance(x, fx.Node) for x in _list_arguments(node)) > len(operands):
        raise UnreachableError(f"`{node.name}` is a square")
    reason = UnreachableError(f"`{node.name}` is a product of masks")
    for operand in sorted(operands, key=_is_computed):
        if _is_computed(operand) and operand.meta["value"].shape != node.meta["value"].shape:
            continue  # a mask, as drop path draws it
        try:
            return find_scale(search, trace, operand, node)
        except UnreachableError as error:
            reason = error
    raise reason


def _is_computed(node: fx.Node) -> bool:
    """Tell whether a value depends on the input, and not on parameters alone as a reshaped layer scale does."""
    return any(n.op != "get_attr" for n in get_ancestors(node) if not n.all_input_nodes)


def _is_vector(node: fx.Node) -> bool:
    """Tell whether a value is a parameter with one number a channel, as a reshaped layer scale is."""
    return not _is_computed(node) and sum(size > 1 for size in node.meta["value"].shape) == 1


def _get_child(search: Search, trace: Trace, node: fx.Node) -> tuple[str, nn.Module]:
    """Return the child that a node calls, with its path.

    Raises:
        UnreachableError: It is no child, or a hook in it may do anything to what it is handed and gives.
    """
    path = ".".join(filter(None, (trace.entry.path, str(node.target))))
    try:
        child = search.twin.model.get_submodule(path)
    except AttributeError as error:
        raise UnreachableError(f"`{node.target}` is a method with a code of its own") from error
    for name, module in child.named_modules(prefix=path):
        if has_hooks(module):
            raise UnreachableError(f"{name} has a hook")
    return path, child


def _scale_child(search: Search, trace: Trace, node: fx.Node) -> Scale:
    path, child = _get_child(search, trace, node)
    if type(child).forward in _AFFINE_FORWARDS and "forward" not in vars(child):
        return _scale_layer(search, trace, child, path)
    if _is_homogeneous(search, child, node):
        return find_scale(search, trace, node.all_input_nodes[0], node)
    return _look_into(search, trace, node, Entry(path))


def _is_homogeneous(search: Search, child: nn.Module, node: fx.Node) -> bool:
    # Of torch's own layers the names of their operations tell all; others may hold an autograd function.
    is_known = all(type(layer).__module__.startswith("torch.nn.modules.") for layer in child.modules())
    arguments = [x for x in _list_arguments(node) if isinstance(x, fx.Node)]
    return is_known and node.meta["work"].names <= search.passing and len(arguments) == 1


def _scale_layer(search: Search, trace: Trace, layer: nn.Module, path: str) -> Scale:
    names = {_find_weight(layer, path)}
    if layer._parameters.get("bias") is not None:
        names.add(f"{path}.bias")
    elif getattr(layer, "bias", None) is not None:
        raise UnreachableError(f"{path} computes its bias from other parameters")
    return _check_uses(search, trace, Scale(frozenset(names)))


def _find_weight(layer: nn.Module, path: str) -> str:
    if layer._parameters.get("weight") is None:  # a norm without one, or a parametrized layer
        raise UnreachableError(f"{path} ({type(layer).__name__}) has no weight that could be scaled")
    return f"{path}.weight"


def _look_into(search: Search, trace: Trace, node: fx.Node, entry: Entry) -> Scale:
    """Find what scales the result of a child with a forward of its own."""
    inner = _trace_child(search, trace, node, entry)
    output = next(iter(reversed(inner.graph.nodes)))
    result = output.args[0]
    if not isinstance(result, fx.Node):
        raise UnreachableError(f"{entry} gives more than one map")
    scale = find_scale(search, inner, result, output)
    bound = inner.signature.bind(*node.args, **node.kwargs).arguments
    outer = _check_uses(search, trace, Scale(scale.parameters))
    for name in sorted(scale.arguments):
        argument = bound.get(name)
        if not isinstance(argument, fx.Node):
            raise UnreachableError(f"{entry} takes its maps from a container")
        outer |= find_scale(search, trace, argument, node)
    return outer


def _trace_child(search: Search, trace: Trace, node: fx.Node, entry: Entry) -> Trace:
    child = search.twin.model.get_submodule(entry.path)
    # A norm counts its batches in train mode, which a graph would not; its map is made the same way in both modes.
    training = trace.training and not isinstance(child, _NormBase)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["value"])
    try:
        return trace_entry(search.twin, entry, Call(tuple(args), dict(kwargs)), training=training)
    except TraceError as error:
        raise UnreachableError(f"the code of {entry} cannot be followed: {error}") from error


def _scale_parameters(search: Search, trace: Trace, arguments: Any) -> Scale:
    """Scale the parameters that an operation is handed."""
    names = set()
    for argument in arguments:
        target = str(argument.target) if isinstance(argument, fx.Node) and argument.op == "get_attr" else ""
        path = ".".join(filter(None, (trace.entry.path, target)))
        if not target or path not in dict(search.twin.model.named_parameters(remove_duplicate=False)):
            raise UnreachableError(f"`{argument}` is no parameter that could be scaled")
        names.add(path)
    return _check_uses(search, trace, Scale(frozenset(names)))


def _check_uses(search: Search, trace: Trace, scale: Scale) -> Scale:
    """Refuse parameters that the traced code uses in more than one place."""
    owner = search.twin.model.get_submodule(trace.entry.path)
    for name in sorted(scale.parameters):
        parameter = search.twin.model.get_parameter(name)
        uses = [n for n in trace.graph.nodes if any(p is parameter for p in _get_parameters(owner, n))]
        if len(uses) != 1 or (uses[0].op == "get_attr" and len(uses[0].users) != 1):
            raise UnreachableError(f"{name} is used more than once")
    return scale


def _get_parameters(owner: nn.Module, node: fx.Node) -> Iterator[nn.Parameter]:
    if node.op == "call_module":
        path = str(node.target)
        try:
            yield from owner.get_submodule(path).parameters()
        except AttributeError:  # a method of a child: `features.forward_features`
            yield from owner.get_submodule(path.rpartition(".")[0]).parameters()
    elif node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(owner)
        if isinstance(value, nn.Parameter):
            yield value


def _only_reads(node: fx.Node) -> bool:
    is_attribute = node.op == "call_function" and node.target is getattr
    return is_attribute or (node.op == "call_method" and node.target in READS)


def _list_arguments(node: fx.Node) -> list[Any]:
    return [*node.args, *node.kwargs.values()]


def _get_argument(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)
