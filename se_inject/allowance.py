"""Allowance: bound what building a network may take, where a file says how it is built.

A file of a kilobyte can name a network of a billion weights. Takes a number of weights, gives a context in which torch
makes no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_FACTORIES = ("empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "eye", "arange")
_SLACK = 8
"""Initialisation makes some numbers twice; torchvision's SSD makes a VGG and drops its classifier, most of it."""
_SPARE = 1 << 20
"""For what a network makes and does not keep, such as grids."""


class Allowance(TorchDispatchMode):
    """Within it, tensors of so many numbers can be made; one more raises.

    Args:
        num_weights: How many numbers the network has that is to be built.

    Example:
        >>> with Allowance(1000):
        ...     torch.empty(10**9)
        Traceback (most recent call last):
        ValueError: it would have more weights than the 1,000 of the file
    """

    def __init__(self, num_weights: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_weights = num_weights
        self._left = _SLACK * num_weights + _SPARE

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in _FACTORIES and args:
            self._left -= _count_numbers(func.overloadpacket.__name__, args)
            if self._left < 0:
                raise ValueError(f"it would have more weights than the {self._num_weights:,} of the file")
        return func(*args, **(kwargs or {}))


def _count_numbers(name: str, args: tuple[Any, ...]) -> int:
    sizes = args[0]
    if isinstance(sizes, (list, tuple, torch.Size)):
        return math.prod(sizes)
    numbers = [abs(x) for x in args if isinstance(x, (int, float))]
    return int(math.prod(numbers[:2]) if name == "eye" else max(numbers, default=0))
