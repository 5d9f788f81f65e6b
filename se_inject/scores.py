"""Scores: how well a network classifies the images of a set.

Takes a network and batches, gives `Scores`: top-1, top-5, accuracy by class and the confusion matrix, over all
processes together with each image counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from se_inject.errors import DataError, OptionError, SEInjectError
from se_inject.loaders import EvalLoader
from se_inject.reading import UNREADABLE
from se_inject.twin import set_training
from se_inject.world import World

_TOP = 5
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
_NO_STATISTICS = "expected more than 1 value per channel"


@dataclass(frozen=True)
class Scores:
    """How well a network classifies.

    Attributes:
        confusion: Counts (classes, classes): row is the image's class, column the network's answer.
        num_top5: Images whose class is among the five most probable answers.
        loss: Mean cross-entropy.
        hits: Whether each image was classified right, (images,), in the order of the set; 2 where there was none to
            classify (unreadable, or without label). None for a stream, whose order is not fixed.
        classes: Names of the classes, if known.
    """

    confusion: Tensor
    num_top5: int
    loss: float
    hits: Tensor | None = None
    classes: tuple[str, ...] | None = None

    @property
    def num_images(self) -> int:
        """How many images were classified."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Accuracy in per cent."""
        return 100 * int(self.confusion.diagonal().sum()) / max(1, self.num_images)

    @property
    def top5(self) -> float:
        """Images whose class is among the five most probable answers, in per cent."""
        return 100 * self.num_top5 / max(1, self.num_images)

    def list_per_class(self) -> dict[str, float | None]:
        """List the accuracy of each class in per cent; None for one without images."""
        counts = self.confusion.sum(1).tolist()
        right = self.confusion.diagonal().tolist()
        names = self.classes or tuple(str(i) for i in range(len(counts)))
        return {name: 100 * hit / num if num else None for name, hit, num in zip(names, right, counts, strict=True)}

    def to_values(self) -> dict[str, Any]:
        """Turn into plain values."""
        return {
            "num_images": self.num_images,
            "loss": self.loss,
            "top1": self.top1,
            "top5": self.top5,
            "per_class": self.list_per_class(),
            "confusion": self.confusion.tolist(),
        }


def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    world: World,
    *,
    num_classes: int,
    classes: tuple[str, ...] | None = None,
    teacher: nn.Module | None = None,
    temperature: float = 1.0,
    compute: Callable[[], Any] | None = None,
    on_batch: Callable[[Tensor], None] = lambda _: None,
    quoting: AbstractContextManager[None] | None = None,
) -> Scores:
    """Classify the images of a set, each once.

    Args:
        model: Is put into eval mode for the time, and on the world's device.
        loader: The images.
        world: The processes among which they are shared.
        num_classes: Outputs of the network.
        classes: Their names.
        teacher: Gives the labels, where the images have none.
        temperature: Outputs are divided by it in the loss.
        compute: Makes the context in which the network runs, such as autocast.
        on_batch: Is called with the labels (N,) of each batch that is done; they are negative where there are none.
        quoting: Says which option sets the batch size; by default it is --batch-size.

    Raises:
        DataError: Labels are beyond the outputs, or more images than allowed cannot be read.
        OptionError: The batch does not fit into memory; the message says which to try.
    """
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=world.device)
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)  # loss, top-5
    hits = None if loader.is_stream else torch.full((loader.num_images,), 0, dtype=torch.int64, device=world.device)
    place = world.rank
    with set_training(model, False), torch.no_grad(), quoting or quote_batch_size("--batch-size", loader.batch_size):
        for images, labels in loader:
            with compute() if compute else torch.no_grad():
                targets = labels
                if teacher is not None:  # a network may change what it is handed
                    targets = torch.where(labels == UNREADABLE, labels, teacher(images.clone()).argmax(1))
                outputs = check_outputs(model(images), num_classes)
            num, outputs = len(images), outputs.float()
            answers = outputs.topk(min(_TOP, num_classes), 1).indices
            if hits is not None:
                places = torch.arange(place, place + num * world.size, world.size, device=world.device)
                hits[places] = torch.where(targets < 0, 2, (answers[:, 0] == targets).long())
                place += num * world.size
            outputs, answers, targets = (x[targets >= 0] for x in (outputs, answers, targets))
            if len(targets) and int(targets.max()) >= num_classes:
                raise DataError(f"an image has the label {int(targets.max())}, the network has {num_classes} classes")
            sums[0] += F.cross_entropy(outputs / temperature, targets, reduction="sum").double()
            sums[1] += (answers == targets[:, None]).any(1).sum()
            pairs = targets * num_classes + answers[:, 0]
            confusion.view(-1).index_add_(0, pairs, torch.ones_like(pairs))
            on_batch(labels)
    loader.bad.share(world)
    loader.bad.check()
    world.add_up(confusion)
    world.add_up(sums)
    if hits is not None:
        world.add_up(hits)
    num = max(1, int(confusion.sum()))
    return Scores(confusion.cpu(), int(sums[1]), float(sums[0]) / num, None if hits is None else hits.cpu(), classes)


def check_outputs(outputs: object, num_classes: int) -> Tensor:
    """Return what a network gives, if it is scores (N, classes).

    Raises:
        DataError: It is something else.
    """
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise DataError(f"the network gives {shape}; expected scores (N, classes), it must be a classifier")
    if outputs.shape[1] != num_classes:
        raise DataError(f"the network gives {outputs.shape[1]} scores for {num_classes} classes")
    return outputs


@contextmanager
def quote_batch_size(option: str, batch_size: int) -> Iterator[None]:
    """Turn a batch that is too large for memory, or too small for batch norms, into one line with what to try.

    Args:
        option: What sets it: an option as in "--batch-size", or else a key of the recipe, as in "batch_size".
        batch_size: What it is now.

    Raises:
        OptionError: Memory ran out, or a batch norm that is trained got one value a channel.
    """
    name = option.removeprefix("--")

    def write(size: int) -> str:
        return f"{option} {size}" if option.startswith("--") else f"--set {name}={size}"

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        setting = write(batch_size // 2) if batch_size > 1 else "a smaller --input-size"
        raise OptionError(f"out of memory with {name} {batch_size}; try {setting}") from error
    except ValueError as error:
        if option.startswith("--") or not lacks_statistics(error):
            raise  # no batch norm is trained where an option says the batch size
        raise OptionError(
            f"with {name} {batch_size} a batch norm gets one value a channel, of which it cannot take statistics; try "
            f"{write(2 * batch_size)}, --set batch_norm=frozen or a larger --input-size"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is that memory ran out, on a GPU or beside one."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    is_torchs = isinstance(error, RuntimeError) and not isinstance(error, SEInjectError)
    return is_torchs and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def lacks_statistics(error: BaseException) -> bool:
    """Tell whether an error is that a batch norm that is trained got one value a channel."""
    return isinstance(error, ValueError) and str(error).lower().startswith(_NO_STATISTICS)
