"""An independent count of merges: what torch executes, seen from outside. Imports nothing of se_inject."""

import torch
from torch.overrides import TorchFunctionMode

SUMS = (
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.__iadd__,
)
CATS = (torch.cat, torch.concat, torch.concatenate)
MAP_DIMS = (3, 4, 5)


def is_second(tensor, dim):
    return dim % tensor.dim() == 1


class MergeOracle(TorchFunctionMode):
    """Count additions of two float maps (N, C, ...) of equal shape, and joins of two or more along the channels.

    `joins_channels(tensor, dim)` tells whether `dim` is the channels' one, which a network of several layouts knows
    otherwise.
    """

    def __init__(self, joins_channels=is_second):
        super().__init__()
        self.count = 0
        self.joins_channels = joins_channels

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in SUMS:
            left, right = [*args, *(kwargs[k] for k in ("input", "other") if k in kwargs)][:2]
            if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and left.shape == right.shape:
                self.count += left.dim() in MAP_DIMS and left.is_floating_point()
        elif func in CATS:
            tensors = args[0] if args else kwargs["tensors"]
            dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            if len(tensors) > 1 and tensors[0].dim() in MAP_DIMS:
                self.count += self.joins_channels(tensors[0], dim)
        return func(*args, **kwargs)


def count_merges(model, x, **options):
    oracle = MergeOracle(**options)
    training = model.training
    model.eval()
    with torch.no_grad(), oracle:
        model(x)
    model.train(training)
    return oracle.count
