"""Contents: what a set of images says of itself, without decoding one.

Takes a set of timm's or torchvision's, gives the number of its images, their names and labels, and its classes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from se_inject.errors import DataError
from se_inject.streams import Stream


def count_images(images: Dataset[Any]) -> int:
    """Count the images of a set, of a stream those of all processes; one that does not say is an error.

    Raises:
        DataError: The stream does not say how many there are.
    """
    if not isinstance(images, IterableDataset):
        return len(images)  # type: ignore[arg-type]
    num = int(getattr(getattr(images, "reader", None), "num_samples", None) or 0)
    if not num:
        raise DataError(
            "the stream does not say how many images it has; add |N to its split, as in 'train-{0..9}.tar|N'"
        )
    return num


def copy_stream(images: IterableDataset[Any]) -> Any:
    """Copy a stream of timm's that has not been read: one that was read once takes no other number of workers."""
    copied = copy.copy(images)
    vars(copied)["reader"] = copy.copy(vars(images)["reader"])
    return copied


def get_name(images: Dataset[Any], index: int) -> str:
    """Return the path of an image where it has one, or else its number."""
    if isinstance(images, Subset):
        return get_name(images.dataset, images.indices[index])
    reader, samples = getattr(images, "reader", None), getattr(images, "samples", None)
    if reader is not None:
        return str(reader.filename(index, absolute=True))
    return str(samples[index][0]) if isinstance(samples, list) else f"image {index}"


def list_targets(images: Dataset[Any]) -> list[int] | None:
    """List the labels of a set without decoding images; None where that is not known."""
    if isinstance(images, Subset):
        targets = list_targets(images.dataset)
        return None if targets is None else [targets[i] for i in images.indices]
    samples = getattr(getattr(images, "reader", None), "samples", None)
    if isinstance(samples, list):
        return [target for _, target in samples]
    labels = torch.as_tensor(getattr(images, "targets", ()))
    return [int(label) for label in labels] if len(labels) and labels.ndim == 1 else None


def count_unlisted_classes(images: Dataset[Any]) -> int:
    """Count the classes of a set that does not list them, by going through its labels once."""
    reader: Any = getattr(images, "reader", None)
    if isinstance(images, IterableDataset):
        # Broken images are told of by what reads them next.
        targets = (item[1] for item in Stream(copy_stream(images), lambda _: None))
    elif hasattr(reader, "iter_targets"):
        targets = reader.iter_targets()
    else:
        targets = (images[i][1] for i in range(count_images(images)))
    return 1 + max((int(target) for target in targets), default=-1)


def has_labels(images: Dataset[Any]) -> bool:
    """Tell whether the images lie in classes."""
    return count_classes(images) > 0


def list_classes(images: Dataset[Any]) -> tuple[str, ...] | None:
    """List the names of classes; torchvision's sets can have several for a class, timm's reader none at all."""
    classes = getattr(images, "classes", None)
    if classes:
        return tuple(name if isinstance(name, str) else ", ".join(name) for name in classes)
    indices = getattr(getattr(images, "reader", None), "class_to_idx", None)
    if not indices or set(indices) == {""}:
        return None
    return tuple(sorted(indices, key=indices.__getitem__))


def count_classes(images: Dataset[Any]) -> int:
    """Count the classes that a set lists; 0 if it lists none."""
    return len(list_classes(images) or ())


def list_names(images: Dataset[Any]) -> list[str]:
    """List what tells images apart: paths, or their number alone where there are none."""
    if isinstance(images, Subset):
        names = list_names(images.dataset)
        return [names[i] for i in images.indices] if names else [str(i) for i in images.indices]
    reader = getattr(images, "reader", None)
    samples = getattr(reader, "samples", None)
    return [str(sample[0]) for sample in samples] if isinstance(samples, list) else []
