"""Run other engines in their own processes. The parent requests a call by name, and the child answers.

The answer is the duration of the call in seconds, or the float that it returned. Arrays are exchanged through files.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

REST = 0.05  # pause between two calls, until the threads of the previous engine stop spinning


def serve(calls: dict[str, Callable[[], Any]]) -> None:
    """Answer each line of standard input, the name of a call, with the float that it returns or its duration (s)."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the output of libraries out of the answers
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        out = calls[line.strip()]()
        seconds = time.perf_counter() - started
        print(json.dumps(out if isinstance(out, float) else seconds), file=answers, flush=True)


def timed(call: Callable[[], Any], seconds: float, least: int = 1) -> list[float]:
    """Call a function to warm it up, then at least `least` times and for this duration. Returns each duration (s)."""
    call()
    found: list[float] = []
    while len(found) < least or sum(found) < seconds:
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return found


class Engine:
    """A running engine process. `ask` requests a call; `close` ends the process."""

    def __init__(self, name: str, words: Sequence[Any], folder: Path) -> None:
        """words: the command; folder: where standard error is stored."""
        self.name, self.errors = name, folder / f"{name}.err"
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [*map(str, words)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(folder),
            )
        try:
            self._answer()
        except BaseException:  # including Ctrl-C
            self.close()
            raise

    def ask(self, call: str) -> float:
        time.sleep(REST)
        assert self.process.stdin
        with suppress(BrokenPipeError):  # `_answer` reports the reason
            self.process.stdin.write(call + "\n")
            self.process.stdin.flush()
        return float(json.loads(self._answer()))

    def _answer(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            last = self.errors.read_text().strip().rpartition("\n")[2]
            raise ValueError(f"engine {self.name}: stopped with exit status {self.process.wait()}: {last}")
        return line

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of an engine's process: all cores for every engine, no network, no bytecode files."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    return kept | {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}


def run_once(words: Sequence[Any], folder: Path) -> str:
    """Return the output of a command. Raises ValueError if the command fails."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment(folder))
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"{' '.join(map(str, words[1:4]))}: stopped with exit status {done.returncode}: {last}")
    return done.stdout
