"""Put a server under load, and check that no answer is lost or wrong.

    python tests/load.py                                # all stages, --model base: about a quarter of an hour
    python tests/load.py --requests 1000 --seconds 20   # a quick look
    python tests/load.py --only half --rate 100         # one stage; rate: requests per second that the server can take

The requests are mixed: they have one to eight rows of five tasks, and one in fifty is invalid and must be refused.
Each answer is compared with that of `predict` for its task alone: the word or text must be equal, and each probability
must agree within 1e-4. The exit status is 0 if all answers are right.
"""

import argparse
import http.client
import itertools
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
from tuning import prompt_of

from tinyprompt import methods
from tinyprompt.files import models, tables
from tinyprompt.files.prompts import save_prompt
from tinyprompt.model import PROMPT, Model, Prompt
from tinyprompt.predict import label_scores, predict, probabilities
from tinyprompt.settings import Settings

ROOT = Path(__file__).parents[1]
NEAR = 1e-4  # largest allowed difference of a probability from that of `predict`
SIZES, SHARES = (1, 2, 4, 8), (0.6, 0.25, 0.1, 0.05)  # rows per request
TEXTS = 100  # texts per task
WORKERS = 240  # largest number of concurrent requests
REFUSED = [  # invalid bodies and their statuses
    (b'{"rows": [{"task": "none", "input": "soup"}]}', 404),
    (b'{"rows": []}', 422),
    (b'{"rows": [{"task": "topic", "input": "\\ud800"}]}', 422),
    (b'{"rows": [', 400),
    (b" " * (2**20 + 1), 413),
]


class Wanted(NamedTuple):
    """The answer of `predict`, and its probabilities."""

    text: str
    probabilities: dict[str, float]


class Reply(NamedTuple):
    """The outcome of a request. status 0: the request was lost; found is None unless it was answered."""

    status: int
    found: Any
    seconds: float  # since the due time
    body: Any  # the rows of the request, or the expected status of an invalid one


def prompts_of(model: Model) -> dict[str, Prompt]:
    """Return untrained prompts of several lengths and label words, and one of free text."""
    found = {}
    for seed, (name, length, words) in enumerate(
        [
            ("topic", 20, ("food", "money", "music", "nature", "sport")),
            ("sentiment", 20, ("bad", "good")),
            ("short", 5, ("yes", "no", "perhaps")),
            ("long", 60, ("question", "answer")),
            ("free", 20, None),
        ]
    ):
        settings = Settings(prompt_length=length, init="vocab", seed=seed, max_new_tokens=8)
        found[name] = prompt_of(model, methods.init_params(model, settings, words, ()), words, settings)
    return found


def expected_answers(model: Model, prompt: Prompt, texts: list[str]) -> dict[str, Wanted]:
    """Return the answer of `predict` to each text."""
    answers = predict(model, prompt, texts)
    shares: list[dict] = [{}] * len(texts)
    if prompt.label_words:
        found = probabilities(label_scores(model, prompt, texts)).tolist()
        shares = [dict(zip(prompt.label_words, row, strict=True)) for row in found]
    return {text: Wanted(*answer) for text, answer in zip(texts, zip(answers, shares, strict=True), strict=True)}


def difference(found: Any, wanted: Wanted) -> float:
    """Return the largest difference of a probability; infinity if the answers differ."""
    if found["text"] != wanted.text or found["probabilities"].keys() != wanted.probabilities.keys():
        return np.inf
    return max((abs(x - wanted.probabilities[word]) for word, x in found["probabilities"].items()), default=0.0)


class Server:
    """A server in a child process."""

    def __init__(self, model: str, folder: Path):
        self.words = [sys.executable, "-m", "tinyprompt", "serve", str(folder), "--model", model]
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> float:
        """Start the server, and wait until it answers. Return the seconds that this took."""
        started = time.monotonic()
        words = [*self.words, "--port", str(self.port)]
        self.process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while ask(self.port, b'{"rows": [{"task": "topic", "input": "soup"}]}')[0] != 200:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with {self.process.returncode}: {' '.join(words)}")
            time.sleep(0.02)
        return time.monotonic() - started

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop the server; return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)

    @property
    def memory(self) -> float:
        """Return the server's memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


def ask(port: int, body: bytes, kept: dict | None = None) -> tuple[int, Any]:
    """Post a body; return status and answers. kept: holds a connection for reuse. Status 0: no reply."""
    connection = (kept or {}).get("connection") or http.client.HTTPConnection("127.0.0.1", port, timeout=90)
    try:
        connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        status, found = reply.status, json.loads(reply.read())
        if kept is not None:
            kept["connection"] = connection
        return status, found.get("answers")
    except (OSError, http.client.HTTPException):
        connection.close()
        if kept:  # the server may close an idle connection: send that request again
            kept.clear()
            return ask(port, body, kept)
        return 0, None


class Load:
    """Requests that threads send to a server, and their outcomes."""

    def __init__(self, texts: dict[str, list[str]], seed: int = 0):
        self.rng, self.texts, self.lock = np.random.default_rng(seed), texts, threading.Lock()
        self.replies: list[Reply] = []

    def request(self) -> tuple[bytes, Any]:
        """Return a body, and its rows or, for an invalid one, the expected status."""
        with self.lock:
            if self.rng.random() < 0.02:
                return REFUSED[self.rng.integers(len(REFUSED))]
            tasks = self.rng.choice(list(self.texts), self.rng.choice(SIZES, p=SHARES))
            rows = [(str(task), self.texts[task][self.rng.integers(TEXTS)]) for task in tasks]
        return json.dumps({"rows": [{"task": task, "input": text} for task, text in rows]}).encode(), rows

    def send(self, port: int, due: Iterator[float], clients: int) -> list[Reply]:
        """Send a request at each due time (time.monotonic(); 0: at once) from several clients."""

        def client() -> None:
            kept: dict = {}
            while True:
                with self.lock:
                    at = next(due, None)
                if at is None:
                    return
                body, rows = self.request()
                time.sleep(max(at - time.monotonic(), 0))
                at = at or time.monotonic()
                self.replies.append(reply := Reply(*ask(port, body, kept), time.monotonic() - at, rows))
                time.sleep(0 if reply.status else 0.1)

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.replies


class Verdict(NamedTuple):
    """Counts of the outcomes of requests."""

    answered: int
    rows: int
    refused: int  # correctly, since they were invalid
    busy: int  # status 503 or 504
    lost: int
    wrong: int
    off: float  # the largest difference of a probability
    p50: float
    p99: float

    def __str__(self) -> str:
        return (
            f"{self.answered:,} answered ({self.rows:,} rows), {self.refused} refused as they should be, "
            f"{self.busy:,} asked to retry, {self.lost} lost, {self.wrong} wrong; "
            f"largest difference {self.off:.1e}; p50 {1000 * self.p50:.0f} ms, p99 {1000 * self.p99:.0f} ms"
        )


def judge(replies: list[Reply], right: Callable[[list, list], float]) -> Verdict:
    """Count the outcomes. right: the function that returns the error of the answers to some rows."""
    counts: Counter[str] = Counter()
    most, times = 0.0, []
    for status, found, seconds, body in replies:
        if status == 0:
            counts["lost"] += 1
        elif isinstance(body, int):
            counts["refused" if status == body else "wrong"] += 1
        elif status in (503, 504):
            counts["busy"] += 1
        elif status != 200 or len(found) != len(body) or (distance := right(found, body)) > NEAR:
            counts["wrong"] += 1
        else:
            most, counts["rows"] = max(most, distance), counts["rows"] + len(body)
            times.append(seconds)
    p50, p99 = np.percentile(times or [0], [50, 99])
    names = ("rows", "refused", "busy", "lost", "wrong")
    return Verdict(len(times), *(counts[name] for name in names), most, float(p50), float(p99))


class Bench:
    """The stages. Each prints a line and returns whether all answers were right."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.model = args, folder, models.load(args.model)
        self.prompts = prompts_of(self.model)
        rows = [tables.read_rows(ROOT / "tinyprompt" / "demo" / f"{name}.test.tsv") for name in ("topic", "sentiment")]
        some = [row.input for pair in zip(*rows, strict=True) for row in pair][:TEXTS]
        self.texts = dict.fromkeys(self.prompts, some)
        self.wanted = {name: expected_answers(self.model, prompt, some) for name, prompt in self.prompts.items()}
        for name, prompt in self.prompts.items():
            save_prompt(prompt, folder / (name if name == "short" else f"{name}.safetensors"))  # a PEFT folder
        self.server = Server(args.model, folder)
        self.rate = args.rate

    def right(self, found: list, rows: list) -> float:
        """Return the largest difference of answers from those of `predict`."""
        return max(
            difference(answer, self.wanted[task][text]) for answer, (task, text) in zip(found, rows, strict=True)
        )

    def say(self, stage: str, text: Any) -> None:
        print(f"{stage:<10}{text}", flush=True)

    def mixed(self) -> bool:
        """Send many requests as fast as possible; their rate is the server's capacity."""
        started = time.monotonic()
        replies = Load(self.texts).send(self.server.port, itertools.repeat(0.0, self.args.requests), self.args.clients)
        seconds = time.monotonic() - started
        verdict = judge(replies, self.right)
        self.rate = self.rate or verdict.answered / seconds
        self.say("mixed", f"{len(replies):,} requests of {self.args.clients} clients in {seconds:.0f} s: {verdict}")
        self.say("", f"{verdict.answered / seconds:.1f} requests, {verdict.rows / seconds:.0f} rows a second")
        return not verdict.lost and not verdict.wrong and not verdict.busy and len(replies) == self.args.requests

    def steady(self, stage: str, share: float, seconds: float) -> Verdict:
        """Send requests at random times with a given mean rate, however fast they are answered."""
        memory, done = [self.server.memory], threading.Event()

        def watch() -> None:
            while not done.wait(1):
                memory.append(self.server.memory)

        watcher = threading.Thread(target=watch)
        watcher.start()
        gaps = np.random.default_rng(1).exponential(1 / (share * self.rate), int(share * self.rate * seconds))
        replies = Load(self.texts, 1).send(self.server.port, iter(time.monotonic() + np.cumsum(gaps)), WORKERS)
        done.set()
        watcher.join()
        verdict = judge(replies, self.right)
        self.say(stage, f"{share * self.rate:.1f} requests a second for {gaps.sum():.0f} s: {verdict}")
        parts = {"before": memory[0], "half-way": memory[len(memory) // 2], "after": memory[-1], "at most": max(memory)}
        self.say("", "memory of the server: " + ", ".join(f"{x:.0f} MiB {name}" for name, x in parts.items()))
        return verdict

    def half(self) -> bool:
        """Send requests at half of the server's capacity."""
        verdict = self.steady("half", 0.5, min(self.args.seconds, 60))
        return not verdict.lost and not verdict.wrong and not verdict.busy

    def twice(self) -> bool:
        """Send requests at twice the server's capacity."""
        verdict = self.steady("twice", 2, self.args.seconds)
        return not verdict.lost and not verdict.wrong and verdict.busy > 0

    def replaced(self) -> bool:
        """Replace a prompt repeatedly. Each request must be answered entirely by one of the two versions."""
        other = replace(self.prompts["topic"], params={PROMPT: self.prompts["topic"].params[PROMPT][::-1].copy()})
        both = [self.wanted["topic"], expected_answers(self.model, other, self.texts["topic"])]
        used: Counter[int] = Counter()

        def error_of_either(found: list, rows: list) -> float:
            distances = [
                max(difference(answer, wanted[text]) for answer, (_, text) in zip(found, rows, strict=True))
                for wanted in both
            ]
            used[int(np.argmin(distances))] += 1
            return min(distances)

        load = Load({"topic": self.texts["topic"]}, 2)
        due = itertools.takewhile(lambda _: not done.is_set(), itertools.repeat(0.0))
        done, port = threading.Event(), self.server.port
        sender = threading.Thread(target=load.send, args=(port, due, 16))
        sender.start()
        for i in range(21):
            save_prompt((other, self.prompts["topic"])[i % 2], self.folder / "topic.safetensors")
            time.sleep(1.3)
        done.set()
        sender.join()
        verdict = judge(load.replies, error_of_either)
        self.say("replaced", f"21 times under load: {verdict}; by the first {used[0]:,}, by the second {used[1]:,}")
        time.sleep(2)
        rows = [("topic", text) for text in self.texts["topic"]]
        last = [ask(port, json.dumps({"rows": [{"task": t, "input": x}]}).encode())[1][0] for t, x in rows]
        now = max(difference(answer, both[1][text]) for answer, (_, text) in zip(last, rows, strict=True))
        self.say("", f"after the last one, all answers are its own: {now <= NEAR}")
        save_prompt(self.prompts["topic"], self.folder / "topic.safetensors")
        time.sleep(2)
        return not verdict.lost and not verdict.wrong and min(used[0], used[1]) > 0 and now <= NEAR

    def killed(self) -> bool:
        """Kill the server with -9 under load, and restart it at the same port. Repeated requests must be answered."""
        load, port, done = Load(self.texts, 3), self.server.port, threading.Event()
        due = itertools.takewhile(lambda _: not done.is_set(), itertools.repeat(0.0))
        sender = threading.Thread(target=load.send, args=(port, due, self.args.clients))
        sender.start()
        time.sleep(3)
        self.server.stop(signal.SIGKILL)
        before = sum(reply.status == 200 for reply in load.replies)
        seconds = self.server.start()
        time.sleep(5)
        done.set()
        sender.join()
        verdict = judge(load.replies, self.right)
        after = verdict.answered - before
        message = f"answers again {seconds:.1f} s after kill -9; {before:,} answered before, {after:,} since"
        self.say("killed", f"{message}; lost: under way or while it was down; {verdict}")
        return not verdict.wrong and after > 0 and self.server.process.poll() is None

    def stopped(self) -> bool:
        """Send SIGTERM under load. Requests that have arrived must be answered."""
        load, port = Load(self.texts, 4), self.server.port
        due = itertools.takewhile(lambda _: self.server.process.poll() is None, itertools.repeat(0.0))
        sender = threading.Thread(target=load.send, args=(port, due, self.args.clients))
        sender.start()
        time.sleep(3)
        started = time.monotonic()
        status = self.server.stop()
        seconds = time.monotonic() - started
        sender.join()
        verdict = judge(load.replies, self.right)
        self.say("stopped", f"exit status {status} in {seconds:.1f} s after SIGTERM; {verdict._replace(lost=0)}")
        return status == 0 and not verdict.wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base")
    parser.add_argument("--requests", type=int, default=10_000, help="of the first stage")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300, help="at twice what the server can take")
    parser.add_argument("--rate", type=float, help="requests a second that the server can take (measured)")
    parser.add_argument("--only", help="stages, with commas between them")
    args = parser.parse_args()
    stages = args.only.split(",") if args.only else ["mixed", "half", "twice", "replaced", "killed", "stopped"]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        try:
            wrong = [stage for stage in stages if not getattr(bench, stage)()]
        finally:
            bench.server.process.kill()
    print(f"not right: {', '.join(wrong)}" if wrong else "all right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
