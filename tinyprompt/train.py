"""Training: the loss, and the loop, which keeps what is best on the dev rows. Knows no file and no data set."""

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from autograd import value_and_grad
from tqdm.auto import tqdm

from tinyprompt import data, generate, methods, ops, optim, t5
from tinyprompt.config import Config
from tinyprompt.data import Batch, Row
from tinyprompt.device import compile, default_device
from tinyprompt.errors import CheckpointError, DataError
from tinyprompt.fit import check_fit
from tinyprompt.model import Model, Prompt
from tinyprompt.predict import has_label_head, label_scores, predict, target_ids
from tinyprompt.settings import Settings
from tinyprompt.tasks.metrics import accuracy
from tinyprompt.tree import Flat, Tree, leaves, refill

WINDOW = 20  # steps over which a curve of losses is averaged


def loss(
    trainable: Flat, params: Tree, config: Config, batch: Batch, visit: t5.Visit = t5.unchanged, z_loss: float = 0.0
):
    """Mean cross entropy of the target tokens, teacher-forced. Differentiable in `trainable`; `params` stay frozen."""
    shifted = generate.shift_right(batch.labels)
    params = methods.apply(params, methods.stored(trainable, config))
    logits = t5.forward(params, config, batch.input_ids, batch.attention_mask, shifted, visit)
    return ops.cross_entropy(logits, batch.labels, batch.weights, z_loss)


loss_and_grads = value_and_grad(loss)


class Gradient(NamedTuple):
    """A loss, and its gradient with respect to every array of a prompt, by name."""

    loss: float
    grads: Flat

    @property
    def array(self) -> np.ndarray:
        """The gradient with respect to the vectors of a soft prompt, (P, d_model)."""
        return self.grads[methods.PROMPT]


def gradient(model: Model, prompt: Prompt, rows: str | Path | Sequence[Row], device: str | None = None) -> Gradient:
    """The mean cross entropy of the targets of some rows, and its gradient with respect to the prompt.

    The rows are one batch: the loss is the mean over all their target tokens, eos included. Of a method that is no
    soft prompt, the gradient is with respect to the arrays that are stored. Computed in float32, in NumPy or on a
    `device` (see device.py). Raises CheckpointError if the prompt belongs to another model.

    Example: `tp.gradient(model, prompt, [tp.Row("Two goals.", "sport")], "numpy").array` has the prompt's shape.
    """
    check_fit(prompt, model)
    settings = Settings.saved(prompt.settings)
    ids = target_ids(model, prompt.label_words, has_label_head(model, prompt))
    batch = data.batch_of(data.read(rows), model.tokenizer, settings.max_input_tokens, ids)
    step = compile(loss_and_grads, device or default_device())
    value, grads = step(prompt.params, model.params, model.config, batch)
    return Gradient(float(value), grads)


class TaskData(NamedTuple):
    """What is learned, and how answers are scored."""

    train: Sequence[Row]
    dev: Sequence[Row]
    label_words: tuple[str, ...] | None  # None: the answers are free text
    score: Callable[[Sequence[str], Sequence[Row]], float]  # of answers to the dev rows; more is better
    init: Sequence[str] | Prompt = ()  # words of the first prompt if there are no label words; or the one to begin with

    def check(self) -> None:
        """Raise DataError for no rows, or a target that is no label word."""
        if not self.train or not self.dev:
            found = f"{len(self.train)} train rows and {len(self.dev)} dev rows"
            raise DataError(f"{found}: expected at least one of each")
        for part, rows in (("train", self.train), ("dev", self.dev)):
            wrong = next((row for row in rows if row.target not in (self.label_words or (row.target,))), None)
            if wrong:
                found = f"{part} row {wrong.input[:40]!r}: target {wrong.target!r} is no label word"
                advice = "correct it" + (", or add train rows that have it" if part == "dev" else "")
                raise DataError(f"{found} ({', '.join(self.label_words or ())}); {advice}")

    def checksum(self) -> int:
        """A number that other rows do not have."""
        return zlib.crc32(repr(([*map(tuple, self.train)], [*map(tuple, self.dev)])).encode())


class TrainState(NamedTuple):
    """Where training stands: all that it needs to go on. Its leaves, by their names, are `Prompt.train_state`."""

    step: int
    trainable: Flat
    opt_state: optim.State
    losses: np.ndarray  # (step,): the loss of every step
    scores: np.ndarray  # (evaluations, 3): step, dev score, dev loss
    best: Flat
    best_step: int
    rows: int  # checksum of the train and dev rows

    @property
    def best_score(self) -> tuple[float, float]:
        """The dev score of the best step, and minus its dev loss: what a later step must reach."""
        ((_, score, dev_loss),) = self.scores[self.scores[:, 0] == self.best_step]
        return score, -dev_loss

    def with_score(self, score: float, dev_loss: float) -> "TrainState":
        """Add a dev score. Of equal scores, the one with the lower dev loss is best; of equal losses, the later one."""
        better = not len(self.scores) or (score, -dev_loss) >= self.best_score
        state = self._replace(scores=np.vstack([self.scores, [self.step, score, dev_loss]]))
        return state._replace(best=self.trainable, best_step=self.step) if better else state

    def pack(self) -> Flat:
        """The leaves as arrays of floats, the only kind that a file of tensors holds here."""
        return {name: np.atleast_1d(value) * 1.0 for name, value in leaves(self)}

    def unpack(self, packed: Flat) -> "TrainState":
        """The state that was packed, of the same structure as this one. Raises CheckpointError."""

        def one(name, like):
            found = packed[name].reshape({"losses": (-1,), "scores": (-1, 3)}.get(name, np.shape(like)))
            return found.astype(like.dtype) if isinstance(like, np.ndarray) else type(like)(found)

        try:
            state = refill(self, iter([one(name, like) for name, like in leaves(self)]))
            if not all(np.isfinite(x).all() for _, x in leaves(state)):
                raise ValueError("it is not finite")
            if not 1 <= state.step == len(state.losses) or state.best_step not in state.scores[:, 0]:
                raise ValueError("its history is incomplete")
            return state
        except (KeyError, ValueError, OverflowError) as error:
            raise CheckpointError(f"the training state is damaged ({error}); tune again") from None


class Progress(NamedTuple):
    """One step of a run; at a dev score, also the best prompt so far, with the training state."""

    state: TrainState
    prompt: Prompt | None

    def __str__(self) -> str:
        state = self.state
        shown = f"loss {state.losses[-1]:.3f} " if state.step else ""
        return f"{shown}dev {state.scores[-1, 1]:.3f} best {state.best_score[0]:.3f}"


def run(
    model: Model, task: TaskData, settings: Settings, device: str | None = None, resume: Prompt | None = None
) -> Iterator[Progress]:
    """Train step by step: a Progress before the first step and after each. A `break` is an early stop.

    resume: a saved prompt whose training goes on as if it had never stopped, except that dropout draws its masks anew.
    Of its settings, only `steps` and `patience` may differ.
    Raises DataError for rows that cannot be used, FloatingPointError for numbers that are not finite, ValueError if the
    saved prompt is of another run.
    """
    task.check()
    method, device = methods.METHODS[settings.method], device or default_device()
    if settings.method == "full" and device.endswith("int8"):
        raise ValueError(f"device {device!r} quantises frozen weights, and method 'full' leaves none frozen")
    optimizer = optimizer_of(settings)
    top = settings.learning_rate or method.learning_rate
    learning_rate = optim.schedule(settings.schedule, top, settings.steps, settings.warmup_steps)
    empty = Prompt({}, model.name, model.fingerprint, task.label_words, asdict(settings))
    state = resumed(model, task, settings, resume) if resume else first_state(model, task, settings)
    ids = target_ids(model, task.label_words, method.label_head)
    batches = data.training_batches(task.train, model.tokenizer, settings, ids)
    drop = t5.dropout(settings.dropout, np.random.default_rng([settings.seed, 1]))
    compute = compile(loss_and_grads, device)

    def scored(state: TrainState) -> TrainState:
        prompt = replace(empty, params=methods.stored(state.trainable, model.config))
        return state.with_score(*dev_score(model, prompt, task, device))

    if state.step:
        for _ in range(state.step):
            next(batches)
    else:
        state = scored(state)
    yield Progress(state, None)
    for step in range(state.step + 1, settings.steps + 1):
        value, grads = compute(state.trainable, model.params, model.config, next(batches), drop, settings.z_loss)
        if not np.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {step}; lower the learning rate")
        trainable, opt_state = optimizer.update(state.trainable, grads, state.opt_state, learning_rate(step - 1))
        losses = np.append(state.losses, value)
        state = kept = state._replace(step=step, trainable=trainable, opt_state=opt_state, losses=losses)
        prompt = None
        if step % settings.eval_every == 0 or step == settings.steps:
            if not all(np.isfinite(x).all() for x in trainable.values()):
                raise FloatingPointError(f"what is trained is not finite at step {step}; lower the learning rate")
            state = scored(state)
            model.check_files()
            if step % settings.eval_every == 0:  # a last score off the beat is not part of a run that goes on
                kept = state
            prompt = replace(empty, params=methods.stored(state.best, model.config), train_state=kept.pack())
        yield Progress(state, prompt)
        if settings.patience and step - state.best_step >= settings.patience * settings.eval_every:
            break


def dev_score(model: Model, prompt: Prompt, task: TaskData, device: str) -> tuple[float, float]:
    """The score of a prompt on the dev rows, and its loss there: a label's, or a token's of free text."""
    texts, words = [row.input for row in task.dev], task.label_words
    if words:
        found = label_scores(model, prompt, texts, device)
        right = found[range(len(texts)), [words.index(row.target) for row in task.dev]]
        return task.score([words[i] for i in found.argmax(1)], task.dev), -float(right.mean())
    compute, settings = compile(loss, device), Settings.saved(prompt.settings)
    losses, tokens = [], []
    for batch in data.batches_in_order_of_length(task.dev, model.tokenizer, settings.max_input_tokens):
        losses.append(compute(prompt.params, model.params, model.config, batch))
        tokens.append(batch.weights.sum())
    return task.score(predict(model, prompt, texts, device), task.dev), float(np.average(losses, weights=tokens))


def first_state(model: Model, task: TaskData, settings: Settings, trainable: Flat | None = None) -> TrainState:
    """The state before the first step, with the method's first values unless others are given."""
    if trainable is None:
        trainable = methods.init_params(model, settings, task.label_words, task.init)
    opt_state = optimizer_of(settings).init(trainable)
    return TrainState(0, trainable, opt_state, np.zeros(0), np.zeros((0, 3)), trainable, 0, task.checksum())


def optimizer_of(settings: Settings) -> optim.Optimizer:
    """The optimiser of the settings, or the method's own."""
    return optim.OPTIMIZERS[settings.optimizer or methods.METHODS[settings.method].optimizer]()


def resumed(model: Model, task: TaskData, settings: Settings, saved: Prompt) -> TrainState:
    """The state of a saved prompt. Raises ValueError if its run cannot go on with this task and these settings."""
    if saved.train_state is None:
        raise ValueError("this prompt has no training state to resume; to start from it: --init file --init-file FILE")
    check_fit(saved, model)
    for name, value in (asdict(settings) | {"labels": task.label_words}).items():
        before = saved.label_words if name == "labels" else asdict(Settings.saved(saved.settings))[name]
        if name not in ("steps", "patience") and value != before:
            raise ValueError(f"setting {name}: expected {before!r}, as the run to resume had, found {value!r}")
    shapes = methods.trained_shapes(model.config, settings, len(task.label_words or ()))
    like = first_state(model, task, settings, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    state = like.unpack(saved.train_state)
    if state.rows != like.rows:
        raise DataError("the train or dev rows are others than those of the run to resume; name the same files")
    if settings.patience and state.step - state.best_step >= settings.patience * settings.eval_every:
        raise ValueError(f"setting patience: the run stopped early at step {state.step}; give more, or 0, to go on")
    if state.step >= settings.steps:
        raise ValueError(f"setting steps: expected more than the {state.step} that are done, found {settings.steps}")
    return state


@dataclass(frozen=True, repr=False)
class Result:
    """A tuned prompt with the story of its training."""

    prompt: Prompt
    history: list[dict[str, Any]]  # of every step {"step", "loss", "dev"}; loss is None at step 0, dev between scores
    best_step: int
    best_dev: float
    seconds: float

    @classmethod
    def of(cls, progress: Progress, seconds: float) -> "Result":
        """The result of a finished run."""
        state, prompt = progress
        assert prompt is not None  # a run ends with a dev score
        dev = {int(step): float(score) for step, score, _ in state.scores}
        losses = [None, *state.losses.tolist()]
        history = [{"step": step, "loss": loss, "dev": dev.get(step)} for step, loss in enumerate(losses)]
        return cls(prompt, history, state.best_step, state.best_score[0], seconds)

    def __repr__(self) -> str:
        steps = len(self.history) - 1
        never = "; no step beat the start" if self.best_step == 0 else ""
        return f"dev {self.best_dev:.3f} at step {self.best_step} of {steps}; {self.seconds:.1f} s{never}"

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw loss and dev score over the steps. Returns matplotlib's axes, or None if written to a file.

        Raises ImportError without matplotlib.
        """
        import matplotlib.pyplot as plt

        figure, left = plt.subplots(figsize=(6, 3.5), layout="constrained")
        right = left.twinx()
        scored = [row for row in self.history if row["dev"] is not None]
        losses = [row["loss"] for row in self.history[1:]]
        smooth = np.convolve(losses, np.ones(WINDOW) / WINDOW, "valid") if len(losses) >= WINDOW else losses
        left.plot(range(1, len(losses) + 1), losses, color="0.8", lw=0.6)
        left.plot(range(len(losses) - len(smooth) + 1, len(losses) + 1), smooth, color="0.4", label="training loss")
        dev = [row["dev"] for row in scored]
        right.plot([row["step"] for row in scored], dev, color="tab:blue", marker="o", ms=3, label="dev score")
        right.axvline(self.best_step, color="tab:blue", lw=0.8, ls=":")
        left.set(xlabel="step", ylabel="training loss (nats a token)", ylim=(0, None))
        right.set(ylabel="dev score", ylim=(min(0, *dev), 1))
        left.set_title(f"best on dev: {self.best_dev:.2f} at step {self.best_step}", fontsize=10)
        left.legend(handles=[left.lines[1], right.lines[0]], loc="center right", fontsize=8)
        if path is None:
            return left
        figure.savefig(path, dpi=150)
        plt.close(figure)
        return None


def with_bar(run: Iterator[Progress], steps: int, show: bool = True) -> Iterator[Progress]:
    """Show a progress bar while a run is read: loss, dev score, steps a second, time left."""
    with tqdm(total=steps, unit="step", dynamic_ncols=True, mininterval=0.5, disable=not show) as bar:
        for progress in run:
            bar.set_postfix_str(str(progress), refresh=False)
            bar.update(progress.state.step - bar.n)  # more than one if a run is resumed
            yield progress


def tune(
    model: Model,
    train: str | Path | Sequence[Row],
    dev: str | Path | Sequence[Row] | None = None,
    settings: Settings | None = None,
    device: str | None = None,
    progress: bool = True,
) -> Result:
    """Learn a soft prompt, or what another method trains, by backpropagation; keep what is best on the dev rows.

    train, dev: rows, or the name of a file with the columns `input` and `target`. Without dev rows, a fifth of the
    training rows are the dev rows. Few distinct targets are label words, which are ranked; otherwise the answer is free
    text (setting `task`). device: one word of device.DEVICES; None is the fastest that is installed.
    progress: show a bar. Raises DataError, FloatingPointError, ValueError as `run`, which gives each step.

    Example: `result = tune(load(), "train.tsv", settings=Settings(steps=200, prompt_length=20))`.
    """
    started, settings = time.perf_counter(), settings or Settings()
    if settings.task not in data.TASKS:
        told = "for a built-in task use the command line, or registry.read and train.run"
        raise ValueError(f"setting task: expected one of {', '.join(data.TASKS)}, found {settings.task!r}; {told}")
    rows = data.read(train)
    rows, dev_rows = data.split(rows, 0.2, settings.seed) if dev is None else (rows, data.read(dev))
    task = TaskData(rows, dev_rows, data.label_words(rows, settings.task), right_answers)
    for step in with_bar(run(model, task, settings, device), settings.steps, progress):
        last = step
    return Result.of(last, time.perf_counter() - started)


def right_answers(answers: Sequence[str], rows: Sequence[Row]) -> float:
    """Accuracy of label words, exact match of free text."""
    return accuracy(answers, [row.target for row in rows])
