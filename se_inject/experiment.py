"""Experiments: train a network with blocks, and the same one without, for one seed or several.

Takes what a user asks for, with network and data opened, gives a `Result` a run and the tuned network. Each run has its
folder, with its checkpoint, log, networks and result.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from timm.layers import convert_sync_batchnorm
from torch import nn

from se_inject.artifact import save
from se_inject.checkpoints import CHECKPOINT
from se_inject.comparison import CONTROL, SE, Result
from se_inject.datasets import Data
from se_inject.ejection import eject
from se_inject.errors import ArtifactError, OptionError
from se_inject.files import write_tensors, write_whole
from se_inject.jobs import InterruptedTrainingError, Job, Outcome
from se_inject.loaders import EvalLoader, TrainLoader
from se_inject.provenance import Source
from se_inject.recipe import Recipe
from se_inject.records import compute_digest
from se_inject.rewrite import copy_model, get_plan
from se_inject.runlog import RunLog
from se_inject.signals import Signals
from se_inject.start import Start
from se_inject.tasks import make_teacher
from se_inject.training import train
from se_inject.world import World

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

RECIPE, RESULT, UNREADABLE = "recipe.json", "result.json", "unreadable.txt"
_LOCK = ".lock"


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        recipe: How to train.
        data: Arguments of `open_data`.
        options: Arguments of `inject`, where the network has no blocks yet.
        out: Where the tuned network goes.
        folder: Where checkpoints, logs and results go.
        has_control: Whether the network without blocks is trained beside it.
        num_seeds: How often all is repeated, from the recipe's seed on.
        input_size: Height and width of the images; None is the network's own.
        max_bad: How many unreadable images are skipped.
        compiled: Whether the steps are compiled.
        resume: Whether to go on with what the folder holds.
    """

    recipe: Recipe
    data: Mapping[str, Any]
    options: Mapping[str, Any]
    out: Path
    folder: Path
    has_control: bool = False
    num_seeds: int = 1
    input_size: int | None = None
    max_bad: int = 0
    compiled: bool = False
    resume: bool = False

    @property
    def runs(self) -> list[tuple[int, str]]:
        """The seeds and arms, in their order."""
        first, arms = self.recipe.seed, (SE, CONTROL) if self.has_control else (SE,)
        return [(seed, arm) for seed in range(first, first + self.num_seeds) for arm in arms]

    def get_folder(self, seed: int, arm: str) -> Path:
        """Return the folder of a run: the request's own, if there is only one."""
        return self.folder if len(self.runs) == 1 else self.folder / f"{arm}-{seed}"

    def has_begun(self) -> bool:
        """Tell whether one of the runs has written a checkpoint."""
        return any((self.get_folder(*run) / CHECKPOINT).is_file() for run in self.runs)


@dataclass(frozen=True)
class Experiment:
    """What is to be run: a request, with what it was for opened.

    Attributes:
        start: The network.
        data: The images.
        request: What was asked for.
    """

    start: Start
    data: Data
    request: Request


def run_experiment(
    experiment: Experiment, world: World, progress: Progress | None = None
) -> tuple[list[Result], nn.Module]:
    """Train all arms for all seeds.

    Args:
        experiment: What is to be run.
        world: The processes that train together.
        progress: Where to show it.

    Returns:
        The results, arm by arm within a seed, and the tuned network of the first seed.

    Raises:
        TrainingError: A run stopped; what it wrote is kept.
        OptionError: The folder holds another run.
        DataError: The images or labels are bad.
        ArtifactError: Something cannot be written.
    """
    request = experiment.request
    folder = request.folder
    if world.is_main:
        _make_folder(folder)
        if not (request.resume and request.has_begun()):  # a run that refuses to go on keeps what it has
            experiment.data.write_split(folder)
            _write_json(folder / RECIPE, request.recipe.to_values())
    world.wait()
    results = []
    tuned: nn.Module | None = None
    with Signals() as signals:
        for seed, arm in request.runs:
            result, model = _run_arm(experiment, arm, seed, world, progress)
            results.append(result)
            tuned = model if tuned is None else tuned
            is_asked = bool(world.add_up(torch.tensor(int(signals.is_asked), device=world.device)))
            if is_asked and len(results) < len(request.runs):
                raise InterruptedTrainingError(
                    f"stopped after {len(results)} of {len(request.runs)} runs; the same command with --resume goes on"
                )
    assert tuned is not None
    return results, tuned


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a run's folder, so that no other process trains in it; where there are no locks, do not.

    The lock is the process's own: what it has started to read images does not hold it when the process is killed.

    Raises:
        OptionError: Another process holds it.
        ArtifactError: The folder cannot be made.
    """
    _make_folder(folder)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context((folder / _LOCK).open("w"))
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OptionError(
                f"another process is training in {folder}; wait for it, or begin elsewhere with --run FOLDER"
            ) from error
        except OSError:
            pass  # a folder that cannot be written to is told of by what is written next
        yield


def _run_arm(
    experiment: Experiment, arm: str, seed: int, world: World, progress: Progress | None
) -> tuple[Result, nn.Module]:
    """Train one network; with `resume`, from where its folder says that it stands."""
    folder = experiment.request.get_folder(seed, arm)
    recipe = replace(experiment.request.recipe, seed=seed)
    if world.is_main:
        _make_folder(folder)
    job = _make_job(experiment, recipe, arm, world)
    title = f"{arm}, seed {seed}" if len(experiment.request.runs) > 1 else "fine-tuning"

    def keep(network: nn.Module, name: str) -> None:
        _write_network(network, folder / f"{name}.pt", experiment.start.source, arm)

    with RunLog(folder if world.is_main else None, title, progress) as log:
        outcome = train(job, folder, log, keep, resume=experiment.request.resume)
    result = _make_result(outcome, arm, seed)
    if world.is_main:
        _write_json(folder / RESULT, asdict(result))
        _report_bad(job, folder)
    return result, outcome.model


def _make_job(experiment: Experiment, recipe: Recipe, arm: str, world: World) -> Job:
    start, data = experiment.start, experiment.data
    model = copy_model(start.model).to(world.device)
    if arm == CONTROL:
        model = eject(model, inplace=True)
    teacher = make_teacher(start.model).to(world.device) if recipe.distill or not data.is_labelled else None
    if recipe.batch_norm == "sync" and world.is_cuda and world.size > 1:
        model = convert_sync_batchnorm(model)
    loader = TrainLoader(
        data, start.form, recipe, world, max_bad=experiment.request.max_bad, num_classes=start.num_classes
    )
    val = EvalLoader(
        data.val, start.form, batch_size=max(1, recipe.batch_size // world.size), workers=recipe.workers, world=world,
        max_bad=experiment.request.max_bad, num_classes=start.num_classes,
    )  # fmt: skip
    settings = {
        "arm": arm,
        "recipe": {k: v for k, v in recipe.to_values().items() if k not in ("workers", "checkpoint_minutes")},
        "data": data.describe(),
        "format": json.loads(json.dumps(asdict(start.form))),
        "plan": get_plan(start.model).to_json(),
        "network": f"{start.source}, weights {compute_digest(start.model.state_dict())[:12]}",
    }
    return Job(
        model, loader, val, recipe, world, start.num_classes, data.classes, teacher, data.is_labelled, start.fresh,
        experiment.request.compiled, settings,
    )  # fmt: skip


def _make_result(outcome: Outcome, arm: str, seed: int) -> Result:
    hits = outcome.scores.hits
    return Result(
        arm=arm,
        seed=seed,
        before=outcome.history[0]["top1"],
        top1=outcome.scores.top1,
        parameters=sum(p.numel() for p in outcome.model.parameters()),
        seconds=outcome.seconds,
        images_per_second=outcome.images_per_second,
        hits="" if hits is None else "".join(map(str, hits.tolist())),
        history=outcome.history,
    )


def _write_network(network: nn.Module, path: Path, source: Source | None, arm: str) -> None:
    if arm == SE:
        save(network, path, source=source)
    else:
        write_tensors(path, network.state_dict(), {})


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"the folder {folder} cannot be made: {error.strerror or error}") from error


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_whole(path, lambda file: file.write(json.dumps(values, indent=1).encode()))


def _report_bad(job: Job, folder: Path) -> None:
    names = [*job.train.bad.list_names(), *job.val.bad.list_names()]
    if names:
        write_whole(folder / UNREADABLE, lambda file: file.write(os.fsencode("\n".join([*names, ""]))))
