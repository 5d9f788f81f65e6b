"""The Hugging Face hub: fetch a folder of ours from a repository, and put one there.

Takes `hf-hub:USER/NAME` (or `hf-hub:USER/NAME@REVISION`) and folders. huggingface_hub does the work, so that its cache,
its token, HF_HUB_OFFLINE and HF_ENDPOINT count; here it is said plainly why something did not work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from se_inject.downloads import get_sentence, offline_if_unreachable
from se_inject.errors import ArtifactError, SourceError
from se_inject.folders import CARD, CONFIG, WEIGHTS, is_ours, read_config

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HUB = "hf-hub:"


def locate(name: str | os.PathLike[str]) -> Path:
    """Find where a name lies on this disk: a path as it is, a repository of the hub in the hub's cache.

    Raises:
        SourceError: The repository cannot be fetched.
        ArtifactError: It holds no network of se-inject.
    """
    text = os.fspath(name)
    if not text.startswith(HUB):
        return Path(text)
    folder = fetch_folder(text)
    if folder is None:
        raise ArtifactError(f"{text} holds no network of se-inject; a network of timm's there is opened by timm")
    return folder


def fetch_folder(name: str) -> Path | None:
    """Fetch the folder that a repository holds; None if it holds something else, of which nothing more is fetched.

    Both files are of one commit, whatever is pushed in the meantime.

    Raises:
        SourceError: There is no such repository or revision, it may not be read, or the hub cannot be reached and the
            folder is not in the cache.
        ArtifactError: Its `config.json` cannot be read.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, revision = read_name(name)
    with _explaining(f"{name} could not be fetched", SourceError):
        api = _make_api()
        try:
            folder = Path(api.hf_hub_download(repository, CONFIG, revision=revision)).parent
        except LocalEntryNotFoundError:  # it is not known whether there is such a file
            raise
        except EntryNotFoundError:
            return None
        if not is_ours(read_config(folder)):
            return None
        api.hf_hub_download(repository, WEIGHTS, revision=folder.name)  # a snapshot's folder is named by its commit
    return folder


def upload_folder(folder: Path, name: str, *, private: bool | None, token: str | None) -> str:
    """Put the three files of a folder into a repository, in one commit; the repository is made if there is none.

    Returns:
        The commit's address.

    Raises:
        ArtifactError: It may not be written, cannot be reached, or holds something else than a network of ours.
    """
    repository, revision = read_name(name)
    with _explaining(f"{name} could not be written", ArtifactError):
        api = _make_api(token)
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        _check_free(api, repository, revision)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, commit_message="Write a network of se-inject",
            allow_patterns=[CONFIG, WEIGHTS, CARD],
        )  # fmt: skip
    return str(commit.commit_url)


def read_name(name: str) -> tuple[str, str | None]:
    """Split `hf-hub:USER/NAME@REVISION`; the prefix and the revision may be missing.

    Raises:
        SourceError: It is no such name.
    """
    repository, at, revision = name.removeprefix(HUB).partition("@")
    user, slash, short = repository.partition("/")
    if not (user and slash and short) or "/" in short or (at and not revision) or "@" in revision:
        raise SourceError(f"{name} is no name on the hub; expected {HUB}USER/NAME or {HUB}USER/NAME@REVISION")
    return repository, revision or None


def _check_free(api: HfApi, repository: str, revision: str | None) -> None:
    """Refuse to write over a network of somebody else's format."""
    held = {file.rfilename for file in api.model_info(repository, revision=revision).siblings or ()}
    if not held & {CONFIG, WEIGHTS}:
        return
    if CONFIG not in held or not is_ours(
        read_config(Path(api.hf_hub_download(repository, CONFIG, revision=revision)).parent)
    ):
        raise ArtifactError(f"{HUB}{repository} holds another network already; give a name that is free")


def _make_api(token: str | None = None) -> HfApi:
    from huggingface_hub import HfApi

    from se_inject import __version__

    return HfApi(token=token, library_name="se-inject", library_version=__version__)


@contextmanager
def _explaining(what: str, error_type: type[ArtifactError | SourceError]) -> Iterator[None]:
    """Turn what the hub's client raises into one line."""
    from huggingface_hub import constants, errors

    # Of the HTTP library that this version of the client uses.
    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        with offline_if_unreachable():
            yield
    except (ArtifactError, SourceError):
        raise
    except (OSError, RuntimeError, ValueError, http_error) as error:
        # "Error while uploading" says nothing, its cause does.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        hub = constants.ENDPOINT
        reasons = {
            errors.GatedRepoError: "its owner grants access: ask for it on the repository's page",
            errors.RepositoryNotFoundError: f"{hub} has no such repository, or it is private and "
            "HF_TOKEN may not read it",
            errors.RevisionNotFoundError: "the repository has no such revision",
            errors.RemoteEntryNotFoundError: f"the repository has a {CONFIG} of se-inject's and no {WEIGHTS}",
            errors.OfflineModeIsEnabled: f"{hub} cannot be reached, or HF_HUB_OFFLINE is set",
            errors.LocalEntryNotFoundError: f"{hub} cannot be reached, and it is not in the cache",
        }
        reason = next((text for kind, text in reasons.items() if isinstance(cause, kind)), get_sentence(cause))
        if getattr(getattr(cause, "response", None), "status_code", None) in (401, 403) and type(cause) not in reasons:
            reason = f"the token (HF_TOKEN, or `hf auth login`) has no right to it, says {hub}"
        raise error_type(f"{what}: {reason}") from error
