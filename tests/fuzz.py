"""Damage files at random, and check how the commands handle them.

    python tests/fuzz.py --cases 2000            # --seed 0
    python tests/fuzz.py --cases 20 --only prompt

Each case damages one file (changes, cuts or repeats bytes, copies bytes from another file, or changes values in its
JSON) and runs a command that reads it. A case passes if the exit status is 0, 1 or 2 within 10 seconds, without a
traceback, in less than 1 GiB of memory, and if the last line of a refusal names a file. Failures are printed, and the
exit status is then 1.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import files
import numpy as np

from tinyprompt.check import ledger
from tinyprompt.cli.main import main
from tinyprompt.export import graphs as export
from tinyprompt.files import models, prompts

ROWS = "".join(f"film {i}\t{'bad' if i % 2 else 'good'}\n" for i in range(12))
SECONDS, MEMORY = 10, 2**20  # limits of a case: seconds, and KiB of the process
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    7,
    10**6,
    2**70,
    1e308,
    "",
    "x",
    "\x1b[31m",
    "\ud800",
    [],
    {},
    [1],
    {"a": 1},
    [[0]],
]
TOKENS = [
    b"\0",
    b"\xff" * 8,
    b"{",
    b"}",
    b"[",
    b"null",
    b"-1",
    b"1e999",
    b'"',
    b"\n",
    b"\t",
    b"\x80\x02",
    b"PK\3\4",
    b"NaN",
]


def prepare(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """Write a valid file of each kind; return its path and a command that reads it."""
    model = files.write(folder / "model", files.SMALL, files.weights())
    train = folder / "rows.tsv"
    train.write_text("input\ttarget\n" + ROWS)
    (folder / "rows.csv").write_text("input,target\n" + ROWS.replace("\t", ","))
    rows = [line.split("\t") for line in ROWS.splitlines()]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"input": a, "target": b}) + "\n" for a, b in rows))
    tune = ["tune", str(train), "--dev", str(train), "--model", str(model), "--steps", "1", "--batch-size", "2"]
    tune += ["--prompt-length", "2", "--device", "numpy", "--out"]
    run_command([*tune, str(folder / "p.safetensors")])
    prompt = prompts.load_prompt(folder / "p.safetensors")
    prompts.save_prompt(prompt, folder / "p.npy")
    prompts.save_prompt(prompt, folder / "peft")
    np.savez(folder / "p.npz", a=prompt.array, b=prompt.array[:1])
    opened = models.load(model)
    case = ledger.draw(opened, length=2)
    ledger.save_case(case, folder / "case.npz")
    np.save(folder / "gradient.npy", case.prompt)
    with contextlib.suppress(Exception):  # onnx may be missing
        export.export(model, folder / "onnx", export.Shape(1, 3, 2, 2))
    use = ["--model", str(model), "--device", "numpy"]
    predict = lambda path: ["predict", str(path), "a film", *use]
    score = lambda path: ["eval", str(folder / "p.safetensors"), str(path), *use]
    found = {
        "model": (model / "model.safetensors", ["inspect", str(model)]),
        "config": (model / "config.json", ["inspect", str(model)]),
        "tokenizer": (model / "tokenizer_config.json", ["inspect", str(model)]),
        "prompt": (folder / "p.safetensors", predict(folder / "p.safetensors")),
        "resume": (folder / "p.safetensors", [*tune[:-1], "--resume", str(folder / "p.safetensors"), "--steps", "2"]),
        "npy": (folder / "p.npy", ["inspect", str(folder / "p.npy"), "--model", str(model)]),
        "npz": (folder / "p.npz", ["inspect", str(folder / "p.npz"), "--model", str(model)]),
        "peft": (folder / "peft" / "adapter_model.safetensors", predict(folder / "peft")),
        "peft config": (folder / "peft" / "adapter_config.json", predict(folder / "peft")),
        "tsv": (folder / "rows.tsv", score(folder / "rows.tsv")),
        "csv": (folder / "rows.csv", score(folder / "rows.csv")),
        "jsonl": (folder / "rows.jsonl", score(folder / "rows.jsonl")),
        "case": (folder / "case.npz", ["check", str(model), "--batch", str(folder / "case.npz"), "--save", os.devnull]),
        "gradient": (
            folder / "gradient.npy",
            ["check", str(model), "--batch", str(folder / "case.npz"), "--gradient", str(folder / "gradient.npy")],
        ),
        "onnx": (folder / "onnx" / "step.onnx", ["inspect", str(folder / "onnx" / "step.onnx")]),
    }
    return {kind: (path, words) for kind, (path, words) in found.items() if path.exists()}


def change_json(whole: bytes, rng: np.random.Generator) -> bytes | None:
    """Change one or two values in JSON, or in the JSON header of a file. Return None if there is no JSON."""
    size = int.from_bytes(whole[:8], "little")
    head = whole[8 : 8 + size] if size < len(whole) else whole
    try:
        value = json.loads(head)
    except ValueError:
        return None
    for _ in range(rng.integers(1, 3)):
        change(value, rng)
    text = json.dumps(value).encode()
    return text if head is whole else len(text).to_bytes(8, "little") + text + whole[8 + size :]


def change(node: Any, rng: np.random.Generator) -> None:
    """Change one value somewhere in nested lists and dicts: replace it, rename its key, or delete it."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
        return
    key = keys[rng.integers(len(keys))]
    inner = node[key]
    if isinstance(inner, str) and inner[:1] in "[{" and rng.random() < 0.7:  # JSON inside metadata
        with contextlib.suppress(ValueError):
            nested = json.loads(inner)
            change(nested, rng)
            node[key] = json.dumps(nested)
    elif isinstance(inner, dict | list) and inner and rng.random() < 0.7:
        change(inner, rng)
    elif isinstance(node, dict) and rng.random() < 0.3:
        node[f"{key}x"] = node.pop(key)
    elif rng.random() < 0.2:
        del node[key]
    else:
        node[key] = copy.deepcopy(ODD[rng.integers(len(ODD))])


def damaged(whole: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Apply one to three changes to the bytes or, if the file contains JSON, to its values."""
    data = bytearray(whole)
    if rng.random() < 0.5 and (changed := change_json(whole, rng)):
        return changed
    for _ in range(rng.integers(1, 4)):
        # Half of the changes hit the beginning, where the headers are.
        at = int(rng.integers(0, len(data) + 1) if rng.random() < 0.5 else rng.integers(0, min(len(data), 400) + 1))
        size = int(rng.integers(1, 12))
        match rng.integers(0, 7):
            case 0:
                data[at : at + size] = rng.bytes(len(data[at : at + size]))
            case 1 if data:
                data[at % len(data)] ^= 1 << int(rng.integers(8))
            case 2:
                del data[at:]
            case 3:
                del data[at : at + size]
            case 4:
                data[at:at] = data[at : at + size] * int(rng.integers(1, 40))
            case 5:
                data[at : at + size] = TOKENS[rng.integers(len(TOKENS))]
            case _:
                start = int(rng.integers(0, len(other) + 1))
                data[at : at + size] = other[start : start + size]
    return bytes(data)


class Hang(BaseException):
    """A case exceeded its time limit."""


def raise_hang(*_):
    raise Hang


def run_command(words: list[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit status and standard error."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            return main(words), err.getvalue()
        except SystemExit as stop:
            return int(stop.code or 0), err.getvalue()


def verdict(words: list[str], path: Path) -> str:
    """Return "ran", "refused", or a description of the failure."""
    signal.alarm(SECONDS)
    try:
        status, err = run_command(words)
    except Hang:
        return f"HANG of more than {SECONDS} s"
    except BaseException:
        return f"TRACEBACK {traceback.format_exc()}"
    finally:
        signal.alarm(0)
    last = err.rstrip("\n").rpartition("\n")[2]
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > MEMORY:
        return "MEMORY above 1 GiB"
    if status in (0, 1):
        return "ran"
    if status != 2 or not last.startswith("tinyprompt: "):
        return f"NO REFUSAL: exit status {status}: {last}"
    names = {path.name, path.parent.name, "option"}
    return "refused" if any(name in last for name in names) else f"NAMES NO FILE: {last}"


def run(kind: str, path: Path, words: list[str], seeds: range, other: bytes) -> list[tuple[int, str]]:
    """Run some cases in a child process, so that a crash ends only these; return their verdicts."""
    readable, writable = os.pipe()
    if os.fork() == 0:
        os.close(readable)
        signal.signal(signal.SIGALRM, raise_hang)
        try:
            whole = path.read_bytes()
            with os.fdopen(writable, "w") as pipe:
                for seed in seeds:
                    path.write_bytes(damaged(whole, other, np.random.default_rng([seed, len(kind)])))
                    print(json.dumps([seed, verdict(words, path)]), file=pipe, flush=True)
        finally:
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        found = [tuple(json.loads(line)) for line in pipe]
    os.wait()
    return found if len(found) == len(seeds) else [*found, (seeds[len(found)], "CRASH of the process")]


def fuzz(cases: int, seed: int, only: str) -> int:
    """Run the cases and print a table. Return exit status 1 if a case fails."""
    with tempfile.TemporaryDirectory() as made:
        kinds = {kind: found for kind, found in prepare(Path(made)).items() if only in kind}
        each, wrong = -(-cases // len(kinds)), 0
        whole = {kind: path.read_bytes() for kind, (path, _) in kinds.items()}
        print(f"{'file':<12}{'cases':>7}{'ran':>7}{'refused':>9}{'wrong':>7}")
        for i, (kind, (path, words)) in enumerate(kinds.items()):
            other, found = list(whole.values())[i - 1], []
            for start in range(0, each, 100):
                seeds = range(seed + start, seed + min(start + 100, each))
                found += run(kind, path, words, seeds, other)
                path.write_bytes(whole[kind])
            counts = Counter(text if text in ("ran", "refused") else "wrong" for _, text in found)
            print(f"{kind:<12}{len(found):>7}{counts['ran']:>7}{counts['refused']:>9}{counts['wrong']:>7}", flush=True)
            for number, text in [(n, text) for n, text in found if text not in ("ran", "refused")][:3]:
                print(f"  {kind}, seed {number}: {text.strip()[-1500:]}")
            wrong += counts["wrong"]
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="in all (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each kind (0)")
    parser.add_argument("--only", default="", help="kinds whose name has this")
    args = parser.parse_args()
    sys.exit(fuzz(args.cases, args.seed, args.only))
