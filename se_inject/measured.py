"""Measured: what the folder of a fine-tune says of a network, for its model card.

Takes the folder that `finetune` wrote and the network's tensors, gives the recipe and the scores; but only if the run
ended with just these tensors, so that no figure is said of a network that it was not measured on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from se_inject.checkpoints import CHECKPOINT
from se_inject.comparison import CONTROL, SE, Result, compare
from se_inject.errors import ArtifactError
from se_inject.experiment import RECIPE, RESULT
from se_inject.files import read_values
from se_inject.recipe import Recipe
from se_inject.recipe_files import list_recipes, read_recipe
from se_inject.recipe_values import make_recipe


@dataclass(frozen=True)
class Measured:
    """What a fine-tune measured of a network.

    Attributes:
        recipe: As it was asked for.
        scores: Of the validation after the step at which the network was taken: epoch, top1, top5, val_loss, in per
            cent.
        before: Top-1 before the first step, in per cent.
        num_images: How many images were scored; 0 where that is not known.
        has_labels: Whether the scores are of labels; without any, they are of the original network's classes.
        verdict: The comparison with the control, in one sentence; empty without one.
    """

    recipe: Recipe
    scores: Mapping[str, Any]
    before: float
    num_images: int
    has_labels: bool = True
    verdict: str = ""

    @property
    def recipe_name(self) -> str:
        """The name of the recipe among ours; empty if it is none of them."""
        return next((name for name in list_recipes() if read_recipe(name) == self.recipe), "")


def read_run(folder: Path, state: Mapping[str, Tensor]) -> Measured:
    """Read what a run measured of the network that has these tensors.

    Raises:
        ArtifactError: The folder is of no finished fine-tune, or of another network.
    """
    try:
        files = sorted([*folder.glob(RESULT), *folder.glob(f"*/{RESULT}")])
        results = [(path.parent, _read_result(path)) for path in files]
        recipe = make_recipe(json.loads((folder / RECIPE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ArtifactError(f"{folder} cannot be read as the folder of a fine-tune: {reason}") from error
    if not results:
        raise ArtifactError(f"{folder} is no folder of a finished fine-tune: it has no {RESULT}")
    for path, result in results:
        for name in ("last", "best") if result.arm == SE else ():
            if _is_same(path / f"{name}.pt", state):
                scores = result.history[-1] if name == "last" else _find_best(result.history)
                verdict = _compare([each for _, each in results]) if name == "last" else ""
                num = len(result.hits) - result.hits.count("2")
                return Measured(recipe, scores, result.before, num, _has_labels(path, recipe), verdict)
    raise ArtifactError(
        f"{folder} is the run of another network: it ended with other weights, so its figures are not this one's"
    )


def _read_result(path: Path) -> Result:
    values = json.loads(path.read_text(encoding="utf-8"))
    result = Result(**{field.name: values[field.name] for field in fields(Result)})
    for scores in (result.history[0], result.history[-1]):
        for key in ("epoch", "top1", "top5"):
            float(scores[key])
    return result


def _find_best(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Find the validation after which the best network was written: the first with the highest top-1 after a step."""
    return max((scores for scores in history if scores["step"]), key=lambda scores: float(scores["top1"]))


def _is_same(path: Path, state: Mapping[str, Tensor]) -> bool:
    if not path.is_file():
        return False
    found = read_values(path).get("state_dict", {})
    return found.keys() == state.keys() and all(torch.equal(found[key], value) for key, value in state.items())


def _has_labels(folder: Path, recipe: Recipe) -> bool:
    """Tell whether a run had labels, which only one that learns from the original alone may do without."""
    if recipe.distill < 1:
        return True
    data = read_values(folder / CHECKPOINT)["settings"]["data"]
    return bool(data["num_classes"])


def _compare(results: Sequence[Result]) -> str:
    seeds = [{result.seed for result in results if result.arm == arm} for arm in (SE, CONTROL)]
    return str(compare(results)) if seeds[0] == seeds[1] else ""
