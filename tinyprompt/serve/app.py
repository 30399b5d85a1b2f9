"""The server. `Service` handles requests and rows; `run` handles sockets and signals."""

import asyncio
import contextlib
import json
import math
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinyprompt.data import check_text
from tinyprompt.errors import CheckpointError, DataError, DeviceError
from tinyprompt.files.prompts import Prompts
from tinyprompt.model import Model, Prompt
from tinyprompt.predict import Answer, answer
from tinyprompt.serve.batcher import Batcher, Full
from tinyprompt.serve.limits import Limits
from tinyprompt.serve.metrics import Measured, Metrics
from tinyprompt.settings import Settings

HERE = Path(__file__).parent
SHOWN = 60  # characters of what a client sent that an error repeats
LISTED = 20  # tasks that an error lists
KEEP_ALIVE = 5.0  # seconds that a connection is kept without a request, if a request may take as long
# Pages load nothing from elsewhere, and what is in them cannot either.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
FAILURES = (ValueError, FloatingPointError, DeviceError)  # of a model or a prompt that is damaged
BUSY = {"Retry-After": "1"}
CLOSE = {"Connection": "close"}  # where a part of the body was not read


class Json(JSONResponse):
    """JSON in ASCII: names of files and texts of clients may not be valid UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode()


class Service:
    """A model and a folder of prompts behind HTTP.

    tell: is given a line when a prompt was read, or cannot be.
    """

    def __init__(self, model: Model, prompts: Prompts, limits: Limits, device: str, tell: Callable[[str], None]):
        self.model, self.prompts, self.limits, self.device, self.tell = model, prompts, limits, device, tell
        self.tasks: dict[str, Prompt] = {}  # replaced as a whole: a request sees the old ones or the new ones
        self.errors: dict[str, str] = {}  # of prompts that can be read, but do not answer
        self.metrics = Metrics()
        self.batcher = Batcher(self.work, limits)
        self.metrics.waiting.set_function(lambda: self.batcher.waiting)
        self.metrics.tasks.set_function(lambda: len(self.tasks))
        self.metrics.errors.set_function(lambda: len(self.problems))
        self.take(prompts)
        for error in self.problems.values():
            tell(f"warning: {error}")

    def app(self) -> Starlette:
        """Build the ASGI application."""
        routes = [
            Route("/", static("page.html", "text/html")),
            Route("/docs", static("docs.html", "text/html")),
            Route("/predict", self.predict, methods=["POST"]),
            Route("/tasks", self.list_tasks),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/openapi.json", static("openapi.json", "application/json")),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(Measured, metrics=self.metrics, paths=[route.path for route in routes])],
            exception_handlers={HTTPException: refuse, ClientDisconnect: gone, Exception: broken},
            lifespan=self.lifespan,
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Watch the folder of prompts while the server runs, and answer waiting rows at the end."""
        watch = asyncio.create_task(self.watch())
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.to_thread(self.batcher.close)

    async def watch(self) -> None:
        """Check the folder of prompts periodically while the server runs."""
        while True:
            await asyncio.sleep(self.limits.reload_every)
            try:
                await asyncio.to_thread(self.refresh)
            except Exception as error:  # whatever is wrong with a file, the next look may find it right
                self.tell(f"warning: {self.prompts.folder}: {type(error).__name__}: {error}")

    def refresh(self) -> None:
        """Read changed prompts again, and log new problems."""
        before, folder = self.problems, str(self.prompts.folder)
        self.errors.pop(folder, None)
        try:
            self.take(self.prompts.refresh())
        except (CheckpointError, OSError) as error:
            self.errors[folder] = str(error)
        for name, told in self.problems.items():
            if before.get(name) != told:
                self.tell(f"warning: {told}; what was read before stays in use")

    @property
    def problems(self) -> dict[str, str]:
        """The problems of the folder, by the name of a file or a prompt."""
        return self.prompts.errors | self.errors

    def take(self, changed: Iterable[str]) -> None:
        """Use new and changed prompts if they answer a row, and drop deleted ones.

        The row also opens a first graph, so that the first client need not wait for it.
        """
        tasks = {name: prompt for name, prompt in self.tasks.items() if name in self.prompts}
        for name in changed:
            self.errors.pop(name, None)
            if name not in self.prompts:
                self.tell(f"{name}: removed")
                continue
            try:
                self.batcher.submit([(self.prompts[name], "")], urgent=True).result()
                tasks[name] = self.prompts[name]
                self.tell(f"{name}: ready")
            except FAILURES as error:
                self.errors[name] = f"{self.prompts.folder}: prompt {name!r}: {error}"
        self.tasks = tasks

    def work(self, rows: list[tuple[Prompt, str]]) -> list[Answer]:
        """Answer a batch, in the thread of the batcher."""
        started = time.perf_counter()
        found = answer(self.model, rows, self.device, few_shapes=True)
        self.metrics.batch(len(rows), time.perf_counter() - started)
        return found

    async def predict(self, request: Request) -> Response:
        """POST /predict."""
        stage = HTTPException(
            408, f"the request did not arrive within {self.limits.timeout:g} s; send it faster", CLOSE
        )
        try:
            async with asyncio.timeout(self.limits.timeout):
                body = await read_body(request, self.limits.max_bytes)
                names, rows = rows_of(body, self.tasks, self.limits)
                stage = HTTPException(504, f"no answer within {self.limits.timeout:g} s; try again later", BUSY)
                answers = await asyncio.wrap_future(self.batcher.submit(rows))
        except TimeoutError:
            raise stage from None
        except Full:
            told = f"{self.batcher.waiting} rows wait already, of at most {self.limits.max_waiting}; try again later"
            raise HTTPException(503, told, BUSY) from None
        except FAILURES as error:
            raise HTTPException(500, " ".join(str(error).split())) from None
        self.metrics.answered(names)
        return Json({"answers": [one._asdict() for one in answers]})

    async def list_tasks(self, request: Request) -> Response:
        """GET /tasks."""
        found = [{"task": name, **about(prompt)} for name, prompt in sorted(self.tasks.items())]
        return Json({"model": self.model.name, "tasks": found, "errors": self.problems})

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while rows are answered."""
        reason = None if self.batcher.alive else "no rows are answered any more; start the server again"
        try:
            self.model.check_files()
        except CheckpointError as error:
            reason = str(error)
        if reason:
            raise HTTPException(503, reason)
        return Json({"status": "ok", "tasks": len(self.tasks), "waiting": self.batcher.waiting})

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(generate_latest(self.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def static(name: str, kind: str) -> Callable:
    """Build an endpoint that returns a file of this folder."""
    text = (HERE / name).read_text(encoding="utf-8")

    async def endpoint(request: Request) -> Response:
        return Response(text, media_type=kind, headers=PAGE_HEADERS)

    return endpoint


def about(prompt: Prompt) -> dict[str, Any]:
    """Describe a prompt to a client."""
    words = None if prompt.label_words is None else list(prompt.label_words)
    return {"label_words": words, "max_input_tokens": Settings.saved(prompt.settings).max_input_tokens}


async def read_body(request: Request, most: int) -> bytes:
    """Read the body of a request. Raises HTTPException if it has more than `most` bytes."""
    told = HTTPException(413, f"the body has more than {most:,} bytes; send fewer rows", CLOSE)
    if int(request.headers.get("content-length", 0)) > most:
        raise told
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise told
    return body


def rows_of(body: bytes, tasks: dict[str, Prompt], limits: Limits) -> tuple[list[str], list[tuple[Prompt, str]]]:
    """Return the tasks and rows of a request. Raises HTTPException that names the row."""
    try:
        value = json.loads(body, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not valid JSON ({str(error)[:SHOWN]})") from None
    rows = fields(value, "the body", {"rows": list})[0]
    if not 1 <= len(rows) <= limits.max_rows:
        raise HTTPException(422, f"rows: expected 1 to {limits.max_rows}, found {len(rows):,}; send several requests")
    names, found = [], []
    for number, row in enumerate(rows, 1):
        name, text = fields(row, f"row {number}", {"task": str, "input": str})
        if name not in tasks:
            known = ", ".join([*sorted(tasks)[:LISTED], *["..."] * (len(tasks) > LISTED)]) or "none"
            raise HTTPException(404, f"row {number}: no task {shown(name)}; the tasks are: {ascii(known)[1:-1]}")
        if len(text) > limits.max_characters:
            told = f"has {len(text):,} characters; at most {limits.max_characters:,} are taken"
            raise HTTPException(422, f"row {number}: 'input' {told}")
        try:
            check_text(text, f"row {number}: 'input'")
        except DataError as error:
            raise HTTPException(422, str(error)) from None
        names.append(name)
        found.append((tasks[name], text))
    return names, found


def fields(value: Any, where: str, expected: dict[str, type]) -> list[Any]:
    """Return the values of a JSON object with exactly these keys. Raises HTTPException."""
    if not isinstance(value, dict) or value.keys() != expected.keys():
        found = f"the keys {', '.join(map(shown, value)) or 'none'}" if isinstance(value, dict) else shown(value)
        raise HTTPException(422, f"{where}: expected an object with {' and '.join(map(repr, expected))}, found {found}")
    for key, kind in expected.items():
        if not isinstance(value[key], kind):
            wanted = "a text" if kind is str else "a list"
            raise HTTPException(422, f"{where}: {key!r}: expected {wanted}, found {shown(value[key])}")
    return [value[key] for key in expected]


def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Read a JSON object without duplicate keys. Raises ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def shown(value: Any) -> str:
    """Quote input of a client in an error: short, and in ASCII."""
    text = ascii(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


async def refuse(request: Request, error: Exception) -> Response:
    """Build the response to a refused request: one sentence."""
    assert isinstance(error, HTTPException)
    told = {404: f"no such page: {shown(request.url.path)}; see /docs", 405: "wrong method for this page; see /docs"}
    detail = told.get(error.status_code, "") if error.detail in ("Not Found", "Method Not Allowed") else error.detail
    return Json({"error": detail}, error.status_code, error.headers)


async def gone(request: Request, error: Exception) -> Response:
    """Build the response to a client that has left."""
    return Json({"error": "the client closed the connection"}, 400)


async def broken(request: Request, error: Exception) -> Response:
    """Build the response to an internal error. The traceback is logged."""
    return Json({"error": "the server has a fault; its log says more"}, 500)


class Connection(H11Protocol):
    """A connection that is cut off if a request with its answer takes too long, however slowly a client sends or reads.

    One beyond the limit is refused whatever it asks.
    """

    limits = Limits()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            told = f"{self.limits.max_connections} connections are open already; try again later"
            self.app = Json({"error": told}, 503, BUSY | CLOSE)
        self.start_timer()

    def on_response_complete(self) -> None:
        self.timer.cancel()
        self.start_timer()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.timer.cancel()
        super().connection_lost(exc)

    def start_timer(self) -> None:
        """Cut the connection off if a request and its answer take too long."""
        seconds = self.timeout_keep_alive + 2 * self.limits.timeout
        self.timer = self.loop.call_later(seconds, self.transport.abort)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises ValueError if there is none."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=256
        )
    except (OSError, OverflowError) as error:
        told = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{host}:{port}: cannot be served at ({told}); name another --host or --port") from None


def run(service: Service, sock: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then answer pending requests and return."""
    protocol = type("Connection", (Connection,), {"limits": service.limits})
    server = uvicorn.Server(
        uvicorn.Config(
            service.app(),
            http=protocol,
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=math.ceil(min(KEEP_ALIVE, service.limits.timeout)),
            timeout_graceful_shutdown=math.ceil(service.limits.timeout) + 1,
        )
    )
    for name in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises again, in the end, the signal that stopped it
        signal.signal(name, lambda *_: None)
    server.run([sock])
