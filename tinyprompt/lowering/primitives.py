"""Rules for primitives of ops.py: those with an equivalent ONNX node, and int8 products. The rest lower as written."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from tinyprompt import ops
from tinyprompt.lowering.graph import MICROSOFT, RULES, Traced
from tinyprompt.lowering.rules import reshape, take, untransposed
from tinyprompt.lowering.trace import lower

TINY = np.float32(1e-30)  # replaces 0 in a denominator
FEW = 32  # with at most this many rows, a large matrix is faster as the left operand


def same_shape(op: str, **attributes):
    """Return a rule for an operator whose result has the shape and dtype of its input."""
    return lambda x: x.graph.emit(op, x, shape=x.shape, dtype=x.dtype, **attributes)


def gelu(x) -> Traced:
    """Lower `ops.gelu`. float64 lowers as written, because ONNX Runtime's kernel has float32 constants."""
    return NotImplemented if x.dtype == np.float64 else same_shape("Gelu", approximate="tanh")(x)


@dataclass(frozen=True)
class Mask:
    """The recipe that computes the mask of `ops.keep` from its key."""

    shape: tuple[int, ...]
    rate: float
    name: str

    @property
    def __name__(self):
        return f"mask.{self.name}"

    def __call__(self, key):
        return (ops.mask(key, self.shape, self.rate, self.name),)


def keep(x, rate, key, name) -> Traced:
    """Lower `ops.keep`. NumPy draws the mask from the key before each run; the mask is an input of the graph."""
    recipe = Mask(x.shape, rate, name)
    if not isinstance(key, Traced):
        return x.graph.array(recipe(key)[0]).astype(x.dtype)
    (found,) = x.graph.derive(key, recipe, (x.shape, np.dtype(bool)))
    return found.astype(x.dtype)


def add_rows(g, ids, count) -> Traced:
    """Lower `ops.add_rows` to one ScatterND, because the ids are only known when the graph runs."""
    zeros = np.broadcast_to(g.graph.array(np.zeros((1, 1), g.dtype)), (count, g.shape[-1]))
    operands = zeros, reshape(g.graph.array(ids), -1, 1), reshape(g, -1, g.shape[-1])
    return g.graph.emit("ScatterND", *operands, shape=zeros.shape, dtype=g.dtype, reduction="add")


def put(x, position, values) -> Traced:
    """Lower `ops.put` to a ScatterND. Its result may reuse the memory of x (see `Graph.keep`)."""
    grid = np.moveaxis(np.indices((*x.shape[:2], 1))[:2], 0, -1)
    position = np.broadcast_to(x.graph.array(position).astype(np.int64), (*grid.shape[:-1], 1))
    index = np.concatenate([grid, position], axis=-1)
    return x.graph.emit("ScatterND", x, index, values, shape=x.shape, dtype=x.dtype)


def largest(x, count) -> tuple:
    """Lower `ops.largest`."""
    size = min(count, x.shape[1])
    options = dict(shape=(x.shape[0], size), dtype=np.int64, axis=1, largest=1, sorted=1, output=1)
    at: Any = x.graph.emit("TopK", x, np.array([size]), **options)
    return np.take_along_axis(x, at, 1), at


def linear(x, weight) -> Traced:
    """Lower `ops.linear`. In int8, the weight is quantised once per column, and x in every run per row.

    A product of few rows is computed as `(weight @ x.T).T`, because ONNX Runtime copies the right operand into another
    layout. In a plain graph, a square weight is always the left operand: OpenVINO 2026.4 silently computes wrong values
    if one square constant is the right operand of two products, once as it is and once transposed (in the gradient).
    """
    if not isinstance(x, Traced) or not isinstance(weight, Traced) or x.dtype != np.float32 or not x.size:
        return NotImplemented
    n_out, n_in = weight.shape
    source, transposed = untransposed(weight)
    if is_int8(source):
        recipe = quantized if transposed else quantized_transpose
        columns = x.graph.derive(source, recipe, ((n_in, n_out), np.int8), ((n_out,), np.float32))
        rows = reshape(x, -1, n_in)
        largest = np.maximum(np.abs(rows).max(-1, keepdims=True), TINY)
        out = int8_product(rows / largest, *columns) * largest
    elif transposed or not (1 < x.size // n_in <= FEW or (x.graph.plain and n_in == n_out)):
        return NotImplemented
    else:
        out = (ops.widen(weight, x.dtype) @ reshape(x, -1, n_in).T).T
    return reshape(out, *x.shape[:-1], n_out)


def is_int8(weight: Traced) -> bool:
    """Return whether a weight is frozen, has 16 or 32 bits, and is selected for quantisation."""
    graph = weight.graph
    named = graph.int8 is not None and weight.name.startswith(graph.int8)
    return named and weight.name in graph.frozen and weight.dtype in (np.float16, bfloat16, np.float32)


def int8_product(x, weight, scale) -> Traced:
    """Compute `x @ (weight * scale)`, x in 8 bits. Shapes: x float32 (N, I), weight int8 (I, O), scale float32 (O,)."""
    shape = x.shape[0], weight.shape[1]
    return x.graph.emit("DynamicQuantizeMatMul", x, weight, scale, shape=shape, dtype=x.dtype, domain=MICROSOFT)


def quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a matrix (I, O) to int8 (I, O) with one scale per column (O,): weight is close to int8 * scale."""
    weight = ops.widen(weight).astype(np.float32, copy=False)
    scale = np.maximum(np.abs(weight).max(0), TINY) / np.float32(largest_int8())
    return np.rint(weight / scale).astype(np.int8), scale


def quantized_transpose(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise the transposed matrix."""
    return quantized(weight.T)


@functools.cache
def largest_int8() -> int:
    """Return the int8 value of the largest weight of a column: 127, or 64 if 8-bit products saturate on this machine.

    x86 without VNNI (before 2019, and AMD before 2022) adds two products in 16 bits. The sum 2 x 255 x 64 fits, but
    2 x 255 x 127 saturates silently. The machine is therefore tested with the worst case once.
    """
    return 127 if int8_is_exact(127) else 64


def int8_is_exact(largest: int) -> bool:
    """Return whether int8 products with the extreme values are exact, for 1 row and for 16 rows."""
    import onnxruntime

    width, columns = 256, 32
    weight = np.full((width, columns), largest, np.int8) * np.array([1, -1] * (columns // 2), np.int8)
    for rows in (1, 16):
        x, scale = np.ones((rows, width), np.float32), np.ones(columns, np.float32)
        model = lower(int8_product, x, weight, scale)[0].to_onnx().SerializeToString()
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": x, "weight": weight, "scale": scale})
        if not np.allclose(found, x @ weight, rtol=1e-4):
            return False
    return True


RULES |= {
    ops.embedding: lambda table, ids: ops.widen(take(table, ids, 0)),
    ops.add_rows: add_rows,
    ops.linear: linear,
    ops.softmax: same_shape("Softmax", axis=-1),
    ops.log_softmax: same_shape("LogSoftmax", axis=-1),
    ops.logistic: same_shape("Sigmoid"),
    ops.relu: same_shape("Relu"),
    ops.gelu: gelu,
    ops.keep: keep,
    ops.put: put,
    ops.largest: largest,
}
