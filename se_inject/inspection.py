"""Inspection: what the code of one entry does, and how a block would be written into it.

Takes an entry and a call, gives its traces and places. Where the graph does all that the code does, the method is
written from the graph; where that is in doubt, blocks are spliced into the method's own source; at an entry's border
the code need not be looked into. Never changes a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from se_inject.borders import write_border
from se_inject.calls import Call, Entry
from se_inject.codegen import Method, write_method
from se_inject.equivalence import find_difference
from se_inject.errors import TraceError
from se_inject.layouts import get_channel_dim, set_channel_dim
from se_inject.operations import Watch, count_positions, is_map
from se_inject.places import Border, Place, Placing, Side, find_places
from se_inject.splice import keep_spliceable, splice_method
from se_inject.tracing import Trace, trace_entry
from se_inject.twin import Twin, apart, set_training


@dataclass(frozen=True)
class Inspection:
    """What an entry's code does: its graph and places, once, or once a mode if the code reads `self.training`."""

    traces: tuple[Trace, ...]
    """Empty where the code is not looked into."""
    found: tuple[list[Place], ...]
    """The places in each trace."""

    @property
    def is_written(self) -> bool:
        """Whether its method is known to be written from its graphs, rather than spliced or wrapped at the border."""
        return bool(self.traces) and not self.traces[0].doubt

    @property
    def difference(self) -> str:
        """A reason, if the merges of the modes are not alike."""
        forms = {tuple((p.kind, p.channels) for p in places) for places in self.found}
        return "its merges differ between train and eval mode" if len(forms) > 1 else ""

    @property
    def places(self) -> list[Place]:
        """The places in terms of the first trace; one that is not free in every mode has the reason."""
        first, *others = self.found
        if self.difference:
            return [replace(p, reason=p.reason or self.difference) for p in first]
        for other in others:
            first = [replace(p, reason=p.reason or o.reason) for p, o in zip(first, other, strict=True)]
        return first

    def get_place(self, kind: Side | Border, index: int = 0) -> Place | None:
        """Return the place on a side of the `index`-th layer that runs in the entry's own code, or at its border."""
        places = [p for p in self.places if p.kind == kind]
        return places[index] if index < len(places) else None


def inspect_entry(twin: Twin, entry: Entry, call: Call, placing: Placing) -> Inspection:
    """Trace an entry in eval mode, in train mode too if its code asks for the mode, and find the places in it.

    Raises:
        TraceError: The code cannot be followed.
    """
    first = trace_entry(twin, entry, call, training=False)
    doubt = first.doubt
    traces = [first]
    if first.reads_mode and not doubt:
        try:
            traces.append(trace_entry(twin, entry, call, training=True))
            doubt = traces[1].doubt
        except TraceError as error:
            doubt = str(error)
    if not doubt:
        inspection = Inspection(tuple(traces), tuple(find_places(trace, placing) for trace in traces))
        doubt = _find_difference(twin, entry, call, inspection)
        if not doubt:
            return inspection
    first = replace(first, doubt=doubt)
    places = keep_spliceable(twin.model.get_submodule(entry.path), first, find_places(first, placing))
    return Inspection((first,), (places,))


def _find_difference(twin: Twin, entry: Entry, call: Call, inspection: Inspection) -> str:
    """Find in what the code that would be written does not do what the entry does; empty if none is to be written."""
    owner = twin.model.get_submodule(entry.path)
    if isinstance(owner, fx.GraphModule) or all(place.reason for place in inspection.places):
        return ""
    try:
        return find_difference(twin, entry, call, write_method(owner, inspection.traces))
    except TraceError as error:
        return str(error)


def write_entry(owner: nn.Module, inspection: Inspection, blocks: Sequence[tuple[str, Place]]) -> Method:
    """Write an entry's method with its blocks: from the edited graphs, or by splicing if these are in doubt.

    Args:
        owner: The module whose method it is; only looked at.
        inspection: What its code does, with the blocks in the graphs.
        blocks: The name of each block, and where it stands.

    Raises:
        TraceError: It cannot be written down.
    """
    if not inspection.traces:
        return write_border(owner, blocks[0][1].entry.method, {place.kind: name for name, place in blocks})
    if inspection.is_written:
        return write_method(owner, inspection.traces)
    return splice_method(owner, inspection.traces[0], blocks)


def inspect_border(twin: Twin, entry: Entry, call: Call) -> Inspection:
    """Make the places at the border of an entry, whose code need not be followed for that.

    Raises:
        TraceError: It is handed no map, or does not run on its own.
    """
    owner = twin.model.get_submodule(entry.path)
    x = call.args[0] if call.args else None
    if not is_map(x):
        raise TraceError("its first argument is no map")
    with set_training(owner, False), apart(owner), twin.mode, torch.no_grad(), Watch() as watch:
        try:
            y = getattr(owner, entry.method)(*call.args, **call.kwargs)
        except Exception as error:
            raise TraceError(f"its {entry.method} does not run on its own: {error}") from error
    calls = watch.work.layer_calls
    if len(calls) == 1 and calls[0].kind == "linear":
        x = set_channel_dim(x, x.ndim - 1)
    return Inspection((), ([_place_border(entry, x, "input", owner), _place_border(entry, y, "output", owner)],))


def _place_border(entry: Entry, value: object, border: Border, owner: nn.Module) -> Place:
    name = f"{border} of {type(owner).__name__}"
    place = Place(entry, int(border == "output"), border, name, (), (), 0, 0, 0, 2, 1, "its output is no map")
    if not is_map(value):
        return place
    dim = get_channel_dim(value)
    return replace(
        place,
        channels=value.shape[dim],
        positions=count_positions(value),
        num_spatial=value.ndim - 2,
        channel_dim=-1 if dim == value.ndim - 1 else 1,
        reason="" if dim in (1, value.ndim - 1) else "its maps are laid out in different ways",
    )
