"""Tables of what SE costs: what was counted, and what was timed.

Takes the rows that were measured, prints tables.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from se_inject import console
from se_inject.speed import COUNTED_STEP, Row


def print_speed(rows: Sequence[Row]) -> None:
    """Print what SE costs: what was counted, and what was timed; each in relation to its base."""
    console.print_whole(_tabulate_counts(rows))
    reasons = {row.name: row.failures[COUNTED_STEP] for row in rows if COUNTED_STEP in row.failures}
    if reasons:
        console.stdout.out(
            "".join(f"{name}: no training step is counted: {reason}\n" for name, reason in reasons.items())
        )
    modes = dict.fromkeys(mode for row in rows for mode in (*row.timings, *row.failures))
    for mode in modes:
        if mode != COUNTED_STEP:
            console.print_whole(_tabulate_times(rows, mode))


def _tabulate_counts(rows: Sequence[Row]) -> Table:
    by_name = {row.name: row for row in rows}
    fields = {
        "bytes_moved": "MB moved",
        "bytes_training": "training step",
        "bytes_saved": "MB saved",
        "peak": "peak MB",
        "peak_training": "training step",
    }
    table = Table(box=box.SIMPLE_HEAD, title="counted", title_justify="left")
    for name in ("network", "parameters", "GFLOPs an image", *fields.values()):
        table.add_column(name, justify="left" if name == "network" else "right")
    for row in rows:
        cells = [escape(row.name), f"{row.parameters:,}", f"{row.flops / 1e9:.3f}"]
        for field in fields:
            value, plain = getattr(row, field), getattr(by_name[row.base], field)
            cells.append("" if value is None else f"{value / 1e6:,.1f}" + (f"  x{value / plain:.3f}" if plain else ""))
        table.add_row(*cells)
    return table


def _tabulate_times(rows: Sequence[Row], mode: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=mode, title_justify="left")
    for name in ("network", "p50 ms", "p95 ms", "images/s", "time", "compared to"):
        table.add_column(name, justify="left" if name in ("network", "compared to") else "right")
    for row in rows:
        timing = row.timings.get(mode)
        if mode in row.failures:
            table.add_row(escape(row.name), "-", "-", "-", "-", escape(row.failures[mode]))
        if timing is None:
            continue
        ratio = "" if timing.ratio is None else f"x{timing.ratio:.3f}"
        numbers = (f"{timing.p50:.2f}", f"{timing.p95:.2f}", f"{timing.images_per_second:,.1f}", ratio)
        table.add_row(escape(row.name), *numbers, escape(row.base))
    return table
