"""Code that several commands share: rows, columns, label words, prompts and warnings."""

import argparse
import contextlib
import importlib.util
import io
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tinyprompt.cli.report import given, say
from tinyprompt.data import Row
from tinyprompt.device import describe_device
from tinyprompt.display import listing
from tinyprompt.errors import CheckpointError, DataError
from tinyprompt.files import models, prompts, tables
from tinyprompt.fit import check_fit
from tinyprompt.model import Model, Prompt
from tinyprompt.settings import Settings
from tinyprompt.tasks import registry
from tinyprompt.tasks.reading import Reader, check_targets
from tinyprompt.tasks.registry import Scores
from tinyprompt.train import TaskData

ROWS = "a .tsv, .csv or .jsonl file, or a file of the task; for a mixture a,b one file per task"
LARGE = 500  # number of prompt vectors or rows per batch that causes a warning


@dataclass(frozen=True)
class Job:
    """A command on rows: the model, the settings, and how to read rows."""

    args: argparse.Namespace
    model: Model
    settings: Settings
    mixture: bool = False  # the prompt was tuned on a mixture: inputs begin with the name of their task
    columns: Mapping[str, Any] = field(default_factory=dict)  # columns of the prompt

    @property
    def reader(self) -> Reader:
        """Return the reader of the task, with the columns and words of the arguments or of the prompt."""
        given = {"words": words_of(self.args)} | {name: getattr(self.args, name, None) for name in ("input", "target")}
        columns = {} if self.settings.task in registry.TASKS else dict(self.columns)
        return Reader(self.settings.task, **columns | {name: value for name, value in given.items() if value})

    def read(self, paths: Sequence[str], training: bool = False, labelled: bool = True) -> list[Row]:
        """Read the rows of files."""
        return self.reader.read(list(paths), training, labelled, named=self.mixture)

    def check_targets(self, paths: Sequence[str], rows: Sequence[Row], words: Sequence[str] | None) -> None:
        """Raise DataError if the target of a row is not a label word."""
        check_targets(rows, words, ", ".join(paths), "map it with --words")

    def rows_to_score(self, paths: Sequence[str], words: Sequence[str] | None) -> list[Row]:
        """Read and check the rows of files. Report the device, and the inputs that lose their end."""
        rows = self.read(paths)
        self.check_targets(paths, rows, words)
        say(describe_device(self.args.device))
        self.warn_of_cut([row.input for row in rows])
        return rows

    def score(self, texts: Sequence[str], rows: Sequence[Row], words: Sequence[str] | None) -> Scores:
        """Score answers. The label words of a built-in task replace `words`."""
        task = self.settings.task
        return registry.score(task, texts, rows, self.reader.label_words(rows) if task in registry.TASKS else words)

    def say_targets(self, rows: Sequence[Row], task: TaskData) -> None:
        """Report why targets are free text, which labels are replaced by words, and which labels look alike."""
        found = {row.target for row in rows}
        if not task.label_words and self.settings.task == "auto":
            why = f"{len(found)} distinct targets in {len(rows)} rows"
            say(f"{why}, so answers are free text; --task classify makes them labels")
        if task.verbalizer:
            said = listing(f"{label} = {word}" for label, word in task.verbalizer.items())
            say(f"long labels are learned as a word of their own: {said} (--words LABEL=WORD)")
        alike: dict[str, list[str]] = {}
        for label in sorted(task.label_words or ()):
            alike.setdefault("".join(label.lower().split()), []).append(label)
        for labels in alike.values():
            if len(labels) > 1:
                say(f"warning: labels that differ in case or spaces only: {', '.join(map(repr, labels))}")

    def warn_of_cut(self, texts: Sequence[str]) -> None:
        """Warn about inputs that exceed the input length of the model."""
        limit = self.settings.max_input_tokens
        cut = sum(len(self.model.tokenizer.encode(text)) > limit for text in texts)
        if cut:
            say(f"warning: {cut} of {len(texts)} inputs lose their end at {limit} tokens (--max-input-tokens)")

    def warn_of_rows(self, rows: Sequence[Row], dev: Sequence[Row], words: Sequence[str] | None) -> None:
        """Warn about rare labels, a single label, large sizes and long targets."""
        times = Counter(row.target for row in rows)
        rare = [repr(word) for word in words or () if times[word] == 1]
        if rare:
            say(f"warning: targets that occur only once, perhaps typing errors: {', '.join(rare[:5])}")
        if not words and len(times) == 1:
            say(f"warning: all targets are {next(iter(times))!r}; a choice needs two labels, so answers are free text")
        if words and len(dev) > 1 and len({row.target for row in dev}) == 1:
            say(f"warning: all {len(dev)} dev rows have the target {dev[0].target!r}; a dev score says little")
        settings = self.settings
        positions = settings.batch_size * (settings.prompt_length + settings.max_input_tokens)
        if settings.prompt_length > LARGE or settings.batch_size > LARGE:
            cost = f"up to {positions:,} positions a step, and attention grows with the square of a row's length"
            say(f"warning: {cost}: slow, and much memory; the paper has 100 vectors and 32 rows")
        limit = settings.max_new_tokens
        long = sum(len(self.model.tokenizer.encode(row.target)) > limit for row in dev) if not words else 0
        if long:
            found = f"{long} of {len(dev)} dev targets have more than {limit} tokens, the limit of an answer"
            say(f"warning: {found}, so their answers cannot be right (--max-new-tokens)")


def open_job(args: argparse.Namespace) -> tuple[Job, Prompt]:
    """Open the prompt of the arguments and its model."""
    prompt = prompts.load_prompt(args.prompt)
    return bind(args, args.prompt, prompt, open_model(args.model, prompt))


def open_model(name: str | None, prompt: Prompt | None = None) -> Model:
    """Open the named model. Without a name, open the model of the prompt if it can be found, else "base"."""
    if name is None and prompt and prompt.model and prompt.fingerprint:
        with contextlib.suppress(CheckpointError):
            model = models.load(prompt.model)
            check_fit(prompt, model)
            return model
    return models.load(name)


def bind(args: argparse.Namespace, path: str, prompt: Prompt, model: Model) -> tuple[Job, Prompt]:
    """Return the job of a prompt, and the prompt with the settings of the arguments."""
    check_fit(prompt, model, path)
    warn_if_unknown(prompt, path)
    Settings(**given(args))  # raises errors that name the option, not the file
    settings = Settings.saved(prompt.settings | given(args), path)
    registry.check_name(settings.task, "--task" if args.task else path)
    mixture = "," in str(prompt.settings.get("task"))
    if "," in settings.task and not mixture:
        raise ValueError(f"--task {settings.task}: {path} was tuned without task names; name one task")
    changed = {name: value for name, value in given(args).items() if name != "task"}  # the task of the rows is kept
    return Job(args, model, settings, mixture, prompt.columns), replace(prompt, settings=prompt.settings | changed)


def check_ending(path: str | None, *endings: str) -> None:
    """Raise ValueError for a file name with another suffix."""
    if path is not None and Path(path).suffix not in endings:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(endings)}")


def check_plot(path: str | None) -> None:
    """Raise ValueError before the computation if a plot cannot be written."""
    check_ending(path, ".png", ".pdf", ".svg")
    if path is not None and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot: matplotlib is not installed; pip install 'tinyprompt-t5[plot]'")
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def words_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the label words of --words by the targets that they replace. Raises DataError."""
    words = {}
    for pair in getattr(args, "words", None) or ():
        key, equals, word = pair.partition("=")
        if not equals or not word.strip():
            raise DataError(f"--words {pair!r}: expected TARGET=WORD, for example 1=good")
        words[key] = word.strip()
    return words


def warn_if_unknown(prompt: Prompt, path: str) -> None:
    """Warn if a prompt does not store the model that it belongs to."""
    if prompt.fingerprint is None:
        say(f"warning: {path} does not store the fingerprint of its model; only its shape was checked")


def warn_of_loss(prompt: Prompt, path: Path) -> None:
    """Warn if a format cannot store all parts of a prompt."""
    if path.suffix == ".npy" and (prompt.model or prompt.label_words or prompt.train_state):
        say(f"warning: {path} stores only the vectors, without the name of the model, label words and training state")


def lines_of_standard_input() -> list[str]:
    """Return the stripped lines of standard input, UTF-8 in any locale. Raises DataError."""
    if sys.stdin is None:
        return []
    text = tables.decoded(sys.stdin.buffer.read(), "standard input")
    return [line.strip() for line in io.StringIO(text, newline=None)]
