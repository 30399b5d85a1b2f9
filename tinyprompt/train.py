"""One step, the loop with early stopping, and evaluation."""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from autograd import value_and_grad

from tinyprompt import backend, generate, methods, metrics, ops, optim, t5
from tinyprompt.checkpoint import CheckpointError, Model
from tinyprompt.data import Batch, DataError, Row, by_length, encode_inputs, pad, training_batches
from tinyprompt.prompts import Prompt
from tinyprompt.tree import Flat, Tree, leaves, merge, refill


@dataclass(frozen=True)
class Settings:
    """How a prompt is tuned. The defaults are the paper's but for `steps` (30,000 there). Section 2, appendix A."""

    steps: int = 1000
    batch: int = 32
    length: int = 100  # prompt vectors
    init: str = "labels"
    init_text: str | None = None
    init_file: str | None = None
    optimizer: str = "adafactor-t5x"
    rate: float = 0.3
    schedule: str = "constant"
    warmup: int = 0
    z_loss: float = 1e-4
    dropout: float = 0.0
    eval_every: int = 50
    patience: int = 0  # evaluations without a better dev score before stopping; 0: never
    max_input: int = 256  # tokens of an input that are read
    max_target: int = 32  # tokens of a free-text answer that are written
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch", "length", "eval_every", "max_input", "max_target"):
            if getattr(self, name) < 1:
                raise ValueError(f"setting {name}: expected at least 1, found {getattr(self, name)}")
        for name in ("warmup", "z_loss", "patience", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"setting {name}: expected 0 or more, found {getattr(self, name)}")
        if not self.rate > 0:
            raise ValueError(f"setting rate: expected more than 0, found {self.rate}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"setting dropout: expected 0 to below 1, found {self.dropout}")
        if self.optimizer not in optim.OPTIMIZERS:
            raise ValueError(f"setting optimizer: expected one of {', '.join(optim.OPTIMIZERS)}")
        if self.schedule not in optim.SCHEDULES:
            raise ValueError(f"setting schedule: expected one of {', '.join(optim.SCHEDULES)}")
        if self.init not in methods.INITS:
            raise ValueError(f"setting init: expected one of {', '.join(methods.INITS)}")


class Progress(NamedTuple):
    """What the loop tells after each step."""

    step: int
    loss: float
    dev: float | None  # the newest dev score, where there is one at this step
    best: float


class Result(NamedTuple):
    """A tuned prompt with the story of its training."""

    prompt: Prompt
    history: list[dict[str, Any]]  # {"step", "loss" (mean since the last row), "dev"}
    best_step: int
    best_dev: float
    seconds: float


class Run(NamedTuple):
    """Where training stands: all that it needs to go on. Its leaves, by their names, are `Prompt.state`."""

    step: int
    delta: Flat  # as it is now
    optimizer: optim.State
    loss: float  # sum since the last row of the history
    best: Flat
    best_step: int
    best_dev: float
    history: np.ndarray  # (rows, 3): step, mean loss since the row before, dev score
    rows: int  # checksum of the train and dev rows

    def scored(self, dev: float) -> "Run":
        """With one more row of the history, and the best prompt up to it."""
        row = [self.step, self.loss / max(1, self.step - self.history[-1, 0]), dev]
        run = self._replace(loss=0.0, history=np.vstack([self.history, row]))
        return run._replace(best=run.delta, best_step=run.step, best_dev=dev) if dev > run.best_dev else run

    def pack(self) -> Flat:
        """The leaves as floating arrays, which is all that a file of tensors holds here."""
        return {name: np.atleast_1d(value) * 1.0 for name, value in leaves(self)}

    def unpack(self, state: Flat) -> "Run":
        """The run that `pack` made the state of, of the same structure as this one. Raises CheckpointError."""

        def one(name, like):
            found = state[name].reshape((-1, 3) if name == "history" else np.shape(like))
            return found.astype(like.dtype) if isinstance(like, np.ndarray) else type(like)(found)

        try:
            found = refill(self, iter([one(name, like) for name, like in leaves(self)]))
            if found.step < 1 or not all(np.isfinite(x).all() for name, x in leaves(found) if name != "history"):
                raise ValueError("not finite, or a step before the first")
            return found
        except (KeyError, ValueError, OverflowError) as error:
            raise CheckpointError(f"the training state is damaged ({error}); tune again") from None


def loss(delta: Flat, params: Tree, config: t5.Config, batch: Batch, drop: t5.Drop = t5.identity, z_loss: float = 0.0):
    """Mean cross entropy of the target tokens, teacher-forced. Differentiable in `delta`; all else is frozen."""
    shifted = generate.shift_right(batch.labels)
    logits = t5.forward(merge(params, delta), config, batch.input_ids, batch.attention_mask, shifted, drop)
    return ops.cross_entropy(logits, batch.labels, batch.weights, z_loss)


loss_and_gradient = value_and_grad(loss)


def label_scores(params: Tree, config: t5.Config, input_ids, attention_mask, words):
    """Log probability of each label, given as ids with eos, for each row: (B, labels)."""
    context, mask = t5.encode(params, config, input_ids, attention_mask)
    return generate.rank(lambda ids: t5.decode(params, config, ids, context, mask), len(input_ids), words)


def tune(
    model: Model,
    train: Sequence[Row],
    dev: Sequence[Row],
    settings: Settings,
    labels: Sequence[str] | None,
    report: Callable[[Progress], None] = lambda progress: None,
    device: str | None = None,
    precision: str = "full",
    resume: Prompt | None = None,
    save: Callable[[Prompt], None] = lambda prompt: None,
) -> Result:
    """Learn a soft prompt by backpropagation through the frozen model; keep the best one on the dev rows.

    labels: the label words for rank classification, None for greedy decoding.
    device: "numpy", "cpu" or "cuda"; None is the best that is installed. precision: "full", or "int8" on "cpu",
    or "bf16" on "cuda" (see backend.py).
    save: is given the best prompt so far, with the training state, at every dev score but the first.
    resume: such a prompt; training goes on as if it had never stopped, but that dropout draws its masks anew. Of the
    settings only `steps` and `patience` may differ; where the schedule depends on it, the rate then does too.
    Raises DataError for a target that is no label word or for no rows, FloatingPointError where the loss is not finite,
    ValueError where the saved prompt is of another run.
    """
    if not train or not dev:
        raise DataError(f"{len(train)} train rows and {len(dev)} dev rows: expected at least one of each")
    for row in (*train, *dev):
        if labels is not None and row.target not in labels:
            raise DataError(f"target {row.target!r} of the input {row.input[:40]!r} is none of: {', '.join(labels)}")
    started = time.perf_counter()
    optimizer = optim.OPTIMIZERS[settings.optimizer]()
    rate = optim.schedule(settings.schedule, settings.rate, settings.steps, settings.warmup)
    batches = training_batches(train, model.tokenizer, settings.batch, settings.max_input, settings.seed)
    drop = t5.dropout(settings.dropout, np.random.default_rng([settings.seed, 1]))
    device = device or backend.default()
    compute = backend.compile(loss_and_gradient, device, precision)
    fingerprint, words = model.fingerprint(), tuple(labels) if labels else None

    def dev_score(delta):
        answers = predict(model, [row.input for row in dev], labels, delta, settings, device, precision)
        return metrics.accuracy(answers, [row.target for row in dev])

    def prompt_of(run, kept):
        return Prompt(run.best, model.name, fingerprint, words, asdict(settings), kept.pack())

    checksum = zlib.crc32(repr(([*map(tuple, train)], [*map(tuple, dev)])).encode())
    if resume:
        delta = resume.delta
    else:
        delta = methods.prompt_tuning(
            model,
            settings.length,
            settings.init,
            labels=labels,
            text=settings.init_text,
            file=settings.init_file,
            seed=settings.seed,
        )
    run = Run(0, delta, optimizer.init(delta), 0.0, delta, 0, 0.0, np.array([[0, np.nan, 0.0]]), checksum)
    if resume:
        run = resumed(run, resume, model, settings, words)
        for _ in range(run.step):
            next(batches)
    else:
        run = run._replace(best_dev=dev_score(delta))
        run.history[0, 2] = run.best_dev
    prompt = prompt_of(run, run)
    for step in range(run.step + 1, settings.steps + 1):
        value, gradient = compute(run.delta, model.params, model.config, next(batches), drop, settings.z_loss)
        if not np.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {step}; lower the learning rate")
        delta, state = optimizer.update(run.delta, gradient, run.optimizer, rate(step - 1))
        run = kept = run._replace(step=step, delta=delta, optimizer=state, loss=run.loss + float(value))
        score = None
        if step % settings.eval_every == 0 or step == settings.steps:
            score = dev_score(delta)
            run = run.scored(score)
            if step % settings.eval_every == 0:  # with more steps, a last one off the beat would not have been scored
                kept = run
            prompt = prompt_of(run, kept)
            save(prompt)
        report(Progress(step, float(value), score, run.best_dev))
        if settings.patience and step - run.best_step >= settings.patience * settings.eval_every:
            break
    history = [
        {"step": int(at), "loss": None if np.isnan(mean) else float(mean), "dev": float(dev)}
        for at, mean, dev in run.history
    ]
    return Result(prompt, history, run.best_step, run.best_dev, time.perf_counter() - started)


def resumed(run: Run, saved: Prompt, model: Model, settings: Settings, labels: Sequence[str] | None) -> Run:
    """The run of a saved prompt, of the same structure as `run`. Raises ValueError where it cannot go on so."""
    if saved.state is None:
        raise ValueError("this prompt has no training state to resume; to start from it: --init file --init-file FILE")
    saved.check(model)
    for name, value in (asdict(settings) | {"labels": labels}).items():
        before = saved.labels if name == "labels" else saved.settings.get(name)
        if name not in ("steps", "patience") and value != before:
            raise ValueError(f"setting {name}: expected {before!r}, as the run to resume had, found {value!r}")
    found = run.unpack(saved.state)
    if found.rows != run.rows:
        raise DataError("the train or dev rows are others than those of the run to resume; name the same files")
    if settings.patience and found.step - found.best_step >= settings.patience * settings.eval_every:
        raise ValueError(f"setting patience: the run stopped early at step {found.step}; give more, or 0, to go on")
    if found.step >= settings.steps:
        raise ValueError(f"setting steps: expected more than the {found.step} that are done, found {settings.steps}")
    return found


def predict(
    model: Model,
    inputs: Sequence[str],
    labels: Sequence[str] | None,
    delta: Flat | None = None,
    settings: Settings | None = None,
    device: str | None = None,
    precision: str = "full",
) -> list[str]:
    """The answer for each input: the likeliest label word, or free text. Without `delta`: the bare frozen model."""
    settings, device = settings or Settings(), device or backend.default()
    functions = label_scores, t5.encode, t5.decode
    score, encode, decode = (backend.compile(function, device, precision) for function in functions)
    model_of = merge(model.params, delta or {}), model.config
    words = tuple(tuple(model.tokenizer.encode(label)) for label in labels or ())
    sequences = encode_inputs(inputs, model.tokenizer, settings.max_input)
    answers = [""] * len(inputs)
    for chosen in by_length([len(ids) for ids in sequences], 64):
        batch = pad([sequences[i] for i in chosen])
        if labels:
            found = [labels[i] for i in score(*model_of, *batch, words).argmax(1)]
        else:
            context = encode(*model_of, *batch)

            def logits_of(ids, context=context):
                return decode(*model_of, ids, *context)

            written = generate.greedy(logits_of, len(chosen), settings.max_target)
            found = [model.tokenizer.decode(ids) for ids in written]
        for i, answer in zip(chosen, found, strict=True):
            answers[i] = answer
    return answers
