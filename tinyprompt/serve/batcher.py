"""Batches of rows that arrive together: a bounded queue, and a worker thread."""

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, NamedTuple

from tinyprompt.serve.limits import Limits


class Full(Exception):
    """The queue is closed, or does not have room for these rows."""


class Place(NamedTuple):
    """A waiting row: its request, its index, and its time of arrival."""

    future: Future
    results: list[tuple[Any] | None]  # results of all rows of the request; None for pending rows
    at: int
    row: Any
    since: float


class Batcher:
    """Call `work(rows)`, which returns a result for each row, in one thread for the rows of several callers.

    A row waits at most `limits.batch_wait` seconds for other rows. A batch has at most `limits.batch_rows` rows.

    Example: `Batcher(lambda rows: [row + 1 for row in rows], Limits()).submit([1, 2]).result()`.
    """

    def __init__(self, work: Callable[[list[Any]], Sequence[Any]], limits: Limits) -> None:
        self._work, self._limits = work, limits
        self._queue: deque[Place] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Return the number of rows in the queue."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        """Return whether the thread is running."""
        return self._thread.is_alive() and not self._closed

    def submit(self, rows: Sequence[Any], urgent: bool = False) -> Future:
        """Queue rows. Returns a future of their results in order. Rows of a cancelled future are not computed.

        Args:
            rows: The rows, which are queued together or not at all.
            urgent: Process the rows first and without waiting for others. They always fit into the queue.

        Raises:
            Full: The rows do not fit into the queue.
        """
        future: Future = Future()
        results: list[tuple[Any] | None] = [None] * len(rows)
        since = -math.inf if urgent else time.monotonic()
        with self._changed:
            if not urgent and len(self._queue) + len(rows) > self._limits.max_waiting:
                self._queue = deque(place for place in self._queue if not place.future.done())
                if len(self._queue) + len(rows) > self._limits.max_waiting:
                    raise Full
            if self._closed:
                raise Full
            places = [Place(future, results, i, row, since) for i, row in enumerate(rows)]
            self._queue.extendleft(reversed(places)) if urgent else self._queue.extend(places)
            self._changed.notify()
        if not rows:
            future.set_result([])
        return future

    def close(self) -> None:
        """Refuse further rows, and return when the waiting rows are answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            self._answer(batch)

    def _take(self) -> list[Place] | None:
        """Return the next batch without cancelled rows, or None if the queue is closed and empty."""
        size = self._limits.batch_rows
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if not self._queue:
                return None
            left = self._queue[0].since + self._limits.batch_wait - time.monotonic()
            self._changed.wait_for(lambda: len(self._queue) >= size or self._closed, max(left, 0))
            batch: list[Place] = []
            while self._queue and len(batch) < size:
                place = self._queue.popleft()
                batch += [] if place.future.done() else [place]
            return batch

    def _answer(self, batch: list[Place]) -> None:
        """Compute a batch. If it fails, compute each row separately, so that a row fails only its own request."""
        try:
            results = self._work([place.row for place in batch]) if batch else []
            found = list(zip(batch, results, strict=True))
        except BaseException as error:  # including panics of Rust libraries, because the thread must continue
            if len(batch) == 1:
                settle(batch[0].future.set_exception, error)
            for place in batch if len(batch) > 1 else ():
                if not place.future.done():
                    self._answer([place])
            return
        for place, result in found:
            place.results[place.at] = (result,)
            if None not in place.results:
                settle(place.future.set_result, [result[0] for result in place.results if result])


def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
    """Set the outcome of a future, unless it was cancelled."""
    with contextlib.suppress(InvalidStateError):
        set_outcome(outcome)
