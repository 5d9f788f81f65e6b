"""Inspection: what the code of one entry does, and how a block would be written into it.

Takes an entry and a call, gives its traces and merges. Where the graph does all that the code does, the method is
written from the graph; where that is in doubt, blocks are spliced into the method's own source. Never changes a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from se_inject.calls import Call, Entry
from se_inject.codegen import Method, write_method
from se_inject.errors import TraceError
from se_inject.merges import Inspection, Merge, find_merges
from se_inject.splice import keep_spliceable, splice_method
from se_inject.tracing import Trace, trace_entry
from se_inject.twin import Twin


def inspect_entry(twin: Twin, entry: Entry, call: Call) -> Inspection:
    """Trace an entry in eval mode, in train mode too if its code asks for the mode, and find the merges.

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
        return Inspection(tuple(traces), tuple(find_merges(trace) for trace in traces))
    first = replace(first, doubt=doubt)
    merges = keep_spliceable(twin.model.get_submodule(entry.path), first, find_merges(first))
    return Inspection((first,), (merges,))


def write_entry(owner: nn.Module, traces: Sequence[Trace], blocks: Sequence[tuple[str, Merge]]) -> Method:
    """Write an entry's method with its blocks: from the edited graphs, or by splicing if these are in doubt.

    Raises:
        TraceError: It cannot be written down.
    """
    return splice_method(owner, traces[0], blocks) if traces[0].doubt else write_method(owner, traces)
