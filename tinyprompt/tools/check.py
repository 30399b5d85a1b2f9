"""Is the gradient right? Every engine on the same batches, judged against NumPy in float64.

    print(check_model(load("path/to/t5")))                 # what `tinyprompt check` prints
    print(check_gradient(mine, model, prompt, batch))      # somebody else's gradient of a batch
    print(check_vjp(function, x, y))                       # a primitive and its vector-Jacobian product

In float64 engines must agree to 1e-9 of the norm, and with finite differences. In float32 nothing can: an engine is
judged by how far torch's own float32 is from float64, or NumPy's without torch; as rounding errors scatter by factors,
it may be 10 ** (1 / sqrt(n)) times as far in the mean over n batches. `check_torch.py` is torch's side, in a process
of its own.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import autograd.numpy as anp
import numpy as np
from autograd import grad

from tinyprompt import generate, methods, t5, train
from tinyprompt.config import Config
from tinyprompt.data import Batch, random_batch
from tinyprompt.device import compile, version
from tinyprompt.errors import CheckpointError, DeviceError
from tinyprompt.files.io import load_numpy
from tinyprompt.model import PROMPT, Model
from tinyprompt.settings import Settings
from tinyprompt.tools.process import Engine
from tinyprompt.tree import Flat, Tree, flatten, nest

# Limits of errors relative to the norm
EXACT = 1e-9  # in float64
DIFFERENCES = 1e-6  # of finite differences in float64
SCATTER = 10.0  # one float32 engine may be this much further from float64 than another on one batch, plus one unit
UNIT = 2.0**-23  # of a float32 number
ALONE = 1e-3  # in float32, of a whole model
SINGLE = 3e-5  # in float32, of one function
ROUGH = 0.1  # in 16 bits

STEPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-8)  # of finite differences: small ones suffer from rounding, large ones from kinks
DIRECTIONS = 2  # of finite differences
WHOLE = 8  # times as long as the reference takes a whole check, most of it for the losses of finite differences
QUANTITIES = ("logits", "loss", "gradient")


class Finding(NamedTuple):
    """How far one quantity of one engine is from what it should be, and how far it may be."""

    engine: str
    quantity: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # so NaN is not


class Report(NamedTuple):
    """What a check found; printed, a table with a verdict."""

    title: str
    findings: list[Finding]
    notes: list[str]  # engines that could not run, and hints

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
    """One batch, and the prompt (P, D) by which its loss is differentiated."""

    prompt: np.ndarray
    batch: Batch


def draw(model: Model, seed: int = 0, length: int = 20) -> Case:
    """A random batch, and a prompt of vocabulary rows: (length, d_model) float32.

    Every third batch is longer than the distance from which all positions share a bucket.
    """
    settings = Settings(prompt_length=length, init="vocab", seed=seed)
    prompt = methods.init_params(model, settings, None)[PROMPT]
    tokens = 24 if seed % 3 < 2 else model.config.relative_attention_max_distance + 22
    return Case(prompt, random_batch(model.config.vocab_size, 3, tokens, 5, seed))


def save_case(case: Case, path: str | Path) -> None:
    """Write a case as a .npz file of named arrays: prompt, input_ids, attention_mask, labels, weights."""
    with open(path, "wb") as file:  # savez would put a suffix after the name it is given
        np.savez(file, prompt=case.prompt, **case.batch._asdict())


def load_case(path: str | Path, model: Model) -> Case:
    """Read what `save_case` wrote, or what somebody else did; without weights they are 1 where a label is not 0.

    Raises CheckpointError that names the file and the array.
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
    """All weights in a dtype; 16-bit ones may stay where float32 is asked for."""
    narrow = 4 if dtype == np.float32 else 0
    flat = flatten(params).items()
    return nest({name: x if x.dtype.itemsize <= narrow else x.astype(dtype) for name, x in flat})


def logits(trainable: Flat, params: Tree, config: Config, batch: Batch):
    """Logits (B, T, V) of the labels, teacher-forced: what `train.loss` takes the loss of."""
    shifted = generate.shift_right(batch.labels)
    params = methods.apply(params, methods.stored(trainable, config))
    return t5.forward(params, config, batch.input_ids, batch.attention_mask, shifted)


def run(model: Model, params: Tree, cases: Sequence[Case], device: str) -> list[Flat]:
    """Logits, loss and prompt gradient of each case on a device: in float64 if the weights are, else float32."""
    dtype = np.float64 if params["shared"]["weight"].dtype == np.float64 else np.float32
    forward, backward = (compile(function, device) for function in (logits, train.loss_and_grads))
    out = []
    for prompt, batch in (cast(case, dtype) for case in cases):
        arguments = {PROMPT: prompt}, params, model.config, batch
        loss, gradient = backward(*arguments)
        out.append({"logits": forward(*arguments), "loss": np.asarray(loss), "gradient": gradient[PROMPT]})
    return out


def run_torch(folder: str | Path | None, cases: Sequence[Case], dtype: str) -> list[Flat]:
    """The same by transformers and torch, in a process of its own. Raises DeviceError with its last words."""
    if folder is None:
        raise DeviceError("no model directory given")
    for package in ("torch", "transformers"):
        if not version(package):
            raise DeviceError(f"{package} is not installed")
    with tempfile.TemporaryDirectory() as made:
        for i, case in enumerate(cases):
            save_case(case, Path(made) / f"case{i}.npz")
        try:
            engine = Engine("torch", [sys.executable, "-m", "tinyprompt.tools.check_torch", folder, made], Path(made))
            with closing(engine):
                engine.ask(dtype)
        except ValueError as error:
            raise DeviceError(str(error)) from None
        return [dict(np.load(Path(made) / f"found{i}.npz")) for i in range(len(cases))]


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / (np.linalg.norm(wanted) or 1.0))


def typical(errors: Sequence[float], least: float = UNIT / 2) -> float:
    """Geometric mean, of half a unit of float32 at least: rounding errors scatter by factors."""
    return float(np.exp(np.mean(np.log(np.maximum(errors, least)))))


def finite_differences(function: Callable, x: np.ndarray, gradient: np.ndarray, seed: int = 0) -> float:
    """How far a gradient of a scalar function is from central differences in random directions, over its norm.

    Shapes: x and gradient alike, float64. Of several step sizes the best one counts: a wrong gradient fits none.
    What the rounding of the function's own value can explain does not count.
    """
    rng = np.random.default_rng(seed)
    ways = [rng.normal(size=x.shape) for _ in range(DIRECTIONS)]
    wanted = [float(np.sum(gradient * v)) for v in ways]
    scale = float(np.sqrt(np.mean(x * x))) or 1.0

    def error(h):
        ends = np.array([(function(x + h * v), function(x - h * v)) for v in ways])
        slopes = (ends[:, 0] - ends[:, 1]) / (2 * h)
        rounding = 8 * np.finfo(np.float64).eps * np.abs(ends).max() / h
        off = max(0.0, np.sqrt(np.mean((slopes - wanted) ** 2)) - rounding)
        return off / (max(np.linalg.norm(gradient), np.sqrt(np.mean(slopes**2))) or 1.0)

    return float(min(error(step * scale) for step in STEPS))


def check_model(
    model: Model,
    folder: str | Path | None = None,
    cases: Sequence[Case] | None = None,
    report: Callable[[str], None] = lambda engine: None,
) -> Report:
    """Logits, loss and prompt gradient of a frozen model by every engine that is here, on some batches.

    folder: where transformers finds the same model; None leaves torch out. cases: three that `draw` draws.
    The reference is NumPy in float64; of float64 the worst batch counts, of float32 the geometric mean.
    An engine that cannot run here gets a line that says why.
    Raises ValueError where the reference itself is not finite.
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
    engine("onnxruntime cpu float64", lambda: run(model, exact, cases, "cpu"))
    report("finite differences")
    slopes = errors["finite differences"] = {"gradient": []}
    for (prompt, batch), found in zip((cast(case, np.float64) for case in cases), wanted, strict=True):

        def loss(p, batch=batch):
            return float(train.loss({PROMPT: p}, exact, model.config, batch))

        slopes["gradient"].append(finite_differences(loss, prompt, found["gradient"]))
    engine("torch float32", lambda: run_torch(folder, cases, "float32"))
    engine("numpy float32", lambda: run(model, single, cases, "numpy"))
    engine("onnxruntime cpu float32", lambda: run(model, single, cases, "cpu"))
    engine("onnxruntime cuda float32", lambda: run(model, single, cases, "cuda"))
    return Report(
        f"{model.name}: relative distance from NumPy float64, {len(cases)} batches",
        judge(errors, model.config.vocab_size),
        notes,
    )


def judge(errors: Mapping[str, Mapping[str, Sequence[float]]], vocab_size: int = 1) -> list[Finding]:
    """One finding for each engine and quantity, from its errors on all batches.

    NumPy adds up in blocks, more exactly than engines that add up one after the other. So without torch to compare
    with, an engine may also be as far off as rounding takes a sum over the vocabulary: sqrt(vocab_size) units.
    """
    findings = []
    unit = UNIT * (1.0 if "torch float32" in errors else vocab_size**0.5)
    for engine, quantities in errors.items():
        for quantity, found in quantities.items():
            error, limit = float(np.max(found)), DIFFERENCES if engine == "finite differences" else EXACT
            if engine.endswith("float32"):
                others = [errors[name][quantity] for name in ("torch float32", "numpy float32") if name in errors]
                sound = [other for other in others if other is not found and np.max(other) <= ALONE]
                worst, limit = error, ALONE
                if sound and engine != "torch float32":
                    limit = min(ALONE, SCATTER * max(sound[0]) + unit)
                if worst <= limit:  # no batch stands out
                    error = typical(found, 1e-12)
                    if sound and engine != "torch float32":
                        limit = min(ALONE, SCATTER ** len(found) ** -0.5 * typical(sound[0]) + unit)
            findings.append(Finding(engine, quantity, error, limit))
    return findings


def check_gradient(gradient: np.ndarray, model: Model, prompt: np.ndarray, batch: Batch, name: str = "yours") -> Report:
    """Is this the gradient of a batch's mean cross entropy by the prompt?

    Shapes: gradient and prompt (P, D). In float64 it must be right to 1e-9, in float32 within ten times the distance of
    NumPy's float32, in 16 bits to 0.1. Raises ValueError for another shape.
    """
    gradient = np.asarray(gradient)
    if gradient.shape != prompt.shape or gradient.dtype.kind != "f":
        has = f"shape {list(gradient.shape)} and dtype {gradient.dtype}"
        raise ValueError(f"{name}: {has}; expected floats of the shape of the prompt, {list(prompt.shape)}")
    case = [Case(prompt, batch)]
    wanted = run(model, in_dtype(model.params, np.float64), case, "numpy")[0]["gradient"]
    limit = EXACT if gradient.dtype.itemsize >= 8 else ROUGH
    if gradient.dtype.itemsize == 4:
        single = run(model, in_dtype(model.params, np.float32), case, "numpy")[0]["gradient"]
        limit = min(ALONE, SCATTER * distance(single, wanted) + UNIT)
    found = Finding(name, "gradient", distance(gradient, wanted), limit)
    times = float(np.sum(gradient * wanted) / (np.sum(wanted * wanted) or 1.0))
    notes = []
    if abs(times - 1) > ALONE and distance(gradient / (times or 1.0), wanted) < ALONE:
        notes.append(f"{name}: the right direction, {times:.6g} times as long: a sum for a mean, or a sign?")
    return Report(f"{model.name}: relative distance from NumPy float64", [found], notes)


def check_vjp(function: Callable, *arguments: np.ndarray, seed: int = 0) -> Report:
    """A function of arrays, its vector-Jacobian products, its dtypes, and its ONNX graph where that can be run.

    For the value and every float argument: the product of a random vector with the Jacobian against finite differences
    in float64; whether float32 stays float32; and the lowered graph against NumPy.
    Raises TypeError for a result that is not an array of floats.
    """
    name = getattr(function, "__name__", "function")
    floats = [i for i, x in enumerate(arguments) if isinstance(x, np.ndarray) and x.dtype.kind == "f"]

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
    findings, notes = [], []
    for i, compute in functions.items():
        what = "value" if i is None else f"argument {i}"
        try:
            wanted = np.asarray(compute(*exact))
        except NotImplementedError:
            notes.append(f"{what}: no rule for its gradient")
            continue
        except (ValueError, TypeError) as problem:
            notes.append(f"{what}: autograd cannot differentiate it: {problem}")
            findings.append(Finding(what, "gradient", float("inf"), EXACT))
            continue
        if i is not None:

            def along(x, i=i):
                return product(*exact[:i], x, *exact[i + 1 :])

            error = finite_differences(along, exact[i], wanted, seed)
            findings.append(Finding(what, "differences", error, DIFFERENCES))
        found = np.asarray(compute(*single))
        if floats:
            error = distance(found, wanted) if found.dtype == np.float32 else float("inf")
            findings.append(Finding(what, "float32", error, SINGLE))
            if found.dtype != np.float32:
                notes.append(f"{what}: {found.dtype} for float32 arguments")
        try:
            lowered = compile(compute, "cpu")(*exact)
        except (TypeError, DeviceError) as problem:
            notes.append(f"{what}: not lowered: {problem}")
        else:
            findings.append(Finding(what, "lowered", distance(lowered, wanted), EXACT))
    return Report(f"{name}: relative distances", sorted(findings, key=lambda f: f.quantity), notes)
