"""`tinyprompt bench` reports its quantities and ratios correctly, on a tiny model."""

import importlib.util
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tinyprompt import device as devices
from tinyprompt.bench import products_side
from tinyprompt.bench import runs as bench_tuning
from tinyprompt.bench import steps as bench
from tinyprompt.check import process
from tinyprompt.check.process import Engine
from tinyprompt.cli.main import main
from tinyprompt.config import weight_shapes
from tinyprompt.files import models, prompts
from tinyprompt.lowering import lower
from tinyprompt.study.grid import read_study
from tinyprompt.tree import flatten

SMALL = dict(batch_size=2, input_tokens=8, target_tokens=3, prompt_length=5, new_tokens=3)
QUANTITIES = {"loss", "first step", "step", "forward", "forward rate", "generate", "peak memory of step"}
QUANTITIES |= {"gradient error", "rate in a step", "share of the best"}


@pytest.fixture(autouse=True)
def one_cold_start(monkeypatch):
    monkeypatch.setattr(bench, "COLD_STARTS", 1)
    monkeypatch.setattr(bench, "GEMM", 64)
    monkeypatch.setattr(bench, "PRODUCT_ROUNDS", 1)


@pytest.mark.parametrize("storage", bench.STORAGE)
@pytest.mark.parametrize("gated", [True, False])
def test_the_written_model_can_be_opened(tmp_path, monkeypatch, storage, gated):
    changes = {} if gated else bench.T5_1_0
    monkeypatch.setitem(bench.SIZES, "tiny", replace(bench.SIZES["tiny"], **changes))
    bench.write_model(tmp_path, "tiny", storage)
    model = models.load(tmp_path)
    assert model.config.gated == gated
    assert {name: value.shape for name, value in flatten(model.params).items()} == weight_shapes(model.config)
    assert 0.5 < np.std(model.params["shared"]["weight"]) < 1.5


def test_flops_count_the_matrix_products():
    a, b = np.ones((3, 4, 5), np.float32), np.ones((7, 5), np.float32)
    graph, _ = lower(lambda a, b: (a @ b.T).sum(-1) + 1, a, b)
    assert bench.gemm_flops(graph) == 2 * 3 * 4 * 5 * 7
    graph, _ = lower(lambda a, b: np.swapaxes(a, 1, 2) @ a, a, b)
    assert bench.gemm_flops(graph) == 2 * 3 * 5 * 4 * 5


def test_precision_of_each_engine():
    engines = "numpy", "ort", "peft-compile", "ort-int8", "ct2-int8", "peft-bf16", "ort-bf16"
    assert [bench.precision_of(name) for name in engines] == ["float32"] * 3 + ["int8"] * 2 + ["bfloat16"] * 2


def test_rows_and_ratios_of_numpy_and_onnx_runtime():
    pytest.importorskip("onnxruntime")
    lines = []
    out = bench.measure(bench.Problem("tiny", **SMALL), ["numpy", "ort", "ort-int8"], 2, lines.append)
    rows = {(row["engine"], row["what"]): row for row in out["rows"]}
    assert {what for engine, what in rows if engine == "ort-int8"} == QUANTITIES
    assert {what for engine, what in rows if engine == "ort"} == QUANTITIES | {"build", "cold start"}
    best = {}
    for name in bench.libraries("cpu"):
        for what in ("products in float32", "products in int8", "products in bfloat16"):
            best[what] = max(best.get(what, 0), rows.get((name, what), {"max": 0})["max"])
    assert best["products in float32"] > 0
    assert best["products in int8"] > 0
    for engine, what in (("numpy", "float32"), ("ort", "float32"), ("ort-int8", "int8")):
        share = rows[engine, "rate in a step"]["median"] / best[f"products in {what}"]
        assert np.isclose(rows[engine, "share of the best"]["median"], share)
    for row in rows.values():
        assert 0 < row["min"] <= row["median"] <= row["max"]
    assert rows["ort", "gradient error"]["median"] < 1e-4 < rows["ort-int8", "gradient error"]["median"] < 0.2
    steps = [rows[name, "step"]["median"] for name in ("numpy", "ort")]
    assert out["ratios"]["step_speedup_vs_numpy"] == steps[0] / steps[1]
    assert out["ratios"]["memory_vs_peft"] is None
    assert "step_speedup_vs_numpy" in bench.table(out)
    assert any("round 2 of 2" in line for line in lines)


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs peft: pip install '.[test]'")
def test_rows_and_ratios_of_peft():
    engines = ["numpy", "ort", "peft-fp32", "peft-bf16"]
    out = bench.measure(bench.Problem("tiny", **SMALL), engines, 1, lambda line: None)
    error = {row["engine"]: row["median"] for row in out["rows"] if row["what"] == "gradient error"}
    assert max(error["ort"], error["peft-fp32"], error["numpy"]) < 1e-4  # every engine computes the same gradient
    assert error["peft-bf16"] < 0.2
    needed = (
        "step_speedup_vs_peft_fp32",
        "step_speedup_vs_peft_bf16",
        "memory_vs_peft",
        "cold_start_vs_peft",
        "generate_speedup_vs_peft_fp32",
    )
    assert all(out["ratios"][name] > 0 for name in needed)


@pytest.mark.skipif(not importlib.util.find_spec("ctranslate2"), reason="needs ctranslate2: pip install '.[test]'")
def test_rows_and_ratios_of_ctranslate2():
    out = bench.measure(bench.Problem("tiny", **SMALL), ["ort", "ct2-fp32", "ct2-int8"], 1, lambda line: None)
    assert {row["what"] for row in out["rows"] if row["engine"].startswith("ct2")} == {"generate"}
    speed = {row["engine"]: row["median"] for row in out["rows"] if row["what"] == "generate"}
    assert out["ratios"]["generate_speedup_vs_ct2_fp32"] == speed["ort"] / speed["ct2-fp32"]


def test_the_command_prints_one_json_object(capsys, monkeypatch):
    monkeypatch.setattr(bench, "available", lambda device: ["numpy"])
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert main(["bench", "--size", "tiny", "--rounds", "1", "--json", *sizes]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["problem"] == {"size": "tiny", **SMALL, "storage": "float32", "device": "cpu"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "batch_size: expected at least 1, found 0"),
        (["--rounds", "0"], "--rounds: expected at least 1"),
        (["--engines", "numpy,jax"], "engine 'jax': expected one of numpy"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, message, capsys):
    assert main(["bench", "--size", "tiny", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_failing_engine_reports_its_error(tmp_path):
    bench.write_model(tmp_path, "tiny")  # without a prompt
    words = [*bench.command("numpy"), "numpy", tmp_path, json.dumps({"size": "tiny"})]
    with pytest.raises(ValueError, match=r"engine numpy: stopped .*prompt.safetensors: no such file"):
        Engine("numpy", words, tmp_path)


@pytest.mark.parametrize("other", [1.03, 0.97, float("nan")])
def test_engines_with_different_losses_are_not_compared(monkeypatch, other):
    monkeypatch.setattr(Engine, "ask", lambda self, call: 1.0 if self.name == "numpy" else other)
    monkeypatch.setattr(bench, "available", lambda device: ["numpy", "numpy-too"])
    monkeypatch.setattr(bench, "command", lambda engine: ["echo", "ready"])
    with pytest.raises(ValueError, match="do not compute the same"):
        bench.measure(bench.Problem("tiny", **SMALL), ["numpy", "numpy-too"], 1, lambda line: None)


def test_a_missing_gpu_is_refused(capsys):
    if devices.version("onnxruntime-gpu"):
        pytest.skip("onnxruntime-gpu is installed")
    assert main(["bench", "--size", "tiny", "--device", "cuda"]) == 2
    assert "onnxruntime-gpu is not installed" in capsys.readouterr().err


def test_gpu_memory_is_the_sum_of_nvidia_smi(monkeypatch):
    monkeypatch.setattr(process.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="1024\n512\n", returncode=0))
    assert bench.gpu_memory() == 1.5


def test_an_engine_with_an_inexact_gradient_is_not_compared(monkeypatch):
    monkeypatch.setattr(bench, "EXACT", 1e-12)
    with pytest.raises(ValueError, match=r"engine numpy: the relative error of its gradient is"):
        bench.measure(bench.Problem("tiny", **SMALL), ["numpy"], 1, lambda line: None)


def test_peak_memory_can_be_reset():
    big = np.ones((300, 1024, 1024), np.uint8)
    before = bench.peak_memory()
    del big
    bench.forget_peak()
    assert bench.peak_memory() < before - 0.2


def test_weights_in_the_file_are_aligned(tmp_path):
    bench.write_model(tmp_path, "tiny")
    assert {value.offset % 4 for value in flatten(models.load(tmp_path, stored=True).params).values()} == {0}


STUDY = """
[settings]
steps = 3
batch_size = 4
prompt_length = 5
optimizer = "adam"
z_loss = 0.0
schedule = "linear"
learning_rate = 0.01
eval_every = 2
max_input_tokens = 16

[tasks.soup]
train = "train.tsv"
dev = "dev.tsv"
test = "dev.tsv"

[grid]
model = ["tiny"]
"""


@pytest.fixture
def study(tmp_path):
    rows = "".join(f"soup {i} {'so ' * (i % 7)}\t{('bad', 'good')[i % 2]}\n" for i in range(16))
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text(f"input\ttarget\n{rows}")
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path / "study.toml"


def whole_runs(study, *words, engines):
    return main(["bench", "--task", str(study), "--rounds", "1", "--engines", engines, *words])


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs peft: pip install '.[test]'")
def test_whole_runs_with_peft(study, capsys):
    assert whole_runs(study, "--json", engines="ort,peft-fp32") == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    found = {(row["engine"], row["what"]): row["median"] for row in run["rows"]}
    target = f"to accuracy {run['reached']:.3f}"
    for engine in ("ort", "peft-fp32"):
        assert 0 < found[engine, target] <= found[engine, "the whole run"]
        assert run["reached"] <= found[engine, "best accuracy"] <= 1
    whole = [found[engine, "the whole run"] for engine in ("peft-fp32", "ort")]
    assert run["ratios"]["ort_run_speedup_vs_peft_fp32"] == whole[0] / whole[1]


def test_a_whole_run_on_random_weights(study, capsys):
    pytest.importorskip("onnxruntime")
    assert whole_runs(study, "--size", "tiny", engines="ort") == 0
    out = capsys.readouterr().out
    assert out.startswith("task soup, model tiny, method prompt")
    assert "the whole run" in out


@pytest.mark.parametrize(
    ("old", "new", "words", "message"),
    [
        ('"adam"', '"adafactor-t5x"', (), "optimizer 'adafactor-t5x': time is compared only with optimizer 'adam'"),
        ("z_loss = 0.0\n", "", (), "z_loss 0.0001"),
        ('model = ["tiny"]', 'method = ["none"]', (), "method 'none': time is compared only with method 'prompt'"),
        ('dev = "dev.tsv"\n', 'dev = "dev.tsv"\ntask = "generate"\n', (), "the task needs label words"),
        ("", "", ("--batch-size", "4"), "--batch-size: for single steps"),
    ],
)
def test_a_study_that_cannot_be_compared_is_refused_in_one_line(study, capsys, old, new, words, message):
    study.write_text(study.read_text().replace(old, new, 1))
    assert whole_runs(study, *words, engines="ort") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "rror" in line or message in line]
    assert message in line


def test_both_sides_read_the_same_run(study, tmp_path):
    cell = read_study(study, "cpu").cells[0]
    made = bench_tuning.run_of(cell, cell.model)
    made.write(tmp_path)
    assert bench_tuning.Run.read(tmp_path) == made
    assert prompts.load_prompt(tmp_path / bench_tuning.FIRST).array.shape[0] == 5


def test_slow_products_are_measured_with_smaller_matrices(monkeypatch):
    """torch in bfloat16 on a processor with AVX2 only would need minutes."""
    monkeypatch.setattr(products_side, "SECONDS", 0)
    sides = []

    def product_of(side):
        sides.append(side)
        return lambda: time.sleep(0.06 if side >= 480 else 0)

    rate = products_side.rate(product_of, 1920)
    assert sides == [240, 480, 480]
    assert rate == pytest.approx(2 * 480**3 / 0.06 / 1e9, rel=0.1)
