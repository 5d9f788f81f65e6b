"""Heads: fit a classifier's number of classes to the data.

Takes a network, gives the number of its outputs, or replaces its last layer. Changes the given network.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import DataError, get_first_line
from se_inject.rewrite import blocks
from se_inject.twin import get_device, get_dtype, set_training

Classifier = nn.Linear | nn.Conv2d


def count_outputs(model: nn.Module, size: tuple[int, int, int]) -> int:
    """Count the classes that a network gives scores for, by one run on an image of zeros.

    Args:
        model: A classifier; its mode is kept.
        size: (C, H, W) of its input.

    Raises:
        DataError: It does not run on such an image, or gives no scores (N, classes).
    """
    with set_training(model, False), torch.no_grad():
        try:
            outputs = model(torch.zeros(1, *size, device=get_device(model), dtype=get_dtype(model)))
        except (RuntimeError, TypeError, ValueError, AssertionError, LookupError) as error:
            line = get_first_line(error)
            raise DataError(
                f"{type(model).__name__} does not run on images {size}: {line}; --input-size and --in-chans say others"
            ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        raise DataError(f"{type(model).__name__} gives no scores (N, classes); fine-tuning is for classifiers")
    return outputs.shape[1]


def count_channels(model: nn.Module) -> int:
    """Count the channels of the images that a network takes: those of its first convolution; 3 if it has none."""
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels


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
        for path in _find_heads(model, num_outputs):
            parent, _, name = path.rpartition(".")
            owner = model.get_submodule(parent)
            owner._modules[name] = _make_layer(model.get_submodule(path), num_classes)
    fresh = {name: p for name, p in model.named_parameters() if before.get(name) is not p}
    old = next(iter(before.values()))
    for parameter in fresh.values():  # timm makes them on the CPU
        parameter.data = parameter.data.to(old.device, old.dtype)
    return frozenset(fresh)


def find_classifier(model: nn.Module, fresh: Collection[str], images: Tensor) -> Classifier | None:
    """Find the linear layer (or 1x1 convolution) whose outputs are the network's.

    Args:
        model: It is run in eval mode, and left as it is.
        fresh: Names of the parameters among which to look.
        images: (N, C, H, W), normalised.

    Returns:
        The layer; None if the last one is of another kind, or if something follows it.
    """
    layers = {model.get_submodule(name.rpartition(".")[0]) for name in fresh}
    found: list[tuple[Classifier, Tensor]] = []

    def note(layer: nn.Module, _: object, output: Tensor) -> None:
        if isinstance(layer, Classifier) and _get_outputs(layer) is not None:
            found.append((layer, output))

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with set_training(model, False), torch.no_grad():
            outputs = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    same = [layer for layer, output in found if output.flatten(1).equal(outputs)]
    return same[0] if len(same) == 1 else None


def _find_heads(model: nn.Module, num_outputs: int) -> list[str]:
    """Find the last layer of as many outputs, of the network and of each auxiliary head; blocks have others."""
    inside = tuple(f"{path}." for path in blocks(model))
    found = [
        path
        for path, layer in model.named_modules()
        if _get_outputs(layer) == num_outputs and not path.startswith(inside)
    ]
    last = {path.partition(".")[0] if "aux" in path.lower() else "": path for path in found}
    if "" not in last:
        raise DataError(
            f"{type(model).__name__} has no linear layer of {num_outputs} outputs to replace; give it the number of "
            f"classes where it is made"
        )
    return list(last.values())


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
