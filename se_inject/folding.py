"""Folding: put batch norms into the convolutions before them, which is exact in eval mode.

Takes a network and the folds that `course` has found, changes it in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.fusion import fuse_conv_bn_weights


@dataclass(frozen=True)
class Fold:
    """A convolution and the batch norm that can go into it, by their paths.

    Attributes:
        is_bare: Whether the norm does nothing beside, such as an activation.
    """

    convolution: str
    norm: str
    is_bare: bool


def add_biases(model: nn.Module, folds: Iterable[Fold]) -> None:
    """Give the convolutions of folds a bias of zeros where they have none, which code that is written then hands on."""
    for fold in folds:
        convolution = cast("_ConvNd", model.get_submodule(fold.convolution))
        if lacks_bias(convolution):
            convolution.bias = make_bias(convolution)


def lacks_bias(convolution: _ConvNd) -> bool:
    """Tell whether a convolution could have a bias and has none."""
    parameters = convolution._parameters
    return parameters.get("weight") is not None and "bias" in parameters and parameters["bias"] is None


def make_bias(convolution: _ConvNd) -> nn.Parameter:
    """Make a bias (C,) of zeros."""
    weight = convolution.weight
    return nn.Parameter(weight.new_zeros(convolution.out_channels), requires_grad=weight.requires_grad)


def find_replaced(model: nn.Module, folds: Iterable[Fold]) -> list[Tensor]:
    """Find the weights that `fold_norms` replaces in a copy of a model, and that nobody else has there."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    weights = (cast("_ConvNd", model.get_submodule(fold.convolution)).weight for fold in folds)
    return [weight for weight in weights if uses[id(weight)] == 1]


def fold_norms(model: nn.Module, folds: Iterable[Fold]) -> None:
    """Fold batch norms into their convolutions, in place; what a norm did beside (an activation) stays in its place."""
    for fold in folds:
        convolution = cast("_ConvNd", model.get_submodule(fold.convolution))
        norm = cast("_BatchNorm", model.get_submodule(fold.norm))
        weight, needs_grad = convolution.weight.detach(), convolution.weight.requires_grad
        bias, mean, variance, scale, shift = (
            None if x is None else x.detach().double()
            for x in (convolution.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        assert mean is not None
        assert variance is not None
        # Torch scales a one instead of the weight, which in double precision would take twice the memory, twice.
        one = mean.new_ones([1] * weight.ndim)
        statistics = mean, variance, norm.eps, scale, shift
        is_transposed = isinstance(convolution, _ConvTransposeNd)
        factor, offset = fuse_conv_bn_weights(one, bias, *statistics, transpose=is_transposed)
        scaled = weight * factor.to(torch.promote_types(weight.dtype, torch.float32))
        convolution.weight, convolution.bias = (
            nn.Parameter(x.detach().to(weight.dtype), needs_grad) for x in (scaled, offset)
        )
        become(norm, make_rest(norm))


def is_hooked(module: nn.Module) -> bool:
    """Tell whether somebody looks at what a module is handed or gives, by a hook or by a forward of the instance."""
    return has_hooks(module) or "forward" in vars(module)


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module has a hook that is run where it is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001  there is no public way


def is_observed(modules: Iterable[nn.Module]) -> bool:
    """Tell whether somebody looks at what modules are handed or give just now, be it by hooks of all modules."""
    is_any = bool(_has_any_global_hook())  # type: ignore[no-untyped-call]  # torch
    return is_any or any(map(is_hooked, modules))


def find_extras(norm: nn.Module) -> Sequence[nn.Module] | None:
    """Return what timm's norm with an activation does after the norm, or None for a norm that is not known."""
    drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
    is_timms = type(norm).__module__ == "timm.layers.norm_act" and type(norm).__name__.startswith("BatchNormAct")
    if not is_timms or not isinstance(drop, nn.Module) or not isinstance(act, nn.Module):
        return None
    return [layer for layer in (drop, act) if not isinstance(layer, nn.Identity) or is_hooked(layer)]


def make_rest(norm: nn.Module) -> nn.Module:
    """Make what a norm that is folded leaves in its place."""
    extras = find_extras(norm) or ()
    if len(extras) == 1:
        return extras[0]
    return nn.Sequential(*extras).train(norm.training) if extras else make_identity(norm)


def become(module: nn.Module, other: nn.Module) -> None:
    """Make a module what another one is, wherever it is held: by several names, and in plain lists."""
    restore(module, type(other), {k: v.copy() if isinstance(v, dict) else v for k, v in vars(other).items()})


def restore(module: nn.Module, kind: type[nn.Module], attributes: dict[str, Any]) -> None:
    """Give a module a class and its attributes, whatever it had."""
    module.__class__ = kind
    vars(module).clear()
    vars(module).update(attributes)


def make_identity(layer: nn.Module) -> nn.Identity:
    """Make what stands for a convolution or a norm that others run now; its channels, stride and so on can be read."""
    identity = nn.Identity().train(layer.training)
    constants = cast("list[str]", layer.__constants__)
    vars(identity).update((key, value) for key, value in vars(layer).items() if key in constants)
    return identity
