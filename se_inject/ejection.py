"""Ejection: give an injected network back as it was. The inverse of `rewrite`.

Takes an injected model, gives it without its blocks: the classes, attributes and state-dict keys of the original, with
the weights that it has now. Either all blocks go, or the model is as it was.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from numpy.typing import ArrayLike
from torch import Tensor, fx, nn

from se_inject.block import is_block
from se_inject.errors import ModelError
from se_inject.gate_folding import fold_weights
from se_inject.generated import get_base
from se_inject.marks import OPTIMIZED, REMOVED, Removed, check_kind, erase_marks, find_mark
from se_inject.reparameterization import allow_merging
from se_inject.rewrite import copy_model, find_plan


def eject(
    model: nn.Module, *, gates: Mapping[str, ArrayLike | Tensor] | None = None, inplace: bool = False
) -> nn.Module:
    """Take all blocks out of an injected network, and everything else that injecting changed.

    The result has the classes, attributes and state-dict keys (in their order) of the original. Its weights are those
    that the model has now: the original's, until it was trained. A gate that was trained is gone, unless it is given in
    `gates`: then the weights of the layer beside its block carry it, the same for every image. The graph of an
    `fx.GraphModule` is its present one without the blocks.

    Args:
        model: From `inject` or `load`, or a copy of it.
        gates: (C,) by the paths of blocks, tensors or arrays, such as the `overall_mean` that `collect_gates` gives.
        inplace: Change the given model, instead of a copy.

    Raises:
        ModelError: The model has not been injected, an owner of a block was changed since in a way that hides what it
            was, or a gate cannot be folded.

    Example:
        >>> import torchvision
        >>> from se_inject import inject
        >>> type(eject(inject(torchvision.models.resnet18())).layer1[0]).__name__
        'BasicBlock'
    """
    check_kind(model)
    # A network whose blocks were all folded has a plan still, and nothing that was removed for a block.
    if not any(_find_removed(module) or find_plan(module) for module in model.modules()):
        raise ModelError(f"{type(model).__name__} has not been injected; there is nothing to eject")
    if find_mark(model, OPTIMIZED) is not None:
        raise ModelError(f"{type(model).__name__} is optimized; eject from the network that it was made from")
    target = model if inplace else copy_model(model)
    restorations = [
        _prepare(path, owner, removed)
        for path, owner in target.named_modules()
        if (removed := _find_removed(owner)) is not None
    ]
    if gates:
        fold_weights(target, gates)
    for module in target.modules():
        erase_marks(module)
        allow_merging(module)
    for restoration in restorations:
        restoration.perform()
    return target


@dataclass(frozen=True)
class _Restoration:
    """What happens to one owner: its former class or (a GraphModule's) graph, and its former attributes."""

    owner: nn.Module
    removed: Removed
    base: type[nn.Module]
    graph: fx.Graph | None

    def perform(self) -> None:
        """Change the owner; nothing in here is expected to fail."""
        owner, children = self.owner, self.owner._modules
        for name in self.removed.blocks:
            if name in self.removed.children:
                children[name] = None  # in its place, which is the one in the state dict too
            else:
                children.pop(name, None)
        if self.graph is not None:
            cast("fx.GraphModule", owner).graph = self.graph
        else:
            owner.__class__ = self.base
        vars(owner).update(self.removed.attributes)


def _find_removed(module: nn.Module) -> Removed | None:
    removed = find_mark(module, REMOVED)
    return removed if isinstance(removed, Removed) else None


def _prepare(path: str, owner: nn.Module, removed: Removed) -> _Restoration:
    """Do all that can fail."""
    where = path or "the model"
    if isinstance(owner, fx.GraphModule):
        return _Restoration(owner, removed, type(owner), _take_out(owner, where))
    base = get_base(type(owner))
    if base is type(owner):
        raise ModelError(
            f"{where} had its class changed since it was injected, to {base.__name__} (a parametrization does so); "
            f"undo that, then eject"
        )
    return _Restoration(owner, _drop_generated(owner, removed), base, None)


def _drop_generated(owner: nn.Module, removed: Removed) -> Removed:
    """Drop methods that are the generated class's own: a pickle writes a method by its name, and reads that one."""
    generated = vars(type(owner)).values()
    kept = {k: v for k, v in removed.attributes.items() if getattr(v, "__func__", None) not in generated}
    return Removed(removed.blocks, kept, removed.children)


def _take_out(owner: fx.GraphModule, where: str) -> fx.Graph:
    """Copy a graph without its blocks; what they gated goes on as it is."""
    graph: Any = copy.deepcopy(owner.graph)
    for node in list(graph.nodes):
        if node.op != "call_module" or not is_block(owner.get_submodule(node.target)):
            continue
        if node.kwargs:  # it adds a shortcut
            with graph.inserting_before(node):
                total = graph.call_function(operator.add, (node.args[0], node.kwargs["shortcut"]))
            node.replace_all_uses_with(total)
        elif len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
        for item in list(node.users):
            if item.target is not operator.getitem:
                raise ModelError(f"the graph of {where} uses {node.name} in a way that no injection wrote: {item.name}")
            item.replace_all_uses_with(node.args[item.args[1]])
            graph.erase_node(item)
        graph.erase_node(node)
    graph.lint()
    return graph  # type: ignore[no-any-return]
