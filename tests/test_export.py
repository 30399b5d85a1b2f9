"""Exported graphs: ONNX Runtime alone computes NumPy's numbers from the model's files. The loop of docs/export.md."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from profiles import examples
from random_models import FAMILIES, batch, random_weights, raw_config
from safetensors.numpy import save_file

from tinyprompt import decode
from tinyprompt.cli.main import main
from tinyprompt.config import weight_shapes
from tinyprompt.errors import CheckpointError
from tinyprompt.export import graphs as export
from tinyprompt.export import npm
from tinyprompt.export import page as web
from tinyprompt.files import models, prompts
from tinyprompt.files.config import parse_config
from tinyprompt.methods import PROMPT
from tinyprompt.model import Prompt
from tinyprompt.predict import pad_labels
from tinyprompt.tree import flatten, nest

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install '.[ort]'")
ort = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install '.[ort]'")

PAGE = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": bfloat16}
LAYOUTS = ("whole", "shards", "alias", "cache")
SHAPES = export.Shape(batch_size=3, input_tokens=7, target_tokens=4, prompt_length=5)
# An interpreter that can import onnxruntime and NumPy, but no other dependency of ours.
ISOLATED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tinyprompt", "torch", "transformers", "onnx", "autograd"):
            raise ImportError(name + " is refused")
sys.meta_path.insert(0, Refuse())
exec(sys.stdin.read())
"""


def write_model(folder, family="t5-1.1", dtype=np.float32, layout="whole", seed=0, **changes):
    """Write a model as one file, two shards, with an alias of shared.weight, or as links of a hub's cache."""
    raw = raw_config(family, vocab_size=384, **changes)
    weights = {k: v.astype(dtype) for k, v in random_weights(parse_config(raw), seed).items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}')
    if layout == "alias":
        weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
    names, files = sorted(weights), ["model.safetensors"]
    if layout in ("shards", "cache"):
        files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        where = {name: files[i % 2] for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for i, file in enumerate(files):
        save_file({name: weights[name] for name in names[i :: len(files)]}, folder / file)
        if layout == "cache":
            blobs = folder.parents[1] / "blobs"
            blobs.mkdir(exist_ok=True)
            (folder / file).rename(blobs / f"{i}{'c0ffee' * 6}")
            (folder / file).symlink_to(Path("../../blobs", f"{i}{'c0ffee' * 6}"))
    return folder


def run(path, **inputs):
    """Return the outputs of an exported graph by name."""
    session = ort.InferenceSession(path)
    names = [x.name for x in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def by_numpy(folder, dtype, prompt, arrays):
    """Return NumPy's results from the same weights in a dtype."""
    model = models.load(folder)
    params = nest({name: value.astype(dtype) for name, value in flatten(model.params).items()})
    given = prompt.astype(dtype), *arrays[:3], arrays[3].astype(dtype), params, model.config
    return export.step(*given) | export.score(*given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@examples(2)
@given(data=st.data())
def test_exported_graphs_equal_numpy(family, dtype, data, tmp_path_factory):
    layout, seed = data.draw(st.sampled_from(LAYOUTS)), data.draw(st.integers(0, 99))
    rows, length, out, vectors = (data.draw(st.integers(1, n)) for n in (4, 40, 5, 20))
    root = tmp_path_factory.mktemp("model")
    folder = write_model(root / "snapshots" / "0", family, DTYPES[dtype], layout, seed)
    export.export(folder, root / "out", export.Shape(rows, length, out, vectors))
    (root / "snapshots").rename(root / "gone")  # the graphs must not need the model's folder
    folder = root / "gone" / "0"
    ids, mask, labels, weights = batch(seed, 384, rows, length, out)
    arrays = ids, mask, labels, weights.astype(np.float32)
    prompt = np.load(root / "out" / "prompt.npy")
    inputs = dict(zip(("prompt", "input_ids", "attention_mask", "labels", "weights"), (prompt, *arrays), strict=True))
    found = run(root / "out" / "step.onnx", **inputs) | run(root / "out" / "score.onnx", **inputs)
    exact, single = (by_numpy(folder, kind, prompt, arrays) for kind in (np.float64, np.float32))
    assert found.keys() == exact.keys() == {"loss", "gradient", "log_probability"}
    for name, value in found.items():
        assert value.dtype == np.float32
        assert value.shape == exact[name].shape
        allowed = 3 * np.abs(single[name] - exact[name]).max() + 2e-6 * np.abs(exact[name]).max()
        assert np.abs(value - exact[name]).max() <= allowed


def by_reference(path, inputs):
    """Run a graph in onnx's Python evaluator."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    return dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True))


def by_openvino(path, inputs):
    openvino = pytest.importorskip("openvino", reason="needs OpenVINO: pip install openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [x.any_name for x in compiled.outputs]
    return dict(zip(names, compiled(inputs).to_tuple(), strict=True))


RUNTIMES = {"onnxruntime": lambda path, inputs: run(path, **inputs), "onnx": by_reference, "openvino": by_openvino}


@pytest.mark.parametrize("plain", export.PLAIN)
@pytest.mark.parametrize("family", ["t5-1.0", "umt5", "square"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_plain_graphs_equal_numpy_in_other_runtimes(runtime, family, plain, tmp_path):
    """OpenVINO 2026.4 is silently wrong if a square weight is multiplied both plain and transposed."""
    changes = dict(d_model=24, d_kv=8, num_heads=3, d_ff=24) if family == "square" else {}
    folder = write_model(tmp_path / "model", "t5-1.1" if changes else family, np.float16, **changes)
    out = tmp_path / "out"
    export.export(folder, out, export.Shape(3, 40, 4, 5), plain=plain)
    assert (out / "model.safetensors").exists() == (plain == "beside")
    ids, mask, labels, weights = batch(1, 384, 3, 40, 4)
    arrays, prompt = (ids, mask, labels, weights.astype(np.float32)), np.load(out / "prompt.npy")
    inputs = dict(zip(("prompt", "input_ids", "attention_mask", "labels", "weights"), (prompt, *arrays), strict=True))
    exact = by_numpy(folder, np.float64, prompt, arrays)
    for name, results in (("step", {"loss", "gradient"}), ("score", {"log_probability"})):
        proto = onnx.load(out / f"{name}.onnx", load_external_data=False)
        assert [x.domain for x in proto.opset_import] == [""]
        assert {node.domain for node in proto.graph.node} == {""}
        half = onnx.TensorProto.FLOAT16
        assert any(x.data_type == half for x in proto.graph.initializer) == (plain == "beside")
        found = RUNTIMES[runtime](out / f"{name}.onnx", inputs)
        assert found.keys() == results
        for key, value in found.items():
            assert np.linalg.norm(value - exact[key]) < 2e-5 * np.linalg.norm(exact[key]), key


def test_a_plain_graph_can_contain_weights_of_any_layout(tmp_path, capsys, monkeypatch):
    folder, out = write_model(tmp_path / "model", layout="alias"), tmp_path / "out"
    words = ["export", "--model", str(folder), "--out", str(out), "--input-tokens", "7"]
    assert main([*words, "--plain"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["prompt.npy", "score.onnx", "step.onnx"]
    monkeypatch.setattr(export, "LARGEST", 1000)
    capsys.readouterr()
    assert main([*words, "--plain"]) == 2
    assert "bytes in float32, and a graph holds at most 1,000; leave them beside it: --plain" in capsys.readouterr().err
    assert main([*words, "--plain", "beside"]) == 0
    assert (out / "model.safetensors").exists()
    assert main(["export", "--web", str(tmp_path / "web"), "--plain"]) == 2
    assert "leave out --plain" in capsys.readouterr().err
    with pytest.raises(ValueError, match="plain: expected one of inside, beside, or None, found 'no'"):
        export.export(folder, out, plain="no")


def test_the_score_equals_rank_classification(tmp_path):
    folder = write_model(tmp_path / "model")
    export.export(folder, tmp_path / "out", SHAPES)
    prompt = np.load(tmp_path / "out" / "prompt.npy")
    ids, mask, _, _ = batch(0, 384, 3, 7, 4)
    word = [9, 8, 1]
    labels, weights = np.array([[*word, 0]] * 3), np.array([[1, 1, 1, 0]] * 3, np.float32)
    found = run(
        tmp_path / "out" / "score.onnx",
        prompt=prompt, input_ids=ids, attention_mask=mask, labels=labels, weights=weights,
    )  # fmt: skip
    model = models.load(folder)
    params = nest(flatten(model.params) | {PROMPT: prompt})
    wanted = decode.ranked(params, model.config, ids, mask, *pad_labels([[word]] * 3))[:, 0]
    assert np.allclose(found["log_probability"], wanted, rtol=1e-5)


def externals(path):
    """Map the name of each external weight to its file, offset and length."""
    proto = onnx.load(path, load_external_data=False)
    return {
        x.name: {entry.key: entry.value for entry in x.external_data}
        for x in proto.graph.initializer
        if x.data_location == onnx.TensorProto.EXTERNAL
    }


@pytest.mark.parametrize("family", ["t5-1.0", "t5-1.1"])
def test_weights_are_stored_in_the_models_file_only(family, tmp_path):
    folder = write_model(tmp_path / "model", family, np.float16)
    report = export.export(folder, tmp_path / "out", SHAPES)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {Path(path).name for path in report.files}
    copy = tmp_path / "out" / "model.safetensors"
    assert copy.read_bytes() == (folder / copy.name).read_bytes()
    config = models.read_config(folder / "config.json")
    for name in ("step.onnx", "score.onnx"):
        found = externals(tmp_path / "out" / name)
        assert found.keys() == weight_shapes(config).keys()  # the table is stored once, even if it is also the head
        assert len({x["offset"] for x in found.values()}) == len(found)
        assert sum(int(x["length"]) for x in found.values()) == sum(v.size for v in weights_of(folder).values()) * 2
        assert (tmp_path / "out" / name).stat().st_size < 200_000
        proto = onnx.load(tmp_path / "out" / name, load_external_data=False)
        assert max(len(x.raw_data) for x in proto.graph.initializer) < 5000


def weights_of(folder):
    return flatten(models.load(folder).params)


def version(path):
    """Return values that change if a file or link is rewritten."""
    return path.lstat().st_ino, path.lstat().st_mtime_ns


def test_an_existing_copy_is_kept_and_another_file_is_replaced(tmp_path):
    first, second = (write_model(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two")))
    copy = tmp_path / "out" / "model.safetensors"
    export.export(first, copy.parent, SHAPES)
    before = version(copy)
    export.export(first, copy.parent, SHAPES)
    assert version(copy) == before
    export.export(second, copy.parent, SHAPES)
    assert version(copy) != before
    assert copy.read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_into_the_folder_of_the_model(layout, tmp_path):
    folder = write_model(tmp_path / "snapshots" / "0", layout=layout)
    files = models.weight_files(folder)
    before = [version(file) for file in files]
    export.export(folder, folder, SHAPES)
    ort.InferenceSession(folder / "score.onnx")
    assert ([version(file) for file in files] == before) == (layout != "cache")  # a link was replaced by a copy
    assert not any(file.is_symlink() for file in files)


def save_prompt(path, model, shape, key=PROMPT):
    delta = {key: np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    return prompts.save_prompt(Prompt(delta, model.name, model.fingerprint), path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tuned_prompt_is_written_as_npy(dtype, tmp_path):
    folder = write_model(tmp_path / "model", dtype=DTYPES[dtype])
    path = save_prompt(tmp_path / "p.safetensors", models.load(folder), (9, 20))
    report = export.export(folder, tmp_path / "out", SHAPES, prompt=path)
    written = np.load(tmp_path / "out" / "prompt.npy", allow_pickle=False)
    assert report.inputs["prompt"] == [9, 20]
    assert written.dtype == np.float32
    assert (written == prompts.load_prompt(path).params[PROMPT]).all()


def run_isolated(code, folder):
    """Run code in an interpreter without our packages; return its standard output."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", ISOLATED], input=code, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_loop_of_the_guide_needs_no_tinyprompt(tmp_path, capsys):
    """Run the command of docs/export.md with other paths, then its loop and its options."""
    command = re.search(r"^    tinyprompt (export .*)$", PAGE, re.M)[1].split()
    loop, _, _, options = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    folder = write_model(tmp_path / "model", dtype=bfloat16)
    prompt = save_prompt(tmp_path / "mine.safetensors", models.load(folder), (5, 20))
    words = [str(prompt) if word == "mine.safetensors" else word for word in command]
    assert main([*words, "--model", str(folder), "--out", str(tmp_path / "tinyprompt-export")]) == 0
    assert "labels [8, 4]" in capsys.readouterr().out
    ids, mask, _, _ = batch(0, 384, 32, 64, 4)
    labels = np.tile([9, 1, 0, 0], (32, 1))  # a learnable target
    weights = (labels > 0).astype(np.float32)
    np.savez(tmp_path / "rows.npz", input_ids=ids, attention_mask=mask, labels=labels, weights=weights)
    losses = [float(line.split()[1]) for line in run_isolated(loop, tmp_path).splitlines()]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    tuned = np.load(tmp_path / "tuned.npy")
    assert (tuned.dtype, tuned.shape) == (np.float32, (5, 20))
    opened = 'InferenceSession("tinyprompt-export/step.onnx"'
    assert opened in loop
    other = f"import onnxruntime as ort\n{options}" + loop.replace(opened, f"{opened}, options")
    assert np.allclose(float(run_isolated(other, tmp_path).split()[1]), losses[0], rtol=1e-5)


NODE = {  # the files of each package that Node needs
    npm.Package(
        "onnxruntime-common",
        "1.30.0",
        "sha512-7fdVWjAID1dVhH/G8qK3APARunV4VkBFoCQAP7qp4Wkab0mrorvmc+sqiT+mKXOzDqdjN5j+/Z9nb4gzNPWcyA==",
    ): ("package.json", "dist/esm/"),
    next(package for package in web.SCRIPTS if package.name == "onnxruntime-web"): (
        *("package.json", "dist/ort.node.min.mjs"),
        *("dist/ort-wasm-simd-threaded.mjs", "dist/ort-wasm-simd-threaded.wasm"),
    ),
}


def install(folder):
    """Install these packages like `npm install`."""
    for package, names in NODE.items():
        with tarfile.open(fileobj=io.BytesIO(npm.fetch(package)), mode="r:gz") as archive:
            members = [file for file in archive if file.name.removeprefix("package/").startswith(names)]
            for member in members:
                member.name = member.name.removeprefix("package/")
            archive.extractall(folder / "node_modules" / package.name, members, filter="data")


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_the_loop_of_the_guide_in_javascript(tmp_path):
    try:
        install(tmp_path)
    except CheckpointError as error:
        pytest.skip(f"needs the npm registry or its packages in the cache: {error}")
    shape, out = (
        export.Shape(batch_size=8, input_tokens=6, target_tokens=4, prompt_length=5),
        tmp_path / "tinyprompt-export",
    )
    export.export(write_model(tmp_path / "model"), out, shape)
    ids, mask, _, _ = batch(0, 384, 9, 6, 4)
    labels = np.tile([9, 1, 0, 0], (9, 1))
    rows = dict(input_ids=ids, attention_mask=mask, labels=labels, weights=(labels > 0).astype(np.float32))
    np.savez(tmp_path / "rows.npz", **rows)
    run_isolated("import numpy as np\n" + re.findall(r"```python\n(.*?)```", PAGE, re.S)[1], tmp_path)
    (tmp_path / "step.mjs").write_text(re.search(r"```js\n(.*?)```", PAGE, re.S)[1])
    done = subprocess.run(["node", "step.mjs"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    first = run(out / "step.onnx", prompt=np.load(out / "prompt.npy"), **{name: x[:8] for name, x in rows.items()})
    assert np.isclose(losses[0], first["loss"], rtol=1e-5)
    assert len(losses) == 100
    assert losses[-1] < 0.8 * losses[0]
    assert np.load(tmp_path / "tuned.npy").shape == (5, 20)


@pytest.mark.parametrize("name", ["tinyprompt", "torch", "transformers"])
def test_the_isolated_interpreter_refuses_our_packages(name, tmp_path):
    with pytest.raises(AssertionError, match=f"{name} is refused"):
        run_isolated(f"import {name}", tmp_path)


@pytest.mark.parametrize("name", SHAPES._fields)
@examples(5)
@given(size=st.integers(max_value=0))
def test_a_size_below_one_is_refused(name, size, tmp_path_factory):
    out = tmp_path_factory.mktemp("shape") / "out"
    with pytest.raises(ValueError, match=rf"{name}: expected at least 1, found {size}"):
        export.export(None, out, SHAPES._replace(**{name: size}))
    assert not out.exists()


def test_errors_name_the_file_and_leave_nothing(tmp_path, capsys):
    folder = write_model(tmp_path / "model")
    model = models.load(folder)
    other = models.load(write_model(tmp_path / "other", seed=1))
    cases = {
        "nowhere: no such directory": ["--model", tmp_path / "nowhere"],
        "model.safetensors: not a prompt": ["--prompt", folder / "model.safetensors"],
        "tuned on 'other'": ["--prompt", save_prompt(tmp_path / "other.safetensors", other, (5, 20))],
        "shape [5, 19], expected": ["--prompt", save_prompt(tmp_path / "wide.safetensors", model, (5, 19))],
        "found float32 of shape [20]": ["--prompt", save_prompt(tmp_path / "flat.safetensors", model, 20)],
        "found 'a'": ["--prompt", save_prompt(tmp_path / "key.safetensors", model, (5, 20), "a")],
        "config.json: is no folder": ["--out", folder / "config.json"],
        "batch_size: expected at least 1, found 0": ["--batch-size", "0"],
    }
    before = sorted(tmp_path.rglob("*"))
    for message, more in cases.items():
        call = ["export", "--model", folder, "--out", tmp_path / "out", *more]
        assert main([str(x) for x in call]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert message in err
        assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupted_export_changes_no_file(tmp_path, monkeypatch):
    first, second = (
        write_model(tmp_path / name, layout="shards", seed=seed) for seed, name in enumerate(("one", "two"))
    )
    out = tmp_path / "out"
    export.export(first, out, SHAPES)
    before = {path: path.read_bytes() for path in out.iterdir()}

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        export.export(second, out, SHAPES)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_missing_onnx_package_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(export, "version", lambda package: None)
    assert main(["export", "--out", str(tmp_path / "out")]) == 2
    assert "onnx is not installed; pip install 'tinyprompt-t5[ort]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_json_lists_files_and_inputs(tmp_path, capsys):
    folder = write_model(tmp_path / "model", layout="shards")
    assert main(["export", "--json", "--model", str(folder), "--out", str(tmp_path / "out")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == {str(path): path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert report["inputs"]["prompt"] == [100, 20]
    assert report["inputs"]["labels"] == report["inputs"]["weights"] == [8, 4]
