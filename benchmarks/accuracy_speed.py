"""The speed of the fine-tune loop against timm's bare training step, with the images decoded on both sides."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from se_inject.formats import InputFormat
from se_inject.jobs import Job
from se_inject.loaders import EvalLoader
from se_inject.recipe import Recipe
from se_inject.rewrite import copy_model
from se_inject.runlog import RunLog
from se_inject.tasks import autocast
from se_inject.training import train
from se_inject.world import World

_NUM_WARM = 3


class ReadyBatches:
    """Batches that are ready, in the place of a loader; notes the times at which they are asked for.

    Attributes:
        num_steps: Batches an epoch.
        bad: None, for nothing is read.
        times: In seconds, one for each batch.
    """

    bad = None

    def __init__(self, images: Tensor, labels: Tensor, num_steps: int) -> None:
        self._batch, self.num_steps = (images, labels), num_steps
        self.times: list[float] = []

    def iterate(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of an epoch, which are all the same."""
        assert epoch == 0
        for _ in range(first, self.num_steps):
            self.times.append(_read_clock(self._batch[0].device))
            yield self._batch


def measure_throughput(
    model: nn.Module, form: InputFormat, recipe: Recipe, world: World, *, num_steps: int = 20, num_pairs: int = 9
) -> dict[str, Any]:
    """Measure images/s of our loop and of timm's bare step, in pairs one after the other.

    Args:
        model: On the world's device; copies of it are trained.
        form: Of its input.
        recipe: How; without a stage of the blocks' own, for the bare step trains everything.
        world: One process.
        num_steps: Steps that are timed, after a few that are not.
        num_pairs: How often.
    """
    recipe = replace(recipe, gates_share=0.0, distill=0.0, epochs=1)
    images = torch.randn(recipe.batch_size, *form.size, device=world.device)
    labels = torch.arange(recipe.batch_size, device=world.device) % 10
    sides = (_time_ours, _time_bare)
    ours, bare = [], []
    for number in range(num_pairs):
        taken = {}
        for side in sides if number % 2 else reversed(sides):
            ready = ReadyBatches(images, labels, _NUM_WARM + num_steps + 1)  # n steps are between n + 1 times
            side(copy_model(model), ready, recipe, world)
            taken[side] = (ready.times[-1] - ready.times[_NUM_WARM]) / num_steps
        ours.append(recipe.batch_size / taken[_time_ours])
        bare.append(recipe.batch_size / taken[_time_bare])
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    return {
        "ours": statistics.median(ours),
        "bare": statistics.median(bare),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "num_steps": num_steps,
        "batch_size": recipe.batch_size,
        "threads": torch.get_num_threads(),
    }


def _time_ours(model: nn.Module, ready: ReadyBatches, recipe: Recipe, world: World) -> None:
    loader: Any = ready
    val: EvalLoader = _Nothing()  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder, RunLog(None, "") as log:
        train(Job(model, loader, val, recipe, world, 10), Path(folder), log, lambda *_: None)


def _time_bare(model: nn.Module, ready: ReadyBatches, recipe: Recipe, world: World) -> None:
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    model.train()
    criterion = LabelSmoothingCrossEntropy(recipe.smoothing)
    optimizer = create_optimizer_v2(
        model, recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum
    )
    for images, labels in ready.iterate(0):
        inputs = images.contiguous(memory_format=torch.channels_last) if recipe.channels_last else images
        with autocast(recipe, world):
            loss = criterion(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class _Nothing:
    """No images to validate on."""

    bad, num_batches, num_images, batch_size = None, 0, 0, 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(())


def _read_clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
