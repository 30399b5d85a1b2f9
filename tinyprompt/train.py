"""Training: the loss and the loop. The loop keeps the arrays with the best dev score.

The loop is a generator. It reads no files and opens no device: the caller passes the step and the dev score.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import update_wrapper
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from autograd import value_and_grad

from tinyprompt import data, methods, ops, optim, t5
from tinyprompt.config import Config
from tinyprompt.data import Batch, Row
from tinyprompt.errors import DataError
from tinyprompt.model import Model, Prompt
from tinyprompt.settings import Settings
from tinyprompt.tree import Flat, Tree


def loss(
    trainable: Flat, params: Tree, config: Config, batch: Batch, visit: t5.Visit = t5.unchanged, z_loss: float = 0.0
) -> Any:
    """Compute the mean cross entropy of the target tokens with teacher forcing. Differentiable in `trainable`.

    Args:
        trainable: The arrays that a method trains, by name.
        params: The frozen weights.
        config: The sizes of the model.
        batch: The batch.
        visit: Dropout, or another `t5.Visit`.
        z_loss: The weight of the squared log of the softmax denominator.
    """
    params = methods.apply(params, methods.stored(trainable, config))
    shifted = t5.shift_right(batch.labels)
    logits = t5.forward(params, config, batch.input_ids, batch.attention_mask, shifted, visit)
    return ops.cross_entropy(logits, batch.labels, batch.weights, z_loss)


loss_and_grads = update_wrapper(value_and_grad(loss), loss, assigned=())  # its parameters have the same names


class TaskData(NamedTuple):
    """The rows of a task, and the metric for answers to its dev rows."""

    train: Sequence[Row]
    dev: Sequence[Row]
    label_words: tuple[str, ...] | None  # None for free text
    score: Callable[[Sequence[str], Sequence[Row]], float]  # score of answers to the dev rows; larger is better
    init: Sequence[str] | Prompt = ()  # words that initialise the prompt if there are no label words, or a saved prompt
    verbalizer: Mapping[str, str] = MappingProxyType({})  # label word -> text that the model learns instead
    columns: Mapping[str, Any] = MappingProxyType({})  # options of `Reader`, stored with the prompt

    def check(self) -> None:
        """Raise DataError if there are no rows, or if a target is not a label word."""
        if not self.train or not self.dev:
            found = f"{len(self.train)} train rows and {len(self.dev)} dev rows"
            raise DataError(f"{found}: expected at least one of each")
        for part, rows in (("train", self.train), ("dev", self.dev)):
            wrong = next((row for row in rows if row.target not in (self.label_words or (row.target,))), None)
            if wrong:
                found = f"{part} row {wrong.input[:40]!r}: target {wrong.target!r} is not a label word"
                advice = "correct it" + (", or add train rows with it" if part == "dev" else "")
                raise DataError(f"{found} ({', '.join(self.label_words or ())}); {advice}")

    def checksum(self) -> int:
        """Return the CRC-32 of the rows."""
        return zlib.crc32(repr(([*map(tuple, self.train)], [*map(tuple, self.dev)])).encode())


class TrainState(NamedTuple):
    """All data that training needs to continue (stored by resume.py)."""

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
        """The dev score of the best step and its negative dev loss."""
        ((_, score, dev_loss),) = self.scores[self.scores[:, 0] == self.best_step]
        return score, -dev_loss

    def history(self) -> list[dict[str, Any]]:
        """Return {"step", "loss", "dev"} of every step. The loss is None at step 0, and dev between two scores."""
        dev = {int(step): float(score) for step, score, _ in self.scores}
        losses = [None, *self.losses.tolist()]
        return [{"step": step, "loss": loss, "dev": dev.get(step)} for step, loss in enumerate(losses)]

    def with_score(self, score: float, dev_loss: float) -> "TrainState":
        """Add a dev score. Of equal scores, the lower dev loss counts; of equal losses, the later step."""
        better = not len(self.scores) or (score, -dev_loss) >= self.best_score
        state = self._replace(scores=np.vstack([self.scores, [self.step, score, dev_loss]]))
        return state._replace(best=self.trainable, best_step=self.step) if better else state


class Progress(NamedTuple):
    """The state of a run after a step."""

    state: TrainState
    prompt: Prompt | None  # the best prompt so far, at steps with a dev score
    resumable: TrainState  # `state` without a dev score outside the schedule of `eval_every`
    best: Callable[[], Prompt]  # returns the best prompt so far, at any step

    @property
    def step(self) -> int:
        """The number of completed steps."""
        return self.state.step

    @property
    def loss(self) -> float | None:
        """The training loss of this step, or None before the first step."""
        return float(self.state.losses[-1]) if self.step else None

    @property
    def dev(self) -> float | None:
        """The dev score of this step, or None if it was not evaluated."""
        last, score, _ = self.state.scores[-1]
        return float(score) if last == self.step else None

    def __str__(self) -> str:
        shown = "" if self.loss is None else f"loss {self.loss:.3f} "
        return f"{shown}dev {self.state.scores[-1, 1]:.3f} best {self.state.best_score[0]:.3f}"


def run(
    model: Model,
    task: TaskData,
    settings: Settings,
    compute: Callable,
    dev_score: Callable[[Prompt], tuple[float, float]],
    start: TrainState | None = None,
) -> Iterator[Progress]:
    """Train step by step. Yields a Progress before the first step and after every step. A `break` stops early.

    Args:
        model: The frozen model.
        task: The rows and their metric.
        settings: The settings of the run.
        compute: `loss_and_grads`, or its compiled form.
        dev_score: Computes the score and the loss of a prompt on the dev rows.
        start: The state to continue from. None starts a new run.

    Raises:
        DataError: The rows cannot be used.
        FloatingPointError: The loss or a trained array is not finite.
    """
    task.check()
    method = methods.METHODS[settings.method]
    optimizer = optimizer_of(settings)
    top = settings.learning_rate or method.learning_rate
    learning_rate = optim.schedule(settings.schedule, top, settings.steps, settings.warmup_steps)
    about = model.name, model.fingerprint, task.label_words, asdict(settings)
    template = Prompt({}, *about, verbalizer=dict(task.verbalizer), columns=dict(task.columns))
    ids = data.target_ids(model.tokenizer, task.label_words, method.label_head, task.verbalizer)
    batches = data.training_batches(task.train, model.tokenizer, settings, ids)

    def scored(state: TrainState) -> TrainState:
        return state.with_score(*dev_score(replace(template, params=methods.stored(state.trainable, model.config))))

    state = start or scored(first_state(model, task, settings))
    for _ in range(state.step):
        next(batches)

    def best() -> Prompt:
        return replace(template, params=methods.stored(state.best, model.config))

    yield Progress(state, None, state, best)
    for step in range(state.step + 1, settings.steps + 1):
        drop = t5.dropout(settings.dropout, settings.seed, step)
        value, grads = compute(state.trainable, model.params, model.config, next(batches), drop, settings.z_loss)
        if not np.isfinite(value):
            advice = "lower the learning rate" if step > 1 else "this is the first step: check the model and the rows"
            raise FloatingPointError(f"the loss is {value} at step {step}; {advice}")
        trainable, opt_state = optimizer.update(state.trainable, grads, state.opt_state, learning_rate(step - 1))
        losses = np.append(state.losses, value)
        state = resumable = state._replace(step=step, trainable=trainable, opt_state=opt_state, losses=losses)
        prompt = None
        if step % settings.eval_every == 0 or step == settings.steps:
            if not all(np.isfinite(x).all() for x in trainable.values()):
                raise FloatingPointError(f"a trained array is not finite at step {step}; lower the learning rate")
            state = scored(state)
            model.check_files()
            resumable = state if step % settings.eval_every == 0 else resumable
            prompt = best()
        yield Progress(state, prompt, resumable, best)
        if out_of_patience(state, settings):
            break


def out_of_patience(state: TrainState, settings: Settings) -> bool:
    """Return whether the last `patience` dev scores did not improve on the best score."""
    return bool(settings.patience) and state.step - state.best_step >= settings.patience * settings.eval_every


def first_state(model: Model, task: TaskData, settings: Settings, trainable: Flat | None = None) -> TrainState:
    """Return the state before the first step, with the initial values of the method unless `trainable` is given."""
    if trainable is None:
        words = task.label_words and [task.verbalizer.get(word, word) for word in task.label_words]
        trainable = methods.init_params(model, settings, words, task.init)
    opt_state = optimizer_of(settings).init(trainable)
    return TrainState(0, trainable, opt_state, np.zeros(0), np.zeros((0, 3)), trainable, 0, task.checksum())


def optimizer_of(settings: Settings) -> optim.Optimizer:
    """Return the optimiser of the settings, or the method's default."""
    return optim.OPTIMIZERS[settings.optimizer or methods.METHODS[settings.method].optimizer]()
