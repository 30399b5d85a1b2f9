"""The server. `Service` handles requests and rows; `run` handles sockets and signals."""

import asyncio
import contextlib
import ipaddress
import itertools
import json
import math
import re
import reprlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol, h11  # type: ignore[attr-defined]

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
SHOWN = 60  # length limit of a client's input that an error quotes
LISTED = 5  # number of tasks or keys that an error lists
LONGEST = 400  # length limit of an error
KEEP_ALIVE = 5.0  # seconds for the head of a request
LINGER = 1.0  # seconds in which a rejected client can read the reason
BACKLOG = 128  # pending connections of the socket
OWN_FILES = 64  # open files besides connections
LOCAL = ("localhost", "127.0.0.1", "[::1]")
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = SHOWN
# Pages load no external resources, and neither can their content.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self' 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
FAILURES = (ValueError, FloatingPointError, DeviceError)  # errors of a damaged model or prompt
BUSY = {"Retry-After": "1"}
CLOSE = {"Connection": "close"}  # because a part of the body was not read


class Json(JSONResponse):
    """JSON in ASCII, because file names and texts of clients may be invalid UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode()


class Service:
    """A model and a folder of prompts behind HTTP.

    Args:
        model: The frozen model.
        prompts: The folder of prompts.
        limits: The limits of the server.
        device: A device of DEVICES.
        tell: Called with a line when a prompt was read or cannot be read.
    """

    def __init__(
        self, model: Model, prompts: Prompts, limits: Limits, device: str, tell: Callable[[str], None]
    ) -> None:
        self.model, self.prompts, self.limits, self.device, self.tell = model, prompts, limits, device, tell
        self.tasks: dict[str, Prompt] = {}  # replaced atomically: a request sees either the old or the new dict
        self.errors: dict[str, str] = {}  # errors of prompts that can be read but not used
        self.metrics = Metrics()
        self.batcher = Batcher(self.work, limits)
        self.metrics.waiting.set_function(lambda: self.batcher.waiting)
        self.metrics.tasks.set_function(lambda: len(self.tasks))
        self.metrics.errors.set_function(lambda: len(self.problems))
        self.take(prompts)
        for error in self.problems.values():
            tell(f"warning: {error}")

    def app(self, hosts: Sequence[str] = (), origins: Sequence[str] = ()) -> Starlette:
        """Build the ASGI application.

        Args:
            hosts: The accepted host names of the server. If empty, every name is accepted.
            origins: Other sites whose pages may send requests, such as "https://example.org".
        """
        routes = [
            Route("/", static("page.html", "text/html")),
            Route("/docs", static("docs.html", "text/html")),
            Route("/style.css", static("../style.css", "text/css")),
            Route("/predict", self.predict, methods=["POST"]),
            Route("/tasks", self.list_tasks),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/openapi.json", static("openapi.json", "application/json")),
        ]
        middleware = [Middleware(Measured, metrics=self.metrics, paths=[route.path for route in routes])]
        if origins:
            cors: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["Content-Type"]}
            middleware.append(Middleware(CORSMiddleware, allow_origins=origins, **cors))
        middleware.append(Middleware(Guard, hosts=hosts, origins=origins, most=self.limits.max_bytes))
        app = Starlette(
            routes=routes,
            middleware=middleware,
            exception_handlers={HTTPException: refuse, ClientDisconnect: gone, Exception: broken},
            lifespan=self.lifespan,
        )
        app.router.redirect_slashes = False  # a redirect would use the host name that the client sent
        return app

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
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Reload changed prompts, and log new problems."""
        before, folder = self.problems, str(self.prompts.folder)
        self.errors.pop(folder, None)
        try:
            self.take(self.prompts.refresh())
        except CheckpointError as error:
            self.errors[folder] = str(error)
        except Exception as error:  # the next check may succeed
            self.errors[folder] = f"{folder}: {type(error).__name__}: {error}"
        for name, told in self.problems.items():
            if before.get(name) != told:
                self.tell(f"warning: {told}; earlier prompts stay in use")

    @property
    def problems(self) -> dict[str, str]:
        """Return the problems of the folder by file name or prompt name."""
        return self.prompts.errors | self.errors

    def take(self, changed: Iterable[str]) -> None:
        """Activate new and changed prompts that can answer a row, and drop deleted prompts.

        The row also opens a graph, so that the first client need not wait for it.
        """
        tasks = {name: prompt for name, prompt in self.tasks.items() if name in self.prompts}
        for name in changed:
            self.errors.pop(name, None)
            if name not in self.prompts:
                self.metrics.forget(name)
                self.tell(f"{name}: removed")
                continue
            try:
                self.batcher.submit([(self.prompts[name], "")], urgent=True).result()
                tasks[name] = self.prompts[name]
                self.tell(f"{name}: ready")
            except Exception as error:  # the other prompts stay in use
                self.errors[name] = f"{self.prompts.folder}: prompt {name!r}: {error or type(error).__name__}"
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
                check_format(request.headers)
                names, rows = rows_of(await request.body(), self.tasks, self.limits)
                stage = HTTPException(504, f"no answer within {self.limits.timeout:g} s; try again later", BUSY)
                answers = await asyncio.wrap_future(self.batcher.submit(rows))
        except TimeoutError:
            raise stage from None
        except Full:
            told = f"{self.batcher.waiting} rows are waiting, the limit is {self.limits.max_waiting}; try again later"
            raise HTTPException(503, told, BUSY) from None
        except FAILURES as error:
            raise HTTPException(500, " ".join(str(error).split())) from None
        self.metrics.answered(names, self.tasks)
        return Json({"answers": [one._asdict() for one in answers]})

    async def list_tasks(self, request: Request) -> Response:
        """GET /tasks."""
        found = [{"task": name, **about(prompt)} for name, prompt in sorted(self.tasks.items())]
        return Json({"model": self.model.name, "tasks": found, "errors": self.problems})

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while rows are answered."""
        reason = None if self.batcher.alive else "the server has stopped answering rows; restart it"
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


class Guard:
    """ASGI middleware that refuses pages of other sites, unknown host names, and bodies of unknown or excessive size.

    A page of another site cannot read answers, but it can send requests. If its own host name resolves to this server
    (DNS rebinding), it can also read answers, so host names are checked. Pages of `origins` are exempt.
    """

    def __init__(self, app: Any, hosts: Sequence[str], origins: Sequence[str], most: int) -> None:
        self.app, self.hosts, self.origins, self.most = app, hosts, origins, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refused = self.refused(Headers(scope=scope)) if scope["type"] == "http" else None
        await (refused or self.app)(scope, receive, send)

    def refused(self, headers: Headers) -> Response | None:
        """Return the response to a request with refused headers, or None."""
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        advice = "if you trust it, start the server with --origin"
        if self.hosts and re.sub(r":\d*$", "", host) not in self.hosts:
            here = ", ".join(self.hosts[:LISTED])
            return error_of(403, f"the host {shown(host)} is not this server ({here}); {advice} https://HOST", CLOSE)
        foreign = headers.get("sec-fetch-site") == "cross-site"
        if origin not in self.origins and (foreign if origin is None else foreign or host_of(origin) != host):
            return error_of(403, f"pages of {shown(origin)} are refused; {advice} ORIGIN", CLOSE)
        if "transfer-encoding" in headers:
            return error_of(411, "a body needs a Content-Length; chunked bodies are not supported", CLOSE)
        if int(headers.get("content-length", 0)) > self.most:
            return error_of(413, f"the body has more than {self.most:,} bytes; send fewer rows", CLOSE)
        return None


def host_of(origin: str) -> str:
    """Return the host and port of an origin, in the form of a Host header."""
    return origin.partition("://")[2].lower()


def hosts_of(host: str, origins: Sequence[str]) -> list[str]:
    """Return the host names of a server at a loopback address. At other addresses it is empty, and all are accepted.

    Example: `hosts_of("127.0.0.1", ["https://example.org"])`.
    """
    if not ipaddress.ip_address(host).is_loopback:
        return []
    own = f"[{host}]" if ":" in host else host
    return [*dict.fromkeys([*LOCAL, own, *(re.sub(r":\d*$", "", host_of(origin)) for origin in origins)])]


def check_format(headers: Headers) -> None:
    """Raise HTTPException if a body is compressed. Its Content-Type is ignored, because `curl --data` sends another."""
    coding = headers.get("content-encoding", "").lower()
    if coding not in ("", "identity"):
        raise HTTPException(415, f"Content-Encoding: expected none, found {shown(coding)}; send the JSON uncompressed")


def rows_of(body: bytes, tasks: dict[str, Prompt], limits: Limits) -> tuple[list[str], list[tuple[Prompt, str]]]:
    """Return the tasks and rows of a request. Raises HTTPException that names the row."""
    try:
        value = json.loads(body, object_pairs_hook=once, parse_constant=no_json)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not valid JSON ({str(error)[:SHOWN]})") from None
    rows = fields(value, "the body", {"rows": list})[0]
    if not 1 <= len(rows) <= limits.max_rows:
        raise HTTPException(422, f"rows: expected 1 to {limits.max_rows}, found {len(rows):,}; send several requests")
    names, found = [], []
    for number, row in enumerate(rows, 1):
        name, text = fields(row, f"row {number}", {"task": str, "input": str})
        if name not in tasks:
            known = f"the tasks are: {listed(sorted(tasks))}; see /tasks" if tasks else "there are no tasks"
            raise HTTPException(404, f"row {number}: no task {shown(name)}; {known}")
        if len(text) > limits.max_characters:
            told = f"has {len(text):,} characters; at most {limits.max_characters:,} are accepted"
            raise HTTPException(422, f"row {number}: 'input' {told}")
        try:
            check_text(text, f"row {number}: 'input'")
        except DataError as error:
            raise HTTPException(422, str(error)) from None
        if not text.strip():
            raise HTTPException(422, f"row {number}: 'input' is empty; expected a text")
        names.append(name)
        found.append((tasks[name], text))
    return names, found


def fields(value: Any, where: str, expected: dict[str, type]) -> list[Any]:
    """Return the values of a JSON object with exactly the expected keys. Raises HTTPException."""
    if not isinstance(value, dict) or value.keys() != expected.keys():
        found = f"the keys {listed(value) or 'none'}" if isinstance(value, dict) else shown(value)
        raise HTTPException(422, f"{where}: expected an object with {' and '.join(map(repr, expected))}, found {found}")
    for key, kind in expected.items():
        if not isinstance(value[key], kind):
            wanted = "a text" if kind is str else "a list"
            raise HTTPException(422, f"{where}: {key!r}: expected {wanted}, found {shown(value[key])}")
    return [value[key] for key in expected]


def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict from the pairs of a JSON object. Raises ValueError for a repeated key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def no_json(name: str) -> None:
    """Refuse NaN and infinity, which Python's parser accepts. Raises ValueError."""
    raise ValueError(f"{name} is not JSON")


def shown(value: Any) -> str:
    """Quote a client's input for an error: shortened, of limited depth, in ASCII."""
    text = SHORT.repr(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def listed(names: Collection[str]) -> str:
    """Quote the first names of a collection."""
    return ", ".join([*map(shown, itertools.islice(names, LISTED)), *["..."] * (len(names) > LISTED)])


def error_of(status: int, told: str, headers: Mapping[str, str] | None = None) -> Json:
    """Build the response to a refused request: one sentence of limited length."""
    return Json({"error": told if len(told) <= LONGEST else f"{told[:LONGEST]}..."}, status, headers)


async def refuse(request: Request, error: Exception) -> Response:
    """Build the response to a refused request: one sentence."""
    assert isinstance(error, HTTPException)
    told = {404: f"no such page: {shown(request.url.path)}; see /docs", 405: "wrong method for this page; see /docs"}
    detail = told.get(error.status_code, "") if error.detail in ("Not Found", "Method Not Allowed") else error.detail
    return error_of(error.status_code, detail, error.headers)


async def gone(request: Request, error: Exception) -> Response:
    """Build the response to a client that has disconnected."""
    return error_of(400, "the client closed the connection")


async def broken(request: Request, error: Exception) -> Response:
    """Build the response to an internal error. Its traceback is logged."""
    return error_of(500, "internal server error; see the log of the server")


class Connection(H11Protocol):
    """A connection with time limits for slow clients.

    The head of a request must arrive within the keep-alive time, and the request with its answer within twice the
    timeout. A connection beyond the limit gets an error and is closed.
    """

    limits = Limits()
    leaving: ClassVar[set[Any]] = set()  # rejected connections that are still open
    ended = False  # whether the client has stopped sending

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.max_size = 2**14  # bytes that are read and parsed before other connections get their turn
        self.timer = self.loop.call_later(self.timeout_keep_alive, transport.abort)
        if len(self.connections) > self.limits.max_connections:
            told = f"{self.limits.max_connections} connections are open, the limit; try again later"
            self.turn_away(error_of(503, told, BUSY | CLOSE))

    def turn_away(self, response: Response) -> None:
        """Send an error and close. The client may keep sending for a while; otherwise it could not read the error."""
        for event in (
            h11.Response(status_code=response.status_code, headers=response.raw_headers),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.connections.discard(self)
        self.timer.cancel()
        if len(self.leaving) >= self.limits.max_connections:
            self.transport.close()
            return
        self.leaving.add(self)
        self.transport.write_eof()
        self.timer = self.loop.call_later(LINGER, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        self.turn_away(error_of(400, "this is not HTTP/1.1; see /docs", CLOSE))

    def data_received(self, data: bytes) -> None:
        if self in self.leaving:
            return
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self.start_timer()

    def eof_received(self) -> Any:
        """Keep the connection if a complete request has arrived, because its client waits for the answer."""
        self.ended = True
        return self.under_way and not self.cycle.more_body

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.start_timer()
        if self.ended and not self.under_way:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.timer.cancel()
        self.leaving.discard(self)
        super().connection_lost(exc)

    @property
    def under_way(self) -> bool:
        """Return whether a request is being read or answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def start_timer(self) -> None:
        """Close the connection if the next step takes too long."""
        self.timer.cancel()
        if self not in self.leaving:
            seconds = 2 * self.limits.timeout if self.under_way else self.timeout_keep_alive
            self.timer = self.loop.call_later(seconds, self.transport.abort)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises ValueError if that fails."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG
        )
    except (OSError, OverflowError) as error:
        told = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{host}:{port}: cannot be served at ({told}); name another --host or --port") from None


def check_open_files(limits: Limits) -> None:
    """Raise the limit of open files to what `limits` needs. Raises ValueError if the system forbids it.

    A server that cannot accept a connection logs a traceback for each pending connection, and answers nobody.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    needed = 2 * (limits.max_connections + BACKLOG) + OWN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        except (OSError, ValueError):
            raise ValueError(
                f"setting max_connections: {limits.max_connections} need {needed} open files, but `ulimit -n` "
                f"allows {hard}; expected fewer connections or a higher limit"
            ) from None


def run(service: Service, sock: socket.socket, origins: Sequence[str] = ()) -> None:
    """Serve until SIGTERM or SIGINT, then answer pending requests and return.

    origins: Other sites whose pages may send requests. Their host names are also accepted as names of the server.
    """
    protocol = type("Connection", (Connection,), {"limits": service.limits, "leaving": set()})
    server = uvicorn.Server(
        uvicorn.Config(
            service.app(hosts_of(sock.getsockname()[0], origins), origins),
            http=protocol,
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_level="error",  # clients cause warnings, so their number is unlimited
            backlog=BACKLOG,
            access_log=False,
            server_header=False,
            timeout_keep_alive=math.ceil(min(KEEP_ALIVE, service.limits.timeout)),
            timeout_graceful_shutdown=math.ceil(service.limits.timeout) + 1,
        )
    )
    for name in (signal.SIGTERM, signal.SIGINT):  # at the end, uvicorn raises the signal again
        signal.signal(name, lambda *_: None)
    server.run([sock])
