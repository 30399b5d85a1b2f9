"""Frozen arrays, and the keys under which `compile` caches its graphs."""

import functools
import mmap
import types
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
from ml_dtypes import bfloat16
from threads import run_threads

from tinyprompt import lowering, ops, predict, tuning
from tinyprompt.check import ledger
from tinyprompt.device import compile, default_device
from tinyprompt.files import models
from tinyprompt.lowering import LoweringError, graph_key, is_frozen, is_sealed, lower, state_of
from tinyprompt.model import Prompt
from tinyprompt.settings import Settings
from tinyprompt.tree import freeze

needs_ort = pytest.mark.skipif(default_device() == "numpy", reason="needs ONNX Runtime: pip install '.[ort]'")


def product(x, weights):
    return ops.linear(x, weights["encoder.w"])


def thaw_and_change(array, change):
    array.flags.writeable = True
    change(array)
    array.flags.writeable = False


@needs_ort
@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize(
    "change", [lambda w: np.multiply(w, 2, out=w), lambda w: w.__setitem__(slice(None), w[::-1].copy())]
)
def test_a_changed_weight_is_quantised_again(writes, change):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=(6, 8)).astype(np.float32)
    w.flags.writeable = False
    run = compile(functools.partial(product), "cpu-int8", writes=writes)
    for _ in range(2):
        found = run(x, {"encoder.w": w})
        assert np.abs(found - x @ w.T).max() < 0.1 * np.abs(x @ w.T).max()
        thaw_and_change(w, change)


@needs_ort
def test_a_sealed_weight_is_converted_once(monkeypatch):
    made = []
    monkeypatch.setattr("tinyprompt.device.values.to_value", lambda x, device: made.append(x))
    from tinyprompt.device import derived

    w = freeze(np.ones((2, 3), np.float32))
    once = lambda array: (array,)
    assert derived(w, once, "cpu") is derived(w, once, "cpu")
    assert len(made) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16, np.int64])
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 3)])
def test_a_sealed_array_cannot_be_made_writable(dtype, shape):
    x = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    y = freeze(x)
    assert np.shares_memory(x, y) or not x.size
    assert y.dtype == x.dtype
    assert (x == y).all()
    assert is_sealed(y)
    assert is_sealed(y[...])
    assert state_of(y) is None
    with pytest.raises(ValueError, match="WRITEABLE"):
        y.flags.writeable = True
    x.flags.writeable = False
    assert is_frozen(x)
    assert not is_sealed(x)
    assert isinstance(state_of(x), int)


def test_read_only_maps_of_a_file_are_sealed(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(16))
    assert is_sealed(np.memmap(path, np.float32, "r"))
    assert not is_sealed(np.memmap(path, np.float32, "c"))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        x = np.frombuffer(mapped, np.float32)
        assert is_sealed(x)
        del x
    x = np.frombuffer(bytearray(16), np.float32)
    x.flags.writeable = False
    assert not is_sealed(x)


class Pair(NamedTuple):
    a: object
    b: object


@dataclass(frozen=True)
class Setting:
    value: object


class Equal:
    """All objects of this class are equal, but their texts differ."""

    def __init__(self, text):
        self.text = text

    def __eq__(self, other):
        return isinstance(other, Equal)

    def __hash__(self):
        return 0

    def __repr__(self):
        return self.text


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (0.0, -0.0),
        (1, True),
        (1, 1.0),
        (1.0, Fraction(1)),
        (0j, -0j),
        (Pair(1, 2), Pair(True, 2)),
        (Pair(1, 2), (1, 2)),
        (Setting(0.0), Setting(-0.0)),
        (Setting(1), Setting(True)),
        (frozenset([1]), frozenset([True])),
        ({1: 0}, {True: 0}),
        ([1], (1,)),
        (Equal("a"), Equal("b")),
        (range(0), range(1, 1)),
        (np.zeros(3), np.zeros(3, np.float32)),
    ],
)
def test_equal_arguments_of_different_types_have_two_graphs(left, right):
    for wrapped in (lambda x: x, lambda x: (x,), lambda x: {"a": [x]}):
        assert graph_key(wrapped(left)) != graph_key(wrapped(right))
        assert graph_key(wrapped(left)) == graph_key(wrapped(left))
    hash(graph_key(left))


def test_nan_has_one_graph():
    assert graph_key(float("nan")) == graph_key(-float("nan"))


@needs_ort
def test_the_sign_of_zero_is_kept():
    run = compile(lambda x, c: np.sign(c) if isinstance(c, np.ndarray) else 1 / (x * c), "cpu")
    with np.errstate(divide="ignore"):
        assert run(np.ones(2), 0.0).tolist() == [np.inf, np.inf]
        assert run(np.ones(2), -0.0).tolist() == [-np.inf, -np.inf]


@needs_ort
@pytest.mark.parametrize(
    "kind", [np.matrix, np.ma.masked_array, lambda x: x.view(np.recarray), lambda x: x.astype("O")]
)
def test_subclasses_of_arrays_are_refused_as_arguments(kind):
    x = np.ones((2, 2))
    run = compile(lambda x: x * x, "cpu")
    run(x)
    for call in (run, lambda x: lower(lambda x: x * x, x)):
        with pytest.raises(LoweringError, match=r"matrix|MaskedArray|recarray|Python objects"):
            call(kind(x))


def test_a_memory_mapped_array_is_accepted(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(16))
    graph, _ = lower(lambda x: x + 1, np.memmap(path, np.float32, "r"))
    assert graph.inputs[0].shape == (4,)


def test_frozen_parameters_can_be_named():
    x, w = np.ones((3, 4), np.float32), np.ones((5, 4), np.float32)
    for frozen, names in ((("weights",), {"encoder.w"}), ((), set())):
        graph, _ = lower(product, x, {"encoder.w": w}, int8="encoder.", frozen=frozen)
        assert graph.frozen == names
        assert bool(graph.derived) == bool(names)


@needs_ort
def test_a_session_that_another_thread_closes_is_still_used(monkeypatch):
    """Simulate a thread that, at the worst moment, uses more shapes than the cache has sessions."""
    w, busy = freeze(np.ones((4, 8), np.float32)), []

    class Interrupted:
        def __enter__(self):
            pass

        def __exit__(self, *_):
            if not busy:
                busy.append(True)
                for n in range(2, 9):
                    run(np.ones((n, 8), np.float32), {"encoder.w": w})

    monkeypatch.setattr("tinyprompt.device.sessions.threading", types.SimpleNamespace(Lock=Interrupted))
    run = compile(functools.partial(product), "cpu-int8", writes=True)
    try:
        found = run(np.ones((1, 8), np.float32), {"encoder.w": w})
    except KeyError:
        pytest.fail("DID NOT keep the session of the call")
    assert np.allclose(found, 8, rtol=0.02)
    assert busy


@needs_ort
def test_threads_do_not_lose_a_session():
    w = freeze(np.ones((4, 8), np.float32))
    run, faults = compile(functools.partial(product), "cpu-int8", writes=True), []
    arrays = [np.ones((n, 8), np.float32) for n in range(1, 8)]  # more shapes than the cache has sessions
    for x in arrays:
        run(x, {"encoder.w": w})

    def work(k):
        try:
            for n in range(12):
                x = arrays[(k + n) % len(arrays)]
                assert np.allclose(run(x, {"encoder.w": w}), 8, rtol=0.02)
        except Exception as fault:
            faults.append(fault)

    run_threads(work)
    assert not faults


@needs_ort
def test_only_arrays_of_the_named_parameter_are_frozen():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=(6, 8)).astype(np.float32)
    named = compile(product, "cpu-int8", frozen="weights")
    for _ in range(2):  # a writable array is quantised again after a change
        found = named(x, {"encoder.w": w})
        assert 0 < np.abs(found - x @ w.T).max() < 0.1 * np.abs(x @ w.T).max()
        w *= -2
    unnamed = compile(product, "cpu-int8", frozen=("x",))(x, {"encoder.w": freeze(w)})
    assert np.allclose(unnamed, x @ w.T, rtol=1e-5, atol=1e-5)


@needs_ort
def test_a_named_frozen_parameter_ignores_the_writeable_flag(monkeypatch):
    made, lower = [], lowering.lower
    monkeypatch.setattr(lowering, "lower", lambda *a, **o: made.append(o) or lower(*a, **o))
    run = compile(functools.partial(product), "cpu-int8", frozen="weights")
    x, w = np.ones((3, 8), np.float32), np.ones((6, 8), np.float32)
    for array in (w, freeze(w), w):
        run(x, {"encoder.w": array})
    assert len(made) == 1


@pytest.mark.parametrize("frozen", ["weight", ("x", "weight")])
def test_an_unknown_frozen_parameter_is_refused(frozen):
    with pytest.raises(LoweringError, match="frozen: product has the parameters x, weights, not weight"):
        lower(product, np.ones((3, 8)), {"encoder.w": np.ones((6, 8))}, frozen=frozen)


@needs_ort
def test_our_calls_name_their_frozen_parameters(monkeypatch):
    calls, lower = [], lowering.lower
    note = lambda f, o: calls.append((f.__name__.partition("_wrt_")[0], o["frozen"]))
    monkeypatch.setattr(lowering, "lower", lambda f, *a, **o: note(f, o) or lower(f, *a, **o))
    compile.cache_clear()
    model = models.load("tiny")
    labels, free = Prompt(label_words=("bad", "good")), Prompt(settings={"max_new_tokens": 2})
    settings = Settings(steps=1, prompt_length=2, eval_every=1)
    rows = [(f"text {i}", f"the answer {i}") for i in range(40)]
    tuning.tune(model, rows, settings=settings, device="cpu")
    predict(model, labels, "a", "cpu")
    predict(model, free, "a", "cpu")
    tuning.gradient(model, labels, [("a", "good")], "cpu")
    ledger.run(model, model.params, [ledger.draw(model)], "cpu")
    compile.cache_clear()
    names = "value_and_grad_of_loss", "loss", "ranked", "encode", "first_cache", "decode_next", "logits"
    assert set(calls) == {(name, "params") for name in names}


@pytest.mark.parametrize("frozen", ["argument_0", "argument_2"])
def test_a_variadic_parameter_is_named_by_its_position(frozen):
    x = np.ones((2, 2))
    run = lambda *arrays: arrays[0] @ arrays[1]
    if frozen == "argument_0":
        assert lower(run, x, x, frozen=frozen)[0].frozen == {frozen}
        return
    with pytest.raises(LoweringError, match="has the parameters argument_0, argument_1, not argument_2"):
        lower(run, x, x, frozen=frozen)
