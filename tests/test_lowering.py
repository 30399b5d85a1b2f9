"""Every lowering rule: value, shape, dtype and gradient equal NumPy's and autograd's, for random shapes."""

import inspect
import os
import re
import sys
from builtins import compile as compile_text
from pathlib import Path
from unittest import mock

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import value_and_grad
from autograd.extend import defvjp, primitive
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import basic_indices
from ml_dtypes import bfloat16
from profiles import examples

from tinyprompt import ops, t5
from tinyprompt.device import compile, open_session
from tinyprompt.lowering import RULES, LoweringError, Traced, is_frozen, lower, primitives
from tinyprompt.lowering.graph import MICROSOFT
from tinyprompt.lowering.primitives import FEW
from tinyprompt.lowering.rules import ELEMENTWISE
from tinyprompt.tree import leaves, refill

pytest.importorskip("onnxruntime", reason="lowering needs onnx and onnxruntime: pip install '.[ort]'")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx.reference")

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
DIMS = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
SEEDS = st.integers(0, 99)
FLOATS = st.sampled_from([np.float32, np.float64])
EVERY = examples(15)

# name: (function of x (a, b, c) and y (a, b, c), whether it has a gradient)
CASES = {
    "add": (lambda x, y: x + y[:1], True),
    "add a number": (lambda x, y: 2 + x + 1.5, True),
    "subtract": (lambda x, y: x[0] - y, True),
    "a number minus an array": (lambda x, y: 0 - x + 1 / (1 + y * y), True),
    "multiply": (lambda x, y: x * y[..., :1], True),
    "divide": (lambda x, y: x / (3 + y * y), True),
    "integers divide to floats": (lambda x, y: x.shape[0] / (1 + anp.floor(y * y)), True),
    "power": (lambda x, y: (1 + x * x) ** 1.5 + (1 + y * y) ** 0.5 + x**2 + y**3 + x**1 + (2 + y * y) ** -1, True),
    "maximum": (anp.maximum, True),
    "minimum": (lambda x, y: anp.minimum(x, 0.25), True),
    "negative": (lambda x, y: -x, True),
    "absolute": (lambda x, y: anp.abs(x) + abs(y), True),
    "sign": (lambda x, y: anp.sign(x), True),
    "exp": (lambda x, y: anp.exp(x), True),
    "log": (lambda x, y: anp.log(1 + x * x), True),
    "sqrt": (lambda x, y: anp.sqrt(1 + x * x), True),
    "square": (lambda x, y: anp.square(x), True),
    "tanh": (lambda x, y: anp.tanh(x), True),
    "sin and cos": (lambda x, y: anp.sin(x) * anp.cos(y), True),
    "floor and ceil": (lambda x, y: anp.floor(3 * x) + anp.ceil(3 * y), True),
    "comparisons": (lambda x, y: np.stack([x > y, x >= y, x < 0, x <= y, x == y, x != y]), False),
    "a comparison as a factor": (lambda x, y: y * (x > 0), True),
    "logic": (lambda x, y: np.logical_not(np.logical_or(np.logical_and(x > 0, y > 0), x < -1)), False),
    "matmul": (lambda x, y: x @ anp.swapaxes(y, 1, 2), True),
    "matmul, left transposed": (lambda x, y: anp.swapaxes(x, 1, 2) @ y, True),
    "matmul, both transposed": (
        lambda x, y: anp.swapaxes(x, 1, 2) @ anp.swapaxes(2 * anp.swapaxes(y, 1, 2), 1, 2),
        True,
    ),
    "matmul with a vector": (lambda x, y: x @ y[0, 0], True),
    "a vector with a matrix": (lambda x, y: y[0, 0] @ anp.transpose(x[0]), True),
    "a vector with a vector": (lambda x, y: x[0, 0] @ y[0, 0], True),
    "dot": (lambda x, y: anp.dot(x[0], y[0].T) * anp.dot(x[0, 0], y[0, 0]) * anp.dot(x, 2.0)[0, 0, 0], True),
    "dot with three axes": (lambda x, y: anp.dot(x, anp.swapaxes(y, 1, 2)), True),
    "tensordot": (lambda x, y: anp.tensordot(x, y, ([0, 2], [0, 2])) + anp.tensordot(x, y, 3), True),
    "tensordot of one axis": (lambda x, y: np.tensordot(x, y.T, 1) + np.tensordot(x, y, (-1, 2)).sum(), False),
    "outer": (lambda x, y: anp.outer(x[0, 0], y[0, 0]), True),
    "sum": (lambda x, y: x.sum() + anp.sum(y, axis=(0, 2), keepdims=True) + x.sum(-1, keepdims=True), True),
    "sum of integers": (lambda x, y: (x > 0).sum(1), False),
    "mean": (lambda x, y: anp.mean(x, axis=1) + anp.mean(y), False),
    "max and min": (lambda x, y: anp.max(x, axis=0) - y.min(-1, keepdims=True), True),
    "argmax": (lambda x, y: x.argmax(1) + np.argmax(y, axis=1), False),
    "argmax of all": (lambda x, y: x.argmax(), False),
    "argmin": (lambda x, y: x.argmin(1) + np.argmin(y, axis=1), False),
    "argmax and argmin with keepdims": (
        lambda x, y: x.argmax(1, keepdims=True) * np.argmin(y, axis=0, keepdims=True),
        False,
    ),
    "argmin of all": (lambda x, y: np.argmin(x, keepdims=True), False),
    "inner product": (lambda x, y: anp.einsum("...i,...i->...", x, y), True),
    "einsum": (lambda x, y: anp.einsum("abc,abd->cd", x, y), True),
    "einsum of one array": (lambda x, y: anp.einsum("abc->ca", x) + anp.einsum("B... -> ...B", y).sum(0).T.sum(), True),
    "einsum, implicit": (lambda x, y: anp.einsum("cab,cdb", x, y), True),
    "einsum with ellipses": (
        lambda x, y: anp.einsum("...ij,...kj", x, y) + np.einsum("i...,j->...", x, y[0, 0]).sum(),
        False,
    ),
    "einsum with ellipses of two lengths": (lambda x, y: anp.einsum("...i,...i->...", x, y[0, 0]), True),
    "gradient of einsum with ellipses": (lambda x, y: anp.einsum("...ij,...kj->...ik", x, y), True),
    "var": (lambda x, y: anp.var(anp.concatenate([x, y, 2 * y], axis=1), axis=1, ddof=2) + anp.var(y), True),
    "std": (lambda x, y: x.std((0, 2)) + np.std(np.stack([x, y]), ddof=1, keepdims=True), False),
    "gradient of std": (lambda x, y: anp.std(anp.concatenate([x, x + 1 + y * y]), axis=0), True),
    "cumsum": (lambda x, y: anp.cumsum(x, axis=1) + anp.cumsum(y)[-1], True),
    "cumsum of integers": (lambda x, y: (x > 0).cumsum(-1) + (9 * y).astype(np.int32).cumsum(1), False),
    "prod": (lambda x, y: anp.prod(1 + x * x, axis=1) + np.prod(y.shape), True),
    "prod of integers": (lambda x, y: np.prod((x > 0) + np.ones(x.shape, int), axis=0), False),
    "diff": (lambda x, y: anp.diff(anp.concatenate([x, y], axis=1), axis=1), True),
    "diff twice": (lambda x, y: np.diff(np.concatenate([x, y, x], axis=-1), 2), False),
    "tile": (lambda x, y: anp.tile(x, (2, 1, 3)) + np.tile(y[0, 0], 3).sum() + np.tile(x, 2).sum(), True),
    "tile to more axes": (lambda x, y: np.tile(x, (2, 1, 3, 1)), False),
    "repeat": (lambda x, y: anp.repeat(x, 3, axis=1) + np.repeat(y, 2)[0], True),
    "repeat with counts": (lambda x, y: x.repeat(np.arange(x.shape[1]), axis=1), False),
    "pad": (lambda x, y: anp.pad(x, ((1, 2), (0, 1), (3, 0)), mode="constant") + 0 * y[0, 0, 0], True),
    "pad with a number": (lambda x, y: np.pad(x, (1, 2), constant_values=3) + np.pad(y[:1, :1, :1], 1).sum(), False),
    "split": (lambda x, y: anp.split(anp.concatenate([x, y], axis=1), 2, axis=1)[0] * y, True),
    "split in unequal parts": (lambda x, y: np.array_split(x, [1, 1, 3], axis=-1) + np.array_split(y, 3), False),
    "sort": (lambda x, y: anp.sort(anp.ravel(x)) * anp.arange(x.size) + y[0, 0, 0], True),
    "sort along an axis": (lambda x, y: np.sort(x, 1) * y + np.sort(y) + np.sort(x, axis=None)[0], False),
    "argsort": (
        lambda x, y: (
            np.argsort(x) + y.argsort(1) + np.argsort((x > 0) * 3, axis=0, kind="stable") + np.argsort(y, None)[0]
        ),
        False,
    ),
    "flip": (lambda x, y: anp.flip(x, 1) + np.flip(y) + np.flip(x, axis=(0, -1)), False),
    "all and any": (lambda x, y: [x.all(1), np.any(x > 1), (y > 0).any((0, 2), keepdims=True), np.all(y)], False),
    "isclose": (
        lambda x, y: [np.isclose(x, y, 0.5, 0.1), np.isclose(x, x / (x > 0)), np.isclose(x, x / 0, equal_nan=True)],
        False,
    ),
    "isnan, isinf and isfinite": (lambda x, y: [f(x / (y > 0)) for f in (np.isnan, np.isinf, np.isfinite)], False),
    "nansum": (lambda x, y: np.nansum(np.where(x > 0, x, np.nan), axis=1), False),
    "norm": (lambda x, y: anp.linalg.norm(x, axis=-1) + anp.linalg.norm(y), True),
    "norms of several orders": (
        lambda x, y: (
            [np.linalg.norm(x, k, 1, keepdims=True) for k in (1, 2, np.inf, -np.inf)]
            + [np.linalg.norm(y[0], "fro"), np.linalg.norm(y, axis=(0, 2)), np.linalg.norm(x)]
        ),
        False,
    ),
    "log1p and expm1": (lambda x, y: anp.log1p(x * x * 10.0**-x.ndim) + anp.expm1(y * 1e-3) + anp.expm1(2 * y), True),
    "logaddexp": (lambda x, y: anp.logaddexp(30 * x, 30 * y) + anp.logaddexp(x, x), True),
    "sinh and cosh": (lambda x, y: anp.sinh(x) * anp.cosh(y) + anp.sinh(1e-3 * y), True),
    "arctan": (lambda x, y: anp.arctan(30 * x) * anp.arctan(y * 1e-3), True),
    "hypot": (lambda x, y: np.hypot(1e30 * x, y), False),
    "rounding": (lambda x, y: np.rint(4 * x) + np.round(3 * y), False),
    "flatten": (lambda x, y: x.flatten(), True),
    "array methods": (
        lambda x, y: x.clip(-1, 1).swapaxes(0, 1).ravel() + y.squeeze().argmax() + y.astype("f4").max(),
        False,
    ),
    "reshape": (
        lambda x, y: np.reshape(x, x.shape).reshape(-1, x.shape[2]).reshape(x.shape[0], -1) + y.reshape(y.shape[0], -1),
        True,
    ),
    "ravel": (lambda x, y: anp.ravel(x), True),
    "transpose": (lambda x, y: anp.transpose(anp.transpose(x, (1, 0, 2)), (2, 1, 0)) + anp.swapaxes(y.T, 1, 2), True),
    "expand and squeeze": (lambda x, y: anp.squeeze(anp.expand_dims(x, 1), axis=1) + y[:, None, :][:, 0], True),
    "broadcast": (lambda x, y: ops.broadcast_to(x[:1], x.shape) * y, True),
    "concatenate": (lambda x, y: anp.concatenate([x, y, x], axis=1), True),
    "concatenate one": (lambda x, y: anp.concatenate([x], axis=2), True),
    "concatenate with numbers": (lambda x, y: anp.concatenate([np.ones((1, *x.shape[1:]), x.dtype), x]), True),
    "stack": (lambda x, y: np.stack([x, y], axis=1), False),
    "autograd's stack and array": (
        lambda x, y: anp.stack([x, anp.array(y), anp.ones_like(x)], axis=-1) * anp.array([x[0, 0, 0], 2, y[0, 0, -1]]),
        True,
    ),
    "arrays of arrays": (
        lambda x, y: anp.array([[x[0, 0], y[0, 0]], [y[0, 0], np.zeros(x.shape[2])]], dtype=np.float64),
        True,
    ),
    "vstack, hstack and append": (
        lambda x, y: anp.vstack([x[0], y[0], x[0, 0]]) * anp.sum(anp.hstack([x[0], y[0]])) + anp.append(x, y)[0],
        True,
    ),
    "vstack and hstack": (
        lambda x, y: [np.vstack([x[0, 0], y[0, 0]]), np.hstack([x[0, 0], y[0, 0]]), np.hstack([x, y]), np.hstack([x])],
        False,
    ),
    "atleast": (
        lambda x, y: [np.atleast_1d(x[0, 0, 0]), np.atleast_2d(x[0, 0]), *np.atleast_1d(x, y), np.atleast_2d(y)],
        False,
    ),
    "iterate over rows": (lambda x, y: sum(row * k for k, row in enumerate(x)) + [*y][-1], True),
    "logic of booleans": (
        lambda x, y: [
            (x > 0) & (y > 0),
            (x > 0) | (y > 0),
            (x > 0) ^ (y > 0),
            ~(x > 0),
            (x > 0) & True,
            (x > 0) + (y > 0),
            (x > 0) * (y > 0),
            np.maximum(x > 0, y > 0),
            np.minimum(x > 0, y > 0),
            abs(x > 0),
        ],
        False,
    ),
    "computed indices": (lambda x, y: x[anp.argmax(y[:, 0, 0])] + anp.sin(y)[anp.argmin(x, axis=0)].sum(0).T[0], True),
    "moveaxis and roll": (
        lambda x, y: (
            anp.moveaxis(anp.roll(x, 2, axis=1), 0, -1) + anp.roll(y, -1).sum() + np.moveaxis(x, (0, 1), (2, 0))
        ),
        True,
    ),
    "roll over two axes": (lambda x, y: np.roll(x, (1, -2), (0, 2)) + np.roll(y, 3, (1, 2)), False),
    "triangles": (lambda x, y: anp.tril(x) + anp.triu(y, 1) + anp.tril(x * y, -1) + anp.trace(x[0]), True),
    "trace": (lambda x, y: np.trace(x, 1, 2, 0), False),
    "flipud and fliplr": (lambda x, y: anp.flipud(x) * anp.fliplr(y) + anp.amax(x) - anp.amin(y), True),
    "tan and logarithms": (
        lambda x, y: (
            anp.tan(x / 9) + anp.log2(1 + x * x) + anp.log10(2 + y * y) + anp.exp2(y) + anp.reciprocal(1 + x * x)
        ),
        True,
    ),
    "positive": (lambda x, y: +x, False),
    "real": (lambda x, y: anp.real(x), True),
    "round to a number of decimals": (
        lambda x, y: [np.round(x, 2), np.around(y * 99, -1), np.round((9 * y).astype(int), 2)],
        False,
    ),
    "where": (lambda x, y: np.where(x > 0, x, 0) + np.where(np.floor(y), 1, x), False),
    "clip": (lambda x, y: np.clip(x, -0.5, 0.5) + np.clip(y, None, 0), False),
    "constants on both sides": (
        lambda x, y: x + np.full(x.shape, 2.0, x.dtype) + np.stack([np.ones(x.shape)])[0],
        True,
    ),
    "ones_like, full_like and zeros_like": (
        lambda x, y: x + np.ones_like(y) * np.full_like(y, 3) + np.zeros_like(x) + np.full_like(x, y[0, 0, 0]),
        False,
    ),
    "slices": (lambda x, y: x[-1:, ::-1, 1:] + y[..., -1:], True),
    "empty slices": (lambda x, y: anp.concatenate([x[-9:-8], x[9::-1], y[-9::-1]], axis=0), False),
    "several uses of an index": (lambda x, y: x + anp.sin(x[0]) * y[0] + anp.exp(x[0]) + anp.tanh(x[:1]) * x[0], True),
    "integers and None": (lambda x, y: x[0, None, :, -1] + y[:, 0][..., None][0, 0], True),
    "None and later axes": (lambda x, y: x[..., None, 0] + y[None, ..., None, -1:][0, :, :, 0], True),
    "None in front": (lambda x, y: x[None, None, :, 0, 1:][0] + y[..., 1:, None][:1, :1, :, 0], True),
    "arrays of integers": (
        lambda x, y: [
            x[np.arange(x.shape[0]), y[:, :, 0].argmax(-1)],
            x[y[:1, 0].argmax(0), np.array([[0], [-1]]), :1],
            x[[0], :, [-1, 0]],
            x[0, [0, -1]],
            x[np.array([0]), None, -1, ..., 1:],
            x[:, np.array([True] + [False] * (x.shape[1] - 1))],
            x[np.ones(x.shape, bool)],
            x[..., [0]],
        ],
        False,
    ),
    "a gradient of arrays of integers": (
        lambda x, y: x[[0, -1, 0], :, np.array([[0], [0]])] + anp.sum(y[np.arange(y.shape[0]), x[:, 0].argmax(-1) * 0]),
        True,
    ),
    "an array of integers": (lambda x, y: x[:, np.array([0, -1, 0])], True),
    "take": (lambda x, y: np.take(x, np.array([[0], [0]]), axis=1), False),
    "take along an axis": (lambda x, y: np.take_along_axis(x, np.zeros((*x.shape[:2], 1), int), -1), False),
    "astype": (lambda x, y: x.astype(np.float64) + (y * 3).astype(np.int64), False),
    "linear": (lambda x, y: ops.linear(x, y[0]), True),
    "rms_norm": (lambda x, y: ops.rms_norm(x, y[0, 0], 1e-6), True),
    "softmax": (lambda x, y: ops.softmax(x) * y, True),
    "log_softmax": (lambda x, y: ops.log_softmax(x) * y, True),
    "relu": (lambda x, y: ops.relu(x) * y, True),
    "gelu": (lambda x, y: ops.gelu(x) * y, True),
    "headwise": (lambda x, y: ops.headwise(x, np.swapaxes(y, 1, 2)), True),
    "embedding": (lambda x, y: ops.embedding(x[0], np.zeros((2, 3), int)), False),
    "put": (lambda x, y: ops.put(x[None] * 2, x.argmax(-1)[0, :1] * 0 + x.shape[1] - 1, x[None, :, :1]), False),
    "largest": (lambda x, y: ops.largest(x.reshape(x.shape[0], -1), 5)[0], False),
    "indices of the largest": (lambda x, y: ops.largest(x.reshape(x.shape[0], -1), 50)[1], False),
    "embedding of a constant": (lambda x, y: ops.embedding(np.eye(6, dtype=x.dtype), x.argmax(-1)), False),
    "gradient of an embedding": (lambda x, y: ops.add_rows(x, np.indices(x.shape[:-1]).sum(0) % 3, 4), False),
    "cross_entropy": (
        lambda x, y: ops.cross_entropy(x, np.zeros(x.shape[:2], int), np.ones(x.shape[:2], x.dtype), 0.01),
        True,
    ),
}


def run_graph(lowered, *arguments):
    """Return the results of a lowered function. Shapes and dtypes must equal the predicted ones."""
    graph, result = lowered
    arrays = [x for _, x in leaves(arguments) if isinstance(x, np.ndarray)]
    found = open_session(graph, "cpu").run(None, {i.name: x for i, x in zip(graph.inputs, arrays, strict=True)})
    traced = [x for _, x in leaves(result) if isinstance(x, Traced)]
    assert [(x.shape, x.dtype) for x in traced] == [(x.shape, x.dtype) for x in found]
    outputs = iter(found)
    return refill(result, (next(outputs) if isinstance(x, Traced) else x for _, x in leaves(result)))


def random_arrays(dims, dtype, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return [rng.normal(0, scale, dims).astype(dtype) for _ in range(2)]


def gradient_of(function):
    """Return value and gradient of a scalar that depends on every element of the function's result."""
    return value_and_grad(lambda xy: anp.sum(anp.sin(function(*xy))))


def assert_same(found, wanted, dtype, exact=None):
    """Assert equality. A float32 error against float64 may be four times NumPy's, or 1e-5 of the largest value."""
    wanted = np.asarray(wanted)
    exact = wanted if exact is None else np.asarray(exact)
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    if wanted.dtype.kind != "f":
        assert (found == wanted).all()
        return
    tolerance = 1e-5 if np.float32 in (wanted.dtype, dtype) else 1e-12
    allowed = 4 * np.abs(wanted - exact).max(initial=0) + tolerance * np.abs(exact).max(initial=1)
    assert np.abs(found - exact).max(initial=0) <= allowed


@pytest.mark.parametrize("name", CASES)
@EVERY
@given(dims=DIMS, dtype=FLOATS, seed=SEEDS)
def test_a_lowered_function_equals_numpy(name, dims, dtype, seed):
    x, y = random_arrays(dims, dtype, seed)
    function, exact = CASES[name][0], CASES[name][0](x.astype(np.float64), y.astype(np.float64))
    found, wanted = run_graph(lower(function, x, y), x, y), function(x, y)
    for results in zip(*((x if isinstance(x, list) else [x]) for x in (found, wanted, exact)), strict=True):
        assert_same(*results[:2], dtype, results[2])


@pytest.mark.parametrize("name", CASES)
def test_a_plain_graph_has_standard_operators_only(name):
    x, y = random_arrays((2, 3, 5), np.float32, 0)
    function = CASES[name][0]
    graph, _ = lowered = lower(function, x, y, plain=True)
    assert [i.domain for i in graph.to_onnx().opset_import] == [""]
    assert all("domain" not in node.attributes and node.op != "FusedMatMul" for node in graph.nodes)
    found, wanted = run_graph(lowered, x, y), function(x, y)
    for results in zip(*((x if isinstance(x, list) else [x]) for x in (found, wanted)), strict=True):
        assert_same(*results, np.float32)


def test_a_square_weight_of_a_plain_graph_is_never_transposed():
    """OpenVINO 2026.4 is wrong if a weight is multiplied both plain and transposed."""
    x, w = (np.random.default_rng(i).normal(size=(n, 9)).astype(np.float32) for i, n in enumerate((50, 9)))
    gradient = value_and_grad(lambda x, w: anp.sum(anp.tanh(ops.linear(x, w))))
    graph, _ = lowered = lower(gradient, x, w, plain=True)
    products = [node.inputs for node in graph.nodes if node.op == "MatMul"]
    assert [[i.name == graph.inputs[1].name for i in pair] for pair in products] == [[True, False], [False, True]]
    for found, wanted in zip(run_graph(lowered, x, w), gradient(x, w), strict=True):
        assert np.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_negative_indices_in_a_plain_graph():
    x, at = np.arange(12.0).reshape(3, 4), np.array([[-1, 0], [3, -4], [-2, 1]])
    found = run_graph(lower(lambda x, at: np.take_along_axis(x, at, -1), x, at, plain=True), x, at)
    assert (found == np.take_along_axis(x, at, -1)).all()


@pytest.mark.parametrize("name", [name for name, (_, smooth) in CASES.items() if smooth])
@EVERY
@given(dims=DIMS, dtype=FLOATS, seed=SEEDS)
def test_a_lowered_gradient_equals_autograd(name, dims, dtype, seed):
    x, y = random_arrays(dims, dtype, seed)
    function = CASES[name][0]
    gradient = gradient_of(function)
    value, (to_x, to_y) = gradient((x, y))
    found, (of_x, of_y) = run_graph(lower(gradient, (x, y)), (x, y))
    exact, (exact_x, exact_y) = gradient((x.astype(np.float64), y.astype(np.float64)))
    assert_same(found, value, dtype, exact)
    assert_same(of_x, to_x, dtype, exact_x)
    assert_same(of_y, to_y, dtype, exact_y)


def test_gradients_of_repeated_uses_are_added():
    x = np.arange(6, dtype=np.float64).reshape(2, 3) / 7
    gradient = value_and_grad(lambda x: anp.sum(x) + anp.sum(anp.sin(x)) + anp.sum(x[0]) + anp.sum(x[0] * x[1]))
    found = run_graph(lower(gradient, x), x)
    assert_same(found[1], gradient(x)[1], np.float64)


def test_neutral_operations_emit_no_node():
    x = np.arange(3, dtype=np.float32)
    ones, zeros = np.ones_like(x), np.zeros_like(x)
    graph, _ = lower(lambda x: [x + 0, 0 + x, x - zeros, 1 * x, x * ones, x / 1], x)
    assert graph.nodes == []
    graph, _ = lower(lambda x: [x - 1, 0 - x, 1 / x, x * 0, x + 1], x)
    assert [node.op for node in graph.nodes] == ["Sub", "Sub", "Div", "Mul", "Add"]


def test_every_rule_has_a_case():
    """The cases above use each rule, and each ONNX operator of a ufunc."""
    seen, operators = set(), set()

    def recorded(key, rule):
        return lambda *a, **k: seen.add(key) or rule(*a, **k)

    with mock.patch.dict(RULES, {key: recorded(key, rule) for key, rule in RULES.items()}):
        x, y = random_arrays((2, 3, 4), np.float32, 0)
        for function, smooth in CASES.values():
            operators |= {node.op for node in lower(function, x, y)[0].nodes}
            if smooth:
                lower(gradient_of(function), (x, y))
        lower(lambda x: t5.dropout(0.5, 0)("output", x), x)
    assert {key.__name__ for key in RULES if key not in seen} == set()
    assert set(ELEMENTWISE.values()) <= operators


def test_empty_results_are_not_computed():
    x = np.ones((2, 3), np.float32)

    def function(x):
        empty = np.exp(x[:, 3:])
        return np.tanh(x[:, :0]), empty @ np.ones((0, 4), np.float32), empty.sum(-1), empty.sum(0, keepdims=True)

    graph, _ = lower(function, x)
    assert not graph.nodes
    for found, wanted in zip(compile(function, "cpu")(x), function(x), strict=True):
        assert found.shape == wanted.shape
        assert found.dtype == wanted.dtype
        assert (found == wanted).all()


@EVERY
@given(dims=DIMS, seed=SEEDS, order=st.permutations(range(3)), again=st.permutations(range(3)))
def test_consecutive_transposes_become_one(dims, seed, order, again):
    x, _ = random_arrays(dims, np.float32, seed)
    function = lambda x: np.transpose(np.transpose(x, order), again)
    graph = lower(function, x)
    assert len(graph[0].nodes) <= 1 + (1 in dims)  # moving an axis of length 1 is a reshape
    assert_same(run_graph(graph, x), function(x), np.float32)


def test_equal_nodes_are_emitted_once_and_unused_nodes_are_dropped():
    x = np.ones((2, 3), np.float32)

    def function(x):
        np.exp(x)
        return np.tanh(x) * np.tanh(x) + 0 * np.zeros_like(x)

    graph, _ = lower(function, x)
    assert [node.op for node in graph.nodes] == ["Tanh", "Mul"]


def test_a_transposed_weight_is_a_flag_of_the_product():
    x, w = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)
    graph, _ = lower(lambda x, w: x @ w.T, x, w)
    assert [(node.op, node.attributes["transB"]) for node in graph.nodes] == [("FusedMatMul", 1)]


def test_the_printed_graph_is_readable():
    x, w = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)
    graph, _ = lower(lambda x, w: 2 * np.tanh(x @ w.T), x, w)
    lines = str(graph).splitlines()
    assert lines[0] == "x: float32[2,3] = input"
    assert lines[-1].startswith("return v")
    assert re.fullmatch(r"v\d+: float32\[2,4\] = Mul\(2.0, v\d+\)", lines[-2])


def test_the_readme_shows_the_printed_output(capsys):
    code, shown = re.findall(r"```(?:python)?\n(.*?)```", README.split("## What it is")[1], re.S)[:2]
    exec(code, {})
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: np.linalg.svd(x), "numpy.linalg.svd"),
        (lambda x: np.fft.fft(x), "numpy.fft.fft"),
        (lambda x: np.arcsin(x), "numpy.arcsin"),
        (lambda x: np.partition(x, 0), "numpy.partition"),
        (lambda x: np.linalg.norm(x, "nuc"), "numpy.linalg.norm"),
        (lambda x: np.pad(x, 1, mode="edge"), "numpy.pad"),
        (lambda x: np.tensordot(x, x, 1), "numpy.tensordot"),
        (lambda x: np.array([x, x]), "autograd's array"),
        (lambda x: np.zeros(3).__setitem__(0, x[0, 0]), "Python number"),
        (lambda x: np.zeros(3).__setitem__(slice(None), x[0]), "NumPy array"),
        (lambda x: f"{x[0, 0]:.2f}", ".2f"),
        (lambda x: 1 in x, "numpy.any"),
        (lambda x: x.tolist(), "Python number"),
        (lambda x: len(x[0, 0]), "no length"),
        (lambda x: x.view(np.int32), "view"),
        (lambda x: x * 1j, "complex"),
        (lambda x: np.greater(x > 0, x < 0), "numpy.greater of booleans"),
        (lambda x: np.argmax(x, axis=1) & 1, "numpy.bitwise_and"),
        (lambda x: np.reciprocal(np.argmax(x, axis=1)), "numpy.reciprocal"),
        (lambda x: np.round(np.argmax(x, axis=1), -1), "numpy.round"),
        (lambda x: anp.array([x, x], order="F"), "numpy.array"),
        (lambda x: np.add.reduce(x), "numpy.add.reduce"),
        (lambda x: np.sum(x, where=x > 0), "numpy.sum"),
        (lambda x: np.asarray(x), "NumPy array"),
        (lambda x: float(x.sum()), "Python number"),
        (lambda x: x if x.sum() > 0 else -x, "decide an `if`"),
        (lambda x: x.__setitem__(0, 1), "in place"),
        (lambda x: x.__iadd__(1), "in place"),
        (lambda x: x[x > 0], "mask"),
        (lambda x: x.reshape(7, 7), "numpy.reshape"),
        (lambda x: x @ x, "numpy.matmul"),
        (lambda x: np.concatenate([x, x[:, :1]]), "numpy.concatenate"),
        (lambda x: np.broadcast_to(x, (3,)), "numpy.broadcast_to"),
        (lambda x: np.einsum("ij->ii", x), "numpy.einsum"),
        (lambda x: np.einsum("i", x), "numpy.einsum"),
        (lambda x: (x > 0) ** 2, "numpy.power"),
        (lambda x: np.add.at(np.zeros(3), [0], x), "numpy.add.at"),
        (lambda x: np.copyto(np.zeros((2, 3)), x), "a NumPy array cannot hold a traced array"),
        (lambda x: x[[0.0, 1.0]], "with a mask or with floats"),
        (lambda x: x.strides, "x.strides has no rule"),
        (lambda x: x.sort(), "x.sort has no rule"),
        (lambda x: x + np.array([None]), "array of Python objects"),
        (lambda x: np.concatenate([x, np.array([[None] * 3])]), "array of Python objects"),
        (lambda x: x * np.matrix([[1.0, 2, 3]]), "numpy.matrix"),
        (lambda x: np.matrix([[1.0, 2, 3]]) * x, "numpy.matrix"),
        (lambda x: np.where(x > 0, x, np.ma.masked_less(np.arange(3.0), 1)), "MaskedArray"),
        (lambda x: x + np.ones(3, np.longdouble), "longdouble" if np.longdouble().nbytes < 16 else "float128"),
        (lambda x: np.equal(x, "a"), "numpy.equal"),
        (lambda x: np.where(x > 0, x, np.array("a")), "<U"),
        (lambda x: x.reshape(6, order="F"), "numpy.reshape in order 'F'"),
        (lambda x: x.reshape(-3, -2), "numpy.reshape"),
        (lambda x: x.transpose(0), "numpy.transpose"),
        (lambda x: x[:0].max(), "ReduceMax of"),
        (lambda x: np.concatenate([x, x[0]]), "numpy.concatenate"),
        (lambda x: np.concatenate([x, x[:1]], axis=1), "numpy.concatenate"),
        (lambda x: np.take(x, [0]), "numpy.take without an axis"),
        (lambda x: np.take_along_axis(x, np.zeros((1, 3), int), 1), "numpy.take_along_axis that broadcasts"),
        (lambda x: np.take_along_axis(x, np.zeros((2, 1), int), 0), "numpy.take_along_axis that broadcasts"),
        (lambda x: np.take_along_axis(x[None], np.zeros((1, 1, 1), int), 1), "numpy.take_along_axis that broadcasts"),
        (lambda x: x.astype(int) ** 2, "numpy.power of integers"),
        (lambda x: x.astype(np.uint8).sum(), "sums and products of unsigned integers"),
        (lambda x: np.sort(x.astype(np.uint64)), "numpy.sort of uint64"),
        (lambda x: np.argsort(x.astype(np.uint64)), "numpy.argsort of uint64"),
        (lambda x: np.einsum("ii->", x.astype(int)[:, :2]), "numpy.einsum of integers with 'ii'"),
        (lambda x: np.einsum("ij,ij->jj", x, x), "numpy.einsum"),
    ],
)
def test_an_error_names_the_function_and_the_line(function, names):
    with pytest.raises(LoweringError) as error:
        lower(function, np.ones((2, 3), np.float32))
    assert names in str(error.value)
    assert os.path.basename(__file__) in str(error.value)


def test_complex_arguments_are_refused():
    with pytest.raises(LoweringError, match=rf"complex64 .*{os.path.basename(__file__)}"):
        lower(lambda z: abs(z), np.ones(3, np.complex64))


def test_an_error_of_the_backward_pass_names_the_line_of_the_forward_pass():
    double = primitive(lambda x: 2 * x)
    file = os.path.join(os.path.dirname(anp.__file__), "numpy_vjps.py")
    elsewhere = compile_text("lambda ans, x: lambda g: np.cumprod(g)", file, "eval")
    defvjp(double, eval(elsewhere, {"np": np}))
    line = sys._getframe().f_lineno + 3

    def loss(x):
        y = double(anp.sin(x))
        return anp.sum(y * y)

    with pytest.raises(LoweringError, match=rf"numpy.cumprod .*in the gradient of .*, line {line}, in loss"):
        lower(value_and_grad(loss), np.ones(3))
    own = lambda ans, x: lambda g: np.cumprod(g)
    defvjp(double, own)  # a reader's own gradient: the error is in that line
    with pytest.raises(LoweringError, match=rf"numpy.cumprod has no rule \(.*, line {own.__code__.co_firstlineno}, in"):
        lower(value_and_grad(loss), np.ones(3))


@EVERY
@given(dims=DIMS, seed=SEEDS)
def test_structure_of_arguments_and_results_is_kept(dims, seed):
    x, y = random_arrays(dims, np.float32, seed)

    def function(tree, scale):
        return {
            "sum": tree["a"]["x"] + scale * tree["y"][0],
            "rest": (tree["a"]["x"].shape, tree["a"]["x"], None, [1.5]),
        }

    arguments = ({"a": {"x": x}, "y": [y]}, 3.0)
    found = run_graph(lower(function, *arguments), *arguments)
    assert_same(found["sum"], x + 3 * y, np.float32)
    assert found["rest"][0] == x.shape
    assert (found["rest"][1] == x).all()
    assert found["rest"][2:] == (None, [1.5])


def test_inputs_keep_their_names_and_never_clash():
    x = np.ones(2, np.float32)
    graph, _ = lower(lambda p, q, x: p["a.b"] + p["v1"] + q["a"]["b"] + q["output_0"] + x, {"a.b": x, "v1": x},
                     {"a": {"b": x}, "output_0": x}, x)  # fmt: skip
    assert [i.name for i in graph.inputs] == ["a.b", "p.v1", "q.a.b", "q.output_0", "x"]
    graph.to_onnx()


def test_a_captured_array_is_copied():
    x, c = np.ones(2, np.float32), np.arange(2, dtype=np.float32)
    lowered = lower(lambda x: x + c, x)
    c[0] = 100
    assert run_graph(lowered, x).tolist() == [1, 2]


def read_only(x, dtype=np.float32):
    """Return a read-only copy, as a frozen weight is."""
    x = x.astype(dtype)
    x.flags.writeable = False
    return x


@EVERY
@given(dims=DIMS, seed=SEEDS, dtype=st.sampled_from([np.float16, bfloat16]))
def test_16_bit_weights_are_widened_at_each_use(dims, seed, dtype):
    x, y = random_arrays(dims, np.float32, seed)
    w = read_only(y[0], dtype)

    def function(x, w):
        return anp.sum(ops.rms_norm(ops.linear(x, w), w[:, 0], 1e-6) * ops.embedding(w, np.arange(len(w)))[:, 0])

    gradient = value_and_grad(function)
    value, by_x = gradient(x, w)
    exact = gradient(x.astype(np.float64), w.astype(np.float64))
    graph, _ = lower(gradient, x, w)
    found = compile(gradient, "cpu")(x, w)
    assert_same(found[0], value, np.float32, exact[0])
    assert_same(found[1], by_x, np.float32, exact[1])
    wide = [node for node in graph.nodes if node.op == "Cast" and node.inputs[0].dtype == w.dtype]
    assert len(wide) > len({node.inputs[0].name for node in wide if node.inputs[0].op is None})  # one per use


@pytest.mark.parametrize("wrong", [1, 16])
def test_int8_products_are_tried_with_few_and_many_rows(monkeypatch, wrong):
    class Saturates:
        def __init__(self, model, providers):
            pass

        def run(self, names, inputs):
            assert set(inputs["weight"].ravel()) == {-127, 127}
            product = inputs["x"] @ inputs["weight"]
            return [product * (0.9 if len(product) == wrong else 1)]

    monkeypatch.setattr("onnxruntime.InferenceSession", Saturates)
    assert not primitives.int8_is_exact(127)


def test_the_largest_int8_does_not_saturate(monkeypatch):
    assert primitives.int8_is_exact(64)
    assert primitives.int8_is_exact(primitives.largest_int8())
    monkeypatch.setattr(primitives, "int8_is_exact", lambda largest: largest <= 64)  # as on a processor without VNNI
    assert primitives.largest_int8.__wrapped__() == 64
    monkeypatch.setattr(primitives, "largest_int8", lambda: 64)
    quantised, scale = primitives.quantized(np.array([[1, -3], [-2, 1]], np.float32))
    assert np.abs(quantised).max() == 64
    assert np.abs(quantised * scale - [[1, -3], [-2, 1]]).max() < 3 / 64 / 2


@EVERY
@given(
    dims=st.tuples(st.integers(1, 4), st.integers(2, 20), st.integers(2, 40)),
    seed=SEEDS,
    levels=st.sampled_from([127, 64]),
)
def test_int8_is_as_accurate_as_8_bits_allow_in_every_row(dims, seed, levels):
    levels = min(levels, primitives.largest_int8())
    with mock.patch.object(primitives, "largest_int8", return_value=levels):
        check_int8(dims, seed, levels)


def check_int8(dims, seed, levels):
    x, y = random_arrays(dims, np.float32, seed)
    x = x * np.float32(10.0 ** (np.arange(dims[1])[:, None] % 8 - 4))  # rows of very different magnitude
    x[0, 0] = 0
    w = read_only(np.concatenate([y[0], 100 * y[0][:1]]) / 100)

    def gradient(x, w, g):
        return value_and_grad(lambda x: anp.sum(ops.linear(x, w) * g))(x)

    g = random_arrays((*dims[:2], len(w)), np.float32, seed + 1)[0]
    graph, result = lower(gradient, x, w, g, int8="w")
    assert [node.op for node in graph.nodes].count("DynamicQuantizeMatMul") == 2
    assert [v.name for v in graph.inputs] == ["x", "g"]  # the quantised weight replaces the weight
    made = {x.name: v for (_, recipe), xs in graph.derived.items() for x, v in zip(xs, recipe(w), strict=True)}
    assert {v.dtype for v in made.values()} == {np.dtype(np.int8), np.dtype(np.float32)}
    value, by_x = refill(result, iter(open_session(graph, "cpu").run(None, {"x": x, "g": g} | made)))

    def limit(rows, matrix):
        """Sum, for each product, half a step of 255 in a row and half a step of the levels in a column."""
        step = np.abs(rows).max(-1, keepdims=True) * np.abs(matrix).max(0)
        return len(matrix) * step * (1 / 255 + 0.6 / levels) + 1e-20

    assert (np.abs(by_x - g.astype(float) @ w) <= limit(g, w)).all()
    assert abs(value - (x.astype(float) @ w.T * g).sum()) <= (limit(x, w.T) * np.abs(g)).sum()
    graph, _ = lower(ops.linear, x, w, int8="")
    made = {v.name: part for (_, recipe), vs in graph.derived.items() for v, part in zip(vs, recipe(w), strict=True)}
    (found,) = open_session(graph, "cpu").run(None, {"x": x} | made)
    assert (np.abs(found - x.astype(float) @ w.T) <= limit(x, w.T)).all()


def test_int8_applies_only_to_named_and_frozen_weights():
    x, w = np.ones((FEW + 1, 4), np.float32), np.ones((5, 4), np.float32)
    for weights, int8 in (({"a.w": w}, "a."), ({"a.w": read_only(w)}, "b."), ({"a.w": read_only(w)}, None)):
        graph, _ = lower(lambda x, weights: ops.linear(x, weights["a.w"]), x, weights, int8=int8)
        assert [node.op for node in graph.nodes] == ["FusedMatMul"]
        assert not graph.derived


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, bfloat16])
@pytest.mark.parametrize("rows", [1, 2, FEW, FEW + 1])
def test_a_weight_is_the_left_operand_for_a_few_rows(rows, dtype):
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(1, rows, 4)).astype(np.float64 if dtype == np.float64 else np.float32)
    w = rng.normal(size=(5, 4)).astype(dtype)
    graph, _ = lower(ops.linear, x, w)
    product = next(node for node in graph.nodes if node.op in ("MatMul", "FusedMatMul"))
    assert (product.inputs[0].shape[0] == 5) == (1 < rows <= FEW and x.dtype == np.float32)
    assert np.allclose(compile(ops.linear, "cpu")(x, w), ops.linear(x, w), rtol=1e-5, atol=1e-6)


def test_bf16_applies_to_matrix_products_only():
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 8), (7, 8)))

    def loss(x, w):
        logits = ops.linear(ops.rms_norm(x, np.ones(8, np.float32), 1e-6), w)
        return ops.cross_entropy(logits, np.arange(5), np.ones(5, np.float32), 1e-4)

    def gradient(x, w):
        return value_and_grad(loss)(x, w)

    graph, result = lower(gradient, x, read_only(w), bf16=True)
    for node in graph.nodes:
        kinds = {v.dtype for v in (node, *node.inputs)}
        assert (np.dtype(bfloat16) in kinds) == (node.op in ("MatMul", "FusedMatMul", "Cast"))
        assert node.op == "Cast" or kinds <= {np.dtype(bfloat16)} or np.dtype(bfloat16) not in kinds
    assert [v.name for v in graph.inputs] == ["x"]  # only the bfloat16 copy of the frozen weight is needed
    ((_, recipe), (part,)) = next(iter(graph.derived.items()))
    assert part.dtype == bfloat16

    class FusedMatMul(onnx.reference.op_run.OpRun):
        op_domain = MICROSOFT

        def _run(self, a, b, transA=0, transB=0):
            return ((a.T if transA else a) @ (b.T if transB else b),)

    evaluator = onnx.reference.ReferenceEvaluator(graph.to_onnx(), new_ops=[FusedMatMul])
    value, by_x = refill(result, iter(evaluator.run(None, {"x": x, part.name: recipe(w)[0]})))
    wanted, exact = gradient(x, w)
    assert 0 < abs(value - wanted) < 0.02 * abs(wanted)
    assert 0 < np.linalg.norm(by_x - exact) < 0.02 * np.linalg.norm(exact)


def test_bf16_weights_are_multiplied_without_conversion():
    w = read_only(np.ones((3, 4)), bfloat16)
    step = value_and_grad(lambda x, tree: anp.sum(ops.linear(x, tree["w"])))
    graph, _ = lower(step, np.ones((2, 4), np.float32), {"w": w}, bf16=True)
    assert not graph.derived
    products = [node for node in graph.nodes if node.op in ("MatMul", "FusedMatMul")]
    assert len(products) == 2
    assert all("w" in {v.name for v in node.inputs} for node in products)


def test_linear_of_a_constant_and_of_integers():
    w = read_only(np.ones((3, 4)))
    graph, _ = lower(lambda tree: ops.linear(np.ones((2, 4), np.float32), tree["w"]), {"w": w}, int8="w")
    assert [node.op for node in graph.nodes] == ["FusedMatMul"]
    x = np.arange(6).reshape(2, 3)
    assert_same(run_graph(lower(lambda x: x @ x.T, x), x), x @ x.T, int)


def test_a_lossy_cast_is_not_removed():
    x = np.array([1.7, -0.3], np.float16)
    assert_same(
        run_graph(lower(lambda x: x.astype(np.int32).astype(np.float16), x), x),
        np.array([1, 0], np.float16),
        np.float16,
    )


def test_an_array_is_frozen_if_nothing_can_write_it():
    x = np.ones((2, 3))
    view = x[:]
    view.flags.writeable = False
    assert not is_frozen(x)
    assert not is_frozen(view)
    assert not is_frozen(np.broadcast_to(x, (4, 2, 3)))
    x.flags.writeable = False
    assert is_frozen(x)
    assert is_frozen(view)


@pytest.mark.parametrize("equation", ["ij,ij->ij", "ij,ij->i", "ij,ij->", "ij,kj->ik", "ij,ji->i"])
def test_einsum_broadcasts_like_numpy(equation):
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.full((1, 3), 2, np.float32)
    b = b.T if equation == "ij,ji->i" else b
    for function in (np.einsum, lambda *x: np.zeros_like(np.einsum(*x)) + 1, lambda *x: np.einsum(*x).reshape(-1)):
        run = lambda a, b, function=function: function(equation, a, b)
        found = compile(run, "cpu")(a, b)
        assert found.shape == run(a, b).shape
        assert np.allclose(found, run(a, b))


@examples(60)
@given(index=basic_indices((3, 1, 5, 4), allow_newaxis=True))
@example(index=(slice(None, 0, -1), slice(None), slice(3, 0, -2)))
@example(index=(slice(None), slice(None), 2, slice(None, None, 2)))
def test_an_index_selects_the_elements_that_numpy_selects(index):
    x = np.arange(60, dtype=np.float32).reshape(3, 1, 5, 4)
    found = compile(lambda x: x[index] + 0, "cpu")(x)
    assert np.array_equal(found, x[index])


@EVERY
@given(
    equation=st.sampled_from(["ij,ij->ij", "ij,jk->ik", "ijk,ik->jk", "ij,kj->jik", "ij,jk->", "ijk,kji->k"]),
    length=st.fixed_dictionaries(dict.fromkeys("ijk", st.integers(1, 3))),
    ones=st.lists(st.booleans(), min_size=6, max_size=6),
    dtype=st.sampled_from([np.float32, np.int64]),
)
def test_any_axis_of_an_einsum_may_have_length_1(equation, length, ones, dtype):
    ones = iter(ones)
    shapes = [[1 if next(ones) else length[x] for x in term] for term in equation.partition("->")[0].split(",")]
    a, b = (np.arange(1, 1 + np.prod(shape)).reshape(shape).astype(dtype) for shape in shapes)
    found = compile(lambda a, b: np.einsum(equation, a, b), "cpu")(a, b)
    assert (found == np.einsum(equation, a, b)).all()
    assert found.shape == np.einsum(equation, a, b).shape
    assert found.dtype == dtype


def test_rules_have_the_defaults_of_numpy():
    compared = set()
    for function, rule in RULES.items():
        try:
            theirs = inspect.signature(function).parameters
        except ValueError:  # some C functions have a signature only since NumPy 2.3
            continue
        for name, ours in inspect.signature(rule).parameters.items():
            default = theirs[name].default if name in theirs else ours.default
            default = {"keepdims": False}.get(name) if default is np._NoValue else default
            if ours.default is not ours.empty and name not in ("order", "optimize"):  # both are None
                assert (function.__name__, name, ours.default) == (function.__name__, name, default)
                compared.add((function.__name__, name))
    assert {("sum", "keepdims"), ("sort", "axis"), ("var", "ddof"), ("stack", "axis")} <= compared


VALUES = [0.0, -0.0, 1e-30, -1e-8, 0.3, -1.0, 1.0, 5.0, -60.0, 80.0, 710.2, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, np.int32])
@pytest.mark.parametrize(
    "name", ["log1p", "expm1", "sinh", "cosh", "arctan", "sign", "rint", "isnan", "isinf", "isfinite"]
)
def test_edge_cases_of_unary_functions(name, dtype):
    x = np.array([v for v in VALUES if np.dtype(dtype).kind == "f" or np.isfinite(v)]).astype(dtype)
    found, wanted = compile(getattr(np, name), "cpu")(x), getattr(np, name)(x)
    assert found.dtype == wanted.dtype
    assert np.allclose(
        found, wanted, rtol=6 * np.finfo(wanted.dtype).eps if wanted.dtype.kind == "f" else 0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["logaddexp", "hypot", "isclose", "power"])
def test_edge_cases_of_binary_functions(name, dtype):
    values = np.array([v for v in VALUES if not np.isnan(v)], dtype)  # maximum ignores NaN
    function = getattr(np, name)
    for second in [*values.tolist(), 0.5, 2]:
        found, wanted = compile(lambda x, second=second: function(x, second), "cpu")(values), function(values, second)
        if name == "power":  # np.power(-inf, 0.5) is infinite before NumPy 2.3, but the operator is always right
            wanted = values**second
        assert found.dtype == wanted.dtype
        eps = np.finfo(dtype).eps
        assert np.allclose(found, wanted, rtol=8 * eps, atol=eps * (name == "logaddexp"), equal_nan=True), second


def test_isclose_respects_equal_nan():
    x, y = np.array([np.nan, np.nan, 1, np.inf]), np.array([np.nan, 1, np.nan, np.inf])
    for equal_nan in (False, True):
        close = lambda x, y, equal_nan=equal_nan: np.isclose(x, y, equal_nan=equal_nan)
        assert (compile(close, "cpu")(x, y) == close(x, y)).all()


INTEGERS = {
    "round": np.round,
    "norm": lambda x: [np.linalg.norm(x), np.linalg.norm(x, 1, axis=0), np.linalg.norm(x, np.inf, axis=1)],
    "isclose": lambda x: np.isclose(x, x[::-1], 0, 1.5),
    "sum": lambda x: [x.sum(), x.sum(0)],
    "prod": lambda x: [np.prod(x[:, :2]), np.prod(x, axis=0)],
    "cumsum": lambda x: x.cumsum(0),
    "einsum": lambda x: [np.einsum("ij->i", x), np.einsum("ij,kj->ik", x, x), np.einsum("ij,k->kj", x, x[0])],
    "var": lambda x: [x.var(), x.std(1)],
    "diff": np.diff,
}


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_equal_numpy_or_are_refused(name, dtype):
    x = np.array([[1, 2, 0, 7], [3, 1, 250, 6]]).astype(dtype)
    if dtype == np.int64:
        x[0] += 2**33
    function = INTEGERS[name]
    wanted = function(x)
    try:
        found = compile(function, "cpu")(x)
    except LoweringError:
        assert dtype == np.uint8
        return
    for ours, theirs in zip(*((x if isinstance(x, list) else [x]) for x in (found, wanted)), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.allclose(ours, theirs, rtol=1e-14, atol=0)


def test_integer_sums_are_exact():
    x = np.arange(24).reshape(2, 3, 4) + 2**53
    for equation in ("ijk->i", "ijk->kj", "i...->...", "ijk,lj->kl"):
        operands = [np.eye(3, dtype=int)] * equation.count(",")
        run = lambda x, equation=equation, operands=operands: np.einsum(equation, x, *operands)
        assert (compile(run, "cpu")(x) == run(x)).all()
    for axis in (None, 0, 1, 2, (0, 1), (0, 2)):
        for function in (np.sum, np.max, np.min, np.prod):
            run = lambda x, axis=axis, function=function: function(x, axis=axis, keepdims=True)
            y = x if function is not np.prod else 1 + x % 2 + 3 ** (18 * (x % 24 == 5))
            assert (compile(run, "cpu")(y) == run(y)).all(), (axis, function)


def test_dot_with_a_number_is_in_float64_like_numpy():
    x = np.ones(3, np.float32)
    assert compile(lambda x: np.dot(x, 2.0), "cpu")(x).dtype == np.dot(x, 2.0).dtype == np.float64


@pytest.mark.parametrize("product", [lambda x: anp.dot(x, x.T), lambda x: anp.einsum("ij,kj", x, x)])
def test_a_gradient_of_a_gradient(product):
    x = np.random.default_rng(0).normal(size=(3, 4))
    once = lambda x: value_and_grad(lambda x: anp.sum(product(x) ** 2))(x)[1]
    twice = value_and_grad(lambda x: anp.sum(anp.sin(once(x))))
    assert np.allclose(compile(twice, "cpu")(x)[1], twice(x)[1])


def test_autograd_keeps_its_own_gradients_of_arrays():
    x = np.arange(6.0).reshape(2, 3)
    assert (value_and_grad(lambda x: anp.sum(anp.dot(x, x.T)))(x)[1] == 2 * x.sum(0)).all()
    assert (value_and_grad(lambda x: anp.einsum("ij->", x))(x)[1] == 1).all()


def test_an_einsum_with_wrong_shapes_is_refused():
    for equation, shapes in (("ij,jk->ik", [(2, 3), (4, 5)]), ("ij->i", [(2, 3, 4)])):
        with pytest.raises(LoweringError, match=r"numpy\.einsum"):
            lower(lambda *x, equation=equation: np.einsum(equation, *x), *map(np.ones, shapes))
