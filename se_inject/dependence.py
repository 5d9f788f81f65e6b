"""Dependence: how far the images want gates of their own.

Takes an injected network and batches that it is about to be trained on, gives one number. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from se_inject.block import SqueezeExcite
from se_inject.world import World

FEWEST = 128
"""Images below which nothing is said: shuffled pairs explain up to 0.5 % of 64 images, and 0.2 % of 128."""
_RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)


def measure_dependence(
    model: nn.Module,
    own: Mapping[str, SqueezeExcite],
    batches: Iterable[tuple[Tensor, Tensor]],
    world: World,
    *,
    temperature: float,
    compute: Callable[[], Any],
) -> float:
    """Measure which part of what the loss wants of each image's gates follows from what the blocks see of it.

    The gradient of an image's loss with respect to its gates says which channels should be stronger and which weaker.
    What all images have in common there, a weight of the network can do as well. The rest differs from image to image;
    gates can do that part of it which follows from the squeezed map. It is measured by ridge regression of the rest on
    the squeezed map, made from one half of the images and tried on the other, and the other way round.

    Args:
        model: In the mode in which it is to be measured; no gradient of it is kept.
        own: Its blocks by path.
        batches: Images (N, C, H, W) and labels (N,); images with negative labels are left out.
        world: The processes that train together, each with images of its own.
        temperature: Outputs are divided by it.
        compute: Makes the context in which the network runs, such as autocast.

    Returns:
        The share of the variance that is explained, its mean over the blocks; 0 with fewer than `FEWEST` images, or
        where the loss is no finite number.
    """
    squeezed: dict[str, list[Tensor]] = {path: [] for path in own}
    wanted: dict[str, list[Tensor]] = {path: [] for path in own}
    for images, labels in batches:
        with _noting(own) as notes, compute():
            outputs = model(images)
        known = labels >= 0
        loss = F.cross_entropy(outputs[known].float() / temperature, labels[known], reduction="sum")
        # A block that was run twice, or on parts of images, tells nothing of one image.
        ran = {path: note for path, note in notes.items() if [len(each) for each in note.excited] == [len(labels)]}
        if not ran:
            continue
        excited = [note.excited[0] for note in ran.values()]
        gradients = torch.autograd.grad(loss, excited, materialize_grads=True)  # zeros where nothing comes of a block
        everywhere = world.gather(labels) >= 0
        for (path, note), gradient in zip(ran.items(), gradients, strict=True):
            squeezed[path].append(_collect(note.squeezed[0], everywhere, world))
            wanted[path].append(_collect(gradient, everywhere, world))
    pairs = [(torch.cat(squeezed[path]), torch.cat(wanted[path])) for path in own if squeezed[path]]
    explained = [_explain(*pair) for pair in pairs if len(pair[0]) >= FEWEST]
    return max(0.0, float(torch.stack(explained).mean(0).max())) if explained else 0.0


@dataclass
class _Notes:
    """What the two layers of a block were handed and gave, call by call: (N, C, 1, 1) each."""

    squeezed: list[Tensor] = field(default_factory=list)
    excited: list[Tensor] = field(default_factory=list)


@contextmanager
def _noting(own: Mapping[str, SqueezeExcite]) -> Iterator[dict[str, _Notes]]:
    """Note what goes into blocks and what their gates are made of, for as long as the context lasts."""
    notes = {path: _Notes() for path in own}
    with ExitStack() as stack:
        for path, block in own.items():

            def squeeze(_: nn.Module, args: tuple[Tensor, ...], note: _Notes = notes[path]) -> None:
                note.squeezed.append(args[0].detach())

            def excite(_: nn.Module, __: object, excited: Tensor, note: _Notes = notes[path]) -> Tensor:
                if not excited.requires_grad:  # the block is frozen
                    excited = excited.detach().requires_grad_()
                note.excited.append(excited)
                return excited

            stack.callback(block.fc1.register_forward_pre_hook(squeeze).remove)
            stack.callback(block.fc2.register_forward_hook(excite).remove)
        yield notes


def _collect(values: Tensor, is_known: Tensor, world: World) -> Tensor:
    """Collect values (N, C, 1, 1) from all processes, as (known images of all, C)."""
    return world.gather(values.flatten(1))[is_known].float().cpu()


def _explain(inputs: Tensor, targets: Tensor) -> Tensor:
    """Explain targets (N, K) by inputs (N, C); gives the share of the variance of other images, one for each ridge."""
    inputs = (inputs - inputs.mean(0)) / inputs.std(0).clamp_min(1e-12) / inputs.shape[1] ** 0.5
    ridges = torch.tensor(_RIDGES, dtype=inputs.dtype)
    shares = []
    for learned, tried in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        known, center = inputs[learned], targets[learned].mean(0)
        systems = known @ known.T + len(known) * ridges[:, None, None] * torch.eye(len(known))
        factors = torch.linalg.cholesky_ex(systems).L  # raises nothing where numbers are not finite
        weights = torch.cholesky_solve(targets[learned] - center, factors)
        guesses = inputs[tried] @ known.T @ weights
        rest = targets[tried] - targets.mean(0)
        whole = rest.square().sum()
        shares.append((whole - (rest - guesses).square().sum((1, 2))) / whole.clamp_min(1e-30))
    return torch.stack(shares).mean(0)
