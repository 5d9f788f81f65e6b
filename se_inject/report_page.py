"""Report, the page: one HTML file that needs nothing else, on a phone, on paper, by day and by night.

Takes a `Report`, gives HTML. The words are those of `report.html`, the charts those of `report_charts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from se_inject import __version__
from se_inject.report import Report
from se_inject.report_blocks import MOST_LOST, NEAR_ONE, Z
from se_inject.report_charts import draw_charts, draw_panel, name_lines
from se_inject.report_style import import_altair, make_bundle
from se_inject.speed import Measured

_TEMPLATE = "report.html"
_WHERE = {"plain": "without blocks", "injected": "with blocks"}


def make_page(report: Report) -> str:
    """Make the page of a report.

    Args:
        report: What it says.

    Raises:
        OptionError: What draws the charts is not installed.
    """
    import_altair()
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415  an extra

    charts = draw_charts(report)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("se_inject").joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        report=report,
        actions=report.count_actions(),
        blocks=report.list_by_cost(),
        costs=_tabulate_costs(report.costs) if isinstance(report.costs, Measured) else [],
        lines=name_lines(report.classes),
        panels=[(panel, [chart.name for chart in draw_panel(panel, report.classes)]) for panel in report.panels],
        charts=charts,
        specs={name: chart.to_spec() for name, chart in charts.items()},
        bundle=make_bundle(),
        version=__version__,
        z=Z,
        most_lost=MOST_LOST,
        near_one=NEAR_ONE,
    )


def _tabulate_costs(costs: Measured) -> list[Mapping[str, Any]]:
    """List a row a network: numbers in the units of the table, and what they are in relation to the plain network."""
    by_name = {row.name: row for row in costs.rows}
    rows: list[Mapping[str, Any]] = []
    for row in costs.rows:
        base = by_name[row.base]
        timing = row.timings.get("eager")
        rows.append(
            {
                "name": _name_network(row.name),
                "parameters": row.parameters,
                "gflops": row.flops / 1e9,
                "megabytes": row.bytes_moved / 1e6,
                "milliseconds": None if timing is None else timing.p50,
                "time": None if timing is None else timing.ratio,
                "has_ratio": base is not row,
                "parameters_ratio": row.parameters / base.parameters,
                "flops_ratio": row.flops / base.flops if base.flops else None,
                "bytes_ratio": row.bytes_moved / base.bytes_moved,
                "failure": row.failures.get("eager", ""),
            }
        )
    return rows


def _name_network(name: str) -> str:
    plain, _, rest = name.partition(", ")
    if name == "optimized":
        return "with blocks, optimized"
    return ", ".join([_WHERE.get(plain, plain), *([rest] if rest else [])])
