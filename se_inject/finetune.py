"""Fine-tuning: from a network and a folder of images to a tuned artifact, and the comparison with a control.

Takes an opened network, a data set and a recipe; injects where that has not been done, fits the classifier, trains one
arm or both, and writes what they end with. The stages below do the work.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from timm.layers import convert_sync_batchnorm
from torch import nn

from se_inject.artifact import save
from se_inject.block import SqueezeExcite
from se_inject.checkpoints import CHECKPOINT
from se_inject.comparison import CONTROL, SE, Difference, Result, compare
from se_inject.datasets import Data, open_data, write_split
from se_inject.ejection import eject
from se_inject.errors import DataError, OptionError, SourceError
from se_inject.files import check_target, write_tensors, write_whole
from se_inject.formats import InputFormat, read_format
from se_inject.heads import count_channels, count_outputs, replace_head
from se_inject.images import read_size
from se_inject.loaders import EvalLoader, TrainLoader, seed_all
from se_inject.recipe import Recipe
from se_inject.rewrite import blocks, copy_model, find_plan, get_plan, inject
from se_inject.runlog import CURVES, METRICS, RunLog, draw_curves, read_metrics
from se_inject.scores import Scores, evaluate
from se_inject.sources import Source, takes_num_classes
from se_inject.tasks import make_teacher
from se_inject.training import Job, Outcome, train
from se_inject.world import World

RESULT = "result.json"


@dataclass(frozen=True)
class Start:
    """A network that is ready to be trained.

    Attributes:
        model: Injected, with a classifier for the data.
        source: How it is built; None if its file does not say.
        form: What images become for it.
        num_classes: Its outputs.
        fresh: Names of parameters that start from random values.
    """

    model: nn.Module
    source: Source | None
    form: InputFormat
    num_classes: int
    fresh: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Experiment:
    """What is to be run.

    Attributes:
        start: The network.
        data: The images.
        recipe: How.
        folder: Where checkpoints, logs and results go.
        arms: "se", or "se" and "control".
        seeds: Of the recipe, each with all arms.
        max_bad: How many unreadable images are skipped.
        compiled: Whether the steps are compiled.
        resume: Whether to go on with what the folder holds.
    """

    start: Start
    data: Data
    recipe: Recipe
    folder: Path
    arms: tuple[str, ...] = (SE,)
    seeds: tuple[int, ...] = (0,)
    max_bad: int = 0
    compiled: bool = False
    resume: bool = False


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


@dataclass(frozen=True)
class Tuned:
    """What a fine-tune ended with.

    Attributes:
        results: Of all runs.
        difference: To the control; None without one.
        out: The tuned network's file.
        folder: The runs'.
        notes: What the user should know.
    """

    results: Sequence[Result]
    difference: Difference | None
    out: Path
    folder: Path
    notes: Sequence[str] = ()

    def to_values(self) -> dict[str, Any]:
        """Turn into plain values."""
        results = [{k: v for k, v in asdict(result).items() if k != "hits"} for result in self.results]
        difference = None
        if self.difference is not None:
            difference = {
                **asdict(self.difference),
                "verdict": self.difference.verdict,
                "sentence": str(self.difference),
            }
        return {"out": str(self.out), "run": str(self.folder), "results": results, "difference": difference,
                "notes": list(self.notes)}  # fmt: skip


def finetune(
    open_model: Callable[[], tuple[nn.Module, Source | None]], request: Request, world: World, progress: Progress | None
) -> Tuned:
    """Fine-tune a network as a user asks for it, and write it.

    Args:
        open_model: Opens the network; called after what can be checked without it.
        request: What is asked for.
        world: The processes that train together.
        progress: Where to show it; None shows nothing.

    Raises:
        SEInjectError: Anything that is expected to fail; see `prepare_start` and `run_experiment`.
    """
    recipe = request.recipe
    check_target(request.out)
    if request.num_seeds < 1:
        raise OptionError(f"--seeds is {request.num_seeds}; it must be at least 1")
    _check_folder(request.folder, resume=request.resume)
    data = open_data(**request.data, seed=recipe.seed, may_be_unlabelled=recipe.distill == 1)
    seed_all(recipe.seed)  # the blocks, a fresh classifier, and what a factory draws
    model, source = open_model()
    start = prepare_start(model, source, data.num_classes, options=request.options, input_size=request.input_size)
    if start.form.mode != "RGB":
        data = open_data(**request.data, mode=start.form.mode, seed=recipe.seed, may_be_unlabelled=recipe.distill == 1)
    if recipe.distill and start.fresh:
        raise OptionError(
            "distill learns from the network's own classes, and its classifier was replaced; use --set distill=0"
        )
    experiment = Experiment(
        start, data, recipe, request.folder, (SE, CONTROL) if request.has_control else (SE,),
        tuple(range(recipe.seed, recipe.seed + request.num_seeds)), request.max_bad, request.compiled, request.resume,
    )  # fmt: skip
    notes = []
    if request.has_control and not is_fresh(start.model):
        notes.append("the blocks had been trained before: the control starts from the same weights without them")
    with progress or contextlib.nullcontext():
        results, tuned = run_experiment(experiment, world, progress)
    if world.is_main:
        save(tuned, request.out, source=start.source)
        if len(results) > 1:
            runs = {
                f"{r.arm}, seed {r.seed}": read_metrics(request.folder / f"{r.arm}-{r.seed}" / METRICS) for r in results
            }
            draw_curves(runs, request.folder / CURVES)
    difference = compare(results) if request.has_control else None
    return Tuned(results, difference, request.out, request.folder, notes)


def is_fresh(model: nn.Module) -> bool:
    """Tell whether all blocks are exact identities still."""
    own = [block for block in blocks(model).values() if isinstance(block, SqueezeExcite)]
    return all(not block.fc2.weight.any() and (block.fc2.bias is None or not block.fc2.bias.any()) for block in own)


def score_network(
    open_model: Callable[[], tuple[nn.Module, Source | None]],
    data: Mapping[str, Any],
    world: World,
    *,
    batch_size: int,
    workers: int,
    input_size: int | None,
    max_bad: int,
    progress: Progress | None,
) -> tuple[Scores, list[str]]:
    """Evaluate a network, injected or not, on the validation images of a data set.

    Returns:
        The scores, and the paths of images that could not be read.

    Raises:
        DataError: The data is not what the network was made for.
        OptionError: The batch does not fit into memory.
    """
    if batch_size < 1:
        raise OptionError(f"--batch-size is {batch_size}; it must be at least 1")
    opened = open_data(**data, is_evaluation=True)
    model, source = open_model()
    form = _read_model_format(model, source, input_size)
    if form.mode != "RGB":
        opened = open_data(**data, is_evaluation=True, mode=form.mode)
    model = model.to(world.device)
    num_classes = count_outputs(model, form.size)
    check_classes(opened, num_classes)
    loader = EvalLoader(
        opened.val, form, batch_size=batch_size, workers=workers, world=world, max_bad=max_bad, num_classes=num_classes
    )
    with RunLog(None, "evaluation", progress) as log, progress or contextlib.nullcontext():
        log.begin_validation(loader.num_batches)
        scores = evaluate(
            model, loader, world, num_classes=num_classes, classes=opened.classes,
            on_batch=lambda _: log.advance_validation(),
        )  # fmt: skip
    return scores, loader.bad.list_names() if loader.bad is not None else []


def prepare_start(
    model: nn.Module,
    source: Source | None,
    num_classes: int,
    *,
    options: Mapping[str, Any],
    input_size: int | None = None,
) -> Start:
    """Inject where that has not been done, and fit the classifier to the data.

    Args:
        model: From an artifact or a library; it is changed.
        source: How it is built.
        num_classes: Classes of the data; 0 keeps the classifier.
        options: Of `inject`.
        input_size: Height and width of the images; by default the network's own.

    Raises:
        DataError: The network is no classifier, or its classifier cannot be replaced.
        SourceError: The artifact could not be built again with another number of classes.
        EmptyPlanError: The network has no place for a block.
    """
    if find_plan(model) is None:
        example = None if input_size is None else torch.zeros(2, count_channels(model), input_size, input_size)
        model = inject(model, inplace=True, example=example, **options)
    form = _read_model_format(model, source, input_size)
    num_outputs = count_outputs(model, form.size)
    fresh: frozenset[str] = frozenset()
    if num_classes and num_outputs != num_classes:
        fresh = replace_head(model, num_outputs, num_classes)
        if (found := count_outputs(model, form.size)) != num_classes:
            raise DataError(
                f"{type(model).__name__} gives {found} scores after its last layer was replaced; give it a classifier "
                f"of {num_classes} classes first"
            )
        if source is not None and not takes_num_classes(source):
            raise SourceError(
                f"{source.name} makes {num_outputs} classes and the data has {num_classes}; give the factory a "
                f"parameter num_classes, so that the result can be built again"
            )
        if source is not None:
            source = replace(source, options={**source.options, "num_classes": num_classes})
    if source is not None:
        source = replace(source, preprocess=form.to_preprocess())
    return Start(model, source, form, num_classes or num_outputs, fresh)


def _read_model_format(model: nn.Module, source: Source | None, input_size: int | None) -> InputFormat:
    preprocess = source.preprocess if source is not None else {}
    return read_format(preprocess, read_size(find_plan(model)), input_size=input_size, in_chans=count_channels(model))


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
    if world.is_main:
        experiment.folder.mkdir(parents=True, exist_ok=True)
        write_split(experiment.data, experiment.folder)
        _write_json(experiment.folder / "recipe.json", experiment.recipe.to_values())
    world.wait()
    results = []
    tuned: nn.Module | None = None
    for seed in experiment.seeds:
        for arm in experiment.arms:
            result, model = _run_arm(experiment, arm, seed, world, progress)
            results.append(result)
            tuned = model if tuned is None else tuned
    assert tuned is not None
    return results, tuned


def _run_arm(
    experiment: Experiment, arm: str, seed: int, world: World, progress: Progress | None
) -> tuple[Result, nn.Module]:
    """Train one network; what has been done already is read."""
    start = experiment.start
    is_single = len(experiment.arms) * len(experiment.seeds) == 1
    folder = experiment.folder if is_single else experiment.folder / f"{arm}-{seed}"
    recipe = replace(experiment.recipe, seed=seed)
    if world.is_main:
        folder.mkdir(exist_ok=True)
    model = copy_model(start.model).to(world.device)
    if arm == CONTROL:
        model = eject(model, inplace=True)
    teacher = make_teacher(start.model).to(world.device) if recipe.distill or not experiment.data.is_labelled else None
    if recipe.batch_norm == "sync" and world.is_cuda and world.size > 1:
        model = convert_sync_batchnorm(model)
    job = _make_job(replace(experiment, recipe=recipe), model, teacher, world, arm)
    title = f"{arm}, seed {seed}" if not is_single else "fine-tuning"

    def keep(network: nn.Module, name: str) -> None:
        _write_network(network, folder / f"{name}.pt", start.source, arm)

    with RunLog(folder if world.is_main else None, title, progress) as log:
        outcome = train(job, folder, log, keep, resume=experiment.resume)
    result = _make_result(outcome, arm, seed)
    if world.is_main:
        _write_json(folder / RESULT, asdict(result))
        _report_bad(job, folder)
    return result, outcome.model


def _make_job(experiment: Experiment, model: nn.Module, teacher: nn.Module | None, world: World, arm: str) -> Job:
    start, data, recipe = experiment.start, experiment.data, experiment.recipe
    loader = TrainLoader(data, start.form, recipe, world, max_bad=experiment.max_bad, num_classes=start.num_classes)
    val = EvalLoader(
        data.val, start.form, batch_size=max(1, recipe.batch_size // world.size), workers=recipe.workers, world=world,
        max_bad=experiment.max_bad, num_classes=start.num_classes,
    )  # fmt: skip
    settings = {
        "arm": arm,
        "recipe": {k: v for k, v in recipe.to_values().items() if k not in ("workers", "checkpoint_minutes")},
        "data": data.describe(),
        "format": json.loads(json.dumps(asdict(start.form))),
        "plan": get_plan(start.model).to_json(),
    }
    return Job(
        model, loader, val, recipe, world, start.num_classes, data.classes, teacher, data.is_labelled, start.fresh,
        experiment.compiled, settings,
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


def _check_folder(folder: Path, *, resume: bool) -> None:
    """Refuse to write over another run."""
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder} is a file; --run FOLDER says where the run's files go")
    if not resume and folder.is_dir() and next(folder.rglob(CHECKPOINT), None) is not None:
        raise OptionError(f"{folder} holds a run already; --resume goes on with it, --run FOLDER begins in another one")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_whole(path, lambda file: file.write(json.dumps(values, indent=1).encode()))


def _report_bad(job: Job, folder: Path) -> None:
    names = [name for bad in (job.train.bad, job.val.bad) if bad is not None for name in bad.list_names()]
    if names:
        write_whole(folder / "unreadable.txt", lambda file: file.write("\n".join([*names, ""]).encode()))


def check_classes(data: Data, num_outputs: int) -> None:
    """Refuse data whose labels cannot be those of a network.

    Raises:
        DataError: It has another number of classes.
    """
    if data.num_classes != num_outputs:
        raise DataError(
            f"{data.origin} has {data.num_classes} classes and the network {num_outputs}: labels would mean others"
        )
