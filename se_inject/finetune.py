"""Fine-tuning: from a network and a folder of images to a tuned artifact, and the comparison with a control.

Takes an opened network, a data set and a recipe; injects where that has not been done, fits the classifier, trains one
arm or both, and writes what they end with. The stages below do the work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import nn

from se_inject.artifact import save
from se_inject.checkpoints import CHECKPOINT
from se_inject.comparison import Difference, Result, compare
from se_inject.datasets import Data, open_data
from se_inject.errors import OptionError
from se_inject.experiment import UNREADABLE, Experiment, Request, hold_folder, run_experiment
from se_inject.files import check_target
from se_inject.gates import is_fresh
from se_inject.provenance import Source
from se_inject.reading import seed_all
from se_inject.recipe import Recipe
from se_inject.runlog import CURVES, METRICS, draw_curves, read_metrics
from se_inject.start import prepare_start
from se_inject.world import World


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
    _check_folder(request)
    data = open_data(**request.data, seed=recipe.seed, may_be_unlabelled=recipe.distill == 1)
    seed_all(recipe.seed)  # the blocks, a fresh classifier, and what a factory draws
    model, source = open_model()
    start = prepare_start(
        model, source, data.num_classes, classes=data.classes or (), options=request.options,
        input_size=request.input_size,
    )  # fmt: skip
    if start.form.mode != "RGB":
        data = open_data(**request.data, mode=start.form.mode, seed=recipe.seed, may_be_unlabelled=recipe.distill == 1)
    if recipe.distill and start.fresh:
        raise OptionError(
            "distill learns from the network's own classes, and its classifier was replaced; use --set distill=0"
        )
    experiment = Experiment(start, data, request)
    notes = []
    if request.has_control and not is_fresh(start.model):
        notes.append("the blocks had been trained before: the control starts from the same weights without them")
    holding = hold_folder(request.folder) if world.is_main else contextlib.nullcontext()
    with holding, progress or contextlib.nullcontext():
        _check_folder(request)  # nor has another run ended in it meanwhile
        results, tuned = run_experiment(experiment, world, progress)
    if world.is_main:
        save(tuned, request.out, source=start.source)
        if len(results) > 1:
            runs = {
                f"{arm}, seed {seed}": read_metrics(request.get_folder(seed, arm) / METRICS)
                for seed, arm in request.runs
            }
            draw_curves(runs, request.folder / CURVES)
    notes += _describe_unreadable(request) if world.is_main else ()
    if not data.is_labelled:
        notes.append("the validation images have no labels: top-1 is agreement with the original network")
    if data.split is not None and request.data.get("split") is None:
        notes.append(_describe_held_back(data, request.folder))
    notes += _describe_settled(recipe, start.fresh, results[0])
    difference = compare(results) if request.has_control else None
    return Tuned(results, difference, request.out, request.folder, notes)


def _describe_held_back(data: Data, folder: Path) -> str:
    """Say how many images of a single folder were held back, and, where they have labels, how to score them alone."""
    assert data.split is not None
    train, val = map(len, data.split)
    note = f"{val:,} of {train + val:,} images {'was' if val == 1 else 'were'} held back"
    return f"{note}; --split {folder}/split.json scores them alone" if data.is_labelled else note


def _describe_unreadable(request: Request) -> Iterator[str]:
    """Say how many images could not be read; all runs see the same ones."""
    path = request.get_folder(*request.runs[0]) / UNREADABLE
    if path.is_file():
        num = len(path.read_bytes().splitlines())
        yield f"{'1 image' if num == 1 else f'{num} images'} could not be read, and {path} names them"


def _describe_settled(recipe: Recipe, fresh: Collection[str], result: Result) -> Iterator[str]:
    """Say what the training images settled before the first step, where a user would not expect it."""
    if fresh:
        yield (
            "the classifier was replaced, and fitted to the network's features if it is one linear layer; accuracy "
            "before is with the new one"
        )
    if recipe.batch_norm == "auto" and result.history[0]["batch_norm"] == "frozen":
        yield "batch norms kept their statistics, which fit these images better than those of a batch"
    if not recipe.se_lr and result.history[0]["se_lr"] > recipe.lr:
        yield "the blocks learned at ten times the backbone's rate: the images want gates of their own"


def _check_folder(request: Request) -> None:
    """Refuse to write over another run."""
    folder = request.folder
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder} is a file; --run FOLDER says where the run's files go")
    found = sorted(path.parent for path in folder.rglob(CHECKPOINT)) if folder.is_dir() else []
    if found and not request.resume:
        raise OptionError(f"{folder} holds a run already; --resume goes on with it, --run FOLDER begins in another one")
    if found and not request.has_begun():
        names = ", ".join(map(str, found[:4])) + (", ..." if len(found) > 4 else "")
        raise OptionError(
            f"{folder} holds other runs ({names}); --resume goes on with the --compare, --seeds and seed that began "
            "them, --run FOLDER begins in another one"
        )
