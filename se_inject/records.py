"""Records: our files of tensors and plain values, each of a kind, a format version and a digest of all that it holds.

Takes plain values and tensors, gives a file, and back. The digest finds damage, and changes that were made by hand; it
is no signature: who can write a file can write its digest too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.claims import check_tensors, check_values
from se_inject.errors import ArtifactError
from se_inject.files import read_values, write_tensors

FORMAT_VERSION = 2
"""Of all kinds. 1 had no digest."""


def write_record(path: Path, kind: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write plain values and tensors as a file of a kind; the same ones give the same bytes.

    Raises:
        ArtifactError: The file cannot be written, or its suffix names no format.
    """
    plain = json.loads(json.dumps(values))
    digest = compute_digest(tensors, {"format": kind, "version": FORMAT_VERSION, **plain})
    write_tensors(path, tensors, {"format": kind, "version": FORMAT_VERSION, "digest": digest, **plain})


def read_record(path: Path, kind: str, hint: str, *, needs: frozenset[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file of a kind: its plain values, with its format, version and digest, and its tensors.

    Nothing in it is executed.

    Args:
        path: `.pt`, `.pth` or `.safetensors`.
        kind: What it must be.
        hint: What to do with a file of another kind.
        needs: The values that it must have.

    Raises:
        ArtifactError: There is no such file, or it is damaged, of another kind, of a newer version, or claims more than
            it holds.
    """
    content = read_values(path)
    if content.get("format") != kind:
        raise ArtifactError(f"{path} is no {_name(kind)} of se-inject; {hint}")
    version = content.get("version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        shown = version if type(version) is int and 0 <= version < 1_000_000 else f"of type {type(version).__name__}"
        raise ArtifactError(
            f"{path} has format version {shown}, this se-inject reads up to {FORMAT_VERSION}: upgrade it"
        )
    if missing := sorted((needs | {"state_dict"}) - set(content)):
        raise ArtifactError(f"{path} is no whole {_name(kind)}: it has no {', '.join(missing)}")
    tensors = check_tensors(content.pop("state_dict"), path)
    values = check_values(content, path)
    described = {key: value for key, value in values.items() if key != "digest"}
    if version > 1 and values.get("digest") != compute_digest(tensors, described):
        raise ArtifactError(f"{path} is damaged, or was changed: its digest is not that of what it holds")
    return values, tensors


def compute_digest(tensors: Mapping[str, Tensor], values: object = None) -> str:
    """Compute the SHA-256 of plain values, and of the names, types, shapes and numbers of tensors.

    The order of the names does not matter, nor do devices and memory formats.

    Raises:
        ArtifactError: There is something else among them than plain tensors.
    """
    _check_plain(tensors)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{json.dumps(name)} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_plain(tensors: Mapping[str, object]) -> None:
    others = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if others:
        raise ArtifactError(f"the state dict holds {others[0]!r}, which is no tensor; an artifact holds tensors alone")
    special = [name for name, value in tensors.items() if type(value) not in {Tensor, nn.Parameter}]
    if special:
        raise ArtifactError(
            f"{special[0]} is a tensor of the class {type(tensors[special[0]]).__name__} (a quantised or a distributed "
            f"one); an artifact holds plain tensors alone: save first, quantise after"
        )


def _name(kind: str) -> str:
    return kind.removeprefix("se-inject").strip() or "artifact"
