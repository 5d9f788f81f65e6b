"""Gates: watch them while an injected network runs, and fix them.

Takes an injected network, gives what its blocks do with each batch; or runs it with gates that are the same for every
image. Nothing is left on the network.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.block import SqueezeExcite
from se_inject.errors import ModelError
from se_inject.identity import find_difference
from se_inject.rewrite import blocks, find_plan, get_plan, refuse_empty


@dataclass(frozen=True)
class Passed:
    """What a block did with the images of a batch.

    Attributes:
        hidden: (N, hidden), what its second layer is handed.
        gate: (N, C).
    """

    hidden: Tensor
    gate: Tensor


@dataclass
class Watch:
    """The gates of the batch that a network was run on last."""

    _calls: dict[str, list[Passed]] = field(default_factory=dict)

    def note(self, path: str, block: SqueezeExcite, args: tuple[Tensor, ...], excited: Tensor) -> None:
        """Note what a block's second layer was handed and gave."""
        passed = Passed(args[0].detach().flatten(1), block.activate(excited.detach().flatten(1)))
        self._calls.setdefault(path, []).append(passed)

    def take(self, num_images: int) -> dict[str, Passed]:
        """Take what the blocks did since the last time, in the order in which they ran; the mean where it was twice.

        Raises:
            ModelError: A block did not run once an image.
        """
        taken = {}
        for path, calls in self._calls.items():
            if wrong := [len(call.gate) for call in calls if len(call.gate) != num_images]:
                raise ModelError(f"{path} has {wrong[0]} gates for {num_images} images; expected one an image")
            if len(calls) == 1:
                taken[path] = calls[0]
                continue
            hidden = torch.stack([call.hidden for call in calls]).mean(0)
            gate = torch.stack([call.gate for call in calls]).mean(0)
            taken[path] = Passed(hidden, gate)
        self._calls.clear()
        return taken


@contextmanager
def watch_gates(blocks: Mapping[str, SqueezeExcite]) -> Iterator[Watch]:
    """Watch the gates of blocks, by their paths, while the network that holds them is run."""
    watch = Watch()
    with ExitStack() as stack:
        for path, block in blocks.items():

            def note(_: nn.Module, args: Any, excited: Tensor, path: str = path, block: SqueezeExcite = block) -> None:
                watch.note(path, block, args, excited)

            stack.callback(block.fc2.register_forward_hook(note).remove)
        yield watch


def get_own_blocks(model: nn.Module) -> dict[str, SqueezeExcite]:
    """Return the squeeze-and-excitation blocks of an injected network by path, other attentions left out.

    Raises:
        ModelError: There is none, or the network is optimized.
    """
    get_plan(model)
    refuse_empty(model)
    own = {path: block for path, block in blocks(model).items() if isinstance(block, SqueezeExcite)}
    if not own:
        found = sorted({type(block).__name__ for block in blocks(model).values()})
        others = f"; its blocks are {', '.join(found)}" if found else ""
        raise ModelError(
            f"{type(model).__name__} has no squeeze-and-excitation block whose gates could be seen{others}"
        )
    return own


def is_fresh(model: nn.Module) -> bool:
    """Tell whether all blocks of an injected network are exact identities still; another attention is run to see.

    A network without a block is not fresh: its weights carry what its blocks had learned.
    """
    found, plan = blocks(model), find_plan(model)
    present = [site for site in (() if plan is None else plan.sites) if site.path in found]
    return bool(present) and all(_is_identity(found[site.path], site.channels) for site in present)


def _is_identity(block: nn.Module, channels: int) -> bool:
    if isinstance(block, SqueezeExcite):
        return not block.fc2.weight.any() and (block.fc2.bias is None or not block.fc2.bias.any())
    return not find_difference(copy.deepcopy(block).cpu(), channels)


@contextmanager
def fix_gates(model: nn.Module, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Run a network with some blocks' gates the same for every image, for as long as the context lasts.

    Args:
        model: An injected network.
        gates: (C,) by the paths of the blocks.
    """
    own = get_own_blocks(model)
    with swap_blocks(model, {path: FixedGate(own[path], gate) for path, gate in gates.items()}):
        yield


@contextmanager
def swap_blocks(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the places of some blocks, for as long as the context lasts."""
    own = blocks(model)
    by_block = {id(own[path]): module for path, module in replacements.items()}
    places = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if id(child) in by_block
    ]
    try:
        for module, name, child in places:
            setattr(module, name, by_block[id(child)])
        yield
    finally:
        for module, name, child in places:
            setattr(module, name, child)


class FixedGate(nn.Module):
    """Scales maps as a block does, but by one gate for all images.

    Args:
        block: Whose place it takes.
        gate: (C,).
    """

    def __init__(self, block: SqueezeExcite, gate: Tensor) -> None:
        super().__init__()
        self._scale = block.scale
        self.register_buffer("gate", gate.to(block.fc1.weight)[None])

    def forward(self, *maps: Tensor, shortcut: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Scale the maps; the shapes are those of the block."""
        return self._scale(self.get_buffer("gate"), *maps, shortcut=shortcut)
