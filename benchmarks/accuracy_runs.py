"""A fine-tune of the accuracy benchmark: what says which one it is, and what performs it."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

import se_inject
from benchmarks.accuracy_networks import (
    PASTED,
    Pretrained,
    make_data,
    make_model,
    name_source,
    open_pretrained,
    search_half,
)
from se_inject.calibration import calibrate
from se_inject.errors import OptionError
from se_inject.jobs import Job
from se_inject.loaders import EvalLoader, TrainLoader
from se_inject.reading import seed_all
from se_inject.recipe import Recipe
from se_inject.runlog import RunLog
from se_inject.scores import Scores, evaluate
from se_inject.tasks import autocast, make_teacher
from se_inject.training import train
from se_inject.world import World, join_world, name_device

_NUM_GLANCED = 64
"""Images of the validations between epochs, which nothing here depends on."""


@dataclass(frozen=True)
class Run:
    """One fine-tune.

    Attributes:
        network: Its name.
        arm: What becomes of it.
        share: The part of the training images.
        epochs: Passes over these.
        seed: Of data, augmentation and initialisation.
        recipe: How, as plain values.
        r: The blocks' reduction ratio.
        input_size: Height and width of EfficientNet-Lite0's images.
        is_choosing: Whether it is scored on the first half of the test images alone, by which settings are chosen.
        at: The kinds of places of the blocks, but for those of `every_conv`; those of `inject` if there are none.
    """

    network: str
    arm: str
    share: float
    epochs: float
    seed: int
    recipe: Mapping[str, Any]
    r: float
    input_size: int
    is_choosing: bool
    at: tuple[str, ...] = ()


@dataclass(frozen=True)
class Files:
    """Where things are, which no result depends on."""

    data: Path
    weights: Path | None
    device: str = "auto"
    threads: int = 1
    keep: Path | None = None


def settle_rates(arm: str, recipe: Recipe) -> Recipe:
    """Give blocks that are pasted in the rate of any other layer, in a recipe that `calibrate` settled."""
    return replace(recipe, se_lr=recipe.lr) if arm in PASTED else recipe


def perform(run: Run, files: Files) -> dict[str, Any]:
    """Perform a run; gives its row."""
    torch.set_num_threads(files.threads)
    recipe = Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in run.recipe.items()})
    data = make_data(run.network, files.data, share=run.share, seed=run.seed)
    with join_world(files.device) as world, tempfile.TemporaryDirectory() as folder:
        opened = open_pretrained(run.network, weights=files.weights, input_size=run.input_size, seed=run.seed)
        if recipe.distill and opened.fresh:
            raise OptionError(f"the teacher of {run.network} knows other classes; use --set distill=0")
        opened.model.to(world.device)
        loader, compute = TrainLoader(data, opened.form, recipe, world), partial(autocast, recipe, world)
        # On the original, for all arms: what is pasted in breaks the start, and would settle other things.
        settled, dependence = calibrate(opened.model, loader, recipe, world, fresh=opened.fresh, compute=compute)
        model, before = _get_start(run, opened, world, files)
        if run.arm not in PASTED and settled.optimizer == "sgd":  # whose blocks have a rate that goes by the images
            recipe = replace(settled, se_lr=recipe.se_lr)
            settled, dependence = calibrate(model, loader, recipe, world, compute=compute)
        recipe = settle_rates(run.arm, settled)
        if run.arm == "search":
            model = search_half(model, opened, data, recipe, world)
        glanced = Subset(data.val, range(0, len(data.val), max(1, len(data.val) // _NUM_GLANCED)))  # type: ignore[arg-type]
        job = Job(
            model, loader, _make_eval(glanced, opened, recipe, world), recipe,
            world, 10, teacher=make_teacher(opened.model) if recipe.distill else None, fresh=opened.fresh,
        )  # fmt: skip
        with RunLog(None, "") as log:
            outcome = train(job, Path(folder), log, lambda *_: None)
        if files.keep is not None and se_inject.blocks(outcome.model):
            name = f"{run.network}-{run.arm}-{run.share:g}-{run.epochs:g}-{run.seed}.pt"
            se_inject.save(outcome.model, files.keep / name, source=name_source(run.network, data.classes))
        scores = _score(
            outcome.model, _make_halves(run, data.val, opened, recipe, world), world,
            temperature=recipe.label_temperature, compute=compute,
        )  # fmt: skip
    return {
        **asdict(run),
        "data": data.origin,
        "num_train": len(data.train),  # type: ignore[arg-type]
        "num_val": sum(half.num_images for half in scores),
        "before": before,
        "top1": statistics.fmean(half.top1 for half in scores),
        "top1_unchosen": None if run.is_choosing else scores[-1].top1,
        "val_loss": statistics.fmean(half.loss for half in scores),
        "batch_norm": recipe.batch_norm,
        "label_temperature": recipe.label_temperature,
        "se_lr": recipe.se_lr,
        "dependence": dependence,
        "parameters": sum(p.numel() for p in outcome.model.parameters()),
        "blocks": len(se_inject.blocks(outcome.model)),
        "steps": job.num_steps,
        "seconds": outcome.seconds,
        "images_per_second": outcome.images_per_second,
        "device": name_device(world.device),
    }


def _get_start(run: Run, opened: Pretrained, world: World, files: Files) -> tuple[nn.Module, float]:
    """Make the network of a run, and score it before the first step; the same start is scored once a process."""
    seed_all(run.seed)
    arm = "se" if run.arm == "search" else run.arm
    model = make_model(opened.model, arm, r=run.r, size=opened.form.size, at=run.at)
    key = (run.network, run.arm, run.share, run.seed, run.r, run.input_size, run.is_choosing, run.at)
    if key not in (known := _get_known()):
        data = make_data(run.network, files.data, share=1, seed=run.seed)
        recipe = Recipe(batch_size=run.recipe["batch_size"], workers=run.recipe["workers"])
        scores = _score(model, _make_halves(run, data.val, opened, recipe, world), world)
        known[key] = statistics.fmean(half.top1 for half in scores)
    return model, known[key]


def _make_halves(run: Run, images: Any, opened: Pretrained, recipe: Recipe, world: World) -> list[EvalLoader]:
    """Make batches of the half of the test images by which settings are chosen, and of the other one."""
    halves = (0,) if run.is_choosing else (0, 1)
    return [_make_eval(Subset(images, range(half, len(images), 2)), opened, recipe, world) for half in halves]


def _score(model: nn.Module, halves: list[EvalLoader], world: World, **options: Any) -> list[Scores]:
    return [evaluate(model, half, world, num_classes=10, **options) for half in halves]


@cache
def _get_known() -> dict[Any, float]:
    return {}


def _make_eval(images: Any, opened: Pretrained, recipe: Recipe, world: World) -> EvalLoader:
    return EvalLoader(images, opened.form, batch_size=max(128, recipe.batch_size), workers=recipe.workers, world=world)
