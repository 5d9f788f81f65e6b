"""Folding of gates: put a gate that is the same for every image into a layer's weights, and take its block out.

Takes an injected network and gates, gives the network without those blocks. A gate scales the channels of the maps that
a layer makes (or that one reads), and so can that layer's weights. Either all blocks go, or the model is as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from se_inject.absorption import Fold, Folds, find_folds
from se_inject.block import SqueezeExcite
from se_inject.ejection import eject
from se_inject.errors import ModelError
from se_inject.gates import get_own_blocks
from se_inject.marks import SOURCE, find_mark, mark_module
from se_inject.plan import PassedOver, Plan, Site
from se_inject.rewrite import blocks, copy_model, get_plan, inject
from se_inject.scaling import UnreachableError

_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
"""Layers whose features are the last dimension."""
_NORMS = (_NormBase, nn.GroupNorm)
FOLDED = "its gate is folded into the layer beside it"


def find_gate_folds(model: nn.Module, paths: Collection[str] | None = None) -> Folds:
    """Find out which blocks' gates could be folded, were they the same for every image.

    Args:
        model: An injected network; it is neither run nor changed.
        paths: Of the blocks; all if None.

    Raises:
        ModelError: The model has not been injected.

    Example:
        >>> import torchvision
        >>> from se_inject import inject
        >>> find_gate_folds(inject(torchvision.models.resnet18())).folds[0].parameters
        ['layer1.0.bn2.bias', 'layer1.0.bn2.weight']
    """
    present = blocks(model)
    found = find_folds(model, list(present) if paths is None else paths, _check_block, is_channelwise=True)
    folds, kept = [], dict(found.kept)
    for fold in found.folds:
        block = present[fold.block]
        assert isinstance(block, SqueezeExcite)
        try:
            for name, size in _list_parameters(fold):
                _shape_factor(model, name, torch.ones(size), block, is_after=fold.is_after)
            folds.append(fold)
        except UnreachableError as error:
            kept[fold.block] = str(error)
    return Folds(tuple(folds), kept)


def fold_gates(model: nn.Module, gates: Mapping[str, Tensor]) -> nn.Module:
    """Take blocks out of a network and let the weights of the layers beside them carry their gates.

    In real numbers the result computes what the network does with these gates fixed; in floating point, what rounding
    leaves. The blocks that stay keep their paths and weights.

    Args:
        model: From `inject` or `load`; it is left as it is.
        gates: (C,) by the paths of the blocks that go.

    Raises:
        ModelError: The model has not been injected, or a gate cannot be folded; `find_gate_folds` says which can.

    Example:
        >>> import torch, torchvision
        >>> from se_inject import blocks, inject
        >>> model = inject(torchvision.models.resnet18())
        >>> len(blocks(fold_gates(model, {"layer1.0.se": torch.full((64,), 0.5)})))
        7
    """
    own, plan = get_own_blocks(model), get_plan(model)
    if unknown := set(gates) - set(own):
        raise ModelError(f"{min(unknown)} is no block of {type(model).__name__}; its blocks are {', '.join(own)}")
    found = find_gate_folds(model, gates)
    if found.kept:
        path, reason = next(iter(found.kept.items()))
        raise ModelError(f"the gate of {path} cannot be folded: {reason}; leave it out")
    target = copy_model(model)
    with torch.no_grad():
        for fold in found.folds:
            _fold(target, fold, own[fold.block], gates[fold.block])
    rest = tuple(site for site in plan.sites if site.path not in gates)
    gone = tuple(_pass_over(site) for site in plan.sites if site.path in gates)
    return restrict_blocks(target, replace(plan, sites=rest, passed_over=(*plan.passed_over, *gone)))


def restrict_blocks(model: nn.Module, plan: Plan, smaller: Mapping[str, SqueezeExcite] | None = None) -> nn.Module:
    """Cut a network again by another plan for some of its sites; the blocks that stay keep their weights.

    Args:
        model: An injected network, which is changed.
        plan: The other plan.
        smaller: What takes the place of blocks of which the plan says another size.
    """
    before = blocks(model)
    modes = {path: module.training for path, module in model.named_modules()}
    source = find_mark(model, SOURCE)
    model = inject(eject(model, inplace=True), plan=plan, inplace=True)
    if source is not None:
        mark_module(model, SOURCE, source)
    for path, block in blocks(model).items():
        own = (smaller or {}).get(path, before[path])
        block.load_state_dict(own.state_dict())
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(own.get_parameter(name).requires_grad)
        block.train(modes[path])
        if isinstance(block, SqueezeExcite) and isinstance(own, SqueezeExcite):
            block.gain = own.gain
    return model


def _fold(model: nn.Module, fold: Fold, block: SqueezeExcite, gate: Tensor) -> None:
    """Multiply the parameters of a fold by their parts of a gate, (C,)."""
    parts = torch.split(gate, list(fold.channels))
    for names, part in zip(fold.maps, parts, strict=True):
        for name in names:
            parameter = model.get_parameter(name)
            factor = _shape_factor(model, name, part.to(parameter.device), block, is_after=fold.is_after)
            parameter.copy_(parameter.double() * factor.double())


def _list_parameters(fold: Fold) -> list[tuple[str, int]]:
    """List the parameters with the number of channels of the map that they scale."""
    return [(name, size) for names, size in zip(fold.maps, fold.channels, strict=True) for name in names]


def _shape_factor(model: nn.Module, name: str, gate: Tensor, block: SqueezeExcite, *, is_after: bool) -> Tensor:
    """Give a gate (C,) the shape in which it multiplies a parameter.

    Raises:
        UnreachableError: The parameter has no numbers of its own for each channel.
    """
    parameter = model.get_parameter(name)
    layer = model.get_submodule(name.rpartition(".")[0])
    ones = [1] * (parameter.ndim - 2)
    is_last = isinstance(layer, _LAST)
    if (is_last or isinstance(layer, (_ConvNd, *_NORMS))) and is_last != (block.channel_dim == -1):
        raise UnreachableError(f"{name} is not one number a channel of the map")
    if isinstance(layer, (_ConvNd, nn.Linear)) and parameter.ndim > 1:
        is_transposed, groups = isinstance(layer, _ConvTransposeNd), getattr(layer, "groups", 1)
        if is_transposed == is_after:
            return gate.view(-1, 1, *ones)
        of_groups = gate.view(groups, 1, -1).expand(-1, parameter.shape[0] // groups, -1)
        return of_groups.reshape(*parameter.shape[:2], *ones)
    if parameter.numel() == len(gate) and not is_after:
        return gate.view_as(parameter)
    raise UnreachableError(f"{name} has {tuple(parameter.shape)} numbers for {len(gate)} channels")


def _check_block(block: nn.Module) -> None:
    if not isinstance(block, SqueezeExcite):
        raise UnreachableError(f"it is a {type(block).__name__} and not a squeeze-and-excitation block of ours")


def _pass_over(site: Site) -> PassedOver:
    return PassedOver(site.owner, site.method, site.kind, site.merge, FOLDED, site.num_merges)
