"""Report, the charts: vector graphics with axes, units and values to hover over, by Altair.

Takes a `Report`, gives a `Chart` for each place of the page, and writes the figures of a paper. Measures nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from se_inject.report import Report
from se_inject.report_blocks import BlockFacts, Z
from se_inject.report_classes import ClassFacts, Panel, Profile
from se_inject.report_style import ACCENT, FAINT, INK, LINES, SOFT, WIDTH, Chart, import_altair, write_picture

_STEP = 15
"""Height of a row, in pixels."""
_PANEL = (190, 150)
"""Width (in a picture) and height of a block's gates by channel."""
_EPSILON = 2**-23
"""Of single precision."""
# The middle of a long path says least.
_LABEL = "length(datum.label) > 24 ? slice(datum.label, 0, 8) + '…' + slice(datum.label, -15) : datum.label"

_AXIS = {"tickCount": 5}
_LEGEND = {"symbolType": "stroke", "symbolOpacity": 1, "symbolStrokeWidth": 2}

Rows = list[dict[str, Any]]


def shorten(number: float | None) -> float | None:
    """Round to four significant digits, which a chart cannot show more of."""
    return None if number is None else float(f"{number:.4g}")


def name_lines(classes: Sequence[ClassFacts]) -> list[str]:
    """Name the lines of the chart of gates by channel."""
    return ["all images", *(each.name for each in classes)]


def draw_panel(panel: Panel, classes: Sequence[ClassFacts]) -> list[Chart]:
    """Draw the mean gates by channel, a chart a block of a stage, all with the same axis of gates."""
    names, span = name_lines(classes), _measure_span(panel)
    return [
        Chart(
            f"stage-{panel.stage}-block-{i}",
            f"Mean gate by channel of {profile.path}, for {', '.join(names)}",
            _draw_profile(profile, names, span, is_hovered=True),
        )
        for i, profile in enumerate(panel.profiles)
    ]


@dataclass(frozen=True)
class _Span:
    """The part of the axis of gates that a panel shows.

    Attributes:
        limits: The lowest and the highest gate, with a margin that is wider than what rounding moves a gate by.
        decimals: Of what is drawn: at most a thousandth of the part, less than a chart can show.
    """

    limits: tuple[float, float]
    decimals: int

    def round(self, number: float | None) -> float | None:
        """Round a gate, or a standard deviation of it."""
        return None if number is None else round(number, self.decimals)


def _measure_span(panel: Panel) -> _Span:
    edges = [edge for profile in panel.profiles for edge in _list_edges(profile)]
    low, high = min(edges), max(edges)
    # What gates in single precision do not tell apart is one value, and no range to be shown large.
    length = high - low if high - low > _EPSILON * abs(high) else 1.0
    decimals = 3 - math.floor(math.log10(length)) if math.isfinite(length) else 3
    return _Span((round(low - 0.05 * length, decimals), round(high + 0.05 * length, decimals)), decimals)


def _list_edges(profile: Profile) -> Iterator[float]:
    for means, deviations in zip(profile.means, profile.deviations, strict=True):
        for mean, deviation in zip(means, deviations or [0.0] * len(means), strict=True):
            yield from (mean - deviation, mean + deviation)


def _draw_profile(profile: Profile, names: Sequence[str], span: _Span, *, is_hovered: bool) -> Any:
    """Draw lines (means) over bands (a standard deviation to either side within a class), and what is hovered over."""
    alt = import_altair()
    scale = alt.Scale(domain=list(span.limits), nice=False, zero=False)
    channel = alt.X("channel:Q", title="channel", scale=alt.Scale(nice=False), axis=alt.Axis(tickCount=4, grid=False))
    chart = alt.Chart(alt.InlineData(values=_list_channels(profile, span))).encode(channel)
    colours = alt.Scale(domain=list(names), range=list(LINES[: len(names)]))
    lines = (
        chart.transform_fold([f"m{k}" for k in range(len(names))], as_=["key", "mean"])
        .transform_calculate(number="toNumber(slice(datum.key, 1))", deviation="datum['s' + slice(datum.key, 1)]")
        .transform_calculate(
            line=f"{json.dumps(list(names))}[datum.number]",
            low="datum.mean - datum.deviation",
            high="datum.mean + datum.deviation",
        )
        .encode(color=alt.Color("line:N", title=None, scale=colours, legend=None if is_hovered else _LEGEND))
    )
    layers = [
        alt.Chart(alt.InlineData(values=[{}]))
        .mark_rule(strokeDash=[2, 3], strokeOpacity=0.5, color=INK, clip=True)
        .encode(y=alt.datum(1)),
        lines.transform_filter("datum.number > 0 && datum.deviation !== null")
        .mark_area(opacity=0.15)
        .encode(alt.Y("low:Q", title="mean gate", scale=scale), alt.Y2("high:Q")),
        lines.mark_line(strokeWidth=1.3).encode(
            alt.Y("mean:Q", title="mean gate", scale=scale, axis=alt.Axis(tickCount=5))
        ),
    ]
    if is_hovered:
        layers.append(_draw_hovered(chart, names, max(4, span.decimals)))
    return alt.layer(*layers).properties(height=_PANEL[1], title=profile.path)


def _list_channels(profile: Profile, span: _Span) -> Rows:
    """List a row a channel: its number, and the mean and the standard deviation of each line."""
    rows: Rows = [{"channel": channel} for channel in profile.channels]
    for k, (means, deviations) in enumerate(zip(profile.means, profile.deviations, strict=True)):
        for row, mean, deviation in zip(rows, means, deviations or [None] * len(means), strict=True):
            row[f"m{k}"], row[f"s{k}"] = span.round(mean), span.round(deviation)
    return rows


def _draw_hovered(chart: Any, names: Sequence[str], decimals: int) -> Any:
    """Draw a broad, unseen line a channel, which shows the values of all lines."""
    alt = import_altair()
    form = f".{decimals}f"
    texts = {
        f"t{k}": f"format(datum.m{k}, '{form}') + (datum.s{k} === null ? '' : ' ± ' + format(datum.s{k}, '{form}'))"
        for k in range(len(names))
    }
    tooltips = [alt.Tooltip(f"t{k}:N", title=name) for k, name in enumerate(names)]
    return (
        chart.transform_calculate(**texts)
        .mark_rule(strokeWidth=5, strokeOpacity=0, color=INK)
        .encode(tooltip=[alt.Tooltip("channel:Q"), *tooltips])
    )


def draw_distribution(blocks: Sequence[BlockFacts]) -> Chart:
    """Draw where the gates of each block lie: a row a block, darker where there are more."""
    alt = import_altair()
    rows: Rows = []
    for each in blocks:
        width = each.limit / len(each.histogram)
        rows += [
            {"block": each.path, "from": shorten(i * width), "to": shorten((i + 1) * width), "share": shorten(share)}
            for i, share in enumerate(each.histogram)
            if share > 0
        ]
    drawing = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_rect(color=ACCENT)
        .encode(
            alt.X("from:Q", title="gate", scale=alt.Scale(domain=[0, max(each.limit for each in blocks)])),
            alt.X2("to:Q"),
            _put_in_rows(blocks),
            # The root shows bins with few gates too.
            fillOpacity=alt.FillOpacity(
                "share:Q", scale=alt.Scale(type="sqrt", domain=[0, 1], range=[0.06, 1]), legend=None
            ),
            tooltip=[
                alt.Tooltip("block:N"),
                alt.Tooltip("from:Q", format=".3f"),
                alt.Tooltip("to:Q", format=".3f"),
                alt.Tooltip("share:Q", title="share of gates", format=".2%"),
            ],
        )
    )
    return Chart(
        "distribution", "Distribution of the gates of each block", drawing.properties(height=_STEP * len(blocks))
    )


def draw_variation(blocks: Sequence[BlockFacts]) -> Chart:
    """Draw how much gates vary over images, and how much of that the class tells."""
    alt = import_altair()
    rows: Rows = []
    for each in blocks:
        share = each.class_share
        parts = {"not known": 1.0} if share is None else {"class-specific": share, "within a class": 1 - share}
        end = 0.0
        for part, length in parts.items():
            start, end = end, end + length * each.variation
            rows.append(
                {"block": each.path, "part": part, "share": shorten(length), "from": shorten(start), "to": shorten(end),
                 "variation": shorten(each.variation)}
            )  # fmt: skip
    found = [part for part in ("class-specific", "within a class", "not known") if any(r["part"] == part for r in rows)]
    colours = {"class-specific": ACCENT, "within a class": SOFT, "not known": FAINT}
    drawing = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_bar(height={"band": 0.72})
        .encode(
            alt.X("from:Q", title="standard deviation of a gate over images", axis=_AXIS),
            alt.X2("to:Q"),
            _put_in_rows(blocks),
            color=alt.Color(
                "part:N", title=None, scale=alt.Scale(domain=found, range=[colours[part] for part in found]),
                legend=alt.Legend(orient="top"),
            ),
            tooltip=[
                alt.Tooltip("block:N"),
                alt.Tooltip("variation:Q", title="standard deviation", format=".4f"),
                alt.Tooltip("part:N"),
                alt.Tooltip("share:Q", title="share of the variance", format=".1%"),
            ],
        )
    )  # fmt: skip
    return Chart("variation", "Variation of the gates of each block", drawing.properties(height=_STEP * len(blocks)))


def draw_costs(blocks: Sequence[BlockFacts]) -> list[Chart]:
    """Draw what is lost when the gates of a block are their means: accuracy with its interval, and cross-entropy."""
    alt = import_altair()
    rows: Rows = [
        {
            "block": each.path,
            "lost": shorten(each.ablation.lost),
            "low": shorten(each.ablation.lost - Z * each.ablation.error),
            "high": shorten(each.ablation.most),
            "loss": shorten(each.ablation.loss),
        }
        for each in blocks
    ]
    tooltips = [
        alt.Tooltip("block:N"),
        alt.Tooltip("lost:Q", title="top-1 lost, points", format="+.3f"),
        alt.Tooltip("low:Q", title="95 % interval from", format="+.3f"),
        alt.Tooltip("high:Q", title="to", format="+.3f"),
        alt.Tooltip("loss:Q", title="cross-entropy added", format="+.5f"),
    ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(_put_in_rows(blocks), tooltip=tooltips)
    zero = alt.Chart(alt.InlineData(values=[{}])).mark_rule(color=INK, strokeOpacity=0.4).encode(x=alt.datum(0))
    lost = alt.X("lost:Q", title="top-1 lost, points of per cent", axis=_AXIS)
    accuracy = alt.layer(
        base.mark_rule(color=ACCENT, strokeOpacity=0.55, strokeWidth=1.5).encode(
            alt.X("low:Q", title="top-1 lost, points of per cent", axis=_AXIS), alt.X2("high:Q")
        ),
        zero,  # under the points, which are to be hovered over
        base.mark_circle(color=ACCENT, opacity=1, size=36).encode(lost),
    )
    loss = alt.layer(
        base.mark_bar(color=ACCENT, height={"band": 0.6}).encode(
            alt.X("loss:Q", title="mean cross-entropy added", axis=_AXIS)
        ),
        zero,
    )
    alt_text = "What fixing the gates of each block costs"
    return [
        Chart("accuracy-lost", f"{alt_text}: top-1", accuracy.properties(height=_STEP * len(blocks))),
        Chart("loss-added", f"{alt_text}: cross-entropy", loss.properties(height=_STEP * len(blocks))),
    ]


def _put_in_rows(blocks: Sequence[BlockFacts]) -> Any:
    alt = import_altair()
    axis = alt.Axis(labelExpr=_LABEL, labelLimit=170, ticks=False, domain=False, labelPadding=6)
    return alt.Y("block:N", title=None, sort=[each.path for each in blocks], axis=axis)


def draw_charts(report: Report) -> Mapping[str, Chart]:
    """Draw the charts of a page, by name."""
    charts = [chart for panel in report.panels for chart in draw_panel(panel, report.classes)]
    charts += [draw_distribution(report.blocks), draw_variation(report.blocks), *draw_costs(report.list_by_cost())]
    return {chart.name: chart for chart in charts}


def write_figures(report: Report, folder: Path) -> list[Path]:
    """Write the figures for a paper, each as `.png` and `.svg`; gives their paths without suffix.

    Raises:
        ArtifactError: A file cannot be written.
    """
    alt, names = import_altair(), name_lines(report.classes)
    drawings = {
        f"gates-by-class-stage-{panel.stage}": alt.hconcat(
            *(
                _draw_profile(profile, names, _measure_span(panel), is_hovered=False).properties(width=_PANEL[0])
                for profile in panel.profiles
            )
        )
        for panel in report.panels
    }
    others = [draw_distribution(report.blocks), draw_variation(report.blocks), *draw_costs(report.list_by_cost())]
    drawings |= {chart.name: chart.drawing.properties(width=WIDTH) for chart in others}
    for name, drawing in drawings.items():
        write_picture(drawing, folder / name)
    return [folder / name for name in drawings]
