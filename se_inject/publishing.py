"""Publishing: write an injected network as a folder, or put that folder on the Hugging Face hub.

Takes an injected network, gives `model.safetensors`, `config.json` and a model card; `load` reads both places again.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from se_inject.artifact import read_artifact, save
from se_inject.card import Card, check_license, find_origin
from se_inject.errors import ArtifactError
from se_inject.files import write_whole
from se_inject.folders import CARD, CONFIG, WEIGHTS, is_folder, make_config
from se_inject.gates import is_fresh
from se_inject.hub import HUB, read_name, upload_folder
from se_inject.measured import read_run
from se_inject.plan import Plan
from se_inject.provenance import Source


def save_folder(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    license: str = "",  # noqa: A002
    run: str | os.PathLike[str] | None = None,
    source: Source | None = None,
) -> None:
    """Write an injected network as a folder: `model.safetensors`, `config.json` and a model card, README.md.

    `model.safetensors` is what `save` writes, and what `load` builds the network from; `config.json` repeats what it
    says for people and programs, and has to agree. A new folder is there whole or not at all. In a folder of ours that
    is there already the three files are replaced one by one, the card too; whoever reads a mix of two networks
    meanwhile is told so.

    Args:
        model: From `inject`, `load` or `optimize`.
        folder: Does not exist, is empty, or was written by this.
        license: Its short name on the hub, as in "mit"; for the card. If empty, that of the weights that timm fetched.
        run: The folder of the fine-tune that ended with this network; its recipe and scores go into the card.
        source: How the network is built; see `save`.

    Raises:
        ModelError: The model has not been injected.
        OptionError: The license is no short name.
        ArtifactError: The folder holds something else or cannot be written, or the run is of another network.

    Example:
        >>> save_folder(model, "birds", license="mit", run="runs/tuned")  # doctest: +SKIP
        >>> model = load("birds")  # doctest: +SKIP
    """
    target = Path(folder)
    publication = _Publication(model, source, license, None if run is None else Path(run))
    publication.check()
    check_folder(target)
    with _quoting(target):
        beside = target.absolute().parent / f".{target.absolute().name}.{secrets.token_hex(4)}.part"
        beside.mkdir()
        try:
            publication.write(beside, target.absolute().name, target.absolute().name)
            if target.is_dir():
                for name in (WEIGHTS, CONFIG, CARD):
                    (beside / name).replace(target / name)
            else:
                beside.rename(target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def push_to_hub(
    model: nn.Module,
    name: str,
    *,
    license: str = "",  # noqa: A002
    run: str | os.PathLike[str] | None = None,
    private: bool | None = None,
    token: str | None = None,
    source: Source | None = None,
) -> str:
    """Put an injected network on the Hugging Face hub, as `save_folder` writes it, in one commit.

    Args:
        model: From `inject`, `load` or `optimize`.
        name: "user/name"; the repository is made if there is none. "user/name@branch" writes to a branch.
        license: See `save_folder`.
        run: See `save_folder`.
        private: Whether a new repository can be seen by its owner alone; None is as the owner's settings say.
        token: Of the hub; by default that of HF_TOKEN or of `hf auth login`. HF_ENDPOINT says which hub.
        source: How the network is built; see `save`.

    Returns:
        The commit's address.

    Raises:
        ModelError: The model has not been injected.
        OptionError: The license is no short name.
        SourceError: The name is none.
        ArtifactError: The hub cannot be reached or refuses, or the repository holds something else.

    Example:
        >>> push_to_hub(model, "user/birds", license="mit")  # doctest: +SKIP
        >>> model = load("hf-hub:user/birds")  # doctest: +SKIP
    """
    address = HUB + name.removeprefix(HUB)
    publication = _Publication(model, source, license, None if run is None else Path(run))
    publication.check()
    title = read_name(address)[0].partition("/")[2]
    with tempfile.TemporaryDirectory(prefix="se-inject-") as folder:
        publication.write(Path(folder), title, address)
        return upload_folder(Path(folder), address, private=private, token=token)


def check_folder(folder: Path) -> None:
    """Refuse a folder that could not be written in the end, or that holds something else.

    Raises:
        ArtifactError: It is a file, holds something else, or lies where nothing may be written.
    """
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise ArtifactError(f"{folder} cannot be written: there is no folder {parent}")
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} cannot be written: it is a file")
    if not os.access(folder if folder.is_dir() else parent, os.W_OK):
        raise ArtifactError(f"{folder} cannot be written: no right to write there")
    if folder.is_dir() and any(folder.iterdir()) and not is_folder(folder):
        raise ArtifactError(f"{folder} holds something else; give a folder that is empty, not there, or one of ours")


@dataclass(frozen=True)
class _Publication:
    """What is to be published.

    Attributes:
        model: The network.
        source: How it is built, if that is known and not recorded on it.
        license: As the publisher says.
        run: The folder of its fine-tune.
    """

    model: nn.Module
    source: Source | None
    license: str
    run: Path | None

    def check(self) -> None:
        """Refuse what is wrong whatever the network is."""
        if self.license:
            check_license(self.license)

    def write(self, folder: Path, title: str, address: str) -> None:
        """Write the three files into an empty folder; what the others say is read from the first."""
        save(self.model, folder / WEIGHTS, source=self.source)
        values, state = read_artifact(folder / WEIGHTS)
        source = None if values["source"] is None else Source.from_values(values["source"])
        plan = Plan.from_json(json.dumps(values["plan"]))
        card = Card(
            title,
            address,
            plan,
            source,
            sum(parameter.numel() for parameter in self.model.parameters()),
            is_fresh=is_fresh(self.model),
            license=self.license,
            origin=find_origin(source, getattr(self.model, "pretrained_cfg", None)),
            measured=None if self.run is None else read_run(self.run, state),
        )
        for name, text in ((CONFIG, json.dumps(make_config(values), indent=1)), (CARD, str(card))):
            write_whole(folder / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]


@contextmanager
def _quoting(folder: Path) -> Iterator[None]:
    """Turn what the disk says into one line."""
    try:
        yield
    except ArtifactError:
        raise
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be written: {error.strerror or error}") from error
