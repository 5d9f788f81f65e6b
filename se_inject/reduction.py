"""Reduction: make a block's hidden layer as small as what it does allows.

Takes a block and the moments of its hidden activations over some images, gives a smaller block of nearly the same gate.
Because of the ReLU between the two layers no rotation of the hidden units is a block again: units are left out, and the
second layer is fitted anew to those that stay.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from se_inject.block import SqueezeExcite


@dataclass
class Moments:
    """The moments of a block's hidden activations, added up over batches.

    Attributes:
        num: Images.
        total: (hidden + 1, hidden + 1), the sum of the products of activations, with a one behind them.
    """

    num: int
    total: Tensor

    @classmethod
    def start(cls, block: SqueezeExcite) -> Moments:
        """Begin with no images."""
        size = block.fc1.out_channels + 1
        return cls(0, torch.zeros(size, size, dtype=torch.float64))

    def add(self, hidden: Tensor) -> None:
        """Add the activations (N, hidden) of a batch."""
        hidden = hidden.double().cpu()
        rows = torch.cat([hidden, torch.ones(len(hidden), 1, dtype=torch.float64)], 1)
        self.num += len(rows)
        self.total += rows.T @ rows

    def compute(self, block: SqueezeExcite) -> tuple[Tensor, Tensor]:
        """Compute the activations' mean (hidden,) and covariance (hidden, hidden).

        For a block without biases, which cannot make up for a mean, these are zero and the second moments.
        """
        products, mean = self.total[:-1, :-1] / max(1, self.num), self.total[-1, :-1] / max(1, self.num)
        if block.fc2.bias is None:
            return torch.zeros_like(mean), products
        return mean, products - torch.outer(mean, mean)


@dataclass(frozen=True)
class Ranking:
    """Which hidden units tell most of what the second layer gives.

    Attributes:
        order: Units, the most telling first.
        told: The part of the variance of the second layer's outputs that the first k of them tell, for k from 1.
        possible: What any k directions could tell, for k from 1: from the singular values.
    """

    order: tuple[int, ...]
    told: tuple[float, ...]
    possible: tuple[float, ...]

    def count_needed(self, share: float) -> int:
        """Count the units that tell a share of the variance; all, if their rank does not allow less."""
        return next((k for k, told in enumerate(self.told, 1) if told >= share), len(self.order))


def rank_units(block: SqueezeExcite, moments: Moments) -> Ranking:
    """Rank the hidden units of a block, each by what it adds to those before it (orthogonal matching pursuit).

    Args:
        block: The block.
        moments: Of its hidden activations.
    """
    weight = block.fc2.weight.detach().double().cpu().flatten(1)
    values, vectors = torch.linalg.eigh(moments.compute(block)[1])
    units = vectors * values.clamp_min(0).sqrt()  # (hidden, hidden): inner products of rows are covariances
    outputs = weight @ units  # (C, hidden): likewise of the second layer's outputs
    whole = float((outputs**2).sum())
    if whole <= 0:
        return Ranking((0,), (1.0,), (1.0,))
    energies = torch.linalg.svdvals(outputs) ** 2
    order: list[int] = []
    told: list[float] = []
    smallest = 1e-12 * float((units**2).sum(1).max())
    for _ in range(len(units)):
        sizes = (units**2).sum(1)
        gains = ((outputs @ units.T) ** 2).sum(0) / sizes.clamp_min(smallest)
        gains[sizes <= smallest] = -1
        best = int(gains.argmax())
        if gains[best] <= 0:
            break
        direction = units[best] / sizes[best].sqrt()
        outputs = outputs - torch.outer(outputs @ direction, direction)
        units = units - torch.outer(units @ direction, direction)
        order.append(best)
        told.append(1 - float((outputs**2).sum()) / whole)
    possible = (energies.cumsum(0) / whole)[: len(order)]
    return Ranking(tuple(order), tuple(told), tuple(possible.tolist()))


def reduce_block(block: SqueezeExcite, moments: Moments, units: tuple[int, ...]) -> SqueezeExcite:
    """Make a block of some of the hidden units, with the second layer fitted by least squares.

    Args:
        block: The block; it is left as it is.
        moments: Of its hidden activations.
        units: Those that stay.
    """
    index = torch.tensor(sorted(units))
    weight = block.fc2.weight.detach().double().cpu().flatten(1)
    mean, covariance = moments.compute(block)
    inverse = torch.linalg.pinv(covariance[index][:, index], hermitian=True)
    fitted = weight @ covariance[:, index] @ inverse
    shift = weight @ mean - fitted @ mean[index]
    smaller = copy.deepcopy(block)
    smaller.r = block.channels / len(index)
    smaller.fc1 = _make_layer(block.fc1, block.fc1.weight.detach()[index.to(block.fc1.weight.device)])
    smaller.fc2 = _make_layer(block.fc2, fitted[:, :, None, None])
    with torch.no_grad():
        if smaller.fc1.bias is not None and block.fc1.bias is not None:
            smaller.fc1.bias.copy_(block.fc1.bias[index.to(block.fc1.bias.device)])
        if smaller.fc2.bias is not None and block.fc2.bias is not None:
            smaller.fc2.bias.copy_(block.fc2.bias + shift.to(block.fc2.bias))
    return smaller


def _make_layer(layer: nn.Conv2d, weight: Tensor) -> nn.Conv2d:
    out_channels, in_channels = weight.shape[:2]
    made = nn.Conv2d(
        in_channels, out_channels, 1, bias=layer.bias is not None, device=layer.weight.device, dtype=layer.weight.dtype
    )
    with torch.no_grad():
        made.weight.copy_(weight)
    return made.train(layer.training).requires_grad_(layer.weight.requires_grad)
