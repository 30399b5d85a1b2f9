"""The commands that use a prompt: `eval`, `predict`, `few-shot` and `ensemble`."""

import argparse
import csv
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import numpy as np

from tinyprompt import assess, data, display
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
    put,
    say,
    visible,
)
from tinyprompt.cli.report import model as model_argument
from tinyprompt.cli.report import settings as options
from tinyprompt.cli.shared import ROWS, Job, bind, check_ending, lines_of_standard_input, open_job, open_model
from tinyprompt.data import Row
from tinyprompt.device import describe_device
from tinyprompt.ensemble import ensemble
from tinyprompt.errors import DataError
from tinyprompt.files import io, models, prompts
from tinyprompt.model import Model, Prompt
from tinyprompt.predict import Answer, answer, predict, stream
from tinyprompt.settings import Settings
from tinyprompt.tasks import metrics, registry

ENDINGS = (".tsv", ".csv")  # suffixes for --rows
IN_TSV = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})  # not allowed in a field of a .tsv
CONFUSION = 10  # largest number of labels for which a confusion matrix is printed
# The lines of the table of `ensemble`. Average, best and majority correspond to the paper's table 3.
TABLE_3 = {"average": "average", "best": "best alone", "majority": "majority vote", "mean": "mean score"}


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
    """Score a saved prompt on the rows of a file."""
    started = time.perf_counter()
    check_ending(args.rows, *ENDINGS)
    if args.rows and Path(args.rows).resolve() in [Path(path).resolve() for path in args.data]:
        raise ValueError(f"--rows {args.rows}: is also the input file; name another file")
    job, prompt = open_job(args)
    rows, task = job.rows_to_score(args.data, prompt.label_words), job.settings.task
    found = answers(job.model, prompt, [row.input for row in rows], args.device)
    texts = [one.text for one in found]
    scores = job.score(texts, rows, prompt.label_words)
    if args.rows:
        write_rows(Path(args.rows), rows, found)
    result = {"task": task, **scores.as_dict(), "device": args.device, "confusion": None}
    lines = [str(scores)]
    if prompt.label_words and task in data.TASKS:
        targets = [row.target for row in rows]
        settings = {name: getattr(job.settings, name) for name in ("max_input_tokens", "length_penalty")}
        bare = Prompt(label_words=prompt.label_words, verbalizer=prompt.verbalizer, settings=settings)
        without = predict(job.model, bare, [row.input for row in rows], args.device)
        shares = {
            "majority of these rows": assess.majority(rows, rows),
            "frozen model, no prompt": assess.share(without, rows),
            "tuned prompt": assess.share(texts, rows),
        }
        f1 = metrics.label_f1(texts, targets, prompt.label_words)
        macro = metrics.macro_f1(texts, targets, prompt.label_words)
        result |= {"baselines": {name: share._asdict() for name, share in shares.items()}, "f1": f1, "macro_f1": macro}
        each = display.listing(f"{word} {x:.3f}" for word, x in f1.items())
        lines += [*assess.table(shares), f"macro F1 {macro:.3f}: {each}"]
    if prompt.label_words and len(prompt.label_words) <= CONFUSION:
        assert scores.confusion is not None
        result["confusion"] = scores.confusion
        lines.append(confusion_text(scores.confusion, scores.labels))
    return Output(result | {"seconds": round(time.perf_counter() - started, 1)}, "\n".join(lines))


def answers(model: Model, prompt: Prompt, texts: Sequence[str], device: str) -> list[Answer]:
    """Answer texts, with a progress bar."""
    return [one for part in chunks(texts) for one in answer(model, [(prompt, text) for text in part], device)]


def write_rows(path: Path, rows: Sequence[Row], found: Sequence[Answer]) -> None:
    """Write a line for each row: input, target, answer, and the probability of each label.

    A .csv file is quoted. A .tsv file is not, so tabs and line breaks are written as \\t and \\n.
    """
    table = [["input", "target", "answer", *(f"p({word})" for word in found[0].probabilities)]]
    for row, one in zip(rows, found, strict=True):
        table.append([row.input, row.target, one.text, *(f"{x:.6f}" for x in one.probabilities.values())])
    file = StringIO()
    if path.suffix == ".csv":
        csv.writer(file, lineterminator="\n").writerows(table)
    else:
        file.writelines("\t".join(cell.translate(IN_TSV) for cell in line) + "\n" for line in table)
    io.write({path: file.getvalue().encode()})


def confusion_text(counts: list[list[int]], words: Sequence[str]) -> str:
    """Format a confusion matrix: a row for each target, a column for each answer."""
    wide = max(6, *(len(word) for word in words))
    lines = [("target", *words), *((word, *map(str, row)) for word, row in zip(words, counts, strict=True))]
    return "\n".join(["rows by target and answer", *("  ".join(f"{cell:>{wide}}" for cell in line) for line in lines)])


@command(
    "predict",
    'mine.safetensors "Was the soup any good?"',
    PROMPT,
    argument("text", metavar="TEXT", nargs="*", help="texts to answer (default: the lines of standard input)"),
    argument("--data", metavar="FILE", help="file of rows with the texts"),
    TASK,
    INPUT,
    model_argument(),
    argument("--stream", action="store_true", help="print free text while it is generated"),
    DEVICE,
    options("text", names=["max_input_tokens"]),
)
def predict_texts(args: argparse.Namespace) -> Output:
    """Answer texts with a saved prompt."""
    if args.text and args.data:
        raise ValueError("--data: cannot be combined with texts; give one or the other")
    job, prompt = open_job(args)
    texts = [row.input for row in job.read([args.data], labelled=False)] if args.data else args.text
    file = next((text for text in texts if Path(text).suffix in (".tsv", ".csv", ".jsonl") and is_file(text)), None)
    if not args.data and file:
        raise ValueError(f"{file}: is a file; to answer its rows, use --data {file}")
    texts = texts or lines_of_standard_input()
    if not any(texts):
        raise DataError("nothing to predict: give a text, --data FILE, or lines on standard input")
    data.check_texts(texts)
    if args.stream and (args.json or prompt.label_words or job.settings.num_beams > 1):
        raise ValueError("--stream: needs free text and one beam, without --json")
    say(describe_device(args.device))
    job.warn_of_cut(texts)
    found: list[str] = []
    if args.stream:
        found = [show(stream(job.model, prompt, text, args.device)) for text in texts]
    for part in chunks([] if args.stream else texts, show=args.json):
        found += predict(job.model, prompt, part, args.device)
        if not args.json:  # a line for each text
            put("\n".join(visible(text).replace("\n", "\\n") for text in found[-len(part) :]))
    pairs = [{"input": text, "prediction": one} for text, one in zip(texts, found, strict=True)]
    return Output({"predictions": pairs})


def is_file(text: str) -> bool:
    """Return whether a text is the name of a file."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def show(pieces: Iterable[str]) -> str:
    """Print the pieces of a text in one line as they arrive, and return the text."""
    text = ""
    for piece in pieces:
        put(visible(piece).replace("\n", "\\n"), end="")
        text += piece
    put("")
    return text


@command(
    "few-shot",
    "train.tsv test.tsv --k 4",
    argument("train", metavar="TRAIN", help=f"rows with the examples: {ROWS}"),
    argument("data", metavar="DATA", help="rows to score"),
    model_argument(),
    argument("--k", type=int, metavar="N", default=4, help="examples in front of every row"),
    argument("--template", metavar="TEXT", default=data.TEMPLATE, help="format of an example"),
    DEVICE,
    COLUMNS,
    options("text", names=["task", "max_input_tokens", "seed"]),
)
def few_shot(args: argparse.Namespace) -> Output:
    """Score the frozen model with solved examples in front of each row: prompt design, without training."""
    if args.k < 0:
        raise ValueError(f"--k: expected 0 or more, found {args.k}")
    settings = Settings(**{"max_input_tokens": 512} | given(args))
    registry.check_name(settings.task, "--task")
    if "," in settings.task:
        raise ValueError(f"--task {settings.task}: expected one task")
    job = Job(args, models.load(args.model), settings)
    rows, test = job.read([args.train], training=True), job.read([args.data])
    words = job.reader.label_words(rows)
    job.check_targets([args.data], test, words)
    if args.k > len(rows):
        raise DataError(f"{args.train}: {len(rows)} rows, expected at least --k {args.k}")
    shots = [rows[i] for i in np.random.default_rng(settings.seed).choice(len(rows), args.k, replace=False)]
    tokenizer = job.model.tokenizer
    texts = data.in_context([r.input for r in test], shots, args.template, tokenizer, settings.max_input_tokens)
    say(describe_device(args.device))
    found = answers(job.model, Prompt(label_words=words, settings=asdict(settings)), texts, args.device)
    scores = registry.score(settings.task, [one.text for one in found], test, words)
    result = {**scores.as_dict(), "k": args.k, "seed": settings.seed, "first": texts[0]}
    return Output(result, f"{scores}\n{args.k} examples in front of each row; the first input:\n{texts[0]}")


@command(
    "ensemble",
    "mine-0.safetensors mine-1.safetensors mine-2.safetensors --data test.tsv",
    argument("prompts", metavar="PROMPT", nargs="+", help="saved prompts of one task"),
    argument("--data", metavar="FILE", required=True, help=f"rows: {ROWS}"),
    TASK,
    model_argument(),
    DEVICE,
    COLUMNS,
    options("text", names=["max_input_tokens"]),
)
def score_ensemble(args: argparse.Namespace) -> Output:
    """Score several prompts of one task: average, best, majority vote and mean score.

    All prompts answer in one pass over the rows. Average, best and majority correspond to the paper's table 3.
    """
    loaded = [prompts.load_prompt(path) for path in args.prompts]
    model = open_model(args.model, loaded[0])
    opened = [bind(args, path, prompt, model) for path, prompt in zip(args.prompts, loaded, strict=True)]
    (job, first), found = opened[0], [prompt for _, prompt in opened]
    for path, (own, other) in zip(args.prompts, opened, strict=True):
        if own.settings.task != job.settings.task:
            told = f"{args.prompts[0]} has task {job.settings.task!r}, {path} has task {own.settings.task!r}"
            raise ValueError(f"{told}; an ensemble has one task; name it with --task")
        if frozenset(other.label_words or ()) != frozenset(first.label_words or ()):
            odd = [
                f"{p} has {', '.join(x.label_words or ('free text',))}"
                for p, x in ((args.prompts[0], first), (path, other))
            ]
            raise DataError(f"an ensemble needs prompts with the same label words: {'; '.join(odd)}")
    rows = job.rows_to_score([args.data], first.label_words)
    together = ensemble(model, found, [row.input for row in rows], args.device)
    score = lambda texts: job.score(texts, rows, first.label_words)
    each = [score(texts) for texts in together.each]
    means = [one.mean for one in each]
    numbers: dict[str, float | None] = {
        "average": float(np.mean(means)),
        "best": max(means),
        "majority": score(together.majority).mean,
        "mean": score(together.mean).mean if together.mean else None,
    }
    result = {"prompts": args.prompts, "rows": len(rows), "metric": each[0].name, "task": job.settings.task, **numbers}
    lines = [f"{each[0].name} of {len(found)} prompts on {len(rows)} rows"]
    lines += [f"  {label:<16}{numbers[name]:.3f}" for name, label in TABLE_3.items() if numbers[name] is not None]
    return Output(result | {"each": [one.metrics for one in each], "device": args.device}, "\n".join(lines))
