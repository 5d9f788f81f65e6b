"""Streams: what a stream of timm's leaves out, which timm tells its log alone.

Takes a stream, gives its samples, and the names of the samples and files of it that cannot be read.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import IterableDataset

from se_inject.errors import DataError, get_first_line

_LOGGER = logging.getLogger("timm.data.readers.reader_wds")


class Stream(IterableDataset[Any]):
    """A stream that tells what it leaves out, in whichever process reads it.

    Args:
        samples: timm's.
        note: Is called with the name of each sample or file that cannot be read.
    """

    def __init__(self, samples: IterableDataset[Any], note: Callable[[str], None]) -> None:
        self._samples, self._note = samples, note

    def __iter__(self) -> Iterator[Any]:
        if not _LOGGER.isEnabledFor(logging.WARNING):  # it may have been silenced with all of timm's
            _LOGGER.setLevel(logging.WARNING)
        samples = iter(self._samples)
        while True:
            with note_skipped(self._note):
                try:
                    sample = next(samples)
                except StopIteration:
                    return
                except DataError:
                    raise
                except (OSError, TypeError, ValueError) as error:
                    raise DataError(f"the stream cannot be read: {get_first_line(error)}") from error
            yield sample


@contextmanager
def note_skipped(note: Callable[[str], None]) -> Iterator[None]:
    """Listen to what timm's reader of webdataset's files skips, instead of showing it on the console."""

    def take(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        note(_find_name() or record.getMessage())
        return False

    _LOGGER.addFilter(take)
    try:
        yield
    finally:
        _LOGGER.removeFilter(take)


def _find_name() -> str:
    """Find what is being skipped among webdataset's frames: its handler of errors is told the error alone."""
    frame = inspect.currentframe()
    while frame is not None:
        sample, url = frame.f_locals.get("sample"), frame.f_locals.get("url")
        if isinstance(sample, dict) and "__key__" in sample:
            return f"{sample.get('__url__')}:{sample['__key__']}"
        if isinstance(url, str) and frame.f_globals.get("__name__", "").startswith("webdataset."):
            return url
        frame = frame.f_back
    return ""
