"""Observation: one pass over validation images that scores a network and sees what its gates do.

Takes an injected network and a `Validation`, gives `Seen`. Other modules may stand in for some blocks for the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from se_inject.block import SqueezeExcite
from se_inject.errors import ModelError
from se_inject.gate_statistics import BlockGates, GateTally
from se_inject.gates import Passed, get_own_blocks, swap_blocks, watch_gates
from se_inject.reading import UNREADABLE
from se_inject.reduction import Moments
from se_inject.scores import Scores
from se_inject.validation import Validation


@dataclass(frozen=True)
class Seen:
    """What a pass showed.

    Attributes:
        scores: How well the network classifies.
        gates: Of the blocks that ran, in the order in which they did.
        moments: Of their hidden activations.
    """

    scores: Scores
    gates: Mapping[str, BlockGates]
    moments: Mapping[str, Moments]


def observe(
    model: nn.Module,
    validation: Validation,
    stand_ins: Mapping[str, nn.Module] | None = None,
    *,
    on_batch: Callable[[Mapping[str, Passed], Tensor], None] = lambda *_: None,
) -> Seen:
    """Run a network once over the images.

    Args:
        model: An injected network; it is left as it is.
        validation: The images.
        stand_ins: Modules in the places of blocks, by their paths; a `SqueezeExcite` is seen as a block is.
        on_batch: Is called with what the blocks did and the labels (N,) after each batch.

    Raises:
        ModelError: The network has no blocks of ours.
        DataError: There are no images, or they cannot be read.
    """
    own = get_own_blocks(model)
    with swap_blocks(model, stand_ins or {}):
        modules = {path: model.get_submodule(path) for path in own}
        present = {path: module for path, module in modules.items() if isinstance(module, SqueezeExcite)}
        tally = GateTally(present, validation.num_classes)
        moments = {path: Moments.start(block) for path, block in present.items()}
        with watch_gates(present) as watch:

            def note(labels: Tensor) -> None:
                passed = watch.take(len(labels))
                if passed:
                    tally.add(passed, labels)
                for path, each in passed.items():
                    moments[path].add(each.hidden[labels > UNREADABLE])
                on_batch(passed, labels)

            scores = validation.score(model, on_batch=note)
    has_run = any(each.num for each in moments.values())
    if validation.loader.num_images and not has_run:  # all gates are fixed, or the rest of the blocks did not run
        return Seen(scores, {}, moments)
    return Seen(scores, tally.summarise(), moments)


def check_trained(model: nn.Module, gates: Mapping[str, BlockGates]) -> None:
    """Refuse a network whose gates are all 1.

    Raises:
        ModelError: They are, or none of its blocks ran.
    """
    if not gates:
        raise ModelError(f"none of the blocks of {type(model).__name__} ran on these images; there are no gates to see")
    if all(block.is_identity for block in gates.values()):
        raise ModelError(
            f"every gate of {type(model).__name__} is 1 for every image: its {len(gates)} blocks were never trained or "
            f"stand on branches that are zero; fine-tune it first, as with se-inject finetune"
        )
