"""Trials: the calls that a program is tried on, and how its outputs are compared with the network's.

Takes a call and what a program leaves open, gives calls with random tensors of several sizes. Changes no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from se_inject.calls import Call
from se_inject.errors import ExportError, OptionError
from se_inject.examples import describe_shapes
from se_inject.faithful import list_inside
from se_inject.programs import Freedom, list_tensors
from se_inject.twin import get_device, get_dtype

TOLERANCE = 1e-4
"""How far outputs may lie apart, relative to the largest: runtimes add in other orders. Types of 16 bits get more."""


def draw_call(
    call: Call, model: nn.Module, *, batch: int | None = None, input_size: int | None = None, grow: Sequence[int] = ()
) -> Call:
    """Draw the tensors of a call from the standard normal distribution, the same ones each time; integers are zero."""
    if input_size is not None and (input_size < 1 or all(x.ndim != 4 for x in list_tensors(call))):
        raise OptionError(f"the input size is {input_size}; it goes with images (N, C, H, W) and must be at least 1")
    generator = torch.Generator().manual_seed(0)

    def draw(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        shape = list(x.shape)
        if batch is not None:
            shape[0] = batch
        if input_size is not None and x.ndim == 4:
            shape[2:] = [input_size, input_size]
        shape[2:] = [size + more for size, more in zip_longest(shape[2:], grow[: len(shape[2:])], fillvalue=0)]
        drawn = torch.randn(shape, generator=generator) if x.is_floating_point() else torch.zeros(shape)
        return drawn.to(get_device(model), x.dtype)

    return Call(*tree_map(draw, (call.args, call.kwargs)))


def draw_trials(call: Call, model: nn.Module, freedom: Freedom, *, num_images: int) -> list[Call]:
    """Draw what a network is exported on, and then what the program is tried on."""
    are_alike = len({x.shape[:1] for x in list_tensors(call)}) == 1
    if freedom.batch and not are_alike:
        raise ExportError("its inputs differ in their first dimension")
    fixed = num_images if are_alike else None
    batches = (2, 1, 3) if freedom.batch else (fixed, fixed, fixed)
    trials = [draw_call(call, model, batch=batch) for batch in batches[: 3 if freedom.batch else 2]]
    if not freedom.size:
        return trials
    # Small images end in maps of one pixel, which torch takes for a constant: it is exported on larger ones.
    larger = draw_sizes(call, model, batches[0], [(64, 96, 32), (32, 0, 64), (7, 3, 5)])
    if not larger:
        raise ExportError("the network takes no other size")
    return [*larger, *trials]


def draw_smaller(call: Call, model: nn.Module) -> list[Call]:
    """Draw smaller images than those of a call, which a program may refuse; the last ones have half the size."""
    half = tuple(-(size // 2) for size in max((x.shape[2:] for x in list_tensors(call)), key=len))
    return draw_sizes(call, model, None, [(-9, -2, -4), (-32, 32, 0), half])


def draw_sizes(call: Call, model: nn.Module, batch: int | None, sizes: Iterable[tuple[int, ...]]) -> list[Call]:
    """Draw images that are larger by so many pixels, as far as the network runs on them."""
    drawn = []
    for grow in sizes:
        try:
            trial = draw_call(call, model, batch=batch, grow=grow)
            run_call(model, trial)
        except (RuntimeError, ValueError, AssertionError):
            continue
        drawn.append(trial)
    return drawn


def run_call(model: Callable[..., object], call: Call) -> object:
    """Run a network or a program, on copies of the tensors, which it may change."""
    args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (call.args, call.kwargs))
    return model(*args, **kwargs)


def compare_outputs(run: Callable[..., object], reference: nn.Module, trials: Iterable[Call]) -> float:
    """Compute the largest difference of outputs, relative to the largest output.

    Raises:
        ExportError: It is above what rounding explains, or there is nothing to be compared.
    """
    tolerance = max(TOLERANCE, 8 * torch.finfo(get_dtype(reference)).eps)
    largest = 0.0
    for trial in trials:
        found, expected = (_list_outputs(run_call(model, trial)) for model in (run, reference))
        given = f"on an input of {describe_shapes(trial)}"
        if not any(x.isfinite().any() for x in expected) and (not expected or any(x.numel() for x in expected)):
            raise ExportError(f"{type(reference).__name__} gives no numbers {given} that could be compared")
        are_alike = [x.shape for x in found] == [x.shape for x in expected]
        difference = max(map(_measure, found, expected)) if are_alike else float("inf")
        if difference > tolerance:
            raise ExportError(f"outputs differ by {difference:.1g} of the largest {given}")
        largest = max(largest, difference)
    return largest


def _list_outputs(outputs: object) -> list[Tensor]:
    """List the tensors of a network's outputs, in objects too, in double precision."""
    leaves = ([leaf] if isinstance(leaf, Tensor) else list_inside([leaf]) for leaf in tree_leaves(outputs))
    parts = (torch.view_as_real(x) if x.is_complex() else x for leaf in leaves for x in leaf)
    return [x.detach().cpu().double() for x in parts]


def _measure(found: Tensor, expected: Tensor) -> float:
    """Measure the largest difference; what both give as the same infinity, or as no number, is the same."""
    is_same = (found == expected) | (found.isnan() & expected.isnan())
    if is_same.all():
        return 0.0
    difference = (found - expected)[~is_same].abs().max()
    largest = expected.where(expected.isfinite(), 0).abs().max().clamp_min(1e-30)
    return float("inf") if difference.isnan() else (difference / largest).item()
