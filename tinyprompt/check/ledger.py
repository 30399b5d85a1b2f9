"""Check gradients: every engine computes the same batches, and NumPy in float64 is the reference.

    print(check_model(load("path/to/t5")))                 # like `tinyprompt check`
    print(check_gradient(mine, model, prompt, batch))      # your own gradient
    print(check_vjp(function, x, y))                       # a function and its vector-Jacobian products

In float64, engines must agree to a relative error of 1e-9, and with finite differences. In float32 this is impossible.
There, the reference error is that of torch's float32, or of NumPy's if torch is missing. Rounding errors vary by
factors, so the mean error of an engine over n batches may be 10 ** (1 / sqrt(n)) times the reference error. torch runs
in its own process.
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

# Limits of relative errors
EXACT = 1e-9  # float64
DIFFERENCES = 1e-6  # finite differences in float64
SCATTER = 10.0  # ratio allowed between the float32 errors of two engines on one batch, plus one unit
UNIT = 2.0**-23  # spacing of float32 numbers near 1
WORST = 3  # number of rows listed for a wrong gradient
ALONE = 1e-3  # float32, a whole model
SINGLE = 3e-5  # float32, one function
ROUGH = 0.1  # 16 bits
COARSE = 0.25  # 8 bits

STEPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-8)  # of finite differences: small steps suffer from rounding, large ones from kinks
DIRECTIONS = 2  # random directions of finite differences
WHOLE = 8  # duration of a whole check relative to its reference, mostly for finite differences
QUANTITIES = ("logits", "loss", "gradient")


class Finding(NamedTuple):
    """The error of one quantity of one engine, and its limit."""

    engine: str
    quantity: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False if the error is NaN


class Report(NamedTuple):
    """The result of a check. `print` shows a table and a verdict."""

    title: str
    findings: list[Finding]
    notes: list[str]  # engines that could not run, arguments that were not checked, and hints

    @property
    def ok(self) -> bool:
        return bool(self.findings) and all(f.ok for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        # JSON supports neither NaN nor infinity.
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
    """A batch and a prompt (P, D). The gradient of the loss is taken with respect to the prompt."""

    prompt: np.ndarray
    batch: Batch


def draw(model: Model, seed: int = 0, length: int = 20) -> Case:
    """Draw a random batch, and a prompt of embedding rows.

    In every third seed, the batch is longer than the distances that have a relative position bucket of their own.

    Args:
        model: A frozen model.
        seed: The seed of the batch and the prompt.
        length: The number of prompt vectors.

    Returns:
        A case with a float32 prompt (length, d_model).
    """
    if model.tokenizer is None:
        words: Any = range(model.config.vocab_size)
        model = replace(model, tokenizer=words)  # the data functions only use its length
    settings = Settings(prompt_length=length, init="vocab", seed=seed)
    prompt = methods.init_params(model, settings, None)[PROMPT]
    tokens = 24 if seed % 3 < 2 else model.config.relative_attention_max_distance + 22
    return Case(prompt, random_batch(model.config.vocab_size, 3, tokens, 5, seed))


def save_case(case: Case, path: str | Path) -> None:
    """Write a case as a .npz file of named arrays: prompt, input_ids, attention_mask, labels, weights."""
    with open(path, "wb") as file:  # savez appends a suffix to a file name
        np.savez(file, prompt=case.prompt, **case.batch._asdict())


def load_case(path: str | Path, model: Model) -> Case:
    """Read a case from a .npz file written by `save_case`. Missing weights default to 1 where a label is not 0.

    Raises:
        CheckpointError: The file or an array is invalid. The message names both.
    """
    names = ("prompt", *Batch._fields)
    arrays = load_numpy(Path(path))
    if not isinstance(arrays, dict):
        raise CheckpointError(f"{path}: contains a single array; expected a .npz file of {', '.join(names)}")

    if (arrays.get("labels", np.zeros(1)) == -100).any():
        told = "contains -100, the padding of Hugging Face's collators; replace it by 0, with 0 in 'weights'"
        raise CheckpointError(f"{path}: array 'labels' {told}")

    def array(name: str, kind: Any, *shape: int | None) -> np.ndarray:
        if name not in arrays:
            raise CheckpointError(
                f"{path}: array {name!r} is missing; expected {', '.join(names)}, found {sorted(arrays)}"
            )
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
        raise CheckpointError(f"{path}: array 'weights': expected numbers of at least 0, and one above 0")
    if not np.isfinite(prompt).all():
        raise CheckpointError(f"{path}: array 'prompt' contains NaN or infinity")
    return Case(prompt, Batch(ids, mask, labels, weights))


def cast(case: Case, dtype: Any) -> Case:
    """Convert the floats of a case to another dtype."""
    return Case(case.prompt.astype(dtype), case.batch._replace(weights=case.batch.weights.astype(dtype)))


def in_dtype(params: Tree, dtype: Any) -> Tree:
    """Convert all weights to a dtype. For float32, 16-bit weights stay as they are.

    Args:
        params: Weights as a nested dict.
        dtype: The dtype to convert to.
    """
    narrow = 4 if dtype == np.float32 else 0
    flat = flatten(params).items()
    return nest({name: x if x.dtype.itemsize <= narrow else x.astype(dtype) for name, x in flat})


def logits(trainable: Flat, params: Tree, config: Config, batch: Batch) -> Any:
    """Compute the logits (B, T, V) of the labels with teacher forcing, like `train.loss`."""
    shifted = t5.shift_right(batch.labels)
    params = methods.apply(params, methods.stored(trainable, config))
    return t5.forward(params, config, batch.input_ids, batch.attention_mask, shifted)


def run(model: Model, params: Tree, cases: Sequence[Case], device: str) -> list[Flat]:
    """Compute logits, loss and prompt gradient of each case on a device, in the dtype of the weights."""
    dtype = np.float64 if params["shared"]["weight"].dtype == np.float64 else np.float32
    forward, backward = (compile(function, device, frozen="params") for function in (logits, train.loss_and_grads))
    out = []
    for prompt, batch in (cast(case, dtype) for case in cases):
        arguments = {PROMPT: prompt}, params, model.config, batch
        loss, gradient = backward(*arguments)
        out.append({"logits": forward(*arguments), "loss": np.asarray(loss), "gradient": gradient[PROMPT]})
    return out


def run_torch(folder: str | Path | None, cases: Sequence[Case], dtype: str) -> list[Flat]:
    """Compute logits, loss and prompt gradient of each case with torch, in its own process. Raises DeviceError."""
    if folder is None:
        raise DeviceError("no model directory was given")
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
    """Return the norm of the difference relative to the norm of the reference, or infinity if the shapes differ."""
    if np.shape(found) != np.shape(wanted):
        return float("inf")
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / (np.linalg.norm(wanted) or 1.0))


def typical(errors: Sequence[float], least: float = UNIT / 2) -> float:
    """Return the geometric mean of errors. Every error counts as at least half a float32 unit."""
    return float(np.exp(np.mean(np.log(np.maximum(errors, least)))))


def finite_differences(function: Callable, x: np.ndarray, gradient: np.ndarray, seed: int = 0) -> float:
    """Compare a gradient with central differences in random directions. Returns the relative error.

    The smallest error over several step sizes counts, because a wrong gradient fits none of them. An error that the
    rounding of the function's value explains counts as 0. The result is NaN if no step gives finite values.

    Args:
        function: A function from an array to a number.
        x: The array, in float64.
        gradient: The gradient of the function at x, of the shape of x.
        seed: The seed of the directions.
    """
    rng = np.random.default_rng(seed)
    ways = [rng.normal(size=x.shape) for _ in range(DIRECTIONS)]
    wanted = [float(np.sum(gradient * v)) for v in ways]
    scale = float(np.sqrt(np.mean(x * x))) or 1.0

    def error(h: float) -> float:
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

    An engine in float64 is judged by its worst batch, an engine in float32 by its geometric mean over the batches. In
    16 bits, the relative error may be 0.1, and in 8 bits 0.25.

    Args:
        model: A frozen model.
        folder: The folder from which transformers loads the same model. None skips torch.
        cases: Batches and prompts. The default is three cases from `draw`.
        report: Called with a line before each engine runs.
        device: Check only this device of DEVICES, beside NumPy and torch. The default is all float32 devices.

    Returns:
        A report. Its notes say why an engine could not run.

    Raises:
        ValueError: The reference is not finite.

    Example:
        >>> print(check_model(tp.load("path/to/t5"), "path/to/t5"))
    """
    cases = [draw(model, seed=seed) for seed in range(3)] if cases is None else cases
    exact, single = (in_dtype(model.params, dtype) for dtype in (np.float64, np.float32))
    report("numpy float64")
    start = time.perf_counter()
    wanted = run(model, exact, cases, "numpy")
    report(f"all engines: about {WHOLE * (time.perf_counter() - start):.0f} seconds, plus the start of torch")
    if not wanted or not all(np.isfinite(x).all() for found in wanted for x in found.values()):
        raise ValueError(
            f"{model.name}: no finite loss and gradient in float64: the weights contain NaN, or there is no batch"
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

        def loss(p: Any, batch: Batch = batch) -> Any:
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
    """Return one finding for each engine and quantity, from its errors on all batches.

    NumPy sums in blocks, which is more accurate than sequential sums. Without torch as the reference error, an engine
    may therefore also have the rounding error of a sum over the vocabulary: sqrt(vocab_size) units.
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
                if worst <= limit:  # every batch is within the limit
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
    """Check a gradient of the mean cross entropy of a batch with respect to the prompt.

    Args:
        gradient: Your gradient, of the shape of the prompt, or the result of `tinyprompt.gradient`. Its relative error
            may be 1e-9 in float64, ten times that of NumPy's float32 in float32, and 0.1 in 16 bits. Float32 numbers
            stored as float64 are judged as float32.
        model: A frozen model.
        prompt: The prompt (P, D). Omit it for a result of `tinyprompt.gradient`, which contains prompt and batch.
        batch: The batch.
        name: The name of your gradient in the report.

    Returns:
        A report. For a wrong gradient, its notes describe the error: length, direction, worst rows, NaN.

    Raises:
        ValueError: The gradient does not have the shape of the prompt, or does not contain floats.

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
        notes.append(f"{name}: float32 numbers stored as {gradient.dtype}; judged as float32")
    if gradient.dtype.itemsize == 4 or notes:
        single = run(model, in_dtype(model.params, np.float32), case, "numpy")[0]["gradient"]
        limit = min(ALONE, SCATTER * distance(single, wanted) + UNIT)
    found = Finding(name, "gradient", error, limit)
    if not found.ok:
        notes += faults(gradient.astype(np.float64), wanted, name)
    return Report(f"{model.name}: relative distance from NumPy float64", [found], notes)


def faults(gradient: np.ndarray, wanted: np.ndarray, name: str) -> list[str]:
    """Describe a wrong gradient (P, D): values that are not finite, a wrong length or sign, or the worst rows."""
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
            return [*notes, f"{name}: opposite direction{length}: is a minus sign missing?"]
        return [*notes, f"{name}: correct direction, {times:.6g} times as long: is it a sum instead of a mean?"]
    errors = np.linalg.norm(gradient - wanted, axis=1)
    total = float(np.linalg.norm(errors))
    worst = [int(row) for row in np.argsort(-errors)[:WORST] if errors[row]]
    if worst:
        share = float(np.linalg.norm(errors[worst])) / total
        notes.append(f"{name}: largest errors in {listed(worst)} of {len(errors)}: {share:.0%} of the distance")
    return notes


def listed(rows: Sequence[int]) -> str:
    """Format row numbers: `row 3`, or `rows 3, 0, 2`, with at most ten numbers."""
    shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
    return f"row{'s' * (len(rows) > 1)} {shown}"


def is_float(dtype: np.dtype) -> bool:
    """Return whether arrays of a dtype can be differentiated."""
    return dtype.kind == "f" or dtype == bfloat16


def check_vjp(function: Callable, *arguments: Any, seed: int = 0) -> Report:
    """Check the vector-Jacobian products of a function of arrays, its dtypes, and its ONNX graph.

    Three checks apply to the value and to every float argument. The product of a random vector with the Jacobian is
    compared with finite differences in float64. float32 must stay float32. If the function lowers, its graph is
    compared with NumPy.

    Args:
        function: A function of arrays that calls `autograd.numpy` or primitives.
        *arguments: Its arguments. Integer arrays, lists, numbers and other objects are passed unchanged.
        seed: The seed of the random vector.

    Returns:
        A report. Its notes name the arguments that were not checked.

    Raises:
        TypeError: The result is not a float array, or there is no float array among the arguments.
        ValueError: No gradient could be checked, because no argument has a gradient rule.

    Example:
        >>> print(check_vjp(ops.softmax, np.ones((2, 3))))
    """
    name = getattr(function, "__name__", "function")
    floats = [i for i, x in enumerate(arguments) if isinstance(x, np.ndarray | np.generic) and is_float(x.dtype)]
    notes = [f"argument {i}: not differentiated: {kind_of(x)}" for i, x in enumerate(arguments) if i not in floats]
    if not floats:
        given = ", ".join(kind_of(x) for x in arguments) or "none"
        raise TypeError(f"{name}: no gradient to check: expected an array of floats among the arguments, found {given}")

    def in_float(dtype: Any) -> Any:
        return [x.astype(dtype) if i in floats else x for i, x in enumerate(arguments)]

    exact, single = in_float(np.float64), in_float(np.float32)
    value = function(*exact)
    if not isinstance(value, np.ndarray | np.floating) or value.dtype.kind != "f":
        raise TypeError(f"{name}: expected a result of floats, found {getattr(value, 'dtype', type(value).__name__)}")
    vector = np.random.default_rng(seed).normal(size=value.shape)

    def product(*arguments: Any) -> Any:  # its gradient is the VJP
        out = function(*arguments)
        return anp.sum(out * vector.astype(out.dtype))

    functions = {None: function} | {i: grad(product, i) for i in floats}
    findings: list[Finding] = []
    for i, compute in functions.items():
        what = "value" if i is None else f"argument {i}"
        try:
            wanted, found = (np.asarray(compute(*given)) for given in (exact, single))
        except NotImplementedError as problem:
            notes.append(f"{what}: its gradient has no rule: {problem}")
            continue
        except Exception as problem:  # autograd raises many exception types for unsupported calls
            why = f"{type(problem).__name__}: {problem}"
            notes.append(f"{what}: autograd cannot differentiate it: {why}; if it calls numpy, use autograd.numpy")
            findings.append(Finding(what, "gradient", float("inf"), EXACT))
            continue
        if i is not None:
            if wanted.shape != exact[i].shape or wanted.dtype == object:
                notes.append(f"{what}: its gradient has shape {list(wanted.shape)}; expected {list(exact[i].shape)}")
                findings.append(Finding(what, "differences", float("inf"), DIFFERENCES))
                continue

            def along(x: Any, i: int = i) -> Any:
                return product(*exact[:i], x, *exact[i + 1 :])

            error = finite_differences(along, exact[i], wanted, seed)
            findings.append(Finding(what, "differences", error, DIFFERENCES))
        error = distance(found, wanted) if found.dtype == np.float32 else float("inf")
        findings.append(Finding(what, "float32", error, SINGLE))
        if found.dtype != np.float32:
            notes.append(f"{what}: returns {found.dtype} for float32 arguments")
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
    """Describe an argument: `int64[3]` for an array, otherwise its type, with advice for a list of numbers."""
    if isinstance(x, np.ndarray | np.generic):
        return f"{x.dtype}{list(x.shape)}"
    return f"{type(x).__name__}{', not an array' if isinstance(x, list | tuple | float) else ''}"
