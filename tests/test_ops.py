"""Every primitive: its value and VJP equal torch's in float64, and it keeps the dtype."""

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import vector_jacobian_product
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from profiles import examples
from reference import torch

from tinyprompt import ops
from tinyprompt.check.ledger import distance

F = torch.nn.functional
TIMES, UNIT = 1.5, 2.0**-23  # a float32 error may be 1.5 times torch's, plus half a unit

# name: (ours, theirs, shapes of the differentiable arguments for dims (a, b, c))
CASES = {
    "linear": (ops.linear, lambda x, w: x @ w.T, lambda a, b, c: [(a, b, c), (b + 1, c)]),
    "headwise": (ops.headwise, lambda x, w: x @ w, lambda a, b, c: [(a, b, c), (a, c, b + 1)]),
    "rms_norm": (
        lambda x, w: ops.rms_norm(x, w, 1e-6),
        lambda x, w: w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda a, b, c: [(a, b, c), (c,)],
    ),
    "softmax": (ops.softmax, lambda x: x.softmax(-1), lambda a, b, c: [(a, b, c)]),
    "log_softmax": (ops.log_softmax, lambda x: x.log_softmax(-1), lambda a, b, c: [(a, b, c)]),
    "relu": (ops.relu, torch.relu, lambda a, b, c: [(a, b, c)]),
    "logistic": (ops.logistic, torch.sigmoid, lambda a, b, c: [(a, b, c)]),
    "gelu": (ops.gelu, lambda x: F.gelu(x, approximate="tanh"), lambda a, b, c: [(a, b, c)]),
    "geglu": (ops.geglu, lambda x, y: F.gelu(x, approximate="tanh") * y, lambda a, b, c: [(a, b, c), (a, b, c)]),
    "broadcast_to": (
        lambda x: ops.broadcast_to(x, (4, 3, x.shape[1], 2, x.shape[3])),
        lambda x: x.expand(4, 3, x.shape[1], 2, x.shape[3]),
        lambda a, b, c: [(1, b, 1, c)],
    ),
}


@pytest.mark.parametrize("name", CASES)
@examples(20)
@given(dims=st.tuples(*[st.integers(1, 5)] * 3), seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_value_and_vjp_equal_torch(name, dims, seed, scale):
    ours, theirs, shapes = CASES[name]
    rng = np.random.default_rng(seed)
    arguments = [rng.normal(0, scale, shape) * (rng.random(shape) > 0.1) for shape in shapes(*dims)]  # with some zeros
    tensors = [torch.from_numpy(x).requires_grad_() for x in arguments]
    wanted = theirs(*tensors)
    g = rng.normal(size=wanted.shape)
    wanted.backward(torch.from_numpy(g))
    value = ours(*arguments)
    assert np.allclose(value, wanted.detach().numpy(), rtol=1e-12, atol=1e-12)
    for i, tensor in enumerate(tensors):
        vjp = vector_jacobian_product(ours, i)(*arguments, g)
        assert np.allclose(vjp, tensor.grad.numpy(), rtol=1e-10, atol=1e-10 * scale)
        single = [x.astype(np.float32) for x in arguments]
        assert ours(*single).dtype == np.float32
        assert vector_jacobian_product(ours, i)(*single, g.astype(np.float32)).dtype == np.float32


@pytest.mark.parametrize("name", CASES)
@examples(5)
@given(dims=st.tuples(st.integers(2, 4), st.integers(20, 40), st.integers(30, 50)), seed=st.integers(0, 99))
def test_float32_is_as_accurate_as_torch(name, dims, seed):
    ours, theirs, shapes = CASES[name]
    rng = np.random.default_rng(seed)
    arguments = [rng.normal(0, 1, shape).astype(np.float32) for shape in shapes(*dims)]
    exact = [x.astype(np.float64) for x in arguments]
    tensors = [torch.from_numpy(x).requires_grad_() for x in arguments]
    value = theirs(*tensors)
    g = rng.normal(size=value.shape).astype(np.float32)
    value.backward(torch.from_numpy(g))
    pairs = [(ours(*arguments), value.detach(), ours(*exact))]
    for i, tensor in enumerate(tensors):
        vjp = vector_jacobian_product(ours, i)
        pairs.append((vjp(*arguments, g), tensor.grad, vjp(*exact, g.astype(np.float64))))
    for mine, other, wanted in pairs:
        assert distance(mine, wanted) <= TIMES * distance(other.numpy(), wanted) + UNIT / 2


@examples(20)
@given(rows=st.integers(1, 4), words=st.integers(1, 6), seed=st.integers(0, 99))
def test_embedding_adds_the_gradients_of_repeated_ids(rows, words, seed):
    rng = np.random.default_rng(seed)
    table, ids = rng.normal(size=(5, 3)), rng.integers(0, 5, (rows, words))
    g = rng.normal(size=(rows, words, 3))
    tensor = torch.from_numpy(table).requires_grad_()
    F.embedding(torch.from_numpy(ids), tensor).backward(torch.from_numpy(g))
    assert (ops.embedding(table, ids) == table[ids]).all()
    assert np.allclose(vector_jacobian_product(ops.embedding, 0)(table, ids, g), tensor.grad.numpy())
    single = vector_jacobian_product(ops.embedding, 0)(table.astype(np.float32), ids, g.astype(np.float32))
    assert single.dtype == np.float32


WEIGHTED = {
    "linear": (ops.linear, (2, 3, 5), (4, 5)),
    "headwise": (ops.headwise, (2, 3, 5), (2, 5, 4)),
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-6), (2, 3, 5), (5,)),
}


@pytest.mark.parametrize("dtype", [np.float16, bfloat16], ids=str)
@pytest.mark.parametrize("name", WEIGHTED)
@examples(5)
@given(seed=st.integers(0, 99))
def test_16_bit_weights_equal_widened_weights(name, dtype, seed):
    function, *shapes = WEIGHTED[name]
    rng = np.random.default_rng(seed)
    x, weight = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    narrow = weight.astype(dtype)
    value = function(x, narrow)
    g = rng.normal(size=value.shape).astype(np.float32)
    vjp = vector_jacobian_product(function, 0)
    assert (value == function(x, narrow.astype(np.float32))).all()
    assert (vjp(x, narrow, g) == vjp(x, narrow.astype(np.float32), g)).all()


@examples(30)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 9)),
    seed=st.integers(0, 99),
    z_loss=st.sampled_from([0.0, 1e-4, 0.3]),
    scale=st.sampled_from([1.0, 200.0]),
)
def test_cross_entropy_with_z_loss_equals_torch(shape, seed, z_loss, scale):
    rng = np.random.default_rng(seed)
    logits, targets = rng.normal(0, scale, shape), rng.integers(0, shape[-1], shape[:-1])
    weights, g = rng.integers(0, 5, shape[:-1]) / 4, rng.normal()
    weights.flat[0] = 1
    tensor, w = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(weights)
    nll = F.cross_entropy(tensor.flatten(0, 1), torch.from_numpy(targets).flatten(), reduction="none")
    log_z = torch.logsumexp(tensor, -1).flatten()
    wanted = ((nll + z_loss * log_z**2) * w.flatten()).sum() / w.sum()
    wanted.backward(torch.tensor(g, dtype=torch.float64))
    value = ops.cross_entropy(logits, targets, weights, z_loss)
    gradient = vector_jacobian_product(ops.cross_entropy, 0)(logits, targets, weights, z_loss, np.array(g))
    assert np.allclose(value, wanted.item(), rtol=1e-12)
    assert np.allclose(gradient, tensor.grad.numpy(), rtol=1e-10, atol=1e-12 * scale)
    single = vector_jacobian_product(ops.cross_entropy, 0)(
        logits.astype(np.float32), targets, weights.astype(np.float32), z_loss, np.ones((), np.float32)
    )
    assert single.dtype == np.float32


@pytest.mark.parametrize("scale", [1000, 1e30])
def test_large_values_do_not_overflow(scale):
    x = np.array([[0.0, 1.0, -1.0]], np.float32) * np.float32(scale)
    assert (ops.softmax(x) == [[0, 1, 0]]).all()
    assert (ops.log_softmax(x) == x - x.max()).all()
    assert ops.cross_entropy(x, np.array([1]), np.ones(1, np.float32), 0.0) == 0


def test_softmax_of_masked_scores_is_exactly_zero():
    scores = np.array([[0.0, -1e9, 3.0]], np.float32)
    assert ops.softmax(scores)[0, 1] == 0


@pytest.mark.parametrize("build", [lambda x: x * 2 + 1, lambda x: anp.concatenate([x, x]), lambda x: x @ x.T])
def test_gradients_borrowed_from_autograd_keep_float32(build):
    x = np.ones((2, 3), np.float32)
    out = build(x)
    assert vector_jacobian_product(build)(x, np.ones_like(out)).dtype == np.float32
