"""Console: tables and lines for a person, JSON for a program. Data go to stdout, talk to stderr.

Takes what the stages found, and prints it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import Progress

    from se_inject.finetune import Tuned
    from se_inject.images import Prediction
    from se_inject.scores import Scores
    from se_inject.search import Found
    from se_inject.simplify import Simplified

_WIDTH_OF_PIPES = 140
_NUM_CLASSES = 20
"""Classes that are shown to a person."""
# A pipe has no width of its own; rich would take 80 columns, in which long paths do not fit.
_is_terminal = sys.stdout is not None and sys.stdout.isatty()  # it is None where it was closed
_width = None if _is_terminal or "COLUMNS" in os.environ else _WIDTH_OF_PIPES
stdout = Console(highlight=False, emoji=False, width=_width)
stderr = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def get_rank() -> int:
    """Return the number of this process among those that torchrun or SLURM started together; 0 if it is alone."""
    for size, rank in (("WORLD_SIZE", "RANK"), ("SLURM_NTASKS", "SLURM_PROCID")):
        if os.environ.get(size, "1") != "1":
            return int(os.environ.get(rank, "0"))
    return 0


def talk(line: str) -> None:
    """Tell the user something that is not data; of many processes the first one does."""
    if not get_rank():
        stderr.print(escape(line))


def fail(message: str) -> None:
    """Tell the user why the program ends; processes other than the first one give their number."""
    where = f" in process {rank}" if (rank := get_rank()) else ""
    stderr.print(f"[bold red]error{where}:[/] {escape(message)}")


def print_json(values: object) -> None:
    """Print plain values as JSON on stdout; what is no finite number, which JSON has no word for, is null."""
    from torch.utils._pytree import tree_map

    finite = tree_map(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x, values)
    stdout.out(json.dumps(finite, indent=1))


def print_predictions(predictions: Mapping[str, Sequence[Prediction]]) -> None:
    """Print the classes of each image as a table."""
    for path, classes in predictions.items():
        table = Table(box=box.SIMPLE_HEAD, title=escape(path), title_justify="left")
        table.add_column("class", justify="right")
        table.add_column("name")
        table.add_column("probability", justify="right")
        for item in classes:
            table.add_row(str(item.index), escape(item.name), f"{item.probability:.4f}")
        stdout.print(table)


def make_progress() -> Progress:
    """Make the progress display, on stderr."""
    from se_inject.runlog import make_progress

    return make_progress(stderr)


@contextmanager
def show_passes(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show how many passes over the images are done; gives a function that is told."""
    with make_progress() as progress:
        bar = progress.add_task(title, total=None, note="")

        def report(what: str, done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total, note=what)

        yield report


def print_search(found: Found, out: Path) -> None:
    """Print what a search found: each site with what it costs and brings, and what was spent."""
    unit = {"parameters": "parameters", "latency": f"ms for {found.batch_size} images"}[found.resource]
    form = "{:,.0f}" if found.resource == "parameters" else "{:.3f}"
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("block", unit, "gradient", "loss without it", ""):
        table.add_column(name, justify="left" if name in ("block", "") else "right")
    for each in found.candidates:
        gain = "not tried" if each.gain is None else f"{each.gain:+.5f}"
        verdict = "in the plan" if each.is_chosen else "left out"
        table.add_row(escape(each.path), form.format(each.cost), f"{each.gradient:.2e}", gain, verdict)
    print_whole(table)
    if found.note:
        talk(found.note)
    num = sum(each.is_chosen for each in found.candidates)
    stdout.out(
        f"{out}: a plan of {num} of {len(found.candidates)} blocks, {form.format(found.spent)} of "
        f"{form.format(found.limit)} {unit}; go on with se-inject finetune MODEL --plan {out}"
    )


def print_simplified(simplified: Simplified, out: Path) -> None:
    """Print what a simplification did, step by step, what stays, and what it came to."""
    start = simplified.before.top1
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("block", "", "top-1", "change", "parameters", "images/s"):
        table.add_column(name, justify="left" if name in ("block", "") else "right")
    table.add_row("at the start", "", f"{start:.2f} %", "", f"{simplified.parameters:,}", "x1.00")
    for step in simplified.steps:
        what = "folded" if step.action == "fold" else f"{step.hidden} hidden units"
        change = f"{step.top1 - start:+.2f}"
        table.add_row(
            escape(step.path), what, f"{step.top1:.2f} %", change, f"{step.parameters:,}", f"x{step.speed:.2f}"
        )
    print_whole(table)
    if simplified.kept:
        kept = Table(box=box.SIMPLE_HEAD, title="blocks that stay", title_justify="left")
        for name in ("block", "reason"):
            kept.add_column(name)
        for path, reason in simplified.kept.items():
            kept.add_row(escape(path), escape(reason))
        print_whole(kept)
    after, num = simplified.after.top1, simplified.num_folded + len(simplified.kept)
    stdout.out(
        f"{out}: {simplified.num_folded} of {num} blocks folded, top-1 {start:.2f} -> {after:.2f} % on "
        f"{simplified.before.num_images:,} images that chose them"
    )


def print_tuned(tuned: Tuned) -> None:
    """Print what a fine-tune ended with: a row a run, the difference to the control, and what it means."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "seed", "top-1 before", "after", "change", "parameters", "time", "images/s"):
        table.add_column(name, justify="right" if name else "left")
    for result in tuned.results:
        table.add_row(
            {"se": "with SE", "control": "control, without"}[result.arm],
            str(result.seed),
            f"{result.before:.2f} %",
            f"{result.top1:.2f} %",
            f"{result.top1 - result.before:+.2f}",
            f"{result.parameters:,}",
            f"{result.seconds:,.0f} s",
            f"{result.images_per_second:,.0f}",
        )
    print_whole(table)
    if tuned.difference is not None:
        stdout.print(escape(f"{tuned.difference}"))
    for note in tuned.notes:
        talk(note)
    stdout.out(f"{tuned.out}: the tuned network; {tuned.folder}: checkpoints, metrics and curves")


def print_scores(scores: Scores, origin: str, unreadable: Sequence[str]) -> None:
    """Print scores: top-1 and top-5, on which images, the worst classes, and what is taken for what."""
    stdout.out(
        f"top-1 {scores.top1:.2f} %, top-5 {scores.top5:.2f} %, loss {scores.loss:.4f}, "
        f"{scores.num_images:,} images of {origin}"
    )
    if not math.isfinite(scores.loss):
        talk("the loss is no finite number: of some images the network makes NaN or infinite scores")
    counts = scores.confusion.sum(1).tolist()
    table = Table(box=box.SIMPLE_HEAD, title="by class, the worst first", title_justify="left")
    for name in ("class", "images", "top-1", "taken for"):
        table.add_column(name, justify="right" if name in ("images", "top-1") else "left")
    names = list(scores.list_per_class().items())
    order = sorted(range(len(names)), key=lambda i: (names[i][1] is None, names[i][1] or 0.0))
    for i in order[:_NUM_CLASSES]:
        name, top1 = names[i]
        wrong = scores.confusion[i].clone()
        wrong[i] = 0
        others = ", ".join(
            f"{names[j][0]} {int(wrong[j])}" for j in wrong.argsort(descending=True)[:3].tolist() if wrong[j]
        )
        table.add_row(escape(name), str(counts[i]), "-" if top1 is None else f"{top1:.2f} %", escape(others))
    print_whole(table)
    if len(order) > _NUM_CLASSES:
        talk(f"{len(order) - _NUM_CLASSES} more classes; --json has them all, and the confusion matrix")
    print_unreadable(unreadable)


def print_unreadable(names: Sequence[str]) -> None:
    """Say which images were skipped, because they could not be read."""
    if names:
        images = "1 image" if len(names) == 1 else f"{len(names)} images"
        talk(f"{images} could not be read, not counted: {', '.join(names[:5])}")


def print_whole(table: Table) -> None:
    """Print a table with each row on one line, which a narrow terminal breaks but no number is lost."""
    width = Measurement.get(stdout, stdout.options.update(max_width=1000), table).maximum
    Console(highlight=False, emoji=False, width=max(width, stdout.width), file=stdout.file).print(table)
