"""Signals: a wish to end, fulfilled where nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Signals:
    """Take Ctrl-C and a request to end as a wish, to be fulfilled between two steps; the second Ctrl-C is at once.

    One within another shares its wish: what comes in a run's last moments is there when the next run begins.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._is_at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        self.is_asked = any(outer.is_asked for outer in self._get_outer())
        return self

    def _get_outer(self) -> set[Signals]:
        owners = {getattr(handler, "__self__", None) for handler in self._before.values()}
        return {owner for owner in owners if isinstance(owner, Signals)}

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Fulfil a wish at once, by a KeyboardInterrupt, while there is nothing to lose."""
        self._is_at_once = True
        try:
            if self.is_asked:
                raise KeyboardInterrupt
            yield
        finally:
            self._is_at_once = False

    def _ask(self, number: int, _: object) -> None:
        if self._is_at_once or (self.is_asked and number == signal.SIGINT):
            raise KeyboardInterrupt
        self.is_asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for outer in self._get_outer():
            outer.is_asked |= self.is_asked
