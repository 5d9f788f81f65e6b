"""Tables of plans: the sites, what is passed over, and what the blocks cost.

Takes plans and costs, prints tables, gives plain values.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from se_inject import console

if TYPE_CHECKING:
    from se_inject.costs import Costs
    from se_inject.plan import Plan

_COLUMNS = ("block", "kind", "merge", "branch", "channels", "hidden", "parameters")
_GAP = 2


def print_plan(plan: Plan, before: Costs, after: Costs) -> None:
    """Print a plan as tables: the sites, what is passed over and why, and the totals."""
    if plan.note:
        console.stdout.print(escape(plan.note))
    console.stdout.print(_tabulate_sites(plan))
    if plan.passed_over:
        console.stdout.print(_tabulate_passed_over(plan))
    console.stdout.print(_tabulate_costs(before, after))


def _tabulate_sites(plan: Plan) -> Table:
    rows = [
        (
            site.path,
            site.kind,
            site.merge,
            site.describe_branches(),
            f"{site.channels}",
            f"{site.hidden or ''}",
            f"{site.num_parameters:,}",
        )
        for site in plan.sites
    ]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    # Each row keeps to one line: where the terminal is narrow, merge and branch give way.
    spare = console.stdout.width - sum(widths) - _GAP * len(widths) + widths[2] + widths[3]
    widths[3] = min(widths[3], max(len("branch"), spare // 2))
    widths[2] = min(widths[2], max(len("merge"), spare - widths[3]))
    title = f"{plan.model}: {len(plan.sites)} blocks, {plan.num_parameters:,} parameters"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, _GAP - 1, 0, 0), pad_edge=False)
    for i, (name, width) in enumerate(zip(_COLUMNS, widths, strict=True)):
        table.add_column(name, width=width, no_wrap=True, justify="right" if i > 3 else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _tabulate_passed_over(plan: Plan) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=f"passed over: {plan.count_reasons().total()} merges", title_justify="left"
    )
    table.add_column("merges", justify="right")
    for name in ("kind", "where", "reason"):
        table.add_column(name, overflow="fold")
    for (kind, reason), num in plan.count_reasons().items():
        owners = [item.owner or "(root)" for item in plan.passed_over if (item.kind, item.reason) == (kind, reason)]
        where = owners[0] if len(owners) == 1 else f"{owners[0]} .. {owners[-1]}"
        table.add_row(str(num), kind, escape(where), escape(reason))
    return table


def _tabulate_costs(before: Costs, after: Costs) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="left" if not name else "right")
    rows: list[tuple[str, float | None, float | None, str]] = [
        ("parameters", before.parameters, after.parameters, "{:,}"),
        ("GMACs an image", _scale(before.macs, 1e9), _scale(after.macs, 1e9), "{:,.5g}"),
        ("size in MB", _scale(before.size, 1e6), _scale(after.size, 1e6), "{:,.1f}"),
    ]
    for name, old, new, form in rows:
        if old is None or new is None:
            table.add_row(name, "not known", "not known", "")
        else:
            table.add_row(name, form.format(old), form.format(new), f"{(new / old - 1) * 100:+.2f} %" if old else "")
    return table


def _scale(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def describe_plan(plan: Plan, before: Costs, after: Costs) -> dict[str, Any]:
    """Turn a plan and its totals into plain values."""
    sites = [{"path": site.path, **asdict(site)} for site in plan.sites]
    return {
        "model": plan.model,
        **plan.to_settings(),
        "note": plan.note,
        "sites": sites,
        "passed_over": [asdict(item) for item in plan.passed_over],
        "before": _describe_costs(before),
        "after": _describe_costs(after),
    }


def _describe_costs(costs: Costs) -> dict[str, int | None]:
    """Turn costs into plain values: counts, bytes, and operations for one image."""
    return {"parameters": costs.parameters, "size_bytes": costs.size, "flops": costs.flops, "macs": costs.macs}
