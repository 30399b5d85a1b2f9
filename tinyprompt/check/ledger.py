"""Check gradients: every engine computes the same batches, and NumPy in float64 judges them.

    print(check_model(load("path/to/t5")))                 # as `tinyprompt check`
    print(check_gradient(mine, model, prompt, batch))      # a gradient that you computed
    print(check_vjp(function, x, y))                       # a function and its vector-Jacobian products

In float64, engines must agree to 1e-9 of the norm, and with finite differences. In float32 they cannot. The yardstick
there is the distance of torch's float32 from float64, or NumPy's if torch is missing. Rounding errors scatter by
factors, so an engine may be 10 ** (1 / sqrt(n)) times as far off in the mean over n batches. torch runs in a process
of its own.
"""

import functools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import autograd.numpy as anp
import numpy as np
from autograd import grad
from ml_dtypes import bfloat16

from tinyprompt import methods, t5, train
from tinyprompt.check.process import Engine
from tinyprompt.config import Config
from tinyprompt.data import Batch, random_batch
from tinyprompt.device import PROVIDERS, compile, version
from tinyprompt.errors import CheckpointError, DeviceError
from tinyprompt.files.io import load_numpy
from tinyprompt.model import PROMPT, Model
from tinyprompt.settings import Settings
from tinyprompt.tree import Flat, Tree, flatten, nest
from tinyprompt.tuning import Gradient

# Limits of errors, relative to the norm
EXACT = 1e-9  # in float64
DIFFERENCES = 1e-6  # of finite differences in float64
SCATTER = 10.0  # on one batch, a float32 engine may be this many times as far from float64 as another, plus one unit
UNIT = 2.0**-23  # of a float32 number
WORST = 3  # rows of a wrong gradient that are named
ALONE = 1e-3  # in float32, of a whole model
SINGLE = 3e-5  # in float32, of one function
ROUGH = 0.1  # in 16 bits
COARSE = 0.25  # in 8 bits

STEPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-8)  # of finite differences: small ones suffer from rounding, large ones from kinks
DIRECTIONS = 2  # of finite differences
WHOLE = 8  # a whole check takes about this many times as long as its reference, mostly for finite differences
QUANTITIES = ("logits", "loss", "gradient")


class Finding(NamedTuple):
    """The error of one quantity of one engine, and its limit."""

    engine: str
    quantity: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False for NaN


class Report(NamedTuple):
    """The result of a check. `print` shows a table with a verdict."""

    title: str
    findings: list[Finding]
    notes: list[str]  # engines that could not run, arguments that were not checked, and hints

    @property
    def ok(self) -> bool:
        return bool(self.findings) and all(f.ok for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        # JSON has neither NaN nor infinity.
        findings = [
            f._asdict() | {"ok": f.ok, "error": f.error if np.isfinite(f.error) else None} for f in self.findings
        ]
        return {"title": self.title, "ok": self.ok, "findings": findings, "notes": self.notes}

    def __str__(self) -> str:
        rows: dict[str, dict[str, Finding]] = {}
        for f in self.findings:
            rows.setdefault(f.engine, {})[f.quantity] = f
        columns = list(dict.fromkeys(q for row in rows.values() for q in row))
        wide = max(map(len, rows), default=0)
        lines = [self.title, " " * wide + "".join(f"{column:>13}" for column in columns)]
        for engine, row in rows.items():
            cells = "".join(f"{row[c].error:>13.1e}" if c in row else " " * 13 for c in columns)
            wrong = [f"{f.quantity} at most {f.limit:.1e}" for f in row.values() if not f.ok]
            lines.append(f"{engine:<{wide}}{cells}   " + (f"WRONG: {', '.join(wrong)}" if wrong else "right"))
        return "\n".join([*lines, *self.notes, "verdict: " + ("right" if self.ok else "WRONG")])


class Case(NamedTuple):
    """A batch, and the prompt (P, D). The gradient of the loss is with respect to this prompt."""

    prompt: np.ndarray
    batch: Batch


def draw(model: Model, seed: int = 0, length: int = 20) -> Case:
    """Draw a random batch, and a prompt of rows of the embedding: (length, d_model), float32.

    Every third batch is longer than the largest distance with a bucket of its own.
    """
    if model.tokenizer is None:
        words: Any = range(model.config.vocab_size)
        model = replace(model, tokenizer=words)  # only its length is read
    settings = Settings(prompt_length=length, init="vocab", seed=seed)
    prompt = methods.init_params(model, settings, None)[PROMPT]
    tokens = 24 if seed % 3 < 2 else model.config.relative_attention_max_distance + 22
    return Case(prompt, random_batch(model.config.vocab_size, 3, tokens, 5, seed))


def save_case(case: Case, path: str | Path) -> None:
    """Write a case as a .npz file of named arrays: prompt, input_ids, attention_mask, labels, weights."""
    with open(path, "wb") as file:  # savez adds a suffix to a name
        np.savez(file, prompt=case.prompt, **case.batch._asdict())


def load_case(path: str | Path, model: Model) -> Case:
    """Read a case from a .npz file, as `save_case` writes it. Missing weights are 1 where a label is not 0.

    Raises:
        CheckpointError: The message names the file and the array.
    """
    names = ("prompt", *Batch._fields)
    arrays = load_numpy(Path(path))
    if not isinstance(arrays, dict):
        raise CheckpointError(f"{path}: holds one array; expected a .npz file of {', '.join(names)}")

    if (arrays.get("labels", np.zeros(1)) == -100).any():
        told = "holds -100, as Hugging Face's collators pad; write 0 in its place, and 0 in 'weights'"
        raise CheckpointError(f"{path}: array 'labels' {told}")

    def array(name, kind, *shape):
        if name not in arrays:
            raise CheckpointError(f"{path}: no array {name!r}; expected {', '.join(names)}, found {sorted(arrays)}")
        x = arrays[name]
        fits = x.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, x.shape, strict=True))
        if not fits or not x.size or not np.issubdtype(x.dtype, kind):
            raise CheckpointError(
                f"{path}: array {name!r} has shape {list(x.shape)} and dtype {x.dtype}; "
                f"expected {[n or 'any' for n in shape]} and {kind.__name__}"
            )
        return x

    prompt = array("prompt", np.floating, None, model.config.d_model)
    ids = array("input_ids", np.integer, None, None).astype(np.int64)
    mask = array("attention_mask", np.generic, *ids.shape).astype(np.int64)
    labels = array("labels", np.integer, len(ids), None).astype(np.int64)
    arrays.setdefault("weights", (labels != 0).astype(np.float32))
    weights = array("weights", np.number, *labels.shape).astype(np.float32)
    for name, x in (("input_ids", ids), ("labels", labels)):
        if x.min() < 0 or x.max() >= model.config.vocab_size:
            raise CheckpointError(f"{path}: array {name!r}: expected ids from 0 to {model.config.vocab_size - 1}")
    if not np.isin(mask, (0, 1)).all() or not mask.any(1).all():
        raise CheckpointError(f"{path}: array 'attention_mask': expected 0 and 1, and a 1 in every row")
    if not weights.min() >= 0 or not weights.sum() > 0:
        raise CheckpointError(f"{path}: array 'weights': expected numbers from 0 on, not all of them 0")
    if not np.isfinite(prompt).all():
        raise CheckpointError(f"{path}: array 'prompt' holds NaN or infinity")
    return Case(prompt, Batch(ids, mask, labels, weights))


def cast(case: Case, dtype) -> Case:
    """The floats of a case in another dtype."""
    return Case(case.prompt.astype(dtype), case.batch._replace(weights=case.batch.weights.astype(dtype)))


def in_dtype(params: Tree, dtype) -> Tree:
    """All weights in a dtype. Weights of 16 bits stay as they are for float32."""
    narrow = 4 if dtype == np.float32 else 0
    flat = flatten(params).items()
    return nest({name: x if x.dtype.itemsize <= narrow else x.astype(dtype) for name, x in flat})


def logits(trainable: Flat, params: Tree, config: Config, batch: Batch):
    """Logits (B, T, V) of the labels with teacher forcing, as `train.loss` computes them."""
    shifted = t5.shift_right(batch.labels)
    params = methods.apply(params, methods.stored(trainable, config))
    return t5.forward(params, config, batch.input_ids, batch.attention_mask, shifted)


def run(model: Model, params: Tree, cases: Sequence[Case], device: str) -> list[Flat]:
    """Logits, loss and prompt gradient of each case on a device, in the dtype of the weights, float32 or float64."""
    dtype = np.float64 if params["shared"]["weight"].dtype == np.float64 else np.float32
    forward, backward = (compile(function, device, frozen="params") for function in (logits, train.loss_and_grads))
    out = []
    for prompt, batch in (cast(case, dtype) for case in cases):
        arguments = {PROMPT: prompt}, params, model.config, batch
        loss, gradient = backward(*arguments)
        out.append({"logits": forward(*arguments), "loss": np.asarray(loss), "gradient": gradient[PROMPT]})
    return out


def run_torch(folder: str | Path | None, cases: Sequence[Case], dtype: str) -> list[Flat]:
    """Logits, loss and prompt gradient of each case by torch, in a process of its own. Raises DeviceError."""
    if folder is None:
        raise DeviceError("no model directory given")
    for package in ("torch", "transformers"):
        if not version(package):
            raise DeviceError(f"{package} is not installed")
    with tempfile.TemporaryDirectory() as made:
        for i, case in enumerate(cases):
            save_case(case, Path(made) / f"case{i}.npz")
        try:
            engine = Engine("torch", [sys.executable, "-m", "tinyprompt.check.torch_side", folder, made], Path(made))
            with closing(engine):
                engine.ask(dtype)
        except ValueError as error:
            raise DeviceError(str(error)) from None
        return [dict(np.load(Path(made) / f"found{i}.npz")) for i in range(len(cases))]


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference, divided by the norm of the right values; infinite if the shapes differ."""
    if np.shape(found) != np.shape(wanted):
        return float("inf")
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / (np.linalg.norm(wanted) or 1.0))


def typical(errors: Sequence[float], least: float = UNIT / 2) -> float:
    """Geometric mean, in which every error counts as at least half a unit of float32."""
    return float(np.exp(np.mean(np.log(np.maximum(errors, least)))))


def finite_differences(function: Callable, x: np.ndarray, gradient: np.ndarray, seed: int = 0) -> float:
    """The distance of a gradient from central differences in random directions, relative to its norm.

    The best of several step sizes counts, since a wrong gradient fits none. A difference that the rounding of the
    function's value explains does not count. The result is NaN if no step gives finite values.

    Args:
        function: A function of an array that returns a number.
        x: The array, in float64.
        gradient: Its gradient, of the same shape.
        seed: Seed of the directions.
    """
    rng = np.random.default_rng(seed)
    ways = [rng.normal(size=x.shape) for _ in range(DIRECTIONS)]
    wanted = [float(np.sum(gradient * v)) for v in ways]
    scale = float(np.sqrt(np.mean(x * x))) or 1.0

    def error(h):
        ends = np.array([(function(x + h * v), function(x - h * v)) for v in ways])
        slopes = (ends[:, 0] - ends[:, 1]) / (2 * h)
        rounding = 8 * np.finfo(np.float64).eps * np.abs(ends).max() / h
        off = np.maximum(0.0, np.sqrt(np.mean((slopes - wanted) ** 2)) - rounding)  # NaN stays NaN
        return off / (np.maximum(np.linalg.norm(gradient), np.sqrt(np.mean(slopes**2))) or 1.0)

    errors = [float(error(step * scale)) for step in STEPS] if x.size else [0.0]
    return min((e for e in errors if not np.isnan(e)), default=float("nan"))


def check_model(
    model: Model,
    folder: str | Path | None = None,
    cases: Sequence[Case] | None = None,
    report: Callable[[str], None] = lambda engine: None,
    device: str | None = None,
) -> Report:
    """Compare logits, loss and prompt gradient of every installed engine with NumPy in float64.

    Engines in float64 are judged by their worst batch, engines in float32 by the geometric mean over the batches. An
    engine in 16 bits may be a tenth off, and one in 8 bits a quarter.

    Args:
        model: A frozen model.
        folder: The folder from which transformers loads the same model. None leaves torch out.
        cases: Batches and prompts. By default, three that `draw` draws.
        report: Called with a line before each engine runs.
        device: A word of DEVICES, to check it alone beside NumPy and torch. By default, all that compute in float32.

    Returns:
        A report. An engine that cannot run has a note that says why.

    Raises:
        ValueError: The reference itself is not finite.

    Example:
        >>> print(check_model(tp.load("path/to/t5"), "path/to/t5"))
    """
    cases = [draw(model, seed=seed) for seed in range(3)] if cases is None else cases
    exact, single = (in_dtype(model.params, dtype) for dtype in (np.float64, np.float32))
    report("numpy float64")
    start = time.perf_counter()
    wanted = run(model, exact, cases, "numpy")
    report(f"all engines: about {WHOLE * (time.perf_counter() - start):.0f} seconds, and the start of torch")
    if not wanted or not all(np.isfinite(x).all() for found in wanted for x in found.values()):
        raise ValueError(
            f"{model.name}: no finite loss and gradient in float64: NaN in the weights, or no batch at all"
        )
    errors: dict[str, dict[str, list[float]]] = {}
    notes = []

    def engine(name: str, compute: Callable[[], list[Flat]]) -> None:
        report(name)
        try:
            found = compute()
        except DeviceError as error:
            notes.append(f"{name}: not run: {error}")
        else:
            errors[name] = {q: [distance(f[q], w[q]) for f, w in zip(found, wanted, strict=True)] for q in QUANTITIES}

    engine("torch float64", lambda: run_torch(folder, cases, "float64"))
    if device in (None, "cpu"):
        engine("onnxruntime cpu float64", lambda: run(model, exact, cases, "cpu"))
    report("finite differences")
    slopes = errors["finite differences"] = {"gradient": []}
    for (prompt, batch), found in zip((cast(case, np.float64) for case in cases), wanted, strict=True):

        def loss(p, batch=batch):
            return float(train.loss({PROMPT: p}, exact, model.config, batch))

        slopes["gradient"].append(finite_differences(loss, prompt, found["gradient"]))
    engine("torch float32", lambda: run_torch(folder, cases, "float32"))
    engine("numpy float32", lambda: run(model, single, cases, "numpy"))
    for word in PROVIDERS if device is None else {device} - {"numpy"}:
        place, _, precision = word.partition("-")
        engine(f"onnxruntime {place} {precision or 'float32'}", functools.partial(run, model, single, cases, word))
    return Report(
        f"{model.name}: relative distance from NumPy float64, {len(cases)} batches",
        judge(errors, model.config.vocab_size),
        notes,
    )


def judge(errors: Mapping[str, Mapping[str, Sequence[float]]], vocab_size: int = 1) -> list[Finding]:
    """One finding for each engine and quantity, from its errors on all batches.

    NumPy sums in blocks, which is more exact than adding one number after the other. So without torch as a yardstick,
    an engine may also be as far off as the rounding of a sum over the vocabulary: sqrt(vocab_size) units.
    """
    findings = []
    unit = UNIT * (1.0 if "torch float32" in errors else vocab_size**0.5)
    for engine, quantities in errors.items():
        for quantity, found in quantities.items():
            error, limit = float(np.max(found)), DIFFERENCES if engine == "finite differences" else EXACT
            limit = {"bf16": ROUGH, "int8": COARSE}.get(engine.rpartition(" ")[2], limit)
            if engine.endswith("float32"):
                others = [errors[name][quantity] for name in ("torch float32", "numpy float32") if name in errors]
                sound = [other for other in others if other is not found and np.max(other) <= ALONE]
                worst, limit = error, ALONE
                if sound and engine != "torch float32":
                    limit = min(ALONE, SCATTER * max(sound[0]) + unit)
                if worst <= limit:  # every batch is within its limit
                    error = typical(found, 1e-12)
                    if sound and engine != "torch float32":
                        limit = min(ALONE, SCATTER ** len(found) ** -0.5 * typical(sound[0]) + unit)
            findings.append(Finding(engine, quantity, error, limit))
    return findings


def check_gradient(
    gradient: np.ndarray | Gradient,
    model: Model,
    prompt: np.ndarray | None = None,
    batch: Batch | None = None,
    name: str = "yours",
) -> Report:
    """Check your gradient of a batch's mean cross entropy with respect to the prompt.

    Args:
        gradient: Your gradient, of the shape of the prompt, or the result of `tinyprompt.gradient`. In float64 it must
            be right to 1e-9, in float32 within ten times the distance of NumPy's float32, and in 16 bits to 0.1.
            Float32 numbers that are stored as float64 are judged as float32.
        model: A frozen model.
        prompt: The prompt (P, D). The result of `tinyprompt.gradient` has its own prompt and batch.
        batch: The batch.
        name: The name of your gradient in the report.

    Returns:
        A report. If the gradient is wrong, notes say how: its length, its direction, its worst rows, NaN.

    Raises:
        ValueError: The gradient has another shape than the prompt, or holds no floats.

    Example:
        >>> case = tp.draw(model)
        >>> print(tp.check_gradient(mine, model, case.prompt, case.batch))
        >>> print(tp.check_gradient(tp.gradient(model, prompt, rows), model))
    """
    if isinstance(gradient, Gradient):
        computed = gradient
        gradient, prompt, batch = computed.array, computed.prompt.array, computed.batch
    if prompt is None or batch is None:
        raise TypeError(
            "check_gradient: an array needs its prompt and its batch, check_gradient(g, model, prompt, batch)"
        )
    notes: list[str] = []
    gradient = np.asarray(gradient)
    if gradient.shape != prompt.shape or not is_float(gradient.dtype):
        has = f"shape {list(gradient.shape)} and dtype {gradient.dtype}"
        raise ValueError(f"{name}: {has}; expected floats of the shape of the prompt, {list(prompt.shape)}")
    case = [Case(prompt, batch)]
    wanted = run(model, in_dtype(model.params, np.float64), case, "numpy")[0]["gradient"]
    error, limit = distance(gradient, wanted), EXACT if gradient.dtype.itemsize >= 8 else ROUGH
    with np.errstate(over="ignore"):
        rounded = gradient.dtype.itemsize > 4 and np.array_equal(gradient, gradient.astype(np.float32), equal_nan=True)
    if rounded and not error <= EXACT:
        notes.append(f"{name}: numbers of float32 stored as {gradient.dtype}; judged as float32")
    if gradient.dtype.itemsize == 4 or notes:
        single = run(model, in_dtype(model.params, np.float32), case, "numpy")[0]["gradient"]
        limit = min(ALONE, SCATTER * distance(single, wanted) + UNIT)
    found = Finding(name, "gradient", error, limit)
    if not found.ok:
        notes += faults(gradient.astype(np.float64), wanted, name)
    return Report(f"{model.name}: relative distance from NumPy float64", [found], notes)


def faults(gradient: np.ndarray, wanted: np.ndarray, name: str) -> list[str]:
    """Notes on a wrong gradient (P, D): numbers that are not finite, and a wrong length or sign, or the worst rows."""
    finite = np.isfinite(gradient)
    notes = []
    if not finite.all():
        rows = np.flatnonzero(~finite.all(1)).tolist()
        kinds = f"{np.isnan(gradient).sum()} NaN and {np.isinf(gradient).sum()} infinite"
        notes.append(f"{name}: {kinds} of {gradient.size} numbers, in {listed(rows)}")
        gradient, wanted = np.where(finite, gradient, 0.0), np.where(finite, wanted, 0.0)
    times = float(np.sum(gradient * wanted) / (np.sum(wanted * wanted) or 1.0))
    if abs(times - 1) > ALONE and times and distance(gradient / times, wanted) < ALONE:
        if times < 0:
            length = "" if abs(times + 1) <= ALONE else f", {-times:.6g} times as long"
            return [*notes, f"{name}: the opposite direction{length}: is a minus missing?"]
        return [*notes, f"{name}: the right direction, {times:.6g} times as long: a sum in place of a mean?"]
    errors = np.linalg.norm(gradient - wanted, axis=1)
    total = float(np.linalg.norm(errors))
    worst = [int(row) for row in np.argsort(-errors)[:WORST] if errors[row]]
    if worst:
        share = float(np.linalg.norm(errors[worst])) / total
        notes.append(f"{name}: largest errors in {listed(worst)} of {len(errors)}: {share:.0%} of the distance")
    return notes


def listed(rows: Sequence[int]) -> str:
    """`row 3`, or `rows 3, 0, 2`, with at most ten numbers."""
    shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
    return f"row{'s' * (len(rows) > 1)} {shown}"


def is_float(dtype: np.dtype) -> bool:
    """Whether numbers of a dtype have a gradient."""
    return dtype.kind == "f" or dtype == bfloat16


def check_vjp(function: Callable, *arguments: Any, seed: int = 0) -> Report:
    """Check the vector-Jacobian products of a function of arrays, its dtypes, and its ONNX graph.

    For the value and for every argument that is an array of floats, three things are checked: the product of a random
    vector with the Jacobian, against finite differences in float64; that float32 stays float32; and the lowered graph,
    against NumPy, if the function lowers.

    Args:
        function: A function of arrays that calls `autograd.numpy` or primitives.
        *arguments: Its arguments. Arrays of integers, lists, numbers and everything else are passed on unchanged.
        seed: Seed of the random vector.

    Returns:
        A report. Notes name the arguments that were not checked.

    Raises:
        TypeError: The result is not an array of floats, or no argument is one.
        ValueError: No gradient could be checked, because no argument has a rule.

    Example:
        >>> print(check_vjp(ops.softmax, np.ones((2, 3))))
    """
    name = getattr(function, "__name__", "function")
    floats = [i for i, x in enumerate(arguments) if isinstance(x, np.ndarray | np.generic) and is_float(x.dtype)]
    notes = [f"argument {i}: not differentiated: {kind_of(x)}" for i, x in enumerate(arguments) if i not in floats]
    if not floats:
        given = ", ".join(kind_of(x) for x in arguments) or "none"
        raise TypeError(f"{name}: no gradient to check: expected an array of floats among the arguments, found {given}")

    def in_float(dtype):
        return [x.astype(dtype) if i in floats else x for i, x in enumerate(arguments)]

    exact, single = in_float(np.float64), in_float(np.float32)
    value = function(*exact)
    if not isinstance(value, np.ndarray | np.floating) or value.dtype.kind != "f":
        raise TypeError(f"{name}: expected a result of floats, found {getattr(value, 'dtype', type(value).__name__)}")
    vector = np.random.default_rng(seed).normal(size=value.shape)

    def product(*arguments):  # its gradient is the vector-Jacobian product
        out = function(*arguments)
        return anp.sum(out * vector.astype(out.dtype))

    functions = {None: function} | {i: grad(product, i) for i in floats}
    findings: list[Finding] = []
    for i, compute in functions.items():
        what = "value" if i is None else f"argument {i}"
        try:
            wanted, found = (np.asarray(compute(*given)) for given in (exact, single))
        except NotImplementedError as problem:
            notes.append(f"{what}: no rule for its gradient: {problem}")
            continue
        except Exception as problem:  # autograd fails in many ways on a call that it does not know
            why = f"{type(problem).__name__}: {problem}"
            notes.append(f"{what}: autograd cannot differentiate it: {why}; if it calls numpy, use autograd.numpy")
            findings.append(Finding(what, "gradient", float("inf"), EXACT))
            continue
        if i is not None:
            if wanted.shape != exact[i].shape or wanted.dtype == object:
                notes.append(f"{what}: its gradient has shape {list(wanted.shape)}; expected {list(exact[i].shape)}")
                findings.append(Finding(what, "differences", float("inf"), DIFFERENCES))
                continue

            def along(x, i=i):
                return product(*exact[:i], x, *exact[i + 1 :])

            error = finite_differences(along, exact[i], wanted, seed)
            findings.append(Finding(what, "differences", error, DIFFERENCES))
        error = distance(found, wanted) if found.dtype == np.float32 else float("inf")
        findings.append(Finding(what, "float32", error, SINGLE))
        if found.dtype != np.float32:
            notes.append(f"{what}: {found.dtype} for float32 arguments")
        try:
            lowered = compile(compute, "cpu")(*exact)
        except Exception as problem:
            notes.append(f"{what}: not lowered: {problem}")
        else:
            findings.append(Finding(what, "lowered", distance(lowered, wanted), EXACT))
    if all(f.engine == "value" for f in findings):
        raise ValueError(f"{name}: no gradient was checked: {'; '.join(notes)}")
    return Report(f"{name}: relative distances", sorted(findings, key=lambda f: f.quantity), notes)


def kind_of(x: Any) -> str:
    """`int64[3]` of an array, and the type of anything else, with advice for a list of numbers."""
    if isinstance(x, np.ndarray | np.generic):
        return f"{x.dtype}{list(x.shape)}"
    return f"{type(x).__name__}{', not an array' if isinstance(x, list | tuple | float) else ''}"
