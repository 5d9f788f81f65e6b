"""Files: write them whole or not at all, and read tensors without executing anything.

Takes and gives plain values and tensors. Knows nothing of networks.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import json
import os
import pickle
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from se_inject.claims import check_archive, check_tensors
from se_inject.errors import ArtifactError, get_first_line

SAFETENSORS = ".safetensors"
SUFFIXES = (".pt", ".pth", SAFETENSORS)
PROGRAMS = (".pt2", ".onnx")
"""Of torch.export and of ONNX."""
STATE_SUFFIXES = (*SUFFIXES, ".th", ".bin", ".ckpt", ".tar")
"""Of other people's state dicts; all but the third are what torch writes."""
_METADATA_KEY = "se_inject"
_ZIP = b"PK\x03\x04"
_PART = "..01234567.part"
"""What is added to the name of a file while it is written."""
_STALE = 3600.0
"""Seconds since its last change after which a part is taken for one whose writer was killed."""


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its target and rename it, so that the old or the new one is there, whole, at any time.

    Where the target is a link, what it points to is replaced. What killed writers of the same target left beside it is
    removed.

    Args:
        path: The target.
        write: Is given the open file.

    Raises:
        ArtifactError: The file cannot be written (no folder, no right, no space), or is there and read-only.
    """
    target = Path(os.path.realpath(path))
    failures: list[OSError] = []
    try:
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EROFS, "it is read-only")
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        try:
            with _Writer(io.FileIO(handle, "w"), failures) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o666 & ~_get_umask())
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else next(iter(failures), None)
        if cause is None:
            raise
        raise ArtifactError(f"{path} cannot be written: {cause.strerror or cause}") from error
    _sync_folder(target.parent)
    _remove_stale_parts(target)


class _Writer(io.BufferedWriter):
    """A file that remembers why a write failed: torch, which it then fails in, says something else."""

    def __init__(self, raw: io.FileIO, failures: list[OSError]) -> None:
        super().__init__(raw)
        self._failures = failures

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self._failures.append(error)
            raise


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut; not every system lets folders be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_stale_parts(path: Path) -> None:
    with contextlib.suppress(OSError):
        for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            if time.time() - part.stat().st_mtime > _STALE:
                part.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write tensors, and plain values beside them, as `.pt`/`.pth` (a dict that torch reads) or `.safetensors`.

    Raises:
        ArtifactError: The file cannot be written, or its suffix is none of the three.
    """
    check_suffix(path)
    if path.suffix == SAFETENSORS:
        # Of tensors that share memory, as tied weights do, safetensors wants a copy each.
        data = safetensors.torch.save(
            {
                key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for key, tensor in tensors.items()
            },
            metadata={_METADATA_KEY: json.dumps(values)},
        )
        write_whole(path, lambda file: file.write(data))
    else:
        kept = {key: _trim(tensor.detach().cpu()) for key, tensor in tensors.items()}
        write_whole(path, lambda file: torch.save({**values, "state_dict": kept}, file))


def _trim(tensor: Tensor) -> Tensor:
    """Give a view of a part of a tensor, or of one that is repeated, numbers of its own; else all would be written."""
    is_whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    return tensor if is_whole else tensor.clone(memory_format=torch.contiguous_format)


def read_values(path: Path, suffixes: Sequence[str] = SUFFIXES) -> dict[str, Any]:
    """Read a file of tensors as a dict; nothing in it is executed.

    A `.safetensors` file gives its tensors under "state_dict", and beside them the plain values that `write_tensors`
    put into its metadata.

    Raises:
        ArtifactError: There is no such file, it is cut short, holds code, or is of another kind.
    """
    check_suffix(path, suffixes)
    if not path.is_file():
        raise ArtifactError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            content = _read_safetensors(file, path) if path.suffix == SAFETENSORS else _read_torch(file, path)
    except ArtifactError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it names {found[1]}" if found else "or it is no file of torch's"
        raise ArtifactError(f"{path} holds more than tensors and plain values, and is not executed: {what}") from error
    except Exception as error:  # torch's reader raises whatever its next line stumbles on
        line = get_first_line(error)
        raise ArtifactError(f"{path} cannot be read, it is cut short or no file of tensors: {line:.300}") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds a {type(content).__name__}; expected a dict of tensors")
    return content


def _read_safetensors(file: IO[bytes], path: Path) -> object:
    with safetensors.safe_open(_hold(file, path), framework="pt") as opened:
        values = json.loads((opened.metadata() or {}).get(_METADATA_KEY, "{}"))
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  it is no dict
    return {**values, "state_dict": tensors} if isinstance(values, dict) else values


def _read_torch(file: IO[bytes], path: Path) -> object:
    is_archive = file.read(len(_ZIP)) == _ZIP
    if is_archive:
        check_archive(file, path)
    # Mapped memory ends where the file does: what a record claims beyond it is never there to be read.
    return torch.load(_hold(file, path), map_location="cpu", weights_only=True, mmap=is_archive)


def _hold(file: IO[bytes], path: Path) -> Path:
    """Name an open file by what stays its own: both readers open a path twice, and a writer may come in between."""
    held = Path(f"/proc/self/fd/{file.fileno()}")
    return held if held.exists() else path


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict: bare, or under `state_dict` or `model`; prefixes `module.` and `_orig_mod.` are dropped.

    Raises:
        ArtifactError: The file cannot be read, or holds no state dict.
    """
    values: Any = read_values(path, STATE_SUFFIXES)
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(values.get(key), dict):
            values = values[key]
            break
    if not values or not all(isinstance(value, Tensor) for value in values.values()):
        raise ArtifactError(
            f"{path} holds no state dict: neither itself nor its 'state_dict' or 'model' maps names to tensors"
        )
    tensors = check_tensors(values, path)
    for prefix in ("_orig_mod.", "module."):
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def check_target(path: Path, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Refuse a target that could not be written in the end.

    Raises:
        ArtifactError: The suffix names no format, or there is no such folder, or no right to write in it, or the file
            is there and read-only, or its name is too long.
    """
    check_suffix(path, suffixes)
    if not path.parent.is_dir():
        raise ArtifactError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ArtifactError(
            f"{path} cannot be written: {'it is a folder' if path.is_dir() else 'no right to write there'}"
        )
    if path.exists() and not os.access(path, os.W_OK):
        raise ArtifactError(f"{path} cannot be written: it is read-only")
    most = os.pathconf(path.parent, "PC_NAME_MAX") - len(_PART) if hasattr(os, "pathconf") else len(path.name)
    if len(os.fsencode(path.name)) > most:
        raise ArtifactError(f"{path} cannot be written: its name may have {most} bytes")


def check_suffix(path: Path, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Refuse a path whose suffix does not name a format; the usual ones are `.pt`, `.pth` and `.safetensors`.

    Raises:
        ArtifactError: The suffix is none of them.
    """
    if path.suffix not in suffixes:
        expected = f"one of {', '.join(suffixes)}" if len(suffixes) > 1 else suffixes[0]
        raise ArtifactError(f"{path} has the suffix {path.suffix or '(none)'!r}; expected {expected}")


def _get_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
