"""`tinyprompt check` accepts correct gradients and rejects wrong ones."""

import json
import re
from dataclasses import replace
from pathlib import Path

import autograd.numpy as anp
import numpy as np
import pytest
from autograd.extend import defvjp, primitive
from files import SMALL, VOCAB, weights, write
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from profiles import examples
from random_models import FAMILIES, raw_config

from tinyprompt import ops, tree
from tinyprompt.check import ledger
from tinyprompt.check.ledger import check_gradient, check_model, check_vjp
from tinyprompt.cli.main import main
from tinyprompt.data import random_batch
from tinyprompt.device import check_device, default_device
from tinyprompt.errors import CheckpointError, DeviceError
from tinyprompt.files import models

PAGE = (Path(__file__).parents[1] / "docs" / "gradients.md").read_text(encoding="utf-8")
needs_ort = pytest.mark.skipif(default_device() == "numpy", reason="needs ONNX Runtime: pip install '.[ort]'")


@pytest.fixture
def model(folder):
    return models.load(folder)


def gradient_of(model, case, dtype=np.float64):
    params = ledger.in_dtype(model.params, dtype)
    return ledger.run(model, params, [case], "numpy")[0]["gradient"]


@needs_ort
@pytest.mark.parametrize("family", ["t5-1.0", "umt5"])
def test_every_engine_passes(family, tmp_path):
    pytest.importorskip("transformers", reason="torch's engine needs transformers: pip install '.[test]'")
    raw = raw_config(family, vocab_size=VOCAB)
    folder = write(tmp_path / family, raw, weights(raw))
    seen = []
    report = check_model(models.load(folder), folder, report=seen.append)
    assert report.ok, str(report)
    engines = dict.fromkeys(f.engine for f in report.findings)
    assert seen[0] == "numpy float64"
    assert re.fullmatch(r"all engines: about \d+ seconds, plus the start of torch", seen[1])
    assert list(engines) == [name for name in seen[2:] if f"{name}: not run" not in str(report)]
    assert {f.quantity for f in report.findings if f.engine == "torch float64"} == set(ledger.QUANTITIES)
    assert all(f.error < 1e-11 for f in report.findings if f.engine.endswith("float64"))
    assert str(report).endswith("verdict: right")


@pytest.mark.parametrize("family", FAMILIES)
def test_numpy_is_checked_without_torch(family, tmp_path):
    raw = raw_config(family, vocab_size=VOCAB)
    report = check_model(models.load(write(tmp_path / family, raw, weights(raw))))
    assert report.ok
    assert "torch float64: not run: no model directory was given" in report.notes
    assert not any(f.engine.startswith("torch") for f in report.findings)


@needs_ort
@pytest.mark.parametrize("fault", [1e-4, float("nan")])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("quantity", ledger.QUANTITIES)
def test_a_faulty_engine_is_named_and_exits_with_1(quantity, dtype, fault, folder, monkeypatch, capsys):
    run = ledger.run

    def faulty(model, params, cases, device):
        found = run(model, params, cases, device)
        if device == "cpu" and params["shared"]["weight"].dtype == dtype:
            found[1][quantity] = found[1][quantity] * (1 + fault)
        return found

    def no_torch(*_):
        raise DeviceError("too slow for this test")

    monkeypatch.setattr(ledger, "run", faulty)
    monkeypatch.setattr(ledger, "run_torch", no_torch)
    assert main(["check", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert re.search(rf"^onnxruntime cpu {np.dtype(dtype)} .* WRONG: {quantity} at most ", shown, re.M)
    assert shown.count("WRONG: ") == 1
    assert re.search(r"^numpy float32 .* right$", shown, re.M)
    assert "torch float64: not run: too slow" in shown
    assert shown.endswith("verdict: WRONG\n")


@examples(15)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 6)),
    length=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_a_drawn_case_has_the_requested_sizes_and_survives_saving(shared, sizes, length, seed):
    folder, whole = shared
    (folder / "model.safetensors").write_bytes(whole)
    model = models.load(folder)
    rows, tokens, targets = sizes
    case = ledger.draw(model, seed, length)._replace(batch=random_batch(VOCAB, *sizes, seed))
    assert case.prompt.shape == (length, 4)
    assert case.batch.input_ids.shape == case.batch.attention_mask.shape == (rows, tokens)
    assert case.batch.labels.shape == case.batch.weights.shape == (rows, targets)
    assert case.batch.attention_mask[0].all()
    assert case.batch.attention_mask.any(1).all()
    assert (case.batch.input_ids[case.batch.attention_mask == 0] == 0).all()
    ledger.save_case(case, folder / "case")
    again = ledger.load_case(folder / "case", model)
    for before, after in zip((case.prompt, *case.batch), (again.prompt, *again.batch), strict=True):
        assert before.dtype == after.dtype
        assert (before == after).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": None}, "array 'prompt' is missing"),
        ({"prompt": np.ones((3, 5))}, "'prompt' has shape [3, 5] and dtype float64; expected ['any', 4] and floating"),
        ({"prompt": np.ones((3, 4), int)}, "dtype int64; expected ['any', 4] and floating"),
        ({"labels": np.ones((2, 5), int)}, "'labels' has shape [2, 5]"),
        ({"input_ids": np.full((3, 24), VOCAB)}, f"'input_ids': expected ids from 0 to {VOCAB - 1}"),
        ({"labels": np.full((3, 5), -100)}, "'labels' contains -100, the padding of Hugging Face's collators"),
        ({"attention_mask": np.zeros((3, 24), int)}, "'attention_mask': expected 0 and 1, and a 1 in every row"),
        ({"attention_mask": np.full((3, 24), 2)}, "'attention_mask': expected 0 and 1"),
        ({"weights": np.zeros((3, 5))}, "'weights': expected numbers of at least 0"),
        ({"weights": -np.ones((3, 5))}, "'weights': expected numbers of at least 0"),
        ({"prompt": np.full((3, 4), np.nan)}, "'prompt' contains NaN"),
    ],
)
def test_a_bad_case_names_its_array(changes, words, model, tmp_path):
    case = ledger.draw(model)
    arrays = dict(prompt=case.prompt, **case.batch._asdict()) | changes
    np.savez(tmp_path / "case.npz", **{name: x for name, x in arrays.items() if x is not None})
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        ledger.load_case(tmp_path / "case.npz", model)
    assert "case.npz" in str(caught.value)


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04", b"no zip", None])
def test_a_file_that_is_not_a_case_is_refused(contents, model, tmp_path):
    path = tmp_path / "case.npz"
    if contents is not None:
        path.write_bytes(contents)
    expected = "no such file" if contents is None else "not a file of NumPy arrays"
    with pytest.raises(CheckpointError, match=rf"case\.npz: {expected}"):
        ledger.load_case(path, model)


def test_a_case_needs_no_label_weights(model, tmp_path):
    case = ledger.draw(model)
    np.savez(
        tmp_path / "case.npz", prompt=case.prompt, **{k: v for k, v in case.batch._asdict().items() if k != "weights"}
    )
    assert (ledger.load_case(tmp_path / "case.npz", model).batch.weights == case.batch.weights).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_a_correct_gradient_passes(dtype, model):
    case = ledger.draw(model)
    mine = gradient_of(model, case, np.float64 if dtype == np.float64 else np.float32).astype(dtype)
    assert check_gradient(mine, model, *case).ok


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda g: g * 3, "yours: correct direction, 3 times as long"),
        (lambda g: -g, "yours: opposite direction: is a minus sign missing?"),
        (lambda g: -2 * g, "yours: opposite direction, 2 times as long"),
        (lambda g: g + 1e-8 * np.linalg.norm(g), "largest errors in rows"),
        (lambda g: g[::-1], "largest errors in rows"),
        (lambda g: 0 * g, "largest errors in rows"),
        (lambda g: changed(g, 7, 0.0), "yours: largest errors in row 7 of 20: 100% of the distance"),
        (lambda g: changed(g, 7, np.nan), "yours: 4 NaN and 0 infinite of 80 numbers, in row 7"),
        (lambda g: changed(changed(-g, 7, np.nan), 2, np.inf), "4 NaN and 4 infinite of 80 numbers, in rows 2, 7"),
        (lambda g: g / 0, "0 NaN and 80 infinite of 80 numbers, in rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ..."),
        (lambda g: g.astype(np.float32) * np.float32(1.0005), "largest errors in rows"),
        (lambda g: (g.astype(np.float32) * np.float32(1.0005)).astype(np.float64), "stored as float64"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_wrong_gradient_fails_with_a_hint(change, hint, model):
    case = ledger.draw(model)
    report = check_gradient(change(gradient_of(model, case)), model, *case)
    assert not report.ok
    assert hint in str(report)
    assert "yours" in str(report)


def changed(gradient, row, value):
    """Return a copy of a gradient with one row set to a value."""
    gradient = gradient.copy()
    gradient[row] = value
    return gradient


def test_the_worst_row_is_listed_first(model):
    case = ledger.draw(model)
    wrong = gradient_of(model, case)
    wrong[3] += 1e-3 * np.abs(wrong).max()
    wrong[11] += 2e-3 * np.abs(wrong).max()
    notes = check_gradient(wrong, model, *case).notes
    assert notes == ["yours: largest errors in rows 11, 3 of 20: 100% of the distance"]


def test_a_float32_gradient_saved_as_float64_is_judged_as_float32(model):
    case = ledger.draw(model)
    mine = gradient_of(model, case, np.float32)
    report = check_gradient(mine.astype(np.float64), model, *case)
    assert report.ok
    assert report.notes == ["yours: float32 numbers stored as float64; judged as float32"]
    assert report.findings[0].limit == check_gradient(mine, model, *case).findings[0].limit
    assert check_gradient(gradient_of(model, case), model, *case).findings[0].limit == ledger.EXACT


def test_a_model_without_a_tokenizer_is_checked(tmp_path, capsys, monkeypatch):
    folder = write(tmp_path / "t5", SMALL, weights())
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        models.load(folder)
    monkeypatch.setattr(ledger, "run_torch", lambda *_: (_ for _ in ()).throw(DeviceError("left out")))
    assert main(["check", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("verdict: right\n")
    batch = str(tmp_path / "batch.npz")
    assert main(["check", str(folder), "--save", batch]) == 0
    assert main(["check", str(folder), "--batch", batch]) == 0


def test_a_gradient_of_another_shape_is_refused(model):
    with pytest.raises(
        ValueError,
        match=r"yours: shape \[3, 4\] and dtype float64; expected floats of the shape of the prompt, \[20, 4\]",
    ):
        check_gradient(np.ones((3, 4)), model, *ledger.draw(model))


def test_a_gradient_computed_elsewhere_is_judged(folder, tmp_path, capsys):
    """Follow docs/gradients.md: --save, compute, --gradient."""
    batch, mine = str(tmp_path / "batch.npz"), tmp_path / "mine.npy"
    model = models.load(folder)
    ledger.save_case(ledger.draw(model), batch)
    right = gradient_of(model, ledger.load_case(batch, model), np.float32)
    command = ["check", str(folder), "--batch", batch, "--gradient", str(mine), "--json"]
    for gradient, status in ((right, 0), (2 * right, 1)):
        np.save(mine, gradient)
        assert main(command) == status
        report = json.loads(capsys.readouterr().out)
        assert report["ok"] == (status == 0)
        assert [f["engine"] for f in report["findings"]] == [str(mine)]
    mine.write_text("1 2 3")
    assert main(command) == 2
    assert "mine.npy: not a file of NumPy arrays" in capsys.readouterr().err
    command = ["check", str(folder), "--batch", batch, "--gradient", str(mine)]
    assert main([*command, "--save", str(tmp_path / "c.npz")]) == 2
    assert "--save: leave it out with --gradient" in capsys.readouterr().err
    assert not (tmp_path / "c.npz").exists()
    assert main(["check", str(folder), "--gradient", str(mine)]) == 2
    assert "--batch" in capsys.readouterr().err


ARRAYS = [np.random.default_rng(0).normal(size=(3, 4)) for _ in range(2)]


@pytest.mark.parametrize("function", [ops.softmax, ops.gelu, ops.logistic, ops.log_softmax, ops.geglu])
def test_the_primitives_pass(function):
    report = check_vjp(function, *(ARRAYS if function is ops.geglu else ARRAYS[:1]))
    assert report.ok, str(report)
    assert {f.quantity for f in report.findings} >= {"differences", "float32"}


def test_only_arrays_of_floats_are_differentiable_arguments():
    for function, arguments in (
        (ops.embedding, (ARRAYS[0], np.array([0, 2, 2]))),
        (lambda x: ops.rms_norm(x, ARRAYS[0][0].astype(x.dtype), 1e-6), ARRAYS[:1]),
        (lambda x, n: x * n, (ARRAYS[0], 2.5)),
    ):
        report = check_vjp(function, *arguments)
        assert {f.engine for f in report.findings} == {"value", "argument 0"}
        assert report.ok, str(report)
    report = check_vjp(ops.cross_entropy, ARRAYS[0], np.array([0, 2, 2]), np.ones(3), 0.0)
    assert report.ok
    assert any(note.startswith("argument 2: its gradient has no rule") for note in report.notes)


def test_a_function_that_does_not_lower_still_passes():
    report = check_vjp(anp.arcsinh, ARRAYS[0])
    assert report.ok
    assert any("not lowered" in note for note in report.notes)


def test_a_reference_without_a_finite_loss_is_refused(model, tmp_path):
    flat = tree.flatten(model.params)
    params = tree.nest(flat | {"shared.weight": flat["shared.weight"] * np.nan})
    with pytest.raises(ValueError, match="no finite loss"):
        check_model(replace(model, params=params))
    with pytest.raises(ValueError, match="no finite loss"):
        check_model(model, cases=[])


@pytest.mark.parametrize(
    ("errors", "ok"),
    [
        ({"torch float32": [1e-6] * 3, "numpy float32": [2e-6] * 3}, True),
        ({"torch float32": [1e-6] * 3, "numpy float32": [5e-6] * 3}, False),
        ({"torch float32": [1e-6] * 3, "numpy float32": [1e-7, 1e-7, 2e-4]}, False),  # wrong in one batch only
        ({"torch float32": [1e-6], "numpy float32": [9e-6]}, True),
        ({"torch float32": [1e-6], "numpy float32": [1.2e-5]}, False),
        ({"torch float32": [1e-6] * 3, "numpy float32": [1e-6] * 2 + [np.nan]}, False),
        ({"torch float32": [0.8] * 3, "numpy float32": [0.5] * 3}, False),  # a wrong yardstick
        ({"numpy float32": [1e-6] * 3, "onnxruntime cpu float32": [5e-6] * 3}, False),
        ({"numpy float32": [1e-6] * 3, "onnxruntime cpu float32": [3e-6] * 3}, True),
        ({"numpy float32": [2e-3] * 3}, False),
        ({"torch float64": [1e-10, 2e-9]}, False),
        ({"torch float64": [1e-10, 9e-10]}, True),
        ({"finite differences": [1e-7, 2e-6]}, False),
    ],
)
def test_verdict_of_errors(errors, ok):
    found = ledger.judge({engine: {"gradient": values} for engine, values in errors.items()})
    judged = [f for f in found if f.engine == list(errors)[-1]]
    assert [f.ok for f in judged] == [ok]


def test_the_last_row_of_a_drawn_batch_is_padded_on_the_left(model):
    masks = [ledger.draw(model, seed=seed).batch.attention_mask for seed in range(5)]
    assert all(mask[-1, -1] == 1 and mask[0].all() for mask in masks)
    assert any(mask[-1, 0] == 0 for mask in masks)


def test_finite_differences_detect_a_wrong_gradient():
    x = np.linspace(0.5, 2.0, 12).reshape(3, 4)
    loss = lambda x: float((x**3).sum())
    for gradient, ok in ((3 * x**2, True), (3 * x**2 * (1 + 1e-5), False), (0 * x, False), (-3 * x**2, False)):
        assert (ledger.finite_differences(loss, x, gradient) <= ledger.DIFFERENCES) == ok
    assert ledger.finite_differences(lambda x: 1e9 + loss(x), x, 3 * x**2) <= ledger.DIFFERENCES  # rounding is allowed


def rule(vjp):
    """Return x**3 as a primitive with the given rule."""
    cube = primitive(lambda x: x * x * x)
    defvjp(cube, vjp)
    return cube


@pytest.mark.parametrize(
    ("vjp", "quantity"),
    [
        (lambda ans, x: lambda g: 3 * g * x, "differences"),
        (lambda ans, x: lambda g: 3 * g * x * x * (1 + 1e-5), "differences"),
        (lambda ans, x: lambda g: 3 * g * x.astype(float) ** 2, "float32"),
        (lambda ans, x: lambda g: 3 * g * np.sort(x) ** 2, "differences"),
    ],
)
def test_a_wrong_rule_fails(vjp, quantity):
    assert all(
        f.ok
        for f in check_vjp(rule(lambda ans, x: lambda g: 3 * g * x * x), ARRAYS[0]).findings
        if f.quantity != "lowered"
    )
    report = check_vjp(rule(vjp), ARRAYS[0])
    assert not report.ok
    assert ("argument 0", quantity) in {(f.engine, f.quantity) for f in report.findings if not f.ok}


def test_a_function_that_does_not_return_floats_is_refused():
    with pytest.raises(TypeError, match="floats, found int64"):
        check_vjp(lambda x: x.argmax(), ARRAYS[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.arange(3),), r"found int64\[3\]"),
        (([1.0, 2.0],), "found list, not an array"),
        ((2.5,), "found float, not an array"),
        ((np.array([True, False]), "text"), r"found bool\[2\], str"),
        ((), "found none"),
    ],
)
def test_arguments_without_an_array_of_floats_are_refused(arguments, words):
    with pytest.raises(TypeError, match=f"no gradient to check: .*{words}"):
        check_vjp(lambda *x: anp.sum(2.0 * anp.asarray(x[0])), *arguments)


def test_a_primitive_without_a_rule_fails():
    plain = primitive(lambda x, y: 2 * x + y)
    with pytest.raises(ValueError, match="no gradient was checked: argument 0: its gradient has no rule"):
        check_vjp(plain, ARRAYS[0], ARRAYS[1])
    defvjp(plain, lambda ans, x, y: lambda g: 2 * g, argnums=(0,))
    report = check_vjp(plain, *ARRAYS)
    assert report.ok
    assert any(note.startswith("argument 1: its gradient has no rule") for note in report.notes)


def test_arguments_that_are_not_differentiated_are_named():
    report = check_vjp(lambda x, i, n: x[i] * n, ARRAYS[0], np.array([0, 2]), 2)
    assert report.ok, str(report)
    assert report.notes == ["argument 1: not differentiated: int64[2]", "argument 2: not differentiated: int"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, bfloat16])
def test_floats_of_every_size_are_checked(dtype):
    assert check_vjp(anp.sin, ARRAYS[0].astype(dtype)).ok
    assert check_vjp(anp.sin, dtype(0.5)).ok


def test_plain_numpy_passes_or_gets_a_hint_to_use_autograd():
    c = np.random.default_rng(1).normal(size=(5, 3))
    functions = [
        lambda x: np.exp(x),
        lambda x: np.dot(c.astype(x.dtype), x),
        lambda x: np.sum(x),
        lambda x: np.exp(np.dot(c.astype(x.dtype), x)),
        lambda x: np.where(x > 0, x, 0),
        lambda x: np.concatenate([x, x]),
        lambda x: np.tanh(np.array([x[0], x[1]])),
        lambda x: x.dot(c[:4].astype(x.dtype)),
        lambda x: np.linalg.norm(x),
    ]
    for function in functions:
        report = check_vjp(function, ARRAYS[0])
        assert report.ok or "use autograd.numpy" in str(report), str(report)


def test_a_value_that_is_not_finite_fails():
    with np.errstate(all="ignore"):
        assert not check_vjp(anp.log, -np.ones(3)).ok
    x = np.ones(3)
    assert np.isnan(ledger.finite_differences(lambda x: float("nan"), x, x))


def test_a_gradient_of_another_shape_fails():
    wrong = primitive(lambda x: x.sum(0))
    defvjp(wrong, lambda ans, x: lambda g: g)
    report = check_vjp(wrong, ARRAYS[0])
    assert not report.ok
    assert "its gradient has shape [4]; expected [3, 4]" in str(report)


def test_the_examples_of_the_guide_run(tmp_path, monkeypatch):
    """Run the snippet of docs/gradients.md that checks two gradients, on a small model."""
    write(tmp_path / "t5", SMALL, weights())
    monkeypatch.chdir(tmp_path)
    text = re.search(r"```python\n(import tinyprompt as tp\n.*?check_vjp.*?)```", PAGE, re.S)[1]
    names = {}
    exec(text.replace("path/to/t5", "t5"), names)
    reports = [x for x in names.values() if isinstance(x, ledger.Report)]
    assert len(reports) == 2
    assert all(report.ok for report in reports)


def test_an_error_of_autograd_is_reported():
    report = check_vjp(lambda x, w: anp.einsum("nd,nn->d", x, w), np.ones((4, 2)), np.ones((4, 4)))
    assert not report.ok
    assert "argument 1: autograd cannot differentiate it" in str(report)


def test_a_sum_over_the_vocabulary_may_round_without_torch():
    errors = {"numpy float32": {"gradient": [6e-7] * 3}, "onnxruntime cpu float32": {"gradient": [8e-6, 9e-6, 9e-6]}}
    assert [f.ok for f in ledger.judge(errors)] == [True, False]
    assert [f.ok for f in ledger.judge(errors, 16_128)] == [True, True]
    assert [f.ok for f in ledger.judge(errors | {"torch float32": {"gradient": [6e-7] * 3}}, 16_128)][1] is False
    errors["onnxruntime cpu float32"] = {"gradient": [1e-4] * 3}
    assert [f.ok for f in ledger.judge(errors, 16_128)] == [True, False]


@needs_ort
@pytest.mark.parametrize("device", ["numpy", "cpu", "cpu-int8", "openvino", "openvino-bf16"])
def test_one_device_can_be_checked_alone(device, capsys):
    try:
        check_device(device)
    except DeviceError as error:
        pytest.skip(str(error))
    assert main(["check", "tiny", "--device", device, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    engines = {f["engine"] for f in out["findings"] if f["engine"].startswith("onnxruntime")}
    place, _, precision = device.partition("-")
    wanted = {f"onnxruntime {place} {precision or 'float32'}"} if device != "numpy" else set()
    assert engines == wanted | ({"onnxruntime cpu float64"} if device == "cpu" else set())
    assert "numpy float32" in {f["engine"] for f in out["findings"]}


def test_an_unusable_device_is_not_checked(capsys, monkeypatch):
    monkeypatch.setattr("tinyprompt.device.providers.version", lambda package: None)
    assert main(["check", "tiny", "--device", "cuda"]) == 2
    assert "device 'cuda': onnx is not installed" in capsys.readouterr().err


def test_a_low_precision_engine_has_a_wider_limit():
    errors = {"onnxruntime cpu int8": {"gradient": [0.05, 0.2]}, "onnxruntime cuda bf16": {"gradient": [0.05, 0.2]}}
    assert [(f.limit, f.ok) for f in ledger.judge(errors)] == [(0.25, True), (0.1, False)]
