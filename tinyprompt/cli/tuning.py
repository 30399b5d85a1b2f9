"""Commands that tune a prompt and use it."""

import argparse
import csv
import importlib.util
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from tinyprompt import data, methods, train
from tinyprompt.cli.report import (
    COLUMNS,
    DEVICE,
    INPUT,
    PROMPT,
    TASK,
    Output,
    argument,
    chunks,
    command,
    given,
    say,
    visible,
)
from tinyprompt.cli.report import model as model_argument
from tinyprompt.cli.report import settings as options
from tinyprompt.data import Row
from tinyprompt.device import describe_device
from tinyprompt.errors import CheckpointError, DataError
from tinyprompt.files import hub, io, models, prompts
from tinyprompt.fit import check_fit
from tinyprompt.model import Model, Prompt
from tinyprompt.predict import label_scores, predict, probabilities, stream
from tinyprompt.settings import Settings
from tinyprompt.tasks import metrics, registry
from tinyprompt.tasks.registry import DEMO, DEMO_TASKS, TASKS
from tinyprompt.tools import bench, figures
from tinyprompt.train import Result, TaskData

DEMO_SETTINGS = Settings(
    steps=400, batch_size=16, prompt_length=20, optimizer="adam", schedule="linear", eval_every=40
)  # fmt: skip
LENGTHS = (1, 5, 20, 50, 100, 150)  # of the paper's table 4
ANSWERS = (".tsv", ".csv")  # endings of what --rows writes
IN_TSV = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})  # what a field of a .tsv cannot hold
MANY = 500  # vectors, or rows of a batch, of which the cost is said
CONFUSION = 10  # labels up to which a confusion matrix is printed
ROWS = "a .tsv, .csv or .jsonl file, or the task's own; of a mixture a,b one file each"


@command(
    "demo",
    "--task sentiment --model small",
    argument("--task", choices=DEMO_TASKS, default="topic", help="which built-in data"),
    model_argument(),
    argument("--seed", type=int, metavar="N", default=0, help="seed of the first values and the order of the rows"),
    argument("--out", metavar="DIR", default="tinyprompt-demo", help="folder for the prompt and the curve"),
    DEVICE,
)
def demo(args: argparse.Namespace) -> Output:
    """Tune a prompt on built-in data; compare it with no prompt and the majority class."""
    started, path = time.perf_counter(), Path(args.out) / f"{args.task}.safetensors"
    prompts.check_target(path)
    model, settings = models.load(args.model), replace(DEMO_SETTINGS, seed=args.seed)
    rows, dev, test = (data.read_rows(DEMO / f"{args.task}.{part}.tsv") for part in ("train", "dev", "test"))
    words = data.label_words(rows)
    say(describe_device(args.device))
    vectors = f"{settings.prompt_length} x {model.config.d_model}"
    say(f"frozen T5 {model.name}; task {args.task}: {', '.join(words or ())}; prompt {vectors} float32")
    bare = registry.evaluate(model, Prompt(label_words=words), test, args.device)
    result = tuned(args, model, TaskData(rows, dev, words, train.right_answers), settings, path)
    curve: Path | None = path.with_suffix(".png")
    try:
        result.plot(curve)
    except ImportError:
        curve = None
    answers, targets = predict(model, result.prompt, [row.input for row in test], args.device), [r.target for r in test]
    right = next((row for row, said in zip(test, answers, strict=True) if said == row.target), test[0])
    found = {
        "majority": metrics.majority([row.target for row in rows], targets),
        "unprompted": bare.mean,
        "tuned": metrics.accuracy(answers, targets),
    }
    seconds = round(time.perf_counter() - started, 1)
    names = ("majority class", "frozen model, no prompt", "frozen model, tuned prompt")
    lines = [f"accuracy on {len(test)} test rows it never saw"]
    lines += [f"  {name:<28}{x:6.3f}" for name, x in zip(names, found.values(), strict=True)]
    lines.append(f"prompt saved to {path}" + (f", learning curve to {curve}" if curve else "") + f"; {seconds} s")
    lines.append(f"try: tinyprompt predict {path} {json.dumps(right.input)}")
    about = {"task": args.task, "test_rows": len(test), "seconds": seconds, "device": args.device}
    files = {"prompt": str(path), "curve": str(curve) if curve else None}
    return Output({**about, **found, **files}, "\n".join(lines))


def tuned(
    args: argparse.Namespace, model: Model, task: TaskData, settings: Settings, path: Path, resume: Prompt | None = None
) -> Result:
    """Tune with a progress bar, and save the best prompt at every dev score. After Ctrl-C, say where it is."""
    started, saved, run = time.perf_counter(), False, train.run(model, task, settings, args.device, resume)
    try:
        with io.claimed(path):
            for progress in train.with_bar(run, settings.steps):
                if progress.prompt:
                    prompts.save_prompt(progress.prompt, path)
                    saved = True
    except (CheckpointError, DataError) as error:
        if resume and not str(error).startswith(str(path)):
            raise type(error)(f"{args.resume}: {error}") from None
        raise
    except KeyboardInterrupt:
        if not saved:
            raise
        go_on = "" if path.suffix == ".npy" else f"; to go on, repeat the command with --resume {path}"
        raise KeyboardInterrupt(f"the best prompt so far is in {path}{go_on}") from None
    return Result.of(progress, time.perf_counter() - started)


@command(
    "tune",
    "train.tsv --dev dev.tsv --out mine.safetensors --steps 500",
    argument("train", metavar="TRAIN", nargs="+", help=f"training rows: {ROWS}"),
    argument("--dev", metavar="FILE", action="append", help="dev rows (a fifth of the training rows)"),
    model_argument(),
    argument("--out", metavar="FILE", help="where the prompt goes (prompt.safetensors, or that of --resume)"),
    argument("--seeds", type=int, metavar="N", help="tune N prompts, with seeds from --seed on: FILE-0 to FILE-(N-1)"),
    argument("--resume", metavar="PROMPT", help="saved prompt whose training goes on (--steps may grow)"),
    argument("--plot", metavar="FILE", help="where to draw the learning curve, a .png file"),
    DEVICE,
    COLUMNS,
    options("data", "method", "optimiser", "text"),
)
def tune(args: argparse.Namespace) -> Output:
    """Tune a prompt, or what another method trains, on rows of a file.

    It is saved at every dev score, with all that --resume needs to go on as if the run had never stopped.
    """
    check_plot(args.plot)
    resume = prompts.load_prompt(args.resume) if args.resume else None
    if resume and resume.train_state is None:
        raise ValueError(f"{args.resume}: has no training state to resume; to start from it: --init-file {args.resume}")
    settings = Settings(**given(args))
    if resume:
        settings = Settings.saved(resume.settings | given(args), args.resume)
    check_task(settings.task, args.resume if resume and "task" not in given(args) else "--task")
    path = Path(args.out or args.resume or "prompt.safetensors")
    runs = {path: settings}
    if args.seeds is not None:
        if args.seeds < 1 or args.resume or args.plot:
            wrong = "expected 1 or more" if args.seeds < 1 else "goes without --resume and --plot"
            raise ValueError(f"--seeds {args.seeds}: {wrong}")
        seeds = range(settings.seed, settings.seed + args.seeds)
        runs = {path.with_stem(f"{path.stem}-{seed}"): replace(settings, seed=seed) for seed in seeds}
    for path in runs:
        prompts.check_target(path, settings.method)
    model = models.load(args.model)
    if resume:
        check_fit(resume, model, args.resume)
    check_sizes(args, settings, model)
    done = [tune_one(args, model, settings, path, resume) for path, settings in runs.items()]
    if args.seeds is None:
        return done[0]
    return Output({"prompts": [one.data for one in done]}, "\n".join(str(one.text) for one in done))


def tune_one(args: argparse.Namespace, model: Model, settings: Settings, path: Path, resume: Prompt | None) -> Output:
    """Tune with one seed."""
    rows, dev = read_parts(args, settings)
    builtin = settings.task in TASKS
    words = resume.label_words if resume and not builtin else label_words_for(args, settings.task, rows)
    say(describe_device(args.device))
    say(f"{len(rows)} train rows, {len(dev)} dev rows; " + (f"labels: {', '.join(words)}" if words else "free text"))
    say_what_is_cut([row.input for row in (*rows, *dev)], model, settings)
    say_what_is_odd(rows, dev, words, model, settings)
    init: Any = TASKS[settings.task].init if builtin else ()
    if settings.init == "file" and settings.init_file and not resume:
        init = prompts.load_prompt(settings.init_file)
    task = TaskData(rows, dev, words, lambda said, of: registry.score(settings.task, said, of, words).mean, init)
    result = tuned(args, model, task, settings, path, resume)
    say_what_is_lost(result.prompt, path)
    if args.plot:
        result.plot(args.plot)
    found = {"prompt": str(path), "label_words": words, "dev": result.best_dev, "best_step": result.best_step}
    steps, seconds = len(result.history) - 1, round(result.seconds, 1)
    return Output({**found, "steps": steps, "seconds": seconds, "device": args.device}, f"{result}; saved to {path}")


def check_sizes(args: argparse.Namespace, settings: Settings, model: Model) -> None:
    """Raise ValueError for a size that the method does not have."""
    shapes = methods.trained_shapes(model.config, settings, 2)
    for name in given(args).keys() & {"prompt_length", "rank", "hidden"}:
        other = replace(settings, **{name: getattr(settings, name) + 1})
        if methods.trained_shapes(model.config, other, 2) == shapes:
            raise ValueError(f"--{name.replace('_', '-')}: method {settings.method!r} has no such size; leave it out")


def read_parts(args: argparse.Namespace, settings: Settings) -> tuple[list[Row], list[Row]]:
    """The training and the dev rows; without --dev, a fifth of the training rows are the dev rows."""
    rows = read(args, args.train, settings.task, training=True)
    if args.dev:
        return rows, read(args, args.dev, settings.task)
    if any(row.group or row.task for row in rows):
        raise DataError(f"--task {settings.task}: rows that belong together must not be split; name a file with --dev")
    if len(rows) < 2:
        raise DataError(f"{args.train[0]}: 1 row, expected at least 2; or name a file of dev rows with --dev")
    rows, dev = data.split(rows, 0.2, settings.seed)
    say(f"no --dev: {len(dev)} of the training rows, drawn with seed {settings.seed}, are the dev rows")
    return rows, dev


@command(
    "eval",
    "mine.safetensors test.tsv --rows answers.tsv",
    PROMPT,
    argument("data", metavar="DATA", nargs="+", help=f"rows: {ROWS}"),
    TASK,
    model_argument(),
    argument("--rows", metavar="FILE", help="write each row with its answer and the labels' probabilities, a .tsv"),
    DEVICE,
    COLUMNS,
    options("text", names=["max_input_tokens"]),
)
def evaluate(args: argparse.Namespace) -> Output:
    """Score a saved prompt on rows of a file."""
    started = time.perf_counter()
    check_ending(args.rows, *ANSWERS)
    if args.rows and Path(args.rows).resolve() in [Path(path).resolve() for path in args.data]:
        raise ValueError(f"--rows {args.rows}: is the file that the rows are read from; name another")
    model, prompt, settings = open_prompt(args)
    rows = read(args, args.data, settings.task, named=of_mixture(prompt))
    check_targets(", ".join(args.data), rows, prompt.label_words)
    say(describe_device(args.device))
    say_what_is_cut([row.input for row in rows], model, settings)
    answers, shares = answer(model, prompt, [row.input for row in rows], args.device)
    words = registry.labels_of(settings.task, words_of(args)) if settings.task in TASKS else prompt.label_words
    scores = registry.score(settings.task, answers, rows, words)
    if args.rows:
        write_rows(Path(args.rows), rows, answers, shares)
    found = {"task": settings.task, **scores.as_dict(), "device": args.device, "confusion": None}
    text = str(scores)
    if prompt.label_words and len(prompt.label_words) <= CONFUSION:
        found["confusion"] = metrics.confusion(answers, [row.target for row in rows], prompt.label_words)
        text += "\n" + confusion_text(found["confusion"], prompt.label_words)
    return Output(found | {"seconds": round(time.perf_counter() - started, 1)}, text)


def answer(model: Model, prompt: Prompt, texts: Sequence[str], device: str) -> tuple[list[str], list[dict[str, float]]]:
    """The answers to texts, with a progress bar, and for each the probability of each label word among them all."""
    words = prompt.label_words
    if not words:
        return [one for part in chunks(texts) for one in predict(model, prompt, part, device)], [{}] * len(texts)
    scores = np.concatenate([label_scores(model, prompt, part, device) for part in chunks(texts)])
    shares = probabilities(scores)
    return [words[i] for i in scores.argmax(1)], [dict(zip(words, row, strict=True)) for row in shares.tolist()]


def write_rows(path: Path, rows: Sequence[Row], answers: Sequence[str], shares: Sequence[dict[str, float]]) -> None:
    """Write a line a row: input, target, answer, and the probability of each label.

    A .csv is quoted. `data.read_rows` knows no quotes in a .tsv, so tabs and line breaks in a text become \\t and \\n.
    """
    table = [["input", "target", "answer", *(f"p({word})" for word in shares[0])]]
    for row, said, share in zip(rows, answers, shares, strict=True):
        table.append([row.input, row.target, said, *(f"{x:.6f}" for x in share.values())])
    file = StringIO()
    if path.suffix == ".csv":
        csv.writer(file, lineterminator="\n").writerows(table)
    else:
        file.writelines("\t".join(cell.translate(IN_TSV) for cell in line) + "\n" for line in table)
    io.write({path: file.getvalue().encode()})


def confusion_text(counts: list[list[int]], words: Sequence[str]) -> str:
    """The matrix as a table: targets down, answers across."""
    wide = max(6, *(len(word) for word in words))
    lines = [("target", *words), *((word, *map(str, row)) for word, row in zip(words, counts, strict=True))]
    return "\n".join(["rows by target and answer", *("  ".join(f"{cell:>{wide}}" for cell in line) for line in lines)])


@command(
    "predict",
    'mine.safetensors "Was the soup any good?"',
    PROMPT,
    argument("text", metavar="TEXT", nargs="*", help="texts to answer (lines on standard input)"),
    argument("--data", metavar="FILE", help="file of rows to take the texts from"),
    TASK,
    INPUT,
    model_argument(),
    argument("--stream", action="store_true", help="print free text while it is written"),
    DEVICE,
    options("text", names=["max_input_tokens"]),
)
def predict_texts(args: argparse.Namespace) -> Output:
    """Answer texts with a saved prompt."""
    if args.text and args.data:
        raise ValueError("--data: goes without texts; give one or the other")
    model, prompt, settings = open_prompt(args)
    texts = args.text
    if args.data:
        texts = [row.input for row in read(args, [args.data], settings.task, labelled=False, named=of_mixture(prompt))]
    texts = texts or lines_of_standard_input()
    if not any(texts):
        raise DataError("nothing to predict: give a text, --data FILE, or lines on standard input")
    for i, text in enumerate(texts, 1):
        data.check_text(text, f"text {i}")
    if args.stream and (args.json or prompt.label_words or settings.num_beams > 1):
        raise ValueError("--stream: goes with free text, written with one beam and without --json")
    say(describe_device(args.device))
    say_what_is_cut(texts, model, settings)
    answers: list[str] = []
    if args.stream:
        answers = [show(stream(model, prompt, text, args.device)) for text in texts]
    for part in chunks([] if args.stream else texts, show=args.json):
        answers += predict(model, prompt, part, args.device)
        if not args.json:  # a line a text
            print("\n".join(visible(said).replace("\n", "\\n") for said in answers[-len(part) :]), flush=True)
    found = [{"input": text, "prediction": said} for text, said in zip(texts, answers, strict=True)]
    return Output({"predictions": found})


def lines_of_standard_input() -> list[str]:
    """The lines that are piped in, without white space at their ends. Raises DataError."""
    if sys.stdin is None:
        return []
    try:
        return [line.strip() for line in sys.stdin]
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: byte {error.start}: not UTF-8; convert it first") from None


def show(pieces: Iterable[str]) -> str:
    """Print pieces of a text as they come, in one line; returns the text."""
    text = ""
    for piece in pieces:
        print(visible(piece).replace("\n", "\\n"), end="", flush=True)
        text += piece
    print()
    return text


@command(
    "few-shot",
    "train.tsv test.tsv --k 4",
    argument("train", metavar="TRAIN", help=f"rows to take the examples from: {ROWS}"),
    argument("data", metavar="DATA", help="rows to score"),
    model_argument(),
    argument("--k", type=int, metavar="N", default=4, help="examples in front of every row"),
    argument("--template", metavar="TEXT", default=data.TEMPLATE, help="how an example reads"),
    DEVICE,
    COLUMNS,
    options("text", names=["task", "max_input_tokens", "seed"]),
)
def few_shot(args: argparse.Namespace) -> Output:
    """Score the frozen model on rows with solved examples in front of each: prompt design, without training."""
    if args.k < 0:
        raise ValueError(f"--k: expected 0 or more, found {args.k}")
    settings = Settings(**{"max_input_tokens": 512} | given(args))
    check_task(settings.task, "--task")
    if "," in settings.task:
        raise ValueError(f"--task {settings.task}: expected one task")
    model = models.load(args.model)
    rows, test = read(args, [args.train], settings.task, training=True), read(args, [args.data], settings.task)
    words = label_words_for(args, settings.task, rows)
    check_targets(args.data, test, words)
    if args.k > len(rows):
        raise DataError(f"{args.train}: {len(rows)} rows, expected at least the {args.k} of --k")
    shots = [rows[i] for i in np.random.default_rng(settings.seed).choice(len(rows), args.k, replace=False)]
    texts = data.in_context([r.input for r in test], shots, args.template, model.tokenizer, settings.max_input_tokens)
    say(describe_device(args.device))
    answers, _ = answer(model, Prompt(label_words=words, settings=asdict(settings)), texts, args.device)
    scores = registry.score(settings.task, answers, test, words)
    found = {**scores.as_dict(), "k": args.k, "seed": settings.seed, "first": texts[0]}
    return Output(found, f"{scores}\n{args.k} examples in front of each; the first one read:\n{texts[0]}")


@command(
    "count",
    "--prompt-length 20 --plot figure4.png",
    argument("--labels", type=int, metavar="N", default=2, help="label words"),
    argument("--model", metavar="MODEL", help="of which only config.json is read (all sizes of T5 1.1)"),
    argument("--plot", metavar="FILE", help="where to draw the paper's figure 4, a .png file"),
    options(names=["prompt_length", "rank", "hidden"]),
)
def count(args: argparse.Namespace) -> Output:
    """Count what every method trains and stores for each size of T5 1.1, or for --model, without weights.

    These are the figures of the paper's table 4 and figure 4.
    """
    settings = Settings(**given(args))
    if args.labels < 1:
        raise ValueError(f"--labels: expected at least 1, found {args.labels}")
    configs = {name: bench.config_of(name) for name in ("small", "base", "large", "xl", "xxl")}
    if args.model:
        configs = {args.model: models.read_config(hub.find(args.model) / "config.json")}
    check_plot(args.plot)
    if args.plot:
        figures.draw_parameters(configs, (1, settings.prompt_length), settings, args.labels, Path(args.plot))
    rows, table = [], []
    for name, config in configs.items():
        for method in methods.METHODS:
            found = methods.count(config, replace(settings, method=method), args.labels)
            rows.append({"size": name, "method": method, **found._asdict(), "percent": found.percent})
        for length in LENGTHS:
            found = methods.count(config, replace(settings, prompt_length=length))
            table.append({"size": name, "length": length, **found._asdict(), "percent": found.percent})
    lines = ["a prompt: vectors, parameters, those of the model with them, percent (table 4)"]
    lines += ["{size:<8}{length:>5}{stored:>12,}{model:>18,}{percent:>12.5f}".format(**one) for one in table]
    numbers = f"{settings.prompt_length} vectors, rank {settings.rank}, hidden {settings.hidden}, {args.labels} labels"
    lines.append(f"what each method stores: {numbers}")
    for one in rows:
        more = "   trained: {trained:,}".format(**one) if one["trained"] > one["stored"] else ""
        lines.append("{size:<8}{method:<14}{stored:>16,}{percent:>12.5f}".format(**one) + more)
    return Output({"rows": rows, "table": table, "plot": args.plot}, "\n".join(lines))


# ---- what they share ----


def check_task(task: str, where: str) -> None:
    """Raise ValueError, naming where it was found, for a task that does not exist."""
    try:
        registry.check_name(task)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_ending(path: str | None, *endings: str) -> None:
    """Raise ValueError for the name of a file, if there is one, with another ending."""
    if path is not None and Path(path).suffix not in endings:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(endings)}")


def check_plot(path: str | None) -> None:
    """Raise ValueError if no picture can be written, before anything is computed."""
    check_ending(path, ".png", ".pdf", ".svg")
    if path is not None and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot: matplotlib is not installed; pip install 'tinyprompt[plot]'")
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def open_prompt(args: argparse.Namespace) -> tuple[Model, Prompt, Settings]:
    """The model and the prompt, which must belong together, with the settings that the arguments change."""
    prompt, model = prompts.load_prompt(args.prompt), models.load(args.model)
    return model, *as_asked(args, args.prompt, prompt, model)


def as_asked(args: argparse.Namespace, path: str, prompt: Prompt, model: Model) -> tuple[Prompt, Settings]:
    """A prompt that belongs to the model, with the settings that the arguments change."""
    check_fit(prompt, model, path)
    say_if_unknown(prompt, path)
    Settings(**given(args))  # so that an error is about the option, and not about the file
    settings = Settings.saved(prompt.settings | given(args), path)
    check_task(settings.task, "--task" if args.task else path)
    if "," in settings.task and not of_mixture(prompt):
        raise ValueError(f"--task {settings.task}: {path} was tuned without the names of tasks; name one")
    changed = {name: value for name, value in given(args).items() if name != "task"}  # that of the rows, not its own
    return replace(prompt, settings=prompt.settings | changed), settings


def of_mixture(prompt: Prompt) -> bool:
    """Whether it was tuned on a mixture, whose inputs begin with the name of their task."""
    return "," in str(prompt.settings.get("task"))


def label_words_for(args: argparse.Namespace, task: str, rows: Sequence[Row]) -> tuple[str, ...] | None:
    """The label words of a task, or those found in rows of a file of columns; None if answers are free text."""
    return registry.labels_of(task, words_of(args)) if task in TASKS else data.label_words(rows, task)


def check_targets(path: str, rows: Sequence[Row], words: Sequence[str] | None) -> None:
    """Raise DataError if a row's target is no label word."""
    wrong = next((row.target for row in rows if words and row.target not in words), None)
    if words and wrong is not None:
        raise DataError(f"{path}: target {wrong!r} is no label word ({', '.join(words)}); map it with --words")


def say_what_is_cut(texts: Sequence[str], model: Model, settings: Settings) -> None:
    """Warn of inputs that are longer than what is read."""
    limit = settings.max_input_tokens
    cut = sum(len(model.tokenizer.encode(text)) > limit for text in texts)
    if cut:
        say(f"warning: {cut} of {len(texts)} inputs lose their end at {limit} tokens (--max-input-tokens)")


def say_what_is_odd(
    rows: Sequence[Row], dev: Sequence[Row], words: Sequence[str] | None, model: Model, settings: Settings
) -> None:
    """Warn of labels that may be typing errors, of one label alone, also in the dev rows, and of long targets."""
    times = Counter(row.target for row in rows)
    rare = [repr(word) for word in words or () if times[word] == 1]
    if rare:
        say(f"warning: targets of one row only, perhaps typing errors: {', '.join(rare[:5])}")
    if not words and len(times) == 1:
        say(f"warning: all targets are {next(iter(times))!r}; with nothing to choose from, answers are free text")
    if words and len(dev) > 1 and len({row.target for row in dev}) == 1:
        say(f"warning: all {len(dev)} dev rows have the target {dev[0].target!r}; a dev score says little")
    positions = settings.batch_size * (settings.prompt_length + settings.max_input_tokens)
    if settings.prompt_length > MANY or settings.batch_size > MANY:
        told = f"up to {positions:,} positions a step, and attention grows with the square of a row's length"
        say(f"warning: {told}: slow, and much memory; the paper has 100 vectors and 32 rows")
    limit = settings.max_new_tokens
    long = sum(len(model.tokenizer.encode(row.target)) > limit for row in dev) if not words else 0
    if long:
        told = f"{long} of {len(dev)} dev targets have more than the {limit} tokens that are written"
        say(f"warning: {told}, so their answers cannot be right (--max-new-tokens)")


def say_if_unknown(prompt: Prompt, path: str) -> None:
    """Warn if nothing tells whether a prompt belongs to the model that it is used with."""
    if prompt.fingerprint is None:
        say(f"warning: {path} does not say which weights it was tuned on; only its shape was checked")


def say_what_is_lost(prompt: Prompt, path: Path) -> None:
    """Warn if a file cannot hold all of a prompt."""
    if path.suffix == ".npy" and (prompt.model or prompt.label_words or prompt.train_state):
        say(f"warning: {path} holds the vectors only, without the name of the model, label words and training state")


def words_of(args: argparse.Namespace) -> dict[str, str]:
    """Label words that the arguments name, by the targets they stand for."""
    words = {}
    for pair in getattr(args, "words", None) or ():
        key, equals, word = pair.partition("=")
        if not equals or not word.strip():
            raise DataError(f"--words {pair!r}: expected TARGET=WORD, for example 1=good")
        words[key] = word.strip()
    return words


def read(
    args: argparse.Namespace,
    paths: Sequence[str],
    task: str,
    training: bool = False,
    labelled: bool = True,
    named: bool = False,
) -> list[Row]:
    """Rows of a file of the task, or with the columns and label words that the arguments name; of a mixture, of all.

    named: the input begins with the name of the task, as in a mixture.
    """
    names, target = task.split(","), getattr(args, "target", "target")
    if len(names) != len(paths):
        found = f"{len(names)} task{'s' * (len(names) > 1)}, found {len(paths)} file{'s' * (len(paths) > 1)}"
        raise ValueError(f"--task {task}: {found}: {', '.join(paths)}; name one for each")
    if named or len(names) > 1:
        if words_of(args) or not set(names) <= TASKS.keys():
            raise ValueError(f"--task {task}: a mixture is of built-in tasks with their own words, without --words")
        parts = [registry.read(*of, training, None, labelled) for of in zip(names, paths, strict=True)]
        return registry.mixed(names, parts)
    if task not in TASKS:
        return data.read_rows(paths[0], args.input, target if labelled else None, words_of(args))
    if (args.input, target) != ("input", "target"):
        raise ValueError(f"--input and --target go with files of columns; for these: --task auto, not {task}")
    return registry.read(task, paths[0], training, words_of(args), labelled)
