"""Stages: which parameters learn in which steps.

Takes a recipe and a number of steps, gives the stages, and sets a network's parameters up for one. Trains nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from torch import nn

from se_inject.groups import freeze_batch_norm, iterate_backbone, iterate_batch_norms
from se_inject.recipe import Recipe
from se_inject.rewrite import blocks

StageName = Literal["gates", "all"]


@dataclass(frozen=True)
class Stage:
    """Steps in which the same parameters learn.

    Attributes:
        name: "gates" if the blocks alone learn, with a classifier that was replaced; "all" otherwise.
        first: Its first step.
        last: The step after its last one.
    """

    name: StageName
    first: int
    last: int


def list_stages(recipe: Recipe, num_steps: int, *, has_blocks: bool) -> list[Stage]:
    """List the stages of a recipe; a network without blocks learns as a whole for all of the steps."""
    if not has_blocks:
        return [Stage("all", 0, num_steps)]
    if recipe.train == "gates":
        return [Stage("gates", 0, num_steps)]
    border = min(num_steps, round(recipe.gates_share * num_steps))
    stages = [Stage("gates", 0, border), Stage("all", border, num_steps)]
    return [stage for stage in stages if stage.first < stage.last]


def set_learning(model: nn.Module, stage: Stage, fresh: Collection[str], recipe: Recipe) -> None:
    """Say which parameters learn in a stage."""
    inside = tuple(f"{path}." for path in blocks(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage.name == "all" or name in fresh or (bool(inside) and name.startswith(inside)))
    if recipe.batch_norm == "frozen":
        for norm in iterate_batch_norms(model):
            norm.requires_grad_(False)


def set_modes(model: nn.Module, stage: Stage, recipe: Recipe) -> None:
    """Put a network into train mode, but for what keeps its state: frozen norms; where the blocks alone learn, all."""
    model.train()
    if stage.name == "gates":
        for module in iterate_backbone(model):
            if next(module.buffers(recurse=False), None) is not None:
                module.training = False
    elif recipe.batch_norm == "frozen":
        freeze_batch_norm(model)
