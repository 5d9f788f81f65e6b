"""Equivalence: find out whether what is written in a method's place does what the method does.

Takes an entry of the fake twin, a call of it and the method as it is written from its graphs, before a block is in it.
Runs both, in train mode under autocast and for twice the images at twice the resolution, and gives in what they differ.
The twin stays as it was.
"""

from __future__ import annotations

import types
from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from se_inject.account import Known, describe_value, take_account
from se_inject.calls import Call, Entry
from se_inject.codegen import Method
from se_inject.layouts import find_channel_dim
from se_inject.twin import Twin


def find_difference(twin: Twin, entry: Entry, call: Call, written: Method) -> str:
    """Find in what a method and the one that is to take its place differ.

    Of the modules of one class with the same plain attributes, whose written methods are the same, one is looked at.

    Args:
        twin: The fake twin.
        entry: The method's place.
        call: What it was called with.
        written: What is to take its place, without blocks.

    Returns:
        A reason; empty if they do the same.
    """
    owner = twin.model.get_submodule(entry.path)
    key = (entry.method, written.source, *map(id, written.names.values()), *_describe(owner))
    if key not in twin.differences:
        twin.differences[key] = _compare(twin, entry, call, written)
    return twin.differences[key]


def _describe(owner: nn.Module) -> Iterator[object]:
    """Describe what a module's code may go by: its class, its plain attributes, and the classes of its children."""
    yield type(owner)
    yield from ((name, describe_value(value)) for name, value in vars(owner).items())
    yield from ((name, type(child)) for name, child in owner._modules.items())


def _compare(twin: Twin, entry: Entry, call: Call, written: Method) -> str:
    owner = twin.model.get_submodule(entry.path)
    names = dict(written.names)
    exec(compile(written.source, "<written>", "exec"), names)  # noqa: S102  our own code
    replacement = types.MethodType(names[entry.method], owner)  # type: ignore[arg-type]
    known: Known = {}
    with twin.mode:
        larger, more = _double(call, resolution=True), _double(call, resolution=False)
    for tries in (((call, True), (call, False)), ((larger, False), (more, False))):
        for tried, training in tries:
            original = take_account(twin, owner, getattr(owner, entry.method), tried, known, training=training)
            if take_account(twin, owner, replacement, tried, known, training=training) != original:
                return "its code does something that the graph of torch.fx does not"
            if original is not None:
                break  # else it does not run that way
    return ""


def _double(call: Call, *, resolution: bool) -> Call:
    """Make a call with twice the images, and with maps of twice the resolution."""

    def double(x: object) -> object:
        if not isinstance(x, Tensor) or not x.ndim:
            return x
        channels = find_channel_dim(x)
        is_larger = resolution and channels is not None
        return x.new_empty([2 * n if i == 0 or (is_larger and i != channels) else n for i, n in enumerate(x.shape)])

    return Call(*tree_map(double, (call.args, call.kwargs)))
