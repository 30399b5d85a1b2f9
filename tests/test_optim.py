"""Optimisers against torch, transformers and a direct implementation of t5x; learning rates."""

import copy

import numpy as np
import pytest
from reference import torch, transformers

from tinyprompt import optim

SHAPES = [(7,), (5, 3), (3, 5), (1, 4), (130, 6), (129, 131), (2, 3, 4)]
RATE = 0.3


def gradients(shape, steps, seed=0):
    """Return gradients whose size changes a lot from step to step, as in training."""
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 10.0 ** rng.integers(-4, 3), shape) for _ in range(steps)]


def start(shape):
    return np.random.default_rng(9).normal(size=shape)


def run(optimizer, p, many, rate=RATE):
    """Return the parameters after every step."""
    delta, out = {"p": p}, []
    state = optimizer.init(delta)
    for g in many:
        delta, state = optimizer.update(delta, {"p": g}, state, rate)
        out.append(delta["p"])
    return out


def run_torch(build, p, many):
    tensor, out = torch.nn.Parameter(torch.from_numpy(p.copy())), []
    optimizer = build([tensor])
    for g in many:
        tensor.grad = torch.from_numpy(g)
        optimizer.step()
        out.append(tensor.detach().numpy().copy())
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_adam_equals_torch(shape):
    many = gradients(shape, 8)
    theirs = run_torch(lambda ps: torch.optim.Adam(ps, lr=RATE), start(shape), many)
    assert np.allclose(run(optim.adam(), start(shape), many), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 1e-5, 0.1])
@pytest.mark.parametrize("scale", [False, True])
def test_adafactor_equals_transformers(shape, decay, scale):
    many = gradients(shape, 8)
    fixed = dict(scale_parameter=scale, relative_step=False, warmup_init=False)
    theirs = run_torch(
        lambda ps: transformers.optimization.Adafactor(ps, lr=RATE, weight_decay=decay, **fixed), start(shape), many
    )
    ours = run(optim.adafactor("huggingface", weight_decay=decay, scale_parameters=scale), start(shape), many)
    assert np.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_adafactor_clips_like_transformers(shape):
    many = gradients(shape, 8)
    fixed = dict(scale_parameter=False, relative_step=False, warmup_init=False, clip_threshold=0.4)
    theirs = run_torch(lambda ps: transformers.optimization.Adafactor(ps, lr=RATE, **fixed), start(shape), many)
    ours = run(optim.adafactor("huggingface", weight_decay=0.0, clipping_threshold=0.4), start(shape), many)
    assert np.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def t5x(p, many, decay, first_step):
    """Run Adafactor as t5x does for a prompt: no momentum, no scaling by the parameter."""
    v, out = np.zeros_like(p), []
    row, column = np.zeros(p.shape[:1]), np.zeros(p.shape[-1:])
    for t, g in enumerate(many, first_step + 1):
        keep = 1 - t**-0.8
        square = g**2 + 1e-30
        if p.ndim == 2 and min(p.shape) >= 128:
            row = keep * row + (1 - keep) * square.mean(1)
            column = keep * column + (1 - keep) * square.mean(0)
            v = np.outer(row, column) / row.mean()
        else:
            v = keep * v + (1 - keep) * square
        u = g / np.sqrt(v)
        u /= max(1, np.sqrt((u**2).mean()))
        p = (1 - decay) * p - RATE * u
        out.append(p)
    return out


@pytest.mark.parametrize("shape", [*SHAPES, (127, 300), (128, 130)])
@pytest.mark.parametrize("first_step", [0, 1000, 1_100_000])
@pytest.mark.parametrize("decay", [1e-5, 0.1])
def test_adafactor_equals_t5x(shape, first_step, decay):
    many = gradients(shape, 6)
    ours = run(optim.adafactor("t5x", weight_decay=decay, first_step=first_step), start(shape), many)
    assert np.allclose(ours, t5x(start(shape), many, decay, first_step), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("mode", "shape", "keys"),
    [
        ("t5x", (127, 768), {"v"}),
        ("t5x", (128, 768), {"row", "column"}),
        ("t5x", (768,), {"v"}),
        ("huggingface", (2, 3), {"row", "column"}),
        ("huggingface", (768,), {"v"}),
    ],
)
def test_second_moments_are_factored_for_large_matrices(mode, shape, keys):
    assert set(optim.adafactor(mode).init({"p": np.zeros(shape)})["p"]) == keys | {"step"}


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_size_of_the_first_step_is_the_learning_rate(name, scale):
    signs = np.where(np.arange(20).reshape(4, 5) % 3 == 0, -1, 1)
    (p,) = run(optim.OPTIMIZERS[name](), np.zeros((4, 5)), [scale * signs])
    rate = RATE * 1e-3 if name == "adafactor-scaled" else RATE  # the parameters are zero
    assert np.allclose(p, -rate * signs, rtol=0.02)  # adam's eps is 1 % of a gradient of 1e-6


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_float32_stays_and_arguments_do_not_change(name):
    optimizer = optim.OPTIMIZERS[name]()
    delta = {"a": np.ones((3, 4), np.float32), "b": np.ones(5, np.float32)}
    grads = {k: np.full_like(v, 0.5) for k, v in delta.items()}
    state = optimizer.init(delta)
    for _ in range(3):
        before = copy.deepcopy((delta, grads, state))
        new = optimizer.update(delta, grads, state, RATE)
        again = optimizer.update(delta, {k: g.astype(float) for k, g in grads.items()}, state, RATE)
        np.testing.assert_equal((delta, grads, state), before)
        np.testing.assert_equal(again, new)
        delta, state = new
        assert {v.dtype for v in delta.values()} == {np.dtype(np.float32)}
        assert {v.dtype for s in state.values() for k, v in s.items() if k != "step"} == {np.dtype(np.float32)}


@pytest.mark.parametrize("shape", [(20, 64), (150, 200)])
def test_updates_of_a_fresh_state_late_in_a_run_are_clipped(shape):
    optimizer = optim.adafactor("t5x", weight_decay=0.0, first_step=1_100_000)
    rng = np.random.default_rng(1)
    places = [start(shape), *run(optimizer, start(shape), [rng.normal(0, 0.01, shape) for _ in range(100)])]
    assert np.allclose(np.sqrt(np.mean(np.diff(places, axis=0) ** 2, axis=(1, 2))), RATE)


def test_settings_of_the_named_optimisers():
    p, many = start((5, 3)), gradients((5, 3), 4)
    named = lambda name: run(optim.OPTIMIZERS[name](), p, many)
    assert np.allclose(named("adafactor-t5x"), t5x(p, many, 1e-5, 0), rtol=1e-12)
    assert np.allclose(named("adafactor-huggingface"), run(optim.adafactor("huggingface", 1e-5), p, many), rtol=1e-12)
    assert (np.array(named("adam")) == run(optim.adam(), p, many)).all()
    for name, size in (("adafactor-scaled", np.sqrt(np.mean(p * p))), ("adafactor-t5x", 1.0)):
        moved = run(optim.OPTIMIZERS[name](), p, [np.ones((5, 3))])[0] - p  # equal sizes: the step is the sign
        assert np.allclose(moved, -RATE * size - (1e-5 * p if name == "adafactor-t5x" else 0), rtol=1e-12)


def test_values_of_the_schedules():
    constant, linear = optim.schedule("constant", 2.0, 10), optim.schedule("linear", 2.0, 10)
    assert [constant(s) for s in (0, 5, 9, 99)] == [2.0] * 4
    assert np.allclose([linear(s) for s in range(10)], 2 - 0.2 * np.arange(10))
    assert linear(10) == linear(11) == 0
    warm = optim.schedule("constant", 2.0, 10, warmup=4)
    assert [warm(s) for s in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    both = optim.schedule("linear", 2.0, 12, warmup=4)
    assert np.allclose([both(s) for s in (0, 1, 2, 3, 4, 8, 11, 12)], [0.5, 1, 1.5, 2, 2, 1, 0.25, 0])
    assert max(map(both, range(12))) == 2.0


@pytest.mark.parametrize("warmup", [12, 20])
def test_a_warmup_as_long_as_the_run_only_rises(warmup):
    rates = list(map(optim.schedule("linear", 1.0, 12, warmup), range(12)))
    assert rates[:11] == sorted(rates[:11])
    assert np.allclose(rates, np.arange(1, 13) / warmup)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'adamw'.*'t5x' or 'huggingface'"):
        optim.adafactor("adamw")
    with pytest.raises(ValueError, match=r"'cosine'.*constant, linear"):
        optim.schedule("cosine", 0.3, 10)
