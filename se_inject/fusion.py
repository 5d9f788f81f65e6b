"""Fusion: find what a block can take over from the code around it, for evaluation.

Takes the graph of a method in eval mode and its blocks, edits the graph, and says for each block what it takes over:
the sum after it, the ReLU after that, the 1x1 convolution before it. Changes no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from se_inject.block import SqueezeExcite
from se_inject.folding import is_hooked
from se_inject.fused import Activation
from se_inject.sums import get_storage, is_written_between, list_tensors, take_sum

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_IDLE_NAMES = frozenset({"DropPath", "StochasticDepth", "DropConnect", "DropBlock", "DropBlock2d"})
"""What timm, torchvision and many a network's own code call a layer that gives back what it is handed in eval mode."""


@dataclass(frozen=True)
class Fusion:
    """What a block takes over, by the names of the owner's children; see `FusedSqueezeExcite`."""

    block: str
    convolution: str = ""
    scaled: str = ""
    activation: Activation = ""
    makers: tuple[str, ...] = ()

    def __str__(self) -> str:
        done = f"runs `{self.convolution}`" if self.convolution else "gates its map"
        return f"`{self.block}` {done}" + (f" and ends with {self.activation}" if self.activation else "")


def fuse_blocks(
    owner: nn.Module, graph: fx.Graph, names: Iterable[str], *, bare: set[str], free: set[str], keeping: set[str]
) -> list[Fusion]:
    """Fuse blocks with the code around them.

    Args:
        owner: The module whose method the graph is; only looked at.
        graph: Is edited.
        names: The blocks that are to be fused.
        bare: The norms of the owner that are folded, and leave nothing in their places.
        free: The children that run once in a pass, and that no other method runs.
        keeping: The children that keep a map which somebody may look at afterwards.
    """
    _drop_idle(owner, graph, bare)
    fusions = []
    for name in names:
        nodes = [n for n in graph.nodes if n.op == "call_module" and n.target == name]
        block = owner.get_submodule(name)
        if len(nodes) == 1 and isinstance(block, SqueezeExcite) and _is_plain(block):
            node = take_sum(graph, nodes[0], in_order=False)
            activation = _take_activation(owner, graph, node)
            maps = [x for x in node.args if isinstance(x, fx.Node)]
            is_free = all(set(x.users) == {node} and _is_fresh(owner, graph, x, keeping) for x in maps)
            makers = tuple(str(x.target) for x in maps) if is_free else ()
            fusion = _take_convolution(owner, graph, node, free)
            fusions.append(replace(fusion, activation=activation, makers=() if fusion.convolution else makers))
    graph.lint()
    return fusions


def _is_plain(block: SqueezeExcite) -> bool:
    """Tell whether a block is what its class says: its layers can be read off, and nobody looks at them or at it."""
    layers = (block.fc1, block.fc2)
    is_known = all(type(layer) is nn.Conv2d or is_parametrized(layer) for layer in layers)
    return is_known and not any(map(is_hooked, (block, *layers)))


def _drop_idle(owner: nn.Module, graph: fx.Graph, bare: set[str]) -> None:
    """Drop children that give what they are handed: identities, dropout in eval mode, norms that are folded."""
    for node in [n for n in graph.nodes if _is_idle(owner, n, bare)]:
        [source] = node.args
        node.replace_all_uses_with(source)
        for later in graph.nodes:
            written = later.meta.get("mutates", ())
            later.meta["mutates"] = tuple(source if n is node else n for n in written)
        graph.erase_node(node)


def _is_idle(owner: nn.Module, node: fx.Node, bare: set[str]) -> bool:
    child = _find_child(owner, node)
    if child is None or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        return False
    gives_it_back = node.meta["value"] is node.args[0].meta["value"] and not node.meta["mutates"]
    is_idle = node.target in bare or (gives_it_back and _is_known_idle(child))
    return is_idle and not any(map(is_hooked, child.modules()))


def _is_known_idle(child: nn.Module) -> bool:
    """Tell whether a child gives back whatever it is handed, and not just what it was handed here."""
    if type(child) is nn.Sequential:
        return all(map(_is_known_idle, child))
    return type(child) in _IDLE or type(child).__name__ in _IDLE_NAMES


def _find_child(owner: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the child that a node calls; a method with a code of its own, as `forward_features`, is none."""
    if node.op != "call_module":
        return None
    try:
        return owner.get_submodule(str(node.target))
    except AttributeError:
        return None


def _take_activation(owner: nn.Module, graph: fx.Graph, node: fx.Node) -> Activation:
    readers = list(node.users)
    if len(readers) != 1 or not isinstance(node.meta.get("value"), Tensor):  # a joint block has several
        return ""
    [reader] = readers
    if reader.op == "call_module":
        layer = _find_child(owner, reader)
        is_relu = isinstance(layer, nn.ReLU) and type(layer) is nn.ReLU and not is_hooked(layer)
    else:
        is_relu = getattr(reader.target, "__name__", reader.target) in ("relu", "relu_")
    if not is_relu or reader.all_input_nodes != [node]:
        return ""
    reader.replace_all_uses_with(node)
    node.meta["value"] = reader.meta["value"]
    graph.erase_node(reader)
    return "relu"


def _take_convolution(owner: nn.Module, graph: fx.Graph, node: fx.Node, free: set[str]) -> Fusion:
    name = str(node.target)
    maps = [x for x in node.args if isinstance(x, fx.Node)]
    [source] = maps if len(maps) == 1 else [None]
    layer = None if source is None else _find_child(owner, source)
    if source is None or layer is None or set(source.users) != {node} or len(source.args) != 1:
        return Fusion(name)
    path, [inner] = str(source.target), source.args
    is_known = type(layer) in _CONVOLUTIONS and not is_hooked(layer)
    if not isinstance(layer, _ConvNd) or not is_known or path not in free or not isinstance(inner, fx.Node):
        return Fusion(name)
    if not _is_narrow(layer, owner.get_submodule(name)) or is_written_between(graph, inner, source, node):
        return Fusion(name, scaled=path)
    node.args = (inner,)
    graph.erase_node(source)
    return Fusion(name, convolution=path)


def _is_narrow(layer: _ConvNd, block: nn.Module) -> bool:
    """Tell whether the mean can be taken before a convolution, where it reads less."""
    assert isinstance(block, SqueezeExcite)
    is_pointwise = {*layer.kernel_size, *layer.stride} == {1} and set(layer.padding) == {0}
    takes_means = block.squeeze == "mean" and block.channel_dim == 1
    return is_pointwise and takes_means and layer.in_channels < layer.out_channels


def _is_fresh(owner: nn.Module, graph: fx.Graph, node: fx.Node, keeping: set[str]) -> bool:
    """Tell whether a child made a map that nothing else holds, and that has a place of its own for each number."""
    child = _find_child(owner, node)
    if child is None:
        return False
    own = {get_storage(x) for x in (*owner.parameters(), *owner.buffers())}
    others = {get_storage(x) for n in graph.nodes if n is not node for x in list_tensors(n)}
    path = str(node.target)
    is_looked_at = any(map(is_hooked, child.modules())) or any(f"{kept}.".startswith(f"{path}.") for kept in keeping)
    is_expanded = any(stride == 0 for x in list_tensors(node) for stride in x.stride())
    return not (is_looked_at or is_expanded) and not {get_storage(x) for x in list_tensors(node)} & (own | others)
