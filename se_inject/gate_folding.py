"""Folding of gates: put a gate that is the same for every image into the weights of a layer.

Takes an injected network and gates, and multiplies weights: a gate scales the channels of the maps that a layer makes
(or that one reads), and so can that layer. The blocks are taken out afterwards, by `ejection` or `restriction`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from se_inject.absorption import Fold, Folds, find_folds
from se_inject.block import SqueezeExcite
from se_inject.errors import ModelError
from se_inject.gates import get_own_blocks
from se_inject.rewrite import blocks
from se_inject.scaling import UnreachableError

_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
"""Layers whose features are the last dimension."""
_NORMS = (_NormBase, nn.GroupNorm)


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


def fold_weights(model: nn.Module, gates: Mapping[str, ArrayLike | Tensor]) -> None:
    """Multiply weights by the gates of blocks, which are then to be taken out.

    Args:
        model: An injected network, which is changed: its weights alone.
        gates: (C,) by the paths of the blocks: tensors, or arrays.

    Raises:
        ModelError: There is no such block, or its gate is negative or cannot be folded; nothing is changed then.
    """
    own = get_own_blocks(model)
    if unknown := set(gates) - set(own):
        raise ModelError(f"{min(unknown)} is no block of {type(model).__name__}; its blocks are {', '.join(own)}")
    read = {path: _read_gate(path, gate, own[path].channels) for path, gate in gates.items()}
    found = find_gate_folds(model, read)
    if found.kept:
        path, reason = next(iter(found.kept.items()))
        raise ModelError(f"the gate of {path} cannot be folded: {reason}; leave it out")
    with torch.no_grad():
        for fold in found.folds:
            _fold(model, fold, own[fold.block], read[fold.block])


def _read_gate(path: str, gate: ArrayLike | Tensor, num_channels: int) -> Tensor:
    try:
        read = torch.as_tensor(gate if isinstance(gate, Tensor) else np.asarray(gate, dtype=float))
    except (TypeError, ValueError) as error:
        raise ModelError(f"the gate of {path} is a {type(gate).__name__}; expected numbers") from error
    if read.shape != (num_channels,):
        raise ModelError(f"the gate of {path} has the shape {tuple(read.shape)}; expected ({num_channels},)")
    if not (read.isfinite() & (read >= 0)).all():  # a negative number does not pass through a ReLU
        raise ModelError(f"the gate of {path} has numbers that are not finite or below 0; a gate is at least 0")
    return read


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
    if parameter.numel() == len(gate):
        return gate.view_as(parameter)
    raise UnreachableError(f"{name} has {tuple(parameter.shape)} numbers for {len(gate)} channels")


def _check_block(block: nn.Module) -> None:
    if not isinstance(block, SqueezeExcite):
        raise UnreachableError(f"it is a {type(block).__name__} and not a squeeze-and-excitation block of ours")
