"""Every lowering rule: value, shape, dtype and gradient as NumPy and autograd have them, on drawn shapes."""

import os
import re
from pathlib import Path

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import value_and_grad
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyprompt import ops, t5
from tinyprompt.backend import open_session
from tinyprompt.lower import FUNCTIONS, PRIMITIVES, UFUNCS, LoweringError, Traced, lower
from tinyprompt.tree import leaves, refill

pytest.importorskip("onnxruntime", reason="lowering needs onnx and onnxruntime: pip install '.[ort]'")

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
DIMS = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
SEEDS = st.integers(0, 99)
FLOATS = st.sampled_from([np.float32, np.float64])
EVERY = settings(max_examples=15, deadline=None)

# name: (function of x (a, b, c) and y (a, b, c), whether it has a gradient)
CASES = {
    "add": (lambda x, y: x + y[:1], True),
    "add a number": (lambda x, y: 2 + x + 1.5, True),
    "subtract": (lambda x, y: x[0] - y, True),
    "multiply": (lambda x, y: x * y[..., :1], True),
    "divide": (lambda x, y: x / (3 + y * y), True),
    "integers divide to floats": (lambda x, y: x.shape[0] / (1 + anp.floor(y * y)), True),
    "power": (lambda x, y: (1 + x * x) ** 1.5 + x**2 + y**3 + x**1 + (2 + y * y) ** -1, True),
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
    "a comparison is a factor": (lambda x, y: y * (x > 0), True),
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
    "dot": (lambda x, y: np.dot(x[0], y[0].T) * np.dot(x[0, 0], y[0, 0]), False),
    "sum": (lambda x, y: x.sum() + anp.sum(y, axis=(0, 2), keepdims=True) + x.sum(-1, keepdims=True), True),
    "sum of integers": (lambda x, y: (x > 0).sum(1), False),
    "mean": (lambda x, y: anp.mean(x, axis=1) + anp.mean(y), False),
    "max and min": (lambda x, y: anp.max(x, axis=0) - y.min(-1, keepdims=True), True),
    "argmax": (lambda x, y: x.argmax(1) + np.argmax(y, axis=1), False),
    "argmax of all": (lambda x, y: x.argmax(), False),
    "inner product": (lambda x, y: anp.einsum("...i,...i->...", x, y), False),
    "einsum": (lambda x, y: anp.einsum("abc,abd->cd", x, y), False),
    "methods": (lambda x, y: x.clip(-1, 1).swapaxes(0, 1).ravel() + y.squeeze().argmax() + y.astype("f4").max(), False),
    "reshape": (
        lambda x, y: np.reshape(x, x.shape).reshape(-1, x.shape[2]).reshape(x.shape[0], -1) + y.reshape(y.shape[0], -1),
        True,
    ),
    "ravel": (lambda x, y: anp.ravel(x), True),
    "transpose": (lambda x, y: anp.transpose(anp.transpose(x, (1, 0, 2)), (2, 1, 0)) + anp.swapaxes(y.T, 1, 2), True),
    "expand and squeeze": (lambda x, y: anp.squeeze(anp.expand_dims(x, 1), axis=1) + y[:, None, :][:, 0], True),
    "broadcast": (lambda x, y: ops.broadcast_to(x[:1], x.shape) * y, True),
    "concatenate": (lambda x, y: anp.concatenate([x, y, x], axis=1), True),
    "concatenate with numbers": (lambda x, y: anp.concatenate([np.ones((1, *x.shape[1:]), x.dtype), x]), True),
    "stack": (lambda x, y: np.stack([x, y], axis=1), False),
    "where": (lambda x, y: np.where(x > 0, x, 0) + np.where(y, 1, x), False),
    "clip": (lambda x, y: np.clip(x, -0.5, 0.5) + np.clip(y, None, 0), False),
    "numbers on both sides": (lambda x, y: x + np.full(x.shape, 2.0, x.dtype) + np.stack([np.ones(x.shape)])[0], True),
    "like": (lambda x, y: x + np.ones_like(y) * np.full_like(y, 3) + np.zeros_like(x), False),
    "slices": (lambda x, y: x[-1:, ::-1, 1:] + y[..., -1:], True),
    "empty slices": (lambda x, y: anp.concatenate([x[-9:-8], x[9::-1], y[-9::-1]], axis=0), False),
    "several uses of an index": (lambda x, y: x + anp.sin(x[0]) * y[0] + anp.exp(x[0]) + anp.tanh(x[:1]) * x[0], True),
    "integers and None": (lambda x, y: x[0, None, :, -1] + y[:, 0][..., None][0, 0], True),
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
    "embedding": (lambda x, y: ops.embedding(x[0], np.zeros((2, 3), int)), False),
    "cross_entropy": (
        lambda x, y: ops.cross_entropy(x, np.zeros(x.shape[:2], int), np.ones(x.shape[:2], x.dtype), 0.01),
        True,
    ),
}


def run_graph(lowered, *arguments):
    """What a lowered function computes for its arguments."""
    graph, result = lowered
    arrays = [x for _, x in leaves(arguments) if isinstance(x, np.ndarray)]
    outputs = iter(open_session(graph, "cpu").run(None, {i.name: x for i, x in zip(graph.inputs, arrays, strict=True)}))
    return refill(result, (next(outputs) if isinstance(x, Traced) else x for _, x in leaves(result)))


def drawn(dims, dtype, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return [rng.normal(0, scale, dims).astype(dtype) for _ in range(2)]


def gradient_of(function):
    """Value and gradient of a number that depends on every element of the function's result."""
    return value_and_grad(lambda xy: anp.sum(anp.sin(function(*xy))))


def same(found, wanted, dtype, exact=None):
    """Equal; for float32 judged against a float64 run: at most four times as far from it as NumPy, or 1e-5 of it."""
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
def test_a_lowered_function_computes_what_numpy_does(name, dims, dtype, seed):
    x, y = drawn(dims, dtype, seed)
    function, exact = CASES[name][0], CASES[name][0](x.astype(np.float64), y.astype(np.float64))
    same(run_graph(lower(function, x, y), x, y), function(x, y), dtype, exact)


@pytest.mark.parametrize("name", [name for name, (_, smooth) in CASES.items() if smooth])
@EVERY
@given(dims=DIMS, dtype=FLOATS, seed=SEEDS)
def test_a_lowered_gradient_is_autograds(name, dims, dtype, seed):
    x, y = drawn(dims, dtype, seed)
    function = CASES[name][0]
    gradient = gradient_of(function)
    value, (to_x, to_y) = gradient((x, y))
    found, (of_x, of_y) = run_graph(lower(gradient, (x, y)), (x, y))
    exact, (exact_x, exact_y) = gradient((x.astype(np.float64), y.astype(np.float64)))
    same(found, value, dtype, exact)
    same(of_x, to_x, dtype, exact_x)
    same(of_y, to_y, dtype, exact_y)


def test_gradients_of_everything_used_more_than_once_add_up():
    x = np.arange(6, dtype=np.float64).reshape(2, 3) / 7
    gradient = value_and_grad(lambda x: anp.sum(x) + anp.sum(anp.sin(x)) + anp.sum(x[0]) + anp.sum(x[0] * x[1]))
    found = run_graph(lower(gradient, x), x)
    same(found[1], gradient(x)[1], np.float64)


def test_every_rule_has_a_case():
    """The cases above reach each rule of the three tables."""
    seen, tables = set(), (UFUNCS, FUNCTIONS, PRIMITIVES)
    before = [dict(table) for table in tables]

    def noted(key, rule):
        return lambda *a, **k: seen.add(key) or rule(*a, **k)

    try:
        for table in tables:
            table.update({key: noted(key, rule) for key, rule in table.items() if callable(rule)})
        x, y = drawn((2, 3, 4), np.float32, 0)
        operators = set()
        for function, smooth in CASES.values():
            operators |= {node.op for node in lower(function, x, y)[0].nodes}
            if smooth:
                lower(gradient_of(function), (x, y))
        lower(lambda x: t5.dropout(0.5, np.random.default_rng(0))(x), x)
    finally:
        for table, rules in zip(tables, before, strict=True):
            table.update(rules)
    assert {
        key.__name__ for rules in before for key, rule in rules.items() if callable(rule) and key not in seen
    } == set()
    assert {rule for rule in UFUNCS.values() if isinstance(rule, str)} <= operators


@EVERY
@given(dims=DIMS, seed=SEEDS, order=st.permutations(range(3)), again=st.permutations(range(3)))
def test_transposes_of_transposes_become_one(dims, seed, order, again):
    x, _ = drawn(dims, np.float32, seed)
    function = lambda x: np.transpose(np.transpose(x, order), again)
    graph = lower(function, x)
    assert len(graph[0].nodes) <= 1 + (1 in dims)  # moving an axis of length 1 is a reshape
    same(run_graph(graph, x), function(x), np.float32)


def test_equal_nodes_are_emitted_once_and_useless_ones_dropped():
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


def test_the_printed_graph_can_be_read():
    x, w = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)
    graph, _ = lower(lambda x, w: 2 * np.tanh(x @ w.T), x, w)
    lines = str(graph).splitlines()
    assert lines[0] == "x: float32[2,3] = input"
    assert lines[-1].startswith("return v")
    assert re.fullmatch(r"v\d+: float32\[2,4\] = Mul\(2.0, v\d+\)", lines[-2])


def test_the_readme_shows_what_is_printed(capsys):
    code, shown = re.findall(r"```(?:python)?\n(.*?)```", README.split("## The same code on ONNX Runtime")[1], re.S)[:2]
    exec(code, {})
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: np.linalg.svd(x), "numpy.linalg.svd"),
        (lambda x: np.fft.fft(x), "numpy.fft.fft"),
        (lambda x: np.arctan(x), "numpy.arctan"),
        (lambda x: np.add.reduce(x), "numpy.add.reduce"),
        (lambda x: np.sum(x, where=x > 0), "numpy.sum"),
        (lambda x: np.asarray(x), "NumPy array"),
        (lambda x: [v for v in x], "iterated"),
        (lambda x: float(x.sum()), "Python number"),
        (lambda x: x if x.sum() > 0 else -x, "decide an `if`"),
        (lambda x: x.__setitem__(0, 1), "in place"),
        (lambda x: x.__iadd__(1), "in place"),
        (lambda x: x[x > 0], "mask"),
        (lambda x: x.reshape(7, 7), "numpy.reshape"),
        (lambda x: x @ x, "numpy.matmul"),
        (lambda x: np.concatenate([x, x[:, :1]]), "numpy.concatenate"),
        (lambda x: np.broadcast_to(x, (3,)), "numpy.broadcast_to"),
        (lambda x: np.einsum("...i->...", x), "numpy.einsum"),
        (lambda x: (x > 0) ** 2, "numpy.power"),
        (lambda x: np.add.at(np.zeros(3), [0], x), "numpy.add.at"),
    ],
)
def test_what_cannot_be_lowered_names_the_function_and_the_line(function, names):
    with pytest.raises(LoweringError) as error:
        lower(function, np.ones((2, 3), np.float32))
    assert names in str(error.value)
    assert os.path.basename(__file__) in str(error.value)


@EVERY
@given(dims=DIMS, seed=SEEDS)
def test_structure_of_arguments_and_results_is_kept(dims, seed):
    x, y = drawn(dims, np.float32, seed)

    def function(tree, scale):
        return {
            "sum": tree["a"]["x"] + scale * tree["y"][0],
            "rest": (tree["a"]["x"].shape, tree["a"]["x"], None, [1.5]),
        }

    arguments = ({"a": {"x": x}, "y": [y]}, 3.0)
    found = run_graph(lower(function, *arguments), *arguments)
    same(found["sum"], x + 3 * y, np.float32)
    assert found["rest"][0] == x.shape
    assert (found["rest"][1] == x).all()
    assert found["rest"][2:] == (None, [1.5])


def test_inputs_keep_their_names_and_never_clash():
    x = np.ones(2, np.float32)
    graph, _ = lower(lambda p, q, x: p["a.b"] + p["v1"] + q["a"]["b"] + q["output_0"] + x, {"a.b": x, "v1": x},
                     {"a": {"b": x}, "output_0": x}, x)  # fmt: skip
    assert [i.name for i in graph.inputs] == ["a.b", "p.v1", "q.a.b", "q.output_0", "x"]
    graph.to_onnx()


def test_an_array_from_outside_is_taken_as_it_was():
    x, c = np.ones(2, np.float32), np.arange(2, dtype=np.float32)
    lowered = lower(lambda x: x + c, x)
    c[0] = 100
    assert run_graph(lowered, x).tolist() == [1, 2]
