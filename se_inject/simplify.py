"""Simplification: a smaller, faster network, of blocks that do what a layer's weights can do.

Takes a tuned network and validation images, gives the network without the blocks whose gates hardly depend on the image
(their mean gates folded into the layers beside them), and with smaller hidden layers in those that stay; as far as the
accuracy on these images allows, and with what each step cost and brought.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from se_inject.attention import count_block
from se_inject.block import SqueezeExcite
from se_inject.errors import OptionError
from se_inject.gate_folding import find_gate_folds
from se_inject.gates import FixedGate, get_own_blocks
from se_inject.observation import Seen, check_trained, observe
from se_inject.reduction import rank_units, reduce_block
from se_inject.restriction import fold_gates, restrict_blocks
from se_inject.rewrite import blocks, get_plan
from se_inject.scores import Scores
from se_inject.timing import compare_times
from se_inject.validation import Validation

_TOLD = 0.99
"""The part of the variance of a gate's logits that a smaller block has to tell, to be tried."""

_TIMED = 32
"""Images at once, where networks are timed."""

Action = Literal["fold", "reduce"]
Report = Callable[[str, int, int], None]
"""Is told what is going on, how many passes over the images are done, and how many there will be at most."""


@dataclass(frozen=True)
class Step:
    """A block that was folded or made smaller, and what the network was afterwards.

    Attributes:
        path: The block's.
        action: "fold": the mean gate went into a layer, the block is gone; "reduce": fewer hidden units.
        hidden: Hidden units afterwards; 0 for a block that is gone.
        top1: Accuracy of the network, in per cent.
        loss: Mean cross-entropy.
        parameters: Of the network.
        speed: Images a second in relation to the network at the start, timed in turns.
    """

    path: str
    action: Action
    hidden: int
    top1: float
    loss: float
    parameters: int
    speed: float


@dataclass(frozen=True)
class Simplified:
    """What a simplification ended with.

    Attributes:
        model: The network.
        before: Scores at the start.
        after: Scores of `model`.
        parameters: At the start.
        steps: What was done, in its order.
        kept: Blocks that stay, with the reasons.
    """

    model: nn.Module
    before: Scores
    after: Scores
    parameters: int
    steps: Sequence[Step]
    kept: Mapping[str, str]

    @property
    def num_folded(self) -> int:
        """How many blocks are gone."""
        return sum(step.action == "fold" for step in self.steps)

    def to_values(self) -> dict[str, Any]:
        """Turn into plain values."""
        return {
            "before": {"top1": self.before.top1, "loss": self.before.loss, "parameters": self.parameters},
            "after": {
                "top1": self.after.top1, "loss": self.after.loss,
                "parameters": sum(p.numel() for p in self.model.parameters()),
            },
            "num_images": self.before.num_images,
            "num_blocks": self.num_folded + len(self.kept),
            "num_folded": self.num_folded,
            "steps": [asdict(step) for step in self.steps],
            "kept": dict(self.kept),
        }  # fmt: skip


def check_max_drop(max_drop: float) -> None:
    """Refuse a limit that no simplification could keep to.

    Raises:
        OptionError: It is negative or no number.
    """
    if not max_drop >= 0:
        raise OptionError(f"max_drop is {max_drop:g}; expected points of per cent, at least 0")


def simplify(
    model: nn.Module,
    validation: Validation,
    *,
    max_drop: float = 0.1,
    rounds: int = 10,
    report: Report = lambda *_: None,
) -> Simplified:
    """Fold and shrink the blocks of a network, the most useless first, while the accuracy holds.

    Every block is tried alone with its mean gate. Then, in the order of the loss that this costs, their gates are fixed
    one after another; a block without which the accuracy would fall below the limit stays. Those that stay get as few
    hidden units as tell 99 % of the variance of their gates' logits, if the accuracy allows that too.

    Args:
        model: An injected and trained network, on the validation's device; it is left as it is.
        validation: Images with labels. What is chosen by them is a little too good on them: keep others to test.
        max_drop: How much the accuracy may fall, in points of per cent.
        rounds: How often the networks are timed.
        report: See `Report`.

    Raises:
        OptionError: `max_drop` is negative or no number.
        ModelError: The network has no blocks of ours, or they were never trained.
        DataError: The images have no labels.

    Example:
        >>> simplify(model, validation, max_drop=0.1).num_folded  # doctest: +SKIP
        9
    """
    check_max_drop(max_drop)
    found = find_gate_folds(model)
    trials = _Trials(model, validation, rounds, 2 + 2 * len(found.folds) + len(blocks(model)), report)
    start = trials.observe("the network as it is", Stage())
    check_trained(model, start.gates)
    lowest = start.scores.top1 - max_drop - 1e-9
    costs = {}
    for fold in (fold for fold in found.folds if fold.block in start.gates):
        trial = Stage({fold.block: start.gates[fold.block].mean})
        costs[fold.block] = trials.observe(f"{fold.block} with its mean gate", trial).scores.loss
    done, seen, kept, steps = Stage(), start, dict(found.kept), []
    for path in sorted(costs, key=costs.__getitem__):
        trial = replace(done, fixed={**done.fixed, path: seen.gates[path].mean})
        result = trials.observe(f"{path} folded", trial)
        if result.scores.top1 < lowest:
            kept[path] = f"with its mean gate top-1 would be {result.scores.top1:.2f} %"
            continue
        done, seen = trial, result
        steps.append(trials.describe(path, "fold", 0, done, seen))
    own = get_own_blocks(model)
    for path in list(seen.gates):
        block = own[path]
        ranking = rank_units(block, seen.moments[path])
        num = ranking.count_needed(_TOLD)
        if num >= block.fc1.out_channels:
            continue
        smaller = reduce_block(block, seen.moments[path], ranking.order[:num])
        trial = replace(done, smaller={**done.smaller, path: smaller})
        result = trials.observe(f"{path} with {num} hidden units", trial)
        if result.scores.top1 >= lowest:
            done, seen = trial, result
            steps.append(trials.describe(path, "reduce", num, done, seen))
    made = done.build(model)
    after = trials.finish(made)
    parameters = sum(p.numel() for p in model.parameters())
    reasons = {path: kept.get(path, "it does not run on these images") for path in blocks(made)}
    return Simplified(made, start.scores, after, parameters, steps, reasons)


@dataclass(frozen=True)
class Stage:
    """How far a network is simplified.

    Attributes:
        fixed: Gates (C,) that are the same for every image, by the paths of their blocks.
        smaller: Blocks with fewer hidden units.
    """

    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    smaller: Mapping[str, SqueezeExcite] = field(default_factory=dict)

    def build(self, model: nn.Module) -> nn.Module:
        """Build the network in which all of this is done; the given one is left as it is."""
        made = fold_gates(model, self.fixed)
        if not self.smaller:
            return made
        plan = get_plan(made)
        sizes = {site.path: site.hidden for site in plan.sites}
        sizes |= {path: block.fc1.out_channels for path, block in self.smaller.items()}
        # With a divisor of 1 any size has a ratio of its own.
        plan = replace(plan, divisor=1)
        sites = [replace(site, r=site.channels / sizes[site.path]) for site in plan.sites]
        return restrict_blocks(
            made, replace(plan, sites=tuple(count_block(s, plan, None) for s in sites)), self.smaller
        )


class _Trials:
    """Passes over the images, with part of a network simplified for the time."""

    def __init__(self, model: nn.Module, validation: Validation, rounds: int, most: int, report: Report) -> None:
        self._model, self._validation, self._rounds, self._report = model, validation, rounds, report
        self._own = get_own_blocks(model)
        self._done, self._most = 0, most

    def observe(self, what: str, stage: Stage) -> Seen:
        """Run the network once over the images as it is at a stage."""
        self._report(what, self._done, self._most)
        self._done += 1
        fixed = {path: FixedGate(self._own[path], gate) for path, gate in stage.fixed.items()}
        return observe(self._model, self._validation, {**fixed, **stage.smaller})

    def describe(self, path: str, action: Action, hidden: int, stage: Stage, seen: Seen) -> Step:
        """Describe the stage that a step leads to: build its network, timed in turns with the one at the start."""
        made = stage.build(self._model)
        images, _ = next(iter(self._validation.loader))
        times = compare_times({"start": self._model, "made": made}, images[:_TIMED], rounds=self._rounds)
        parameters = sum(p.numel() for p in made.parameters())
        speed = times["start"] / times["made"]
        return Step(path, action, hidden, seen.scores.top1, seen.scores.loss, parameters, speed)

    def finish(self, made: nn.Module) -> Scores:
        """Score the network that was made."""
        self._report("the simplified network", self._done, self._done + 1)
        scores = self._validation.score(made)
        self._report("done", self._done + 1, self._done + 1)
        return scores
