"""Jobs: what is trained, on what and how, and what that ends with.

Plain data, between those who prepare a run and the loop in `training`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from se_inject.errors import TrainingError
from se_inject.loaders import EvalLoader, TrainLoader
from se_inject.recipe import Recipe
from se_inject.scores import Scores
from se_inject.world import World


@dataclass(frozen=True)
class Job:
    """A network and what it is to be trained on.

    Attributes:
        model: On the world's device; its weights are changed.
        train: The training images.
        val: The validation images.
        recipe: How.
        world: With whom.
        num_classes: The network's outputs.
        classes: Names of the classes, if known.
        teacher: The network whose outputs are learned from (`distill`), or that labels validation images without any.
        is_labelled: Whether the validation images have labels.
        fresh: Names of parameters that start from random values.
        compiled: Whether the steps are compiled by torch.
        settings: What tells this run from others.
    """

    model: nn.Module
    train: TrainLoader
    val: EvalLoader
    recipe: Recipe
    world: World
    num_classes: int
    classes: tuple[str, ...] | None = None
    teacher: nn.Module | None = None
    is_labelled: bool = True
    fresh: frozenset[str] = frozenset()
    compiled: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """How many steps the recipe has."""
        return max(1, round(self.recipe.epochs * self.train.num_steps))


@dataclass(frozen=True)
class Outcome:
    """What a run ended with.

    Attributes:
        model: The network whose scores are given: the moving average, or the trained one without it.
        scores: Of the validation images, at the end.
        history: The validations, as plain values; the first one is from before the first step.
        seconds: Time of the steps, without validation, and of interrupted runs that it went on from.
        images_per_second: Over these.
    """

    model: nn.Module
    scores: Scores
    history: list[dict[str, Any]]
    seconds: float
    images_per_second: float


class InterruptedTrainingError(TrainingError):
    """The run was asked to stop, and has written where it stands."""
