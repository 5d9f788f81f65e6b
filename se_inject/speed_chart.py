"""Chart of speed: time and bytes of each network in relation to the plain one, for the eye.

Takes rows of `speed`, writes a picture. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from se_inject.files import check_suffix, write_whole
from se_inject.speed import Row

SUFFIXES = (".png", ".svg", ".pdf")
_MAX_COLUMNS = 4
_WIDTH = 8.0
"""Of the figure in inches, in which the title fits; more where there are many bars."""
_BAR = 0.3
"""Width of a bar in inches: the number above it fits."""
_COUNTED = {"bytes_moved": "bytes, evaluation", "bytes_training": "bytes, training", "bytes_saved": "bytes saved"}


def draw_speed(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw a bar a network and measure: the ratio to its base, which is the line at 1 and has no bar of its own.

    Args:
        rows: What was measured.
        title: What it was measured with.
        path: `.png`, `.svg` or `.pdf`.

    Raises:
        ArtifactError: The file cannot be written.
    """
    check_suffix(path, SUFFIXES)
    measures = _collect_ratios(rows)
    names = [row.name for row in rows if row.base != row.name]
    figure = Figure(figsize=(max(_WIDTH, 1 + (len(names) + 1) * _BAR * len(measures)), 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=list(colormaps["tab20"](range(20))))  # in pairs: a network, and what it is optimized
    width = 1 / (len(names) + 1)
    for i, name in enumerate(names):
        places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(measures))]
        values = [ratios.get(name) for ratios in measures.values()]
        shown = [(x, y) for x, y in zip(places, values, strict=True) if y is not None]
        bars = axes.bar([x for x, _ in shown], [y - 1 for _, y in shown], width, bottom=1, label=name)
        axes.bar_label(bars, [f"{y:.2f}" for _, y in shown], fontsize=7, padding=1)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(measures)), list(measures))
    axes.set_ylabel("in relation to the plain network")
    axes.margins(y=0.15)
    axes.set_title(title, fontsize=9)
    figure.legend(loc="outside lower center", ncols=min(_MAX_COLUMNS, len(names)), fontsize=8, frameon=False)
    content = BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."), dpi=150, bbox_inches="tight")
    write_whole(path, lambda file: file.write(content.getvalue()))


def _collect_ratios(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Collect the ratios by measure and network; measures that no network has are left out."""
    by_name = {row.name: row for row in rows}
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for field, label in _COUNTED.items():
            value, base = getattr(row, field), getattr(by_name[row.base], field)
            if value is not None and base:
                found.setdefault(label, {})[row.name] = value / base
        for mode, timing in row.timings.items():
            if timing.ratio is not None:
                found.setdefault(f"time, {mode}", {})[row.name] = timing.ratio
    return found
