"""Commands that tune a prompt and use it."""

import argparse
import csv
import io as text_io
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tinyprompt import data, methods, train
from tinyprompt.cli.report import (
    MODEL,
    Command,
    Output,
    chunks,
    column_arguments,
    device_argument,
    given_settings,
    say,
    setting_arguments,
)
from tinyprompt.data import Row
from tinyprompt.device import describe_device
from tinyprompt.errors import DataError
from tinyprompt.files import hub, io, models, prompts
from tinyprompt.fit import check_fit
from tinyprompt.model import Model, Prompt
from tinyprompt.predict import label_scores, predict, stream
from tinyprompt.settings import Settings
from tinyprompt.tasks import metrics, registry
from tinyprompt.tasks.registry import TASKS, Scores
from tinyprompt.tools import bench, figures
from tinyprompt.train import Result, TaskData

DEMO = Path(__file__).parents[1] / "demo"
DEMO_TASKS = ("topic", "sentiment")
DEMO_SETTINGS = Settings(steps=400, batch_size=16, prompt_length=20, optimizer="adam", schedule="linear", eval_every=40)
LENGTHS = (1, 5, 20, 50, 100, 150)  # of the paper's table 4
CONFUSION = 10  # labels up to which a confusion matrix is printed
ROWS = "a .tsv, .csv or .jsonl file, or the task's own; for a mixture a,b one file each"


# ---- demo ----


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `demo`."""
    parser.add_argument("--task", choices=DEMO_TASKS, default="topic", help="which built-in data (topic)")
    parser.add_argument("--model", metavar="MODEL", help=MODEL)
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="seed of first values and order of rows (0)")
    parser.add_argument("--out", metavar="DIR", default="tinyprompt-demo", help="folder for the prompt and the curve")
    device_argument(parser)


def demo(args: argparse.Namespace) -> Output:
    """Tune a prompt on built-in data; compare it with no prompt and the majority class."""
    started = time.perf_counter()
    path = Path(args.out) / f"{args.task}.safetensors"
    prompts.check_target(path)
    model, settings = models.load(args.model), replace(DEMO_SETTINGS, seed=args.seed)
    parts = [data.read_rows(DEMO / f"{args.task}.{part}.tsv") for part in ("train", "dev", "test")]
    rows, dev, test = parts
    words = data.label_words(rows)
    say(describe_device(args.device))
    vectors = f"{settings.prompt_length} x {model.config.d_model}"
    say(f"frozen T5 {model.name}; task {args.task}: {', '.join(words or ())}; prompt {vectors} float32")
    bare = registry.evaluate(model, Prompt(label_words=words), test, args.device)
    result = tuned(args, model, TaskData(rows, dev, words, train.right_answers), settings, path)
    scores = registry.evaluate(model, result.prompt, test, args.device)
    curve = plotted(result, path.with_suffix(".png"))
    found = {
        "task": args.task,
        "majority": metrics.majority([r.target for r in rows], [r.target for r in test]),
        "unprompted": bare.mean,
        "tuned": scores.mean,
        "test_rows": len(test),
        "seconds": round(time.perf_counter() - started, 1),
        "device": args.device,
        "prompt": str(path),
        "curve": curve,
    }
    lines = [
        f"accuracy on {len(test)} test rows it never saw",
        f"  {'majority class':<28}{found['majority']:6.3f}",
        f"  {'frozen model, no prompt':<28}{found['unprompted']:6.3f}",
        f"  {'frozen model, tuned prompt':<28}{found['tuned']:6.3f}",
        f"prompt saved to {path}" + (f", learning curve to {curve}" if curve else "") + f"; {found['seconds']} s",
        f"try: tinyprompt predict {path} {json.dumps(test[0].input)}",
    ]
    return Output(found, "\n".join(lines))


def plotted(result: Result, path: Path) -> str | None:
    """Draw the curve; None if matplotlib is not installed."""
    try:
        result.plot(path)
    except ImportError:
        return None
    return str(path)


def tuned(
    args: argparse.Namespace, model: Model, task: TaskData, settings: Settings, path: Path, resume: Prompt | None = None
) -> Result:
    """Tune with a progress bar, and save the best prompt at every dev score. After Ctrl-C, say where it is."""
    started, saved, run = time.perf_counter(), False, train.run(model, task, settings, args.device, resume)
    try:
        for progress in train.with_bar(run, settings.steps):
            if progress.prompt:
                prompts.save_prompt(progress.prompt, path)
                saved = True
    except KeyboardInterrupt:
        if not saved:
            raise
        go_on = "" if path.suffix == ".npy" else f"; to go on, repeat the command with --resume {path}"
        raise KeyboardInterrupt(f"the best prompt so far is in {path}{go_on}") from None
    return Result.of(progress, time.perf_counter() - started)


# ---- tune ----


def tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tune`."""
    parser.add_argument("train", metavar="TRAIN", nargs="+", help=f"training rows: {ROWS}")
    parser.add_argument("--dev", metavar="FILE", action="append", help="dev rows (a fifth of the training rows)")
    parser.add_argument("--model", metavar="MODEL", help=MODEL)
    parser.add_argument("--out", metavar="FILE", help="where the prompt goes (prompt.safetensors, or that of --resume)")
    parser.add_argument("--resume", metavar="PROMPT", help="saved prompt whose training goes on (--steps may grow)")
    parser.add_argument("--plot", metavar="FILE", help="where to draw the learning curve, a .png file")
    device_argument(parser)
    column_arguments(parser)
    setting_arguments(parser, "data", "method", "optimiser", "text")


def tune(args: argparse.Namespace) -> Output:
    """Tune a prompt, or what another method trains, on rows of a file.

    It is saved at every dev score, with all that --resume needs to go on as if the run had never stopped.
    """
    resume = prompts.load_prompt(args.resume) if args.resume else None
    settings = Settings.saved((resume.settings if resume else {}) | given_settings(args), args.resume or "options")
    registry.check_name(settings.task)
    path = Path(args.out or (args.resume if resume and resume.train_state else "prompt.safetensors"))
    prompts.check_target(path, settings.method)
    model = models.load(args.model)
    rows = read(args, args.train, settings.task, training=True)
    if args.dev:
        dev = read(args, args.dev, settings.task)
    elif any(row.group or row.task for row in rows):
        raise DataError(f"--task {settings.task}: rows that belong together must not be split; name a file with --dev")
    else:
        rows, dev = data.split(rows, 0.2, settings.seed)
        say(f"no --dev: {len(dev)} of the training rows, drawn with seed {settings.seed}, are the dev rows")
    builtin = settings.task in TASKS
    words = resume.label_words if resume and not builtin else label_words_for(args, settings.task, rows)
    say(describe_device(args.device))
    say(f"{len(rows)} train rows, {len(dev)} dev rows; " + (f"labels: {', '.join(words)}" if words else "free text"))
    say_what_is_cut([row.input for row in (*rows, *dev)], model, settings)
    init: Any = TASKS[settings.task].init if builtin else ()
    if settings.init == "file" and settings.init_file and not resume:
        init = prompts.load_prompt(settings.init_file)
    task = TaskData(rows, dev, words, lambda said, of: registry.score(settings.task, said, of, words).mean, init)
    result = tuned(args, model, task, settings, path, resume)
    say_what_is_lost(result.prompt, path)
    if args.plot:
        result.plot(args.plot)
    found = {
        "prompt": str(path),
        "label_words": words,
        "dev": result.best_dev,
        "best_step": result.best_step,
        "steps": len(result.history) - 1,
        "seconds": round(result.seconds, 1),
        "device": args.device,
    }
    return Output(found, f"{result}; saved to {path}")


# ---- eval ----


def eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `eval`."""
    parser.add_argument("prompt", metavar="PROMPT", help="saved prompt of any format")
    parser.add_argument("data", metavar="DATA", nargs="+", help=f"rows: {ROWS}")
    parser.add_argument("--task", metavar="TASK", help="another task than the prompt was tuned on")
    parser.add_argument("--model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--rows", metavar="FILE", help="write input, target, answer and the probability of each label, a .tsv or .jsonl"
    )
    device_argument(parser)
    column_arguments(parser)
    setting_arguments(parser, "text", names=["max_input_tokens"])


def evaluate(args: argparse.Namespace) -> Output:
    """Score a saved prompt on rows of a file."""
    started = time.perf_counter()
    model, prompt, settings = open_prompt(args)
    rows = read(args, args.data, settings.task, named=of_mixture(prompt))
    check_targets(", ".join(args.data), rows, prompt.label_words)
    say(describe_device(args.device))
    texts = [row.input for row in rows]
    say_what_is_cut(texts, model, settings)
    answers, probabilities = answer(model, prompt, texts, args.device)
    words = registry.labels_of(settings.task, words_of(args)) if settings.task in TASKS else prompt.label_words
    scores = registry.score(settings.task, answers, rows, words)
    if args.rows:
        write_rows(Path(args.rows), rows, answers, prompt.label_words or (), probabilities)
    found = {"task": settings.task, **scores_data(scores), "seconds": round(time.perf_counter() - started, 1)}
    confusion, text = None, str(scores)
    if prompt.label_words and len(prompt.label_words) <= CONFUSION:
        confusion = confusion_matrix(rows, answers, prompt.label_words)
        text += "\n" + confusion_text(confusion, prompt.label_words)
    return Output({**found, "device": args.device, "confusion": confusion}, text)


def answer(model: Model, prompt: Prompt, texts: Sequence[str], device: str) -> tuple[list[str], np.ndarray]:
    """The answers to texts, with a progress bar, and the probability of each label word for each: (texts, labels)."""
    words = prompt.label_words
    if not words:
        return [said for part in chunks(texts) for said in predict(model, prompt, part, device)], np.zeros(
            (len(texts), 0)
        )
    scores = np.concatenate([label_scores(model, prompt, part, device) for part in chunks(texts)])
    shares = np.exp(scores - scores.max(1, keepdims=True))
    return [words[i] for i in scores.argmax(1)], shares / shares.sum(1, keepdims=True)


def write_rows(
    path: Path, rows: Sequence[Row], answers: Sequence[str], words: Sequence[str], shares: np.ndarray
) -> None:
    """Write a line a row: input, target, answer, and the probability of each label among the labels."""
    records = [
        {"input": row.input, "target": row.target, "answer": said}
        | {f"p({word})": round(float(x), 6) for word, x in zip(words, share, strict=True)}
        for row, said, share in zip(rows, answers, shares, strict=True)
    ]
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(record) + "\n" for record in records)
    elif path.suffix in (".tsv", ".csv"):
        file = text_io.StringIO()
        writer = csv.DictWriter(
            file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(records)
        text = file.getvalue()
    else:
        raise DataError(f"{path}: expected a name that ends in .tsv, .csv or .jsonl")
    io.write({path: text.encode()})


def confusion_matrix(rows: Sequence[Row], answers: Sequence[str], words: Sequence[str]) -> list[list[int]]:
    """How many rows of each label (a row of the matrix) got each answer (a column)."""
    counts = [[0] * len(words) for _ in words]
    for row, said in zip(rows, answers, strict=True):
        counts[words.index(row.target)][words.index(said)] += 1
    return counts


def confusion_text(counts: list[list[int]], words: Sequence[str]) -> str:
    """The matrix as a table: targets down, answers across."""
    wide = max(7, *(len(word) for word in words))
    lines = [f"{'target':<{wide}}" + "".join(f"  {word:>{wide}}" for word in words)]
    lines += [f"{w:<{wide}}" + "".join(f"  {n:>{wide}}" for n in row) for w, row in zip(words, counts, strict=True)]
    return "\n".join(["rows by target and answer", *lines])


# ---- predict ----


def predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `predict`."""
    parser.add_argument("prompt", metavar="PROMPT", help="saved prompt of any format")
    parser.add_argument("text", metavar="TEXT", nargs="*", help="texts to answer (lines on standard input)")
    parser.add_argument(
        "--data", metavar="FILE", help="take the texts from a .tsv, .csv or .jsonl file, or the task's own"
    )
    parser.add_argument(
        "--task", metavar="TASK", help="another task than the prompt was tuned on: how to read the file"
    )
    parser.add_argument("--input", metavar="NAME", default="input", help="column of the input text (input)")
    parser.add_argument("--model", metavar="MODEL", help=MODEL)
    parser.add_argument("--stream", action="store_true", help="print free text while it is written")
    device_argument(parser)
    setting_arguments(parser, "text", names=["max_input_tokens"])


def predict_texts(args: argparse.Namespace) -> Output:
    """Answer texts with a saved prompt."""
    model, prompt, settings = open_prompt(args)
    texts = args.text
    if args.data:
        rows = read(args, [args.data], settings.task, labelled=False, named=of_mixture(prompt))
        texts = [row.input for row in rows]
    texts = texts or [line.strip() for line in sys.stdin]
    if not any(texts):
        raise DataError("nothing to predict: give a text, --data FILE, or lines on standard input")
    if args.stream and (args.json or prompt.label_words or settings.num_beams > 1):
        raise ValueError("--stream: goes with free text, written with one beam and without --json")
    say(describe_device(args.device))
    say_what_is_cut(texts, model, settings)
    answers: list[str] = []
    if args.stream:
        answers = [show(stream(model, prompt, text, args.device)) for text in texts]
    else:
        for part in chunks(texts, show=bool(args.json)):
            answers += predict(model, prompt, part, args.device)
            if not args.json:
                print("\n".join(answers[-len(part) :]), flush=True)
    found = [{"input": text, "prediction": said} for text, said in zip(texts, answers, strict=True)]
    return Output({"predictions": found}, None)


def show(pieces: Iterable[str]) -> str:
    """Print pieces of a text as they come, in one line; returns the text."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


# ---- few-shot ----


def few_shot_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `few-shot`."""
    parser.add_argument("train", metavar="TRAIN", help=f"rows to take the examples from: {ROWS}")
    parser.add_argument("data", metavar="DATA", help="rows to score")
    parser.add_argument("--model", metavar="MODEL", help=MODEL)
    parser.add_argument("--k", type=int, metavar="N", default=4, help="examples in front of every row (4)")
    template = "{input} answer: {target}"
    parser.add_argument("--template", metavar="TEXT", default=template, help=f"how an example reads ({template})")
    parser.set_defaults(max_input_tokens=512)
    device_argument(parser)
    column_arguments(parser)
    setting_arguments(parser, "text", names=["task", "max_input_tokens", "seed"])


def few_shot(args: argparse.Namespace) -> Output:
    """Score the frozen model on rows with solved examples in front of each: prompt design, without training."""
    if args.k < 0:
        raise ValueError(f"--k: expected 0 or more, found {args.k}")
    settings = Settings(**given_settings(args))
    registry.check_name(settings.task)
    if "," in settings.task:
        raise ValueError(f"--task {settings.task}: expected one task")
    model = models.load(args.model)
    rows, test = read(args, [args.train], settings.task, training=True), read(args, [args.data], settings.task)
    words = label_words_for(args, settings.task, rows)
    check_targets(args.data, test, words)
    if args.k > len(rows):
        raise DataError(f"{args.train}: {len(rows)} rows, expected at least the {args.k} of --k")
    chosen = np.random.default_rng(settings.seed).choice(len(rows), args.k, replace=False)
    shots = [rows[i] for i in chosen]
    texts = data.in_context([r.input for r in test], shots, args.template, model.tokenizer, settings.max_input_tokens)
    say(describe_device(args.device))
    bare = Prompt(label_words=words, settings=given_settings(args))
    scores = registry.score(settings.task, answer(model, bare, texts, args.device)[0], test, words)
    found = {**scores_data(scores), "k": args.k, "seed": settings.seed, "first": texts[0]}
    return Output(found, f"{scores}\n{args.k} examples in front of each; the first one read:\n{texts[0]}")


# ---- count ----


def count_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `count`."""
    parser.add_argument("--labels", type=int, metavar="N", default=2, help="label words (2)")
    parser.add_argument("--model", metavar="MODEL", help="only its config.json is read (all sizes of T5 1.1)")
    parser.add_argument("--plot", metavar="FILE", help="where to draw the paper's figure 4, a .png file")
    setting_arguments(parser, names=["prompt_length", "rank", "hidden"])


def count(args: argparse.Namespace) -> Output:
    """Count what every method trains and stores for each size of T5 1.1, or for --model, without weights.

    These are the figures of the paper's table 4 and figure 4.
    """
    settings = Settings(**given_settings(args))
    if args.labels < 1:
        raise ValueError(f"--labels: expected at least 1, found {args.labels}")
    if args.model:
        configs = {args.model: models.read_config(hub.find(args.model) / "config.json")}
    else:
        configs = {name: bench.config_of(name) for name in ("small", "base", "large", "xl", "xxl")}
    if args.plot:
        draw_figure(args, configs, settings)
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


def draw_figure(args: argparse.Namespace, configs: dict[str, Any], settings: Settings) -> None:
    """Draw the paper's figure 4."""
    if not Path(args.plot).suffix:
        raise ValueError(f"--plot {args.plot}: expected a name that ends in .png")
    figures.draw_parameters(configs, (1, settings.prompt_length), settings, args.labels, Path(args.plot))


# ---- what they share ----


def open_prompt(args: argparse.Namespace) -> tuple[Model, Prompt, Settings]:
    """The model and the prompt, which must belong together, with the settings that the arguments change."""
    prompt = prompts.load_prompt(args.prompt)
    model = models.load(args.model)
    check_fit(prompt, model, args.prompt)
    say_if_unknown(prompt, args.prompt)
    given = given_settings(args) | ({} if args.task is None else {"task": args.task})
    settings = Settings.saved(prompt.settings | given, args.prompt)
    registry.check_name(settings.task)
    if "," in settings.task and not of_mixture(prompt):
        raise ValueError(f"--task {settings.task}: {args.prompt} was tuned without the names of tasks; name one")
    return model, replace(prompt, settings=prompt.settings | given), settings


def of_mixture(prompt: Prompt) -> bool:
    """Whether it was tuned on a mixture, whose inputs begin with the name of their task."""
    return "," in str(prompt.settings.get("task"))


def label_words_for(args: argparse.Namespace, task: str, rows: Sequence[Row]) -> tuple[str, ...] | None:
    """The label words of a task, or those found in rows of a file of columns; None if answers are free text."""
    return registry.labels_of(task, words_of(args)) if task in TASKS else data.label_words(rows, task)


def check_targets(path: str, rows: Sequence[Row], words: Sequence[str] | None) -> None:
    """Raise DataError if a row's target is no label word."""
    for row in rows:
        if words and row.target not in words:
            raise DataError(f"{path}: target {row.target!r} is no label word ({', '.join(words)}); map it with --words")


def scores_data(scores: Scores) -> dict[str, Any]:
    """Scores for --json."""
    return {"metric": scores.name, "score": scores.mean, "scores": scores.metrics, "rows": scores.rows}


def say_what_is_cut(texts: Sequence[str], model: Model, settings: Settings) -> None:
    """Warn of inputs that are longer than what is read."""
    limit = settings.max_input_tokens
    cut = sum(len(model.tokenizer.encode(text)) > limit for text in texts)
    if cut:
        say(f"warning: {cut} of {len(texts)} inputs lose their end at {limit} tokens (--max-input-tokens)")


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
        raise ValueError(
            f"--task {task}: {len(names)} task{'s' * (len(names) > 1)}, found {len(paths)} file"
            f"{'s' * (len(paths) > 1)}: {', '.join(paths)}; name one for each"
        )
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


COMMANDS = {
    "demo": Command(demo, demo_arguments, "tinyprompt demo --task sentiment --model small"),
    "tune": Command(tune, tune_arguments, "tinyprompt tune train.tsv --dev dev.tsv --out mine.safetensors --steps 500"),
    "eval": Command(evaluate, eval_arguments, "tinyprompt eval mine.safetensors test.tsv --rows answers.tsv"),
    "predict": Command(
        predict_texts, predict_arguments, 'tinyprompt predict mine.safetensors "Was the soup any good?"'
    ),
    "few-shot": Command(few_shot, few_shot_arguments, "tinyprompt few-shot train.tsv test.tsv --k 4"),
    "count": Command(count, count_arguments, "tinyprompt count --prompt-length 20 --plot figure4.png"),
}
