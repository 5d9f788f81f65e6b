"""The command that shows what the blocks do: `report`."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from se_inject import console
from se_inject.arguments import AsJson, Device, Opened, open_model, read_validation, takes, write_words
from se_inject.errors import DataError, OptionError

if TYPE_CHECKING:
    from se_inject.comparison import Result
    from se_inject.report import Report

_ADVISED = ("--max-drop", "0.1", "--out", "smaller.pt")


@takes(open_model=open_model, read_validation=read_validation)
def run_report(
    open_model: functools.partial[Opened],
    read_validation: functools.partial[dict[str, Any]],
    *,
    classes: Annotated[
        str,
        typer.Option("--classes", metavar="A,B,C", help="At most five to show; the most and least confused ones."),
    ] = "",
    block: Annotated[
        str, typer.Option("--block", metavar="PATH", help="Whose images are shown; the one that is missed most.")
    ] = "",
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="FOLDER", help="Of finetune --compare, for the control; runs/NAME of MODEL."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write the page (.html).")] = Path(
        "report.html"
    ),
    png: Annotated[
        Path | None, typer.Option("--png", metavar="DIR", help="Write the figures there too, as .png and .svg.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show what the gates do by class and image, which blocks are worth keeping, and what to do: one page."""
    from se_inject.files import check_target, write_whole
    from se_inject.report import Wishes, make_report
    from se_inject.report_charts import write_figures
    from se_inject.report_page import make_page
    from se_inject.report_style import import_altair
    from se_inject.timing import Conditions
    from se_inject.validation import CACHE, open_validation
    from se_inject.world import stay_alone

    check_target(out, (".html", ".htm"))
    import_altair()
    if png is not None:
        _make_folder(png)
    name, world, options = str(open_model.keywords["model"]), stay_alone(device), read_validation()
    words = [
        *write_words(open_model),
        *write_words(read_validation),
        *([] if device == "auto" else ["--device", device]),
    ]
    folder = run or Path("runs") / Path(name).stem
    wishes = Wishes(
        classes=classes,
        block=block,
        results=_read_results(folder, is_asked=run is not None),
        folder=folder,
        conditions=Conditions(
            input_size=options["input_size"], rounds=10, compiled=False, device=str(world.device)
        ),
        name=Path(name).name,
        command=shlex.join(["se-inject", "simplify", *words, *_ADVISED]),
    )  # fmt: skip
    model, _, validation = open_validation(open_model, world=world, cache=CACHE, **options)
    with console.show_passes("report") as tell:
        report = make_report(model, validation, wishes, tell=tell)
    page = make_page(report)
    write_whole(out, lambda file: file.write(page.encode(errors="replace")))
    if png is not None:
        console.talk(f"wrote {len(write_figures(report, png))} figures to {png}, as .png and .svg")
    if as_json:
        console.print_json({"out": str(out), **report.to_values()})
    else:
        console.stdout.out(f"{out}: {_summarise(report)}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--png is {folder}, which cannot be made: {error.strerror}; give a folder") from error


def _read_results(folder: Path, *, is_asked: bool) -> list[Result]:
    from se_inject.report_network import read_results

    results = read_results(folder)
    if is_asked and not results:
        raise DataError(f"{folder} holds no comparison; expected the folder of se-inject finetune --compare")
    return results


def _summarise(report: Report) -> str:
    num = report.count_actions()
    return (
        f"{len(report.blocks)} blocks on {report.scores.num_images:,} images, top-1 {report.scores.top1:.2f} %; "
        f"{num['keep']} to keep, {num['fold']} to fold, {num['remove']} to remove"
    )
