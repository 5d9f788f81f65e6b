"""Layout: positions for the boxes of a small directed graph, from top to bottom.

Takes edges and widths, gives a position for each box and a path of points for each edge: layers by the longest path,
order within a layer by the mean of the neighbours (Sugiyama et al., 1981). Knows nothing of networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

_GAP = 26.0
_STEP = 62.0
_LANE = 10.0
"""Width of the lane of an edge that passes a layer."""
_SWEEPS = 8

Edge = tuple[str, str]
_Cell = str | tuple[str, str, int]  # a box, or the lane of an edge in a layer


@dataclass(frozen=True)
class Layout:
    """Where everything is drawn, in pixels.

    Attributes:
        centers: The center of each box.
        paths: The points that each edge goes through, from center to center.
        width: Of the whole.
        height: Of the whole.
    """

    centers: Mapping[str, tuple[float, float]]
    paths: Mapping[Edge, list[tuple[float, float]]]
    width: float
    height: float


def arrange(widths: Mapping[str, float], edges: Sequence[Edge]) -> Layout:
    """Arrange boxes of the given widths; `widths` is in an order in which edges go forward."""
    ranks = _rank(widths, edges)
    rows: list[list[_Cell]] = [[] for _ in range(max(ranks.values(), default=0) + 1)]
    for name, rank in ranks.items():
        rows[rank].append(name)
    chains: dict[Edge, list[_Cell]] = {}
    for start, end in edges:
        lanes: list[_Cell] = [(start, end, rank) for rank in range(ranks[start] + 1, ranks[end])]
        chains[start, end] = [start, *lanes, end]
        for i, lane in enumerate(lanes):
            rows[ranks[start] + 1 + i].append(lane)
    neighbours: dict[_Cell, list[_Cell]] = {}
    for chain in chains.values():
        for one, other in pairwise(chain):
            neighbours.setdefault(one, []).append(other)
            neighbours.setdefault(other, []).append(one)
    xs = _place(rows, neighbours, widths)
    ys = {cell: _STEP * (rank + 0.5) for rank, row in enumerate(rows) for cell in row}
    left = min((xs[c] - _get_width(c, widths) / 2 for c in xs), default=0.0)
    right = max((xs[c] + _get_width(c, widths) / 2 for c in xs), default=0.0)
    points = {cell: (xs[cell] - left, ys[cell]) for cell in xs}
    return Layout(
        centers={name: points[name] for name in widths},
        paths={edge: [points[cell] for cell in chain] for edge, chain in chains.items()},
        width=right - left,
        height=_STEP * len(rows),
    )


def _rank(widths: Mapping[str, float], edges: Sequence[Edge]) -> dict[str, int]:
    ranks = dict.fromkeys(widths, 0)
    for name in widths:
        ranks[name] = max((ranks[start] + 1 for start, end in edges if end == name), default=0)
    return ranks


def _get_width(cell: _Cell, widths: Mapping[str, float]) -> float:
    return widths[cell] if isinstance(cell, str) else _LANE


def _place(
    rows: list[list[_Cell]], neighbours: Mapping[_Cell, list[_Cell]], widths: Mapping[str, float]
) -> dict[_Cell, float]:
    """Move each cell towards the mean of its neighbours, keeping their distances within a row."""
    xs: dict[_Cell, float] = {}
    for row in rows:
        _spread(row, dict.fromkeys(row, 0.0), widths, xs)
    for sweep in range(_SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = {}
            for cell in row:
                near = [xs[n] for n in neighbours.get(cell, ())] or [xs[cell]]
                wanted[cell] = sum(near) / len(near)
            row.sort(key=wanted.__getitem__)
            _spread(row, wanted, widths, xs)
    return xs


def _spread(
    row: list[_Cell], wanted: Mapping[_Cell, float], widths: Mapping[str, float], xs: dict[_Cell, float]
) -> None:
    """Put the cells of a row as near to where they want to be as their widths allow."""
    position = -float("inf")
    shift: list[float] = []
    for cell in row:
        half = _get_width(cell, widths) / 2
        xs[cell] = max(wanted[cell], position + half)
        shift.append(wanted[cell] - xs[cell])
        position = xs[cell] + half + _GAP
    mean = sum(shift) / len(shift) if shift else 0.0
    for cell in row:
        xs[cell] += mean
