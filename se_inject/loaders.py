"""Loaders: give a network its batches, each a function of the seed, the epoch and the position alone.

Takes the images of `datasets`, gives batches (N, C, H, W) and labels (N,). Every image is augmented with random numbers
of its own, so that neither the number of workers nor that of processes, nor an interruption, changes what is seen.
timm's transforms, collation and prefetching do the work.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from multiprocessing.queues import Queue
from typing import Any

import torch
from PIL import Image
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from se_inject.contents import copy_stream, count_images
from se_inject.datasets import Data
from se_inject.errors import DataError, get_first_line
from se_inject.formats import InputFormat, Transform, convert_image, make_eval_transform, make_train_transform
from se_inject.reading import NO_LABEL, Bad, BadImages, BadSamples, Images, Key, refuse_label, seed_all
from se_inject.recipe import Recipe
from se_inject.streams import Stream
from se_inject.world import World

Batches = Iterable[tuple[Tensor, Tensor]]


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
        batch_size: Images a step, over all processes together.
        bad: What could not be read.
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
        num, share = count_images(images), recipe.batch_size // world.size
        if num < recipe.batch_size:
            fitting = max(world.size, num // world.size * world.size)
            raise DataError(
                f"there are {num} training images, batch_size is {recipe.batch_size}; try --set batch_size={fitting}"
            )
        if recipe.batch_size % world.size:
            raise DataError(
                f"batch_size is {recipe.batch_size}, which {world.size} processes cannot share evenly; "
                f"try --set batch_size={share * world.size or world.size}"
            )
        if recipe.mixes and share % 2:
            raise DataError(
                f"mixup and cutmix mix pairs, and of a batch of {recipe.batch_size} images each process has {share}; "
                f"try --set batch_size={(share + 1) * world.size}"
            )
        self.num_steps, self.batch_size = num // recipe.batch_size, recipe.batch_size
        self._seed = recipe.seed
        transform = make_train_transform(form, recipe)
        self.bad: Bad
        self._sampler: _Batches | None = None
        if isinstance(images, IterableDataset):
            self.bad = bad = BadSamples(max_bad)
            given = images, transform, num_classes, share, recipe.workers, form, world, bad
            self._open = partial(_open_stream, *given)
            self._batches = self._open(0)
            return
        self.bad = noted = BadImages(images, max_bad)
        own = Images(images, transform, noted, form.mode, recipe.seed, is_training=True, num_classes=num_classes)
        self._sampler = _Batches(num, recipe.batch_size, recipe.seed, world)
        self._batches = _prefetch(_load(own, self._sampler, recipe.workers, world), form, world)

    @property
    def is_stream(self) -> bool:
        """Whether the images come as a stream, which can be begun at the start of an epoch alone."""
        return self._sampler is None

    def iterate(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of an epoch from a step on.

        Raises:
            DataError: Images or labels are bad, or a stream has fewer images than it says.
        """
        if self._sampler is not None:
            self._sampler.epoch, self._sampler.first = epoch, first
            yield from _say_plainly(self._batches)
            return
        seed_all(self._seed, epoch)
        self._batches = self._open(epoch)
        step = 0
        for batch in _say_plainly(self._batches):
            if step >= first:
                yield batch
            step += 1
            if step == self.num_steps:
                return
            seed_all(self._seed, epoch, step)  # without workers, the network and the images draw from one generator
        self.bad.check()
        raise DataError(f"the stream gave {step} batches in an epoch; it says that it has images for {self.num_steps}")


class EvalLoader:
    """Batches to validate on: each process has its share of the images, without repetition.

    Attributes:
        num_images: How many images there are, for all processes together.
        num_own: How many of them this process reads, at most.
        is_stream: Whether they come as a stream, whose order is not fixed.
        bad: What could not be read.
    """

    def __init__(
        self, images: Dataset[Any], form: InputFormat, *, batch_size: int, workers: int, world: World, max_bad: int = 0,
        num_classes: int = 0, cache: int = 0,
    ) -> None:  # fmt: skip
        """Make it; the batches are kept from the first time on if they take at most `cache` bytes."""
        transform = make_eval_transform(form)
        self.num_images = count_images(images)
        self.batch_size = batch_size
        self.bad: Bad
        self.is_stream = isinstance(images, IterableDataset)
        if isinstance(images, IterableDataset):
            self.bad = bad = BadSamples(max_bad)
            images = _prepare_stream(images, transform, form.mode, num_classes)
            loader = _load_stream(images, batch_size, workers, world, bad)
        else:
            self.bad = noted = BadImages(images, max_bad)
            own = Images(images, transform, noted, form.mode, 0, is_training=False, num_classes=num_classes)
            share = [(0, index) for index in range(world.rank, self.num_images, world.size)]
            batches = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
            loader = _load(own, batches, workers, world)
        num_sharing = 1 if self.is_stream else world.size
        self.num_own = math.ceil(self.num_images / num_sharing)
        self._is_idle = self.is_stream and not world.is_main  # a stream is read by one process, so that none is twice
        self._batches = _prefetch(loader, form, world)
        self._fits = 4 * math.prod(form.size) * self.num_own <= cache
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._kept is not None:
            return _copy(self._kept)
        batches = iter(()) if self._is_idle else _say_plainly(self._batches)
        if self.is_stream and not self._is_idle:
            batches = self._check_number(batches)
        return self._keep(batches) if self._fits else batches

    def _check_number(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through a stream, which must have as many images as it says; of those missing, `max_bad` are allowed."""
        num = 0
        for batch in batches:
            num += len(batch[1])
            yield batch
        self.bad.check()
        if not 0 <= self.num_images - num <= self.bad.limit:
            raise DataError(
                f"the stream gave {num} images, it says that it has {self.num_images}; correct what it says (|N of its "
                "split, or its _info.json)"
                + (f", or allow fewer with --max-bad {self.num_images - num}" if num < self.num_images else "")
            )

    def _keep(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        kept = []
        for batch in batches:
            kept.append(batch)
            yield from _copy([batch])
        self._kept = kept


def _copy(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Copy the images of batches that are kept: a network may normalise what it is handed in place."""
    return ((images.clone(), labels) for images, labels in batches)


def _load(images: Images, batches: Iterable[list[Key]], workers: int, world: World) -> DataLoader[Any]:
    return _make_loader(
        images, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0, pin_memory=world.is_cuda
    )


def _make_loader(images: Dataset[Any], **kwargs: Any) -> DataLoader[Any]:
    with warnings.catch_warnings():  # more processes than processors are no mistake where disks are waited for
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        return DataLoader(images, collate_fn=fast_collate, worker_init_fn=_prepare_worker, **kwargs)


def _prepare_worker(_: int) -> None:
    """Leave Ctrl-C, and what ends the whole group of processes, to the one that trains, which then ends its workers.

    A worker that cannot hand on what it has read, as there is no shared memory left, ends; else all would wait.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]  # noqa: SLF001


def _end_worker(error: BaseException, _: object) -> None:
    sys.stderr.write(f"{get_first_line(error)}\n")
    sys.stderr.flush()
    os._exit(1)


def _prepare_stream(images: IterableDataset[Any], transform: Transform, mode: str, num_classes: int) -> Any:
    stream = copy_stream(images)
    stream.transform = partial(_transform, transform=transform, mode=mode)
    stream.target_transform = partial(_read_label, num_classes=num_classes)
    return stream


def _transform(image: Image.Image, transform: Transform, mode: str) -> Any:
    return transform(convert_image(image, mode))


def _open_stream(  # noqa: PLR0917  `partial` gives all but the last
    images: IterableDataset[Any], transform: Transform, num_classes: int, batch_size: int, workers: int,
    form: InputFormat, world: World, bad: BadSamples, epoch: int,
) -> Batches:  # fmt: skip
    """Open a training stream for an epoch, anew: one that was read goes on from where it is, if by this process."""
    stream = _prepare_stream(images, transform, form.mode, num_classes)
    stream.set_epoch(epoch)
    return _prefetch(_load_stream(stream, batch_size, workers, world, bad), form, world)


def _read_label(target: Any, num_classes: int) -> int:
    label = NO_LABEL if target is None else int(target)
    if label >= num_classes > 0:
        raise refuse_label(label, num_classes, "an image of the stream")
    return label


def _load_stream(images: Any, batch_size: int, workers: int, world: World, bad: BadSamples) -> DataLoader[Any]:
    """Load a stream of timm's, by as many workers as it has files for."""
    reader = images.reader
    if num_shards := _count_shards(reader):
        workers = min(workers, max(1, num_shards // reader.dist_num_replicas))
    reader.batch_size = batch_size  # a worker of a training stream has whole batches
    images.set_loader_cfg(num_workers=workers)
    return _make_loader(
        Stream(images, bad.note), batch_size=batch_size, num_workers=workers, pin_memory=world.is_cuda,
        drop_last=reader.is_training,
    )  # fmt: skip


def _say_plainly(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate; an error from a worker, which has the worker's traceback as its message, gets its sentence back."""
    try:
        yield from batches
    except (DataError, RuntimeError) as error:
        # torch's frames hold the workers and the error itself; collected in such a circle, workers end after seconds.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, DataError):
            raise DataError(str(error).rstrip().rpartition(f"{DataError.__name__}: ")[2]) from error
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            f"a process that reads images ended ({get_first_line(error)}); it may lack memory, or shared memory "
            "(/dev/shm, docker run --shm-size): try fewer workers, or 0"
        ) from error


def _count_shards(reader: Any) -> int:
    """Count the files of a stream, of which a worker reads some; 0 if any number of workers can share it."""
    if shards := getattr(getattr(reader, "split_info", None), "filenames", None):
        return len(shards)
    if hasattr(reader, "builder") and hasattr(reader.builder, "as_streaming_dataset") and not reader.download:
        return int(reader.builder.as_streaming_dataset(split=reader.split).num_shards)
    return 0


def _prefetch(loader: DataLoader[Any], form: InputFormat, world: World) -> Batches:
    batches: Batches = PrefetchLoader(loader, form.mean, form.std, form.size[0], device=world.device)
    return batches
