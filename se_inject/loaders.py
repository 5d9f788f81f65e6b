"""Loaders: give a network its batches, each a function of the seed, the epoch and the position alone.

Takes the images of `datasets`, gives batches (N, C, H, W) and labels (N,). Every image is augmented with random numbers
of its own, so that neither the number of workers nor that of processes, nor an interruption, changes what is seen.
timm's transforms, collation and prefetching do the work.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from se_inject.datasets import Data, count_images, get_name
from se_inject.errors import DataError
from se_inject.recipe import Recipe
from se_inject.world import World

NO_LABEL = -1
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_UNREADABLE = (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError)
_NUM_SHOWN = 5

Batches = Iterable[tuple[Tensor, Tensor]]
Key = tuple[int, int]
"""An epoch and the index of an image."""


@dataclass(frozen=True)
class InputFormat:
    """What images are turned into for a network.

    Attributes:
        size: (C, H, W).
        mean: Of each channel, of values from 0 to 1.
        std: Likewise.
        crop_pct: The part of an image's shorter side that validation sees.
        interpolation: "bilinear" or "bicubic".
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    crop_pct: float = 1.0
    interpolation: str = "bilinear"

    @property
    def mode(self) -> str:
        """Pillow's name for the colours."""
        return "L" if self.size[0] == 1 else "RGB"

    def to_preprocess(self) -> dict[str, Any]:
        """Write as a `Source` has it, so that `predict` does the same as validation."""
        return {
            "library": "timm",
            "input_size": list(self.size),
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
            "crop_pct": self.crop_pct,
            "crop_mode": "center",
        }


def read_format(
    preprocess: Mapping[str, Any], default_size: tuple[int, ...], *, input_size: int | None, in_chans: int
) -> InputFormat:
    """Read the format from what a `Source` says; where it says nothing, ImageNet's statistics at the default size."""
    values = dict(preprocess)
    if values.get("library") == "torchvision":
        values["input_size"] = [in_chans, values["crop_size"], values["crop_size"]]
        values["crop_pct"] = values["crop_size"] / values["resize_size"]
    size = tuple(values.get("input_size") or default_size)
    crop_pct = float(values.get("crop_pct") or 1.0)
    if input_size is not None:
        size = (in_chans, input_size, input_size)
        crop_pct = crop_pct if preprocess else 1.0
    mean, std = (tuple(values.get(key) or default) for key, default in (("mean", _MEAN), ("std", _STD)))
    if len(mean) != in_chans:
        mean, std = (tuple([sum(x) / len(x)] * in_chans) for x in (mean, std))
    interpolation = values.get("interpolation") or "bilinear"
    return InputFormat((in_chans, *size[-2:]), mean, std, crop_pct, interpolation)


def make_train_transform(form: InputFormat, recipe: Recipe) -> Callable[[Image.Image], Any]:
    """Make the augmentation of a recipe; gives uint8 arrays (C, H, W), which are normalised on the device."""
    jitter: Any = recipe.color_jitter or None
    made: transforms.Compose = create_transform(
        form.size,
        is_training=True,
        scale=recipe.scale,
        ratio=recipe.ratio,
        hflip=recipe.hflip,
        vflip=recipe.vflip,
        color_jitter=jitter,
        auto_augment=recipe.auto_augment or None,
        interpolation=form.interpolation,
        mean=form.mean,
        std=form.std,
        use_prefetcher=True,
    )
    if recipe.crop == "resized":
        return made
    size = form.size[1:]
    first: list[Any] = [transforms.Resize(size, InterpolationMode(form.interpolation))]
    if recipe.crop == "padded":
        first.append(transforms.RandomCrop(size, padding=max(size) // 8))
    return transforms.Compose([*first, *made.transforms[1:]])


def make_eval_transform(form: InputFormat) -> Callable[[Image.Image], Any]:
    """Make the transform of validation: resize, crop the middle."""
    made: transforms.Compose = create_transform(
        form.size,
        crop_pct=form.crop_pct,
        interpolation=form.interpolation,
        mean=form.mean,
        std=form.std,
        use_prefetcher=True,
    )
    return made


class BadImages:
    """What could not be read, noted by all workers in memory that they share.

    Args:
        images: The set.
        limit: How many unreadable images are skipped.
    """

    def __init__(self, images: Dataset[Any], limit: int) -> None:
        self._images, self._limit = images, limit
        self._flags = torch.zeros(count_images(images), dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]

    def note(self, index: int) -> None:
        """Note that an image cannot be read."""
        self._flags[index] = 1

    def list_names(self) -> list[str]:
        """List the paths of what could not be read."""
        return [get_name(self._images, i) for i in self._flags.nonzero().flatten().tolist()]

    def check(self) -> None:
        """Refuse to go on if there are more than the limit.

        Raises:
            DataError: There are; the message names the first ones.
        """
        if int(self._flags.sum()) > self._limit:
            names = self.list_names()
            shown = ", ".join(names[:_NUM_SHOWN]) + (", ..." if len(names) > _NUM_SHOWN else "")
            raise DataError(
                f"{len(names)} images cannot be read, at most {self._limit} are skipped: {shown}; "
                f"mend or remove them, or allow more with --max-bad {len(names)}"
            )


class Images(Dataset[Any]):
    """The images of a set by (epoch, index), each augmented with random numbers of its own.

    One that cannot be read is noted; in training the next one takes its place, in validation it has no label.
    """

    def __init__(
        self, images: Dataset[Any], transform: Callable[[Image.Image], Any], bad: BadImages, mode: str, seed: int,
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
            except _UNREADABLE:
                self._bad.note(place)
                if self._is_training:
                    continue
                image, target = Image.new(self._mode, (8, 8)), NO_LABEL
            if target >= self._num_classes > 0:
                raise DataError(
                    f"{get_name(self._images, place)} has the label {target}, the network has {self._num_classes} "
                    f"classes; --num-classes sets their number"
                )
            return self._transform(image), target
        raise DataError("none of the images can be read")


def _read(images: Dataset[Any], index: int, mode: str) -> tuple[Image.Image, int]:
    """Read an image and its label; of timm's sets without timm's own way of skipping, which names nothing."""
    if isinstance(images, Subset):
        return _read(images.dataset, images.indices[index], mode)
    reader = getattr(images, "reader", None)
    if reader is None:
        image, target = images[index]
    else:
        file, target, *_ = reader[index]
        image = Image.open(file)
    return image.convert(mode), NO_LABEL if target is None else int(target)


def seed_all(*numbers: int) -> None:
    """Seed Python's, NumPy's and torch's random numbers by a few numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class _Batches(Sampler[list[Key]]):
    """The batches of an epoch for one process; the same permutation in all of them, each takes its share of a batch."""

    def __init__(self, num_images: int, batch_size: int, seed: int, world: World) -> None:
        self._num_images, self._batch_size, self._seed, self._world = num_images, batch_size, seed, world
        self.epoch, self.first = 0, 0

    def __len__(self) -> int:
        return self._num_images // self._batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        order = torch.randperm(self._num_images, generator=generator)
        for step in range(self.first, len(self)):
            batch = order[step * self._batch_size : (step + 1) * self._batch_size]
            yield [(self.epoch, index) for index in batch[self._world.rank :: self._world.size].tolist()]


class TrainLoader:
    """Batches to train on, from any step of any epoch.

    Attributes:
        num_steps: Batches an epoch.
        bad: What could not be read; None for a stream.
    """

    def __init__(
        self, data: Data, form: InputFormat, recipe: Recipe, world: World, *, max_bad: int = 0, num_classes: int = 0
    ) -> None:
        """Make it; `recipe.batch_size` images a step are shared by all processes.

        Raises:
            DataError: There are fewer images than a batch has, or the batch cannot be shared evenly.
        """
        images = data.train
        assert images is not None
        num = count_images(images)
        if num < recipe.batch_size:
            raise DataError(
                f"there are {num} training images, batch_size is {recipe.batch_size}; try --set batch_size={num}"
            )
        if recipe.batch_size % world.size:
            raise DataError(f"batch_size is {recipe.batch_size}, which {world.size} processes cannot share evenly")
        self.num_steps = num // recipe.batch_size
        self._seed = recipe.seed
        self._images = images
        transform = make_train_transform(form, recipe)
        options: dict[str, Any] = {
            "num_workers": recipe.workers,
            "collate_fn": fast_collate,
            "pin_memory": world.is_cuda,
        }
        self.bad: BadImages | None = None
        self._sampler: _Batches | None = None
        if isinstance(images, IterableDataset):
            vars(images)["transform"] = transform
            images.set_loader_cfg(num_workers=recipe.workers)  # type: ignore[attr-defined]  # timm's own
            options |= {"batch_size": recipe.batch_size // world.size, "drop_last": True}
            loader: DataLoader[Any] = DataLoader(images, **options)
        else:
            self.bad = BadImages(images, max_bad)
            own = Images(images, transform, self.bad, form.mode, recipe.seed, is_training=True, num_classes=num_classes)
            self._sampler = _Batches(num, recipe.batch_size, recipe.seed, world)
            options |= {"batch_sampler": self._sampler, "persistent_workers": recipe.workers > 0}
            loader = DataLoader(own, **options)
        self._loader = _prefetch(loader, form, world)

    @property
    def is_stream(self) -> bool:
        """Whether the images come as a stream, which can be begun at the start of an epoch alone."""
        return self._sampler is None

    def iterate(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of an epoch from a step on."""
        if self._sampler is not None:
            self._sampler.epoch, self._sampler.first = epoch, first
            yield from self._loader
            return
        seed_all(self._seed, epoch)
        self._images.set_epoch(epoch)  # type: ignore[attr-defined]  # timm's own
        for step, batch in enumerate(self._loader):
            if step >= self.num_steps:
                return
            if step >= first:
                yield batch


class EvalLoader:
    """Batches to validate on: each process has its share of the images, without repetition.

    Attributes:
        num_images: How many images there are, for all processes together.
        bad: What could not be read; None for a stream.
    """

    def __init__(
        self, images: Dataset[Any], form: InputFormat, *, batch_size: int, workers: int, world: World, max_bad: int = 0,
        num_classes: int = 0,
    ) -> None:  # fmt: skip
        transform = make_eval_transform(form)
        options: dict[str, Any] = {"num_workers": workers, "collate_fn": fast_collate, "pin_memory": world.is_cuda}
        self.num_images = count_images(images)
        self.batch_size = batch_size
        self.bad: BadImages | None = None
        if isinstance(images, IterableDataset):
            vars(images)["transform"] = transform
            images.set_loader_cfg(num_workers=workers)  # type: ignore[attr-defined]  # timm's own
            loader: DataLoader[Any] = DataLoader(images, batch_size=batch_size, **options)
        else:
            self.bad = BadImages(images, max_bad)
            own = Images(images, transform, self.bad, form.mode, 0, is_training=False, num_classes=num_classes)
            share = [(0, index) for index in range(world.rank, self.num_images, world.size)]
            batches = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
            loader = DataLoader(own, batch_sampler=batches, persistent_workers=workers > 0, **options)
        self.num_batches = math.ceil(self.num_images / world.size / batch_size)
        self._loader = _prefetch(loader, form, world)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._loader)


def _prefetch(loader: DataLoader[Any], form: InputFormat, world: World) -> Batches:
    return PrefetchLoader(loader, form.mean, form.std, form.size[0], device=world.device)  # type: ignore[no-any-return]


def with_size(form: InputFormat, size: int) -> InputFormat:
    """Return the format at another size."""
    return replace(form, size=(form.size[0], size, size))
