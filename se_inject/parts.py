"""Parts: which folders of a data set hold the images that train, and those that validate.

Takes a folder, and the names of parts where they are given, gives both folders, or neither: a single folder of classes.
Opens no image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from se_inject.errors import DataError

_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid", "eval", "test", "testing")}
"""What the folders are called, the best name first."""


def find_parts(
    root: Path, given: Mapping[str, str | None], *, is_evaluation: bool = False
) -> tuple[Path | None, Path | None]:
    """Find the folders of training and validation images, written as their owner likes.

    Args:
        root: Holds them, or the folders of classes alone.
        given: The folders' names, by "train" and "val"; None where they are to be found.
        is_evaluation: Training images are not needed.

    Returns:
        The folders of training and of validation images; None for both of a single folder.

    Raises:
        DataError: There is no folder of a given name, or one part alone.
    """
    folders = [f for f in sorted(root.iterdir(), reverse=True) if f.is_dir() and not f.name.startswith(".")]
    known = {f.name.lower(): f for f in folders}
    found = {part: next((known[name] for name in names if name in known), None) for part, names in _NAMES.items()}
    is_single = found["val"] is None and (found["train"] is None or _is_class(found["train"]))
    asked = {part: name for part, name in given.items() if name is not None}
    if is_single and not asked:
        return None, None
    for part, name in asked.items():
        if is_single and not any(map(_has_folders, folders)):
            raise DataError(
                f"--{part}-split is {name}, and {root} is a single folder, without folders of splits; leave it out"
            )
        found[part] = _get_part(root, folders, part, name)
    train, val = found["train"], found["val"]
    if is_evaluation and val is not None:
        return train, val
    if train is None or val is None:
        there, other = (train, "val") if train is not None else (val, "train")
        assert there is not None
        raise DataError(f"{root} has {there.name}/ and no {other}/; expected both, or folders of classes alone")
    if train == val:
        raise DataError(f"{train} would train and validate; give another --train-split or --val-split")
    return train, val


def _get_part(root: Path, folders: list[Path], part: str, name: str) -> Path:
    chosen = next((folder for folder in folders if folder.name == name), None)
    if chosen is None:
        known = ", ".join(folder.name for folder in reversed(folders))
        raise DataError(f"--{part}-split is {name}, and {root} has no such folder; it has {known}")
    return chosen


def _is_class(folder: Path) -> bool:
    """Tell whether a folder is one of several classes: trains beside cars, not training images."""
    others = [f for f in folder.parent.iterdir() if f.is_dir() and f != folder and not f.name.startswith(".")]
    return bool(others) and not _has_folders(folder)


def _has_folders(folder: Path) -> bool:
    return any(f.is_dir() for f in folder.iterdir())
