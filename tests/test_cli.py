"""The commands, from files to answers, with a small random model."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reference import random_weights, raw_config
from safetensors.numpy import save_file

import tinyprompt
from tinyprompt import backend, prompts, t5
from tinyprompt.cli import main

QUICK = ["--steps", "4", "--batch", "4", "--length", "5", "--eval-every", "2", "--optimizer", "adam"]
HEAVY = {"torch", "transformers", "peft", "onnx", "onnxruntime", "matplotlib", "scipy", "huggingface_hub"}


def write_model(folder, seed):
    """A model directory as Hugging Face writes it."""
    folder.mkdir()
    raw = raw_config("t5-1.1", vocab_size=384)
    flat = random_weights(t5.Config.from_dict(raw), seed)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}')
    save_file({name: value.astype("float32") for name, value in flat.items()}, folder / "model.safetensors")
    return folder


def write_rows(path, rows, names=("input", "target")):
    if path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    else:
        lines = [("," if path.suffix == ".csv" else "\t").join(row) for row in (names, *rows)]
    path.write_text("\n".join(lines))
    return str(path)


CODED = [(f"film {i}", str(i % 2)) for i in range(20)]
NAMED = [(text, {"0": "bad", "1": "good"}[code]) for text, code in CODED]
FREE = [(f"film {i}", f"answer {i}") for i in range(20)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(write_model(folder / name, seed)) for seed, name in enumerate(("one", "two"))]


@pytest.fixture(scope="module")
def prompt(models, tmp_path_factory):
    """A prompt file for the first model, tuned on label words."""
    folder = tmp_path_factory.mktemp("prompt")
    rows, out = write_rows(folder / "rows.tsv", NAMED), str(folder / "p.safetensors")
    assert main(["tune", rows, "--dev", rows, "--model", models[0], "--out", out, *QUICK]) == 0
    return out


@pytest.fixture
def call(capsys):
    """Runs a command that must succeed; returns standard output (parsed for --json) and standard error."""

    def call(*args):
        capsys.readouterr()
        assert main([str(a) for a in args]) == 0
        out, err = capsys.readouterr()
        if "--json" in args:
            assert out.count("\n") == 1
            out = json.loads(out)
            assert isinstance(out, dict)
        return out, err

    return call


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl"])
def test_tune_eval_predict_with_json(call, models, tmp_path, ending):
    rows, dev = (write_rows(tmp_path / f"{name}.{ending}", NAMED) for name in ("rows", "dev"))
    path, model = tmp_path / "new" / "p.safetensors", ("--model", models[0])
    tuned, err = call("tune", rows, "--dev", dev, "--out", path, *model, "--json", *QUICK)
    assert tuned.keys() == {"prompt", "labels", "dev", "best_step", "steps", "seconds", "device", "precision"}
    assert tuned["prompt"] == str(path)
    assert (tuned["labels"], tuned["steps"], tuned["device"]) == (["bad", "good"], 4, backend.default())
    assert "20 train rows, 20 dev rows; labels: bad, good" in err
    assert "loss" in err
    scored, _ = call("eval", path, dev, *model, "--json")
    assert (scored["metric"], scored["score"], scored["rows"]) == ("accuracy", tuned["dev"], 20)
    answered, _ = call("predict", path, "--data", dev, *model, "--json")
    assert [one["input"] for one in answered["predictions"]] == [text for text, _ in NAMED]
    hits = [one["prediction"] == target for one, (_, target) in zip(answered["predictions"], NAMED, strict=True)]
    assert sum(hits) / 20 == scored["score"]


def test_tune_eval_predict_as_text(call, models, tmp_path):
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    path, model = tmp_path / "p.safetensors", ("--model", models[0])
    out, err = call("tune", rows, "--out", path, *model, *QUICK)
    assert out.startswith("dev ")
    assert out.endswith(f"saved to {path}\n")
    assert "4 of the training rows" in err
    out, err = call("eval", path, rows, *model)
    assert out.startswith("accuracy 0.")
    assert out.endswith(" on 20 rows\n")
    assert err == f"{backend.describe(backend.default())}\n"
    out, err = call("predict", path, "a film", "two\nlines", "--device", "numpy", *model)
    assert len(out.splitlines()) == 2
    assert set(out.split()) <= {"bad", "good"}
    assert err.startswith("device: numpy")


def test_words_and_columns(call, models, tmp_path):
    rows = write_rows(tmp_path / "rows.csv", CODED, ("text", "label"))
    path = tmp_path / "p.safetensors"
    names = ("--input", "text", "--target", "label", "--words", "0=bad", "1=very good", "--model", models[0])
    tuned, _ = call("tune", rows, "--dev", rows, "--out", path, *names, "--json", *QUICK)
    assert tuned["labels"] == ["bad", "very good"]
    assert call("eval", path, rows, *names, "--json")[0]["score"] == tuned["dev"]
    out, _ = call("predict", path, "--data", rows, "--input", "text", "--model", models[0])
    assert set(out.splitlines()) <= {"bad", "very good"}


@pytest.mark.parametrize(
    ("rows", "task", "labels"),
    [
        (NAMED, "auto", ["bad", "good"]),
        (FREE, "auto", None),
        (NAMED, "generate", None),
        (FREE, "classify", sorted(target for _, target in FREE)),
    ],
)
def test_labels_or_free_text(call, models, tmp_path, rows, task, labels):
    data, path = write_rows(tmp_path / "rows.tsv", rows), tmp_path / "p.safetensors"
    model = ("--model", models[0])
    tuned, err = call(
        "tune", data, "--dev", data, "--out", path, "--task", task, "--max-target", 3, *model, "--json", *QUICK
    )
    assert tuned["labels"] == labels
    assert ("free text" in err) == (labels is None)
    assert call("eval", path, data, *model, "--json")[0]["metric"] == ("accuracy" if labels else "exact match")
    answers = call("predict", path, "film 1", *model, "--json")[0]["predictions"]
    assert len(answers) == 1
    assert labels is None or answers[0]["prediction"] in labels
    assert labels or len(answers[0]["prediction"]) <= 3


def test_predict_reads_a_file_arguments_or_standard_input(call, models, prompt, tmp_path, monkeypatch):
    texts = [text for text, _ in NAMED]
    data = write_rows(tmp_path / "only.tsv", [(text,) for text in texts], ("input",))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts) + "\n\n"))
    outs = [call("predict", prompt, *more, "--model", models[0])[0] for more in ([], texts, ["--data", data])]
    assert outs[0] == outs[1] == outs[2]
    assert outs[0].count("\n") == 20


def test_a_tuned_prompt_starts_another_run(call, models, prompt, tmp_path):
    rows, path = write_rows(tmp_path / "rows.tsv", NAMED), tmp_path / "p.safetensors"
    more = ("--init", "file", "--init-file", prompt, "--model", models[0], "--out", path)
    call("tune", rows, *more, *QUICK)
    assert prompts.load_prompt(path).settings["init_file"] == prompt


@pytest.fixture
def fails(capsys, tmp_path):
    """Runs a command that must fail and write nothing; returns the one line it says, `told`: after its progress."""

    def fails(*args, told=False):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main([str(a) for a in args]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before
        *others, last = err.splitlines()
        assert bool(others) == told, err
        assert [line for line in (*others, last) if line.startswith("tinyprompt: ")] == [last]
        return last

    return fails


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target", "label"], "row 2: no column 'label'"),
        (["--words", "bad=0"], "row 3: target 'good' has no label word"),
        (["--words", "bad"], "--words 'bad': expected TARGET=WORD"),
        (["--words", "bad= ", "good=1"], "--words 'bad= ': expected TARGET=WORD"),
        (["--dev", "no.tsv"], "no.tsv: no such file"),
        (["--model", "nowhere"], "nowhere: no such directory"),
        (["--steps", "0"], "setting steps: expected at least 1"),
        (["--optimizer", "sgd"], "setting optimizer"),
        (["--schedule", "cosine"], "setting schedule"),
        (["--seed", "-1"], "setting seed"),
    ],
)
def test_tune_fails_in_one_line(fails, models, tmp_path, more, message):
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    assert message in fails("tune", rows, "--model", models[0], "--out", tmp_path / "p.safetensors", *QUICK, *more)


def test_tune_says_what_it_does_before_it_fails(fails, models, tmp_path):
    more = ("--model", models[0], "--out", tmp_path / "p.safetensors", *QUICK)
    rows, dev = write_rows(tmp_path / "rows.tsv", NAMED), write_rows(tmp_path / "dev.tsv", [("film", "fair")])
    assert "target 'fair'" in fails("tune", rows, "--dev", dev, *more, told=True)
    one = write_rows(tmp_path / "one.tsv", NAMED[:1])
    assert "0 train rows and 1 dev rows" in fails("tune", one, *more, told=True)


@pytest.mark.parametrize("command", [("eval", "{rows}"), ("predict", "a film")])
def test_eval_and_predict_fail_in_one_line(fails, models, prompt, tmp_path, command):
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    name, last = command[0], command[1].format(rows=rows)
    text, empty, wrong = (tmp_path / f"{kind}.safetensors" for kind in ("text", "empty", "wrong"))
    text.write_text("This is no prompt.")
    empty.touch()
    wrong.write_bytes((10).to_bytes(8, "little") + b'{"a":true}')
    weights = Path(models[0], "model.safetensors")
    for path in (text, empty, wrong, weights):
        assert f"{path}: not a" in fails(name, path, last, "--model", models[0])
    assert f"{tmp_path}/no: no such file" in fails(name, tmp_path / "no", last, "--model", models[0])
    assert "tuned on 'one'" in fails(name, prompt, last, "--model", models[1])


def test_bad_rows_fail_in_one_line(fails, models, prompt, tmp_path, monkeypatch):
    model = ("--model", models[0])
    rows = write_rows(tmp_path / "rows.tsv", NAMED, ("text", "label"))
    assert "row 2: no column 'input'" in fails("eval", prompt, rows, *model)
    assert "row 2: no column 'input'" in fails("predict", prompt, "--data", rows, *model)
    assert "no.csv: no such file" in fails("eval", prompt, "no.csv", *model)
    other = write_rows(tmp_path / "other.tsv", FREE)
    assert "target 'answer 0' is no label word of the prompt (bad, good)" in fails("eval", prompt, other, *model)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "nothing to predict" in fails("predict", prompt, *model)


def test_an_output_that_is_a_directory_fails_before_the_training(fails, models, tmp_path):
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    message = fails("tune", rows, "--model", models[0], "--out", tmp_path, *QUICK)
    assert f"{tmp_path}: is a directory" in message


def test_bad_arguments_and_the_version(capsys):
    for args, status in ((["tune"], 2), (["learn"], 2), (["tune", "a.tsv", "--steps", "many"], 2), (["--version"], 0)):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == status
    assert capsys.readouterr().out == tinyprompt.__version__ + "\n"


def python(*args, cwd):
    """Runs this Python elsewhere than in the repository, with the package under test."""
    env = os.environ | {"PYTHONPATH": str(Path(tinyprompt.__file__).parents[1])}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=True)


def test_the_package_imports_nothing_heavy(tmp_path):
    told = python("-X", "importtime", "-c", "import tinyprompt, tinyprompt.cli", cwd=tmp_path).stderr
    imported = {line.split("|")[-1].strip().split(".")[0] for line in told.splitlines()}
    assert {"tinyprompt", "numpy", "autograd"} <= imported
    assert not imported & HEAVY


@pytest.mark.parametrize("device", backend.DEVICES[:2])
def test_nothing_at_run_time_imports_torch(models, tmp_path, device):
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    command = ["-m", "tinyprompt", "tune", rows, "--dev", rows, "--model", models[0], "--device", device, *QUICK]
    told = python("-X", "importtime", *command, cwd=tmp_path).stderr
    imported = {line.split("|")[-1].strip().split(".")[0] for line in told.splitlines()}
    assert "autograd" in imported
    assert not imported & (HEAVY - ({"onnx", "onnxruntime"} if device == "cpu" else set()))


def test_the_demo_learns(tmp_path):
    done = python("-m", "tinyprompt", "demo", "--json", "--out", "out", cwd=tmp_path)
    out = json.loads(done.stdout)
    assert out.keys() >= {"majority", "unprompted", "tuned", "seconds", "device", "prompt"}
    assert all(0 <= out[name] <= 1 for name in ("majority", "unprompted", "tuned"))
    assert (tmp_path / out["prompt"]).is_file()
    assert out["seconds"] > 0
    assert out["device"] == backend.default()
    assert out["majority"] == 0.2
    assert out["tuned"] >= out["majority"] + 0.25
    assert out["tuned"] > out["unprompted"]
