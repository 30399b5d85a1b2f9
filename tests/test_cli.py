"""The commands on a small random model."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_models import random_weights, raw_config
from safetensors.numpy import save_file

import tinyprompt
from tinyprompt import assess, train
from tinyprompt.cli.main import main
from tinyprompt.device import default_device, describe_device
from tinyprompt.files import models as model_files
from tinyprompt.files import prompts
from tinyprompt.files.config import parse_config
from tinyprompt.model import PROMPT
from tinyprompt.tokenizer import ByteTokenizer

QUICK = ["--steps", "4", "--batch-size", "4", "--prompt-length", "5", "--eval-every", "2", "--optimizer", "adam"]
HEAVY = {"torch", "transformers", "peft", "onnx", "onnxruntime", "matplotlib", "scipy", "huggingface_hub"}
HEAVY |= {"joblib", "dask", "distributed", "ray", "sklearn"}


def write_model(folder, seed):
    """Write a model directory as Hugging Face does."""
    folder.mkdir()
    raw = raw_config("t5-1.1", vocab_size=384)
    flat = random_weights(parse_config(raw), seed)
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
    """Tune a prompt on label words for the first model; return its file."""
    folder = tmp_path_factory.mktemp("prompt")
    rows, out = write_rows(folder / "rows.tsv", NAMED), str(folder / "p.safetensors")
    assert main(["tune", rows, "--dev", rows, "--model", models[0], "--out", out, *QUICK]) == 0
    return out


@pytest.fixture
def call(capsys):
    """Return a function that runs a command successfully and returns stdout (parsed for --json) and stderr."""

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
    keys = {"prompt", "label_words", "verbalizer", "dev", "best_step", "steps", "seconds", "device", "baselines"}
    assert tuned.keys() == keys
    baselines = tuned["baselines"]
    assert list(baselines) == ["majority class", "frozen model, no prompt", "bag of words", "tuned prompt"]
    assert baselines["tuned prompt"] == {"value": tuned["dev"], "rows": 20}
    assert baselines["majority class"]["value"] == 0.5
    assert tuned["prompt"] == str(path)
    assert (tuned["label_words"], tuned["steps"], tuned["device"]) == (["bad", "good"], 4, default_device())
    assert "20 train rows, 20 dev rows; labels: bad, good" in err
    assert "loss" in err
    scored, _ = call("eval", path, dev, *model, "--json")
    assert (scored["metric"], scored["score"], scored["rows"]) == ("accuracy", tuned["dev"], 20)
    answered, _ = call("predict", path, "--data", dev, *model, "--json")
    assert [answer["input"] for answer in answered["predictions"]] == [text for text, _ in NAMED]
    hits = [answer["prediction"] == target for answer, (_, target) in zip(answered["predictions"], NAMED, strict=True)]
    assert sum(hits) / 20 == scored["score"]


def test_dev_rows_of_one_label_cause_a_warning(call, models, tmp_path):
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    dev = write_rows(tmp_path / "dev.tsv", [row for row in NAMED if row[1] == "good"])
    _, err = call("tune", rows, "--dev", dev, "--out", tmp_path / "p.safetensors", "--model", models[0], *QUICK)
    assert "warning: all 10 dev rows have the target 'good'; a dev score says little" in err


def test_tune_eval_predict_as_text(call, models, tmp_path):
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    path, model = tmp_path / "p.safetensors", ("--model", models[0])
    out, err = call("tune", rows, "--out", path, *model, *QUICK)
    assert out.startswith("dev ")
    assert f"saved to {path}\naccuracy on 4 dev rows" in out
    assert "4 of the training rows" in err
    out, err = call("eval", path, rows, *model)
    assert re.match(r"accuracy 0\.\d+ on 20 rows\n  majority of these rows    0\.500 \+- 0\.112\n", out)
    assert re.search(r"\nmacro F1 0\.\d+: bad 0\.\d+, good 0\.\d+\nrows by target and answer\n", out)
    assert err == f"{describe_device(default_device())}\n"
    out, err = call("predict", path, "a film", "two\nlines", "--device", "numpy", *model)
    assert len(out.splitlines()) == 2
    assert set(out.split()) <= {"bad", "good"}
    assert err.startswith("device: numpy")


def test_predict_applies_the_decoding_options(call, fails, models, prompt, tmp_path):
    rows, path, model = write_rows(tmp_path / "rows.tsv", FREE), tmp_path / "p.safetensors", ("--model", models[0])
    call("tune", rows, "--dev", rows, "--out", path, *model, "--max-new-tokens", "6", "--task", "generate", *QUICK)
    short, _ = call("predict", path, "a film", "two films", *model)
    assert call("predict", path, "a film", "two films", *model, "--stream")[0] == short
    longer, _ = call("predict", path, "a film", "two films", *model, "--max-new-tokens", "20")
    assert all(new.startswith(old) for old, new in zip(short.split("\n"), longer.split("\n"), strict=True))
    assert longer != short
    assert call("predict", path, "a film", *model, "--num-beams", "3", "--length-penalty", "0.5")[0]
    call("eval", path, rows, *model, "--num-beams", "2", "--max-new-tokens", "3")
    for wrong in (("--json",), ("--num-beams", "2")):
        assert "--stream: needs free text" in fails("predict", path, "a film", *model, "--stream", *wrong)
    assert "--stream: needs free text" in fails("predict", prompt, "a film", *model, "--stream")
    assert "setting num_beams: expected 1 to 100, found 0" in fails(
        "predict", path, "a film", *model, "--num-beams", "0"
    )


BAD_TEMPLATES = (
    "{input} {answer}",
    "{target} {input}",
    "{target} {input} {target}",
    "{input}",
    "{input} {input} {target}",
)


def test_examples_in_the_input_replace_a_prompt(call, fails, models, tmp_path):
    train, test = (write_rows(tmp_path / f"{name}.tsv", rows) for name, rows in [("a", NAMED), ("b", NAMED[:3])])
    options = ("--model", models[0], "--device", "numpy")
    out, _ = call("few-shot", train, test, *options, "--k", "2", "--seed", "1", "--json")
    assert out.keys() == {"metric", "score", "scores", "rows", "k", "seed", "first"}
    assert out["metric"] == "accuracy"
    first, second, last = out["first"].split("\n")
    assert last == "film 0 answer:"
    solved = [f"{text} answer: {target}" for text, target in NAMED]
    assert first != second
    assert {first, second} <= set(solved)
    again, _ = call("few-shot", train, test, *options, "--k", "2", "--seed", "1", "--json")
    assert again == out
    other, _ = call("few-shot", train, test, *options, "--k", "2", "--seed", "2", "--json")
    assert other["first"] != out["first"]
    out, _ = call("few-shot", train, test, *options, "--k", "0", "--template", "Q {input} A {target}!")
    assert out.splitlines()[-1] == "Q film 0 A"
    odd = write_rows(tmp_path / "odd.tsv", [("is {target} or {input} here", "good"), ("no", "bad")] * 5)
    out, _ = call("few-shot", odd, odd, *options, "--k", "10", "--max-input-tokens", "999", "--json")
    assert "is {target} or {input} here answer: good\n" in out["first"]
    out, _ = call("few-shot", train, test, *options, "--task", "generate", "--max-new-tokens", "2", "--json")
    assert out["metric"] == "exact match"
    other = write_rows(tmp_path / "c.tsv", FREE)
    assert "target 'answer 0' is not a label word (bad, good)" in fails("few-shot", train, other, *options)
    for more, message in [
        (("--k", "2", "--max-input-tokens", "40"), "examples, but only 40 are read; use fewer or shorter examples, or"),
        (("--k", "21"), "20 rows, expected at least --k 21"),
        (("--k", "-1"), "--k: expected 0 or more, found -1"),
        (("--seed", "-1"), "setting seed: expected 0 or more, found -1"),
        (("--task", "nonsense"), "task 'nonsense': expected one of auto, classify, generate, boolq"),
        (("--task", "boolq,cb"), "--task boolq,cb: expected one task"),
        *((("--template", t), "expected {input} once, and {target} once after it") for t in BAD_TEMPLATES),
    ]:
        assert message in fails("few-shot", train, test, *options, *more)


def test_texts_may_follow_the_options(call, models, prompt, capsys):
    texts = ("film 1", "film 2")
    before, _ = call("predict", prompt, *texts, "--model", models[0], "--json")
    assert call("predict", prompt, "--model", models[0], "--json", *texts)[0] == before
    for words in [("predict", prompt, "--wrong", "film 1"), ("eval", prompt, "a.tsv", "--model", models[0], "b.tsv")]:
        with pytest.raises(SystemExit):
            main(list(words))
        assert "unrecognized arguments: " in capsys.readouterr().err


def test_arrays_of_another_method_are_refused_where_a_prompt_is_needed(call, fails, models, tmp_path):
    rows, out, model = write_rows(tmp_path / "rows.tsv", NAMED), tmp_path / "lora.safetensors", ("--model", models[0])
    lora = ("--method", "lora", "--rank", "2")
    call("tune", rows, "--dev", rows, "--out", out, *model, *lora, *QUICK[:4], *QUICK[6:])
    assert call("eval", out, rows, *model, "--json")[0]["metric"] == "accuracy"
    found = "expected a soft prompt, 'encoder.prompt.embedding' only; found '"
    message = "method 'lora' needs a name that ends in .safetensors"
    assert message in fails("tune", rows, "--out", tmp_path / "x.npy", *model, *lora)
    assert found in fails("convert", out, tmp_path / "x.npy")
    call("convert", out, tmp_path / "adapter")  # in PEFT's format
    assert prompts.load_prompt(tmp_path / "adapter").settings["method"] == "lora"
    assert "lora.safetensors: lora, " in call("inspect", out)[0]
    assert found in fails("export", *model, "--prompt", out, "--out", tmp_path / "exported")
    first = ("--method", "ia3", "--init", "file", "--init-file", str(out))
    assert "method 'ia3' does not train a prompt" in fails("tune", rows, *model, *first, after_progress=True)


def test_tune_takes_words_and_column_names(call, models, tmp_path):
    rows = write_rows(tmp_path / "rows.csv", CODED, ("text", "label"))
    path = tmp_path / "p.safetensors"
    names = ("--input", "text", "--target", "label", "--words", "0=bad", "1=very good", "--model", models[0])
    tuned, _ = call("tune", rows, "--dev", rows, "--out", path, *names, "--json", *QUICK)
    assert tuned["label_words"] == ["bad", "very good"]
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
def test_the_task_decides_between_labels_and_free_text(call, models, tmp_path, rows, task, labels):
    data, path = write_rows(tmp_path / "rows.tsv", rows), tmp_path / "p.safetensors"
    model = ("--model", models[0])
    tuned, err = call(
        "tune", data, "--dev", data, "--out", path, "--task", task, "--max-new-tokens", 3, *model, "--json", *QUICK
    )
    assert tuned["label_words"] == labels
    assert ("free text" in err) == (labels is None)
    assert call("eval", path, data, *model, "--json")[0]["metric"] == ("accuracy" if labels else "exact match")
    answers = call("predict", path, "film 1", *model, "--json")[0]["predictions"]
    assert len(answers) == 1
    assert labels is None or answers[0]["prediction"] in labels
    assert labels or len(answers[0]["prediction"]) <= 3


def piped(text, encoding="utf-8"):
    """Return a standard input with this text, under a locale other than UTF-8."""
    return io.TextIOWrapper(io.BytesIO(text.encode(encoding)), encoding="cp1252")


def test_predict_reads_a_file_arguments_or_standard_input(call, models, prompt, tmp_path, monkeypatch):
    texts = [text for text, _ in NAMED]
    data = write_rows(tmp_path / "only.tsv", [(text,) for text in texts], ("input",))
    monkeypatch.setattr(sys, "stdin", piped("\n".join(texts) + "\n"))
    outs = [call("predict", prompt, *more, "--model", models[0])[0] for more in ([], texts, ["--data", data])]
    assert outs[0] == outs[1] == outs[2]
    assert outs[0].count("\n") == 20
    monkeypatch.setattr(sys, "stdin", piped("\n".join([texts[0], "", *texts[1:], "", ""])))
    lines = call("predict", prompt, "--model", models[0])[0].splitlines()
    assert len(lines) == 22  # blank lines are answered too, so that answers match lines
    assert [lines[0], *lines[2:21]] == outs[0].splitlines()


def test_standard_input_is_read_as_utf8(call, fails, models, prompt, monkeypatch):
    def read(text, encoding="utf-8"):
        monkeypatch.setattr(sys, "stdin", piped(text, encoding))
        found = call("predict", prompt, "--model", models[0], "--json")[0]["predictions"]
        return [answer["input"] for answer in found]

    assert read("un café là\nbye\n") == read("\ufeffun café là\r\nbye\r\n") == ["un café là", "bye"]
    for encoding, message in (
        ("utf-16", "is UTF-16"),
        ("utf-16-le", "row 1: contains a NUL byte"),
        ("cp1252", "row 1: not"),
    ):
        monkeypatch.setattr(sys, "stdin", piped("un café là\n", encoding))
        assert f"standard input: {message}" in fails("predict", prompt, "--model", models[0])


def test_predict_takes_texts_that_begin_with_a_dash(call, fails, models, prompt, tmp_path):
    model = ("--model", models[0], "--json")
    for words in (["--", "-x", "b"], ["-x y", "b"]):
        for args in ([prompt, *model, *words], [*model, prompt, *words]):
            found = call("predict", *args)[0]["predictions"]
            assert [answer["input"] for answer in found] == [word for word in words if word != "--"]
    assert len(call("predict", prompt, "a", *model, "b", "--", "--c")[0]["predictions"]) == 3
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    assert "--data: cannot be combined with texts" in fails("predict", prompt, "a", "--data", rows, *model[:2])


def test_a_tuned_prompt_starts_another_run(call, models, prompt, tmp_path):
    rows, path = write_rows(tmp_path / "rows.tsv", NAMED), tmp_path / "p.safetensors"
    more = ("--init", "file", "--init-file", prompt, "--model", models[0], "--out", path)
    call("tune", rows, *more, *QUICK)
    assert prompts.load_prompt(path).settings["init_file"] == prompt


def test_a_run_can_be_resumed(call, models, tmp_path):
    rows, whole = write_rows(tmp_path / "rows.tsv", NAMED), tmp_path / "whole.safetensors"
    more = (rows, "--dev", rows, "--model", models[0], "--device", "numpy", "--schedule", "constant")
    call("tune", *more, "--out", whole, *QUICK, "--steps", 8)
    wanted = prompts.load_prompt(whole)
    for name in ("p.safetensors", "adapter"):
        path = tmp_path / name
        call("tune", *more, "--out", path, *QUICK)
        out, err = call("tune", *more, "--resume", path, "--steps", 8, "--json")
        assert (out["prompt"], out["steps"], out["dev"]) == (
            str(path),
            8,
            wanted.train_state["scores"].reshape(-1, 3)[:, 1].max(),
        )
        assert "labels: bad, good" in err
        found = prompts.load_prompt(path)
        assert (repr(found), found.settings) == (repr(wanted), wanted.settings)
        assert found.train_state.keys() == wanted.train_state.keys()
        assert [k for k in found.train_state if found.train_state[k].tobytes() != wanted.train_state[k].tobytes()] == []
    other = tmp_path / "other.safetensors"
    call("tune", *more, "--resume", path, "--steps", 10, "--out", other)
    assert [p.train_state["step"].item() for p in map(prompts.load_prompt, (path, other))] == [8, 10]


@pytest.mark.parametrize(("name", "go_on"), [("p.safetensors", True), ("p.npy", False)])
def test_an_interrupted_run_is_saved_and_prints_how_to_resume(models, tmp_path, capsys, monkeypatch, name, go_on):
    rows, path = write_rows(tmp_path / "rows.tsv", NAMED), tmp_path / name
    command = ["tune", rows, "--dev", rows, "--model", models[0], "--out", str(path), *QUICK]
    stop_at, original = 0, train.run

    def interrupted(*args):
        for progress in original(*args):
            yield progress
            if progress.state.step == stop_at:
                raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    assert main(command) == 130
    assert capsys.readouterr().err.endswith("tinyprompt: stopped; nothing was saved\n")
    assert not path.exists()
    for stop_at in (1, 3):
        assert main(command) == 130
        if go_on:
            assert prompts.load_prompt(path).train_state["step"].item() == stop_at
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"tinyprompt: stopped; the best prompt so far is in {path}")
    assert (f"repeat the command with --resume {path}" in last) == go_on
    assert len(prompts.load_prompt(path).params[PROMPT]) == 5
    if go_on:
        stop_at = -1
        assert main([*command, "--resume", str(path)]) == 0
        assert prompts.load_prompt(path).train_state["scores"].reshape(-1, 3)[:, 0].tolist() == [0, 2, 4]


def test_a_prompt_survives_every_format(call, models, prompt, tmp_path):
    rows, model = write_rows(tmp_path / "rows.tsv", NAMED), ("--model", models[0])
    wanted = call("eval", prompt, rows, *model, "--json")[0]["score"]
    adapter, google, ours = (tmp_path / name for name in ("new/adapter", "p.npy", "p.safetensors"))
    out, err = call("convert", prompt, adapter)
    assert (out, err) == (f"{prompt} written to {adapter}\n", "")
    assert call("eval", adapter, rows, *model, "--json")[0]["score"] == wanted
    out, err = call("convert", adapter, google, "--json")
    assert out["shapes"] == {PROMPT: [5, 20]}
    assert out.keys() == {"source", "target", "kind", "model", "label_words", "shapes"}
    assert err.startswith(f"warning: {google} stores only the vectors")
    scored, err = call("eval", google, rows, *model, "--json")
    assert scored["metric"] == "exact match"  # the format has no label words, so the answer is free text
    assert f"warning: {google} does not store the fingerprint" in err
    out, err = call("convert", google, ours, "--label-words", "bad", "good", *model, "--json")
    assert (out["model"], out["label_words"]) == ("one", ["bad", "good"])
    unknown = "warning: {} does not store the fingerprint of its model; only its shape was checked\n"
    assert err == unknown.format(google)
    assert call("inspect", google, *model)[1] == unknown.format(google)
    assert prompts.load_prompt(ours).fingerprint == prompts.load_prompt(prompt).fingerprint
    scored, err = call("eval", ours, rows, *model, "--json")
    assert (scored["metric"], scored["score"]) == ("accuracy", wanted)
    assert "warning" not in err
    _, err = call("export", "--prompt", google, "--out", tmp_path / "out", *model)
    assert err == f"warning: {google} does not store the fingerprint of its model; only its shape was checked\n"
    for path in (adapter, google):
        more = ("--init", "file", "--init-file", path, "--out", tmp_path / "q.safetensors", *QUICK)
        call("tune", rows, "--dev", rows, *model, *more)


def test_a_prefix_from_peft_can_predict(call, fails, models, tmp_path):
    folder, model = tmp_path / "adapter", ("--model", models[0])
    config = dict(peft_type="PREFIX_TUNING", num_virtual_tokens=4, num_layers=3, token_dim=18, num_attention_heads=3)

    def write(layers):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config | {"num_layers": layers}))
        array = np.random.default_rng(0).normal(size=(4, layers * 36)).astype(np.float32)
        save_file({"prompt_embeddings": array}, folder / "adapter_model.safetensors")

    write(3)
    answer, _ = call("predict", folder, "a film", *model, "--device", "numpy")
    ours = tmp_path / "p.safetensors"
    call("convert", folder, ours, "--label-words", "bad", "good", *model)
    assert call("predict", ours, "a film", *model)[0].strip() in {"bad", "good"}
    assert answer
    for name, command in (("p.npy", "convert"), ("q", "convert")):
        assert "expected a soft prompt" in fails(command, folder, tmp_path / name)
    assert "expected a soft prompt" in fails("export", "--prompt", folder, "--out", tmp_path / "out", *model)
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    more = ("--init", "file", "--init-file", folder, *model, "--out", tmp_path / "r.safetensors")
    assert "expected a soft prompt" in fails("tune", rows, *more, after_progress=True)
    write(2)
    assert "this prefix is for 2 decoder layers, 'one' has 3" in fails("predict", folder, "a film", *model)


def test_a_model_is_converted(call, models, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(model_files, "convert", lambda *args: called.append(args) or args[1])
    out, _ = call("convert", models[0], tmp_path / "m", "--tokenizer", "t", "--json")
    assert called == [(Path(models[0]), tmp_path / "m", "t")]
    assert out == {"source": models[0], "target": str(tmp_path / "m"), "kind": "model"}


@pytest.fixture
def fails(capsys, tmp_path):
    """Return a function that runs a command, which must fail with one line and write nothing, and returns the line."""

    def fails(*args, after_progress=False):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main([str(a) for a in args]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before
        *progress, last = err.splitlines()
        assert bool(progress) == after_progress, err
        assert [line for line in (*progress, last) if line.startswith("tinyprompt: ")] == [last]
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
        (["--learning-rate", "0"], "setting learning_rate: expected more than 0, found 0.0"),
        (["--dropout", "1"], "setting dropout: expected 0 to below 1"),
        (["--seed", "-1"], "setting seed"),
    ],
)
def test_tune_fails_in_one_line(fails, models, tmp_path, more, message):
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    assert message in fails("tune", rows, "--model", models[0], "--out", tmp_path / "p.safetensors", *QUICK, *more)


def test_tune_prints_its_progress_before_it_fails(fails, models, tmp_path):
    more = ("--model", models[0], "--out", tmp_path / "p.safetensors", *QUICK)
    rows, dev = write_rows(tmp_path / "rows.tsv", NAMED), write_rows(tmp_path / "dev.tsv", [("film", "fair")])
    error = fails("tune", rows, "--dev", dev, *more, after_progress=True)
    assert "dev row 'film': target 'fair' is not a label word (bad, good); correct it, or add train rows" in error
    single = write_rows(tmp_path / "one.tsv", NAMED[:1])
    assert "one.tsv: 1 row, expected at least 2" in fails("tune", single, *more)


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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["{models[0]}", "{tmp}/m", "--label-words", "a"],
            "one: is not a prompt; --model and --label-words apply only to prompts",
        ),
        (["{prompt}", "{tmp}/a.npy", "--tokenizer", "t"], "--tokenizer applies only to models"),
        (["{prompt}", "{tmp}/a.npy", "--label-words", "a", "a "], "--label-words: expected different words"),
        (["{prompt}", "{tmp}/a.npy", "--label-words", ""], "--label-words: expected different words"),
        (["{prompt}", "{tmp}/a.npy", "--model", "{models[1]}"], "tuned on 'one'"),
        (["{prompt}", "{tmp}/a.npz"], "a.npz: expected a name that ends in"),
        (["{prompt}", "{models[0]}"], "one: is a directory with other files than a PEFT adapter's"),
        (["{tmp}/none", "{tmp}/a.npy"], "none: no such file"),
    ],
)
def test_convert_fails_in_one_line(fails, models, prompt, tmp_path, args, message):
    assert message in fails("convert", *(arg.format(models=models, prompt=prompt, tmp=tmp_path) for arg in args))


def test_an_unwritable_output_is_refused_before_any_computation(fails, models, prompt, tmp_path):
    rows, model = write_rows(tmp_path / "rows.tsv", NAMED), ("--model", models[0])
    for path in ("a.txt", "a"):
        assert f"{path}: expected a name that ends in .tsv or .csv" in fails(
            "eval", prompt, rows, *model, "--rows", path
        )
        assert "ends in .png or" in fails("tune", rows, *model, "--plot", path)
        assert "ends in .png or" in fails("count", "--plot", path)


def test_eval_writes_rows_with_the_probability_of_each_label(call, models, prompt, tmp_path):
    rows, model = write_rows(tmp_path / "rows.tsv", NAMED), ("--model", models[0])
    out, _ = call("eval", prompt, rows, *model, "--rows", tmp_path / "new" / "answers.csv", "--json")
    head, *lines = (tmp_path / "new" / "answers.csv").read_text().splitlines()
    assert head == "input,target,answer,p(bad),p(good)"
    cells = [line.split(",") for line in lines]
    assert [(text, target) for text, target, *_ in cells] == NAMED
    for _, _, answer, bad, good in cells:
        assert abs(float(bad) + float(good) - 1) < 1e-5
        assert answer == ("bad" if float(bad) > float(good) else "good")
    assert sum(answer == target for _, target, answer, *_ in cells) / 20 == out["score"]
    counts = [[sum((t, s) == (a, b) for _, t, s, *_ in cells) for b in ("bad", "good")] for a in ("bad", "good")]
    assert out["confusion"] == counts


@pytest.mark.parametrize("ending", ["tsv", "csv"])
def test_rows_written_by_eval_can_be_read(call, fails, models, prompt, tmp_path, ending):
    odd = [
        ('He said "hi"', "good"),
        ('"open', "bad"),
        ("a, b", "good"),
        (r"a\tb", "bad"),
        ("tab\tand\r\nbreak", "good"),
    ]
    rows, model = write_rows(tmp_path / "rows.jsonl", odd), ("--model", models[0])
    answers = tmp_path / f"answers.{ending}"
    call("eval", prompt, rows, *model, "--rows", answers)
    *same, (last, _) = [(row.input, row.target) for row in tinyprompt.read_rows(answers)]
    assert same == odd[:-1]
    assert last == (odd[-1][0] if ending == "csv" else r"tab\tand\r\nbreak")
    before = answers.read_bytes()
    error = fails("eval", prompt, answers, *model, "--rows", tmp_path / "." / answers.name)
    assert "is also the input file; name another" in error
    assert answers.read_bytes() == before


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        (["--epochs", "3"], "use --steps"),
        (["--precision", "int8"], "--device cpu-int8"),
        (["--length", "5"], "use --prompt-length"),
        (["--batch=5"], "use --batch-size"),
        (["--optimiser", "adam"], "did you mean --optimizer?"),
    ],
)
def test_an_option_of_another_program_gets_a_hint(option, hint, capsys):
    with pytest.raises(SystemExit):
        main(["tune", "a.tsv", *option])
    assert hint in capsys.readouterr().err


def test_options_of_other_programs_are_accepted_as_aliases(models, tmp_path):
    rows, out = write_rows(tmp_path / "rows.tsv", NAMED), tmp_path / "p.safetensors"
    command = ["tune", rows, "--model", models[0], "--out", str(out), "--steps", "1"]
    assert main([*command, "--lr", "0.2", "--prompt-length", "2"]) == 0
    assert prompts.load_prompt(out).settings["learning_rate"] == 0.2
    assert (
        main(["tune", rows, "--model", models[0], "--out", str(out), "--steps", "1", "--num-virtual-tokens", "3"]) == 0
    )
    assert prompts.load_prompt(out).array.shape == (3, 20)


@pytest.mark.parametrize(
    ("method", "option"),
    [("prompt", "--rank"), ("prompt", "--hidden"), ("lora", "--prompt-length"), ("full", "--rank"), ("ia3", "--rank")],
)
def test_a_size_that_the_method_does_not_use_is_refused(fails, models, tmp_path, method, option):
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    out = ("--model", models[0], "--out", tmp_path / "p.safetensors")
    error = fails("tune", rows, *out, "--method", method, option, "4")
    assert f"{option}: method '{method}' does not use it" in error


def test_init_text_and_init_file_imply_init(call, models, prompt, tmp_path):
    rows, out, model = write_rows(tmp_path / "rows.tsv", NAMED), tmp_path / "p.safetensors", ("--model", models[0])
    call("tune", rows, "--out", out, *model, *QUICK, "--init-text", "good or bad")
    assert prompts.load_prompt(out).settings["init"] == "text"
    call("tune", rows, "--out", out, *model, *QUICK, "--init-file", prompt)
    assert prompts.load_prompt(out).settings["init"] == "file"


def test_errors_explain_common_mistakes(call, fails, models, prompt, tmp_path):
    rows, model = write_rows(tmp_path / "rows.tsv", NAMED), ("--model", models[0])
    assert "rows.tsv: is a file of rows, not a prompt; give the prompt first" in fails("predict", rows, prompt, *model)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").touch()
    error = fails("predict", prompt, "a", "--model", tmp_path / "folder")
    assert "folder: has no config.json, so it is not a model directory; found notes.txt" in error
    (tmp_path / "a.csv").write_text("input;target\na;b\n")
    assert "one column, 'input;target': separated by semicolons" in fails("eval", prompt, tmp_path / "a.csv", *model)
    more = ("--out", tmp_path / "p.safetensors", *model, "--steps", 1, "--device", "numpy")
    assert "slow, and much memory" in call("tune", rows, *more, "--prompt-length", 501, "--batch-size", 2)[1]
    assert "slow, and much memory" not in call("tune", rows, *more, "--prompt-length", 5, "--batch-size", 2)[1]


def test_odd_rows_cause_warnings(call, models, tmp_path):
    more = ("--model", models[0], "--out", tmp_path / "p.safetensors", *QUICK)
    typo = write_rows(tmp_path / "typo.tsv", [*NAMED, ("film", "goood")])
    assert "typing errors: 'goood'" in call("tune", typo, "--dev", typo, *more, "--task", "classify")[1]
    same = write_rows(tmp_path / "one.tsv", [(text, "good") for text, _ in NAMED])
    assert "all targets are 'good'" in call("tune", same, "--dev", same, *more)[1]
    long = write_rows(tmp_path / "long.tsv", [(f"{i}", f"{i} " * 9) for i in range(9)])
    warnings = call("tune", long, "--dev", long, *more, "--max-new-tokens", 4, "--max-input-tokens", 1)[1]
    assert "9 of 9 dev targets have more than 4 tokens, the limit of an answer" in warnings
    assert "18 of 18 inputs lose their end at 1 tokens" in warnings


def test_label_words_with_the_same_ids_are_refused(fails, models, tmp_path, monkeypatch):
    coded = write_rows(tmp_path / "coded.tsv", [("film", "Good"), ("book", "good")] * 8)
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: [*(b + 3 for b in text.lower().encode()), 1])
    out = ("--model", models[0], "--out", tmp_path / "q.safetensors")
    assert "label words 'Good' and 'good' are the same" in fails(
        "tune", coded, "--dev", coded, *out, after_progress=True
    )


def test_resume_fails_in_one_line(fails, models, prompt, tmp_path):
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    command = ("tune", rows, "--dev", rows, "--out", tmp_path / "q.safetensors")
    cases = {
        "setting steps: expected more than the 4 completed steps, found 4": (),
        "setting learning_rate: expected None as in the run to resume, found 0.1": ("--learning-rate", "0.1"),
        "the train or dev rows differ": ("--steps", "8"),
    }
    for message, more in cases.items():
        if "rows differ" in message:
            rows = command[1]
            command = ("tune", write_rows(tmp_path / "few.tsv", NAMED[:8]), "--dev", rows, *command[4:])
        assert message in fails(*command, "--model", models[0], "--resume", prompt, *more, after_progress=True)
    assert f"{prompt}: was tuned on 'one'" in fails(*command, "--model", models[1], "--resume", prompt, "--steps", 8)
    np.save(tmp_path / "bare.npy", np.ones((5, 20), np.float32))
    error = fails(*command, "--model", models[0], "--resume", tmp_path / "bare.npy", "--steps", 8)
    assert f"{tmp_path}/bare.npy: has no training state to resume; to start from it: --init-file" in error


def test_convert_refuses_label_words_with_the_same_ids(fails, tmp_path):
    np.save(tmp_path / "bare.npy", np.ones((2, 32), np.float32))
    files = tmp_path / "bare.npy", tmp_path / "p.safetensors"
    error = fails("convert", *files, "--model", "tiny", "--label-words", "Bad", "bad", after_progress=True)
    assert "label words 'Bad' and 'bad' are the same to the tokenizer" in error


def test_bad_rows_fail_in_one_line(fails, models, prompt, tmp_path, monkeypatch):
    model = ("--model", models[0])
    rows = write_rows(tmp_path / "rows.tsv", NAMED, ("text", "label"))
    assert "row 2: no column 'input'" in fails("eval", prompt, rows, *model)
    assert "row 2: no column 'input'" in fails("predict", prompt, "--data", rows, *model)
    assert "no.csv: no such file" in fails("eval", prompt, "no.csv", *model)
    other = write_rows(tmp_path / "other.tsv", FREE)
    assert "target 'answer 0' is not a label word (bad, good)" in fails("eval", prompt, other, *model)
    monkeypatch.setattr(sys, "stdin", piped("\n"))
    assert "nothing to predict" in fails("predict", prompt, *model)


def test_an_output_that_is_a_directory_fails_before_training(fails, models, tmp_path):
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    message = fails("tune", rows, "--model", models[0], "--out", tmp_path, *QUICK)
    assert f"{tmp_path}: is a directory" in message


def test_exit_status_of_bad_arguments_and_version(capsys):
    for args, status in ((["tune"], 2), (["learn"], 2), (["tune", "a.tsv", "--steps", "many"], 2), (["--version"], 0)):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == status
    assert capsys.readouterr().out == tinyprompt.__version__ + "\n"


def python(*args, cwd):
    """Run this Python in another folder with the package under test."""
    env = os.environ | {"PYTHONPATH": str(Path(tinyprompt.__file__).parents[1])}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=True)


def test_importing_the_package_loads_no_heavy_library(tmp_path):
    trace = python("-X", "importtime", "-c", "import tinyprompt, tinyprompt.cli.main", cwd=tmp_path).stderr
    imported = {line.split("|")[-1].strip().split(".")[0] for line in trace.splitlines()}
    assert {"tinyprompt", "numpy", "autograd"} <= imported
    assert not imported & HEAVY


@pytest.mark.parametrize("device", ["numpy", "cpu"])
def test_no_command_imports_torch(models, tmp_path, device):
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    command = ["-m", "tinyprompt", "tune", rows, "--dev", rows, "--model", models[0], "--device", device, *QUICK]
    trace = python("-X", "importtime", *command, cwd=tmp_path).stderr
    imported = {line.split("|")[-1].strip().split(".")[0] for line in trace.splitlines()}
    assert "autograd" in imported
    assert not imported & (HEAVY - ({"onnx", "onnxruntime"} if device == "cpu" else set()))


def test_the_demo_learns(tmp_path):
    done = python("-m", "tinyprompt", "demo", "--json", "--out", "out", cwd=tmp_path)
    out = json.loads(done.stdout)
    assert out.keys() >= {"majority", "unprompted", "tuned", "seconds", "device", "prompt"}
    assert all(0 <= out[name] <= 1 for name in ("majority", "unprompted", "tuned"))
    assert (tmp_path / out["prompt"]).is_file()
    assert out["seconds"] > 0
    assert out["device"] == default_device()
    assert out["majority"] == 0.2
    assert out["tuned"] >= out["majority"] + 0.25
    assert out["tuned"] > out["unprompted"]


def test_control_characters_of_files_are_escaped(call, fails, models, tmp_path):
    evil = "\x1b[31mred\x07"
    rows, out = (
        write_rows(tmp_path / "rows.jsonl", [(text, evil if i % 2 else "b") for i, (text, _) in enumerate(NAMED)]),
        tmp_path / "p.safetensors",
    )
    shown, err = call("tune", rows, "--dev", rows, "--model", models[0], "--out", out, *QUICK)
    outputs = [shown, *err.splitlines()[:2], *call("eval", out, rows, "--model", models[0])]
    outputs += [call("predict", out, "a", "b", "--model", models[0])[0], call("inspect", out, "--model", models[0])[0]]
    outputs.append(fails("eval", out, write_rows(tmp_path / "other.jsonl", [("a", "\x1b[0m")]), "--model", models[0]))
    assert not any("\x1b" in text or "\x07" in text for text in outputs)
    assert "\\x1b[31mred\\x07" in "".join(outputs)


def test_a_long_message_is_shortened(fails, models, tmp_path):
    long = write_rows(tmp_path / "long.tsv", [("a", "y" * 9000), ("b", "n")])
    error = fails("eval", write_rows(tmp_path / "no.tsv", NAMED), long)
    assert len(error) < 1200


@pytest.mark.parametrize("given", [b"fine\n\xff\xfe\n", None])
def test_unreadable_standard_input_is_refused(models, prompt, tmp_path, given):
    command = [sys.executable, "-m", "tinyprompt", "predict", prompt, "--model", models[0]]
    env = os.environ | {"PYTHONPATH": str(Path(tinyprompt.__file__).parents[1]), "PYTHONIOENCODING": "utf-8"}
    if given is None:
        done = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *command], env=env, capture_output=True, text=True)
    else:
        done = subprocess.run(command, env=env, input=given, capture_output=True)
        done.stderr = done.stderr.decode()
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert ("standard input: row 2: not UTF-8" if given else "nothing to predict") in done.stderr


def test_arguments_that_are_not_utf8_are_refused(models, prompt, fails):
    assert "text 2: contains \\udcff, an unpaired surrogate" in fails(
        "predict", prompt, "a", "b\udcff", "--model", models[0]
    )


def test_a_panic_of_a_library_is_reported_in_one_line(fails, models, prompt, monkeypatch):
    class PanicException(BaseException):
        """pyo3 raises a class of this name."""

    def panic(self, text):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(ByteTokenizer, "encode", panic)
    assert "the tokenizers library failed: index out of bounds" in fails("predict", prompt, "a", "--model", models[0])


LONG = [(text, {"bad": "Not GOOD at all", "good": "Rather nice"}[word]) for text, word in NAMED]


def test_a_prompt_keeps_its_columns_words_and_long_labels(call, fails, models, tmp_path):
    rows, path = write_rows(tmp_path / "rows.csv", LONG, ("text", "mark")), tmp_path / "p.safetensors"
    _, err = call("tune", rows, "--input", "text", "--target", "mark", "--model", models[0], "--out", path, *QUICK)
    warning = "long labels are learned as a word of their own: Not GOOD at all = not, Rather nice = rather"
    assert warning in err
    found = prompts.load_prompt(path)
    assert found.verbalizer == {"Not GOOD at all": "not", "Rather nice": "rather"}
    assert found.columns == {"input": "text", "target": "mark"}
    assert "accuracy 0." in call("eval", path, rows, "--model", models[0])[0]
    scored, _ = call("eval", path, rows, "--model", models[0], "--json")
    right, labels = np.array(scored["confusion"]), list(scored["f1"])
    wanted = 2 * right.diagonal() / np.maximum(1, right.sum(0) + right.sum(1))
    assert list(scored["f1"].values()) == pytest.approx(wanted)
    assert labels == ["Not GOOD at all", "Rather nice"]
    answered, _ = call("predict", path, "--data", rows, "--model", models[0], "--json")
    assert {answer["prediction"] for answer in answered["predictions"]} <= {"Not GOOD at all", "Rather nice"}
    assert f"{rows}: is a file; to answer its rows, use --data {rows}" in fails(
        "predict", path, rows, "--model", models[0]
    )


def test_the_words_option_is_stored_in_the_prompt(call, models, tmp_path):
    rows, path = write_rows(tmp_path / "rows.tsv", CODED), tmp_path / "p.safetensors"
    call("tune", rows, "--words", "0=bad", "1=good", "--model", models[0], "--out", path, *QUICK)
    for again in (rows, write_rows(tmp_path / "named.tsv", NAMED)):
        assert call("eval", path, again, "--model", models[0], "--json")[0]["rows"] == 20


def test_similar_labels_and_free_text_cause_warnings(call, models, tmp_path):
    rows = write_rows(
        tmp_path / "rows.tsv", [(text, word if i % 3 else word.upper()) for i, (text, word) in enumerate(NAMED)]
    )
    _, err = call("tune", rows, "--model", models[0], "--out", tmp_path / "p.safetensors", *QUICK)
    assert "warning: labels that differ in case or spaces only: 'BAD', 'bad'" in err
    rows = write_rows(tmp_path / "free.tsv", FREE)
    _, err = call("tune", rows, "--model", models[0], "--out", tmp_path / "p.safetensors", *QUICK)
    assert "20 distinct targets in 20 rows, so answers are free text; --task classify makes them labels" in err


def test_default_settings_suit_the_rows_and_can_be_overridden(call, models, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    _, err = call(
        "tune", rows, "--model", models[0], "--out", tmp_path / "p.safetensors", "--batch-size", 2, "--steps", 3
    )
    assert "3 steps of 2 rows, 20 vectors, a dev score every 1 (--steps, --batch-size" in err


def test_tune_without_a_name_overwrites_nothing(call, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    call("tune", rows, "--model", models[0], *QUICK)
    before = Path("prompt.safetensors").read_bytes()
    _, err = call("tune", rows, "--model", models[0], *QUICK)
    assert "prompt.safetensors exists; the new prompt is written to prompt-2.safetensors" in err
    assert Path("prompt.safetensors").read_bytes() == before
    assert prompts.load_prompt("prompt-2.safetensors").label_words == ("bad", "good")


def test_tune_with_folds_and_a_learning_curve(call, fails, models, tmp_path):
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    more = ("--model", models[0], "--out", tmp_path / "p.safetensors", *QUICK)
    out, _ = call("tune", rows, *more, "--folds", 2, "--learning-curve")
    assert "accuracy on all 20 rows, each held out once (2 folds):\n  bag of words" in out
    assert "learning curve, accuracy of a prompt on the dev rows:\n  4 rows" in out
    assert "--folds 21: expected at most the number of distinct inputs, 20" in fails(
        "tune", rows, *more, "--folds", 21, after_progress=True
    )
    free = write_rows(tmp_path / "free.tsv", FREE)
    for option in (("--folds", 2), ("--learning-curve",)):
        assert "expected a file of columns whose targets are labels" in fails(
            "tune", free, *more, *option, after_progress=True
        )
    assert "--folds 1: expected 2 or more" in fails("tune", rows, *more, "--folds", 1)


def test_a_prompt_worse_than_a_bag_of_words_causes_a_warning(call, models, tmp_path):
    rows = write_rows(tmp_path / "rows.tsv", [(f"{word} {i}", word) for i, (_, word) in enumerate(NAMED)])
    out, _ = call("tune", rows, "--model", models[0], "--out", tmp_path / "p.safetensors", *QUICK)
    assert "the prompt is not better than a bag of words; try more rows" in out


def test_a_prompt_finds_its_built_in_model(call, tmp_path):
    rows, path = write_rows(tmp_path / "rows.tsv", NAMED), tmp_path / "p.safetensors"
    call("tune", rows, "--model", "tiny", "--out", path, *QUICK)
    assert call("eval", path, rows, "--json")[0]["rows"] == 20


def test_tinyprompt_without_arguments_lists_the_commands(capsys):
    assert main([]) == 0
    assert "tune " in capsys.readouterr().out


def test_ctrl_c_after_the_run_prints_the_path_of_the_prompt(models, tmp_path, capsys, monkeypatch):
    rows, path = write_rows(tmp_path / "rows.tsv", NAMED), tmp_path / "p.safetensors"

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(assess, "bag_of_words", stop)
    assert main(["tune", rows, "--model", models[0], "--out", str(path), *QUICK]) == 130
    assert capsys.readouterr().err.endswith(f"tinyprompt: stopped; the prompt is in {path}\n")


def test_a_large_file_gets_no_bag_of_words(call, models, tmp_path, monkeypatch):
    monkeypatch.setattr(assess, "MOST_ROWS", 19)
    rows = write_rows(tmp_path / "rows.tsv", NAMED)
    out, _ = call("tune", rows, "--model", models[0], "--out", tmp_path / "p.safetensors", *QUICK)
    assert "bag of words" not in out
