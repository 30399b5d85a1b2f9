"""The counters of a server, for Prometheus."""

import contextlib
import time
from collections import Counter as Count
from collections.abc import Container, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one server, in a separate registry."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        names = ("path", "status")
        self.requests = Counter(
            "tinyprompt_requests", "Requests, by what they were answered.", names, registry=registry
        )
        self.seconds = Histogram(
            "tinyprompt_request_seconds", "From a request to its answer.", ["path"], buckets=SECONDS, registry=registry
        )
        self.rows = Counter("tinyprompt_rows", "Rows that were answered.", ["task"], registry=registry)
        self.batch_rows = Histogram("tinyprompt_batch_rows", "Rows of a batch.", buckets=ROWS, registry=registry)
        self.batch_seconds = Histogram(
            "tinyprompt_batch_seconds", "Seconds for a batch.", buckets=SECONDS, registry=registry
        )
        self.waiting = Gauge("tinyprompt_rows_waiting", "Rows in the queue.", registry=registry)
        self.tasks = Gauge("tinyprompt_tasks", "Prompts in use.", registry=registry)
        self.total: Count[str] = Count()  # includes deleted prompts
        self.errors = Gauge("tinyprompt_prompt_errors", "Files of the folder that cannot be used.", registry=registry)

    def answered(self, tasks: Sequence[str], known: Container[str]) -> None:
        """Count answered rows by task. Rows of a deleted task count only in the total."""
        self.total["rows"] += len(tasks)
        for name, rows in Count(tasks).items():
            if name in known:
                self.rows.labels(label(name)).inc(rows)

    def forget(self, task: str) -> None:
        """Remove the counter of a task."""
        with contextlib.suppress(KeyError):
            self.rows.remove(label(task))

    def batch(self, rows: int, seconds: float) -> None:
        """Count a batch."""
        self.batch_rows.observe(rows)
        self.batch_seconds.observe(seconds)

    def totals(self) -> dict[str, int]:
        """Return the numbers of requests and of answered rows."""
        return {name: self.total[name] for name in ("requests", "rows")}


def label(task: str) -> str:
    """Return the label of a task. Bytes of its name that are not UTF-8 are escaped."""
    return task.encode(errors="backslashreplace").decode()


class Measured:
    """ASGI middleware that counts requests: known paths by name, other paths together."""

    def __init__(self, app: Any, metrics: Metrics, paths: Sequence[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, path = time.perf_counter(), scope["path"] if scope["path"] in self.paths else "other"

        async def noted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.total["requests"] += 1
                self.metrics.requests.labels(path, message["status"]).inc()
                self.metrics.seconds.labels(path).observe(time.perf_counter() - started)
            await send(message)

        await self.app(scope, receive, noted)
