"""Confirmation: whether a network takes the same course where its batch norms are folded.

Takes a network over fake tensors and the `Course` of a run, gives the course with those of its folds after which the
same functions run on the same values: code may ask a layer for its class. Leaves the network as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from se_inject.course import Course, Step, Watch, given_biases
from se_inject.folding import Fold, become, make_rest, restore

_MOST_TRIES = 20
"""Runs after which no norm is folded where code goes by the norms."""


def confirm_folds(model: nn.Module, run: Callable[[], object], course: Course) -> Course:
    """Drop the folds after which the network would take another course, as code does that asks a layer for its class.

    Args:
        model: The network that was followed.
        run: Runs it once more, as it was run then, over fake tensors: numbers would be others.
        course: What was seen, with steps.
    """
    folds, steps = list(course.folds), list(course.steps)
    for attempt in range(_MOST_TRIES):
        norms = {fold.norm for fold in folds}
        with _left_out(model, folds):
            found = _list_steps(model, run)
        if found == [step for step in steps if step.norm not in norms]:
            return replace(course, folds=tuple(folds))
        if attempt == 0:
            steps = _list_steps(model, run)  # what code keeps from its first run it does not make again
        else:
            last = _find_last_norm(steps, found, norms)
            folds = [fold for fold in folds if fold.norm != last and last is not None]
    return replace(course, folds=())


def _list_steps(model: nn.Module, run: Callable[[], object]) -> list[Step]:
    """List what runs; up to where it raises, as code may do with a layer that is another one."""
    watch = Watch(model)
    with contextlib.suppress(Exception), given_biases(model), torch.no_grad(), watch.noted_calls(), watch:
        watch.note_step("", None, tree_leaves(run()), None)
    return watch.steps


def _find_last_norm(steps: Sequence[Step], found: Sequence[Step], norms: Collection[str]) -> str | None:
    """Find the norm that ran before the first step that is another one when these norms are left out."""
    last, left = None, iter(found)
    for step in steps:
        if step.norm in norms:
            last = step.norm
        elif step != next(left, None):
            break
    return last


@contextlib.contextmanager
def _left_out(model: nn.Module, folds: Iterable[Fold]) -> Iterator[None]:
    """Let batch norms do no more than what they do beside, for as long as the context lasts."""
    norms = [model.get_submodule(fold.norm) for fold in folds]
    originals = [(norm, type(norm), dict(vars(norm))) for norm in norms]
    try:
        for norm in norms:
            become(norm, make_rest(norm))
        yield
    finally:
        for norm, kind, attributes in originals:
            restore(norm, kind, attributes)
