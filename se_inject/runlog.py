"""The log of a run: a live line for the person, and files for afterwards.

Takes what the training says of itself, writes `metrics.jsonl` (a line of JSON each), TensorBoard's event files and
`curves.png` into the run's folder, and shows progress on stderr. Only the first of several processes does.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from se_inject.errors import ArtifactError
from se_inject.files import write_whole

METRICS = "metrics.jsonl"
CURVES = "curves.png"
_REDRAW = 20.0
"""Seconds between drawings of the curves, at least."""


class RunLog:
    """The log of one run; a context manager.

    Args:
        folder: Where the files go; it exists. None writes no files.
        title: Of the run, for the live line.
        progress: Where to show it; None shows nothing.
    """

    def __init__(self, folder: Path | None, title: str, progress: Progress | None = None) -> None:
        self._folder, self._title, self._progress = folder, title, progress
        self._file: TextIO | None = None
        self._events: Any = None
        self._bar: TaskID | None = None
        self._validation: TaskID | None = None
        self._top1 = ""
        self._drawn_at = time.monotonic()
        self._loss = ""

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._file is not None and self._folder is not None:
            # An error that is on its way says more than one of the same disk would.
            with contextlib.suppress(*[ArtifactError] if kind else []):
                with _quoting(self._folder / METRICS):
                    self._file.close()
                if self._events is not None:
                    with _quoting(self._folder):
                        self._events.close()
                self._draw()
        if self._progress is not None and self._bar is not None:
            self._progress.stop_task(self._bar)
            if self._validation is not None:
                self._progress.remove_task(self._validation)

    def begin(self, num_steps: int, step: int) -> None:
        """Begin at a step; what the files say of later ones, from before an interruption, is dropped."""
        if self._folder is not None:
            path = self._folder / METRICS
            with _quoting(path):
                kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
                write_whole(path, lambda file: file.write("".join(json.dumps(x) + "\n" for x in kept).encode()))
                self._file = path.open("a", encoding="utf-8")
                self._events = _open_events(self._folder, step)
        if self._progress is not None:
            self._bar = self._progress.add_task(self._title, total=num_steps, completed=step, note="")

    @contextlib.contextmanager
    def showing(self, what: str) -> Iterator[None]:
        """Show what is being done before the first step."""
        self._loss = what
        self._show()
        yield
        self._loss = ""
        self._show()

    def advance(self) -> None:
        """A step is done."""
        if self._progress is not None and self._bar is not None:
            self._progress.advance(self._bar)

    def note_step(
        self,
        step: int,
        *,
        epoch: float,
        stage: str,
        loss: float,
        rates: Mapping[str, float],
        images_per_second: float,
    ) -> None:
        """Note where the training is."""
        values = {
            "step": step,
            "epoch": round(epoch, 4),
            "stage": stage,
            "loss": loss,
            "images_per_second": images_per_second,
        }
        self._write({**values, "lr": dict(rates)})
        self._write_events(step, {"train/loss": loss, **{f"lr/{name}": rate for name, rate in rates.items()}})
        self._loss = f"{stage}  loss {loss:.4f}  {images_per_second:,.0f} images/s"
        self._show()

    def begin_validation(self, num_images: int) -> None:
        """The network is about to be validated."""
        if self._progress is not None:
            if self._validation is None:
                self._validation = self._progress.add_task("validation", total=num_images, note="")
            self._progress.reset(self._validation, total=num_images)

    def advance_validation(self, num_images: int) -> None:
        """Images of the validation are done."""
        if self._progress is not None and self._validation is not None:
            self._progress.advance(self._validation, num_images)

    def note_validation(self, values: Mapping[str, Any]) -> None:
        """Note the scores of a validation: step, epoch, val_loss, top1, top5, and the temperature of the loss."""
        self._write(dict(values))
        step = int(values["step"])
        self._write_events(step, {f"val/{key}": float(values[key]) for key in ("val_loss", "top1", "top5")})
        self._top1 = f"  top-1 {values['top1']:.2f} %"
        self._show()
        if time.monotonic() - self._drawn_at > _REDRAW:
            self._draw()

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        if self._folder is not None and any("top1" in line for line in read_metrics(self._folder / METRICS)):
            draw_curves({self._title: read_metrics(self._folder / METRICS)}, self._folder / CURVES)

    def _show(self) -> None:
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, note=self._loss + self._top1)

    def _write(self, values: Mapping[str, Any]) -> None:
        if self._file is not None and self._folder is not None:
            with _quoting(self._folder / METRICS):
                self._file.write(json.dumps(values) + "\n")
                self._file.flush()

    def _write_events(self, step: int, values: Mapping[str, float]) -> None:
        if self._events is not None and self._folder is not None:
            with _quoting(self._folder):
                for name, value in values.items():
                    self._events.add_scalar(name, value, step)


@contextmanager
def _quoting(path: Path) -> Iterator[None]:
    """Turn a disk that is full, or a file that cannot be written, into one line."""
    try:
        yield
    except ArtifactError:
        raise
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error


def make_progress(console: Any) -> Progress:
    """Make the progress display: what, a bar, steps, time left, and a live line."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"), console=console, refresh_per_second=4,
    )  # fmt: skip


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`; lines that a power cut has left behind, cut short or of zeros, are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [values for values in found if isinstance(values, dict) and "step" in values]


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw loss and accuracy of runs over epochs, as a PNG.

    Raises:
        ArtifactError: The file cannot be written.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, lines in runs.items():
        steps = [(line["epoch"], line["loss"]) for line in lines if "loss" in line]
        scores = [(line["epoch"], line["val_loss"], line["top1"]) for line in lines if "top1" in line]
        if steps:
            marker = "." if len(steps) == 1 else None  # a line of one point is not seen
            (drawn,) = left.plot(
                *zip(*steps, strict=True), linewidth=0.8, alpha=0.6, marker=marker, label=f"{name}, training"
            )
            colour = drawn.get_color()
        else:
            colour = None
        if not scores:  # somebody has removed them
            continue
        epochs, losses, top1 = zip(*scores, strict=True)
        left.plot(epochs, losses, marker="o", markersize=4, color=colour, label=f"{name}, validation")
        right.plot(epochs, top1, marker="o", markersize=4, color=colour, label=name)
    left.set(xlabel="epoch", ylabel="loss")
    right.set(xlabel="epoch", ylabel="top-1 accuracy (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=130))


def _open_events(folder: Path, step: int) -> Any:
    return SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
