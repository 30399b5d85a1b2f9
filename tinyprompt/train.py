"""One step, the loop with early stopping, and evaluation."""

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, get_args

import numpy as np
from autograd import value_and_grad

from tinyprompt import backend, generate, initial, methods, ops, optim, t5, tasks
from tinyprompt.checkpoint import CheckpointError, Model
from tinyprompt.data import Batch, DataError, Row, by_length, encode_inputs, pad, training_batches
from tinyprompt.prompts import Prompt
from tinyprompt.tokenizer import EOS
from tinyprompt.tree import Flat, Tree, leaves, refill


@dataclass(frozen=True)
class Settings:
    """How a method is tuned. The defaults are the paper's but for `steps` (30,000 there). Section 2, appendix A."""

    task: str = "auto"  # whose metrics score the dev rows: a built-in one, or of files of columns
    method: str = "prompt"
    steps: int = 1000
    batch: int = 32
    length: int = 100  # prompt vectors
    rank: int = 8  # of lora's products; width of an adapter
    hidden: int = 512  # width of the network of p-tuning and prefix-mlp
    init: str = "labels"
    init_text: str | None = None
    init_file: str | None = None
    optimizer: str | None = None  # None: the method's own, adafactor-t5x for a prompt
    rate: float | None = None  # None: the method's own, 0.3 for a prompt
    schedule: str = "constant"
    warmup: int = 0
    z_loss: float = 1e-4
    dropout: float = 0.0
    eval_every: int = 50
    patience: int = 0  # evaluations without a better dev score before stopping; 0: never
    max_input: int = 256  # tokens of an input that are read
    max_target: int = 32  # tokens of a free-text answer that are written
    beams: int = 1  # hypotheses of a free-text answer; 1: greedy
    length_penalty: float | None = None  # power of its length that an answer's log probability is divided by; None:
    # 0 for label words, 1 for free text
    seed: int = 0

    def __post_init__(self):
        for field in fields(self):
            value, kinds = getattr(self, field.name), get_args(field.type) or (field.type,)
            if isinstance(value, bool) or not isinstance(value, (*kinds, int) if float in kinds else kinds):
                raise TypeError(f"setting {field.name}: expected {kinds[0].__name__}, found {value!r}")
        for name in ("steps", "batch", "length", "rank", "hidden", "eval_every", "max_input", "max_target", "beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"setting {name}: expected at least 1, found {getattr(self, name)}")
        for name in ("warmup", "z_loss", "patience", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"setting {name}: expected 0 or more, found {getattr(self, name)}")
        if not -10 <= (self.length_penalty or 0) <= 10:
            raise ValueError(f"setting length_penalty: expected -10 to 10, found {self.length_penalty}")
        if self.method not in methods.METHODS:
            raise ValueError(f"setting method: expected one of {', '.join(methods.METHODS)}")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"setting rate: expected more than 0, found {self.rate}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"setting dropout: expected 0 to below 1, found {self.dropout}")
        if self.optimizer not in (None, *optim.OPTIMIZERS):
            raise ValueError(f"setting optimizer: expected one of {', '.join(optim.OPTIMIZERS)}")
        if self.schedule not in optim.SCHEDULES:
            raise ValueError(f"setting schedule: expected one of {', '.join(optim.SCHEDULES)}")
        known = tasks.TASKS if "," in self.task else (*tasks.PLAIN, *tasks.TASKS)
        for name in self.task.split(","):
            if name not in known:
                raise ValueError(f"setting task: {name!r}: expected one of {', '.join(known)}")
        if self.init not in initial.INITS:
            raise ValueError(f"setting init: expected one of {', '.join(initial.INITS)}")


WIDTH = 32  # places of a cache, which double when they are full


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
    params = methods.apply(params, methods.stored(delta, config))
    logits = t5.forward(params, config, batch.input_ids, batch.attention_mask, shifted, drop)
    return ops.cross_entropy(logits, batch.labels, batch.weights, z_loss)


loss_and_gradient = value_and_grad(loss)


def label_scores(params: Tree, config: t5.Config, input_ids, attention_mask, words, length_penalty: float = 0.0):
    """The score of `generate.rank` for each label, given as ids with eos, and each row: (B, labels)."""
    context, mask = t5.encode(params, config, input_ids, attention_mask)
    logits_of = lambda ids: t5.decode(params, config, ids, context, mask)
    return generate.rank(logits_of, len(input_ids), words, length_penalty)


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
    """Learn a soft prompt, or what another method trains, by backpropagation; keep what is best on the dev rows.

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
    method = methods.METHODS[settings.method]
    optimizer = optim.OPTIMIZERS[settings.optimizer or method.optimizer]()
    rate = optim.schedule(settings.schedule, settings.rate or method.rate, settings.steps, settings.warmup)
    if settings.method == "warp" and not labels:
        raise ValueError("method 'warp' learns a vector for each label word: it needs a classification task")
    if settings.method == "full" and precision == "int8":
        raise ValueError("precision int8 is for frozen weights, and method 'full' leaves none")
    target_ids = dict(zip(labels or (), label_ids(settings.method == "warp", model, labels), strict=True))
    sizes = methods.Sizes(settings.length, settings.rank, settings.hidden, len(labels or ()) or 1)
    batches = training_batches(
        train, model.tokenizer, settings.batch, settings.max_input, settings.seed, target_ids=target_ids
    )
    drop = t5.dropout(settings.dropout, np.random.default_rng([settings.seed, 1]))
    device = device or backend.default()
    compute = backend.compile(loss_and_gradient, device, precision)
    fingerprint, words = model.fingerprint(), tuple(labels) if labels else None

    def dev_score(delta):
        kept = methods.stored(delta, model.config)
        answers = predict(model, [row.input for row in dev], labels, kept, settings, device, precision)
        return tasks.mean_score(settings.task, answers, dev, labels)

    def prompt_of(run, kept):
        return Prompt(
            methods.stored(run.best, model.config), model.name, fingerprint, words, asdict(settings), kept.pack()
        )

    checksum = zlib.crc32(repr(([*map(tuple, train)], [*map(tuple, dev)])).encode())
    if resume:  # of the same structure; the numbers come from the state
        shapes = method.shapes(model.config, sizes)
        delta = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    else:
        delta = initial.first(
            model,
            settings.method,
            sizes,
            settings.init,
            labels=labels or tasks.first_words(settings.task),
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
        before = saved.labels if name == "labels" else (asdict(Settings()) | saved.settings)[name]
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


def label_ids(warp: bool, model: Model, labels: Sequence[str] | None) -> tuple[tuple[int, ...], ...]:
    """The ids that stand for each label: its pieces and eos, or, where the head has a row for each, its number."""
    return tuple((i,) if warp else tuple(model.tokenizer.encode(label)) for i, label in enumerate(labels or ()))


def predict(
    model: Model,
    inputs: Sequence[str],
    labels: Sequence[str] | None,
    delta: Flat | None = None,
    settings: Settings | None = None,
    device: str | None = None,
    precision: str = "full",
) -> list[str]:
    """The answer for each input: the likeliest label word, or free text. Without `delta`: the bare frozen model.

    Raises ValueError where `delta` has a vector for each label, and there are more or fewer labels.
    """
    settings, where = settings or Settings(), (device or backend.default(), precision)
    model_of = methods.apply(model.params, delta or {}), model.config
    score = backend.compile(label_scores, *where)
    head = (delta or {}).get(methods.HEAD, ())
    warp = len(head) not in (0, model.config.vocab_size)
    if warp and len(head) != len(labels or ()):
        raise ValueError(f"expected {len(head)} labels, one for each vector of the output head, found {labels}")
    words = label_ids(warp, model, labels)
    sequences = encode_inputs(inputs, model.tokenizer, settings.max_input)
    answers = [""] * len(inputs)
    for chosen in by_length([len(ids) for ids in sequences], 64):
        batch = pad([sequences[i] for i in chosen])
        if labels:
            found = [labels[i] for i in score(*model_of, *batch, words, settings.length_penalty or 0.0).argmax(1)]
        else:
            step = next_token(*model_of, *batch, settings.beams, *where)
            found = [model.tokenizer.decode(ids) for ids in write(step, len(chosen), settings)]
        for i, answer in zip(chosen, found, strict=True):
            answers[i] = answer
    return answers


def stream(
    model: Model,
    text: str,
    delta: Flat | None = None,
    settings: Settings | None = None,
    device: str | None = None,
    precision: str = "full",
) -> Iterator[str]:
    """The free-text answer for one input, greedily, piece by piece as it is written; together what `predict` says."""
    settings = settings or Settings()
    batch = pad(encode_inputs([text], model.tokenizer, settings.max_input))
    params = methods.apply(model.params, delta or {})
    step = next_token(params, model.config, *batch, 1, device or backend.default(), precision)
    ids: list[int] = []
    said = ""
    for (token,) in generate.stream(step, 1, settings.max_target):
        ids += [] if token == EOS else [int(token)]
        answer = model.tokenizer.decode(ids)
        if answer.startswith(said):  # not where bytes have become a letter only now
            yield answer[len(said) :]
            said = answer


def write(step: generate.Step, rows: int, settings: Settings) -> list[list[int]]:
    """Free text, as the settings have it: ids of each row."""
    if settings.beams == 1:
        return generate.greedy(step, rows, settings.max_target)
    length_penalty = 1.0 if settings.length_penalty is None else settings.length_penalty
    return generate.beam_search(step, rows, settings.max_target, settings.beams, length_penalty)


def next_token(
    params: Tree, config: t5.Config, input_ids, attention_mask, beams: int = 1, device: str = "numpy", precision="full"
) -> generate.Step:
    """The `step` of `generate` for some inputs (B, L), each `beams` times: logits of the next token (B * beams, V).

    The cache has more places than tokens, all that is new is written into it, and it doubles when it is full: so
    there are few shapes, each of which is a graph.
    """
    functions = t5.encode, t5.first_cache, t5.decode_next
    encode, first_cache, decode_next = (backend.compile(function, device, precision) for function in functions)
    context, mask = encode(params, config, input_ids, attention_mask)
    cache = {name: np.repeat(x, beams, 0) for name, x in first_cache(params, config, context).items()}
    mask, at, width = np.repeat(mask, beams, 0), 0, 0
    params = {name: part for name, part in params.items() if name != "encoder"}

    def step(tokens, rows):
        nonlocal at, width
        more = (width or WIDTH) if at == width else 0
        width += more
        for name in cache:
            if "SelfAttention" in name:  # all the beams of an input attend to the same context
                kept = cache[name] if rows is None else cache[name][rows]
                cache[name] = np.pad(kept, ((0, 0), (0, 0), (0, more), (0, 0))) if more else kept
        logits, new = decode_next(params, config, cache, tokens, np.array([at]), width, mask)
        for name, value in new.items():
            cache[name][:, :, [at - width]] = value
        at += 1
        return logits

    return step
