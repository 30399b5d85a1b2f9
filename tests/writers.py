"""Two processes write a prompt and a third reads it: check that no read mixes two versions.

    python tests/writers.py                  # all stages, about a minute
    python tests/writers.py --seconds 60     # for each stage

Two processes replace one prompt repeatedly, each with its own version. The versions differ in all vectors and in their
label words. A stage prints its figures. The exit status is 0 if no version was mixed and the server still answers.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
from serving import post, random_prompt, request_body, running_server, small_model

from tinyprompt.errors import CheckpointError
from tinyprompt.files.prompts import load_prompt, save_prompt
from tinyprompt.model import PROMPT
from tinyprompt.predict import answer

WORDS = (("food", "sport", "other"), ("eins", "zwei", "drei"))


def versions(model, length=3):
    return [random_prompt(model, words, seed, length) for seed, words in enumerate(WORDS)]


def rename(prompt, path):
    """Replace a prompt as the package does."""
    save_prompt(prompt, path)


def overwrite(prompt, path):
    """Overwrite a file in place, as `cp` does: empty it, then write it in two parts."""
    source = save_prompt(prompt, path.parents[1] / f"{os.getpid()}.safetensors")
    whole = source.read_bytes()
    with open(path, "wb") as file:
        for part in (whole[: len(whole) // 2], whole[len(whole) // 2 :]):
            file.write(part)
            file.flush()


def write_until(done, count, how, prompt, path):
    while not done.is_set():
        how(prompt, path)
        with count.get_lock():
            count.value += 1


class Writers:
    """Two processes that write two versions of a prompt to one path inside a `with` block."""

    def __init__(self, how, prompts, path):
        context = multiprocessing.get_context("spawn")
        self.done, self.count = context.Event(), context.Value("q", 0)
        how(prompts[0], path)
        self.processes = [
            context.Process(target=write_until, args=(self.done, self.count, how, prompt, path)) for prompt in prompts
        ]

    def __enter__(self):
        for process in self.processes:
            process.start()
        while self.count.value < 2:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.done.set()
        for process in self.processes:
            process.join()


def count_reads(prompts, path, seconds):
    """Read a prompt that two writers replace by renaming; count the versions, mixtures and refusals."""
    found = Counter(first=0, second=0, mixed=0, refused=0)
    with Writers(rename, prompts, path):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                read = load_prompt(path)
            except CheckpointError:
                found["refused"] += 1
                continue
            which = [
                np.array_equal(read.params[PROMPT], one.params[PROMPT]) and read.label_words == one.label_words
                for one in prompts
            ]
            found["first" if which[0] else "second" if which[1] else "mixed"] += 1
    return found


def answers(model, folder, how, prompts, seconds):
    """Ask a server while two writers replace its prompt; count the writes, and the answers of each version."""
    at = folder / "prompts"
    at.mkdir()
    right = [answer(model, [(prompt_shares, "soup")], "numpy")[0].probabilities for prompt_shares in prompts]
    found = Counter(first=0, second=0, neither=0, lost=0)
    how(prompts[0], at / "topic.safetensors")
    with (
        running_server(folder / "t5", at, {"reload-every": 0.02}) as (_, port),
        Writers(how, prompts, at / "topic.safetensors") as writers,
    ):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                status, reply = post(port, request_body(("topic", "soup")))
            except OSError:
                found["lost"] += 1
                break
            shares = reply["answers"][0]["probabilities"] if status == 200 else {}
            which = [
                shares.keys() == prompt_shares.keys()
                and all(abs(shares[w] - prompt_shares[w]) < 1e-5 for w in prompt_shares)
                for prompt_shares in right
            ]
            found["first" if which[0] else "second" if which[1] else "neither"] += 1
        found["writes"] = writers.count.value
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12, help="of each stage")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = small_model(folder)
        prompts = versions(model)
        stages = {
            "file": lambda: count_reads(prompts, folder / "p.safetensors", args.seconds),
            "adapter": lambda: count_reads(prompts, folder / "adapter", args.seconds),
            "renamed": lambda: answers(model, folder, rename, prompts, args.seconds),
            "in place": lambda: answers(model, folder, overwrite, prompts, args.seconds),
        }
        wrong = []
        for stage, run in stages.items():
            found = run()
            print(f"{stage:<10}" + ", ".join(f"{count} {what}" for what, count in found.items()), flush=True)
            if found["mixed"] or found["neither"] or found["lost"] or (found["refused"] and stage == "file"):
                wrong.append(stage)
            if (folder / "prompts").exists():
                (folder / "prompts").rename(folder / f"prompts of {stage}")
    print(f"not right: {', '.join(wrong)}" if wrong else "all right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
