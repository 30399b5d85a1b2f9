"""The command that answers over HTTP."""

import argparse
import importlib.util
import re
from typing import Any

from tinyprompt.cli.report import DEVICE, Output, argument, command, given, say
from tinyprompt.cli.report import model as model_argument
from tinyprompt.cli.report import settings as options
from tinyprompt.device import describe_device
from tinyprompt.files import models
from tinyprompt.files.prompts import Prompts
from tinyprompt.serve.limits import Limits

NEEDED = ("starlette", "uvicorn", "prometheus_client")


@command(
    "serve",
    "prompts --port 8000",
    argument("folder", metavar="FOLDER", help="folder of saved prompts; each file name is a task name"),
    model_argument(),
    argument("--host", metavar="HOST", default="127.0.0.1", help="address to listen at; 0.0.0.0 means all addresses"),
    argument("--port", type=int, metavar="N", default=8000, help="port to listen at; 0 means any free port"),
    argument(
        "--origin",
        metavar="URL",
        action="append",
        default=[],
        help="a site or proxy whose pages may send requests, such as https://example.org; may be repeated",
    ),
    DEVICE,
    options("limits", "batches", of=Limits),
)
def serve(args: argparse.Namespace) -> Output:
    """Answer requests over HTTP: many tasks, one frozen model.

    Changes in the folder of prompts take effect while the server runs. On SIGTERM or Ctrl-C, the server answers pending
    requests and exits.
    """
    missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
    if missing:
        raise ImportError(f"serve: {', '.join(missing)} not installed; pip install 'tinyprompt-t5[serve]'")
    from tinyprompt.serve import app

    limits = Limits(**given(args, Limits))
    origins = [check_origin(one) for one in args.origin]
    app.check_open_files(limits)
    model = models.load(args.model)
    prompts = Prompts(args.folder, model)
    if not prompts:
        say(f"warning: {args.folder}: no prompts yet; prompts are read when they are added")
    with app.listen(args.host, args.port) as sock:
        service = app.Service(model, prompts, limits, args.device, say)
        host, port = sock.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        say(describe_device(args.device))
        say(f"{len(service.tasks)} tasks at {url} (page), {url}/docs (API); Ctrl-C stops the server")
        app.run(service, sock, origins)
    found: dict[str, Any] = service.metrics.totals()
    return Output(found, f"answered {found['rows']:,} rows of {found['requests']:,} requests")


def check_origin(url: str) -> str:
    """Return an origin in the form that browsers send. Raises ValueError."""
    if not re.fullmatch(r"https?://[^/\s?#@*]+/?", url):
        raise ValueError(f"--origin: expected a scheme and a host, such as https://example.org, found {url!r}")
    return url.rstrip("/").lower()
