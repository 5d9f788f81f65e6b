"""Folders: an artifact as a folder that people and hubs can read, `config.json` beside `model.safetensors`.

Takes and gives plain values. `model.safetensors` is an ordinary artifact, whole by itself, and what counts: a network
is built from it alone. `config.json` repeats what it says, for people, and in timm's names for programs that look for
those; a folder in which the two disagree is refused. Both may come from anybody: nothing in them is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from se_inject.errors import ArtifactError
from se_inject.provenance import Source

FORMAT = "se-inject"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_MAX_BYTES = 2**24
"""Of a `config.json`; the largest plan of all networks of timm and torchvision takes a thirtieth of it."""


def make_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Make the content of `config.json`: what the artifact says but for its tensors, and the same in timm's names.

    Args:
        values: Of the artifact, as it was read.
    """
    config = dict(values)
    source = None if values["source"] is None else Source.from_values(values["source"])
    if source is None or source.library != "timm" or ":" in source.name:
        return config
    architecture, _, tag = source.name.partition(".")
    num_classes = source.options.get("num_classes")
    preprocess = {key: value for key, value in source.preprocess.items() if key != "library"}
    theirs = {
        "architecture": architecture,
        "num_classes": num_classes,
        "label_names": list(source.classes),
        "model_args": dict(source.options),
        "pretrained_cfg": {"tag": tag, **preprocess, "num_classes": num_classes},
    }
    first = {key: config[key] for key in ("format", "version", "digest")}
    return {**first, **{key: value for key, value in theirs.items() if value}, **config}


def read_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a folder, whoever wrote it.

    Raises:
        ArtifactError: There is none, or it is no object of JSON, or too large to be one of ours.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ArtifactError(f"{folder} is no folder of se-inject: it has no {CONFIG}")
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ArtifactError(f"{path} has {size:,} bytes; expected at most {_MAX_BYTES:,}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} holds a {type(config).__name__}; expected an object")
    return config


def is_ours(config: Mapping[str, Any]) -> bool:
    """Tell whether a `config.json` is one of se-inject's."""
    return config.get("format") == FORMAT


def is_folder(path: Path) -> bool:
    """Tell whether a path is a folder of se-inject's."""
    try:
        return path.is_dir() and is_ours(read_config(path))
    except ArtifactError:
        return False


def find_weights(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """Find the artifact's file: the path itself, or in a folder `model.safetensors`, with the `config.json` beside it.

    Raises:
        ArtifactError: The folder is none of ours.
    """
    if not path.is_dir():
        return path, None
    config = read_config(path)
    if not is_ours(config):
        raise ArtifactError(f"{path} is no folder of se-inject: its {CONFIG} does not say {FORMAT!r} as its format")
    return path / WEIGHTS, config


def check_config(config: Mapping[str, Any] | None, values: Mapping[str, Any], folder: Path) -> None:
    """Refuse a `config.json` that says something else than the artifact beside it; what it says beyond is not read.

    Raises:
        ArtifactError: They disagree; the message says where.
    """
    if config is None:
        return
    try:
        wrong = [key for key, value in values.items() if config.get(key, _MISSING) != value]
    except RecursionError as error:
        raise ArtifactError(f"{folder / CONFIG} is nested too deeply") from error
    if wrong:
        raise ArtifactError(
            f"{folder} holds the {CONFIG} of one network and the {WEIGHTS} of another: they differ in "
            f"{', '.join(map(str, wrong))}; fetch or write the folder again"
        )


_MISSING = object()
