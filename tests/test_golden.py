"""Golden files: they are reproducible, agree with transformers, and the judge reports the first fault."""

import ctypes
import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_export import install

from tinyprompt.cli.main import main
from tinyprompt.device import default_device, version
from tinyprompt.errors import CheckpointError
from tinyprompt.export import embedded, graphs
from tinyprompt.files import models, safetensors
from tinyprompt.golden import judge, suite

# SHA-256 of the weights and batches of golden 1, which never change; a new suite needs a new number.
DIGEST = "82b7a20f82ae7a2012e3adf9181b9d3f9b964a6713e9fa0df7a927b2b87742ca"
# Loss, and norm of the table's gradient, for each batch.
NUMBERS = {
    ("t5-1.0", "plain"): (3.808507412283116, 0.6575033614974194),
    ("t5-1.0", "holes"): (4.32305852320553, 0.9607076650363096),
    ("t5-1.0", "long"): (4.13070510967623, 0.8666793796343616),
    ("t5-1.1", "plain"): (4.105874625055526, 0.6907634160685711),
    ("t5-1.1", "holes"): (4.584768231999257, 0.6586395253143811),
    ("t5-1.1", "long"): (4.4376653081123205, 1.1480000554634147),
    ("mt5", "plain"): (3.6538890160618718, 0.6000818020551965),
    ("mt5", "holes"): (4.081130491606179, 0.6682799910321446),
    ("mt5", "long"): (4.4915743633354, 0.869710167294625),
    ("umt5", "plain"): (4.367519345081236, 1.232049539432817),
    ("umt5", "holes"): (4.324379075199338, 0.8035704686239498),
    ("umt5", "long"): (5.0359616857113565, 0.8655049186932978),
    ("byt5", "plain"): (4.321849505942083, 0.6326744462532323),
    ("byt5", "holes"): (4.4793847446114725, 0.7066336516313491),
    ("byt5", "long"): (4.760726570309949, 0.4664291228997905),
}
BATCHES = [(name, kind) for name in suite.FAMILIES for kind in suite.MASKS]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Write a suite with the command."""
    folder = tmp_path_factory.mktemp("golden") / "suite"
    assert main(["golden", str(folder)]) == 0
    return folder


def arrays(path):
    return safetensors.read_tensors(path, None, safetensors.WITH_IDS)[0]


def save(folder, name, values):
    path = folder / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(suite.saved(values))


def copy_of(golden, theirs, name, **changes):
    """Copy the results of one batch with some arrays replaced, or removed by None."""
    values = arrays(golden / f"{name}.safetensors") | {key.replace("__", "."): x for key, x in changes.items()}
    save(theirs, name, {key: x for key, x in values.items() if x is not None})
    return theirs


def verdict(theirs, golden):
    (found,) = judge.judge(theirs, golden).verdicts
    return found


def test_the_suite_is_reproducible(golden):
    files = suite.files()
    there = {path.relative_to(golden).as_posix(): path.read_bytes() for path in golden.rglob("*") if path.is_file()}
    assert there == files
    assert sum(map(len, files.values())) < 5_000_000


def test_weights_and_batches_equal_golden_1(golden):
    digest, count = hashlib.sha256(), 0
    for path in sorted(golden.rglob("*.safetensors")):
        if path.name.startswith("model") or ".input" in path.name:
            digest.update(path.read_bytes())
            count += 1
    assert (suite.VERSION, count, digest.hexdigest()) == (1, 20, DIGEST)


@pytest.mark.parametrize(("name", "kind"), BATCHES)
def test_results_equal_golden_1(name, kind, golden):
    found = arrays(golden / name / f"{kind}.safetensors")
    numbers = float(found["loss"]), float(np.linalg.norm(found["gradient.shared.weight"]))
    assert np.allclose(numbers, NUMBERS[name, kind], rtol=1e-12, atol=0)


def test_dimensions_differ_and_every_result_is_listed(golden):
    for name, kind in BATCHES:
        found, index = (
            arrays(golden / name / f"{kind}.safetensors"),
            json.loads((golden / name / "index.json").read_text()),
        )
        assert sorted(index["order"][kind]) == sorted(found)
        for key in ("logits", "encoder.block.0.layer.1.hidden", "decoder.block.0.layer.1.attention_weights"):
            assert len(set(found[key].shape)) == found[key].ndim
        weights = models.load(golden / name, tokenizer=False).params
        assert (
            len({n for x in (weights["shared"]["weight"], found["encoder.block.0.layer.1.hidden"]) for n in x.shape})
            == 5
        )


def test_batches_have_the_documented_properties(golden):
    ends = []
    for name, kind in BATCHES:
        inputs = arrays(golden / name / f"{kind}.input.safetensors")
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        assert (ids[mask == 0] == 0).all() == (kind == "plain")
        assert ("prompt" in inputs) == (kind != "plain")
        assert (mask.shape[1] > suite.SHAPE["relative_attention_max_distance"]) == (kind == "long")
        assert (np.diff(mask, axis=1) > 0).any() == (kind != "plain")
        ends.append((arrays(golden / name / f"{kind}.safetensors")["greedy"] == 1).any())
    assert 3 <= sum(ends) < len(ends)


def test_generated_texts_do_not_depend_on_rounding(golden):
    """Weights that change by more than the rounding of float32 generate the same texts."""
    rng = np.random.default_rng(0)
    for name in suite.FAMILIES:
        case = suite.draw(name)
        near = {key: x * (1 + 1e-5 * rng.uniform(-1, 1, x.shape)) for key, x in case.weights.items()}
        for kind in suite.MASKS:
            found, wanted = (
                suite.results(case._replace(weights=near), kind),
                arrays(golden / name / f"{kind}.safetensors"),
            )
            assert (found["greedy"] == wanted["greedy"]).all(), (name, kind)
            assert (found["beam"] == wanted["beam"]).all(), (name, kind)


DEVICES = ["numpy", pytest.param("cpu", marks=pytest.mark.skipif(default_device() == "numpy", reason="needs onnx"))]


@pytest.mark.parametrize("device", DEVICES)
def test_our_float32_passes(device, golden, tmp_path):
    for name, kind in BATCHES:
        save(tmp_path, f"{name}/{kind}", suite.results(suite.draw(name), kind, device, np.float32))
    report = assert_right(tmp_path, golden)
    assert [found.missing for found in report.verdicts] == [[]] * len(BATCHES)


def exported(golden, name, kind, plain):
    """Export the training step for a batch; return the graph and its inputs."""
    given = arrays(golden / name / f"{kind}.input.safetensors")
    inputs = {key: given[key] for key in ("prompt", "input_ids", "attention_mask", "labels", "weights")}
    model = models.load(golden / name, tokenizer=False)
    return graphs.onnx_file(graphs.step, inputs, model, {}, plain=plain), inputs


def assert_right(theirs, golden):
    """Judge results in float32; return the report."""
    report = judge.judge(theirs, golden)
    assert report.ok, str(report)
    assert all(1e-8 < found.worst < 3e-5 for found in report.verdicts)
    return report


@pytest.mark.slow
@pytest.mark.skipif(
    not (version("emx-onnx-cgen") and shutil.which("cc")), reason="needs a C compiler and emx-onnx-cgen"
)
@pytest.mark.parametrize("name", suite.FAMILIES)
def test_the_generated_c_passes(name, golden, tmp_path):
    graph, inputs = exported(golden, name, "holes", plain=True)
    source, weights = embedded.translated("step", graph)
    (tmp_path / "step.c").write_text(source)
    (tmp_path / "step.bin").write_bytes(weights)
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", tmp_path / "step.so", tmp_path / "step.c", "-lm"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(tmp_path / "step.so"))
    library.step_load.restype = ctypes.c_bool
    assert library.step_load(str(tmp_path / "step.bin").encode())
    outputs = np.zeros((), np.float32), np.zeros_like(inputs["prompt"])
    pointers = [np.ascontiguousarray(x).ctypes.data_as(ctypes.c_void_p) for x in (*inputs.values(), *outputs)]
    library.step(*pointers)
    save(tmp_path, f"{name}/holes", {"loss": outputs[0], "gradient.prompt": outputs[1]})
    assert_right(tmp_path, golden)


STEPS = """
import * as ort from "onnxruntime-web";
import { readFileSync } from "node:fs";
ort.env.wasm.numThreads = 1;
const found = {};
for (const [name, inputs] of Object.entries(JSON.parse(readFileSync("inputs.json")))) {
  const session = await ort.InferenceSession.create(readFileSync(`${name}.onnx`));
  const tensor = ([type, values, shape]) => new ort.Tensor(type, type === "int64" ? values.map(BigInt) : values, shape);
  const feeds = Object.fromEntries(Object.entries(inputs).map(([key, value]) => [key, tensor(value)]));
  const { loss, gradient } = await session.run(feeds);
  found[name] = [[...loss.data], [...gradient.data]];
}
console.log(JSON.stringify(found));
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_the_runtime_of_the_page_passes(golden, tmp_path):
    try:
        install(tmp_path)
    except CheckpointError as error:
        pytest.skip(f"needs the npm registry or its packages in the cache: {error}")
    asked, shapes = {}, {}
    for name in suite.FAMILIES:
        graph, inputs = exported(golden, name, "holes", plain=False)
        (tmp_path / f"{name}.onnx").write_bytes(graph)
        asked[name] = {key: [str(x.dtype), x.ravel().tolist(), x.shape] for key, x in inputs.items()}
        shapes[name] = inputs["prompt"].shape
    (tmp_path / "inputs.json").write_text(json.dumps(asked))
    (tmp_path / "steps.mjs").write_text(STEPS)
    done = subprocess.run(["node", "steps.mjs"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    for name, (loss, gradient) in json.loads(done.stdout.splitlines()[-1]).items():
        values = {"loss": loss[0], "gradient.prompt": np.reshape(gradient, shapes[name])}
        save(tmp_path / "theirs", f"{name}/holes", {key: np.asarray(x, np.float32) for key, x in values.items()})
    assert_right(tmp_path / "theirs", golden)


@pytest.mark.slow
@pytest.mark.parametrize("name", suite.FAMILIES)
def test_transformers_passes(name, golden, tmp_path):
    torch = pytest.importorskip("torch", reason="the reference needs torch: pip install '.[test]'")
    from reference import check_torch, hugging_face

    case = suite.draw(name)
    raw = {key: x for key, x in case.raw.items() if key not in ("dropout_rate", "decoder_start_token_id")}
    model = hugging_face(raw, {key: x.astype(np.float64) for key, x in case.weights.items()})
    model.set_attn_implementation("eager")
    for kind, inputs in case.batches.items():
        given = {key: torch.from_numpy(x) for key, x in inputs.items()}
        weights, prompt = given.pop("weights").double(), given.pop("prompt", torch.zeros(0, 14)).double()
        prompt.requires_grad_()
        model.zero_grad()
        loss, _ = check_torch.loss_and_logits(model, prompt, **given, weights=weights)
        loss.backward()
        table = "lm_head.weight" if not case.config.tied_head else "shared.weight"
        out = {f"gradient.{key}": x.grad.clone() for key, x in model.named_parameters() if key in case.weights}
        assert f"gradient.{table}" in out
        ids, labels = given["input_ids"], given["labels"]
        embedded = torch.cat([prompt.expand(len(ids), -1, -1), model.shared(ids)], 1)
        mask = torch.cat([torch.ones(len(ids), len(prompt), dtype=torch.int64), given["attention_mask"]], 1)
        start = torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], 1)
        seen = model(
            inputs_embeds=embedded, attention_mask=mask, decoder_input_ids=start, use_cache=False,
            output_hidden_states=True, output_attentions=True,
        )  # fmt: skip
        out |= {"loss": loss, "logits": seen.logits}
        for part, last in (("encoder", 1), ("decoder", 2)):
            states, rows = getattr(seen, f"{part}_hidden_states"), getattr(seen, f"{part}_attentions")
            names = [f"block.{i}.layer.{last}.hidden_states" for i in range(len(states) - 2)]
            out |= {f"{part}.{at}": x for at, x in zip(["embedding", *names, "final"], states, strict=True)}
            out |= {f"{part}.block.{i}.layer.0.attention_weights": x for i, x in enumerate(rows)}
        out |= {f"decoder.block.{i}.layer.1.attention_weights": x for i, x in enumerate(seen.cross_attentions)}
        for key, beams in (("greedy", 1), ("beam", 3)):
            found = model.generate(
                inputs_embeds=embedded, attention_mask=mask, max_new_tokens=8, num_beams=beams, length_penalty=1.0,
                early_stopping=False, do_sample=False,
            )[:, 1:]  # fmt: skip
            out[key] = torch.nn.functional.pad(found, (0, 8 - found.shape[1]))
        if kind != "plain":
            out["gradient.prompt"], free = prompt.grad.clone(), prompt.detach().clone().requires_grad_()
            adam = torch.optim.Adam([free], lr=0.03)
            for step in range(1, 11):
                adam.zero_grad()
                check_torch.loss_and_logits(model, free, **given, weights=weights)[0].backward()
                adam.step()
                out[f"adam.{step}"] = free.detach().clone()
        save(tmp_path, f"{name}/{kind}", {key: x.detach().numpy() for key, x in out.items()})
    report = judge.judge(tmp_path, golden)
    assert report.ok, str(report)
    assert all(found.right > 50 for found in report.verdicts)


def test_the_first_fault_in_the_order_of_computation_is_named(golden, tmp_path, capsys):
    right = arrays(golden / "umt5" / "holes.safetensors")
    late, early = "encoder.block.1.layer.0.hidden_states", "encoder.block.0.layer.1.hidden"
    last = "gradient.lm_head.weight"
    wrong = {name.replace(".", "__"): right[name] * 1.01 for name in (last, "logits", late, early)}
    copy_of(golden, tmp_path, "umt5/holes", **wrong)
    assert main(["golden", "--judge", str(tmp_path), str(golden)]) == 1
    out = capsys.readouterr().out
    assert f"umt5/holes.safetensors: WRONG: first {early}: relative error 1.0e-02, at most 1e-09 in float64" in out
    assert f"also wrong: 3 arrays: {late}, logits, {last}" in out
    assert main(["golden", "--judge", str(tmp_path), str(golden), "--json"]) == 1
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert [fault["name"] for fault in file["faults"]] == [early, late, "logits", last]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(loss=np.full((), np.nan)), "contains NaN or infinity"),
        (dict(logits=np.zeros((4, 41, 6))), r"shape \[4, 41, 6\], expected \[4, 6, 41\]"),
        (dict(logitz=np.zeros(2)), "is not an array of the suite"),
        (dict(greedy=np.zeros((4, 8), np.int64)), "of the ids differ"),
        (dict(loss=np.full((), 3.0, np.float32)), "at most 1e-04 in float32"),
        (dict(loss=np.full((), 9.0, np.float16)), "at most 1e-01 in float16"),
    ],
)
def test_each_fault_is_described(change, message, golden, tmp_path):
    (fault,) = verdict(copy_of(golden, tmp_path, "mt5/holes", **change), golden).faults
    assert fault.name in change
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(fault.told)


def test_padding_of_the_encoder_is_not_compared(golden, tmp_path):
    mask = arrays(golden / "mt5" / "holes.input.safetensors")["attention_mask"]
    hidden, weights = "encoder.final", "encoder.block.1.layer.0.attention_weights"
    right = arrays(golden / "mt5" / "holes.safetensors")
    padded = np.concatenate([np.ones((4, 7)), mask], 1) == 0
    assert padded.any()
    other = {hidden: np.where(padded[:, :, None], np.nan, right[hidden])}
    other[weights] = np.where(padded[:, None, :, None], 7, right[weights])
    changes = {name.replace(".", "__"): x for name, x in other.items()}
    assert not verdict(copy_of(golden, tmp_path, "mt5/holes", **changes), golden).faults
    changes["encoder__final"] = np.where(padded[:, :, None], right[hidden], right[hidden] + 1)
    assert verdict(copy_of(golden, tmp_path, "mt5/holes", **changes), golden).faults[0].name == hidden


def test_ids_after_the_end_of_a_text_are_not_compared(golden, tmp_path):
    ids = arrays(golden / "mt5" / "holes.safetensors")["beam"].copy()
    ended = np.cumsum(ids == 1, 1) - (ids == 1) > 0
    assert ended.any()
    assert not verdict(copy_of(golden, tmp_path, "mt5/holes", beam=np.where(ended, 9, ids)), golden).faults
    ids[ids == 1] = 9
    assert verdict(copy_of(golden, tmp_path, "mt5/holes", beam=ids), golden).faults


def test_a_subset_of_the_arrays_is_accepted(golden, tmp_path, capsys):
    save(tmp_path, "t5-1.0/plain", {"loss": arrays(golden / "t5-1.0" / "plain.safetensors")["loss"].astype(np.float32)})
    assert main(["golden", "--judge", str(tmp_path)]) == 0  # without a suite, the judge computes it
    out = capsys.readouterr().out
    assert "right: 1 arrays" in out
    assert "not given: 74 arrays: encoder.embedding" in out


def test_a_file_with_an_unknown_name_is_a_fault(golden, tmp_path):
    copy_of(golden, tmp_path, "mt5/holes")
    shutil.copy(tmp_path / "mt5" / "holes.safetensors", tmp_path / "mt5" / "hole.safetensors")
    report = judge.judge(tmp_path, golden)
    assert not report.ok
    assert [found.file for found in report.verdicts if found.faults] == ["mt5/hole.safetensors"]


def test_errors_name_the_file(golden, tmp_path, capsys):
    def error_of(*words):
        assert main(["golden", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "not empty; name a new folder" in error_of(golden)
    assert "nowhere: expected files such as t5-1.0/plain.safetensors" in error_of("--judge", tmp_path / "nowhere")
    copy_of(golden, tmp_path / "mine", "mt5/holes")
    assert "none/mt5/index.json: no such file" in error_of("--judge", tmp_path / "mine", tmp_path / "none")
    shutil.copytree(golden, tmp_path / "old")
    index = tmp_path / "old" / "mt5" / "index.json"
    index.write_text(index.read_text().replace('"golden": 1', '"golden": 0'))
    assert "the suite has version 0, but this program expects version 1" in error_of(
        "--judge", tmp_path / "mine", tmp_path / "old"
    )
    (tmp_path / "mine" / "mt5" / "holes.safetensors").write_bytes(b"12345678")
    assert "mt5/holes.safetensors: not a safetensors file" in error_of("--judge", tmp_path / "mine", golden)


def compiled(folder):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    words = [compiler, "-Wall", "-Wextra", "-Werror", "-O1", "-o", folder / "read", folder / "read.c"]
    subprocess.run(words, check=True)
    return [folder / "read"]


READERS = {
    "python": lambda folder: [sys.executable, "-I", "-S", folder / "read.py"],
    "c": compiled,
    "javascript": lambda folder: ["node", folder / "read.mjs"],
}


@pytest.mark.parametrize("language", READERS)
def test_the_readers_read_every_file(language, golden):
    if language == "javascript" and shutil.which("node") is None:
        pytest.skip("needs Node")
    command = READERS[language](golden)
    for path in (golden / "umt5").glob("*.safetensors"):
        done = subprocess.run([*command, path], capture_output=True, text=True, check=True)
        found = {}
        for line in done.stdout.splitlines():
            name, kind, rest = line.split(" ", 2)
            shape, total = rest.rsplit(" ", 1)
            found[name] = kind, json.loads(shape), float(total)
        wanted = arrays(path)
        assert found.keys() == wanted.keys()
        for name, x in wanted.items():
            kind, shape, total = found[name]
            assert safetensors.WITH_IDS[kind] == x.dtype
            assert shape == list(x.shape)
            assert np.isclose(total, x.sum(dtype=np.float64), rtol=1e-9, atol=1e-9)
