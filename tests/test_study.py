"""A study: its file, its table, and that each cell is computed once even if processes are killed."""

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from files import SMALL, weights, write
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from tuning import right_answers

import tinyprompt
from tinyprompt import data
from tinyprompt.cli.main import main
from tinyprompt.data import Row
from tinyprompt.ensemble import vote
from tinyprompt.errors import CheckpointError, DataError, DeviceError
from tinyprompt.files import models, tables
from tinyprompt.model import Prompt
from tinyprompt.predict import predict
from tinyprompt.settings import Settings
from tinyprompt.study import cells, figures, grid, summary
from tinyprompt.tasks import metrics, registry
from tinyprompt.train import TaskData
from tinyprompt.tuning import run_task

pytest.importorskip("joblib", reason="needs joblib: pip install '.[study]'")
ROOT = Path(__file__).parents[1]
KILLS = 2 * settings.default.max_examples // 100  # 40 with the profile "long"
TEXT = """
title = "Soup"
[settings]
steps = 2
batch_size = 4
prompt_length = 2
eval_every = 1
optimizer = "adam"
[tasks.soup]
train = "train.tsv"
dev = "dev.tsv"
test = "test.tsv"
[grid]
model = ["small"]
method = ["none", "prompt"]
learning_rate = [0.1, 0.5]
seed = [0, 1, 2]
"""


def table_of(path, rows):
    path.write_text("\n".join("\t".join(row) for row in [("input", "target"), *rows]) + "\n", encoding="utf-8")


def rows_of(first, number):
    return [(f"soup {i * i % 97}", ("bad", "good", "so so")[i % 3]) for i in range(first, first + number)]


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """Write a folder with a small model, rows, and data for studies of them."""
    folder = tmp_path_factory.mktemp("study")
    write(folder / "small", SMALL, weights())
    for i, (name, number) in enumerate({"train": 24, "dev": 9, "test": 15, "other": 12}.items()):
        table_of(folder / f"{name}.tsv", rows_of(100 * i, number))
    quality = (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        *(f"{i % 2}\t1\t2\tHe sat.\tShe sat {i}." for i in range(12)),
    )
    (folder / "mrpc.txt").write_text("\n".join(quality))
    lines = ("question1\tquestion2\tis_duplicate", *(f"Why {i}?\tHow?\t{int(i % 3 == 0)}" for i in range(9)))
    (folder / "qqp.tsv").write_text("\n".join(lines))
    return folder


def write_study(at, tmp_path, text=TEXT):
    """Write a study with this text; its files are in `at`, its output is under tmp_path."""
    path = at / f"{tmp_path.name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def read(at, tmp_path, text=TEXT):
    return grid.read_study(write_study(at, tmp_path, text), "numpy")


@pytest.fixture
def run(at, tmp_path, capsys):
    """Return a function that runs a study with the command and returns exit status, JSON and standard error."""

    def run(text=TEXT, *options):
        capsys.readouterr()
        path = write_study(at, tmp_path, text)
        status = main(["study", str(path), "--device", "numpy", "--out", str(tmp_path / "out"), "--json", *options])
        out, err = capsys.readouterr()
        return status, json.loads(out) if out else None, err

    return run


# ---- results ----


def test_a_study_gives_the_results_of_single_runs(at, run):
    text = TEXT.replace('"prompt"', '"full"').replace("[0.1, 0.5]", "[0.01, 0.1]")  # so that the seeds differ
    status, found, err = run(text)
    assert status == 0
    assert "7 cells: 0 done, 7 to compute" in err  # the bare model is computed once
    model = models.load(at / "small")
    rows, dev, test = (tables.read_rows(at / f"{part}.tsv") for part in ("train", "dev", "test"))
    words, texts, targets = data.label_words(rows), [row.input for row in test], [row.target for row in test]

    def score(prompt):
        return metrics.accuracy(predict(model, prompt, texts, "numpy"), targets)

    def tuned(rate, seed):
        given = dict(steps=2, batch_size=4, prompt_length=2, eval_every=1, optimizer="adam", method="full")
        chosen = Settings(**given, learning_rate=rate, seed=seed)
        *_, last = run_task(model, TaskData(rows, dev, words, right_answers), chosen, "numpy")
        return score(last.prompt)

    expected = {("none", None): [score(Prompt(label_words=words))]}
    expected |= {("full", rate): [tuned(rate, seed) for seed in range(3)] for rate in (0.01, 0.1)}
    entries = {(entry["axes"]["method"], entry["axes"].get("learning_rate")): entry for entry in found["table"]}
    assert {name: entry["scores"] for name, entry in entries.items()} == expected
    for name, entry in entries.items():
        assert entry["mean"] == pytest.approx(np.mean(expected[name]), abs=1e-12)
        assert entry["seeds"] == len(expected[name])
        spread = np.std(expected[name], ddof=1) if len(expected[name]) > 1 else None
        assert entry["spread"] == (None if spread is None else pytest.approx(spread, abs=1e-12))
        assert (entry["metric"], entry["rows"]) == ("accuracy", 15)


def test_a_row_records_how_it_was_computed(run, tmp_path):
    run()
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    kept = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("*.json")}
    assert {row["key"]: row for row in rows} == kept
    assert [row["method"] for row in rows] == ["none", *["prompt"] * 6]
    assert set(rows[0]["settings"]) == {"max_input_tokens", "max_new_tokens", "num_beams", "length_penalty"}
    last = rows[-1]
    assert last["settings"] | {"learning_rate": 0.5, "seed": 2, "steps": 2} == last["settings"]
    assert last["versions"]["tinyprompt"] == tinyprompt.__version__
    assert last["versions"]["numpy"] == np.__version__
    assert last["machine"]["cores"] == os.cpu_count()
    assert last["machine"]["cpu"]
    assert last["seconds"] > 0
    assert (last["device"], last["trained"], last["stored"]) == ("numpy", 8, 8)
    assert last["best_step"] in range(3)
    assert [*(tmp_path / "out" / "cells").glob(".*")] == []


def test_finished_cells_are_not_computed_again(run, tmp_path, monkeypatch):
    _, first, _ = run()
    monkeypatch.setattr(cells, "compute", lambda cell: pytest.fail("computed again"))
    assert run()[1] == first
    for path in (tmp_path / "out" / "cells").iterdir():  # as in a clone, which has rows.jsonl only
        path.unlink()
    status, again, err = run()
    assert (status, again) == (0, first)
    assert "7 cells: 7 done, 0 to compute" in err


def test_a_smaller_study_keeps_the_rows_of_a_larger_one(run, tmp_path):
    run()
    rows = tmp_path / "out" / "rows.jsonl"
    before = rows.read_text().splitlines()
    for path in (tmp_path / "out" / "cells").iterdir():
        path.unlink()
    _, found, _ = run(TEXT.replace("[0, 1, 2]", "[1]"))
    assert (found["cells"], found["done"]) == (3, 3)
    assert sorted(rows.read_text().splitlines()) == sorted(before)


def test_a_partial_file_of_a_killed_run_is_removed(run, at, tmp_path):
    key = read(at, tmp_path).cells[0].key
    part = tmp_path / "out" / "cells" / f".{key}.json.0123abcd.part"
    part.parent.mkdir(parents=True)
    part.write_text("{")
    assert run()[0] == 0
    assert not part.exists()


def test_additional_seeds_compute_only_their_cells(run, monkeypatch):
    run()
    done, compute = [], cells.compute
    monkeypatch.setattr(cells, "compute", lambda cell: done.append(str(cell)) or compute(cell))
    _, found, _ = run(TEXT.replace("[0, 1, 2]", "[0, 1, 2, 3]"))
    assert len(done) == 2
    assert all("seed 3" in name for name in done)
    assert sorted(entry["seeds"] for entry in found["table"]) == [1, 4, 4]


def test_a_failed_cell_is_reported_and_the_others_are_computed(run, tmp_path):
    text = TEXT.replace('"none", "prompt"', '"none", "few-shot"').replace("steps = 2", "steps = 2\nshots = 4")
    short = text.replace("steps = 2", "steps = 2\nmax_input_tokens = 20")
    status, found, err = run(short)
    assert status == 1
    assert found["done"] == 1
    assert len(found["errors"]) == 3
    assert "failed: task soup, model small, method few-shot, seed 0: the input that ends in" in err
    assert len([*(tmp_path / "out" / "cells").iterdir()]) == 1
    status, found, _ = run(text.replace("steps = 2", "steps = 2\nmax_input_tokens = 200"))
    assert (status, found["errors"], found["done"]) == (0, {}, 4)


def test_a_dry_run_computes_nothing(run, tmp_path):
    status, found, err = run(TEXT, "--dry-run")
    assert (status, found["cells"], found["done"]) == (0, 7, 0)
    assert found["waiting"][1] == "task soup, model small, method prompt, learning_rate 0.1, seed 0"
    assert not (tmp_path / "out").exists()
    run()
    _, found, err = run(TEXT.replace("[0, 1, 2]", "[0, 1, 2, 3, 4]"), "--dry-run")
    assert found["done"] == 7
    assert "about 0.0 minutes" in err


@examples(40)
@given(st.integers(2, 30), st.integers(0, 9), st.data())
def test_shots_are_drawn_from_the_training_rows(number, seed, draw):
    rows = [Row(f"{i}", "ab"[i % 2]) for i in range(number)]
    held = draw.draw(st.integers(1, number - 1))
    shots = draw.draw(st.integers(1, number - held))
    whole, dev = grid.Task("t", "auto", rows, held, {}, None).parts(seed, None)
    assert len(dev) == held
    assert sorted(whole + dev) == sorted(rows)
    some, same = grid.Task("t", "auto", rows, held, {}, None).parts(seed, shots)
    assert same == dev
    assert len(set(some)) == shots
    assert set(some) <= set(whole)
    assert grid.Task("t", "auto", rows, dev, {}, None).parts(seed, None) == (rows, dev)


def test_every_seed_draws_different_shots():
    rows = [Row(f"{i}", "a") for i in range(40)]
    task = grid.Task("t", "auto", rows, rows[:1], {}, None)
    drawn = [tuple(task.parts(seed, 20)[0]) for seed in (0, 0, 1, 2)]
    assert len(set(drawn)) == 3


def test_dev_rows_limits_the_rows_of_a_file(at, tmp_path):
    task = read(at, tmp_path, TEXT.replace('dev = "dev.tsv"', 'dev = "dev.tsv"\ndev_rows = 6')).cells[0].task
    assert len(task.dev) == 6
    assert set(task.dev) <= set(tables.read_rows(at / "dev.tsv"))


def test_shots_are_the_examples_and_the_only_training_rows(at, tmp_path, monkeypatch):
    text = TEXT.replace('"none", "prompt"', '"few-shot", "prompt"').replace("learning_rate = [0.1, 0.5]", "shots = [3]")
    few, prompt = read(at, tmp_path, text.replace("[0, 1, 2]", "[1]")).cells
    seen = {}
    monkeypatch.setattr(cells, "predict", lambda model, prompt, texts, device: seen.setdefault("texts", texts))
    cells.few_shot(few)[0](["soup 1"])
    chosen, _ = few.task.parts(1, 3)
    solved = [f"{row.input} answer: {row.target}" for row in chosen]
    assert seen["texts"] == ["\n".join([*solved, "soup 1 answer:"])]
    monkeypatch.setattr(cells, "run_task", lambda model, task, *rest: seen.setdefault("task", task) and iter(()))
    with contextlib.suppress(UnboundLocalError):
        cells.tuned(prompt)
    assert seen["task"].train == chosen
    assert len(seen["task"].dev) == 9


TASTES = [("fine", "good"), ("tasty", "good"), ("cold", "bad"), ("stale", "bad")]


def test_a_bag_of_words_needs_no_model(run, at):
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    table_of(at / "words.tsv", [(f"{word} soup {i}", label) for i in range(9) for word, label in TASTES])
    text = TEXT.replace('"none", "prompt"', '"bag of words"')
    for part in ("train", "dev", "test"):
        text = text.replace(f'"{part}.tsv"', '"words.tsv"')
    _, found, _ = run(text)
    (entry,) = found["table"]
    assert "model" not in entry["axes"]
    assert entry["seeds"] == 3
    assert entry["spread"] == 0
    assert entry["mean"] == 1


def test_a_task_can_be_tested_on_rows_and_words_of_another_task(at, tmp_path):
    table_of(at / "plain.tsv", [("He sat.", "same"), ("She ran.", "different")])
    text = TEXT.replace(
        'train = "train.tsv"\ndev = "dev.tsv"\ntest = "test.tsv"',
        """
        task = "mrpc"
        train = "mrpc.txt"
        words = { not_equivalent = "different", equivalent = "same" }
        test.news = "mrpc.txt"
        test.plain = { file = "plain.tsv", task = "auto" }
        test.questions = { file = "qqp.tsv", task = "qqp", words = { duplicate = "same", not_duplicate = "different" } }
        """,
    )
    found = read(at, tmp_path, text).cells[1]
    assert found.task.label_words == ("different", "same")
    questions = found.task.tests["questions"]
    assert questions.rows[:2] == [Row("question1: Why 0? question2: How?", "same"), Row(
        "question1: Why 1? question2: How?", "different")]  # fmt: skip
    row = cells.compute(replace(found, answers=True))
    assert list(row["tests"]) == ["news", "plain", "questions"]
    answers, targets = row["answers"]["questions"], [question.target for question in questions.rows]
    assert row["tests"]["questions"]["scores"] == {
        "f1": metrics.f1(answers, targets, "same"),
        "accuracy": metrics.accuracy(answers, targets),
    }


def test_settings_of_methods_and_tasks_override_general_settings(at, tmp_path):
    text = TEXT.replace("[grid]", "settings = { steps = 5, rank = 3 }\n[methods.prompt]\nsteps = 7\n[grid]\nrank = [2]")
    none, *tuned = read(at, tmp_path, text).cells
    assert {(cell.settings.steps, cell.settings.rank, cell.settings.batch_size) for cell in tuned} == {(7, 2, 4)}
    assert none.axes == {"model": "small", "method": "none", "task": "soup"}


def test_several_grids_form_one_study(at, tmp_path):
    more = '[[grid]]\nmodel = ["small"]\nmethod = ["none", "full"]\nseed = [0, 1]\n'
    found = read(at, tmp_path, TEXT.replace("[grid]", "[[grid]]") + more)
    assert Counter(cell.method for cell in found.cells) == {"none": 1, "prompt": 6, "full": 2}


@pytest.mark.parametrize("rates", [[0.1, 0.5], [0.1]])
def test_rows_of_several_grids_are_not_merged(at, tmp_path, rates):
    text = TEXT.replace("[grid]", "[[grid]]").replace("[0.1, 0.5]", str(rates))
    found = read(at, tmp_path, text + '[[grid]]\nmodel = ["small"]\nprompt_length = [2, 3]\n')
    row = {"tests": {"soup": {"metric": "accuracy", "rows": 15, "score": 0.5}}}
    table = summary.summarize(found, {cell.key: row for cell in found.cells}).table()
    assert table[0] == ["method", "prompt_length", "learning_rate", "accuracy", "seeds"]
    tuned = [["prompt", "2", str(rate)] for rate in rates]
    assert [line[:3] for line in table[1:]] == [["none", "", ""], *tuned, ["prompt", "2", ""], ["prompt", "3", ""]]


# ---- identity of a cell ----

IN_KEY = {
    "a setting": ("steps = 2", "steps = 3"),
    "the number of shots": ("[settings]", "[settings]\nshots = 5"),
    "the dev rows": ('dev = "dev.tsv"', 'dev = "other.tsv"'),
    "the number of dev rows": ('dev = "dev.tsv"', "dev_rows = 7"),
    "the test rows": ('test = "test.tsv"', 'test = "other.tsv"'),
    "the task": ("[tasks.soup]", '[tasks.soup]\ntask = "generate"'),
    "the method": ('"prompt"]', '"lora"]'),
    "keeping the answers": ("title", "ensemble = true\ntitle"),
}
NOT_IN_KEY = {
    "the title": ('title = "Soup"', 'title = "Stew"'),
    "an explicit default": ("[settings]", "[settings]\nrank = 8"),
    "the columns": ("title", 'columns = "learning_rate"\ntitle'),
    "the number of compared settings": ("[0.1, 0.5]", "[0.1]"),
}


@pytest.mark.parametrize("what", [*IN_KEY, *NOT_IN_KEY])
def test_the_key_of_a_cell_covers_everything_that_affects_its_result(at, tmp_path, what):
    before, after = (IN_KEY | NOT_IN_KEY)[what]
    assert before in TEXT
    keys = [read(at, tmp_path, text).cells[1].key for text in (TEXT, TEXT.replace(before, after))]
    assert (keys[0] == keys[1]) == (what in NOT_IN_KEY)


def test_another_model_or_device_is_another_cell(at, tmp_path):
    cell = read(at, tmp_path).cells[1]
    write(at / "other", SMALL, weights(seed=1))
    text = TEXT.replace('["small"]', '["other"]')
    others = [grid.read_study(write_study(at, tmp_path), "cpu").cells[1], read(at, tmp_path, text).cells[1]]
    assert len({cell.key, *(other.key for other in others)}) == 3
    with pytest.raises(ValueError, match="its weights or its tokenizer have changed since the study began"):
        cells.compute(replace(cell, model=at / "other"))


def test_a_row_computed_with_another_default_is_refused(run, tmp_path, monkeypatch):
    run()
    path = next(path for path in (tmp_path / "out" / "cells").glob("*.json") if '"prompt"' in path.read_text())
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"settings": row["settings"] | {"rank": 4}}))
    (tmp_path / "out" / "rows.jsonl").unlink()
    status, _, err = run()
    assert status == 2
    assert "was computed with the default rank 4; it is now 8; set rank in the study" in err


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"key": 1, "tests": {}}', '{"key": "x", "tests": []}'])
@pytest.mark.parametrize("name", ["rows.jsonl", "cells/x.json"])
def test_a_damaged_row_is_named(run, tmp_path, name, content):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    status, found, err = run()
    assert (status, found) == (2, None)
    assert err.startswith(f"tinyprompt: {path}")
    assert err.count("\n") == 1


# ---- errors of the file ----

ERRORS = {
    "title = 3": "title: expected a text, found 3",
    "titel = 'x'": "unknown key 'titel'; did you mean 'title'",
    "columns = 'rank'": "columns: expected one of test, task, model, method, learning_rate, found 'rank'",
    "ensemble = 1": "ensemble: expected true or false, found 1",
    "[settings]\nstep = 3": "[settings]: unknown key 'step'; did you mean 'steps'",
    "[settings]\nsteps = 0": "setting steps: expected at least 1, found 0",
    "[settings]\nsteps = 2.5": "setting steps: expected int, found 2.5",
    "[settings]\ninit = 'file'": "init 'file': the prompt is missing; name a saved prompt with init_file",
    "[settings]\nshots = 25": "shots: expected 1 to the 24 training rows of task soup, found 25",
    "[settings]\nshots = 0": "shots: expected 1 to the 24 training rows",
    "[methods.lore]\nrank = 2": "[methods]: unknown key 'lore'; did you mean 'lora'",
    "[methods.lora]\nranks = 2": "[methods.lora]: unknown key 'ranks'; did you mean 'rank'",
    "[grid]\nseeds = [1]": "[grid]: unknown key 'seeds'; did you mean 'seed'",
    "[grid]\nrank = 3": "[grid]: rank: expected a list, found 3",
    "[grid]\nrank = []": "[grid]: rank: expected a list of different values, found []",
    "[grid]\nrank = [1, 1]": "[grid]: rank: expected a list of different values",
    "[grid]\nrank = [[1]]": "[grid]: rank: expected a list of different values",
    "[grid]\nrank = ['a']": "[grid]: setting rank: expected int, found 'a'",
    "[grid]\ntask = ['soups']": "[grid]: task: expected one of soup, found 'soups'",
    "[grid]\nmodel = ['none such']": "none such: no such directory",
    "[grid]\nmodel = [3]": "model: expected a name or a folder, found 3",
    "[grid]\nmethod = ['promt']": "[grid]: method: expected one of prompt,",
    "[grid]\nmethod = ['few-shot']": "method 'few-shot': the number of examples is missing; set shots",
    "[tasks.soup]\ntrain = 'no.tsv'": "[tasks.soup]: {at}/no.tsv: no such file",
    "[tasks.soup]\ntest = {}": "[tasks.soup]: test: expected the name of a test set",
    "[tasks.soup]\ntest = 3": "[tasks.soup]: test: expected a text or a table, found 3",
    "[tasks.soup]\ntest = {a = {task = 'auto'}}": "[tasks.soup]: a: expected file, which is missing",
    "[tasks.soup]\ntask = 'trek'": "[tasks.soup]: task 'trek': expected one of auto,",
    "[tasks.soup]\ndev_rows = 10": "dev_rows: expected 1 to the 9 rows of the dev file, found 10",
    "[tasks.soup]\ntarget = 'label'": "no column 'label'",
    "[tasks.soup]\ntest = 'qqp.tsv'": "no column 'input'",
    "[tasks.soup]\nwords = {bad = 'x', good = 'y'}": "target 'so so' has no label word",
    "[tasks.soup.test.a]\nfile = 'test.tsv'\nwords = {bad='bad', good='good', 'so so'='x'}": "'x' is not a label word",
    "[tasks.stew]\ntrain = 'train.tsv'": "[tasks.stew]: expected test, which is missing",
    "[tasks]\nstew = 3": "[tasks.stew]: expected a table, found 3",
}  # fmt: skip


def changed(text, lines):
    """Return a study in which these lines replace the lines with the same key and header."""
    found, new = tomllib.loads(text), tomllib.loads(lines)

    def merge(old, new):
        return {**old, **{k: merge(old[k], v) if isinstance(old.get(k), dict) and v else v for k, v in new.items()}}

    return merge(found, new)


@pytest.mark.parametrize("lines", ERRORS)
def test_an_error_is_reported_before_any_cell_is_computed(at, tmp_path, monkeypatch, capsys, lines):
    path, found = write_study(at, tmp_path), changed(TEXT, lines)
    monkeypatch.setattr(grid.tomllib, "loads", lambda text: found)
    monkeypatch.setattr(cells, "compute", lambda cell: pytest.fail("computed"))
    assert main(["study", str(path), "--out", str(tmp_path / "out"), "--device", "numpy"]) == 2
    _, err = capsys.readouterr()
    assert err.startswith(f"tinyprompt: {path}: ")
    assert ERRORS[lines].format(at=at) in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["a =", "a = 1\na = 2", b"\xff".decode("latin-1") + "=", ""])
def test_a_file_that_is_not_a_study_is_refused(at, tmp_path, capsys, text):
    path = write_study(at, tmp_path, text)
    assert main(["study", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"tinyprompt: {path}: ")
    assert main(["study", str(at)]) == 2
    assert main(["study", str(at / "none.toml")]) == 2
    assert "none.toml: no such file" in capsys.readouterr().err
    assert main(["study", str(at / "train.tsv"), "--jobs", "0"]) == 2


VALUES = st.sampled_from(
    [0, -1, 2.5, True, "x", "", [], {}, ["x"], {"x": 1}, [[]], "train.tsv", "small", [None], 10**30]
)


@examples(60)
@given(st.data())
def test_any_other_value_is_accepted_or_refused(at, draw):
    found = tomllib.loads(TEXT)
    place, path = found, []
    while True:
        key = draw.draw(st.sampled_from(sorted(place)))
        path.append(key)
        if not isinstance(place[key], dict) or draw.draw(st.booleans()):
            break
        place = place[key]
    place[key] = draw.draw(VALUES)
    file = at / "fuzz.toml"
    file.write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid.tomllib, "loads", lambda text: found)
        try:
            message = str(file) if grid.read_study(file, "numpy").cells else "no cells"
        except (DataError, CheckpointError) as error:
            message = str(error)
    assert message.startswith(str(file))


# ---- the table ----


def results(*entries):
    return [summary.Result(axes, "accuracy", 10, scores) for axes, scores in entries]


def test_the_table_has_mean_spread_and_seeds(run, at, tmp_path, capsys):
    run(TEXT.replace("[0.1, 0.5]", "[0.1]"))
    found = read(at, tmp_path, TEXT.replace("[0.1, 0.5]", "[0.1]"))
    rows = cells.records(tmp_path / "out")
    table = summary.summarize(found, rows)
    scores = [row["tests"]["soup"]["score"] for row in rows.values() if row["method"] == "prompt"]
    (bare,) = [row["tests"]["soup"]["score"] for row in rows.values() if row["method"] == "none"]
    assert str(table).splitlines() == [
        "Soup", "", "| method | accuracy | seeds |", "| --- | ---: | ---: |", f"| none | {bare:.3f} | 1 |",
        f"| prompt | {statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f} | 3 |", "",
        "soup: accuracy on 15 rows",
    ]  # fmt: skip


def test_a_result_without_the_column_axis_is_repeated_in_each_column(at, tmp_path):
    axes = [({"task": "a", "test": "a", "method": "m", "model": name}, [0.1 * i, 0.1]) for i, name in enumerate("xyz")]
    table = summary.Summary(
        "t", results(*axes, ({"task": "a", "test": "a", "method": "b"}, [0.5])), ["method"], "model"
    )
    assert summary.markdown(table.table()) == [
        "| method | x | y | z | seeds |", "| --- | ---: | ---: | ---: | ---: |",
        "| m | 0.050 ± 0.071 | 0.100 ± 0.000 | 0.150 ± 0.071 | 2 |", "| b | 0.500 | 0.500 | 0.500 | 1 |",
    ]  # fmt: skip


def test_an_ensemble_is_scored_by_the_votes_of_its_members(run, at, tmp_path):
    text = TEXT.replace("title", "ensemble = true\ntitle").replace("[0.1, 0.5]", "[0.5]")
    _, found, _ = run(text)
    entry = found["table"][1]
    rows = [row for row in cells.records(tmp_path / "out").values() if row["method"] == "prompt"]
    rows.sort(key=lambda row: row["settings"]["seed"])
    targets = [row.target for row in tables.read_rows(at / "test.tsv")]
    votes = [vote(texts, {}) for texts in zip(*(row["answers"]["soup"] for row in rows), strict=True)]
    assert entry["scores"] == [metrics.accuracy(row["answers"]["soup"], targets) for row in rows]
    assert entry["ensemble"] == registry.score("auto", votes, tables.read_rows(at / "test.tsv"), None).mean
    study_ = read(at, tmp_path, text)
    lines = str(summary.summarize(study_, cells.records(tmp_path / "out"))).splitlines()
    assert lines[2] == "| method | average | best | ensemble | seeds |"
    assert f"{max(entry['scores']):.3f} | {entry['ensemble']:.3f} | 3 |" in lines[5]


def test_the_plot_has_the_varying_number_as_its_axis(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    rates = [({"task": "a", "test": "a", "method": "m", "rank": rank}, [0.1 * rank, 0.1]) for rank in (1, 2, 4)]
    table = summary.Summary(
        "t", results(*rates, ({"task": "a", "test": "a", "method": "b"}, [0.5])), ["method", "rank"], None
    )
    figures.draw_study(table, tmp_path / "plot.png")
    (axes,) = plt.gcf().axes
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert axes.get_xlabel() == "rank"
    curve, flat = axes.lines[0], axes.lines[-1]
    assert curve.get_xydata().tolist() == [[1, pytest.approx(0.1)], [2, pytest.approx(0.15)], [4, pytest.approx(0.25)]]
    assert set(flat.get_ydata()) == {0.5}
    bars = [segment[:, 1].tolist() for segment in axes.containers[0].lines[2][0].get_segments()]
    assert bars[0] == pytest.approx([0.1, 0.1])
    spread = statistics.stdev([0.4, 0.1])
    assert bars[2] == pytest.approx([0.25 - spread, 0.25 + spread])
    figures.draw_study(summary.Summary("t", table.results[-1:], ["method"], "task"), tmp_path / "dots.png")
    (axes,) = plt.gcf().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b"]
    plt.rcdefaults()


# ---- interruptions ----

RUNNER = '''
"""Run the command, and log each cell that was computed and written."""
import os, sys
from tinyprompt.cli.main import main
from tinyprompt.study import cells

LOG = os.environ["LOG"]

def logged(cell, folder, wait):
    from tinyprompt.study import cells
    original = getattr(cells, "original", cells.run_cell)  # a worker has the unpatched function
    compute, ran = cells.compute, []
    cells.compute = lambda cell: ran.append(cell.key) or compute(cell)
    try:
        out = original(cell, folder, wait)
    finally:
        cells.compute = compute
    for key in ran:
        with open(LOG, "a") as file:
            file.write(key + "\\n")
    return out

if __name__ == "__main__":
    cells.original, cells.run_cell = cells.run_cell, logged
    sys.exit(main(sys.argv[1:]))
'''
LONGER = TEXT.replace("steps = 2", "steps = 30").replace("[0, 1, 2]", f"{[*range(3 + KILLS)]}")


@pytest.fixture
def start(at, tmp_path):
    """Return a function that starts a study in child processes, which log each computed cell."""
    script, path = tmp_path / "runner.py", write_study(at, tmp_path, LONGER)
    script.write_text(RUNNER)
    environment = os.environ | {"LOG": str(tmp_path / "log"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def start(*options, out=os.devnull):
        words = [sys.executable, str(script), "study", str(path), "--device", "numpy", "--out", str(tmp_path / "out")]
        with open(out, "w") as out, open(tmp_path / "err", "w") as err:  # no pipes: orphans would keep them open
            return subprocess.Popen([*words, *options], stdout=out, stderr=err, env=environment, start_new_session=True)

    return start


def finished(folder):
    """Map the file of each finished cell to its inode, time and content, none of which may change."""
    found = {}
    for path in (folder / "cells").glob("[!.]*.json"):
        about = path.stat()
        found[path.name] = about.st_ino, about.st_mtime_ns, path.read_text()
    return found


def computed_once(tmp_path, number):
    """Assert that all cells are complete and that none was computed twice."""
    assert len(finished(tmp_path / "out")) == number
    times = Counter((tmp_path / "log").read_text().split())
    assert set(times.values()) == {1}
    assert {f"{key}.json" for key in times} <= finished(tmp_path / "out").keys()
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert {f"{row['key']}.json" for row in rows} == finished(tmp_path / "out").keys()
    assert len(rows) == number


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs POSIX signals")
def test_a_study_survives_kills(start, tmp_path):
    rng, kept = random.Random(KILLS), {}
    for i in range(KILLS):
        process = start("--jobs", "2")
        time.sleep(rng.uniform(0.8, 2.5))
        if i % 2:
            os.killpg(process.pid, signal.SIGKILL)  # with its workers
        else:
            process.kill()  # the workers may finish their cells
        process.wait()
        after = finished(tmp_path / "out")
        assert kept.items() <= after.items()
        kept = after
    process = start("--jobs", "2")
    assert process.wait(120) == 0, (tmp_path / "err").read_text()
    assert kept.items() <= finished(tmp_path / "out").items()
    computed_once(tmp_path, 1 + 2 * (3 + KILLS))


def test_two_simultaneous_commands_share_the_cells(start, tmp_path):
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    processes = [start("--json", out=file) for file in files]
    assert [process.wait(120) for process in processes] == [0, 0]
    first, second = (json.loads(file.read_text()) for file in files)
    assert first["table"] == second["table"]
    computed_once(tmp_path, 1 + 2 * (3 + KILLS))


def test_ctrl_c_prints_how_to_continue(start, at, tmp_path):
    write_study(at, tmp_path, LONGER.replace("steps = 30", "steps = 300"))  # long enough for the signal
    process = start()
    until = time.time() + 120
    while not finished(tmp_path / "out") and time.time() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    err = (tmp_path / "err").read_text()
    assert "Traceback" not in err
    assert err.splitlines()[-1].endswith("/out; repeat the command to continue")
    assert 0 < len(finished(tmp_path / "out")) < 1 + 2 * (3 + KILLS)


def test_a_killed_worker_is_reported(at, tmp_path, monkeypatch):
    def dies(cell, folder, wait):
        os.kill(os.getpid(), 9)

    monkeypatch.setattr(cells, "run_cell", dies)
    with pytest.raises(DeviceError, match="finished cells are kept; repeat the command to continue"):
        list(cells.run(read(at, tmp_path).cells, tmp_path / "out", jobs=2))


def test_dask_workers_give_the_same_table(run, tmp_path):
    pytest.importorskip("distributed", reason="needs Dask: pip install 'dask[distributed]'")
    _, here, _ = run()
    rows = cells.records(tmp_path / "out")
    for path in [*(tmp_path / "out" / "cells").iterdir(), tmp_path / "out" / "rows.jsonl"]:
        path.unlink()
    status, there, _ = run(TEXT, "--backend", "dask", "--jobs", "2")
    assert (status, there) == (0, here)
    again = cells.records(tmp_path / "out")
    assert {key: row["tests"] for key, row in again.items()} == {key: row["tests"] for key, row in rows.items()}


def test_a_missing_backend_is_named(run, monkeypatch):
    monkeypatch.setattr(cells.importlib.util, "find_spec", lambda name: None)
    status, _, err = run()
    assert status == 2
    assert "joblib is not installed; pip install 'tinyprompt-t5[study]'" in err


# ---- the studies of this repository ----

STUDIES = sorted((ROOT / "lessons" / "studies").glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_of_the_lessons_can_be_read(path):
    text = path.read_text(encoding="utf-8")
    if '"data/' in text and not (path.parent / "data").exists():
        pytest.skip("needs the data sets in lessons/studies/data")
    if '"google/' in text:
        pytest.skip("needs a model that was pulled")
    assert grid.read_study(path, "numpy").cells


@pytest.mark.parametrize(
    "path", [path for path in STUDIES if (path.with_suffix("") / "rows.jsonl").exists()], ids=lambda path: path.stem
)
def test_the_rows_of_the_lessons_match_their_studies(path):
    if '"data/' in path.read_text(encoding="utf-8") and not (path.parent / "data").exists():
        pytest.skip("needs the data sets in lessons/studies/data")
    found = cells.records(path.with_suffix(""))
    study = grid.read_study(path, next(iter(found.values()))["device"])
    cells.check_settings(study.cells, found, path)
    assert {cell.key for cell in study.cells} == found.keys()


def test_table_cells_escape_bars_and_line_breaks():
    table = [["text", "score"], ["good | bad\nday", "0.5"]]
    assert summary.markdown(table)[2] == "| good \\| bad day | 0.5 |"
