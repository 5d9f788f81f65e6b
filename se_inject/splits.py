"""Splits: which images of a single folder train, and which validate.

Takes the images of a folder, gives the indices of both parts: drawn by a seed, or read from a `split.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from se_inject.contents import list_names, list_targets
from se_inject.errors import DataError
from se_inject.files import write_whole

VAL_SHARE = 0.2
"""The part of a single folder's images that validates."""
_FILE = "split.json"
_EXPECTED = "expected the split.json of a run's folder: root, and the images that train and val have"

Split = tuple[Sequence[int], Sequence[int]]
"""Indices of the images that train, and of those that validate."""


def draw_split(root: Path, images: Dataset[Any], seed: int) -> Split:
    """Split class by class, so that each class has its part on both sides.

    Raises:
        DataError: No class has two images.
    """
    targets = list_targets(images)
    assert targets is not None
    generator = torch.Generator().manual_seed(seed)
    chosen: set[int] = set()
    for label in sorted(set(targets)):
        indices = [i for i, target in enumerate(targets) if target == label]
        order = torch.randperm(len(indices), generator=generator).tolist()
        num = max(1, round(VAL_SHARE * len(indices))) if len(indices) > 1 else 0
        chosen.update(indices[i] for i in order[:num])
    if not chosen:
        raise DataError(f"{root} has one image a class, which leaves none to validate on; give train/ and val/")
    return [i for i in range(len(targets)) if i not in chosen], sorted(chosen)


def read_split(root: Path, images: Dataset[Any], file: Path) -> Split:
    """Read a split that was written down; the folder may have been moved since.

    Raises:
        DataError: The file is no split, or not of these images.
    """
    try:
        values = json.loads(file.read_text())
        train, val = (
            [str(Path(name).relative_to(values["root"])) for name in values[part]] for part in ("train", "val")
        )
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; {_EXPECTED}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{file} is no split of a folder; {_EXPECTED}") from error
    places = {str(Path(name).relative_to(root)): i for i, name in enumerate(list_names(images))}
    if missing := [name for name in (*train, *val) if name not in places]:
        raise DataError(f"{file} names images that {root} does not have, {missing[0]} first: {len(missing)} in all")
    if not val or set(train) & set(val):
        raise DataError(f"{file} has no images in val, or some in train too; {_EXPECTED}")
    return [places[name] for name in train], [places[name] for name in val]


def write_split(root: str, parts: Mapping[str, Dataset[Any]], folder: Path) -> None:
    """Write down how a single folder was split: `split.json`, with the paths of the images that train and validate.

    Raises:
        ArtifactError: The file cannot be written.
    """
    values = {"root": root, **{name: list_names(images) for name, images in parts.items()}}
    write_whole(folder / _FILE, lambda file: file.write(json.dumps(values, indent=1).encode()))
