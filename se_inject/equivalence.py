"""Equivalence: find out whether what is written in a method's place does what the method does.

Takes an entry of the fake twin, a call of it and the method as it is written from its graphs, before a block is in it.
Runs both, under autocast and for more and larger images, and gives in what they differ. The twin stays as
it was.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from se_inject.account import Known, describe_value, take_account
from se_inject.calls import Call, Entry
from se_inject.codegen import Method
from se_inject.layouts import find_channel_dim
from se_inject.operations import is_map
from se_inject.twin import Twin


def find_difference(twin: Twin, entry: Entry, call: Call, written: Method, *, training: bool = True) -> str:
    """Find in what a method and the one that is to take its place differ.

    Of the modules of one class with the same plain attributes, whose written methods are the same, one is looked at.

    Args:
        twin: The fake twin.
        entry: The method's place.
        call: What it was called with.
        written: What is to take its place, without blocks.
        training: Whether it is to do so in train mode, too.

    Returns:
        A reason; empty if they do the same.
    """
    owner = twin.model.get_submodule(entry.path)
    key = (training, entry.method, written.source, *map(id, written.names.values()), *_describe(owner))
    if key not in twin.differences:
        twin.differences[key] = _compare(twin, entry, call, written, training=training)
    return twin.differences[key]


def _describe(owner: nn.Module) -> Iterator[object]:
    """Describe what a module's code may go by: its class, its plain attributes, and the classes of its children."""
    yield type(owner)
    yield from ((name, describe_value(value)) for name, value in vars(owner).items())
    yield from ((name, type(child)) for name, child in owner._modules.items())


def _compare(twin: Twin, entry: Entry, call: Call, written: Method, *, training: bool) -> str:
    owner = twin.model.get_submodule(entry.path)
    names = dict(written.names)
    exec(compile(written.source, "<se_inject.generated to compare>", "exec"), names)  # noqa: S102  our own code
    replacement = types.MethodType(names[entry.method], owner)  # type: ignore[arg-type]
    known: Known = {}
    with twin.mode:
        others = [_vary(call, height, width) for height, width in ((2, 3), (2, 2), (1, 1))]
        lower = _lower(call)
    modes = [(lower, training, True), (call, training, False), (call, False, False)]
    for tries in (modes, [(other, False, False) for other in others]):
        for tried, mode, autocast in tries:
            account = functools.partial(
                take_account, twin, owner, call=tried, known=known, training=mode, autocast=autocast
            )
            original = account(getattr(owner, entry.method))
            if account(replacement) != original:
                return "its code does something that the graph of torch.fx does not"
            if original is not None:
                break  # else it does not run that way
    return ""


def _vary(call: Call, height: int, width: int) -> Call:
    """Make a call with more images, and with maps that are so many times larger."""

    def vary(x: object) -> object:
        if not isinstance(x, Tensor) or not x.ndim:
            return x
        channels = find_channel_dim(x)
        last = max((i for i in range(1, x.ndim) if i != channels), default=0)
        shape = list(x.shape)
        for i in range(1, x.ndim) if channels is not None else ():
            shape[i] *= 1 if i == channels else width if i == last else height
        shape[0] = shape[0] * 3 // 2 if shape[0] % 2 == 0 else shape[0] * 3
        return x.new_empty(shape)

    return Call(*tree_map(vary, (call.args, call.kwargs)))


def _lower(call: Call) -> Call:
    """Make a call as it is under autocast, with maps that are laid out channels-last."""

    def lower(x: object) -> object:
        if not is_map(x):
            return x
        layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        return x.to(torch.bfloat16).contiguous(memory_format=layout)

    return Call(*tree_map(lower, (call.args, call.kwargs)))
