"""`tinyprompt inspect`: prompts, models and graphs as numbers and as text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from files import SMALL, weights, write
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from profiles import examples
from tuning import tune

from tinyprompt import describe
from tinyprompt.cli.main import main
from tinyprompt.data import Row
from tinyprompt.export.graphs import Shape, export
from tinyprompt.files import models, prompts
from tinyprompt.lowering import lower
from tinyprompt.methods import METHODS, PROMPT
from tinyprompt.model import Prompt
from tinyprompt.settings import Settings

REAL = Path(__file__).parents[2] / "shared" / "data" / "t5_prompts" / "thunlp_t5_base_100tok.npz"
BUILT_IN = models.default_model()


@pytest.fixture
def call(capsys):
    """Return a function that runs `tinyprompt inspect` successfully and returns its output, parsed for --json."""

    def call(*args):
        capsys.readouterr()
        assert main(["inspect", *map(str, args)]) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        assert "--json" in args or all(len(line) <= describe.WIDTH for line in out.splitlines())
        return json.loads(out) if "--json" in args else out

    return call


@pytest.fixture
def fails(capsys):
    """Return a function that runs `tinyprompt inspect`, which must fail, and returns the error line."""

    def fails(*args):
        capsys.readouterr()
        assert main(["inspect", *map(str, args)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    return fails


def save(path, delta, model=None, **changes):
    about = (model.name, model.fingerprint) if model else ("elsewhere", "0" * 64)
    return prompts.save_prompt(Prompt({PROMPT: delta} | changes, *about, ("good", "bad"), {}), path)


@examples(40)
@given(seed=st.integers(0, 999), rows=st.integers(1, 40), k=st.integers(1, 50), chunk=st.integers(1, 50))
def test_nearest_pieces_equal_plain_numpy(seed, rows, k, chunk):
    rng = np.random.default_rng(seed)
    dtype = [np.float64, np.float32, np.float16, bfloat16][seed % 4]
    prompt, table = rng.normal(0, 9, (5, 7)), rng.normal(0, 9, (rows, 7)).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(describe, "ROWS", chunk)
        ids, cosines = describe.nearest_pieces(prompt, table, k)
    exact = table.astype(np.float64)
    exact = prompt @ exact.T / np.outer(np.linalg.norm(prompt, axis=1), np.linalg.norm(exact, axis=1))
    assert ids.shape == cosines.shape == (5, min(k, rows))
    assert (ids.dtype, cosines.dtype) == (np.int64, np.float32)
    assert np.allclose(cosines, -np.sort(-exact, 1)[:, :k], atol=1e-6)
    assert np.allclose(np.take_along_axis(exact, ids, 1), cosines, atol=1e-6)


def test_zero_and_huge_vectors_give_finite_cosines():
    table = np.array([[0, 0], [3e38, 3e38], [1e-38, 0]], np.float32)
    ids, cosines = describe.nearest_pieces(table, table, 3)
    assert np.allclose(cosines, [[0, 0, 0], [1, 0.7071, 0], [1, 0.7071, 0]], atol=1e-4)
    assert ids.tolist() == [[0, 1, 2], [1, 2, 0], [2, 1, 0]]
    assert describe.near_equal(np.zeros((3, 2))) == 0
    assert describe.near_equal(np.ones((1, 2))) == 0
    assert describe.near_equal([[1, 0], [2, 0], [0, 1]]) == 2
    with pytest.raises(ValueError, match="vectors of 3 numbers, but d_model of the model is 2"):
        describe.nearest_pieces(np.ones((1, 3)), table, 1)


def test_norms_of_any_size_fit_their_columns(call, tmp_path):
    path = save(tmp_path / "p.safetensors", np.array([[1.234e-30, 0], [0, 12345.6], [3e38, -3e38]], np.float32))
    assert " 1.2e-30 1.4e+38 4.2e+38       0" in call(path)


def test_similarity_handles_different_widths_and_zero_vectors():
    names, cosines = describe.similarity(
        {"a": np.ones((2, 3)), "b": np.array([[1, -1, 0], [1, 1, 0]]), "c": np.zeros((1, 3)), "d": np.ones((1, 4))}
    )
    assert names == ["a", "b", "c", "d"]
    nan = np.nan
    expected = [[1, 3**-0.5, 0, nan], [3**-0.5, 1, 0, nan], [0, 0, 0, nan], [nan, nan, nan, 1]]
    assert np.allclose(cosines, expected, equal_nan=True)


@pytest.mark.skipif(not REAL.exists(), reason="needs the trained prompts in ../shared beside the checkout")
def test_real_prompts_of_similar_tasks_are_similar(call):
    out = call(REAL, "--json")
    names, cosines = out["similarity"]["names"], out["similarity"]["cosine"]
    known = {("MRPC", "QQP"): 0.66, ("SST2", "IMDB"): 0.63, ("MNLI", "snli"): 0.54}
    for (a, b), value in known.items():
        assert round(cosines[names.index(a)][names.index(b)], 2) == value
    text = call(REAL)
    lines = {line.split()[0]: line.split() for line in text.partition("similarity")[2].splitlines() if line}
    assert lines["QQP"][1 + names.index("MRPC") + 1] == ".66"
    assert lines["SST2"][1 + names.index("IMDB") + 1] == ".63"
    assert lines["snli"][1 + names.index("MNLI") + 1] == ".54"
    assert "name it with --model" in text
    assert out["vocabulary"] is None
    assert out["prompts"]["MRPC"]["arrays"][PROMPT]["shape"] == [100, 768]


def test_a_prompt_of_vocabulary_rows_shows_their_pieces(call, tmp_path):
    model = models.load()
    ids = [model.tokenizer.encode(word)[0] for word in ("food", "music", "food")]
    path = save(tmp_path / "p.safetensors", 3 * model.params["shared"]["weight"][ids], model)
    out = call(path, "--json", "--top", "2")
    (found,) = out["prompts"].values()
    assert [row[0]["piece"] for row in found["nearest"]] == ["food", "music", "food"]
    assert all(len(row) == 2 and row[0]["cosine"] == 1 for row in found["nearest"])
    assert (found["shared"], found["near_equal"], found["cosine"]) == (2, 2, pytest.approx(1))
    assert 0.1 < found["random"] < 0.4
    assert out["vocabulary"]["model"] == "tinyprompt-t5"
    table = model.params["shared"]["weight"]
    assert out["vocabulary"]["norm"] == pytest.approx(np.linalg.norm(table, axis=1).mean(), rel=1e-5)
    text = call(path)
    assert "     0  food" in text
    assert "tuned on tinyprompt-t5 (sha256 " in text
    assert text.count("\n") < 20


def test_several_prompts_share_a_table(call, tmp_path):
    model = models.load()
    width = model.config.d_model
    single = save(tmp_path / "one.safetensors", np.eye(3, width, dtype=np.float32), model)
    np.savez(tmp_path / "more.npz", a=np.ones((2, width), np.float32), b=-np.ones((3, 5), np.float32))
    out = call(single, tmp_path / "more.npz", "--json")
    assert list(out["prompts"]) == out["similarity"]["names"] == [str(single), "a", "b"]
    assert out["similarity"]["cosine"][2] == [None, None, 1]
    assert ["nearest" in prompt for prompt in out["prompts"].values()] == [True, True, False]
    text = call(single, tmp_path / "more.npz")
    assert "similarity" in text
    assert "vector  nearest pieces" not in text


def test_a_table_of_many_prompts_fits_the_page(call, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "many.npz", **{f"a-task-with-a-long-name-{i}": rng.normal(size=(2, 3)) for i in range(40)})
    text = call(tmp_path / "many.npz")
    assert sum(line.split()[-1:] == ["39"] for line in text.splitlines()) == 1


def test_a_prompt_of_another_model_has_no_nearest_pieces(call, fails, tmp_path):
    path = save(tmp_path / "p.safetensors", np.ones((2, 192), np.float32))
    assert "nearest" not in call(path, "--json")["prompts"][str(path)]
    assert f"{path}: was tuned on 'elsewhere'" in fails(path, "--model", BUILT_IN)
    np.save(tmp_path / "wide.npy", np.ones((2, 193), np.float32))
    assert "wide.npy: " in fails(tmp_path / "wide.npy", "--model", BUILT_IN)


def test_a_model_is_printed_with_folded_blocks(call, tmp_path):
    raw = SMALL | dict(num_layers=3)
    folder = write(tmp_path / "small", raw, weights(raw))
    out = call(folder, "--json")["models"][str(folder)]
    flat = weights(raw)
    assert {name: x["shape"] for name, x in out["weights"].items()} == {k: list(v.shape) for k, v in flat.items()}
    assert out["parameters"] == sum(v.size for v in flat.values())
    assert out["bytes"] == 4 * out["parameters"]
    assert out["config"]["d_model"] == 4
    text = call(folder)
    assert text.startswith(f"small: T5, {out['parameters']:,} parameters in {out['bytes']:,} bytes; 384 pieces\n")
    assert "  encoder.block.0..2.layer.1.DenseReluDense.wo.weight: float32[4,6] " in text
    assert "  encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight: float32[32,3] " in text
    rows = [line.split()[-1] for line in text.splitlines() if ".weight: " in line]
    assert sum(int(size.replace(",", "")) for size in rows) == out["parameters"]
    assert "d_ff 6, " in text


def test_other_files_are_refused(fails, tmp_path):
    (text := tmp_path / "text.txt").write_text("This is no prompt.")
    for path in (text, tmp_path / "nothing", BUILT_IN / "model.safetensors"):
        assert "inspect accepts prompt files, " in fails(path)
    assert "has no config.json, so it is not a model directory" in fails(tmp_path)
    assert "tinyprompt pull org/name" in fails("org/name")
    assert "--top: expected at least 1" in fails(text, "--top", "0")
    path = save(tmp_path / "p.safetensors", np.full((2, 3), np.nan, np.float32))
    assert f"{path}: key 'encoder.prompt.embedding': holds NaN" in fails(path)
    np.save(tmp_path / "flat.npy", np.ones(3))
    assert "flat.npy: " in fails(tmp_path / "flat.npy")


def test_a_closed_pipe_is_not_an_error(tmp_path):
    np.savez(tmp_path / "many.npz", **{f"task-{i}": np.ones((2, 3)) for i in range(150)})
    env = os.environ | {"PYTHONPATH": str(Path(prompts.__file__).parents[2])}
    command = f"{sys.executable} -m tinyprompt inspect {tmp_path / 'many.npz'} | head -1"
    done = subprocess.run(command, shell=True, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_missing_onnx_package_is_named(fails, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(describe, "version", lambda _: None)
    assert "g.onnx: onnx is not installed; pip install 'tinyprompt-t5[ort]'" in fails(tmp_path / "g.onnx")


def test_an_exported_graph_is_printed_without_its_weights(call, folder, tmp_path):
    pytest.importorskip("onnx")
    export(folder, tmp_path / "out", Shape(2, 3, 2, 4))
    (tmp_path / "out" / "model.safetensors").unlink()
    for name, result in (("step", "loss, gradient"), ("score", "log_probability")):
        path = tmp_path / "out" / f"{name}.onnx"
        assert main(["inspect", str(path)]) == 0
        out = call(path, "--json")["graphs"][str(path)]
        lines = out["lines"]
        assert lines[0] == "prompt: float32[4,4] = input"
        assert "shared.weight: float32[384,4] = constant in model.safetensors" in lines
        assert lines[-1] == f"return {result}"
        assert not any("?" in line for line in lines)
        assert any("FusedMatMul(" in line for line in lines)
        assert out["inputs"]["labels"] == "int64[2,2]"
        assert sum(out["operators"].values()) == sum("(" in line for line in lines)


def test_a_saved_graph_prints_like_the_lowered_graph(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    x, w = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)
    graph, _ = lower(lambda x, w: np.tanh(x @ w.T).astype(np.float64).mean(-1), x, w)
    onnx.save(graph.to_onnx(), tmp_path / "g.onnx")
    lines = describe.describe_graph(tmp_path / "g.onnx")["lines"]
    monkeypatch.setattr(models, "load", None)  # printing a graph must not load a model
    assert main(["inspect", str(tmp_path / "g.onnx")]) == 0
    name = graph.outputs[0].name
    assert lines == str(graph).replace(name, "output_0").splitlines()
    assert "return output_0" in lines


def test_a_graph_of_another_program_is_printed(tmp_path, fails):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    def info(name, kind, shape):
        return helper.make_tensor_value_info(name, kind, shape)

    def branch(name):
        return helper.make_graph([helper.make_node("Abs", ["x"], [name])], name, [], [info(name, 1, None)])

    wide = onnx.numpy_helper.from_array(np.ones((3, 3), np.float32), "wide")
    constant = onnx.numpy_helper.from_array(np.array([0.5], np.float32))
    given = dict(mode="fast", names=["a", "b"], floats=[0.1, 2.0], many=[constant, wide])
    nodes = [
        helper.make_node("Constant", [], ["half"], value=constant),
        helper.make_node("Constant", [], ["whole"], value=wide),
        helper.make_node("TopK", ["x", "k"], ["best", "at"], axis=-1),
        helper.make_node("Clip", ["best", "", "half"], ["low"]),
        helper.make_node("LeakyRelu", ["low"], ["leaky"], alpha=0.1),
        helper.make_node("Cast", ["leaky"], ["as16"], to=TensorProto.BFLOAT16),
        helper.make_node("Mystery", ["as16", "wide"], ["odd", ""], domain="org.else", **given),
        helper.make_node("If", ["flag"], ["y"], then_branch=branch("a"), else_branch=branch("b")),
    ]
    graph = helper.make_graph(
        nodes,
        "main",
        [info("x", 1, ["batch", 4]), info("flag", TensorProto.BOOL, []), info("s", TensorProto.STRING, [None])],
        [info("y", 1, None), info("odd", 1, None)],
        [onnx.numpy_helper.from_array(np.array([2]), "k"), wide],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("org.else", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "g.onnx")
    assert describe.describe_graph(tmp_path / "g.onnx")["lines"] == [
        "x: float32[batch,4] = input",
        "flag: bool[] = input",
        "s: string[?] = input",
        "wide: float32[3,3] = constant",
        "half: float32[1] = Constant(value=[0.5])",
        "whole: float32[3,3] = Constant(value=float32[3,3])",
        "best: float32[batch,2], at: int64[batch,2] = TopK(x, [2], axis=-1)",
        "low: float32[batch,2] = Clip(best, none, half)",
        "leaky: float32[batch,2] = LeakyRelu(low, alpha=0.1)",
        "as16: bfloat16[batch,2] = Cast(leaky, to=bfloat16)",
        "odd: float32[...] = Mystery(as16, wide, floats=[0.1, 2.0], many=['...', '...'], mode=fast, names=['a', 'b'])",
        "y: float32[batch,4] = If(flag, else_branch=<1 nodes>, then_branch=<1 nodes>)",
        "return y, odd",
    ]
    data = (tmp_path / "g.onnx").read_bytes()
    for content in (b"", b"This is no graph.", data[: len(data) // 2]):
        (tmp_path / "bad.onnx").write_bytes(content)
        assert "bad.onnx: not an ONNX model" in fails(tmp_path / "bad.onnx")
    assert "none.onnx: no such file" in fails(tmp_path / "none.onnx")


@pytest.mark.parametrize("method", METHODS)
def test_every_file_of_a_method_is_printed(call, folder, tmp_path, method):
    rows = [Row("a bad day", "bad"), Row("fine weather", "good")] * 4
    settings = Settings(method=method, steps=4, eval_every=2, batch_size=2, prompt_length=3, rank=2, hidden=5)
    prompt = tune(models.load(folder), rows, rows, settings, ("bad", "good"), "numpy").prompt
    path = prompts.save_prompt(prompt, tmp_path / "p.safetensors")
    (found,) = call(path, "--model", folder, "--json")["prompts"].values()
    assert found["settings"] == prompt.settings
    assert {name: tuple(x["shape"]) for name, x in found["arrays"].items()} == {
        name: x.shape for name, x in prompt.params.items()
    }
    assert [row["step"] for row in found["history"]] == [0, 2, 4]
    text = call(path, "--model", folder)
    assert "settings: " in text
    assert "batch_size 2" in text
    assert "dev scores by step: 0: " in text
    assert ("nearest" in found) == (prompt.params.keys() == {PROMPT})
