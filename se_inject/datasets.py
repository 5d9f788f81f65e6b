"""Data sets: find the images that a name means, their classes, and what is wrong with them.

Takes a folder or a name of timm's `create_dataset`, gives a `Data`: the training and the validation images and the
names of the classes. timm reads; what is ours is the split of a single folder and the checks. Decodes no image.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset
from timm.data.readers import get_img_extensions
from torch.utils.data import Dataset, IterableDataset, Subset

from se_inject.errors import DataError
from se_inject.files import write_whole

TRAIN, VAL = ("train", "training"), ("val", "validation", "valid", "eval", "test")
VAL_SHARE = 0.2
"""The part of a single folder's images that validates."""
SPLIT_FILE = "split.json"
_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")


@dataclass(frozen=True)
class Data:
    """Images to train and to validate on.

    Attributes:
        train: The training images, of timm's or torchvision's; None if only to be evaluated on.
        val: The validation images.
        classes: Names of the classes, in the order of their indices; None where the set does not say.
        num_classes: How many classes there are; 0 if the images have no labels.
        origin: What it was made from, for people.
        split: Indices of a single folder's images that train, and that validate; empty where there are two folders.
    """

    train: Dataset[Any] | None
    val: Dataset[Any]
    classes: tuple[str, ...] | None
    num_classes: int
    origin: str
    split: tuple[Sequence[int], Sequence[int]] | None = None

    @property
    def is_labelled(self) -> bool:
        """Whether the validation images have labels."""
        return self.num_classes > 0

    def describe(self) -> dict[str, Any]:
        """Turn into plain values that tell one set of images from another."""
        names = [_list_names(part) for part in (self.train, self.val) if part is not None]
        digest = hashlib.sha256(json.dumps([names, self.classes]).encode()).hexdigest()[:16]
        return {"origin": self.origin, "num_classes": self.num_classes, "sizes": [*map(count_images, self.parts)],
                "digest": digest}  # fmt: skip

    @property
    def parts(self) -> list[Dataset[Any]]:
        """The training and the validation images, or the latter alone."""
        return [part for part in (self.train, self.val) if part is not None]


def open_data(
    name: str,
    *,
    mode: str = "RGB",
    seed: int = 0,
    is_evaluation: bool = False,
    may_be_unlabelled: bool = False,
    download: bool = False,
    options: dict[str, Any] | None = None,
) -> Data:
    """Open a data set.

    Args:
        name: A folder with `train/` and `val/`, each with a folder a class; a single folder with a folder a class,
            which is split by `seed`; or a name that timm's `create_dataset` takes, with its root behind a colon where
            it has one, as in `torch/cifar10:ROOT`, `hfds/USER/NAME` and `wds/:ROOT`.
        mode: What images are converted to: "RGB", or "L" for networks with one input channel.
        seed: Of the split.
        is_evaluation: Only the validation images are needed; a folder without `val/` is one of them, whole.
        may_be_unlabelled: Training images need no labels.
        download: Let timm fetch what is missing.
        options: Further arguments of `create_dataset`.

    Raises:
        DataError: There is no such data, it holds no images, or its classes are not those that can be trained on.
    """
    if name.lower().startswith(_PREFIXES):
        return _open_named(name, mode, seed, is_evaluation=is_evaluation, download=download, options=options or {})
    root = Path(name)
    if not root.is_dir():
        known = ", ".join(prefix + "..." for prefix in _PREFIXES)
        raise DataError(f"there is no folder {name}; expected a folder of images, or a name of timm's: {known}")
    train, val = (next((root / n for n in names if (root / n).is_dir()), None) for names in (TRAIN, VAL))
    if is_evaluation:
        images = _open_folder(val or root, mode)
        return _check(Data(None, images, _list_classes(images), _count_classes(images), str(val or root)))
    if train is None and val is not None:
        raise DataError(f"{root} has {val.name}/ and no train/; expected both, or folders of classes alone")
    if train is not None and val is None:
        raise DataError(f"{root} has train/ and no val/; expected both, or folders of classes alone")
    if train is None:
        return _check(_split_folder(root, mode, seed, may_be_unlabelled=may_be_unlabelled))
    assert val is not None
    images, other = _open_folder(train, mode), _open_folder(val, mode)
    if not _has_labels(images) and may_be_unlabelled:
        return Data(images, other, _list_classes(other), _count_classes(other), name)
    _compare_classes(train, images, val, other)
    return _check(Data(images, other, _list_classes(images), _count_classes(images), name))


def write_split(data: Data, folder: Path) -> None:
    """Write down how a single folder was split: `split.json`, with the paths of the images that train and validate.

    Raises:
        ArtifactError: The file cannot be written.
    """
    if data.split is not None and data.train is not None:
        values = {"root": data.origin, "train": _list_names(data.train), "val": _list_names(data.val)}
        write_whole(folder / SPLIT_FILE, lambda file: file.write(json.dumps(values, indent=1).encode()))


def count_images(images: Dataset[Any]) -> int:
    """Count the images of a set; a stream that does not say is an error.

    Raises:
        DataError: The stream does not say how many there are.
    """
    try:
        num = len(images)  # type: ignore[arg-type]
    except TypeError:
        num = 0
    if not num:
        raise DataError(
            "the stream does not say how many images it has; add |N to its split, as in 'train-{0..9}.tar|N'"
        )
    return num


def get_name(images: Dataset[Any], index: int) -> str:
    """Return the path of an image where it has one, or else its number."""
    if isinstance(images, Subset):
        return get_name(images.dataset, images.indices[index])
    reader = getattr(images, "reader", None)
    return f"image {index}" if reader is None else str(reader.filename(index, absolute=True))


def list_targets(images: Dataset[Any]) -> list[int] | None:
    """List the labels of a set without decoding images; None where that is not known."""
    if isinstance(images, Subset):
        targets = list_targets(images.dataset)
        return None if targets is None else [targets[i] for i in images.indices]
    samples = getattr(getattr(images, "reader", None), "samples", None)
    if isinstance(samples, list):
        return [target for _, target in samples]
    targets = getattr(images, "targets", None)
    return None if targets is None else [int(t) for t in targets]


def _open_folder(folder: Path, mode: str) -> Dataset[Any]:
    try:
        images: Dataset[Any] = create_dataset("", root=str(folder), search_split=False, input_img_mode=mode)
    except RuntimeError as error:
        raise DataError(f"{folder} holds no images: {str(error).splitlines()[0]}") from error
    known, suffixes = set(_list_classes(images) or ()), get_img_extensions(as_set=True)
    folders = [f for f in sorted(folder.iterdir()) if f.is_dir() and f.name not in known and f.name[0] != "."]
    empty = [f.name for f in folders if not any(p.suffix.lower() in suffixes for p in f.rglob("*"))]
    if empty:
        raise DataError(f"{len(empty)} classes of {folder} have no image: {_shorten(empty)}; fill or remove them")
    return images


def _open_named(
    name: str, mode: str, seed: int, *, is_evaluation: bool, download: bool, options: dict[str, Any]
) -> Data:
    library, _, root = name.partition(":")
    options = dict(options)
    splits = {"train": options.pop("train_split", "train"), "val": options.pop("val_split", "validation")}
    opened = {}
    for part, split in splits.items():
        if part == "train" and is_evaluation:
            continue
        given = {"input_img_mode": mode} if not library.lower().startswith("torch/") else {}
        try:
            opened[part] = create_dataset(
                library, root=root or None, split=split, is_training=part == "train", seed=seed, download=download,
                **given, **options,
            )  # fmt: skip
        except ImportError as error:
            raise DataError(f"{name} needs a package that is not installed: {error}; pip install it") from error
        except (RuntimeError, OSError, ValueError, AssertionError, TypeError, KeyError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{name} cannot be opened, split {split}: {line}") from error
    val = opened["val"]
    classes = _list_classes(val)
    targets = list_targets(val)
    num = len(classes) if classes else 1 + max(targets) if targets else options.get("num_classes", 0)
    if not num:
        num = _count_streamed(val)
    return _check(Data(opened.get("train"), val, classes, num, name))


def _count_streamed(images: Dataset[Any]) -> int:
    """Count the classes of a set that does not list them, by going through its labels once."""
    targets = (item[1] for item in images) if isinstance(images, IterableDataset) else (
        images[i][1] for i in range(count_images(images))
    )  # fmt: skip
    return 1 + max((int(target) for target in targets), default=-1)


def _split_folder(root: Path, mode: str, seed: int, *, may_be_unlabelled: bool) -> Data:
    """Split a folder class by class, so that each class has its part on both sides."""
    images = _open_folder(root, mode)
    if not _has_labels(images) and not may_be_unlabelled:
        raise DataError(f"the images of {root} lie in no folders of classes; expected {root}/CLASS/IMAGE")
    targets = list_targets(images)
    assert targets is not None
    generator = torch.Generator().manual_seed(seed)
    chosen: set[int] = set()
    for label in sorted(set(targets)):
        indices = [i for i, target in enumerate(targets) if target == label]
        order = torch.randperm(len(indices), generator=generator).tolist()
        num = max(1, round(VAL_SHARE * len(indices))) if len(indices) > 1 else 0
        chosen.update(indices[i] for i in order[:num])
    train = [i for i in range(len(targets)) if i not in chosen]
    val = sorted(chosen)
    if not val:
        raise DataError(f"{root} has one image a class, which leaves none to validate on; give train/ and val/")
    classes = _list_classes(images) if _has_labels(images) else None
    num_classes = _count_classes(images) if _has_labels(images) else 0
    return Data(Subset(images, train), Subset(images, val), classes, num_classes, str(root), (train, val))


def _check(data: Data) -> Data:
    """Refuse one class, and classes without images."""
    if data.num_classes == 1:
        found = f" ({data.classes[0] or 'no folder'})" if data.classes else ""
        raise DataError(f"{data.origin} has one class{found}; expected at least two, each a folder of images")
    counts = Counter(list_targets(data.train) or ()) if data.train is not None else None
    if counts and data.classes and (empty := [name for i, name in enumerate(data.classes) if not counts[i]]):
        raise DataError(f"{len(empty)} of {data.num_classes} classes have no training image: {_shorten(empty)}")
    return data


def _compare_classes(train: Path, images: Dataset[Any], val: Path, other: Dataset[Any]) -> None:
    ours, theirs = (set(_list_classes(x) or ()) for x in (images, other))
    if ours != theirs:
        sides = ((train, ours - theirs), (val, theirs - ours))
        found = "; ".join(f"only in {f.name}/: {_shorten(sorted(names))}" for f, names in sides if names)
        raise DataError(f"the classes of {train} and {val} differ, {found}; both need the same folders")


def _has_labels(images: Dataset[Any]) -> bool:
    return _list_classes(images) != ("",)


def _list_classes(images: Dataset[Any]) -> tuple[str, ...] | None:
    indices = getattr(getattr(images, "reader", None), "class_to_idx", None) or getattr(images, "class_to_idx", None)
    if not indices:
        return None
    return tuple(sorted(indices, key=indices.__getitem__))


def _count_classes(images: Dataset[Any]) -> int:
    classes = _list_classes(images)
    return len(classes) if classes and classes != ("",) else 0


def _list_names(images: Dataset[Any]) -> list[str]:
    """List what tells images apart: paths, or their number alone where there are none."""
    if isinstance(images, Subset):
        names = _list_names(images.dataset)
        return [names[i] for i in images.indices] if names else [str(i) for i in images.indices]
    reader = getattr(images, "reader", None)
    samples = getattr(reader, "samples", None)
    return [str(sample[0]) for sample in samples] if isinstance(samples, list) else []


def _shorten(names: Sequence[str], num: int = 5) -> str:
    return ", ".join(names[:num]) + (", ..." if len(names) > num else "")
