"""The block for evaluation alone: what it does to a map in as few passes as there can be.

Takes what its owner hands it, gives what the block, the sum after it and the activation after that would give. Knows
nothing of graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from se_inject.block import SqueezeExcite
from se_inject.folding import is_observed
from se_inject.kernels import can_run, convolve, excite, scale, squeeze
from se_inject.lean import are_alike, is_transformed, multiply

Activation = Literal["", "relu"]


class FusedSqueezeExcite(SqueezeExcite):
    """A block together with what stands around it, for evaluation.

    With a convolution the block is handed that layer's input h (N, C/4, H, W in a bottleneck). A 1x1 convolution acts
    on each position alike, so `mean(W h + b) = W mean(h) + b`: W is folded into the block's first layer, the mean is
    taken of the narrow map, and the gate is known before the convolution runs.

    Shape:
        As `SqueezeExcite`; with a convolution, (N, C_in, H, W) gives (N, C, H, W).

    Args:
        block: Its layers are taken over, and changed.
        convolution: The 1x1 convolution that makes the block's map, without a batch norm in between; its layer is taken
            over, and changed.
        scaled: A convolution that makes the block's map and stays where it is; it takes the gain.
        activation: What follows.
        makers: The modules that make the maps which it is handed, if these may be written on: nothing else reads them,
            as long as no hook looks at what the modules give, or at what the block is handed.
        kernels: Whether the operators of `se_inject.kernels` are run, where they do the same: for one map (N, C, H, W)
            that is squeezed to its mean, and a convolution of one group. They write on no map that they are handed.
    """

    def __init__(
        self,
        block: SqueezeExcite,
        *,
        convolution: _ConvNd | None = None,
        scaled: _ConvNd | None = None,
        activation: Activation = "",
        makers: Sequence[nn.Module] = (),
        kernels: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.r, self.gain = block.r, block.gain
        self.num_spatial, self.channel_dim = block.num_spatial, block.channel_dim
        self.squeeze, self.gate = block.squeeze, block.gate
        self.activation, self.kernels = activation, kernels
        makers = makers if convolution is None else [convolution]
        self._makers = tuple(module for maker in makers for module in maker.modules())  # no children of this one
        weight, bias = (block.fc1.weight.detach().flatten(1).double(), block.fc1.bias)
        offset = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
        offset += 0 if bias is None else bias.detach().double()
        if convolution is not None:
            inner, inner_bias = _expand(convolution)
            weight, offset = weight @ inner, offset + (0 if inner_bias is None else weight @ inner_bias)
        maker = scaled if convolution is None else convolution
        if maker is not None and self.gate != "tanh":
            if convolution is None:
                weight /= self.gain
            _scale(maker, self.gain)
            self.gain = 1.0
        make_linear = functools.partial(_make_linear, by_rows=kernels)
        self.fc1 = make_linear(weight, offset, like=block.fc1)  # type: ignore[assignment]
        second = block.fc2.weight.detach().flatten(1)
        self.fc2 = make_linear(second, block.fc2.bias, like=block.fc2)  # type: ignore[assignment]
        self.convolution = convolution
        self.train(block.training)

    def forward(self, *maps: Tensor, shortcut: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Scale, add and activate; see the class for the shapes."""
        if self.kernels and self._suits_kernels(maps, shortcut):
            return self._run_kernels(maps[0], shortcut)
        gate = self.compute_gate(*maps)
        if len(maps) > 1:
            return tuple(self._finish(x, part, shortcut) for x, part in zip(maps, self._split(gate, maps), strict=True))
        x = maps[0] if (convolution := self.convolution) is None else convolution(maps[0])
        return self._finish(x, self._align(gate, x), shortcut)

    def _suits_kernels(self, maps: tuple[Tensor, ...], shortcut: Tensor | None) -> bool:
        layers = [layer for layer in (self.fc1, self.fc2, self.convolution) if layer is not None]
        is_usual = self.num_spatial == 2 and self.channel_dim == 1 and self.squeeze == "mean"
        is_grouped = self.convolution is not None and self.convolution.groups != 1
        if len(maps) != 1 or not is_usual or is_grouped:
            return False
        if not all(type(layer) in (nn.Linear, nn.Conv2d) for layer in layers) or is_observed(layers):
            return False
        parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
        return can_run(maps[0], shortcut, parameters, channels=self.channels)

    def _run_kernels(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        first, second, relu = self.fc1, self.fc2, self.activation == "relu"
        assert first.bias is not None
        gate = excite(
            squeeze(x), first.weight, first.bias, second.weight, second.bias, kind=self.gate, gain=float(self.gain)
        )
        if self.convolution is None:
            made: Tensor = scale(x, gate, shortcut, relu=relu)
        else:
            weight, bias = self.convolution.weight.flatten(1), self.convolution.bias
            made = convolve(x, weight, bias, gate, shortcut, relu=relu)
        return made

    def _finish(self, x: Tensor, gate: Tensor, shortcut: Tensor | None) -> Tensor:
        y = self._scale(x, gate, shortcut)
        return y.relu_() if self.activation == "relu" else y

    def _scale(self, x: Tensor, gate: Tensor, shortcut: Tensor | None) -> Tensor:
        if not self._may_overwrite(x, gate, shortcut):
            return multiply(x, gate, shortcut)
        return torch.mul(x, gate, out=x) if shortcut is None else torch.addcmul(shortcut, x, gate, out=x)

    def _may_overwrite(self, x: Tensor, gate: Tensor, shortcut: Tensor | None) -> bool:
        """Tell whether the scaled map may take the place of the map, which nobody else will ever see.

        A new map costs more than the arithmetic: its pages are not in memory yet. Compilers do this by themselves.
        """
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if is_traced or not self._makers or not isinstance(x, Tensor) or is_transformed():
            return False
        if shortcut is not None and not are_alike(x, shortcut):
            return False
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gate, shortcut)):
            return False
        return not is_observed((self, *self._makers))

    def _excite(self, squeezed: Sequence[Tensor]) -> Tensor:
        return self.activate(self.fc2(torch.relu(self.fc1(self._join(squeezed)))))

    @property
    def channels(self) -> int:
        """C; the layers are linear ones here."""
        return cast("nn.Linear", self.fc2).out_features

    def extra_repr(self) -> str:
        """Show what is done beside, and how: `256, 16, relu, kernels`."""
        rest = (self.activation, "kernels" if self.kernels else "")
        return ", ".join(part for part in (super().extra_repr(), *rest) if part)

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)


def _expand(convolution: _ConvNd) -> tuple[Tensor, Tensor | None]:
    """Return weight (C, C_in) and bias (C,) of a 1x1 convolution as if it had one group, in double precision."""
    weight = convolution.weight.detach().double().flatten(1)
    parts = weight.view(convolution.groups, -1, weight.shape[1])
    whole: Tensor = parts[0] if len(parts) == 1 else torch.block_diag(*parts)  # type: ignore[no-untyped-call]
    return whole, None if convolution.bias is None else convolution.bias.detach().double()


def _scale(convolution: _ConvNd, gain: float) -> None:
    """Multiply a layer's output; another layer may have the same parameters, and keeps them."""
    for name, parameter in list(convolution.named_parameters()):
        setattr(convolution, name, nn.Parameter(parameter.detach() * gain, requires_grad=False))


def _make_linear(weight: Tensor, bias: Tensor | None, *, like: nn.Conv2d, by_rows: bool) -> nn.Linear:
    """Make a layer whose weight lies row by row, as kernels read it, or column by column.

    On a CPU the product with one vector takes 3.8 instead of 5.2 us by columns for (1024, 64), and 11.7 instead of
    16.7 for (2048, 128). As with channels-last weights, what wants them contiguous (safetensors, FSDP) has to be given
    such copies.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    kind = like.weight.dtype
    laid = weight if by_rows else weight.t().contiguous().t()
    layer.weight = nn.Parameter(laid.to(kind, copy=True), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(kind, copy=True), requires_grad=False)
    return layer
