"""The report: all that is to be said of an injected network and its gates, as plain numbers.

Takes a network and validation images, gives a `Report`; `report_page` makes a page of it. One pass collects the gates,
one a block measures what is lost without its variation, and one finds the images that stand out.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from se_inject.comparison import Result
from se_inject.ejection import eject
from se_inject.errors import OptionError
from se_inject.gate_folding import find_gate_folds
from se_inject.gates import fix_gates, get_own_blocks
from se_inject.observation import Seen, check_trained, observe
from se_inject.plan import Site
from se_inject.report_blocks import Ablation, BlockFacts, describe_blocks, measure_ablation, sort_by_cost
from se_inject.report_classes import ClassFacts, Panel, choose_classes, find_classes, make_panels
from se_inject.report_images import Farthest, Picture, read_pictures
from se_inject.report_network import Control, compare_arms, measure_costs
from se_inject.rewrite import get_plan
from se_inject.scores import Scores
from se_inject.speed import Measured
from se_inject.timing import Conditions
from se_inject.validation import Validation

Tell = Callable[[str, int, int], None]
"""Is told what is going on, how many passes over the images are done, and how many there will be."""


@dataclass(frozen=True)
class Wishes:
    """What a report is to show, and beside what.

    Attributes:
        classes: Names of classes, with commas between them; the most and least confused ones if empty.
        block: The path of the block whose images are shown; the one whose fixed gates cost the most accuracy if empty.
        results: Of a comparison.
        folder: Where they come from.
        conditions: How the network is timed.
        name: Of the network, for people.
        command: What does what the report advises.
    """

    classes: str = ""
    block: str = ""
    results: Sequence[Result] = ()
    folder: Path = Path()
    conditions: Conditions = field(default_factory=lambda: Conditions(rounds=10, compiled=False))
    name: str = ""
    command: str = ""


@dataclass(frozen=True)
class Report:
    """All that is said of a network.

    Attributes:
        name: Of the network.
        model: Of its class.
        origin: Where the images come from.
        unreadable: Paths of images that could not be read.
        scores: Of the network.
        plain: Of its present weights without the gates.
        costs: What was counted and timed, or why it was not.
        control: What a comparison came to, if there was one.
        classes: Those that are shown, the most confused first.
        panels: Their gates, a stage each.
        blocks: In the order in which they run.
        block: Whose images are shown.
        pictures: The images whose gates of this block differ most from the mean, the most different first; None of a
            stream, which cannot be read again.
        command: What does what the report advises.
    """

    name: str
    model: str
    origin: str
    unreadable: Sequence[str]
    scores: Scores
    plain: Scores
    costs: Measured | str
    control: Control | None
    classes: Sequence[ClassFacts]
    panels: Sequence[Panel]
    blocks: Sequence[BlockFacts]
    block: str
    pictures: Sequence[Picture] | None
    command: str

    def list_by_cost(self) -> list[BlockFacts]:
        """List the blocks, the one first whose fixed gates cost the most."""
        return sort_by_cost(self.blocks)

    def count_actions(self) -> dict[str, int]:
        """Count the blocks that are to be kept, folded and removed."""
        actions = [each.action for each in self.blocks]
        return {action: actions.count(action) for action in ("keep", "fold", "remove")}

    def to_values(self) -> dict[str, Any]:
        """Turn into plain values; the images by their names."""
        pictures = None if self.pictures is None else [asdict(replace(each, thumbnail=b"")) for each in self.pictures]
        for each in pictures or ():
            del each["thumbnail"]
        return {
            "name": self.name,
            "model": self.model,
            "data": self.origin,
            "unreadable": list(self.unreadable),
            "scores": _describe(self.scores),
            "without_blocks": _describe(self.plain),
            "per_class": self.scores.list_per_class(),
            "costs": self.costs if isinstance(self.costs, str) else self.costs.to_values(),
            "control": None if self.control is None else asdict(self.control),
            "classes": [asdict(each) for each in self.classes],
            "panels": [asdict(panel) for panel in self.panels],
            "blocks": [asdict(each) for each in self.list_by_cost()],
            "images": {"block": self.block, "farthest": pictures},
            "command": self.command,
        }


def _describe(scores: Scores) -> dict[str, float]:
    return {"top1": scores.top1, "top5": scores.top5, "loss": scores.loss, "num_images": scores.num_images}


def make_report(
    model: nn.Module, validation: Validation, wishes: Wishes | None = None, *, tell: Tell = lambda *_: None
) -> Report:
    """Find out all that the report says.

    Args:
        model: An injected and trained network, on the validation's device; it is left as it is.
        validation: Images with labels.
        wishes: What is to be shown.
        tell: See `Tell`.

    Raises:
        ModelError: The network has no blocks of ours, or they were never trained.
        DataError: A class does not exist or has no images, or images cannot be read.
        OptionError: There is no such block.

    Example:
        >>> make_report(model, validation).count_actions()  # doctest: +SKIP
        {'keep': 16, 'fold': 9, 'remove': 2}
    """
    wishes = wishes or Wishes()
    own = get_own_blocks(model)
    _check_block(wishes.block, own)
    names = validation.data.classes or tuple(map(str, range(validation.num_classes)))
    asked = find_classes(wishes.classes, names) if wishes.classes else []
    num_passes = len(own) + 3

    def begin(what: str, number: int) -> None:
        tell(what, number, num_passes)

    begin("collecting gates", 0)
    seen = observe(model, validation)
    check_trained(model, seen.gates)
    _check_block(wishes.block, seen.gates)  # of blocks that the network has, but does not run
    classes = choose_classes(seen.scores, names, asked)
    sites: dict[str, Site] = {site.path: site for site in get_plan(model).sites}
    ablations = _measure_ablations(model, validation, seen, begin)
    blocks = describe_blocks(
        seen.gates, ablations, blocks=own, sites=sites, folds=find_gate_folds(model), num_images=seen.scores.num_images
    )
    begin("without blocks", num_passes - 2)
    plain = validation.score(eject(model))
    chosen = wishes.block or sort_by_cost(blocks)[0].path
    begin(f"images that stand out in {chosen}", num_passes - 1)
    pictures = _find_pictures(model, validation, seen, chosen, names)
    begin("measuring the network", num_passes)
    return Report(
        wishes.name or type(model).__name__, type(model).__name__, validation.data.origin,
        validation.list_unreadable(), seen.scores, plain, measure_costs(model, wishes.conditions),
        compare_arms(wishes.results, wishes.folder), classes, make_panels(seen.gates, sites, classes), blocks, chosen,
        pictures, wishes.command,
    )  # fmt: skip


def _check_block(path: str, known: Mapping[str, object]) -> None:
    if path and path not in known:
        close = difflib.get_close_matches(path, known, n=3) or list(known)[:3]
        raise OptionError(f"{path} is no block of the network; it has {len(known)}, such as {', '.join(close)}")


def _measure_ablations(
    model: nn.Module, validation: Validation, seen: Seen, begin: Callable[[str, int], None]
) -> dict[str, Ablation]:
    """Run the network once a block, with the block's gates fixed to their means."""
    found = {}
    for number, (path, gates) in enumerate(seen.gates.items(), 1):
        begin(f"{path} with its mean gate", number)
        with fix_gates(model, {path: gates.mean}):
            found[path] = measure_ablation(seen.scores, validation.score(model))
    return found


def _find_pictures(
    model: nn.Module, validation: Validation, seen: Seen, path: str, names: Sequence[str]
) -> list[Picture] | None:
    """Find the images whose gates differ most from the mean, and read them again; None of a stream."""
    if validation.loader.is_stream:
        return None
    farthest = Farthest(path, seen.gates[path].mean)
    observe(model, validation, on_batch=farthest.add)
    return read_pictures(farthest.list_farthest(), validation, names, seen.scores.hits)
