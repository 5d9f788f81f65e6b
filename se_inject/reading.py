"""Reading: the images of a set one by one, each augmented with random numbers of its own, the broken ones noted.

Takes a set of `datasets` and a transform, gives images by epoch and index.
"""

from __future__ import annotations

import os
import random
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from se_inject.contents import count_images, get_name
from se_inject.errors import DataError
from se_inject.formats import IMAGE_ERRORS, Transform, convert_image
from se_inject.world import World

NO_LABEL, UNREADABLE = -1, -2
_NUM_SHOWN = 5

Key = tuple[int, int]
"""An epoch and the index of an image."""


class Bad(ABC):
    """What could not be read, noted by all workers.

    Args:
        limit: How much of it is skipped.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit

    @abstractmethod
    def list_names(self) -> list[str]:
        """List the names of what could not be read."""

    @abstractmethod
    def note_names(self, names: Collection[str]) -> None:
        """Note again what a run noted before it was interrupted."""

    @abstractmethod
    def share(self, world: World) -> None:
        """Tell all processes what each of them has noted; all of them must call it."""

    def check(self) -> None:
        """Refuse to go on if there are more than the limit.

        Raises:
            DataError: There are; the message names the first ones.
        """
        names = self.list_names()
        num = len(names)
        if num > self.limit:
            shown = ", ".join(names[:_NUM_SHOWN]) + (", ..." if num > _NUM_SHOWN else "")
            images = "1 image" if num == 1 else f"{num} images"
            raise DataError(
                f"{images} cannot be read, at most {self.limit} are skipped: {shown}; mend or remove, or allow more "
                f"with --max-bad {num}"
            )


class BadImages(Bad):
    """What of a set of images could not be read, in memory that the workers share."""

    def __init__(self, images: Dataset[Any], limit: int) -> None:
        super().__init__(limit)
        self._images = images
        self._flags = torch.zeros(count_images(images), dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]

    def note(self, index: int) -> None:
        """Note that an image cannot be read."""
        self._flags[index] = 1

    def note_names(self, names: Collection[str]) -> None:
        """Find the images of these paths, and note them."""
        for i in range(len(self._flags)) if names else ():
            if get_name(self._images, i) in names:
                self.note(i)

    def list_names(self) -> list[str]:
        """List their paths, in the order of the set."""
        return [get_name(self._images, i) for i in self._flags.nonzero().flatten().tolist()]

    def share(self, world: World) -> None:
        """Add the flags of all processes up."""
        if world.size > 1:
            self._flags |= world.add_up(self._flags.to(world.device, torch.int64)).clamp_max(1).to("cpu", torch.uint8)


class BadSamples(Bad):
    """What of a stream could not be read, in a file that the workers share; a broken tar file counts as one."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        handle, name = tempfile.mkstemp(prefix="se-inject-")
        os.close(handle)
        self._path = Path(name)
        weakref.finalize(self, _remove, self._path, os.getpid())

    def note(self, name: str) -> None:
        """Note that a sample, or a file, cannot be read."""
        self._append([name])

    def note_names(self, names: Collection[str]) -> None:
        """Note all of them."""
        self._append(list(names))

    def list_names(self) -> list[str]:
        """List tar files and samples in them, each once, however often it was read."""
        with self._path.open(encoding="utf-8", errors="surrogateescape") as file:
            return sorted(set(file.read().splitlines()))

    def share(self, world: World) -> None:
        """Take over the names of all processes."""
        if world.size > 1:
            own = self.list_names()
            self._append(sorted({name for names in world.collect(own) for name in names} - set(own)))

    def _append(self, names: list[str]) -> None:
        with self._path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(" ".join(name.split()) + "\n" for name in names)


def _remove(path: Path, owner: int) -> None:
    """Remove a file, unless this is a worker, which has a copy of what belongs to another process."""
    if os.getpid() == owner:
        path.unlink(missing_ok=True)


class Images(Dataset[Any]):
    """The images of a set by (epoch, index), each augmented with random numbers of its own.

    One that cannot be read is noted; in training the next one takes its place, in validation it has no label.
    """

    def __init__(
        self, images: Dataset[Any], transform: Transform, bad: BadImages, mode: str, seed: int,
        *, is_training: bool, num_classes: int,
    ) -> None:  # fmt: skip
        self._images, self._transform, self._bad, self._mode = images, transform, bad, mode
        self._seed, self._is_training, self._num_classes = seed, is_training, num_classes
        self._size = count_images(images)

    def __getitem__(self, key: Key) -> tuple[Any, int]:
        epoch, index = key
        if self._is_training:
            seed_all(self._seed, epoch, index)
        for attempt in range(self._size):
            place = (index + attempt) % self._size
            try:
                image, target = _read(self._images, place, self._mode)
            except IMAGE_ERRORS:
                self._bad.note(place)
                if self._is_training:
                    continue
                image, target = Image.new(self._mode, (8, 8)), UNREADABLE
            if target >= self._num_classes > 0:
                raise refuse_label(target, self._num_classes, get_name(self._images, place))
            return self._transform(image), target
        self._bad.check()
        raise DataError("none of the images can be read")


def _read(images: Dataset[Any], index: int, mode: str) -> tuple[Image.Image, int]:
    """Read an image and its label; of timm's sets without timm's own way of skipping, which names nothing."""
    if isinstance(images, Subset):
        return _read(images.dataset, images.indices[index], mode)
    reader = getattr(images, "reader", None)
    if reader is None:
        image, target, *_ = images[index]
        return convert_image(image, mode), int(target)
    file, target, *_ = reader[index]
    with file, Image.open(file) as image:
        return convert_image(image, mode), NO_LABEL if target is None else int(target)


def refuse_label(label: int, num_classes: int, name: str) -> DataError:
    """Make the error for a label beyond the network's classes."""
    return DataError(f"{name} has the label {label}, the network has {num_classes} classes")


def seed_all(*numbers: int) -> None:
    """Seed Python's, NumPy's and torch's random numbers by a few numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
