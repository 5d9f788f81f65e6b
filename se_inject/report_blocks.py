"""Report, the blocks: what each does, what the network loses without its variation, and what is to be done with it.

Takes what a pass showed and the scores of a network in which one block's gates are fixed, gives `BlockFacts`. Runs
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from se_inject.absorption import Folds
from se_inject.block import SqueezeExcite
from se_inject.comparison import compute_paired_error
from se_inject.gate_statistics import NUM_BINS, BlockGates
from se_inject.plan import Site
from se_inject.scores import Scores

MOST_LOST = 0.5
"""Points of top-1 that folding a block may cost at most, by the upper end of the interval, to be advised."""
NEAR_ONE = 0.01
"""How far a mean gate may be from 1, as the root of the mean square over channels, to count as the identity."""
Z = 1.96
"""Standard errors to either side of a 95 % interval."""

Action = Literal["keep", "fold", "remove"]


@dataclass(frozen=True)
class Ablation:
    """What a network loses when the gates of a block are their means for every image.

    Attributes:
        lost: Top-1 in points of per cent; negative where the network became better.
        error: The standard error of `lost`.
        is_paired: Whether it is that of paired differences, or (of a stream) the larger one of two separate scores.
        loss: What the mean cross-entropy grew by.
    """

    lost: float
    error: float
    is_paired: bool
    loss: float

    @property
    def most(self) -> float:
        """The upper end of the 95 % interval of `lost`."""
        return self.lost + Z * self.error


@dataclass(frozen=True)
class BlockFacts:
    """What is known of a block.

    Attributes:
        path: Where it is.
        stage: Its maps are 2^stage times smaller than the input.
        channels: C.
        hidden: Hidden units.
        mean: The mean gate, over images and channels.
        variation: See `BlockGates`.
        class_share: Likewise.
        saturation: Likewise.
        distance: Likewise.
        offset: How far the mean gates are from 1: the root of the mean square over channels.
        limit: What a gate can reach.
        histogram: (NUM_BINS,), the shares of gates between 0 and `limit`.
        ablation: What fixing its gates costs.
        action: What is to be done with it.
        reason: Why.
    """

    path: str
    stage: int
    channels: int
    hidden: int
    mean: float
    variation: float
    class_share: float | None
    saturation: float
    distance: float
    offset: float
    limit: float
    histogram: tuple[float, ...]
    ablation: Ablation
    action: Action
    reason: str


def measure_ablation(before: Scores, after: Scores) -> Ablation:
    """Compare the scores of a network to those with the gates of a block fixed, on the same images.

    The standard error is `compute_paired_error`. Of a stream, whose images come in no fixed order, it is that of two
    independent scores, which is too large.

    Example:
        >>> import torch
        >>> confusion = torch.tensor([[9, 1], [0, 0]])
        >>> hits = torch.tensor([1] * 9 + [0])
        >>> same = Scores(confusion, 10, 0.5, hits)
        >>> round(measure_ablation(same, same).error, 2)
        8.33
    """
    loss = after.loss - before.loss
    if before.hits is None or after.hits is None:
        num = max(1, before.num_images)
        shares = [(scores.top1 / 100 * num + 0.5) / (num + 1) for scores in (before, after)]
        error = 100 * math.sqrt(sum(share * (1 - share) for share in shares) / num)
        return Ablation(before.top1 - after.top1, error, is_paired=False, loss=loss)
    counted = before.hits < 2
    ours, theirs = before.hits[counted], after.hits[counted]
    error = compute_paired_error(int((ours > theirs).sum()), int((ours < theirs).sum()), len(ours))
    return Ablation(before.top1 - after.top1, error, is_paired=True, loss=loss)


def describe_blocks(
    gates: Mapping[str, BlockGates],
    ablations: Mapping[str, Ablation],
    *,
    blocks: Mapping[str, SqueezeExcite],
    sites: Mapping[str, Site],
    folds: Folds,
    num_images: int,
) -> list[BlockFacts]:
    """Describe the blocks, in the order in which they run.

    Args:
        gates: By path.
        ablations: Likewise.
        blocks: Likewise.
        sites: Likewise.
        folds: Which gates could be folded.
        num_images: How many images all of this was seen on.
    """
    found = []
    for path, seen in gates.items():
        offset = float((seen.mean - 1).pow(2).mean().sqrt())
        action, reason = advise(ablations[path], offset, folds.kept.get(path), num_images)
        shares = seen.histogram.double() / max(1, int(seen.histogram.sum()))
        assert len(shares) == NUM_BINS
        found.append(
            BlockFacts(
                path, sites[path].stage, blocks[path].channels, blocks[path].fc1.out_channels, float(seen.mean.mean()),
                seen.variation, seen.class_share, seen.saturation, seen.distance, offset, seen.limit,
                tuple(shares.tolist()), ablations[path], action, reason,
            )
        )  # fmt: skip
    return found


def sort_by_cost(blocks: Iterable[BlockFacts]) -> list[BlockFacts]:
    """Sort blocks, the one first whose fixed gates cost the most accuracy; of equal ones, the most loss."""
    return sorted(blocks, key=lambda each: (-each.ablation.lost, -each.ablation.loss))


def advise(ablation: Ablation, offset: float, obstacle: str | None, num_images: int) -> tuple[Action, str]:
    """Say what is to be done with a block, and why.

    A block goes only where the images can tell that it is not missed: where they are too few, it stays.

    Args:
        ablation: What fixing its gates costs.
        offset: How far its mean gates are from 1.
        obstacle: Why its gate cannot be folded, if it cannot.
        num_images: How many images this was seen on.
    """
    if ablation.lost > Z * ablation.error:
        return "keep", f"a fixed gate costs {ablation.lost:.2f} ± {Z * ablation.error:.2f} points of top-1"
    if obstacle is not None:
        return "keep", f"its gate cannot be folded: {obstacle}"
    if ablation.most > MOST_LOST:
        images = "1 image" if num_images == 1 else f"{num_images:,} images"
        return "keep", f"{images} cannot tell: a fixed gate may cost up to {ablation.most:.2f} points of top-1"
    cost = f"a fixed gate costs at most {max(0.0, ablation.most):.2f} points of top-1 (95 %)"
    if offset < NEAR_ONE:
        return "remove", f"{cost}, and its mean gate is 1 within {100 * offset:.2g} %"
    return "fold", cost
