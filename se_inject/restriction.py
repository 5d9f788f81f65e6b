"""Restriction: take some blocks out of an injected network, or make them smaller, and leave the others as they are.

Takes an injected network, gives one with another plan for some of its sites, which `save` and `load` take as any other.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from se_inject.block import SqueezeExcite
from se_inject.ejection import eject
from se_inject.gate_folding import fold_weights
from se_inject.marks import SOURCE, find_mark, mark_module
from se_inject.plan import FOLDED, Plan
from se_inject.rewrite import blocks, copy_model, get_plan, inject


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
    target = copy_model(model)
    fold_weights(target, gates)
    return restrict_blocks(target, get_plan(model).leave_out(dict.fromkeys(gates, FOLDED)))


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
