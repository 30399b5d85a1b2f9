"""A server in a child process, its prompts, and requests to it."""

import contextlib
import http.client
import json
import re
import subprocess
import sys
from pathlib import Path

import files
import numpy as np
from tuning import prompt_of

from tinyprompt.files import models
from tinyprompt.files.prompts import save_prompt
from tinyprompt.model import PROMPT
from tinyprompt.settings import Settings

ROOT = Path(__file__).parents[1]
JSON = {"Content-Type": "application/json"}


def small_model(folder):
    return models.load(files.write(folder / "t5", files.SMALL, files.weights()))


def three_prompts(model, folder):
    """Write a folder of two prompts with label words and one for free text."""
    save_prompt(random_prompt(model, ("food", "sport", "other")), folder / "topic.safetensors")
    save_prompt(random_prompt(model, ("bad", "good"), 1, 5), folder / "sentiment.safetensors")
    save_prompt(random_prompt(model, None, 2), folder / "free.safetensors")
    return folder


def random_prompt(model, words, seed=0, length=3):
    vectors = np.random.default_rng(seed).normal(size=(length, model.config.d_model)).astype(np.float32)
    settings = Settings(prompt_length=length, max_new_tokens=4)
    return prompt_of(model, {PROMPT: vectors}, words, settings)


def request_body(*pairs):
    return {"rows": [{"task": task, "input": text} for task, text in pairs]}


@contextlib.contextmanager
def running_server(model, folder, options, open_files=None):
    """Start a server in a child process; yield it and its port. open_files: its limit on open files."""
    command = [sys.executable, "-m", "tinyprompt", "serve", str(folder), "--model", str(model), "--device", "numpy"]
    words = [f"--{name}={value}" for name, value in options.items()]
    shell = ["sh", "-c", f'ulimit -n {open_files}; exec "$@"', "sh"] if open_files else []
    words = [*shell, *command, "--port", "0", *words]
    server = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        port = None
        while port is None:
            line = server.stderr.readline()
            assert line, f"the server ended: {server.wait()}"
            port = (found := re.search(r"http://127\.0\.0\.1:(\d+)", line)) and int(found[1])
        yield server, port
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


def post(port, body, timeout=10):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request("POST", "/predict", json.dumps(body), JSON)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
