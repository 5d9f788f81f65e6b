"""An independent count of merges: what torch executes, seen from outside. Imports nothing of se_inject.

A merge is an addition of two float maps of equal shape, or a join of two or more along the channels. In a map
(N, C, H, W) or (N, C, D, H, W) the channels are dimension 1. Joins of tokens (N, L, C) and along the last dimension of
a map cannot be told from joins of other things by what is executed, and are counted apart, as `unclear`.
"""

from collections import Counter
from contextlib import contextmanager

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
CONVOLUTIONS = frozenset(f"conv{t}{d}d" for t in ("", "_transpose") for d in (2, 3))
MAPS = (4, 5)


def is_second(tensor, dim):
    return dim % tensor.dim() == 1


class MergeOracle(TorchFunctionMode):
    """Count the merges on maps, and apart from them those on tokens, by the module that is being executed.

    `joins_channels(tensor, dim)` tells whether `dim` is the channels' one, which a network of several layouts knows;
    then no join is unclear.

    Attributes:
        maps: Merges of maps (4 or 5 dimensions) by the path of the module whose code they are in.
        sequences: Merges of tokens or signals (3 dimensions), likewise; of tokens the additions alone.
        unclear: Joins that may or may not be along the channels, likewise.
        convolutions: How many convolutions of maps were executed.
    """

    def __init__(self, joins_channels=None):
        super().__init__()
        self.joins_channels = joins_channels
        self.maps, self.sequences, self.unclear = Counter(), Counter(), Counter()
        self.convolutions = 0
        self._stack = [""]

    @property
    def count(self):
        return sum(self.maps.values()) + sum(self.sequences.values())

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in SUMS:
            self._count_sum(*[*args, *(kwargs[k] for k in ("input", "other") if k in kwargs)][:2])
        elif func in CATS:
            dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            self._count_join(args[0] if args else kwargs["tensors"], dim)
        elif getattr(func, "__name__", "") in CONVOLUTIONS:
            self.convolutions += 1
        return func(*args, **kwargs)

    def _count_sum(self, left, right):
        pair = (left, right)
        if all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in pair) and left.shape == right.shape:
            if left.dim() in MAPS:
                self.maps[self._stack[-1]] += 1
            elif left.dim() == 3:
                self.sequences[self._stack[-1]] += 1

    def _count_join(self, tensors, dim):
        first = tensors[0]
        if len(tensors) < 2 or not first.is_floating_point() or first.dim() not in (3, *MAPS):
            return
        dim %= first.dim()
        if self.joins_channels is not None:
            counter = self.maps if first.dim() in MAPS else self.sequences
            counter[self._stack[-1]] += self.joins_channels(first, dim)
        elif dim == 1 and first.dim() in MAPS:
            self.maps[self._stack[-1]] += 1
        elif dim in (1, first.dim() - 1):
            self.unclear[self._stack[-1]] += 1

    @contextmanager
    def watch(self, model):
        """Watch what a model executes, module by module."""
        handles = []
        for path, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(lambda *_, path=path: self._stack.append(path)))
                handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self):
        self._stack.pop()


def count_merges(model, x, joins_channels=is_second):
    oracle = MergeOracle(joins_channels)
    training = model.training
    model.eval()
    with torch.no_grad(), oracle:
        model(x)
    model.train(training)
    return oracle.count
