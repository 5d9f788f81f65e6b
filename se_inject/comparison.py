"""Comparison: whether the blocks helped, against the same network without them and the same budget.

Takes the results of both arms, gives the difference with its interval and one sentence. Trains nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy.stats import t

SE, CONTROL = "se", "control"
_LEVEL = 0.95
_ROUNDING = 1e-9
Verdict = Literal["helped", "made no difference", "hurt"]


@dataclass(frozen=True)
class Result:
    """What an arm ended with, as it is written beside it.

    Attributes:
        arm: "se" or "control".
        seed: Of the recipe.
        before: Top-1 before the first step, in per cent.
        top1: At the end, in per cent.
        parameters: How many the network has.
        seconds: Time of the steps.
        images_per_second: Over the steps.
        hits: A digit an image: 1 right, 0 wrong, 2 not counted; empty for a stream.
        history: The validations.
    """

    arm: str
    seed: int
    before: float
    top1: float
    parameters: int
    seconds: float
    images_per_second: float
    hits: str
    history: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """How far the blocks are ahead of the control.

    Attributes:
        points: Mean difference of top-1, in points of per cent.
        low: Lower end of its 95 % interval; None where there is none to be had.
        high: Upper end.
        basis: What the interval covers, in words.
    """

    points: float
    low: float | None
    high: float | None
    basis: str

    @property
    def verdict(self) -> Verdict:
        """What may be said."""
        if self.low is not None and self.low > 0:
            return "helped"
        return "hurt" if self.high is not None and self.high < 0 else "made no difference"

    def __str__(self) -> str:
        shown = "no interval"
        if self.low is not None and self.high is not None:
            shown = f"95 % interval {self.low:+.2f} to {self.high:+.2f}"
        tail = " that this comparison can tell" if self.verdict == "made no difference" else ""
        return f"SE {self.verdict}{tail}: {self.points:+.2f} points ({shown}, {self.basis})"


def compare(results: Sequence[Result]) -> Difference:
    """Compare both arms, seed by seed.

    With several seeds the interval is Student's, of the paired differences over seeds; there is none where all of them
    are the same. With one it is the normal one over images (`compute_paired_error`), which leaves out how much another
    seed would have changed.

    Args:
        results: Of both arms, for the same seeds.

    Example:
        >>> runs = (("se", 0, 85), ("control", 0, 84), ("se", 1, 86), ("control", 1, 84))
        >>> arms = [Result(arm, seed, 80, top1, 1, 1, 1, "", []) for arm, seed, top1 in runs]
        >>> print(compare(arms))
        SE made no difference that this comparison can tell: +1.50 points (95 % interval -4.85 to +7.85, over 2 seeds)
    """
    by_arm = {arm: {r.seed: r for r in results if r.arm == arm} for arm in (SE, CONTROL)}
    seeds = sorted(by_arm[SE])
    assert seeds == sorted(by_arm[CONTROL]), "both arms have the same seeds"
    differences = [by_arm[SE][seed].top1 - by_arm[CONTROL][seed].top1 for seed in seeds]
    points = statistics.fmean(differences)
    if len(seeds) > 1:
        half = compute_half_width(differences)
        if half < _ROUNDING:
            return Difference(points, None, None, f"the same with all {len(seeds)} seeds")
        return Difference(points, points - half, points + half, f"over {len(seeds)} seeds")
    ours, theirs = (by_arm[arm][seeds[0]].hits for arm in (SE, CONTROL))
    pairs = [(int(a), int(b)) for a, b in zip(ours, theirs, strict=True) if a != "2" and b != "2"]
    if len(pairs) < 2:
        return Difference(points, None, None, "one seed; repeat with --seeds 3")
    error = compute_paired_error(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs), len(pairs))
    half = statistics.NormalDist().inv_cdf((1 + _LEVEL) / 2) * error
    return Difference(
        points, points - half, points + half, "over the images, one seed; --seeds 3 covers the training too"
    )


def compute_paired_error(num_better: int, num_worse: int, num_images: int) -> float:
    """Compute the standard error of the difference of two accuracies on the same images, in points of per cent.

    It is that of Agresti and Min (Statistics in Medicine 24, 2005), which adds half an image to each of the four ways
    in which two answers can be right and wrong: it is not 0 where few images are answered differently, or none.

    Args:
        num_better: Images that the first network alone answers rightly.
        num_worse: Images that the second one alone answers rightly.
        num_images: All of them.

    Example:
        >>> round(compute_paired_error(0, 0, 10), 2)
        8.33
    """
    better, worse, num = num_better + 0.5, num_worse + 0.5, num_images + 2
    return 100 * math.sqrt(better + worse - (better - worse) ** 2 / num) / num


def compute_half_width(values: Sequence[float]) -> float:
    """Compute half the width of Student's 95 % interval of a mean."""
    spread = statistics.stdev(values) / len(values) ** 0.5
    quantile: float = t.ppf((1 + _LEVEL) / 2, len(values) - 1)
    return float(quantile * spread)
