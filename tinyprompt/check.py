"""Is the gradient right? Every engine on the same batches, judged against NumPy in float64.

    print(check_model(load("path/to/t5")))                 # what `tinyprompt check` prints
    print(check_gradient(mine, model, prompt, batch))      # somebody else's gradient of a batch
    print(check_vjp(function, x, y))                       # a primitive and its vector-Jacobian product

In float64 engines must agree to 1e-9 of the norm, and with finite differences. In float32 nothing can: an engine is
judged by how far torch's own float32 is from float64. `check_torch.py` is torch's side, in a process of its own.
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import autograd.numpy as anp
import numpy as np
from autograd import grad

from tinyprompt import backend, generate, methods, t5, train
from tinyprompt.backend import DeviceError
from tinyprompt.checkpoint import CheckpointError, Model
from tinyprompt.data import Batch
from tinyprompt.prompts import PROMPT
from tinyprompt.tree import Flat, Tree, flatten, merge, nest

# Limits of errors relative to the norm
EXACT = 1e-9  # in float64
DIFFERENCES = 1e-6  # of finite differences in float64
TIMES = 1.5  # a float32 engine may be this much further from float64 than torch's float32 is, plus one unit
UNIT = 2.0**-23  # of a float32 number
ALONE = 1e-3  # in float32 where there is nothing to compare with
SCATTER = 10  # one float32 gradient alone may be this much further off than NumPy's: rounding scatters by factors
ROUGH = 0.1  # in 16 bits

STEPS = (1e-3, 1e-4, 1e-5, 1e-6)  # of finite differences: small ones suffer from rounding, large ones from kinks
DIRECTIONS = 2  # of finite differences
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
        findings = [f._asdict() | {"ok": f.ok} for f in self.findings]
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


def draw(model: Model, length: int = 20, rows: int = 3, tokens: int = 24, targets: int = 5, seed: int = 0) -> Case:
    """A random batch, full in its first row and padded in the others, and a prompt of vocabulary rows.

    Shapes: prompt (length, d_model) float32; input_ids (rows, tokens), labels (rows, targets). Inputs are padded on the
    right, but the last one on the left.
    """
    rng = np.random.default_rng(seed)

    def mask_of(width):
        lengths = np.r_[width, rng.integers(1, width + 1, rows - 1)]
        return (np.arange(width) < lengths[:, None]).astype(np.int64)

    mask, weights = mask_of(tokens), mask_of(targets)
    mask[1:][-1:] = mask[1:][-1:, ::-1]
    ids = rng.integers(3, model.config.vocab_size, mask.shape) * mask
    labels = rng.integers(3, model.config.vocab_size, weights.shape) * weights
    prompt = methods.prompt_tuning(model, length, "vocab", seed=seed)[PROMPT]
    return Case(prompt, Batch(ids, mask, labels, weights.astype(np.float32)))


def save_case(case: Case, path: str | Path) -> None:
    """Write a case as a .npz file of named arrays: prompt, input_ids, attention_mask, labels, weights."""
    with open(path, "wb") as file:  # savez would put a suffix after the name it is given
        np.savez(file, prompt=case.prompt, **case.batch._asdict())


def load_case(path: str | Path, model: Model) -> Case:
    """Read what `save_case` wrote, or what somebody else did; without weights they are 1 where a label is not 0.

    Raises CheckpointError that names the file and the array.
    """
    names = ("prompt", *Batch._fields)
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: not a .npz file with the arrays {', '.join(names)} ({error})") from None

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
    mask = array("attention_mask", np.integer, *ids.shape).astype(np.int64)
    labels = array("labels", np.integer, len(ids), None).astype(np.int64)
    arrays.setdefault("weights", (labels != 0).astype(np.float32))
    weights = array("weights", np.floating, *labels.shape)
    for name, x in (("input_ids", ids), ("labels", labels)):
        if x.min() < 0 or x.max() >= model.config.vocab_size:
            raise CheckpointError(f"{path}: array {name!r}: expected ids from 0 to {model.config.vocab_size - 1}")
    if not np.isin(mask, (0, 1)).all() or not mask.any(1).all():
        raise CheckpointError(f"{path}: array 'attention_mask': expected 0 and 1, and a 1 in every row")
    if not weights.sum() > 0:
        raise CheckpointError(f"{path}: array 'weights': all 0, so there is no loss")
    return Case(prompt, Batch(ids, mask, labels, weights))


def cast(case: Case, dtype) -> Case:
    """The floats of a case in another dtype."""
    return Case(case.prompt.astype(dtype), case.batch._replace(weights=case.batch.weights.astype(dtype)))


def in_float64(params: Tree) -> Tree:
    """All weights in float64."""
    return nest({name: value.astype(np.float64) for name, value in flatten(params).items()})


def logits(delta: Flat, params: Tree, config: t5.Config, batch: Batch):
    """Logits (B, T, V) of the labels, teacher-forced: what `train.loss` takes the loss of."""
    shifted = generate.shift_right(batch.labels)
    return t5.forward(merge(params, delta), config, batch.input_ids, batch.attention_mask, shifted)


def run(model: Model, params: Tree, cases: Sequence[Case], device: str) -> list[Flat]:
    """Logits, loss and prompt gradient of each case on a device: in float64 if the weights are, else float32."""
    dtype = np.float64 if params["shared"]["weight"].dtype == np.float64 else np.float32
    forward, backward = (backend.compile(function, device) for function in (logits, train.loss_and_gradient))
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
        if not backend.version(package):
            raise DeviceError(f"{package} is not installed")
    with tempfile.TemporaryDirectory() as made:
        for i, case in enumerate(cases):
            save_case(case, Path(made) / f"case{i}.npz")
        words = [sys.executable, "-m", "tinyprompt.check_torch", str(folder), made, dtype]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise DeviceError(done.stderr.strip().rpartition("\n")[2])
        return [dict(np.load(Path(made) / f"found{i}.npz")) for i in range(len(cases))]


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / (np.linalg.norm(wanted) or 1.0))


def typical(errors: Sequence[float]) -> float:
    """Geometric mean, each at least half a unit of float32: rounding errors scatter by factors."""
    return float(np.exp(np.mean(np.log(np.maximum(errors, UNIT / 2)))))


def finite_differences(function: Callable, x: np.ndarray, gradient: np.ndarray, seed: int = 0) -> float:
    """How far a gradient of a scalar function is from central differences in random directions, over its norm.

    Shapes: x and gradient alike, float64. Of several step sizes the best one counts: a wrong gradient fits none.
    """
    rng = np.random.default_rng(seed)
    ways = [rng.normal(size=x.shape) for _ in range(DIRECTIONS)]
    wanted = [float(np.sum(gradient * v)) for v in ways]
    scale = float(np.sqrt(np.mean(x * x))) or 1.0

    def error(h):
        slopes = [(function(x + h * v) - function(x - h * v)) / (2 * h) for v in ways]
        return np.sqrt(np.mean(np.subtract(slopes, wanted) ** 2)) / (np.linalg.norm(gradient) or 1.0)

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
    """
    cases = [draw(model, seed=seed) for seed in range(3)] if cases is None else cases
    exact = in_float64(model.params)
    report("numpy float64")
    wanted = run(model, exact, cases, "numpy")
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
    engine("numpy float32", lambda: run(model, model.params, cases, "numpy"))
    engine("onnxruntime cpu float32", lambda: run(model, model.params, cases, "cpu"))
    engine("onnxruntime cuda float32", lambda: run(model, model.params, cases, "cuda"))
    return Report(f"{model.name}: relative distance from NumPy float64, {len(cases)} batches", judge(errors), notes)


def judge(errors: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Finding]:
    """One finding for each engine and quantity, from its errors on all batches."""
    single = errors.get("torch float32", errors["numpy float32"])
    findings = []
    for engine, quantities in errors.items():
        for quantity, found in quantities.items():
            error, limit = float(np.max(found)), DIFFERENCES if engine == "finite differences" else EXACT
            if engine.endswith("float32"):
                error = typical(found)
                limit = ALONE if quantities is single else TIMES * typical(single[quantity]) + UNIT
            findings.append(Finding(engine, quantity, error, limit))
    return findings


def check_gradient(gradient: np.ndarray, model: Model, prompt: np.ndarray, batch: Batch, name: str = "yours") -> Report:
    """Is this the gradient of a batch's mean cross entropy by the prompt?

    Shapes: gradient and prompt (P, D). In float64 it must be right to 1e-9, in float32 within ten times the distance of
    NumPy's float32, in 16 bits to 0.1. Raises ValueError for another shape.
    """
    if gradient.shape != prompt.shape:
        raise ValueError(f"{name}: shape {list(gradient.shape)}, expected that of the prompt, {list(prompt.shape)}")
    wanted = run(model, in_float64(model.params), [Case(prompt, batch)], "numpy")[0]["gradient"]
    limit = EXACT if gradient.dtype == np.float64 else ROUGH
    if gradient.dtype == np.float32:
        single = run(model, model.params, [Case(prompt, batch)], "numpy")[0]["gradient"]
        limit = SCATTER * distance(single, wanted) + UNIT
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
    arrays = [np.asarray(x) for x in arguments]
    floats = [i for i, x in enumerate(arrays) if x.dtype.kind == "f"]

    def in_dtype(dtype):
        return [x.astype(dtype) if i in floats else x for i, x in enumerate(arrays)]

    exact, single = in_dtype(np.float64), in_dtype(np.float32)
    value = np.asarray(function(*exact))
    if value.dtype.kind != "f":
        raise TypeError(f"{name}: expected a result of floats, found {value.dtype}")
    vector = np.random.default_rng(seed).normal(size=value.shape)

    def product(*arguments):  # its gradient is the vector-Jacobian product
        out = function(*arguments)
        return anp.sum(out * vector.astype(out.dtype))

    functions = {"value": function} | {f"argument {i}": grad(product, i) for i in floats}
    findings, notes = [], []
    for i, (what, compute) in enumerate(functions.items(), -1):
        wanted = np.asarray(compute(*exact))
        if what != "value":
            at = floats[i]

            def along(x, at=at):
                return product(*exact[:at], x, *exact[at + 1 :])

            error = finite_differences(along, exact[at], wanted, seed)
            findings.append(Finding(what, "differences", error, DIFFERENCES))
        found = np.asarray(compute(*single))
        findings.append(Finding(what, "float32", distance(found, wanted), ALONE))
        if found.dtype != np.float32:
            findings[-1] = Finding(what, "float32", float("inf"), ALONE)
            notes.append(f"{what}: {found.dtype} for float32 arguments")
        if backend.default() == "numpy":
            continue
        try:
            error = distance(backend.compile(compute, "cpu")(*exact), wanted)
        except (TypeError, DeviceError) as problem:
            error = float("inf")
            notes.append(f"{what}: does not lower: {problem}")
        findings.append(Finding(what, "lowered", error, EXACT))
    return Report(f"{name}: relative distances", sorted(findings, key=lambda f: f.quantity), notes)
