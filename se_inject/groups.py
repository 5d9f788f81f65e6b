"""Parameter groups: blocks and backbone apart, for training.

Takes an injected model, gives groups for an optimizer, or freezes all but the blocks. Changes no weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from se_inject.rewrite import blocks, get_plan


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    se_lr: float,
    weight_decay: float = 0.0,
    no_weight_decay: Collection[str] = (),
    fresh: Collection[str] = (),
    fresh_lr: float = 0.0,
) -> list[dict[str, Any]]:
    """Sort the parameters that learn into groups, each with a name, a learning rate and a weight decay.

    Biases, norms and every other vector or scalar have no weight decay, nor have what the network itself lists in
    `no_weight_decay()`, as timm's do.

    Args:
        model: From `inject` or `load`, or a network without blocks; DDP and torch.compile are not seen through.
        lr: Learning rate of everything but the blocks.
        se_lr: Learning rate of the blocks.
        weight_decay: Of matrices and filters.
        no_weight_decay: Names of further parameters without weight decay.
        fresh: Names of parameters that start from random values, as those of a classifier that was replaced.
        fresh_lr: Learning rate of these.

    Returns:
        Groups for any optimizer of torch or timm; empty ones are left out.

    Example:
        >>> import timm, torch
        >>> model = inject(timm.create_model("resnet18"))
        >>> [group["name"] for group in param_groups(model, lr=0.01, se_lr=0.1, weight_decay=1e-4)]
        ['backbone', 'backbone, no decay', 'blocks', 'blocks, no decay']
        >>> optimizer = torch.optim.SGD(param_groups(model, lr=0.01, se_lr=0.1), lr=0.01)
    """
    listed = getattr(model, "no_weight_decay", None)
    exempt = {*no_weight_decay, *(listed() if callable(listed) else ())}
    inside = tuple(f"{path}." for path in blocks(model))
    groups: dict[str, dict[str, Any]] = {}
    for kind, rate in (("backbone", lr), ("blocks", se_lr), ("fresh", fresh_lr)):
        groups[kind] = {"name": kind, "params": [], "lr": rate, "weight_decay": weight_decay}
        groups[f"{kind}, no decay"] = {"name": f"{kind}, no decay", "params": [], "lr": rate, "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "blocks" if inside and name.startswith(inside) else "fresh" if name in fresh else "backbone"
            decays = parameter.ndim > 1 and name not in exempt
            groups[kind if decays else f"{kind}, no decay"]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def freeze_backbone(model: nn.Module) -> nn.Module:
    """Let the blocks alone learn: everything else wants no gradient, and batch norms keep their statistics.

    `model.train()` sets batch norms going again; call `freeze_batch_norm(model)` after it. To undo it all, call
    `model.requires_grad_(True).train()`.

    Args:
        model: From `inject` or `load`; it is changed.

    Returns:
        The model.

    Raises:
        ModelError: The model has not been injected.

    Example:
        >>> import timm
        >>> model = freeze_backbone(inject(timm.create_model("resnet18")).train())
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        90112
    """
    get_plan(model)
    model.requires_grad_(False)
    for block in blocks(model).values():
        block.requires_grad_(True)
    return freeze_batch_norm(model)


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """Put the batch norms of the backbone into eval mode: they use their statistics and do not change them.

    Args:
        model: Any network; it is changed. Those inside of a block of another attention go on.

    Returns:
        The model.
    """
    for norm in iterate_batch_norms(model):
        norm.eval()
    return model


def iterate_batch_norms(model: nn.Module) -> Iterator[nn.Module]:
    """Iterate over the batch norms that are not in a block."""
    return (module for module in iterate_backbone(model) if isinstance(module, _BatchNorm))


def iterate_backbone(model: nn.Module) -> Iterator[nn.Module]:
    """Iterate over the modules that are not in a block."""
    inside = {module for block in blocks(model).values() for module in block.modules()}
    return (module for module in model.modules() if module not in inside)
