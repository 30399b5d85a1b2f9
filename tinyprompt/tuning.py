"""Tune a prompt on rows, evaluate it, and compute its gradient: training with files, tasks and devices."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinyprompt import data, display, methods, resume, train
from tinyprompt.data import Row
from tinyprompt.device import compile, default_device
from tinyprompt.errors import DataError
from tinyprompt.files.prompts import load_prompt
from tinyprompt.fit import check_fit
from tinyprompt.model import PROMPT, Model, Prompt
from tinyprompt.predict import label_scores, predict
from tinyprompt.settings import MANY_ROWS, Settings
from tinyprompt.tasks import registry
from tinyprompt.tasks.reading import Reader, Source
from tinyprompt.tasks.registry import Scores
from tinyprompt.train import Progress, TaskData
from tinyprompt.tree import Flat

DEV_SHARE = 0.2  # share of the training rows used as dev rows, if there are none
COLUMNS = ("input", "target", "words")  # options of `Reader`


@dataclass(frozen=True, repr=False)
class Result:
    """A tuned prompt and its learning curve. A notebook shows a table."""

    prompt: Prompt
    history: list[dict[str, Any]]  # of every step {"step", "loss", "dev"}; loss is None at step 0, dev between scores
    best_step: int
    best_dev: float
    seconds: float

    @classmethod
    def of(cls, progress: Progress, seconds: float) -> "Result":
        """Build the result of a finished run."""
        assert progress.prompt is not None  # every run ends with a dev score
        state = progress.state
        return cls(progress.prompt, state.history(), state.best_step, state.best_score[0], seconds)

    def __repr__(self) -> str:
        steps = len(self.history) - 1
        never = "; no step beat the start" if self.best_step == 0 else ""
        return f"dev {self.best_dev:.3f} at step {self.best_step} of {steps}; {self.seconds:.1f} s{never}"

    def _repr_html_(self) -> str:
        last = next((row["loss"] for row in reversed(self.history) if row["loss"] is not None), None)
        rows = [
            ("dev score", f"{self.best_dev:.3f}"),
            ("best step", f"{self.best_step} of {len(self.history) - 1}"),
            ("last training loss", "" if last is None else f"{last:.3f}"),
            ("seconds", f"{self.seconds:.1f}"),
            ("prompt", repr(self.prompt)),
        ]
        return display.table(rows)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw loss and dev score over the steps.

        Args:
            path: File for the plot, a .png file.

        Returns:
            matplotlib's axes, or None if `path` is given.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return display.plot_curve(self.history, self.best_step, path)


def tune(
    model: Model,
    train: Source,
    dev: Source | Settings | None = None,
    settings: Settings | None = None,
    *,
    device: str | None = None,
    callback: Callable[[Progress], object] | None = None,
    resume: Prompt | str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Result:
    """Tune a soft prompt by backpropagation. The result is the prompt with the best dev score.

    If there are few distinct targets, they are label words, which are ranked. Other targets are generated as free text.

    Args:
        model: The frozen model.
        train: Training rows: the name of a file, or several for a mixture of tasks; `Row`s, pairs, dicts; a pandas
            DataFrame; a `datasets.Dataset`.
        dev: Dev rows of the same kinds. The default is a fifth of the training rows.
        settings: A Settings object. It may also be the third argument.
        device: A device of `device.DEVICES`. The default is "cpu" with ONNX Runtime, else "numpy".
        callback: A function that receives the `Progress` of every step.
        resume: A saved prompt, to continue its run.
        progress: Show a progress bar, and in a notebook a loss curve.
        **options: Fields of `Settings` (`steps=200`) and of `Reader` (`input`, `target`, `words`).

    Returns:
        The best prompt and the learning curve.

    Raises:
        DataError: A row cannot be used.
        FloatingPointError: The loss is not finite.
        TypeError, ValueError: A setting is unknown or out of range.

    Example:
        >>> result = tune(load(), "train.tsv", steps=200, prompt_length=20)
        >>> result.prompt
    """
    started = time.perf_counter()
    settings, task, saved = _prepared(model, train, dev, settings, resume, options)
    steps, last = run_task(model, task, settings, device, saved), None
    for last in display.followed(steps, settings.steps) if progress else steps:
        if callback:
            callback(last)
    assert last is not None
    return Result.of(last, time.perf_counter() - started)


def run(
    model: Model,
    train: Source,
    dev: Source | Settings | None = None,
    settings: Settings | None = None,
    *,
    device: str | None = None,
    resume: Prompt | str | Path | None = None,
    **options: Any,
) -> Iterator[Progress]:
    """Tune step by step. Yields a `Progress` before the first step and after every step.

    At a dev score, `Progress.prompt` is the best prompt so far, with the state that `resume` needs.

    Args:
        model: The frozen model.
        train: Training rows, as for `tune`.
        dev: Dev rows, as for `tune`.
        settings: A Settings object. It may also be the third argument.
        device: A device of `device.DEVICES`. The default is "cpu" with ONNX Runtime, else "numpy".
        resume: A saved prompt, to continue its run.
        **options: Fields of `Settings` and of `Reader`, as for `tune`.

    Raises:
        DataError: A row cannot be used.
        FloatingPointError: The loss is not finite.
        TypeError, ValueError: A setting is unknown or out of range.

    Example:
        >>> for progress in run(model, "train.tsv", steps=200):
        ...     if progress.dev == 1.0:
        ...         break
    """
    settings, task, saved = _prepared(model, train, dev, settings, resume, options)
    return run_task(model, task, settings, device, saved)


def _prepared(
    model: Model, train: Source, dev: Any, settings: Any, resume: Any, options: dict[str, Any]
) -> tuple[Settings, TaskData, Prompt | None]:
    """Convert the arguments of `run` to the settings, the rows and the prompt to resume."""
    saved = load_prompt(resume) if isinstance(resume, str | Path) else resume
    if isinstance(dev, Settings):
        if settings is not None:
            raise TypeError("tune: two Settings objects; give one")
        dev, settings = None, dev
    if settings is not None and not isinstance(settings, Settings):
        raise TypeError(f"tune: settings: expected a Settings object, found {settings!r:.60}")
    columns = {name: options[name] for name in COLUMNS if name in options}
    changes = {name: value for name, value in options.items() if name not in columns}
    base = asdict(settings) if settings else saved.settings if saved else None
    settings = Settings.changed(base or {}, changes)
    reader = Reader(settings.task, **(saved.columns if saved else {}) | columns)
    parts = split(reader, train, dev, settings)
    if base is None:
        settings = default_settings(model, parts[0], changes)
    return settings, prepare(model, reader, settings, parts, saved, drawn=dev is None), saved


def default_settings(model: Model, rows: Sequence[Row], changes: Mapping[str, Any]) -> Settings:
    """Build the default settings for training rows, with changes. Raises TypeError or ValueError."""
    most = Settings.changed({}, changes).max_input_tokens
    few = rows if len(rows) < MANY_ROWS else rows[:1]  # the length of many rows does not matter
    tokens = float(np.mean([len(ids) for ids in data.encode_inputs([row.input for row in few], model.tokenizer, most)]))
    return Settings.for_rows(len(rows), tokens, **changes)


def prepare(
    model: Model,
    reader: Reader,
    settings: Settings,
    parts: tuple[list[Row], list[Row]],
    saved: Prompt | None,
    drawn: bool,
) -> TaskData:
    """Build the task of a run: its rows, label words, verbalizer and initialisation.

    Args:
        parts: Training rows and dev rows.
        saved: The prompt whose run continues.
        drawn: The dev rows were drawn from the training rows, so they also decide whether targets are labels.
    """
    rows, dev = parts
    words = reader.label_words([*rows, *dev] if drawn else rows)
    verbalizer: dict[str, str] = {}
    if saved:
        words, verbalizer = saved.label_words if settings.task in data.TASKS else words, saved.verbalizer
    elif words and settings.task in data.TASKS and not reader.words:
        verbalizer = data.verbalizer(words, model.tokenizer)
    return task_data(settings, rows, dev, words, not saved)._replace(verbalizer=verbalizer, columns=reader.columns())


def split(reader: Reader, train: Source, dev: Source | None, settings: Settings) -> tuple[list[Row], list[Row]]:
    """Read training and dev rows. Without dev rows, a fifth of the training rows is used. Raises DataError."""
    rows = reader.read(train, training=True)
    if dev is not None:
        return rows, reader.read(dev)
    if any(row.group or row.task for row in rows):
        raise DataError(f"task {settings.task}: rows of a group must stay together; give dev rows (--dev)")
    if len(rows) < 2:
        raise DataError(f"{reader.name(train)}: 1 row, expected at least 2; or give dev rows (--dev)")
    return data.split(rows, DEV_SHARE, settings.seed)


def task_data(
    settings: Settings, rows: Sequence[Row], dev: Sequence[Row], words: tuple[str, ...] | None, start: bool = True
) -> TaskData:
    """Combine rows, label words, the metrics of the task, and words or a prompt for initialisation."""
    init: Any = registry.TASKS[settings.task].init if settings.task in registry.TASKS else ()
    if settings.init == "file" and settings.init_file and start:
        init = load_prompt(settings.init_file)
    return TaskData(rows, dev, words, lambda said, of: registry.score(settings.task, said, of, words).mean, init)


def run_task(
    model: Model, task: TaskData, settings: Settings, device: str | None = None, saved: Prompt | None = None
) -> Iterator[Progress]:
    """Train on rows that have been read. Yields like `run`."""
    warn_of_unwritable(model, task)  # here, before the progress bar requests the first step
    return _steps(model, task, settings, device, saved)


def _steps(
    model: Model, task: TaskData, settings: Settings, device: str | None, saved: Prompt | None
) -> Iterator[Progress]:
    task.check()
    device = device or default_device()
    if settings.method == "full" and device.endswith("int8"):
        raise ValueError(f"device {device!r} quantises frozen weights, and method 'full' leaves none frozen")
    state = resume.resumed(model, task, settings, saved) if saved else None
    score = lambda prompt: dev_score(model, prompt, task, device)
    step = compile(train.loss_and_grads, device, frozen="params")
    for progress in train.run(model, task, settings, step, score, state):
        if progress.prompt:
            progress = progress._replace(prompt=resumable(progress))
        yield progress


def resumable(progress: Progress) -> Prompt:
    """Return the best prompt so far, with the state that `resume` needs."""
    return replace(progress.best(), train_state=resume.pack(progress.resumable))


def warn_of_unwritable(model: Model, task: TaskData) -> None:
    """Warn if the tokenizer cannot represent the dev targets, because correct answers would lose score."""
    targets = [row.target for row in task.dev] if not task.label_words else []
    written = [model.tokenizer.decode(model.tokenizer.encode(target)) for target in targets]
    if written != targets and (best := task.score(written, task.dev)) < task.score(targets, task.dev):
        first = next(pair for pair in zip(targets, written, strict=True) if pair[0] != pair[1])
        told = f"correct answers would score {best:.3f}, for example {first[1]!r:.60} for {first[0]!r:.60}"
        logging.getLogger("tinyprompt").warning("warning: the tokenizer cannot represent all dev targets: %s", told)


def dev_score(model: Model, prompt: Prompt, task: TaskData, device: str) -> tuple[float, float]:
    """Compute the score of a prompt on the dev rows, and its loss per label, or per token of free text."""
    texts, words = [row.input for row in task.dev], task.label_words
    if words:
        found = label_scores(model, prompt, texts, device)
        right = found[range(len(texts)), [words.index(row.target) for row in task.dev]]
        return task.score([words[i] for i in found.argmax(1)], task.dev), -float(right.mean())
    compute, settings = compile(train.loss, device, frozen="params"), Settings.saved(prompt.settings)
    losses, tokens = [], []
    for batch in data.batches_in_order_of_length(task.dev, model.tokenizer, settings.max_input_tokens):
        losses.append(compute(prompt.params, model.params, model.config, batch))
        tokens.append(batch.weights.sum())
    return task.score(predict(model, prompt, texts, device), task.dev), float(np.average(losses, weights=tokens))


def evaluate(model: Model, prompt: Prompt, rows: Source, device: str | None = None, **columns: Any) -> Scores:
    """Score the answers of a prompt with the metrics of the task that it was tuned on.

    Args:
        model: The frozen model.
        prompt: A tuned prompt.
        rows: Rows of any kind that `tune` accepts.
        device: A device of `device.DEVICES`. The default is "cpu" with ONNX Runtime, else "numpy".
        **columns: `input`, `target` and `words` of `Reader`. The defaults are those of the tuning run.

    Returns:
        The metrics and their mean.

    Raises:
        DataError: A row cannot be used.
        CheckpointError: The prompt belongs to another model.

    Example:
        >>> evaluate(model, result.prompt, "test.tsv")
        accuracy 0.775 on 200 rows
    """
    name = prompt.settings.get("task", "auto")
    read = Reader(name, **prompt.columns | columns).read(rows)
    answers = predict(model, prompt, [row.input for row in read], device)
    return registry.score(name, answers, read, prompt.label_words)


@dataclass(frozen=True)
class Gradient:
    """A loss and its gradient with respect to every array of a prompt. It unpacks as `loss, grads`."""

    loss: float
    grads: Flat
    batch: data.Batch  # the encoded rows
    prompt: Prompt

    def __iter__(self) -> Iterator[Any]:
        return iter((self.loss, self.grads))

    @property
    def array(self) -> np.ndarray:
        """The gradient with respect to the vectors of a soft prompt, (P, d_model)."""
        return self.grads[PROMPT]


def gradient(model: Model, prompt: Prompt, rows: Source, device: str | None = None, **columns: Any) -> Gradient:
    """Compute the mean cross entropy of the targets, and its gradient with respect to the prompt, in float32.

    The rows form one batch. The mean is over all target tokens, including eos. `check_gradient` checks the result.

    Args:
        model: The frozen model.
        prompt: A prompt.
        rows: Rows of any kind that `tune` accepts.
        device: A device of `device.DEVICES`. The default is "cpu" with ONNX Runtime, else "numpy".
        **columns: `input`, `target` and `words` of `Reader`.

    Returns:
        The loss, and the gradient with respect to each array of the prompt. `array` is the gradient (P, d_model) of a
        soft prompt.

    Raises:
        CheckpointError: The prompt belongs to another model.
        DataError: A row cannot be used.

    Example:
        >>> found = gradient(model, prompt, [("Two goals.", "sport")], "numpy")
        >>> found.array.shape == prompt.array.shape
        True
        >>> print(check_gradient(found, model))
    """
    check_fit(prompt, model)
    settings = Settings.saved(prompt.settings)
    read = Reader(settings.task, **prompt.columns | columns).read(rows)
    label_head = methods.has_label_head(model.config, prompt.params)
    ids = data.target_ids(model.tokenizer, prompt.label_words, label_head, prompt.verbalizer)
    batch = data.batch_of(read, model.tokenizer, settings.max_input_tokens, ids)
    step = compile(train.loss_and_grads, device or default_device(), frozen="params")
    value, grads = step(prompt.params, model.params, model.config, batch)
    return Gradient(float(value), grads, batch, prompt)
