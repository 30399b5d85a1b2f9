"""A compiled function equals the original for every family, with padding, on every device."""

import gc
import importlib.metadata
import json
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import value_and_grad
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from profiles import examples
from random_models import FAMILIES, batch, random_weights, raw_config

from tinyprompt import decode, lowering, ops, t5, train
from tinyprompt import device as devices
from tinyprompt.config import weight_shapes
from tinyprompt.data import Batch
from tinyprompt.device import check_device, compile, default_device, describe_device, providers, sessions, values
from tinyprompt.errors import DeviceError
from tinyprompt.files.config import parse_config
from tinyprompt.lowering import lower
from tinyprompt.lowering.primitives import largest_int8
from tinyprompt.tree import flatten, freeze, nest

ort = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install '.[ort]'")
onnx = pytest.importorskip("onnx")
SLOWER = "warning: a graph could not be recorded for the GPU and runs more slowly: CUDA failure 901"
PROMPT = "encoder.prompt.embedding"


def problem(family, seed, length, dtype):
    """Return arguments of `train.loss` for a random model of a family."""
    config = parse_config(raw_config(family))
    params = nest({name: value.astype(dtype) for name, value in random_weights(config, seed).items()})
    ids, mask, labels, weights = batch(seed, config.vocab_size, 3, 7, 4)
    prompt = np.random.default_rng(seed).normal(size=(length, config.d_model)).astype(dtype)
    return {PROMPT: prompt}, params, config, Batch(ids, mask, labels, weights.astype(dtype))


@pytest.fixture(params=["cpu", "cuda", "openvino", "openvino-bf16"])
def provider(request):
    """Yield every provider that works on this machine."""
    try:
        check_device(request.param)
    except DeviceError as error:
        pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize("family", FAMILIES)
@examples(2)
@given(seed=st.integers(0, 99), length=st.sampled_from([1, 5, 20]))
def test_loss_and_grads_equal_numpy(family, seed, length):
    arguments = problem(family, seed, length, np.float64)
    value, gradient = train.loss_and_grads(*arguments)
    found, found_gradient = compile(train.loss_and_grads, "cpu")(*arguments)
    assert np.isclose(found, value, rtol=1e-12)
    assert found_gradient.keys() == gradient.keys()
    assert np.allclose(found_gradient[PROMPT], gradient[PROMPT], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["t5-1.0", "umt5"])
def test_a_prefix_lowers_in_every_attention(family):
    delta, params, config, rows = problem(family, 3, 2, np.float64)
    rng = np.random.default_rng(3)
    attentions = "encoder.block.1.layer.0.Self", "decoder.block.0.layer.0.Self", "decoder.block.2.layer.1.EncDec"
    for at in attentions:
        delta |= {f"{at}Attention.prefix.{name}": rng.normal(size=(4, 18)) for name in ("key", "value")}
    value, gradient = train.loss_and_grads(delta, params, config, rows)
    found, found_gradient = compile(train.loss_and_grads, "cpu")(delta, params, config, rows)
    assert np.isclose(found, value, rtol=1e-12)
    assert found_gradient.keys() == gradient.keys() == delta.keys()
    for name in delta:
        assert np.allclose(found_gradient[name], gradient[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@examples(2)
@given(seed=st.integers(0, 99))
def test_float32_is_as_exact_as_numpy(family, seed):
    exact = train.loss_and_grads(*problem(family, seed, 5, np.float64))[1][PROMPT]
    single = problem(family, seed, 5, np.float32)
    errors = [
        np.abs(compile(train.loss_and_grads, device)(*single)[1][PROMPT] - exact).max() for device in ("cpu", "numpy")
    ]
    assert errors[0] <= 3 * errors[1] + 1e-6 * np.abs(exact).max()


def test_numpy_returns_the_function_itself():
    assert compile(train.loss, "numpy") is train.loss


@examples(3)
@given(seed=st.integers(0, 99), rate=st.sampled_from([0.1, 0.5]))
def test_dropout_drops_the_given_share_and_masks_the_gradient(seed, rate):
    x = np.ones((300, 20), np.float32)
    function = value_and_grad(lambda x, drop: anp.sum(drop("output", x) * x))
    run = compile(function, "cpu")
    (first, gradient), (second, _) = (run(x, t5.dropout(rate, seed, step)) for step in (1, 2))
    assert first != second
    assert abs(np.mean([first, second]) / x.size - 1) < 0.1
    assert np.array_equal(gradient, function(x, t5.dropout(rate, seed, 1))[1])  # the masks are those of NumPy
    assert set(np.unique(gradient)) <= {np.float32(0), np.float32(2 / (1 - rate))}


def test_containers_and_types_of_arguments_select_the_graph():
    x = np.ones(2)
    run = compile(lambda p, q: 10 * sum(p.values()) + sum(q.values()), "cpu")
    assert (run({"a": x}, {"b": x}) == 11).all()
    assert (run({"a": x, "b": x}, {}) == 20).all()
    times = compile(lambda x, n: x * n, "cpu")
    assert [times(np.ones(2, int), n).dtype for n in (2, 2.0)] == [np.int64, np.float64]


def test_an_error_of_onnx_runtime_becomes_a_device_error():
    run = compile(lambda x, i: np.take(x, i, axis=0), "cpu")
    with pytest.raises(DeviceError, match="ONNX Runtime"):
        run(np.ones(3, np.float32), np.array([7]))


def test_sessions_are_kept_by_shape_and_the_oldest_is_dropped(monkeypatch):
    opened = []
    original = sessions.open_session
    monkeypatch.setattr(sessions, "open_session", lambda *a: opened.append(a) or original(*a))
    monkeypatch.setattr(sessions, "SESSIONS", 2)
    run = compile(lambda x, n: x * n, "cpu")
    for width, n, count in ((2, 3.0, 1), (2, 3.0, 1), (5, 3.0, 2), (2, 3.0, 2), (2, 4.0, 3), (5, 3.0, 4), (5, 3.0, 4)):
        assert (run(np.ones(width, np.float32), n) == n).all()
        assert len(opened) == count


def test_a_changed_array_is_read_again():
    run = compile(lambda x: x + 1, "cpu")
    x = np.ones(3, np.float32)
    assert (run(x) == 2).all()
    x += 1
    assert (run(x) == 3).all()


def test_the_cpu_reads_weights_without_a_copy():
    w = np.ones(3, np.float32)
    assert devices.on_device(w, "cpu").data_ptr() == w.ctypes.data


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that the CPU is a GPU; return the copied arrays and the opened sessions as (graph, capture)."""
    copied, opened, open_session = [], [], sessions.open_session
    monkeypatch.setattr(sessions, "check_device", lambda device: "cuda")
    place, value = ort.OrtValue.ortvalue_from_shape_and_type, ort.OrtValue.ortvalue_from_numpy
    first = {("cuda", 0): ("cpu", 0), ("cpu", 0): ("cpu", 0)}  # there is only one GPU
    monkeypatch.setattr(
        ort.OrtValue, "ortvalue_from_shape_and_type", lambda shape, kind, *on: place(shape, kind, *first[on])
    )
    monkeypatch.setattr(
        ort.OrtValue, "ortvalue_from_numpy", lambda a, *on: copied.append(a) or value(a.copy(), *first[on])
    )  # a run copies arrays from the CPU
    monkeypatch.setattr(sessions, "fill", lambda value, a, f=sessions.fill: copied.append(a) or f(value, a))

    def session(graph, device, capture=False):
        opened.append((graph, capture))
        return open_session(graph, "cpu")

    for module in (sessions, providers):
        monkeypatch.setattr(module, "open_session", session)
    return copied, opened


def test_frozen_weights_are_copied_to_the_gpu_once_and_freed_with_their_array(gpu, tmp_path):
    copied, opened = gpu
    np.ones(3, np.float32).tofile(tmp_path / "w")
    gc.collect()
    before = len(values._made)
    run = compile(lambda w, prompt: w + prompt, "cuda")
    frozen, prompt = np.memmap(tmp_path / "w", np.float32, "r"), np.ones(3, np.float32)
    for _ in range(3):
        assert (run(frozen, prompt) == 2).all()
    assert len(copied) == 4  # the weight, and the prompt three times
    assert len(values._made) == before + 1
    assert [capture for _, capture in opened] == [True]
    copied.clear()
    del frozen
    gc.collect()
    assert len(values._made) == before


def test_a_recorded_run_reads_its_current_inputs(gpu):
    """Pass other inputs, weights of another model with the same shapes, and the first weights again."""
    copied, opened = gpu
    run = compile(lambda tree, x, scale, cache: (tree["w"] @ x * scale + cache.sum(), x + 1), "cuda")
    rng = np.random.default_rng(0)
    models = [{"w": freeze(rng.normal(size=(2, 3)).astype(np.float32))} for _ in range(2)]
    caches = [freeze(rng.normal(size=(2, 1, 3)).astype(np.float32)) for _ in range(2)]
    for i, j in ((0, 0), (0, 0), (1, 0), (0, 1), (1, 1)):
        x, scale = rng.normal(size=3).astype(np.float32), np.float32(rng.normal())
        found, more = run(models[i], x, scale, caches[j])
        assert np.allclose(found, models[i]["w"] @ x * scale + caches[j].sum(), rtol=1e-5)
        assert (more == x + 1).all()
    assert len(opened) == 1
    # A weight is copied once; x and scale at each run; the cache, which has more than two axes, whenever it changes.
    assert sum(a.shape == (2, 3) for a in copied) == 2
    assert sum(a.shape == (3,) for a in copied) == sum(a.shape == () for a in copied) == 5
    assert sum(a.shape == (2, 1, 3) for a in copied) == 4
    # A read-only array may be made writable and changed.
    tree, cache = {"w": np.ones((2, 3), np.float32)}, np.ones((2, 1, 3), np.float32)
    x, scale = np.ones(3, np.float32), np.float32(1)
    for value in (3 * 1 + 6, 6 * 1 + 12, 12 + 24):
        for array in (tree["w"], cache):
            array.flags.writeable = False
        assert run(tree, x, scale, cache)[0].tolist() == [value] * 2
        for array in (tree["w"], cache):
            array.flags.writeable = True
            array *= 2


def test_a_graph_is_warmed_up_then_recorded_then_only_launched(gpu, monkeypatch):
    runs, original = [], ort.InferenceSession.run_with_iobinding
    monkeypatch.setattr(
        ort.InferenceSession, "run_with_iobinding", lambda self, *a: runs.append(a) or original(self, *a)
    )
    run, x = compile(lambda x: x + 1, "cuda"), np.ones(3, np.float32)
    for launched in (1, 2, 3):
        run(x)
        assert len(runs) == sessions.WARM_UP + launched


def test_a_graph_that_cannot_be_recorded_runs_directly(gpu, monkeypatch, caplog):
    """For example, CUDA refuses to record if a library allocates memory."""
    _, opened = gpu

    def fails(self, arrays):
        raise RuntimeError("CUDA failure 901")

    monkeypatch.setattr(sessions.Captured, "launch", fails)
    run = compile(lambda x, i: np.take(x, i, axis=0) + 1, "cuda")
    for x in np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32):
        assert (run(x, np.array([1])) == x[1:] + 1).all()
    assert [capture for _, capture in opened] == [True, False]
    assert [record.getMessage() for record in caplog.records] == [SLOWER]
    with pytest.raises(DeviceError, match="ONNX Runtime"):
        run(x, np.array([7]))


def test_random_functions_and_empty_inputs_are_not_recorded(gpu):
    _, opened = gpu
    x, key = np.ones((2, 3), np.float32), np.array([0])
    compile(lambda x, key: ops.keep(x, 0.5, key, "output"), "cuda")(x, key)
    assert compile(lambda x, y: np.concatenate([x, y]), "cuda")(x, x[:0]).shape == (2, 3)
    compile(lambda x: x + 1, "cuda")(x)
    assert [capture for _, capture in opened] == [False, False, True]


def test_arguments_are_not_changed():
    arguments = problem("t5-1.1", 0, 5, np.float32)
    before = {name: value.copy() for name, value in flatten(arguments[1]).items()}
    compile(train.loss_and_grads, "cpu")(*arguments)
    assert all((value == before[name]).all() for name, value in flatten(arguments[1]).items())


def pretend_installed(monkeypatch, *packages):
    """Pretend that only these packages are installed."""
    monkeypatch.setattr(providers, "version", lambda package: "1.0" if package in packages else None)


@pytest.mark.parametrize(
    ("device", "packages", "message"),
    [
        ("tpu", ["onnx", "onnxruntime"], "expected one of numpy, cpu, cpu-int8, cuda, cuda-bf16, openvino"),
        ("cpu", ["onnx"], r"onnxruntime is not installed; pip install 'tinyprompt-t5\[ort\]'"),
        ("cpu", ["onnxruntime"], r"onnx is not installed; pip install 'tinyprompt-t5\[ort\]'"),
        ("cuda", [], r"onnx is not installed; pip install 'tinyprompt-t5\[gpu\]'"),
        ("cuda", ["onnx", "onnxruntime"], "onnxruntime-gpu is not installed"),
        ("openvino", ["onnx", "onnxruntime"], r"onnxruntime-ep-openvino is not installed; .*t5\[openvino\]"),
        ("cpu", ["onnx", "onnxruntime", "onnxruntime-gpu"], "uninstall both"),
        ("cuda", ["onnx", "onnxruntime", "onnxruntime-gpu"], "install only onnxruntime-gpu"),
    ],
)
def test_an_unusable_device_explains_what_to_do(monkeypatch, device, packages, message):
    pretend_installed(monkeypatch, *packages)
    with pytest.raises(DeviceError, match=message):
        compile(lambda x: x, device)


def test_a_missing_gpu_is_refused(monkeypatch):
    """onnxruntime for the CPU accepts CUDA as a provider and then computes on the CPU; we refuse."""
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime knows CUDA")
    pretend_installed(monkeypatch, "onnx", "onnxruntime-gpu")
    providers._try.cache_clear()
    with pytest.raises(DeviceError, match="cuda"):
        compile(lambda x: x, "cuda")


def test_a_gpu_is_tried_before_it_is_used(gpu, monkeypatch):
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    providers._try.__wrapped__("cuda")
    wrong = lower(lambda x: (2 * x @ x).max(-1), np.ones((2, 2), np.float32))
    monkeypatch.setattr(lowering, "lower", lambda function, x: wrong)
    with pytest.raises(DeviceError, match=r"a 2 x 2 product returned \[6.0, 22.0\]; update the driver"):
        providers._try.__wrapped__("cuda")


def test_the_device_is_described_in_one_line(monkeypatch):
    assert describe_device("cpu") == f"device: cpu (onnxruntime {importlib.metadata.version('onnxruntime')})"
    assert describe_device("numpy") == f"device: numpy {np.__version__}"
    pretend_installed(monkeypatch)
    assert default_device() == "numpy"
    assert "pip install" in describe_device("numpy")


@pytest.mark.parametrize(
    ("packages", "device"),
    [
        ([], "numpy"),
        (["onnx"], "numpy"),
        (["onnxruntime"], "numpy"),
        (["onnx", "onnxruntime"], "cpu"),
        (["onnx", "onnxruntime-gpu"], "cpu"),
    ],
)
def test_the_default_is_the_cpu_if_both_packages_are_installed(monkeypatch, packages, device):
    pretend_installed(monkeypatch, *packages)
    assert default_device() == device


def test_other_code_can_still_open_sessions():
    graph, _ = lower(lambda x: x * 2, np.ones(3, np.float32))
    devices.open_session(graph, "cpu")
    session = ort.InferenceSession(graph.to_onnx().SerializeToString())
    assert (session.run(None, {"x": np.ones(3, np.float32)})[0] == 2).all()


@pytest.mark.parametrize("device", ["numpy", "cpu"])
@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_16_bit_weights_equal_widened_weights(device, dtype):
    delta, params, *rest = problem("t5-1.1", 0, 5, np.float32)
    narrow = {name: value.astype(dtype) for name, value in flatten(params).items()}
    wide = {name: value.astype(np.float64) for name, value in narrow.items()}
    run = compile(train.loss_and_grads, device)
    _, exact = train.loss_and_grads({PROMPT: delta[PROMPT].astype(float)}, nest(wide), *rest)
    value, gradient = run(delta, nest(narrow), *rest)
    assert value.dtype == gradient[PROMPT].dtype == np.float32
    assert np.abs(gradient[PROMPT] - exact[PROMPT]).max() < 1e-4 * np.abs(exact[PROMPT]).max()


def test_int8_is_close_and_quantises_each_weight_once(monkeypatch):
    delta, params, config, batch = problem("t5-1.1", 1, 5, np.float32)
    for value in flatten(params).values():
        value.flags.writeable = False
    value, gradient = train.loss_and_grads(delta, params, config, batch)
    run, made = compile(train.loss_and_grads, "cpu-int8"), len(values._made)
    found, near = run(delta, params, config, batch)
    assert 0 < abs(found - value) < 0.05 * value
    cosine = np.vdot(near[PROMPT], gradient[PROMPT]) / np.linalg.norm(near[PROMPT]) / np.linalg.norm(gradient[PROMPT])
    assert 0.98 < cosine < 1 - 1e-7
    held = len(values._made)
    assert held > made
    labels, weights = (np.pad(x, ((0, 0), (0, 2))) for x in (batch.labels, batch.weights))
    run(delta, params, config, batch._replace(labels=labels, weights=weights))  # opens another session
    assert len(values._made) == held


def frozen_model(seed):
    """Return frozen parameters with matrices wide enough for int8 to be accurate."""
    config = parse_config(raw_config("t5-1.1", d_model=48, d_kv=16, d_ff=96))
    weights = {name: value.astype(np.float32) for name, value in random_weights(config, seed).items()}
    return config, nest({name: freeze(value) for name, value in weights.items()})


def next_logits(model, tokens, device):
    """Return the logits of each next token, computed as in decoding."""
    config, params = model
    ids, mask, *_ = batch(0, config.vocab_size, len(tokens), 7, 4)
    step = decode.Cache(params, config, ids, mask, 1, device)
    return [step(column, None) for column in tokens.T]


@examples(5)
@given(rows=st.integers(1, 5), steps=st.integers(1, 6), seed=st.integers(0, 99))
def test_int8_decoding_uses_the_given_weights(rows, steps, seed):
    first, second = frozen_model(seed), frozen_model(seed + 1)
    tokens = np.random.default_rng(seed).integers(3, first[0].vocab_size, (rows, steps))
    exact = {id(model): next_logits(model, tokens, "cpu") for model in (first, second)}
    for model in (first, second, first):
        for found, wanted in zip(next_logits(model, tokens, "cpu-int8"), exact[id(model)], strict=True):
            error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
            assert 1e-6 < error < 0.25 * 127 / largest_int8()  # another model's weights would give more than 1


def test_few_sessions_hold_weights_and_are_freed_with_them(monkeypatch):
    opened = []
    open_session = sessions.open_session

    def recorded(graph, device, **options):
        session = open_session(graph, device, **options)
        if options.get("weights"):
            opened.append(weakref.ref(session))
        return session

    monkeypatch.setattr(sessions, "open_session", recorded)
    run = compile(lambda x, w: ops.linear(x, w["decoder.w"]), "cpu-int8", writes=True)
    weights = {"decoder.w": np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)}
    weights["decoder.w"].flags.writeable = False
    x = {rows: np.random.default_rng(rows).normal(size=(rows, 32)).astype(np.float32) for rows in range(2, 9)}
    for rows in (*x, *x):
        wanted = x[rows] @ weights["decoder.w"].T
        assert 0 < np.abs(run(x[rows], weights) - wanted).max() < 0.05 * np.abs(wanted).max()
    gc.collect()
    assert len(opened) == 14
    assert len([session for session in opened if session()]) == sessions.PACKED
    weights.clear()
    gc.collect()
    assert [session for session in opened if session()] == []


@pytest.mark.parametrize("device", ["numpy-int8", "cpu-bf16", "cpu-fp4", "cuda-int8", "CPU", ""])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(DeviceError, match=f"device '{device}': expected one of numpy, cpu"):
        compile(train.loss, device)


@pytest.mark.parametrize(("variable", "expected"), [("1", 1), ("3", 3), ("2,4", 2), ("", 0), ("many", 0), (None, 0)])
def test_a_session_uses_omp_num_threads(monkeypatch, variable, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    session = devices.open_session(lower(lambda x: x + 1, np.zeros(1, np.float32))[0], "cpu")
    assert session.get_session_options().intra_op_num_threads == expected


def test_options_of_a_gpu_session(monkeypatch):
    class Session:
        def __init__(self, model, options, providers, enable_fallback):
            self.asked = options, providers, enable_fallback

        def get_providers(self):
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    monkeypatch.setattr(ort, "InferenceSession", Session)
    graph, _ = lower(lambda x: x + 1, np.ones(2, np.float32))
    options, [(provider, settings)], fallback = devices.open_session(graph, "cuda").asked
    assert provider == "CUDAExecutionProvider"
    assert settings["use_tf32"] == "0"  # products must be exact in float32
    assert settings["enable_cuda_graph"] == "0"
    assert devices.open_session(graph, "cuda", True).asked[1][0][1]["enable_cuda_graph"] == "1"
    assert not fallback
    assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_bfloat16_is_sent_to_the_gpu_as_bits(monkeypatch):
    sent = {}

    class Value:
        def update_inplace(self, bits):
            sent["bits"] = bits

    def allocate(shape, kind, device, number):
        sent["asked"] = shape, kind, device
        return Value()

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", allocate)
    w = freeze(np.array([[1.0, -2.5]], bfloat16))
    devices.on_device(w, "cuda")
    assert sent["asked"] == ([1, 2], values.BFLOAT16, "cuda")
    assert (sent["bits"].view(bfloat16) == w).all()
    assert values.BFLOAT16 == onnx.TensorProto.BFLOAT16


def test_bf16_sends_frozen_weights_to_the_gpu_in_16_bits_once(monkeypatch):
    seen = []
    monkeypatch.setattr(sessions, "check_device", lambda device: "cuda")
    monkeypatch.setattr(values, "to_value", lambda x, device: seen.append(x) or x)
    monkeypatch.setattr(sessions.Captured, "fits", lambda graph: False)

    class Session:
        def run_with_ort_values(self, _, inputs):
            assert [v.dtype for v in inputs.values()] == [np.float32, bfloat16]
            return [ort.OrtValue.ortvalue_from_numpy(np.zeros((2, 3), np.float32))]

    monkeypatch.setattr(sessions, "open_session", lambda graph, device, capture: Session())
    w = np.ones((3, 4), np.float32)
    w.flags.writeable = False
    run = compile(lambda x, tree: ops.linear(x, tree["w"]), "cuda-bf16")
    for _ in range(3):
        run(np.ones((2, 4), np.float32), {"w": w})
    assert [x.dtype for x in seen] == [np.float32, bfloat16, np.float32, np.float32]  # the weight is sent once


@pytest.mark.parametrize("dtype", [np.float16, bfloat16, np.float32])
@pytest.mark.parametrize("bf16", [True, False])
def test_weights_are_widened_just_before_use(dtype, bf16):
    """A 16-bit weight is widened immediately before its use; bf16 casts no weight."""
    delta, params, config, rows = problem(
        "t5-1.1", 0, 40, np.float32
    )  # long enough that attention chooses the path for few queries
    narrow = nest({name: value.astype(dtype) for name, value in flatten(params).items()})
    for value in flatten(narrow).values():
        value.flags.writeable = False
    graph, _ = lower(train.loss_and_grads, delta, narrow, config, rows, bf16=bf16)
    at = {node.name: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        users = [at[user.name] for user in graph.nodes if node.name in {v.name for v in user.inputs}]
        if node.op == "Cast" and node.inputs[0].op is None and node.inputs[0].ndim == 2:
            assert not bf16
            assert max(users) - at[node.name] < 5


# ---- every provider ----


def tolerance(device):
    """Return the allowed distance from float64, relative to the norm."""
    bf16 = providers.DEVICES[device].precision == "bf16" and "computes in float32" not in describe_device(device)
    return 0.1 if bf16 else 2e-5


def is_near(found, wanted, device):
    return np.linalg.norm(found - wanted) <= tolerance(device) * np.linalg.norm(wanted)


@pytest.mark.parametrize("n", [2, 8, 64, 256])
@pytest.mark.parametrize("inside", [True, False])
def test_a_square_matrix_is_multiplied_plain_and_transposed(provider, n, inside):
    """OpenVINO 2026.4 computes wrongly if the matrix is a constant of the graph, so we pass it as an input."""
    rng = np.random.default_rng(n)
    x, w = (rng.normal(size=(rows, n)).astype(np.float32) for rows in (96, n))
    product = lambda x, w: anp.sqrt((x @ w.T) ** 2 + 1) @ w
    run = compile(lambda x: product(x, w), provider) if inside else compile(product, provider)
    assert is_near(run(x) if inside else run(x, freeze(w)), product(x.astype(float), w.astype(float)), provider)


@pytest.mark.parametrize("constants", [True, False])
def test_large_constants_are_inputs_if_a_provider_needs_it(monkeypatch, constants):
    monkeypatch.setitem(providers.PROVIDERS, "cpu", replace(providers.PROVIDERS["cpu"], constants=constants))
    table, models = np.arange(6, dtype=np.float32).reshape(2, 3), []
    original = ort.InferenceSession
    monkeypatch.setattr(
        ort, "InferenceSession", lambda model, *a, **o: models.append(model) or original(model, *a, **o)
    )
    assert (compile(lambda x: x * table + 1, "cpu")(np.ones((2, 3), np.float32)) == table + 1).all()
    held = [x for x in onnx.load_from_string(models[0]).graph.initializer if np.prod(x.dims) > 3]
    assert len(held) == constants


def test_kept_arrays_are_written_in_place(provider):
    append = compile(lambda x, at, new: (new.sum(), {"x": ops.put(x, at, new), "zeros": new * 0}), provider, keeps=True)
    fill = compile(lambda x: (None, {"x": x * 2}), provider, keeps=True)
    new = np.random.default_rng(0).normal(size=(2, 3, 1, 4)).astype(np.float32)
    given = np.ones((2, 3, 5, 4), np.float32)
    assert (np.asarray(append(given, np.array([1]), new)[1]["x"])[:, :, 1:2] == new).all()
    assert (given == 1).all()  # the caller's array is not overwritten
    held = fill(given)[1]["x"]
    place = held.value.data_ptr()
    for at in (1, 4):
        total, kept = append(held, np.array([at]), new)
        assert is_near(total, new.sum(), provider)
        held = kept["x"]
        assert held.value.data_ptr() == place or not providers.PROVIDERS[providers.DEVICES[provider].place].in_place
    wanted = np.full((2, 3, 5, 4), 2, np.float32)
    wanted[:, :, [1, 4]] = new
    assert (np.asarray(held) == wanted).all()
    assert (np.asarray(kept["zeros"]) == 0).all()


def test_a_kept_array_is_overwritten_only_if_nothing_else_reads_it():
    x, at, new = np.zeros((2, 3, 5, 4)), np.array([0]), np.ones((2, 3, 1, 4))
    put = lambda x, at, new: {"x": ops.put(x, at, new)}
    for function, place in [
        (put, "x"),
        (lambda x, at, new: put(x, at, new) | {"other": x * 2}, None),
        (lambda x, at, new: put(x, at, new) | {"other": x}, None),
        (lambda x, at, new: put(x + 1, at, new), None),
        (lambda x, at, new: put(x, at, new) | {"other": ops.put(x, at, 2 * new)}, None),
    ]:
        graph, result = lower(function, x, at, new)
        graph.keep([result["x"]])
        assert list(graph.kept.values()) == [place]


def test_an_unused_input_is_not_passed(monkeypatch):
    opened, original = [], sessions.open_session
    monkeypatch.setattr(sessions, "open_session", lambda graph, *a: opened.append(graph) or original(graph, *a))
    assert (compile(lambda x, y: x + 1, "cpu")(np.zeros(3), np.ones(4)) == 1).all()
    assert [x.name for x in opened[0].inputs] == ["x"]


def test_decoding_does_not_move_the_cache():
    config, params = frozen_model(0)
    ids, mask, *_ = batch(0, config.vocab_size, 3, 7, 4)
    step = decode.Cache(params, config, ids, mask, 1, "cpu")
    places = [{name: x.value.data_ptr() for name, x in step.arrays.items()}]
    for _ in range(decode.SLOTS + 2):
        step(np.full(3, 5), None, decode.likeliest)
        places.append({name: x.value.data_ptr() for name, x in step.arrays.items()})
    assert places.count(places[0]) == decode.SLOTS + 1
    assert places.count(places[-1]) == 2
    crossed = {name for name in step.arrays if "EncDecAttention" in name}
    assert {name: places[0][name] for name in crossed} == {name: places[-1][name] for name in crossed}


@pytest.mark.parametrize(("beams", "there", "back"), [(1, 10_568, 64), (4, 42_504, 3_072)])
def test_bytes_moved_per_token_at_the_size_of_xxl(beams, there, back):
    wide = dict(d_model=4096, d_ff=10240, num_heads=64, d_kv=64, num_layers=1, num_decoder_layers=24, vocab_size=32128)
    config = parse_config(raw_config("t5-1.1", **wide))
    zeros = lambda *shape, dtype=np.float32: np.broadcast_to(np.zeros((), dtype), shape)
    params = nest({name: zeros(*shape, dtype=bfloat16) for name, shape in weight_shapes(config).items()})
    rows, inputs = 8, 164
    cache = lower(decode.first_cache, params, config, zeros(rows, inputs, 4096), beams, 32)[1][1]
    cache = {name: zeros(*x.shape) for name, x in cache.items()}
    tokens, mask = zeros(rows * beams, dtype=int), zeros(rows * beams, inputs, dtype=int)
    origin, pick = (tokens, decode.Candidates(2 * beams)) if beams > 1 else (None, decode.likeliest)
    state = config, cache, tokens, np.array([0]), 32, mask, origin, pick
    graph, result = lower(decode.decode_next, params, *state, frozen="params")
    graph.keep(result[1].values())
    stay = {*flatten(params), *cache}
    assert sum(x.size * x.dtype.itemsize for x in graph.inputs if x.name not in stay) == there
    assert sum(x.size * x.dtype.itemsize for x in graph.outputs if x.name not in graph.kept) == back
    assert None not in graph.kept.values() or beams > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_training_ranking_and_decoding_equal_numpy(provider, family):
    delta, params, config, rows = problem(family, 5, 6, np.float32)
    params = nest({name: freeze(value) for name, value in flatten(params).items()})
    exact = problem(family, 5, 6, np.float64)
    value, gradient = train.loss_and_grads(*exact)
    found, near_gradient = compile(train.loss_and_grads, provider, frozen="params")(delta, params, config, rows)
    assert is_near(found, value, provider)
    assert is_near(near_gradient[PROMPT], gradient[PROMPT], provider)
    labels = np.stack([rows.labels, rows.labels[::-1]], axis=1)
    arguments = config, rows.input_ids, rows.attention_mask, labels, np.ones(labels.shape, np.float32)
    assert is_near(compile(decode.ranked, provider)(params, *arguments), decode.ranked(exact[1], *arguments), provider)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (3, decode.SLOTS + 2))
    for logits, wanted in zip(*(next_logits((config, params), tokens, d) for d in (provider, "numpy")), strict=True):
        assert is_near(logits, wanted, provider)


def test_dropout_masks_equal_numpy(provider):
    x, drop = np.ones((30, 20), np.float32), t5.dropout(0.5, 3, 1)
    function = lambda x, drop: drop("output", x) * x
    assert (compile(function, provider)(x, drop) == function(x, drop)).all()


def test_constant_outputs_are_returned_as_fresh_copies(provider):
    table = np.arange(3, dtype=np.float32)
    run = compile(lambda x: (table[:0], x + 1, table), provider)
    for _ in range(2):
        empty, found, held = run(table)
        assert (empty.shape, found.tolist(), held.tolist()) == ((0,), [1, 2, 3], [0, 1, 2])
        held += 1  # the caller may change its copy
    assert compile(lambda x: {"a": table}, provider)(table)["a"].tolist() == [0, 1, 2]


@pytest.fixture
def narrow_provider(monkeypatch):
    """Pretend that the CPU is a provider that computes in 32 bits."""
    monkeypatch.setitem(providers.PROVIDERS, "cpu", replace(providers.PROVIDERS["cpu"], wide=False))


def test_64_bit_numbers_are_refused_on_a_32_bit_provider(narrow_provider):
    run = compile(lambda x: x * 3, "cpu")
    assert (run(np.array([2**31 - 1, -5])) == np.array([3 * 2**31 - 3, -15])).all()
    with pytest.raises(DeviceError, match="device 'cpu' computes integers in 32 bits, and x has larger ones"):
        run(np.array([1, 2**31]))
    with pytest.raises(DeviceError, match="x has larger ones"):
        run(np.array([1, -(2**63)]))
    for x in (np.ones(2), np.ones(2, np.float32)):
        with pytest.raises(DeviceError, match="device 'cpu' computes float64 in 32 bits; give float32 arrays"):
            compile(lambda x: x * np.float64(3), "cpu")(x)


@pytest.mark.parametrize(("device", "precision"), [("openvino", "f32"), ("openvino-bf16", "bf16")])
@pytest.mark.parametrize("capability", ["FP32 BF16", "FP32"])
def test_openvino_gets_its_precision_and_thread_count(monkeypatch, device, precision, capability):
    processor = SimpleNamespace(
        ep_name="OpenVINOExecutionProvider",
        device=SimpleNamespace(type=ort.OrtHardwareDeviceType.CPU),
        ep_metadata={"OPTIMIZATION_CAPABILITIES": capability},
    )
    asked = []
    monkeypatch.setattr(ort, "get_ep_devices", lambda: [processor])
    monkeypatch.setattr(ort.SessionOptions, "add_provider_for_devices", lambda self, *a: asked.append(a))
    monkeypatch.setattr(providers, "_try", lambda place: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    pretend_installed(monkeypatch, "onnx", "onnxruntime", "onnxruntime-ep-openvino")
    lacks = "; this processor has no bfloat16, so it computes in float32" * (
        precision == "bf16" and "BF16" not in capability
    )
    assert describe_device(device) == f"device: {device} (onnxruntime-ep-openvino 1.0){lacks}"
    graph, _ = lower(lambda x: x + 1, np.ones(2, np.float32))
    with pytest.raises(DeviceError, match="would fall back to CPUExecutionProvider"):  # the fake added no provider
        devices.open_session(graph, device)
    ((given, options),) = asked
    assert given == [processor]
    wanted = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": "3"}
    assert json.loads(options["load_config"]) == {"CPU": wanted}


def test_a_plug_in_without_a_processor_fails_every_time(monkeypatch):
    registered = []
    monkeypatch.setattr(ort, "get_ep_devices", lambda: [])
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda *a: registered.append(a))
    module = SimpleNamespace(get_library_path=lambda: "library")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_openvino", module)
    pretend_installed(monkeypatch, "onnx", "onnxruntime", "onnxruntime-ep-openvino")
    for cached in (providers._try, providers._register):
        cached.cache_clear()
    for _ in range(2):
        with pytest.raises(DeviceError, match="device 'openvino': its plug-in finds no processor here"):
            compile(lambda x: x, "openvino")
    assert registered == [("OpenVINOExecutionProvider", "library")]
    providers._register.cache_clear()
