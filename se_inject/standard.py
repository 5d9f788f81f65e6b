"""Standard form: fold the gain of every block into the layer before it, which leaves the plain sigmoid block.

Takes an injected model, gives the same function with `gain` 1. As the block scales what it squeezes,
`gain * sigmoid(W2 relu(W1 mean(y) + b1) + b2) * y` is `sigmoid(W2 relu(W1' mean(y') + b1) + b2) * y'` with
`y' = gain * y` and `W1' = W1 / gain`; where y comes from an activation such as SiLU, the weight of the layer that reads
the block's output takes the gain instead. A gain of 2 changes exponents alone, so the outputs stay equal to the bit.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from se_inject.absorption import Folds, find_folds
from se_inject.block import SqueezeExcite
from se_inject.errors import StandardFormError
from se_inject.rewrite import blocks, copy_model
from se_inject.scaling import UnreachableError

_FOLDABLE_GATES = ("sigmoid", "hard_sigmoid")


def standardize(model: nn.Module, *, strict: bool = True, inplace: bool = False) -> nn.Module:
    """Give every block the gain 1, the form of the paper, without changing what the network computes.

    The affine layers that make a block's maps (the weight and bias of the last norm, or of the last convolution or
    linear layer where there is none) are multiplied by the gain, W1 is divided by it. With the gain that `inject`
    gives, 2, the outputs are equal to the bit in eval and in train mode; the maps between those layers and the block
    are twice what they were. An optimizer's state of before does not fit the result.

    Args:
        model: From `inject` or `load`, trained or not.
        strict: Refuse if a block has no standard form. Otherwise such a block keeps its gain (`block.gain` tells), and
            `find_standard_form` says why.
        inplace: Change the given model, instead of a copy.

    Raises:
        ModelError: The model has not been injected.
        StandardFormError: `strict`, and the gain of a block cannot be folded: another operation uses its map too, its
            maps pass through or come from an activation such as SiLU, or a layer is shared.

    Example:
        >>> import torchvision
        >>> model = standardize(inject(torchvision.models.resnet18()))
        >>> {block.gain for block in blocks(model).values()}
        {1.0}
    """
    form = find_standard_form(model)
    if strict and form.kept:
        first, reason = next(iter(form.kept.items()))
        more = f", and {len(form.kept) - 1} more" if len(form.kept) > 1 else ""
        raise StandardFormError(
            f"{len(form.kept)} of {len(blocks(model))} blocks have no standard form ({first}: {reason}{more}); "
            f"strict=False lets them keep their gain, exclude= leaves them out when injecting"
        )
    target = model if inplace else copy_model(model)
    with torch.no_grad():
        for fold in form.folds:
            block = cast("SqueezeExcite", target.get_submodule(fold.block))
            for name in fold.parameters:
                target.get_parameter(name).mul_(block.gain)
            if not fold.is_after:
                block.fc1.weight.div_(block.gain)
            block.gain = 1.0
    return target


def find_standard_form(model: nn.Module) -> Folds:
    """Find out for each block which parameters can take its gain; the model is neither run nor changed.

    Blocks whose gain is 1 already are in neither list.

    Raises:
        ModelError: The model has not been injected.

    Example:
        >>> import torchvision
        >>> form = find_standard_form(inject(torchvision.models.resnet18()))
        >>> form.folds[0]
        Fold(block='layer1.0.se', maps=(('layer1.0.bn2.bias', 'layer1.0.bn2.weight'),), channels=(64,), is_after=False)
    """
    return find_folds(model, [path for path, block in blocks(model).items() if _has_gain(block)], _check_gate)


def _has_gain(block: nn.Module) -> bool:
    return not (isinstance(block, SqueezeExcite) and block.gain == 1)


def _check_gate(block: nn.Module) -> None:
    if not isinstance(block, SqueezeExcite):
        raise UnreachableError(f"it is a {type(block).__name__} and not a squeeze-and-excitation block of ours")
    if block.gate not in _FOLDABLE_GATES:
        raise UnreachableError(f"its gate is {block.gate!r}, not a sigmoid")
    if not block.gain > 0:
        raise UnreachableError(f"its gain is {block.gain:g}, which is not positive")
