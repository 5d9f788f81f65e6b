"""The mode in which networks run over shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_aten = torch.ops.aten
_NORM = _aten.native_batch_norm.default
_VIEWING = {_aten.detach.default, _aten.unsqueeze.default}
_WRITING = {_aten.relu_.default, _aten.add_.Tensor}
_FRESH = {
    _NORM,
    _aten.convolution.default,
    _aten.relu.default,
    _aten.add.Tensor,
    _aten.mul.Tensor,
    _aten.sigmoid.default,
    _aten.mean.dim,
    _aten.addcmul.default,
    _aten.empty.memory_format,
}
_PLAIN = (int, float, bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


class FakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]  # torch
    """Torch's mode, which keeps what the operators of which CNNs are made gave for the same shapes.

    A network of repeated blocks asks for the same some hundred times over, and torch's own cache takes a quarter of a
    millisecond to answer. The operators are those whose results depend on shapes, strides, types and numbers alone, and
    are new tensors or what is written on; two that give views ask torch's kernels. What torch's mode does for batch
    norms, some twenty operations for each shape that is new, is done at once; what an operator is handed was checked
    before it is called.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._kept: dict[object, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator over fake tensors."""
        kwargs = kwargs or {}
        if func in _VIEWING and self._is_plain(args[0]):
            with in_kernel_invocation_manager(self):
                view = func(*args, **kwargs)
            return FakeTensor(self, view, args[0].fake_device)
        key = self._describe(func, args, kwargs) if func in _FRESH or func in _WRITING else None
        if key in self._kept:
            return self._repeat(func, args, self._kept[key])
        result = self._run_norm(*args) if func is _NORM else super().__torch_dispatch__(func, types, args, kwargs)
        if key is not None:
            given = result if isinstance(result, tuple) else (result,)
            self._kept[key] = [(x.shape, x.stride(), x.dtype, x.fake_device) for x in given]
        return result

    def _run_norm(self, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *_, is_training, _, _ = rest
        num_kept = x.shape[1] if is_training or x.device.type != "cpu" else 0
        with self:
            return torch.empty_like(x), x.new_empty(num_kept), x.new_empty(num_kept)

    def _describe(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
        """Say all that a result depends on; None if that is more than shapes and plain values."""
        parts = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        for name, value in (*enumerate(args), *kwargs.items()):
            parts.append(name)
            if self._is_plain(value):
                parts += value.shape, value.stride(), value.dtype, value.fake_device
            elif isinstance(value, (list, tuple)) and all(isinstance(x, _PLAIN) for x in value):
                parts.append(tuple((type(x), x) for x in value))
            elif isinstance(value, _PLAIN):
                parts += type(value), value
            else:
                return None
        return tuple(parts)

    def _is_plain(self, x: Any) -> bool:
        is_ours = type(x) is FakeTensor and x.fake_mode is self
        return is_ours and x.constant is None and x.layout is torch.strided

    def _repeat(self, func: Any, args: Sequence[Any], kept: list[tuple[Any, ...]]) -> Any:
        if func in _WRITING:
            return args[0]
        made = [
            FakeTensor(self, torch.empty_strided(shape, strides, dtype=dtype, device="meta"), device)
            for shape, strides, dtype, device in kept
        ]
        return tuple(made) if func is _NORM else made[0]
