"""Claims: refuse a file that says more than its bytes hold, before anything is made of it.

Takes an archive, plain values or tensors that came from a file, gives them as they may be used, or refuses them. A file
may come from anybody: what it makes us do is bounded by its size.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from se_inject.errors import ArtifactError

_LOCAL_HEADER = 30
"""Bytes before an entry's name, in front of its data (APPNOTE.TXT 6.3.10, section 4.3.7)."""
_MAX_PICKLE = 64 << 20
_MAX_VALUES = 1_000_000
_MAX_TEXT = 32 << 20
_MAX_DEPTH = 64
_MAX_NAME = 500
_NUM_VIEWS = 4
"""How often the tensors may show each byte of the file: tied weights and views do it a few times."""


def check_archive(file: IO[bytes], path: Path) -> None:
    """Refuse a zip archive that is not laid out as torch lays it out: entries as they are, one after the other.

    Compressed entries could be a thousand times their size; overlapping ones are read many times.

    Args:
        file: The open archive.
        path: What it is called.

    Raises:
        ArtifactError: It has compressed or encrypted entries, some that overlap or reach beyond the file, or two of one
            name.
        BadZipFile: It is no archive.
    """
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    if len({entry.filename for entry in entries}) != len(entries):
        raise _refuse(path, "two entries of its archive have the same name")
    end = 0
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise _refuse(path, f"the entry {entry.filename!r} is compressed, which torch never does")
        if entry.flag_bits & 1:
            raise _refuse(path, f"the entry {entry.filename!r} is encrypted")
        if entry.header_offset < end:
            raise _refuse(path, f"the entry {entry.filename!r} overlaps another one")
        end = entry.header_offset + _LOCAL_HEADER + len(entry.filename.encode()) + entry.file_size
        if end > size:
            raise _refuse(path, f"the entry {entry.filename!r} reaches beyond the end of the file")
        if entry.filename.endswith(".pkl") and entry.file_size > _MAX_PICKLE:
            raise _refuse(path, f"the entry {entry.filename!r} has {entry.file_size:,} bytes of other than tensors")


def check_values(values: object, path: Path) -> Any:
    """Return plain values as JSON has them: dicts by names, lists, text, numbers, booleans and None.

    Values that stand in several places count each time, so that a few bytes cannot be a million values.

    Raises:
        ArtifactError: There are others, or too many, or they are nested too deeply.
    """
    left = _MAX_VALUES
    text = _MAX_TEXT

    def take(value: object, depth: int) -> Any:
        nonlocal left, text
        left -= 1
        if isinstance(value, str):
            text -= len(value)
        if left < 0 or text < 0 or depth > _MAX_DEPTH:
            raise _refuse(path, "its values are too many, or nested too deeply")
        if value is None or type(value) in (bool, str, float):
            return value
        if type(value) is int and abs(value) < 1 << 63:
            return value
        if type(value) in (list, tuple):
            return [take(item, depth + 1) for item in value]  # type: ignore[attr-defined]
        if isinstance(value, dict) and all(type(key) is str for key in value):
            return {take(key, depth): take(item, depth + 1) for key, item in dict.items(value)}
        raise _refuse(path, f"it holds a {type(value).__name__} among its plain values")

    return take(values, 0)


def check_tensors(tensors: object, path: Path) -> dict[str, Tensor]:
    """Return tensors by name, each with its own numbers behind it.

    A view can show one number a billion times, and a pickle can give a tensor attributes that hide its methods.

    Raises:
        ArtifactError: They are no dict of tensors on the CPU, or claim more numbers than the file has.
    """
    if not isinstance(tensors, dict):
        raise _refuse(path, f"its tensors are a {type(tensors).__name__}; expected a dict")
    found: dict[str, Tensor] = {}
    seen: dict[tuple[object, ...], int] = {}
    for name, value in dict.items(tensors):
        if (
            type(name) is not str
            or not name.isprintable()
            or len(name) > _MAX_NAME
            or type(value) not in (Tensor, nn.Parameter)
        ):
            raise _refuse(path, f"it holds a {type(value).__name__} by {name!r:.80} among its tensors")
        tensor = Tensor.detach(value)
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise _refuse(path, f"the tensor {name!r:.80} is sparse, quantized or on another device")
        num_bytes = tensor.numel() * tensor.element_size()
        if num_bytes > tensor.untyped_storage().nbytes():
            raise _refuse(path, f"the tensor {name!r:.80} claims more numbers than the file has for it")
        seen[tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()] = num_bytes
        found[name] = tensor
    if sum(seen.values()) > _NUM_VIEWS * path.stat().st_size:
        raise _refuse(path, "its tensors claim more numbers than it has")
    return found


def check_weights(num_weights: int, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a file that describes more weights than it has, before they are made.

    Raises:
        ArtifactError: It does.
    """
    num_held = sum(tensor.numel() for tensor in tensors.values())
    if num_weights > num_held:
        raise _refuse(path, f"its blocks would have {num_weights:,} parameters, and it holds {num_held:,} numbers")


def _refuse(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"{path} is refused: {reason}; it was not written by se-inject or torch, or is damaged")
