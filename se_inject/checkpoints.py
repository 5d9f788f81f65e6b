"""Checkpoints: where a training run stands, as a file from which it goes on.

Takes and gives a `Checkpoint` of tensors and plain values; written beside its target and renamed, read without
executing anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from se_inject.errors import ArtifactError, TrainingError
from se_inject.files import read_values, write_whole
from se_inject.records import compute_digest

CHECKPOINT = "checkpoint.pt"
FORMAT = "se-inject checkpoint"
FORMAT_VERSION = 2
"""1 had no digest."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands. No random state is needed: every draw is a function of the seed and the step.

    Attributes:
        step: How many steps are done.
        model: State dict of the network.
        ema: State dict of the averaged network; None if there is none.
        optimizer: State of the optimizer of the stage in which the next step is; empty at a stage's first step.
        settings: What must be the same for the run to go on: recipe, data, plan.
        history: The validations so far, as plain values.
        seconds: Time of the steps so far.
        unreadable: What of the training and of the validation images could not be read so far.
    """

    step: int
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    optimizer: Mapping[str, Any]
    settings: Mapping[str, Any]
    history: list[dict[str, Any]]
    seconds: float
    unreadable: Mapping[str, list[str]] = field(default_factory=dict)


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint of a run in place of the one before.

    Raises:
        ArtifactError: It cannot be written; the one before is still there.
    """
    values = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
    content = {"format": FORMAT, "version": FORMAT_VERSION, "digest": _compute_digest(values), **values}
    write_whole(folder / CHECKPOINT, lambda file: torch.save(content, file))


def read_checkpoint(folder: Path, settings: Mapping[str, Any]) -> Checkpoint | None:
    """Read the checkpoint of a run; None if there is none yet.

    Args:
        folder: The run's.
        settings: Those of the run that is to go on.

    Raises:
        ArtifactError: The file cannot be read, or is of a newer version.
        TrainingError: The checkpoint is of another run; the message lists what differs.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    values = read_values(path)
    names = {f.name for f in fields(Checkpoint)}
    needed = names - {"unreadable"}  # which older ones have not
    if values.get("format") != FORMAT or not needed <= set(values):
        raise ArtifactError(f"{path} is no checkpoint of se-inject")
    if not isinstance(values["version"], int) or values["version"] > FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {values['version']}, this se-inject reads up to {FORMAT_VERSION}: upgrade it"
        )
    given = {name: values[name] for name in names if name in values}
    if values["version"] > 1 and values.get("digest") != _compute_digest(given):
        raise ArtifactError(
            f"{path} is damaged: its digest is not that of what it holds; begin in another folder with --run"
        )
    found = Checkpoint(**given)
    if differences := _compare(found.settings, settings):
        raise TrainingError(
            f"{path} is of another run: {'; '.join(differences)}; go on with the same settings, or begin in another "
            f"folder with --run"
        )
    return found


def _compute_digest(values: Mapping[str, Any]) -> str:
    """Compute the digest of a tree of tensors and plain values."""
    leaves = {keystr(path): leaf for path, leaf in tree_flatten_with_path(dict(values))[0]}
    tensors = {key: leaf for key, leaf in leaves.items() if isinstance(leaf, Tensor)}
    return compute_digest(tensors, {key: leaf for key, leaf in leaves.items() if key not in tensors})


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    unknown = {"network"} - set(before)  # a run of an older version did not write it down
    same = before.get("digest") == now.get("digest") is not None
    for key in sorted({*before, *now} - unknown - ({"origin"} if same else set())):  # images may have moved
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _compare(old, new, f"{prefix}{key}.")
        elif old != new:
            shown = [text if len(text := repr(x)) < 60 else "..." for x in (old, new)]
            found.append(f"{prefix}{key} was {shown[0]} and is {shown[1]}")
    return found
