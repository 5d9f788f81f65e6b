"""Validation: the images that a network is scored on, again and again.

Takes an opened network and the name of a data set, gives a `Validation`, whose `score` gives top-1 and the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from se_inject.datasets import Data, open_data
from se_inject.errors import DataError, OptionError
from se_inject.heads import count_outputs
from se_inject.loaders import EvalLoader
from se_inject.provenance import Source
from se_inject.scores import Scores, evaluate
from se_inject.start import read_model_format
from se_inject.world import World

CACHE = 2**30
"""Bytes that decoded images may take where they are gone over many times."""

OpenModel = Callable[[], tuple[nn.Module, Source | None]]


@dataclass(frozen=True)
class Validation:
    """Images with labels that a network is scored on.

    Attributes:
        data: Where they come from, and the classes.
        loader: Gives them in batches.
        world: The device, and the processes that share them.
        num_classes: Outputs of the network.
        temperature: Outputs are divided by it in the loss.
    """

    data: Data
    loader: EvalLoader
    world: World
    num_classes: int
    temperature: float = 1.0

    def score(self, model: nn.Module, *, on_batch: Callable[[Tensor], None] = lambda _: None) -> Scores:
        """Classify all images.

        Args:
            model: With as many outputs as there are classes, on the world's device.
            on_batch: Is called with the labels (N,) of each batch that is done.

        Raises:
            DataError: More images than allowed cannot be read.
            OptionError: The batch does not fit into memory.
        """
        return evaluate(
            model, self.loader, self.world, num_classes=self.num_classes, classes=self.data.classes,
            temperature=self.temperature, on_batch=on_batch,
        )  # fmt: skip

    def list_unreadable(self) -> list[str]:
        """List the paths of images that could not be read."""
        return self.loader.bad.list_names()


def open_validation(
    open_model: OpenModel,
    data: Mapping[str, Any],
    world: World,
    *,
    batch_size: int,
    workers: int,
    input_size: int | None,
    max_bad: int,
    cache: int = 0,
) -> tuple[nn.Module, Source | None, Validation]:
    """Open a network and the validation images of a data set.

    Args:
        open_model: Opens the network and its source; it is called once the data is found.
        data: Arguments of `open_data`.
        world: The device, and the processes that share the images.
        batch_size: Images at once.
        workers: Processes that read images.
        input_size: Height and width of the images; the network's own if None.
        max_bad: How many unreadable images are skipped.
        cache: Bytes that the decoded images may take in memory, where they are gone over many times.

    Returns:
        The network, on the world's device; its source; and the images.

    Raises:
        DataError: The data is not what the network was made for.
        OptionError: The batch size is below 1.
    """
    if batch_size < 1:
        raise OptionError(f"--batch-size is {batch_size}; it must be at least 1")
    opened = open_data(**data, is_evaluation=True)
    model, source = open_model()
    form = read_model_format(model, source, input_size)
    if form.mode != "RGB":
        opened = open_data(**data, is_evaluation=True, mode=form.mode)
    model = model.to(world.device)
    num_classes = count_outputs(model, form.size)
    if not opened.is_labelled:
        raise DataError(f"the images of {opened.origin} have no labels; a network is scored on images that have them")
    if opened.num_classes != num_classes:
        raise DataError(
            f"{opened.origin} has {opened.num_classes} classes and the network {num_classes}: labels would mean others"
        )
    if source is not None and source.names_others(opened.classes or ()):
        pairs = zip(source.classes, opened.classes or (), strict=False)
        own, given = next(pair for pair in pairs if pair[0] != pair[1])
        raise DataError(
            f"{opened.origin} has the class {given} where the network has {own}: labels would mean others; give images "
            f"of the {num_classes} classes that it was tuned on"
        )
    loader = EvalLoader(
        opened.val, form, batch_size=batch_size, workers=workers, world=world, max_bad=max_bad,
        num_classes=num_classes, cache=cache,
    )  # fmt: skip
    return model, source, Validation(opened, loader, world, num_classes)
