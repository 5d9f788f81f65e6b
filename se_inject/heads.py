"""Heads: fit a classifier's number of classes to the data.

Takes a network, gives the number of its outputs, or replaces its last layer. Changes the given network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import DataError
from se_inject.twin import get_device, get_dtype, set_training


def count_outputs(model: nn.Module, size: tuple[int, int, int]) -> int:
    """Count the classes that a network gives scores for, by one run on an image of zeros.

    Args:
        model: A classifier; its mode is kept.
        size: (C, H, W) of its input.

    Raises:
        DataError: It does not run on such an image, or gives no scores (N, classes).
    """
    zeros = torch.zeros(1, *size, device=get_device(model), dtype=get_dtype(model))
    with set_training(model, False), torch.no_grad():
        try:
            outputs = model(zeros)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{type(model).__name__} does not run on images {size}: {line}; --input-size and --in-chans say others"
            ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        raise DataError(f"{type(model).__name__} gives no scores (N, classes); fine-tuning is for classifiers")
    return outputs.shape[1]


def replace_head(model: nn.Module, num_outputs: int, num_classes: int) -> frozenset[str]:
    """Replace a network's classifier by a fresh one.

    Args:
        model: Is changed; timm's `reset_classifier` does it where there is one, else the last linear layer (or 1x1
            convolution) of as many outputs is replaced, and those of auxiliary heads.
        num_outputs: Outputs that it has.
        num_classes: Outputs that it is to have.

    Returns:
        Names of the fresh parameters.

    Raises:
        DataError: It has no such layer.
    """
    before = dict(model.named_parameters())
    reset = getattr(model, "reset_classifier", None)
    if callable(reset):
        reset(num_classes)
    else:
        heads = [path for path, layer in model.named_modules() if _get_outputs(layer) == num_outputs]
        if not heads:
            raise DataError(f"{type(model).__name__} has no linear layer of {num_outputs} outputs to replace")
        for path in {heads[-1], *(path for path in heads if "aux" in path)}:
            parent, _, name = path.rpartition(".")
            owner = model.get_submodule(parent)
            owner._modules[name] = _make_layer(model.get_submodule(path), num_classes)
    return frozenset(name for name, parameter in model.named_parameters() if before.get(name) is not parameter)


def _get_outputs(layer: nn.Module) -> int | None:
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        return layer.out_channels
    return None


def _make_layer(old: nn.Module, num_classes: int) -> nn.Module:
    weight = old.weight
    assert isinstance(weight, Tensor)
    options: dict[str, Any] = {"bias": old.bias is not None, "device": weight.device, "dtype": weight.dtype}
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, num_classes, **options)
    assert isinstance(old, nn.Conv2d)
    return nn.Conv2d(old.in_channels, num_classes, 1, **options)
