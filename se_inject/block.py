"""The squeeze-and-excitation block, built so that a fresh one is the exact identity.

Takes feature maps, gives the same maps with every channel scaled by its gate. Knows nothing of graphs, plans or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from se_inject.lean import Link, is_lean, multiply, scale_map, squeeze_map

GAIN = 2.0
"""The factor before the sigmoid: `2 * sigmoid(0)` is exactly 1 in every float format, where the sigmoid is steepest."""


Squeeze = Literal["mean", "max"]
Gate = Literal["sigmoid", "hard_sigmoid", "tanh"]


def count_hidden(channels: int, r: float, *, divisor: int = 8) -> int:
    """Count the outputs of the squeezing layer W1: `channels / r`, rounded to a multiple of `divisor`.

    The rounding is the one of timm and mmpretrain (to the nearest multiple, at least one); `divisor=1` gives the figure
    of the paper.

    Example:
        >>> count_hidden(256, 16), count_hidden(64, 16), count_hidden(64, 16, divisor=1)
        (16, 8, 4)
    """
    return max(divisor, int(channels / r + divisor / 2) // divisor * divisor)


class SqueezeExcite(nn.Module):
    """Channel attention by squeeze and excitation, an exact identity when new.

    The gate is `s = gain * sigmoid(W2 relu(W1 z + b1) + b2)` with z the mean of the map over its spatial dimensions
    (Hu et al., arXiv 1709.01507, equations 2 and 3, which have gain 1). With W2 = 0, b2 = 0 and gain = 2 a new block
    multiplies by exactly 1. As in LoRA, W2 learns from the first step and W1 from the second. With `gate="tanh"` it is
    `s = 1 + tanh(...)`, which is 1 there too.

    Shape:
        One map (N, C, H, W) gives one map (N, C, H, W). Several maps (N, C_i, H, W), with the C_i adding up to
        `channels`, are squeezed together and give a tuple of the same maps, each scaled by its part of the gate. With
        `num_spatial` of 1 or 3 the maps are (N, C, L) or (N, C, D, H, W); with `channel_dim=-1` the channels come last,
        (N, H, W, C) or (N, L, C).

    Args:
        channels: C, the number of channels of the map, or of all maps together.
        r: The reduction ratio.
        divisor: `channels / r` is rounded to a multiple of this.
        bias: Whether the two layers have biases.
        gain: The factor before the sigmoid.
        num_spatial: How many spatial dimensions a map has: 1, 2 or 3.
        channel_dim: The dimension of the channels: 1, or -1 for channels-last activations.
        squeeze: What z is: the mean or the maximum over the spatial dimensions.
        gate: The gate's activation.
        device: Where the parameters are made.
        dtype: The parameters' type.

    Example:
        >>> block = SqueezeExcite(256, 16)
        >>> x = torch.randn(2, 256, 14, 14)
        >>> torch.equal(block(x), x)
        True
    """

    def __init__(
        self,
        channels: int,
        r: float = 16,
        *,
        divisor: int = 8,
        bias: bool = True,
        gain: float = GAIN,
        num_spatial: int = 2,
        channel_dim: Literal[1, -1] = 1,
        squeeze: Squeeze = "mean",
        gate: Gate = "sigmoid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.r, self.gain = r, gain
        self.num_spatial, self.channel_dim = num_spatial, channel_dim
        self.squeeze, self.gate = squeeze, gate
        hidden = count_hidden(channels, r, divisor=divisor)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W1 from He's normal distribution and set everything else to zero: the identity.

        The rows of W1 come in pairs of opposite sign, so that for any image one unit of each pair is active. Of eight
        independent units, all are dead for all images once in a few hundred blocks, and such a block never learns.

        The block's layers are torch's own, with a `reset_parameters` that knows nothing of this. After a loop that
        calls it of all modules, as after `to_empty`, call it of the blocks again.
        """
        nn.init.kaiming_normal_(self.fc1.weight, nonlinearity="relu")
        num_pairs = self.fc1.out_channels // 2
        with torch.no_grad():
            self.fc1.weight[num_pairs : 2 * num_pairs] = -self.fc1.weight[:num_pairs]
        nn.init.zeros_(self.fc2.weight)
        for layer in (self.fc1, self.fc2):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def compute_gate(self, *maps: Tensor) -> Tensor:
        """Compute the gate (N, C) of maps (N, C_i, ...), joined along C."""
        return self._excite([x.mean(self._dims) if self.squeeze == "mean" else x.amax(self._dims) for x in maps])

    def forward(self, *maps: Tensor, shortcut: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Scale one map, or several that are squeezed together; see the class for the shapes.

        Args:
            *maps: What is squeezed and scaled.
            shortcut: What is added to a single map once it is scaled, of its shape. That costs no pass over the map of
                its own, as the addition of a residual block does.
        """
        if self.squeeze == "mean" and all(map(is_lean, maps)):
            return self._scale_leanly(maps, shortcut)
        return self.scale(self.compute_gate(*maps), *maps, shortcut=shortcut)

    def scale(self, gate: Tensor, *maps: Tensor, shortcut: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Scale maps by a gate (N, C), or (1, C) for all images alike; the rest is as in `forward`."""
        gates = self._split(gate, maps)
        return _unpack([multiply(x, part, shortcut) for x, part in zip(maps, gates, strict=True)])

    def _scale_leanly(self, maps: tuple[Tensor, ...], shortcut: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        links = [Link(self._dims, self.training) for _ in maps]
        squeezed = [squeeze_map(x, link) for x, link in zip(maps, links, strict=True)]
        gates = self._split(self._excite([mean for mean, _ in squeezed]), maps)
        return _unpack(
            [
                scale_map(again, x, gate, link, shortcut)
                for (_, again), x, gate, link in zip(squeezed, maps, gates, links, strict=True)
            ]
        )

    @property
    def channels(self) -> int:
        """C, as the layers have it now, which may have been pruned."""
        return self.fc2.out_channels

    @property
    def _dims(self) -> tuple[int, ...]:
        first = 2 if self.channel_dim == 1 else 1
        return tuple(range(first, first + self.num_spatial))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002  torch's
        """Convert the parameters; for volumes as 5-D weights, which alone `torch.channels_last_3d` takes."""

        def convert(x: Tensor) -> Tensor:
            return fn(x.unsqueeze(-1)).squeeze(-1) if x.ndim == 4 else fn(x)

        return super()._apply(convert if self.num_spatial == 3 else fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _join(self, squeezed: Sequence[Tensor]) -> Tensor:
        """Join what is squeezed from all maps, in the type of the layers: a network's code may have cast a map."""
        z = squeezed[0] if len(squeezed) == 1 else torch.cat(list(squeezed), 1)
        if not isinstance(z, Tensor):
            return z  # of torch.fx, whose graph would read what is asked for
        weight = getattr(self.fc1, "weight", None)  # of quantised layers it is a method
        kind = weight.dtype if isinstance(weight, Tensor) else z.dtype
        if kind == z.dtype or _is_autocast(z.device.type):
            return z  # under autocast the layers convert what they are given
        return z.to(kind)

    def _excite(self, squeezed: Sequence[Tensor]) -> Tensor:
        z = self._join(squeezed)
        # Flattened last: torch's quantisation takes what stands right before a sigmoid for its result, from 0 to 1.
        return self.activate(self.fc2(F.relu(self.fc1(z[:, :, None, None])))).flatten(1)

    def activate(self, excited: Tensor) -> Tensor:
        """Turn what the second layer gives, (N, C) or (N, C, 1, 1), into the gate."""
        if self.gate == "tanh":
            return 1 + torch.tanh(excited)
        gate = torch.sigmoid(excited) if self.gate == "sigmoid" else F.hardsigmoid(excited)
        return gate if self.gain == 1 else self.gain * gate

    def _split(self, gate: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Split the gate (N, C) among the maps."""
        if len(maps) == 1:
            return [self._align(gate, maps[0])]
        parts = torch.split(gate, [x.shape[self.channel_dim] for x in maps], 1)
        # torch.fx's proxies can be indexed, but not iterated over
        return [self._align(parts[i], x) for i, x in enumerate(maps)]

    def _align(self, gate: Tensor, x: Tensor) -> Tensor:
        """Give the gate (N, C) its map's dimensions and type.

        Under autocast gate and map can differ in type; without the cast the product would be promoted.
        """
        for _ in range(self.num_spatial):
            gate = gate.unsqueeze(-1 if self.channel_dim == 1 else 1)
        return gate.to(x.dtype)

    def extra_repr(self) -> str:
        """Show channels and reduction ratio: `SqueezeExcite(256, 16)`."""
        usual = {"channel_dim": 1, "squeeze": "mean", "gate": "sigmoid"}
        rest = [f", {name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value]
        # A layer that stands in for the block's own, as those of LoRA do, need not tell its channels.
        return f"{getattr(self, 'channels', '?')}, {self.r:g}" + "".join(rest)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def _unpack(scaled: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return scaled[0] if len(scaled) == 1 else tuple(scaled)


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def mark_block(module: nn.Module) -> nn.Module:
    """Note on a module that it is an injected block, and return it."""
    vars(module)["_se_inject_block"] = True
    return module


def is_block(module: nn.Module) -> bool:
    """Tell whether a module is a block: our own, or another attention that was injected."""
    return isinstance(module, SqueezeExcite) or "_se_inject_block" in vars(module)
