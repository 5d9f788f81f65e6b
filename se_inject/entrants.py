"""Entrants: the networks that are measured side by side, as they are and optimized, on one device and with images.

Takes networks by name, gives copies that are ready to run. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from se_inject.errors import ExampleError, ModelError, OptionError
from se_inject.optimization import optimize
from se_inject.rewrite import copy_model
from se_inject.timing import Conditions
from se_inject.twin import get_dtype

PLAIN, PLAIN_OPTIMIZED, INJECTED, OPTIMIZED = "plain", "plain, optimized", "injected", "optimized"


@dataclass(frozen=True)
class Entrant:
    """A network that is measured, and what it is given.

    Attributes:
        name: Of its row.
        base: Of the row that it is compared to.
        model: On its device and in eval mode.
        images: (N, C, H, W), of the network's own floating-point type.
        trains: Whether steps of training are measured too.
    """

    name: str
    base: str
    model: nn.Module
    images: Tensor
    trains: bool


def prepare_entrants(
    networks: Mapping[str, nn.Module], shape: tuple[int, ...], conditions: Conditions
) -> Iterator[Entrant]:
    """Prepare networks, each as it is and then optimized, which waits until the former was seen to run.

    Args:
        networks: "plain" first, then others by name, on the CPU. They are copied.
        shape: (N, C, H, W) of the input.
        conditions: How they are run.

    Raises:
        ModelError: A network cannot be copied or optimized.
        OptionError: The images do not fit the layout or into memory.
        ExampleError: A network does not run on the input.
    """
    example = torch.empty(2, *shape[1:], device="meta")
    drawn: dict[torch.dtype, Tensor] = {}
    for name, network in networks.items():
        dtype = get_dtype(network)
        if dtype not in drawn:
            drawn[dtype] = _draw_images(shape, dtype, conditions)
        images = drawn[dtype]
        yield Entrant(name, PLAIN, _place(copy_model(network), conditions), images, trains=True)
        try:
            optimized = optimize(network, example)
        except (ModelError, ExampleError) as error:
            raise type(error)(f"{name} cannot be optimized: {error}") from error
        yield Entrant(name_optimized(name), PLAIN_OPTIMIZED, _place(optimized, conditions), images, trains=False)


def name_optimized(name: str) -> str:
    """Name the row of what a network becomes when it is optimized."""
    return OPTIMIZED if name == INJECTED else f"{name}, optimized"


def _draw_images(shape: tuple[int, ...], dtype: torch.dtype, conditions: Conditions) -> Tensor:
    if conditions.channels_last and len(shape) != len("NCHW"):
        raise OptionError(
            f"--channels-last is for inputs (N, C, H, W), and the network takes one of shape {shape}; leave it out"
        )
    layout = torch.channels_last if conditions.channels_last else torch.contiguous_format
    try:
        images = torch.empty(shape, dtype=dtype, device=conditions.device, memory_format=layout)
    except (MemoryError, RuntimeError, TypeError) as error:  # the latter two of numbers that torch cannot count to
        raise refuse_size(shape) from error
    return images.normal_(generator=torch.Generator(conditions.device).manual_seed(0))


def refuse_size(shape: tuple[int, ...]) -> OptionError:
    """Make the error that says that images are too many or too large."""
    return OptionError(f"out of memory with images of shape {shape}; try a smaller --batch or a smaller --input-size")


def _place(model: nn.Module, conditions: Conditions) -> nn.Module:
    placed = model.to(conditions.device).eval()
    return placed.to(memory_format=torch.channels_last) if conditions.channels_last else placed
