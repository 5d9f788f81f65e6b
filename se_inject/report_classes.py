"""Report, the classes: which are shown, and the mean gates of theirs by channel, as in the paper's figure.

Takes scores and the gates by class, gives `ClassFacts` and a `Panel` a stage. Runs nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from se_inject.errors import DataError, OptionError
from se_inject.gate_statistics import BlockGates
from se_inject.plan import Site
from se_inject.scores import Scores

MOST_CLASSES = 5
NUM_CHANNELS = 64
"""Of a block that are shown, evenly spaced."""
NUM_BLOCKS = 4
"""Of a stage that are shown, evenly chosen."""
_NUM_EACH = 2
"""Classes that are chosen from either end."""


@dataclass(frozen=True)
class ClassFacts:
    """How well a class is told from the others.

    Attributes:
        name: Its name.
        index: Its number.
        num_images: Of it.
        top1: In per cent.
        taken_for: The other class that is answered most often, and for how many of the images; None if no other is.
    """

    name: str
    index: int
    num_images: int
    top1: float
    taken_for: tuple[str, int] | None


@dataclass(frozen=True)
class Profile:
    """The gates of a block by channel.

    Attributes:
        path: The block's.
        channels: The shown ones.
        means: A row a line of the chart, of which the first is of all images and the others of a class each.
        deviations: Standard deviations over the images of each row; None where there is one image alone.
    """

    path: str
    channels: tuple[int, ...]
    means: tuple[tuple[float, ...], ...]
    deviations: tuple[tuple[float, ...] | None, ...]


@dataclass(frozen=True)
class Panel:
    """The blocks of a stage, from first to last.

    Attributes:
        stage: The maps are 2^stage times smaller than the input.
        profiles: Of the shown blocks.
        left_out: Paths of the others.
    """

    stage: int
    profiles: tuple[Profile, ...]
    left_out: tuple[str, ...]


def find_classes(given: str, known: Sequence[str]) -> list[int]:
    """Find the classes that are named, with commas between them; a name may have some itself.

    Raises:
        DataError: There are no such classes; the message names all of them, with the closest ones.
        OptionError: There are more than can be shown.

    Example:
        >>> find_classes("tench, Tinca tinca,cat", ["cat", "tench, Tinca tinca"])
        [1, 0]
    """
    places = {name: i for i, name in enumerate(known)}
    parts = given.split(",")
    found, unknown, first = [], [], 0
    while first < len(parts):
        ends = [end for end in range(len(parts), first, -1) if ",".join(parts[first:end]).strip() in places]
        end = ends[0] if ends else first + 1
        name = ",".join(parts[first:end]).strip()
        first = end
        if name in places:
            found.append(places[name])
        elif name:
            unknown.append(name)
    if unknown:
        raise DataError(f"no such class: {'; '.join(_suggest(name, known) for name in unknown)}; {_list(known)}")
    chosen = list(dict.fromkeys(found))
    if not chosen:
        raise OptionError(f"--classes names no class; {_list(known)}")
    if len(chosen) > MOST_CLASSES:
        raise OptionError(f"--classes names {len(chosen)} classes; at most {MOST_CLASSES} can be told apart in a chart")
    return chosen


def _suggest(name: str, known: Sequence[str]) -> str:
    lower = {each.lower(): each for each in known}
    close = [lower[each] for each in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
    return f"{name!r} (like {', '.join(close)})" if close else repr(name)


def _list(known: Sequence[str]) -> str:
    return f"there are {len(known)}: {', '.join(known[:10])}{', ...' if len(known) > 10 else ''}"


def choose_classes(scores: Scores, names: Sequence[str], asked: Sequence[int] = ()) -> list[ClassFacts]:
    """Choose the classes to be shown: those that are asked for, or the most and the least confused ones.

    Args:
        scores: Of the network.
        names: Of the classes.
        asked: Their numbers.

    Returns:
        The classes, the most confused first.

    Raises:
        DataError: A class that is asked for has no images.
    """
    counts, right = scores.confusion.sum(1).tolist(), scores.confusion.diagonal().tolist()
    if empty := [names[i] for i in asked if not counts[i]]:
        raise DataError(f"there is no image of {', '.join(empty)}; choose other classes")
    present = [i for i, num in enumerate(counts) if num]
    order = sorted(asked or present, key=lambda i: (right[i] / counts[i], i))
    if not asked and len(order) > MOST_CLASSES:
        order = [*order[:_NUM_EACH], *order[-_NUM_EACH:]]
    return [
        ClassFacts(names[i], i, counts[i], 100 * right[i] / counts[i], _find_mistake(scores.confusion[i], i, names))
        for i in order
    ]


def _find_mistake(answers: Tensor, index: int, names: Sequence[str]) -> tuple[str, int] | None:
    wrong = answers.clone()
    wrong[index] = 0
    most = int(wrong.argmax())
    return (names[most], int(wrong[most])) if wrong[most] else None


def make_panels(
    gates: Mapping[str, BlockGates], sites: Mapping[str, Site], classes: Sequence[ClassFacts]
) -> list[Panel]:
    """Make the figure of the paper (Hu et al., arXiv 1709.01507, section 7.2): the mean gates of classes by channel.

    Args:
        gates: By block, in the order in which they run.
        sites: The blocks' places.
        classes: Whose gates are shown, beside those of all images.
    """
    by_stage: dict[int, list[str]] = {}
    for path in gates:
        by_stage.setdefault(sites[path].stage, []).append(path)
    panels = []
    for stage, paths in sorted(by_stage.items()):
        shown = [paths[i] for i in choose_evenly(len(paths), NUM_BLOCKS)]
        profiles = tuple(_make_profile(path, gates[path], classes) for path in shown)
        panels.append(Panel(stage, profiles, tuple(path for path in paths if path not in shown)))
    return panels


def _make_profile(path: str, gates: BlockGates, classes: Sequence[ClassFacts]) -> Profile:
    channels = choose_evenly(len(gates.mean), NUM_CHANNELS)
    means = [gates.mean, *(gates.means[each.index] for each in classes)]
    variances = [gates.variance, *(gates.variances[each.index] for each in classes)]
    counts = [2, *(each.num_images for each in classes)]
    return Profile(
        path,
        tuple(channels),
        tuple(tuple(row[channels].tolist()) for row in means),
        tuple(
            tuple(row[channels].sqrt().tolist()) if num > 1 else None
            for row, num in zip(variances, counts, strict=True)
        ),
    )


def choose_evenly(num: int, most: int) -> list[int]:
    """Choose at most so many of the numbers below `num`, evenly, with the first and the last.

    Example:
        >>> choose_evenly(9, 4)
        [0, 3, 5, 8]
    """
    if num <= most:
        return list(range(num))
    return [round(i * (num - 1) / (most - 1)) for i in range(most)]
