"""The processes that examine the zoo: one network at a time each, replaced when they die or take too long."""

import contextlib
import multiprocessing
import os
import time
from pathlib import Path

import torch

from tests.zoo import Row, examine

TIME_LIMIT = 300


def _work(connection, lock):
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        while (name := connection.recv()) is not None:
            connection.send(examine(name, lock))


class _Worker:
    """A process that examines one network after the other, and is replaced when it dies or takes too long."""

    def __init__(self, context, lock):
        self._context, self._lock = context, lock
        self.name, self.since = None, 0.0
        self._start()

    def _start(self):
        self.connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_work, args=(theirs, self._lock), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, name):
        self.name, self.since = name, time.perf_counter()
        self.connection.send(name)

    def take(self):
        """Return the row of the network that it is at, or None while it is at work."""
        seconds = time.perf_counter() - self.since
        try:
            if self.connection.poll(0.05):
                row, self.name = self.connection.recv(), None
                return row
            if seconds < TIME_LIMIT:
                return None
            error = f"no end after {TIME_LIMIT} s"
        except (EOFError, OSError):
            error = "its process died"
        row = Row(self.name, error=error, seconds=round(seconds, 2))
        self.stop()
        self.name = None
        self._start()
        return row

    def stop(self):
        self._process.kill()
        self._process.join()


def run(names, jobs):
    """Examine networks in `jobs` processes; gives rows as they come."""
    context = multiprocessing.get_context("spawn")
    workers = [_Worker(context, context.Lock()) for _ in range(jobs)]
    waiting = list(reversed(names))
    try:
        while waiting or any(worker.name for worker in workers):
            for worker in workers:
                if worker.name is None and waiting:
                    worker.give(waiting.pop())
                if worker.name is not None and (row := worker.take()) is not None:
                    yield row
    finally:
        for worker in workers:
            worker.stop()
