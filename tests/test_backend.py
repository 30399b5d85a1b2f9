"""A compiled function is the same function: on every family, with padding, whatever the device."""

import gc
import importlib.metadata

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import value_and_grad
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import FAMILIES, batch, random_weights, raw_config

from tinyprompt import backend, t5, train
from tinyprompt.backend import DeviceError
from tinyprompt.data import Batch
from tinyprompt.tree import flatten, nest

ort = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install '.[ort]'")
PROMPT = "encoder.prompt.embedding"


def problem(family, seed, length, dtype):
    """Arguments of `train.loss` for a random model of a family."""
    config = t5.Config.from_dict(raw_config(family))
    params = nest({name: value.astype(dtype) for name, value in random_weights(config, seed).items()})
    ids, mask, labels, weights = batch(seed, config.vocab_size, 3, 7, 4)
    prompt = np.random.default_rng(seed).normal(size=(length, config.d_model)).astype(dtype)
    return {PROMPT: prompt}, params, config, Batch(ids, mask, labels, weights.astype(dtype))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 99), length=st.sampled_from([1, 5, 20]))
def test_loss_and_gradient_are_those_of_numpy(family, seed, length):
    arguments = problem(family, seed, length, np.float64)
    value, gradient = train.loss_and_gradient(*arguments)
    found, found_gradient = backend.compile(train.loss_and_gradient, "cpu")(*arguments)
    assert np.isclose(found, value, rtol=1e-12)
    assert found_gradient.keys() == gradient.keys()
    assert np.allclose(found_gradient[PROMPT], gradient[PROMPT], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 99))
def test_in_float32_it_is_as_exact_as_numpy(family, seed):
    exact = train.loss_and_gradient(*problem(family, seed, 5, np.float64))[1][PROMPT]
    single = problem(family, seed, 5, np.float32)
    errors = [
        np.abs(backend.compile(train.loss_and_gradient, device)(*single)[1][PROMPT] - exact).max()
        for device in ("cpu", "numpy")
    ]
    assert errors[0] <= 3 * errors[1] + 1e-6 * np.abs(exact).max()


def test_on_numpy_a_function_is_left_as_it_is():
    assert backend.compile(train.loss, "numpy") is train.loss


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 99), rate=st.sampled_from([0.1, 0.5]))
def test_dropout_zeroes_a_share_and_its_gradient_follows(seed, rate):
    x = np.ones((300, 20), np.float32)
    drop = t5.dropout(rate, np.random.default_rng(seed))
    run = backend.compile(value_and_grad(lambda x, drop: anp.sum(drop(x) * x)), "cpu")
    (first, gradient), (second, _) = run(x, drop), run(x, drop)
    assert first != second
    assert abs(np.mean([first, second]) / x.size - 1) < 0.1
    assert set(np.unique(gradient)) <= {np.float32(0), np.float32(2 / (1 - rate))}
    again = backend.compile(value_and_grad(lambda x, drop: anp.sum(drop(x) * x)), "cpu")
    assert again(x, t5.dropout(rate, np.random.default_rng(seed)))[0] == first


def test_the_containers_and_types_of_arguments_count():
    x = np.ones(2)
    run = backend.compile(lambda p, q: 10 * sum(p.values()) + sum(q.values()), "cpu")
    assert (run({"a": x}, {"b": x}) == 11).all()
    assert (run({"a": x, "b": x}, {}) == 20).all()
    times = backend.compile(lambda x, n: x * n, "cpu")
    assert [times(np.ones(2, int), n).dtype for n in (2, 2.0)] == [np.int64, np.float64]


def test_what_onnx_runtime_refuses_is_one_error():
    run = backend.compile(lambda x, i: np.take(x, i, axis=0), "cpu")
    with pytest.raises(DeviceError, match="ONNX Runtime"):
        run(np.ones(3, np.float32), np.array([7]))


def test_sessions_are_kept_by_shape_and_the_oldest_dropped(monkeypatch):
    opened = []
    original = backend.open_session
    monkeypatch.setattr(backend, "open_session", lambda *a: opened.append(a) or original(*a))
    monkeypatch.setattr(backend, "SESSIONS", 2)
    run = backend.compile(lambda x, n: x * n, "cpu")
    for width, n, sessions in (
        (2, 3.0, 1),
        (2, 3.0, 1),
        (5, 3.0, 2),
        (2, 3.0, 2),
        (2, 4.0, 3),
        (5, 3.0, 4),
        (5, 3.0, 4),
    ):
        assert (run(np.ones(width, np.float32), n) == n).all()
        assert len(opened) == sessions


def test_a_changed_array_is_seen():
    run = backend.compile(lambda x: x + 1, "cpu")
    x = np.ones(3, np.float32)
    assert (run(x) == 2).all()
    x += 1
    assert (run(x) == 3).all()


def test_the_cpu_reads_weights_where_they_lie():
    w = np.ones(3, np.float32)
    assert backend.on_device(w, "cpu").data_ptr() == w.ctypes.data


def test_frozen_weights_are_copied_to_the_gpu_once_and_leave_it_with_their_array(monkeypatch, tmp_path):
    np.ones(3, np.float32).tofile(tmp_path / "w")
    copied, original = [], ort.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(
        ort.OrtValue, "ortvalue_from_numpy", lambda a, *_: copied.append(a) or original(a.copy(), "cpu", 0)
    )
    monkeypatch.setattr(backend, "check", lambda device: None)
    open_session = backend.open_session
    monkeypatch.setattr(backend, "open_session", lambda graph, device: open_session(graph, "cpu"))
    run = backend.compile(lambda w, prompt: w + prompt, "cuda")
    frozen, prompt = np.memmap(tmp_path / "w", np.float32, "r"), np.ones(3, np.float32)
    for _ in range(3):
        assert (run(frozen, prompt) == 2).all()
    assert len(copied) == 4
    assert len(backend._copies) == 1
    copied.clear()
    del frozen
    gc.collect()
    assert not backend._copies


def test_no_argument_is_changed():
    arguments = problem("t5-1.1", 0, 5, np.float32)
    before = {name: value.copy() for name, value in flatten(arguments[1]).items()}
    backend.compile(train.loss_and_gradient, "cpu")(*arguments)
    assert all((value == before[name]).all() for name, value in flatten(arguments[1]).items())


def pretend(monkeypatch, *packages):
    """Let these packages be the ones that are installed."""
    monkeypatch.setattr(backend, "version", lambda package: "1.0" if package in packages else None)


@pytest.mark.parametrize(
    ("device", "packages", "message"),
    [
        ("tpu", ["onnx", "onnxruntime"], "expected one of numpy, cpu, cuda"),
        ("cpu", ["onnx"], r"onnxruntime is not installed; pip install 'tinyprompt\[ort\]'"),
        ("cpu", ["onnxruntime"], r"onnx is not installed; pip install 'tinyprompt\[ort\]'"),
        ("cuda", [], r"onnx is not installed; pip install 'tinyprompt\[gpu\]'"),
        ("cuda", ["onnx", "onnxruntime"], "onnxruntime-gpu is not installed"),
        ("cpu", ["onnx", "onnxruntime", "onnxruntime-gpu"], "uninstall both"),
        ("cuda", ["onnx", "onnxruntime", "onnxruntime-gpu"], "install onnxruntime-gpu alone"),
    ],
)
def test_a_device_that_cannot_be_used_says_what_to_do(monkeypatch, device, packages, message):
    pretend(monkeypatch, *packages)
    with pytest.raises(DeviceError, match=message):
        backend.compile(lambda x: x, device)


def test_a_gpu_that_is_not_there_is_an_error_and_not_the_cpu(monkeypatch):
    """The CPU package accepts CUDA as a provider and then computes on the CPU; we do not."""
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime knows CUDA")
    pretend(monkeypatch, "onnx", "onnxruntime-gpu")
    backend._probe_cuda.cache_clear()
    with pytest.raises(DeviceError, match="cuda"):
        backend.compile(lambda x: x, "cuda")


def test_the_device_is_named_in_one_line(monkeypatch):
    assert backend.describe("cpu") == f"device: cpu (onnxruntime {importlib.metadata.version('onnxruntime')})"
    assert backend.describe("numpy") == f"device: numpy {np.__version__}"
    pretend(monkeypatch)
    assert backend.default() == "numpy"
    assert "pip install" in backend.describe("numpy")
