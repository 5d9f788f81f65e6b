"""Traffic: what a network reads, writes and keeps, counted and not timed.

Takes a network and its input, gives exact counts of bytes. Other work on the machine does not change them.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_UNTOUCHED = (
    _aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.new_empty_strided,  # memory alone
    _aten._unsafe_view,  # a view that autograd takes for none
)  # fmt: skip


@dataclass(frozen=True)
class Traffic:
    """What was counted, in bytes.

    Attributes:
        evaluation: Read and written by a forward pass in eval mode.
        training: Read and written by a forward and a backward pass in train mode.
        saved: Kept between the two.
        peak: Held at once in a training step, beside parameters and buffers: maps and gradients.
    """

    evaluation: int
    training: int
    saved: int
    peak: int


class ByteCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Counts the bytes of the inputs and outputs of every operator that is not a view, and the peak of what is held.

    What an operator writes into because it was told to (`out=`) is an output alone; it is not read. The peak is that of
    the tensors that were made meanwhile; what an operator takes for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.peak = 0
        self._held = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in given:
            self._known.add(x.untyped_storage())
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in made:
            self._hold(x.untyped_storage())
        if not func.is_view and func.overloadpacket not in _UNTOUCHED:
            read = {name: value for name, value in (kwargs or {}).items() if not name.startswith("out")}
            tensors = [x for x in tree_leaves((args, read)) if isinstance(x, Tensor)] + made
            self.count += sum(x.numel() * x.element_size() for x in tensors)
        return result

    def _hold(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._held += size
        self.peak = max(self.peak, self._held)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self._held -= size


def measure_traffic(model: nn.Module, images: Tensor) -> Traffic:
    """Count the bytes of a network, which is left in train mode and without gradients.

    Args:
        model: On the images' device.
        images: (N, C, H, W).
    """
    model.eval()
    with torch.no_grad(), ByteCounter() as evaluation:
        model(images)
    model.train()
    with ByteCounter() as training:
        add_up(model(images)).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return Traffic(evaluation.count, training.count, count_saved(model, images), training.peak)


def add_up(outputs: object) -> Tensor:
    """Add up all that a network gives, as a loss that costs nothing.

    Raises:
        ValueError: Nothing of it has a gradient.
    """
    tensors = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
    if not tensors:
        raise ValueError("no output has a gradient")
    return torch.stack([x.sum() for x in tensors]).sum() if len(tensors) > 1 else tensors[0].sum()


def count_saved(model: nn.Module, images: Tensor) -> int:
    """Count the bytes of the storages that a forward pass keeps, but for parameters and buffers."""
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    saved: weakref.WeakSet[Any] = weakref.WeakSet()  # storages; some are let go again while the forward pass runs

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own:
            saved.add(x.untyped_storage())
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        outputs = model(images)
    size: int = sum(storage.nbytes() for storage in saved)
    del outputs
    return size
