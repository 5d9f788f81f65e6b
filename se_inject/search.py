"""Search: which sites are worth their blocks, before a network is fine-tuned.

Takes an injected network whose blocks are new, training images and a budget of parameters or time, gives a plan of the
sites that bring most. The gradient of the loss with respect to the gates chooses those that are tried; a short
fine-tune of the gates alone, and what taking each block out of it again costs, chooses among these.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, Subset

from se_inject.budget import UNITS, Budget, Resource, spend
from se_inject.calibration import calibrate
from se_inject.contents import count_images
from se_inject.datasets import Data
from se_inject.ejection import eject
from se_inject.errors import DataError, ModelError, OptionError, TrainingError
from se_inject.gates import fix_gates, get_own_blocks, is_fresh
from se_inject.groups import freeze_backbone
from se_inject.jobs import InterruptedTrainingError, Job
from se_inject.loaders import EvalLoader, TrainLoader
from se_inject.plan import Plan
from se_inject.recipe import Recipe
from se_inject.restriction import restrict_blocks
from se_inject.rewrite import copy_model, get_plan
from se_inject.runlog import RunLog
from se_inject.start import Start
from se_inject.tasks import autocast
from se_inject.timing import compare_times, time_blocks
from se_inject.training import train
from se_inject.twin import set_training
from se_inject.validation import CACHE, Validation
from se_inject.world import World

Report = Callable[[str, int, int], None]
"""Is told what is going on, how much of it is done, and how much there is."""
_NUM_BATCHES = 16
"""Batches over which the gradient is taken."""
_ROOM = 2.0
"""How much more than the budget the sites that are tried may cost together."""
_JUDGING = 5
"""Every fifth training image judges; the gates learn from the others."""
_MOST_JUDGING = 5000


@dataclass(frozen=True)
class Candidate:
    """A site, and what is known of it.

    Attributes:
        path: Of the block.
        cost: Parameters, or milliseconds for a batch.
        gradient: What a step along the gradient of the gates would bring to first order, by two halves of the batches;
            negative where these do not agree.
        gain: By how much the cross-entropy of other images rises when the block is taken out of the network whose gates
            were tuned; None if it was not tried.
        is_chosen: Whether it is in the plan.
    """

    path: str
    cost: float
    gradient: float
    gain: float | None
    is_chosen: bool


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        plan: With the sites that were chosen.
        candidates: All sites, the best first.
        resource: What is spent.
        limit: How much could be.
        base: What the network without blocks has.
        batch_size: Images of a batch, to which milliseconds belong.
        note: What the user should know of the choice.
    """

    plan: Plan
    candidates: Sequence[Candidate]
    resource: Resource
    limit: float
    base: float
    batch_size: int
    note: str = ""

    @property
    def spent(self) -> float:
        """What the chosen blocks cost."""
        return sum(candidate.cost for candidate in self.candidates if candidate.is_chosen)

    def to_values(self) -> dict[str, Any]:
        """Turn into plain values."""
        return {
            "resource": self.resource,
            "limit": self.limit,
            "spent": self.spent,
            "base": self.base,
            "batch_size": self.batch_size,
            "note": self.note,
            "sites": [asdict(candidate) for candidate in self.candidates],
        }


def search(
    start: Start,
    data: Data,
    recipe: Recipe,
    world: World,
    budget: Budget,
    *,
    num_steps: int = 200,
    max_bad: int = 0,
    report: Report = lambda *_: None,
) -> Found:
    """Search for the sites whose blocks bring most for a budget.

    Args:
        start: The network, with new blocks at all sites that come into question; it is left as it is.
        data: The training images; a fifth of them (at most 5,000) judges what the gates learn from the others.
        recipe: How the gates are tuned, but for its length.
        world: Of one process.
        budget: What the blocks may cost.
        num_steps: Of the fine-tune of the gates.
        max_bad: How many unreadable images are skipped, of those that teach and of those that judge.
        report: See `Report`.

    Raises:
        ModelError: The blocks are trained, or are none of ours.
        OptionError: The budget buys no block, or `num_steps` is below 1.
        DataError: There are too few images to tell the blocks apart, they come as a stream, or more than `max_bad`
            cannot be read.
        TrainingError: It was stopped.
    """
    if num_steps < 1:
        raise OptionError(f"--steps is {num_steps}; it must be at least 1")
    plan = get_plan(start.model)
    get_own_blocks(start.model)  # refuses those of others, before any work
    if not is_fresh(start.model):
        raise ModelError(f"the blocks of {plan.model} were trained already; search in the network without them")
    model = copy_model(start.model).to(world.device)
    learning, judging = _split(data)
    own = replace(data, train=learning, val=judging)
    recipe = replace(recipe, train="gates", gates_share=1.0, distill=0.0)
    loader = TrainLoader(own, start.form, recipe, world, max_bad=max_bad, num_classes=start.num_classes)
    images, _ = next(iter(loader.iterate(0, 0)))
    costs, base = _measure_costs(model, plan, budget, images)
    limit = base * budget.amount / 100 if budget.is_share else budget.amount
    _check_limit(limit, costs, budget)
    compute = partial(autocast, recipe, world)
    recipe, _ = calibrate(model, loader, recipe, world, fresh=start.fresh, compute=compute)
    gradients = measure_gradients(model, loader, compute, recipe.label_temperature, report)
    if not any(gradients.values()):
        raise ModelError(
            f"no gate changes what {plan.model} gives: its branches are zero, as in a network that was not trained; "
            f"search in the trained one"
        )
    tried = spend(gradients, costs, _ROOM * limit)
    model = restrict_blocks(model, plan.leave_out({path: "" for path in costs if path not in tried}))
    val = EvalLoader(
        judging, start.form, batch_size=recipe.batch_size, workers=recipe.workers, world=world, max_bad=max_bad,
        num_classes=start.num_classes, cache=CACHE,
    )  # fmt: skip
    report(f"tuning the gates of {len(tried)} blocks, {num_steps} steps", 0, 1)
    recipe = replace(recipe, epochs=num_steps / loader.num_steps)
    job = Job(model, loader, val, recipe, world, start.num_classes, fresh=start.fresh)
    with tempfile.TemporaryDirectory() as folder, RunLog(None, "") as log:
        try:
            tuned = train(job, Path(folder), log, lambda *_: None).model
        except InterruptedTrainingError as error:
            raise TrainingError("the search was stopped, and wrote nothing") from error
    # At the temperature that was trained with: else a network that is surer than it is right is told to be unsure.
    validation = Validation(own, val, world, start.num_classes, recipe.label_temperature)
    gains = measure_gains(tuned, validation, report)
    useful = {path: gain for path, gain in gains.items() if gain > 0}
    note = ""
    if not useful:
        useful = {path: gradients[path] for path in gains if gradients[path] > 0}
        found = f"none of {len(gains)} blocks lowered the loss of other images in {num_steps} steps"
        if not useful:
            raise DataError(f"{found}, nor do their gradients say anything; more --steps or images may tell more")
        note = f"{found}: these are chosen by their gradients alone; more --steps or images may tell more"
    chosen = spend(useful, costs, limit)
    candidates = [Candidate(path, costs[path], gradients[path], gains.get(path), path in chosen) for path in gradients]
    candidates.sort(key=lambda c: (not c.is_chosen, -(-math.inf if c.gain is None else c.gain / c.cost), -c.gradient))
    reasons = {each.path: _explain(each.gain) for each in candidates if not each.is_chosen}
    return Found(plan.leave_out(reasons), candidates, budget.resource, limit, base, len(images), note)


def measure_gradients(
    model: nn.Module, loader: TrainLoader, compute: Callable[[], Any], temperature: float, report: Report
) -> dict[str, float]:
    """Measure what each block's gate could bring, by the gradient of the loss on a few batches.

    A new block's gate depends on its second layer alone. The squared norm of the gradient there, which is what a step
    along it brings to first order, is estimated by the inner product of the gradients of two halves of the batches:
    what is noise in each does not count.

    Args:
        model: An injected network with new blocks; all but these is frozen.
        loader: Gives the batches.
        compute: Makes the context in which the network runs.
        temperature: Outputs are divided by it.
        report: See `Report`.

    Returns:
        By the paths of the blocks.
    """
    own = get_own_blocks(freeze_backbone(model))
    layers = {path: list(block.fc2.parameters()) for path, block in own.items()}
    halves: list[dict[str, list[Tensor]]] = [{}, {}]
    num = min(_NUM_BATCHES, loader.num_steps)
    with set_training(model, False):
        for i, (images, labels) in enumerate(itertools.islice(loader.iterate(0, 0), num)):
            report("the gradient of the gates", i, num)
            with compute():
                outputs = model(images)
            loss = F.cross_entropy(outputs.float() / temperature, labels)
            found = torch.autograd.grad(loss, [p for params in layers.values() for p in params])
            gradients = iter(found)
            for path, params in layers.items():
                each = [next(gradients).double() for _ in params]
                known = halves[i % 2].get(path)
                halves[i % 2][path] = each if known is None else [a + b for a, b in zip(known, each, strict=True)]
    first, second = halves[0], halves[1] or halves[0]
    scale = math.ceil(num / 2) * max(1, num // 2)
    return {
        path: float(sum((a * b).sum() for a, b in zip(first[path], second[path], strict=True))) / scale for path in own
    }


def measure_gains(model: nn.Module, validation: Validation, report: Report) -> dict[str, float]:
    """Measure by how much the loss rises when each block is taken out alone: its gate is 1 then."""
    own = get_own_blocks(model)
    whole = validation.score(model).loss
    gains = {}
    for i, (path, block) in enumerate(own.items()):
        report(f"the network without {path}", i, len(own))
        with fix_gates(model, {path: torch.ones(block.channels)}):
            gains[path] = validation.score(model).loss - whole
    return gains


def _split(data: Data) -> tuple[Dataset[Any], Dataset[Any]]:
    images = data.train
    assert images is not None
    if isinstance(images, IterableDataset):
        raise DataError(f"{data.origin} comes as a stream, of which no part can be kept to judge by; give a folder")
    num = count_images(images)
    step = max(_JUDGING, math.ceil(num / _MOST_JUDGING))
    order = torch.randperm(num, generator=torch.Generator().manual_seed(0)).tolist()
    if not order[::step] or len(order) == len(order[::step]):
        raise DataError(
            f"{data.origin} has {num} training images; a search needs some to learn from and some to judge by"
        )
    judging = set(order[::step])
    return Subset(images, [i for i in range(num) if i not in judging]), Subset(images, sorted(judging))


def _measure_costs(model: nn.Module, plan: Plan, budget: Budget, images: Tensor) -> tuple[dict[str, float], float]:
    """Measure what each block costs, and what the network without blocks has of it: parameters or milliseconds."""
    plain = eject(model)
    if budget.resource == "parameters":
        costs = {site.path: float(site.num_parameters) for site in plan.sites}
        return costs, float(sum(p.numel() for p in plain.parameters()))
    return time_blocks(model, get_own_blocks(model), images), 1000 * compare_times({"": plain}, images, rounds=20)[""]


def _check_limit(limit: float, costs: Mapping[str, float], budget: Budget) -> None:
    cheapest = min(costs, key=costs.__getitem__)
    if costs[cheapest] > limit:
        raise OptionError(
            f"--budget is {limit:,.4g} {UNITS[budget.resource]}, and the cheapest block, {cheapest}, takes "
            f"{costs[cheapest]:,.4g}"
        )


def _explain(gain: float | None) -> str:
    """Say why a site is not in the plan."""
    if gain is None:
        return "left out by the search: its gradient is small for its cost"
    if gain <= 0:
        return "left out by the search: without it the loss does not rise"
    return f"left out by the search: without it the loss rises by {gain:.2g}, which is little for its cost"
