"""The gradient of every NumPy function in docs/devices.md, with `numpy` and `autograd.numpy`, is right or refused."""

import subprocess
import sys
from pathlib import Path

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import grad, jacobian, value_and_grad
from autograd.extend import VJPNode, notrace_primitive, primitive, register_notrace
from gradient_table import CASES, Trial, listed, table, trials
from threads import run_threads

pytest.importorskip("onnxruntime", reason="lowering needs onnx and onnxruntime: pip install '.[ort]'")

from tinyprompt.device import compile
from tinyprompt.lowering import LoweringError, lower

W = np.array([[0.62, 1.41, 0.87], [1.73, 0.56, 1.18]])
X = np.array([[1.07, 0.78, 1.32], [0.49, 1.63, 0.91]])
REFUSED = {("full_like", 2)}  # np.full_like dispatches on its first argument, here a constant


def test_every_listed_function_has_cases():
    assert sorted(CASES) == sorted(listed())


@pytest.mark.parametrize("name", CASES)
def test_a_listed_function_is_right_or_refused(name):
    found = list(trials(name))
    wrong = [t for t in found if t.outcome != ("refused" if (name, t.case) in REFUSED else "right")]
    assert not wrong, "\n".join(map(str, wrong[:5]))


def test_the_table_counts_outcomes():
    row = Trial("dot", 0, "numpy", "grad", "float32", False, "odd", "")
    assert "| numpy | grad | 0 | 0 | 0 | 1 |" in table([row])


def test_the_sum_of_two_terms_keeps_both():
    loss = lambda w, x: np.dot(x, w).sum() + 0.1 * (w * w).sum()
    w = np.array([1.0, 1.0, 1.0])
    assert np.allclose(compile(grad(loss), "cpu")(w, X), X.sum(0) + 0.2 * w)
    method = lambda w, x: np.sum(x.dot(w.T))
    assert np.allclose(compile(grad(method), "cpu")(W, X), grad(lambda w, x: anp.sum(anp.dot(x, w.T)))(W, X))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda w, x: np.array([w, w]).sum(), "use autograd.numpy"),
        (lambda w, x: np.asarray(w).sum(), "use autograd.numpy"),
        (lambda w, x: np.block([[w, x]]).sum(), "use autograd.numpy"),
        (lambda w, x: np.nansum([w[0, 0], w[0, 1]]), "use autograd.numpy"),
        (lambda w, x: np.sum(np.ones(2) * np.array([w[0, 0], 1.0])), "use autograd.numpy"),
        (lambda w, x: anp.block([[w, x]]).sum(), "use autograd.numpy"),
        (lambda w, x: np.cumprod(w).sum(), "numpy.cumprod"),
        (lambda w, x: anp.cumprod(w).sum(), "cumprod"),
        (lambda w, x: anp.hypot(w, x).sum() if w.sum() > 0 else 0.0, "decide an `if`"),
        (lambda w, x: w.sum() * float(x.sum()), "Python number"),
        (lambda w, x: w.sum() * float(w.sum()), "Python number"),
        (lambda w, x: w.sum() * int(w.sum()), "Python number"),
        (lambda w, x: w.sum() * len(w.sum()), "no length"),
        (lambda w, x: sum(w.sum()), "no length"),
        (lambda w, x: w.sum() * w.strides[0], "x.strides has no rule"),
        (lambda w, x: w.sort(), "x.sort has no rule"),
        (lambda w, x: f"{w.sum():.2f}", ".2f"),
        (lambda w, x: w.__setitem__(0, 1.0), "in place"),
        (lambda w, x: w.sum() * (1.0 in w), "numpy.any"),
        (lambda w, x: (w // x).sum(), "numpy.floor_divide"),
        (lambda w, x: np.add.reduce(w).sum(), "numpy.add.reduce"),
        (lambda w, x: (w + np.ma.masked_less(X, 1)).sum(), "MaskedArray"),
        (lambda w, x: (w * np.matrix(X)).sum(), "numpy.matrix"),
    ],
)
def test_a_refusal_inside_grad_names_the_line(function, words):
    with pytest.raises(LoweringError) as error:
        lower(grad(function), W, X)
    assert words in str(error.value)
    assert Path(__file__).name in str(error.value)


def test_an_array_of_python_objects_never_becomes_a_constant():
    held = np.empty(1, object)

    def function(x):
        held[0] = x[0]
        return x * held

    with pytest.raises(LoweringError, match="Python objects"):
        lower(function, np.ones(1))
    with pytest.raises(LoweringError, match="Python objects"):
        lower(lambda x: held, np.ones(1))
    with pytest.raises(LoweringError, match="Python objects"):
        lower(lambda x: x, held)


def test_boxes_around_constants_meet_traced_arrays():
    """Call `grad` with respect to a constant while another array is traced."""
    functions = [
        lambda w, x: np.sum(np.where(x > 1, w, x)),
        lambda w, x: np.sum(x * np.dot(x, w.T)[:, :1]),
        lambda w, x: anp.sum(w * x) + anp.sum(anp.tanh(w) * x),
        lambda w, x: np.concatenate([x, w])[1:3].sum(),
    ]
    for function in functions:
        found = compile(lambda x, function=function: grad(function)(W, x), "cpu")(X)
        assert np.allclose(found, compile(grad(function), "cpu")(W, X))


def test_a_later_registered_primitive_without_a_gradient_works():
    steps = primitive(lambda x: np.floor(x))
    register_notrace(VJPNode, steps)
    found = compile(grad(lambda w: np.sum(w * steps(w))), "cpu")(W)
    assert np.allclose(found, np.floor(W))
    shape = notrace_primitive(lambda x: x.shape)
    assert np.allclose(compile(grad(lambda w: np.sum(w) * shape(w)[0]), "cpu")(W), 2)
    with pytest.raises(LoweringError, match=rf"no gradient of .*{Path(__file__).name}"):
        lower(grad(lambda w: np.sum(primitive(lambda x: 2 * x)(w))), W)


@pytest.mark.parametrize(
    "function",
    [
        lambda np, w: np.sum(np.dot(w, w.T) ** 2),
        lambda np, w: np.sum(np.sin(np.take(w, np.array([0, 0, 2]), axis=1)) ** 2),
        lambda np, w: np.sum(np.prod(w, axis=1) ** 2) + np.sum(np.tile(w, 2) ** 3),
        lambda np, w: np.sum(np.sort(w, axis=1)[:, :2] ** 3) + np.linalg.norm(w, axis=1)[0] ** 3,
        lambda np, w: np.sum(np.where(w > 1, w**3, 0)) + np.sum(np.clip(w, 0.6, 1.5) ** 3),
        lambda np, w: np.sum(np.split(w, 3, axis=1)[1] ** 3) + np.sum(np.einsum("ij,ij->j", w, w) ** 2),
    ],
)
def test_second_derivatives(function):
    for module in (np, anp):
        inner = lambda w, module=module: grad(lambda w: function(module, w))(w)
        found = compile(grad(lambda w: anp.sum(anp.sin(inner(w)))), "cpu")(W)  # noqa: B023

        def exact(w):
            def slope(k, h=1e-4):
                e = np.zeros_like(w)
                e[k] = h
                return (function(np, w + e) - function(np, w - e)) / (2 * h)

            return sum(np.sin(slope(k)) for k in np.ndindex(w.shape))

        for k in np.ndindex(W.shape):
            e = np.zeros_like(W)
            e[k] = 1e-3
            assert abs((exact(W + e) - exact(W - e)) / 2e-3 - found[k]) < 2e-3 * max(1, abs(found[k]))


def test_prod_with_a_zero_has_a_gradient():
    w = np.array([[2.0, 0.0, 3.0], [0.0, 0.0, 1.0]])
    found = compile(grad(lambda w: np.prod(w, axis=1).sum()), "cpu")(w)
    assert found.tolist() == [[0, 6, 0], [0, 0, 0]]


def test_jacobian():
    found = compile(jacobian(lambda w: anp.sum(w * w, axis=1)), "cpu")(W)
    assert np.allclose(found, np.stack([[2 * W[0], 0 * W[1]], [0 * W[0], 2 * W[1]]]))


def test_cross_entropy_with_two_index_arrays():
    y = np.array([2, 0])

    def loss(np, w, y):
        lp = w - np.log(np.sum(np.exp(w), axis=1, keepdims=True))
        return -np.mean(lp[np.arange(2), y])

    wanted = value_and_grad(lambda w, y: loss(anp, w, y))(W, y)
    for module in (np, anp):
        found = compile(value_and_grad(lambda w, y, module=module: loss(module, w, y)), "cpu")(W, y)
        assert np.allclose(found[0], wanted[0])
        assert np.allclose(found[1], wanted[1])


def test_importing_and_lowering_do_not_change_autograd():
    program = """
import csv, sys
import numpy as np, autograd, autograd.numpy as anp
from autograd.core import primitive_vjps
from autograd.numpy import numpy_wrapper
from autograd.numpy.numpy_boxes import ArrayBox
before = dict(primitive_vjps), numpy_wrapper._np, dict(vars(numpy_wrapper)), dict(vars(ArrayBox)), dict(vars(np))
import tinyprompt.lowering as lowering
def same():
    after = dict(primitive_vjps), numpy_wrapper._np, dict(vars(numpy_wrapper)), dict(vars(ArrayBox)), dict(vars(np))
    own = {f for f in primitive_vjps if f not in before[0]}
    assert all("tinyprompt" in f.fun.__module__ for f in own), own
    assert all(after[0][f] is before[0][f] for f in before[0])
    assert all(a == b for a, b in zip(after[1:4], before[1:4]))
    assert all(vars(np)[name] is x for name, x in before[4].items())
same()
lowering.lower(autograd.grad(lambda w: anp.sum(anp.stack([w, w]))), np.ones(3))
same()
try:
    lowering.lower(lambda x: 1 / 0, np.ones(3))
except ZeroDivisionError:
    pass
same()
print("unchanged")
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.stdout == "unchanged\n", done.stderr


def test_threads_lower_gradients_at_the_same_time():
    product = lambda w: anp.sum(anp.dot(w, w.T) ** 2) + anp.sum(anp.stack([w, w]) ** 2)
    twice = grad(lambda w: anp.sum(anp.sin(grad(product)(w))))
    wanted, found = twice(W), []

    def work(k):
        for n in range(4):
            found.append(compile(lambda w, k=k, n=n: twice(w) + 0 * (k + n), "cpu")(W))

    run_threads(work)
    assert len(found) == 16
    assert all(np.allclose(x, wanted) for x in found)
