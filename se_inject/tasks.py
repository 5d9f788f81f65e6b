"""Tasks: the loss of a recipe, and what lowers it.

Takes a network and a recipe, gives timm's task, the optimizer and the schedule of a stage, and the precision. Runs
nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.nn import functional as F

from se_inject.errors import OptionError, get_first_line
from se_inject.groups import param_groups
from se_inject.recipe import Recipe
from se_inject.rewrite import copy_model
from se_inject.scores import check_outputs
from se_inject.stages import StageName
from se_inject.world import World


class DistillationTask(ClassificationTask):  # type: ignore[misc]  # timm's
    """timm's classification task with a teacher: the original network, whose outputs are learned from.

    The loss is `(1 - weight) * loss(outputs / t, labels) + weight * T^2 * KL(teacher / T || outputs / T)`, with the
    recipe's `temperature` T and `label_temperature` t; Hinton et al., arXiv 1503.02531, section 2. timm's own task for
    it takes timm's networks alone.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, recipe: Recipe, criterion: nn.Module, num_classes: int
    ) -> None:
        super().__init__(model, criterion, verbose=False)
        self._num_classes = num_classes
        self.weight, self.temperature = recipe.distill, recipe.temperature
        self.label_temperature = recipe.label_temperature
        self._teacher = (teacher,)  # in a tuple, so that it is no part of what is trained

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002  timm's name
        """Give the loss and the outputs (N, classes) of images (N, C, H, W)."""
        images = input.clone() if self.weight else input  # a network may change what it is handed
        output = self.trainable_module(input)
        if isinstance(output, tuple):  # torchvision's GoogLeNet and Inception have auxiliary outputs in train mode
            output = output[0]
        output = check_outputs(output, self._num_classes)
        loss = output.new_zeros(())
        if self.weight < 1:
            loss = (1 - self.weight) * self.criterion(output / self.label_temperature, target)
        if self.weight:
            (teacher,) = self._teacher
            assert teacher is not None
            with torch.no_grad():
                expected = teacher(images) / self.temperature
            student = F.log_softmax(output / self.temperature, 1)
            distance = F.kl_div(student, F.log_softmax(expected, 1), reduction="batchmean", log_target=True)
            loss = loss + self.weight * self.temperature**2 * distance
        return {"loss": loss, "output": output}


def make_task(model: nn.Module, recipe: Recipe, teacher: nn.Module | None, num_classes: int) -> ClassificationTask:
    """Make timm's task: the network with its loss, at the temperature that the recipe was settled to.

    Args:
        model: What is trained.
        recipe: From `calibrate`.
        teacher: Is needed where the recipe has `distill`.
        num_classes: The network's outputs.
    """
    criterion = SoftTargetCrossEntropy() if recipe.mixes else LabelSmoothingCrossEntropy(recipe.smoothing)
    return DistillationTask(model, teacher, recipe, criterion, num_classes)


def make_optimizer(
    model: nn.Module, recipe: Recipe, stage: StageName, fresh: Collection[str] = ()
) -> torch.optim.Optimizer:
    """Make the optimizer of a stage, over what learns in it.

    Raises:
        OptionError: It needs a device or a package that is not here.
    """
    se_lr = recipe.gates_lr if stage == "gates" else recipe.se_lr
    groups = param_groups(
        model, lr=recipe.lr, se_lr=se_lr, weight_decay=recipe.weight_decay, fresh=fresh, fresh_lr=recipe.head_lr
    )
    try:
        return create_optimizer_v2(  # type: ignore[no-any-return]  # timm's
            groups, recipe.optimizer, lr=recipe.lr, momentum=recipe.momentum
        )
    except (AssertionError, ImportError, RuntimeError) as error:
        raise OptionError(
            f"the optimizer {recipe.optimizer} cannot be made here: {get_first_line(error)}; use --set optimizer=auto"
        ) from error


def autocast(recipe: Recipe, world: World) -> contextlib.AbstractContextManager[Any]:
    """Make the context in which the network runs: bf16 or plain."""
    is_mixed = recipe.precision == "bf16" or (recipe.precision == "auto" and world.computes_bf16)
    return torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=is_mixed)


def make_teacher(model: nn.Module) -> nn.Module:
    """Copy a network as it is, to be learned from."""
    return copy_model(model).eval().requires_grad_(False)


class GroupwiseCosine(CosineLRScheduler):  # type: ignore[misc]  # timm's
    """timm's schedule that ends, in each parameter group, at one share of the group's own peak; timm's floor is one."""

    def __init__(self, optimizer: torch.optim.Optimizer, num_steps: int, *, share: float, warmup: int) -> None:
        self._share = share
        super().__init__(optimizer, num_steps, warmup_t=warmup, t_in_epochs=False)

    def _get_lr(self, t: int) -> list[float]:
        rates: list[float] = super()._get_lr(t)
        if t < self.warmup_t:
            return rates
        return [
            self._share * peak + (1 - self._share) * rate for peak, rate in zip(self.base_values, rates, strict=True)
        ]


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, num_steps: int) -> GroupwiseCosine:
    """Make the schedule of a stage: the rates rise, then fall along a cosine; stepped by the number of steps done."""
    warmup = min(num_steps - 1, round(recipe.warmup_share * num_steps))
    return GroupwiseCosine(optimizer, max(2, num_steps), share=recipe.min_lr_share, warmup=warmup)
