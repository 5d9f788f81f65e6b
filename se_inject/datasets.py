"""Data sets: find the images that a name means, their classes, and what is wrong with them.

Takes a folder or a name of timm's `create_dataset`, gives a `Data`: the training and the validation images and the
names of the classes. timm reads; what is ours is the split of a single folder and the checks. Decodes no image.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import add_img_extensions, create_dataset, get_img_extensions, set_img_extensions
from timm.utils.misc import natural_key
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS

from se_inject.contents import (
    count_classes,
    count_images,
    count_unlisted_classes,
    has_labels,
    list_classes,
    list_names,
    list_targets,
)
from se_inject.errors import DataError
from se_inject.parts import find_parts
from se_inject.splits import Split, draw_split, read_split, write_split

_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
_WITH_ROOT = ("torch/", "wds/")


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
    split: Split | None = None

    @property
    def is_labelled(self) -> bool:
        """Whether the validation images have labels."""
        return self.num_classes > 0

    def describe(self) -> dict[str, Any]:
        """Turn into plain values that tell one set of images from another, wherever it lies.

        The digest is over the images' names in their folders; where they have none, over what they were made from.
        """
        names = [["/".join(Path(name).parts[-2:]) for name in list_names(part)] for part in self.parts]
        are_files = any("/" in name for of_part in names for name in of_part[:1])
        told = [names, self.classes] if are_files else [names, self.classes, self.origin]
        digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
        return {"origin": self.origin, "num_classes": self.num_classes, "sizes": [*map(count_images, self.parts)],
                "digest": digest}  # fmt: skip

    def write_split(self, folder: Path) -> None:
        """Write down how a single folder was split, if it is one.

        Raises:
            ArtifactError: The file cannot be written.
        """
        if self.split is not None and self.train is not None:
            write_split(self.origin, {"train": self.train, "val": self.val}, folder)

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
    split: Path | None = None,
    options: dict[str, Any] | None = None,
) -> Data:
    """Open a data set.

    Args:
        name: A folder with `train/` and `val/`, each with a folder a class; a single folder with a folder a class,
            which is split by `seed`; or a name that timm's `create_dataset` takes, with its root behind a colon where
            it has one, as in `torch/cifar10:ROOT`, `hfds/USER/NAME` and `wds/:ROOT`.
        mode: What images are converted to: "RGB", or "L" for networks with one input channel.
        seed: Of the split.
        is_evaluation: Only the validation images are needed; a folder without `val/` is one of them, whole unless there
            is a `split`.
        may_be_unlabelled: Training images need no labels.
        download: Let timm fetch what is missing.
        split: The `split.json` of a run, which tells the images of a single folder that train from those that validate.
        options: `train_split` and `val_split` name the parts: folders in `name`, in place of those that are found, or
            splits of timm's data, for which there may be further arguments of `create_dataset`.

    Raises:
        DataError: There is no such data, it holds no images, or its classes are not those that can be trained on.
    """
    if name.lower().startswith(_PREFIXES):
        if split is not None:
            raise DataError(f"--split {split} tells the images of a single folder apart, and {name} is none")
        return _open_named(name, mode, seed, is_evaluation=is_evaluation, download=download, options=options or {})
    root = Path(name)
    if not root.is_dir():
        known = ", ".join(prefix + "..." for prefix in _PREFIXES)
        raise DataError(f"there is no folder {name}; expected a folder of images, or a name of timm's: {known}")
    _check_readable(root)
    given = {} if is_evaluation else {"train": (options or {}).get("train_split")}
    train, val = find_parts(root, {**given, "val": (options or {}).get("val_split")}, is_evaluation=is_evaluation)
    if split is not None and val is not None:
        raise DataError(f"--split {split} tells the images of a single folder apart, and {root} has {val.name}/")
    if is_evaluation and split is None:
        images = _open_folder(val or root, mode)
        _check_labels(val or root, images)
        return _check(Data(None, images, list_classes(images), count_classes(images), str(val or root)))
    if train is None or val is None:
        return _check(_split_folder(root, mode, seed, split, may_be_unlabelled=may_be_unlabelled))
    images, other_images = _open_folder(train, mode), _open_folder(val, mode)
    if not may_be_unlabelled:
        _check_labels(train, images)
        _check_labels(val, other_images)
    if has_labels(images) and has_labels(other_images):
        _compare_classes(f"{train.name}/", images, f"{val.name}/", other_images)
    return _check(Data(images, other_images, list_classes(other_images), count_classes(other_images), name))


def _check_readable(folder: Path) -> None:
    """Refuse folders that may not be read: what is in them would be passed over, or they would count as empty."""
    is_open = os.access(folder, os.R_OK | os.X_OK)
    found = [f for f in folder.iterdir() if f.is_dir()] if is_open else [folder]
    locked = [str(f) for f in found if not os.access(f, os.R_OK | os.X_OK)]
    if locked:
        raise DataError(f"{_count(locked, 'folder')} not readable, for want of rights: {_shorten(locked)}")


def _open_folder(folder: Path, mode: str) -> Dataset[Any]:
    _check_readable(folder)
    try:
        with _reading_all_formats():
            images: Dataset[Any] = create_dataset("", root=str(folder), search_split=False, input_img_mode=mode)
    except RuntimeError as error:
        raise DataError(f"{folder} holds no images: {str(error).splitlines()[0]}") from error
    _sort_into_classes(folder, images)
    return images


@contextmanager
def _reading_all_formats() -> Iterator[None]:
    """Let timm see all files that Pillow reads as images; by itself it passes over what is neither PNG nor JPEG."""
    before = get_img_extensions()
    add_img_extensions([*IMG_EXTENSIONS, ".gif"])
    try:
        yield
    finally:
        set_img_extensions(before)


def _sort_into_classes(folder: Path, images: Dataset[Any]) -> None:
    """Make the folders in `folder` the classes; timm takes the innermost ones, the hidden ones of tools among them."""
    reader = images.reader  # type: ignore[attr-defined]  # timm's own
    found = [(file, Path(file).relative_to(folder).parts) for file, _ in reader.samples]
    found = [(file, parts) for file, parts in found if not any(part.startswith(".") for part in parts)]
    if not found:
        raise DataError(f"{folder} holds no images")
    stray, deep = ([file for file, parts in found if is_wrong(len(parts))] for is_wrong in ((1).__eq__, (2).__lt__))
    folders = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if deep:
        raise DataError(
            f"{_count(deep, 'image')} in folders within the folders of {folder}: {_shorten(deep, 2)}; "
            f"expected {folder}/CLASS/IMAGE"
        )
    if stray and folders:
        raise DataError(
            f"{_count(stray, 'image')} in {folder} beside the folders of classes: {_shorten(stray, 2)}; "
            f"expected {folder}/CLASS/IMAGE"
        )
    full = {parts[0] for _, parts in found}
    empty = [name for name in folders if name not in full]
    if empty:
        raise DataError(f"{_count(empty, 'class')} without images in {folder}: {_shorten(empty)}; fill or remove")
    # timm's order takes `a1` and `a01`, or `Cat` and `cat`, for equal: theirs is by their letters, in every process.
    names = sorted(full, key=lambda name: (natural_key(name), name)) if folders else [""]
    indices = {name: i for i, name in enumerate(names)}
    reader.samples = [(file, indices[parts[0]] if folders else -1) for file, parts in found]
    reader.class_to_idx = indices


def _open_named(
    name: str, mode: str, seed: int, *, is_evaluation: bool, download: bool, options: dict[str, Any]
) -> Data:
    library, _, root = name.partition(":")
    if not root and library.lower().startswith(_WITH_ROOT):
        raise DataError(f"{name} does not say where the images are; expected {library}:ROOT")
    is_remote = "://" in root or root.startswith("pipe:")
    if library.lower().startswith("wds/") and not is_remote and not Path(root).is_dir():
        raise DataError(f"there is no folder {root}")
    options = dict(options)
    splits = {"train": options.pop("train_split", "train"), "val": options.pop("val_split", "validation")}
    opened: dict[str, Dataset[Any]] = {}
    for part, split in splits.items():
        if part == "train" and is_evaluation:
            continue
        opened[part] = _create(
            name, split, {**options, "is_training": part == "train", "seed": seed, "download": download}, mode
        )
    train, val = opened.get("train"), opened["val"]
    if train is not None:
        _compare_classes(f"the split {splits['train']}", train, f"the split {splits['val']}", val)
    classes, targets = list_classes(val), list_targets(val)
    num = len(classes) if classes else 1 + max(targets) if targets else 0
    if not num:
        num = count_unlisted_classes(val)
    return _check(Data(train, val, classes, num, name))


def _create(name: str, split: str, options: dict[str, Any], mode: str) -> Dataset[Any]:
    library, _, root = name.partition(":")
    if not library.lower().startswith("torch/"):
        # Streams that give images as they are have them converted by us, as a folder has.
        options = {**options, "input_img_mode": "" if library.lower().startswith(("wds/", "hfids/")) else mode}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints what is not installed
            images: Dataset[Any] = create_dataset(library, root=root or None, split=split, **options)
    except ImportError as error:
        raise DataError(f"{name} needs a package that is not installed: {error}; pip install it") from error
    except (RuntimeError, OSError, ValueError, AssertionError, TypeError, KeyError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name} cannot be opened, split {split}: {line}") from error
    reader = getattr(images, "reader", None)
    if isinstance(images, IterableDataset) and not options.get("is_training"):
        # Shared among processes, timm would repeat some images: one of the processes reads them all (`EvalLoader`).
        vars(reader).update(dist_rank=0, dist_num_replicas=1)
    return images


def _split_folder(root: Path, mode: str, seed: int, file: Path | None, *, may_be_unlabelled: bool) -> Data:
    images = _open_folder(root, mode)
    if not may_be_unlabelled:
        _check_labels(root, images)
    split = draw_split(root, images, seed) if file is None else read_split(root, images, file)
    train, val = (Subset(images, indices) for indices in split)
    return Data(train, val, list_classes(images), count_classes(images), str(root), split)


def _check(data: Data) -> Data:
    """Refuse one class, and classes without images."""
    if data.num_classes == 1:
        found = f" ({data.classes[0]})" if data.classes else ""
        raise DataError(f"{data.origin} has one class{found}; expected at least two, each a folder of images")
    counts = Counter(label for label in list_targets(data.train) or () if label >= 0) if data.train else None
    if counts and data.classes and (empty := [name for i, name in enumerate(data.classes) if not counts[i]]):
        raise DataError(f"{len(empty)} of {data.num_classes} classes have no training image: {_shorten(empty)}")
    return data


def _check_labels(folder: Path, images: Dataset[Any]) -> None:
    if not has_labels(images):
        raise DataError(f"the images of {folder} lie in no folders of classes; expected {folder}/CLASS/IMAGE")


def _compare_classes(part: str, images: Dataset[Any], other_part: str, other: Dataset[Any]) -> None:
    """Refuse classes that differ between training and validation, in name or in order."""
    ours, theirs = list_classes(images), list_classes(other)
    if ours is None or theirs is None or ours == theirs:
        return
    sides = ((part, set(ours) - set(theirs)), (other_part, set(theirs) - set(ours)))
    found = "; ".join(f"only in {name}: {_shorten(sorted(names))}" for name, names in sides if names)
    found = found or f"in another order: {_shorten(ours)} and {_shorten(theirs)}"
    raise DataError(f"the classes of {part} and {other_part} differ, {found}; both need the same")


def _shorten(names: Sequence[str], num: int = 5) -> str:
    return ", ".join(names[:num]) + (", ..." if len(names) > num else "")


def _count(things: Sequence[str], noun: str) -> str:
    """Count things in words: "1 image is", "2 images are"."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"1 {noun} is" if len(things) == 1 else f"{len(things)} {plural} are"
