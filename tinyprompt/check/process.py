"""Other engines in processes of their own: the parent asks for a call by its name, the child computes and answers.

The answer is the seconds that the call took, or the float that it returned. Arrays pass through files.
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

REST = 0.05  # seconds between two calls, in which the threads of the engine before stop spinning


def serve(calls: dict[str, Callable[[], Any]]) -> None:
    """Answer each line of standard input, the name of a call, with the float it returns, else with its seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        out = calls[line.strip()]()
        seconds = time.perf_counter() - started
        print(json.dumps(out if isinstance(out, float) else seconds), file=answers, flush=True)


class Engine:
    """A running engine: ask it for a call, get the seconds, or the float that it returns. Close it in the end."""

    def __init__(self, name: str, words: Sequence[Any], folder: Path):
        """words: the command; folder: where its last words are kept."""
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
        except BaseException:  # also Ctrl-C
            self.close()
            raise

    def ask(self, call: str) -> float:
        time.sleep(REST)
        assert self.process.stdin
        with suppress(BrokenPipeError):  # `_answer` says why
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
    """The variables of an engine's process: all cores for all of them, no network, nothing left behind."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    return kept | {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}


def run_once(words: Sequence[Any], folder: Path) -> str:
    """What a command prints. Raises ValueError if it fails."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment(folder))
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"{' '.join(map(str, words[1:4]))}: stopped with exit status {done.returncode}: {last}")
    return done.stdout
