"""Picture: a plan as an SVG, so that a person sees where the blocks go.

Takes a survey, gives the text of an SVG: a panel for each form of owner, with its merges, branches and blocks.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from torch import nn

from se_inject.diagrams import Box, BoxKind, Diagram, make_diagrams
from se_inject.ejection import eject
from se_inject.files import write_whole
from se_inject.layout import Layout, arrange
from se_inject.plan import Options
from se_inject.planner import Survey, survey_model
from se_inject.replay import replay_plan
from se_inject.rewrite import find_plan

SVG = ".svg"
_COLORS: dict[BoxKind, tuple[str, str]] = {  # fill and line
    "end": ("#ffffff", "#8a8f98"),
    "layer": ("#eef1f5", "#5b6470"),
    "operation": ("#ffffff", "#b4bac4"),
    "merge": ("#fff3d6", "#b07d00"),
    "passed": ("#f6f6f6", "#9a9a9a"),
    "block": ("#1f8a5b", "#12593a"),
}
_LEGEND: dict[BoxKind, str] = {
    "block": "block (new)",
    "merge": "merge that is gated",
    "passed": "merge that is passed over, with the reason",
    "layer": "layer",
}
_CHARACTER = 6.6
_HEIGHT = 34.0
_MARGIN = 24.0
_MAX_NOTE = 44
_MAX_PATHS = 6
_MAX_WIDTH = 1500.0
_MIN_WIDTH = 760.0
_HEAD = 64.0


def draw_plan(survey: Survey) -> str:
    """Draw a plan.

    Args:
        survey: From `survey_model`, before its graphs are rewritten.

    Returns:
        The text of an SVG.
    """
    plan = survey.plan
    svg = ET.Element("svg", xmlns="http://www.w3.org/2000/svg")
    svg.attrib |= {"font-family": "Helvetica, Arial, sans-serif", "font-size": "12"}
    definitions = _add(svg, "defs")
    arrow = _add(definitions, "marker", id="tip", viewBox="0 0 8 8", refX="7", refY="4", markerWidth="7", orient="auto")
    _add(arrow, "path", d="M0 0 L8 4 L0 8 z", fill="#5b6470")
    background = _add(svg, "rect", fill="#ffffff")
    title = f"{plan.model}: {len(plan.sites)} blocks, {plan.num_parameters:,} parameters"
    _add(svg, "text", title, x=_MARGIN, y=34, font_size=18, font_weight="bold")
    _add(svg, "text", plan.note, x=_MARGIN, y=54, fill="#5b6470")
    _draw_legend(svg)
    x, y, row, width = _MARGIN, 92.0, 0.0, _MIN_WIDTH
    for diagram in make_diagrams(survey):
        panel, w, h = _draw_panel(diagram)
        if x > _MARGIN and x + w > _MAX_WIDTH:
            x, y, row = _MARGIN, y + row + _MARGIN, 0.0
        panel.set("transform", f"translate({x:.1f} {y:.1f})")
        svg.append(panel)
        x, row = x + w + _MARGIN, max(row, h)
        width = max(width, x)
    height = y + row + _MARGIN
    size = {"width": f"{width:.0f}", "height": f"{height:.0f}"}
    svg.attrib |= {**size, "viewBox": f"0 0 {width:.0f} {height:.0f}"}
    background.attrib |= size
    return ET.tostring(svg, encoding="unicode") + "\n"


def draw_network(model: nn.Module, path: Path, **options: Any) -> None:
    """Write the picture of the plan for a network, or of the plan that it was injected with, to a file.

    Args:
        model: The network; it is not changed.
        path: Where to write.
        **options: Those of `make_plan`.

    Raises:
        SEInjectError: What `make_plan` raises, or the file cannot be written.
    """
    plan = find_plan(model)
    survey = survey_model(model, Options(**options)) if plan is None else replay_plan(eject(model), plan)
    text = draw_plan(survey).encode()
    write_whole(path, lambda file: file.write(text))


def _add(parent: ET.Element, tag: str, text: str = "", **attributes: object) -> ET.Element:
    values = {key.replace("_", "-"): f"{v:.1f}" if isinstance(v, float) else str(v) for key, v in attributes.items()}
    element = ET.SubElement(parent, tag, values)
    element.text = text or None
    return element


def _draw_legend(svg: ET.Element) -> None:
    x = _MARGIN
    for kind, text in _LEGEND.items():
        fill, line = _COLORS[kind]
        _add(svg, "rect", x=x, y=64, width=14, height=14, rx=3, fill=fill, stroke=line)
        _add(svg, "text", text, x=x + 20, y=75)
        x += 40 + _CHARACTER * len(text)


def _draw_panel(diagram: Diagram) -> tuple[ET.Element, float, float]:
    """Draw one diagram; returns it, its width and its height."""
    layout = arrange({name: _measure(box) for name, box in diagram.boxes.items()}, diagram.edges)
    paths = list(diagram.paths)
    shown = paths if len(paths) <= _MAX_PATHS else [*paths[: _MAX_PATHS - 2], "...", paths[-1]]
    lines = [f"{diagram.title}, {len(paths)} times" if len(paths) > 1 else diagram.title, ", ".join(shown)]
    width = max(layout.width + 2 * _MARGIN, 2 * _MARGIN + _CHARACTER * max(map(len, lines)))
    height = layout.height + _HEAD
    panel = ET.Element("g")
    _add(panel, "rect", width=width, height=height, rx=8, fill="#fcfcfd", stroke="#d5d9e0")
    _add(panel, "text", lines[0], x=14, y=22, font_weight="bold")
    _add(panel, "text", lines[1], x=14, y=39, fill="#5b6470")
    inner = _add(panel, "g", transform=f"translate({(width - layout.width) / 2:.1f} {_HEAD - 14:.1f})")
    for edge in diagram.edges:
        _draw_edge(inner, diagram, layout, edge)
    for name, box in diagram.boxes.items():
        _draw_box(inner, box, *layout.centers[name])
    return panel, width, height


def _measure(box: Box) -> float:
    if box.kind == "merge":
        return 44.0
    return max(56.0, _CHARACTER * max(len(_shorten(line)) for line in box.lines) + 18)


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_NOTE else f"{text[: _MAX_NOTE - 3]}..."


def _draw_box(parent: ET.Element, box: Box, x: float, y: float) -> None:
    fill, line = _COLORS[box.kind]
    width = _measure(box)
    group = _add(parent, "g")
    _add(group, "title", f"{box.title}: {box.note}" if box.note else box.title)  # what a browser shows on hovering
    rect = _add(group, "rect", x=x - width / 2, y=y - _HEIGHT / 2, width=width, height=_HEIGHT, fill=fill, stroke=line)
    rect.set("rx", "17" if box.kind in ("merge", "end") else "5")
    if box.kind == "passed":
        rect.set("stroke-dasharray", "4 3")
    for i, text in enumerate(box.lines):
        middle = y + 4 + 13 * (i - (len(box.lines) - 1) / 2)
        row = _add(group, "text", _shorten(text), x=x, y=middle, text_anchor="middle")
        row.attrib |= {"font-size": "10" if i else "12", "fill": "#ffffff" if box.kind == "block" else "#1c2128"}
        if box.kind in ("merge", "block") and not i:
            row.set("font-weight", "bold")


def _draw_edge(parent: ET.Element, diagram: Diagram, layout: Layout, edge: tuple[str, str]) -> None:
    points = list(layout.paths[edge])
    points[0] = (points[0][0], points[0][1] + _HEIGHT / 2)
    points[-1] = (points[-1][0], points[-1][1] - _HEIGHT / 2)
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        middle = (y0 + y1) / 2
        path += f" C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
    is_new = "block" in (diagram.boxes[edge[0]].kind, diagram.boxes[edge[1]].kind)
    line = _COLORS["block" if is_new else "layer"][1 - is_new]
    _add(parent, "path", d=path, fill="none", stroke=line, stroke_width=1.4, marker_end="url(#tip)")
