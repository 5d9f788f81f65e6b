"""Diagrams: what the code of each owner does, as boxes and edges that a person can read.

Takes a survey, gives one diagram for each form of owner, with its merges, branches and blocks. Draws nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx
from torch.utils._pytree import tree_leaves

from se_inject.calls import Entry
from se_inject.inspection import Inspection
from se_inject.operations import is_map
from se_inject.places import Place
from se_inject.plan import Site
from se_inject.planner import Survey

BoxKind = Literal["end", "layer", "operation", "merge", "passed", "block"]


@dataclass(frozen=True)
class Box:
    """A box of a diagram.

    Attributes:
        kind: An input or output, a layer, another operation, a merge that is gated, one that is passed over, a block.
        title: Its name.
        note: A second line: a layer's class, the code of a merge, the reason why a merge is passed over.
        channels: The channels that a block has, in one owner or another.
    """

    kind: BoxKind
    title: str
    note: str = ""
    channels: tuple[int, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """What stands in it; the code of a merge is shown on hovering alone."""
        if self.kind == "block":
            return (self.title, f"{', '.join(map(str, self.channels))} channels")
        return (self.title, self.note) if self.note and self.kind != "merge" else (self.title,)


@dataclass(frozen=True)
class Diagram:
    """The code of owners that do the same.

    Attributes:
        title: The owners' class.
        paths: The owners.
        boxes: The boxes by name, in the order in which they run.
        edges: Pairs of names.
    """

    title: str
    paths: tuple[str, ...]
    boxes: dict[str, Box]
    edges: tuple[tuple[str, str], ...]


def make_diagrams(survey: Survey) -> list[Diagram]:
    """Make the diagrams of a survey, those of owners with the same form as one."""
    sites: dict[Entry, list[Site]] = dict(survey.plan.iterate_entries())
    found: dict[object, Diagram] = {}
    for entry, inspection in survey.inspections.items():
        owner = survey.twin.model.get_submodule(entry.path)
        here = sites.get(entry, [])
        if inspection.traces:
            diagram = _draw_code(survey, entry, inspection, here)
        else:
            diagram = _draw_border(inspection, here, type(owner).__name__)
        diagram = replace(diagram, title=type(owner).__name__, paths=(str(entry),))
        boxes = [(name, box.kind, box.title, box.note) for name, box in diagram.boxes.items()]
        form = (diagram.title, tuple(boxes), diagram.edges)
        found[form] = _unite(found[form], diagram) if form in found else diagram
    return list(found.values())


def _unite(one: Diagram, other: Diagram) -> Diagram:
    boxes = {
        name: replace(box, channels=tuple(sorted({*box.channels, *other.boxes[name].channels})))
        for name, box in one.boxes.items()
    }
    return replace(one, paths=one.paths + other.paths, boxes=boxes)


def _draw_code(survey: Survey, entry: Entry, inspection: Inspection, sites: list[Site]) -> Diagram:
    graph = inspection.traces[0].graph
    owner = survey.twin.model.get_submodule(entry.path)
    places = {place.index: place for place in inspection.places}
    boxes: dict[str, Box] = {}
    edges: list[tuple[str, str]] = []
    rerouted: dict[tuple[str, str], str] = {}
    blocks = [(site, places[site.index]) for site in sites]
    merges = {place.operations[-1]: place for place in reversed(inspection.places) if place.operations}
    for site, place in blocks:
        rerouted.update({(e.node, consumer): site.name for e in place.edges for consumer in e.consumers})
    gated = {place.operations[-1] for _, place in blocks if place.operations}
    for node in graph.nodes:
        if not _is_drawn(node):
            continue
        sources = _find_sources(node)
        for source in sources:
            block = rerouted.get((source, node.name))
            if block is not None and block not in boxes:
                site, place = next(pair for pair in blocks if pair[0].name == block)
                boxes[block] = _make_block_box(site)
                edges += [(edge.node, block) for edge in place.edges]
            edges.append((block or source, node.name))
        boxes[node.name] = _make_box(node, owner, merges.get(node.name), is_gated=node.name in gated)
    return Diagram("", (), _sort(boxes, edges), tuple(dict.fromkeys(edges)))


def _draw_border(inspection: Inspection, sites: list[Site], name: str) -> Diagram:
    chain = {"input": Box("end", "input"), "layer": Box("layer", name), "output": Box("end", "output")}
    for site in sites:
        before = inspection.places[site.index].kind == "input"
        items = list(chain.items())
        items.insert([key for key, _ in items].index("layer") + (not before), (site.name, _make_block_box(site)))
        chain = dict(items)
    names = list(chain)
    return Diagram("", (), chain, tuple(itertools.pairwise(names)))


def _sort(boxes: dict[str, Box], edges: Iterable[tuple[str, str]]) -> dict[str, Box]:
    """Order the boxes so that every edge goes forward; the block of a sum of three comes before its first addition."""
    above: dict[str, list[str]] = {name: [] for name in boxes}
    for start, end in edges:
        above[end].append(start)
    ordered: dict[str, Box] = {}

    def add(name: str) -> None:
        if name not in ordered:
            for source in above[name]:
                add(source)
            ordered[name] = boxes[name]

    for name in boxes:
        add(name)
    return ordered


def _is_drawn(node: fx.Node) -> bool:
    return node.op == "output" or (node.op != "get_attr" and any(map(is_map, tree_leaves(node.meta.get("value")))))


def _find_sources(node: fx.Node) -> list[str]:
    """Return the drawn nodes that a node reads, through those that are not drawn."""
    found: list[str] = []
    for source in node.all_input_nodes:
        found += [source.name] if _is_drawn(source) else _find_sources(source)
    return list(dict.fromkeys(found))


def _make_block_box(site: Site) -> Box:
    return Box("block", site.name, channels=(site.channels,))


def _make_box(node: fx.Node, owner: object, merge: Place | None, *, is_gated: bool) -> Box:
    if merge is not None:
        sign = "cat" if merge.kind == "concat" else "+"
        return Box("merge", sign, merge.code) if is_gated else Box("passed", sign, merge.reason or "not a site")
    if node.op in ("placeholder", "output"):
        return Box("end", node.name)
    if node.op == "call_module":
        child = owner.get_submodule(str(node.target)) if "." in str(node.target) else getattr(owner, str(node.target))  # type: ignore[attr-defined]
        return Box("layer", str(node.target), type(child).__name__)
    return Box("operation", str(getattr(node.target, "__name__", node.target)))
