"""Report, the network: what the blocks cost in size and time, how accurate it is, and what a control reached.

Takes a network, and the folder of a comparison, gives what was counted, timed and read. Trains nothing.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from torch import nn

from se_inject.comparison import CONTROL, SE, Difference, Result, compare
from se_inject.errors import DataError, SEInjectError
from se_inject.experiment import RESULT
from se_inject.rewrite import copy_model
from se_inject.speed import Measured, measure_network
from se_inject.timing import Conditions


@dataclass(frozen=True)
class Control:
    """What a comparison with a control came to.

    Attributes:
        folder: Where its results are.
        seeds: That both arms have.
        before: Top-1 before the first step, in per cent; the mean over seeds, as the next two.
        se: With blocks, tuned.
        control: Without blocks, tuned on the same budget.
        difference: Between the two.
        verdict: In a sentence.
    """

    folder: str
    seeds: tuple[int, ...]
    before: float
    se: float
    control: float
    difference: Difference
    verdict: str


def read_results(folder: Path) -> list[Result]:
    """Read the results of a comparison, of the seeds that both arms have; none if the folder holds no comparison.

    Args:
        folder: Of `finetune --compare`.

    Raises:
        DataError: A file of results cannot be read.
    """
    results = [_read_result(path) for path in sorted(folder.glob(f"*/{RESULT}"))]
    seeds = [{result.seed for result in results if result.arm == arm} for arm in (SE, CONTROL)]
    both = seeds[0] & seeds[1]
    return [result for result in results if result.seed in both]


def _read_result(path: Path) -> Result:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Result(**{field.name: values[field.name] for field in fields(Result)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no result of se-inject finetune: {error!r}; leave it out, or give --run") from error


def compare_arms(results: Sequence[Result], folder: Path) -> Control | None:
    """Compare the arms of a comparison; None without results."""
    if not results:
        return None
    ours, theirs = ([result for result in results if result.arm == arm] for arm in (SE, CONTROL))
    difference = compare(results)
    return Control(
        folder=str(folder),
        seeds=tuple(sorted(result.seed for result in ours)),
        before=statistics.fmean(result.before for result in ours),
        se=statistics.fmean(result.top1 for result in ours),
        control=statistics.fmean(result.top1 for result in theirs),
        difference=difference,
        verdict=str(difference),
    )


def measure_costs(model: nn.Module, conditions: Conditions) -> Measured | str:
    """Measure a network without its blocks, with them, and optimized; or say why that cannot be done.

    Args:
        model: An injected network on any device; it is left as it is.
        conditions: How it is run.
    """
    try:
        return measure_network(copy_model(model).cpu(), conditions)
    except SEInjectError as error:
        return str(error)
