"""What made a map, as autograd knows it: the batch norm, and the 1x1 convolution before it.

Takes a map with its graph, gives what its layers keep for their own backward passes, so that nobody keeps it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0")
_CHECKPOINT = "torch.utils.checkpoint"


@dataclass(frozen=True)
class Norm:
    """A batch norm that made a map: whether by the batch's statistics, and what was added to the variance."""

    training: bool
    epsilon: float


@dataclass(frozen=True)
class Convolution:
    """A 1x1 convolution: its input (N, K, ...), weight (C, K / groups, 1, ...), bias (C,) and groups."""

    inner: Tensor
    weight: Tensor
    bias: Tensor | None
    groups: int


def find_norm(x: Tensor) -> tuple[Norm | None, tuple[Tensor, ...]]:
    """Find what a batch norm made a map from, and keeps for its own backward pass, so that the map need not be kept.

    Returns:
        The norm, with its input, the mean and the inverse deviation by which that was normalised, weight and bias; or
        None with the map, if something else made it, wrote into it, or if not all of it can be had.
    """
    node: Any = x.grad_fn
    if node is None or node.name() not in _NORMS or x._version:
        return None, (x,)
    norm = Norm(node._saved_training, node._saved_eps if node.name() == _NORMS[0] else node._saved_epsilon)
    try:
        if _is_packed(node):
            return None, (x,)
        source, weight = node._saved_input, node._saved_weight
        if norm.training:
            mean, inverse = node._saved_result1, node._saved_result2
        else:
            mean, inverse = node._saved_running_mean, (node._saved_running_var + norm.epsilon).rsqrt()
    except RuntimeError:  # they were freed, by a backward pass, or written over
        return None, (x,)
    weight = torch.ones_like(mean) if weight is None else weight
    added = node.next_functions[2][0]
    bias = getattr(added, "variable", None) if added is not None else _read_off(x, source, mean, weight * inverse)
    if bias is None or not _are_there(weight, bias):
        return None, (x,)
    return norm, (source, mean, inverse, weight, bias)


def _read_off(x: Tensor, source: Tensor, mean: Tensor, scale: Tensor) -> Tensor | None:
    """Read the bias of a norm (C,), which autograd does not know where it is not learned, off a map's first position.

    It is rounded as the map is, and so not to be had of one in half precision.
    """
    if not x.numel() or x.dtype not in (torch.float32, torch.float64):
        return None
    first: tuple[Any, ...] = (0, slice(None), *[0] * (x.ndim - 2))
    return x.detach()[first] - (source.detach()[first] - mean.detach()) * scale.detach()


def find_convolution(x: Tensor) -> Convolution | None:
    """Find the 1x1 convolution that made the input of the batch norm that made a map."""
    norm: Any = x.grad_fn
    node = norm.next_functions[0][0]
    if node is None or node.name() != "ConvolutionBackward0" or node._saved_transposed:
        return None
    try:
        if norm._saved_input._version or _is_packed(node):
            return None
        inner, weight = node._saved_input, node._saved_weight
    except RuntimeError:
        return None
    bias = node.next_functions[2][0]
    if bias is None and any(node._saved_bias_sym_sizes_opt or ()):
        return None  # it has one that does not learn, which autograd does not keep
    is_pointwise = weight.shape[2:].numel() == 1 and set(node._saved_stride) == {1} and not any(node._saved_padding)
    if not is_pointwise or (bias is not None and not hasattr(bias, "variable")):
        return None
    bias = None if bias is None else bias.variable
    return Convolution(inner, weight, bias, node._saved_groups) if _are_there(weight, bias) else None


def normalise(norm: Norm, x: Tensor, moments: tuple[Tensor, Tensor], affine: tuple[Tensor, Tensor]) -> Tensor:
    """Normalise again; where it is to be differentiated, as a function of the input and the parameters.

    Args:
        norm: The batch norm.
        x: What it was given.
        moments: The mean and the inverse deviation by which it normalised.
        affine: Its weight and bias.
    """
    (mean, inverse), (weight, bias) = moments, affine
    if norm.training and torch.is_grad_enabled():
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=norm.epsilon)
    shape = [-1, *[1] * (x.ndim - 2)]
    scale = weight * inverse
    return torch.addcmul((bias - mean * scale).to(x.dtype).view(shape), x, scale.to(x.dtype).view(shape))


def _is_packed(node: Any) -> bool:
    """Tell whether `saved_tensors_hooks` turned what a layer keeps into something else.

    To look at that would unpack it in the forward pass: run what was checkpointed again, or fetch what was moved away.
    """
    saved = node._raw_saved_input
    if not hasattr(saved, "unpack_hook"):  # older versions of torch tell of hooks that are on now alone
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return bool(hooks and hooks[0].__module__ == _CHECKPOINT)
    if saved.unpack_hook is None:
        return False
    packed: object = saved.data
    # Checkpointing packs while it computes again, too, where it has to come by the same way.
    if not isinstance(packed, Tensor) or saved.unpack_hook.__module__ == _CHECKPOINT:
        return True
    unpacked: Tensor = node._saved_input  # hooks that only look on hand back what they were given
    return packed.dtype != unpacked.dtype or packed.untyped_storage()._cdata != unpacked.untyped_storage()._cdata


def _are_there(*parameters: Tensor | None) -> bool:
    """Tell whether parameters have memory; a sharded layer (FSDP) frees its own until the backward pass."""
    return all(x is None or not x.numel() or x.untyped_storage().nbytes() > 0 for x in parameters)
