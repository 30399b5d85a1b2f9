"""The page of `export --web` in headless Chromium: tokens, Adam, training, ranking and files equal those of Python."""

import csv
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from browsing import chromium, serve_folder, set_view, wait_until
from test_page import CONTRAST

from tinyprompt import data, describe, optim, t5, tokenizer
from tinyprompt import train as training
from tinyprompt.cli.main import main
from tinyprompt.describe import nearest_pieces
from tinyprompt.errors import CheckpointError
from tinyprompt.export import npm
from tinyprompt.export import page as web
from tinyprompt.export.graphs import onnx_file
from tinyprompt.files import models, prompts, tables
from tinyprompt.methods import init_params
from tinyprompt.model import PROMPT, Prompt
from tinyprompt.predict import label_scores, probabilities
from tinyprompt.settings import Settings
from tinyprompt.tasks.registry import DEMO
from tinyprompt.tree import flatten, merge, nest

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install '.[ort]'")
SHAPE = web.SHAPE._replace(batch_size=4, prompt_length=5)
ODD = [
    *web.PROBES,
    "Füße & Straße!",
    "\uff26\uff55\uff4c\uff4c width",
    "a\u0301 e\u0300",
    "日本語 text",
    "\u200bzero",
    "it's “quoted”…",
    "🙂",
]
ROWS = [("good", "The soup was hot."), ("bad", "We waited: an hour!"), ("good", "Kind staff"), ("bad", "Cold soup")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the folder of a page for the smallest model."""
    try:
        for package in web.SCRIPTS:
            npm.fetch(package)
    except CheckpointError as error:
        pytest.skip(f"needs the npm registry or its packages in the cache: {error}")
    out = tmp_path_factory.mktemp("site") / "out"
    web.export_page("tiny", out, SHAPE)
    return out


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(site, downloads):
    with chromium(downloads=downloads) as driver, serve_folder(site) as url:
        set_view(driver)
        driver.url = url
        yield driver


@pytest.fixture(scope="module")
def model():
    return models.load("tiny")


def open_page(browser, rows=ROWS):
    """Open the page, wait until it is ready, and put rows into its text box."""
    browser.get(browser.url)
    wait_until(lambda: text_of(browser, "status").startswith("ready"), 20)
    if rows:
        browser.execute_script(
            "const [box, text] = [document.getElementById('rows'), arguments[0]];"
            "document.getElementById('task').value = ''; box.value = text; box.dispatchEvent(new Event('input'))",
            "\n".join(f"{word}: {text}" for word, text in rows),
        )
    return browser


def text_of(browser, name):
    return browser.find_element("id", name).text


def tune(browser, steps):
    """Train like a visitor; return the page's final message."""
    field = browser.find_element("id", "steps")
    field.clear()
    field.send_keys(str(steps))
    browser.find_element("id", "train").click()
    wait_until(lambda: browser.find_element("id", "train").is_enabled(), 30)
    assert browser.find_element("id", "progress").get_attribute("class") == "quiet", text_of(browser, "progress")
    return text_of(browser, "progress")


def compute(browser, code, *given):
    """Evaluate a JavaScript expression, which may use the page's `state`, its modules by name, and `given`."""
    script = (
        "const given = [...arguments], done = given.pop(); const names = ['app', 'tune', 'rows', 'inside', 'draw'];"
    )
    script += (
        "Promise.all(names.map(name => import(`./${name}.js`))).then(async ([{ state }, tune, rows, inside, draw])"
    )
    script += f" => ({code})).then(done, error => done({{ error: String(error) }}))"
    found = browser.execute_async_script(script, *given)
    assert not (isinstance(found, dict) and "error" in found), found
    return found


def prompt_of(browser):
    """Return the prompt of the page, (P, D)."""
    return np.float32(compute(browser, "[...state.model.prompt.data]")).reshape(SHAPE.prompt_length, -1)


def test_tokens_equal_python(browser, model):
    texts = [row.input for name in ("topic", "sentiment") for row in tables.read_rows(DEMO / f"{name}.train.tsv")] + ODD
    open_page(browser, None)
    assert compute(browser, "given[0].map(text => state.model.encode(text))", texts) == [
        model.tokenizer.encode(text) for text in texts
    ]


def test_ids_of_every_character_equal_python(model, tmp_path):
    if not (node := shutil.which("node")):
        pytest.skip("needs node")
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    rng = np.random.default_rng(0)
    words = ["the", " ", "cat", "<extra_id_3>", "</s>", "<pad", "x" * 60, "é", "İ", "ὈΔΥΣΣΕΎΣ"]
    mixed = [*words, *characters[:0x3000:7], *characters[::97]]
    texts = [f"cat{letter}cat" for letter in characters]
    texts += ["".join(mixed[i] for i in np.minimum(rng.geometric(0.002, 8) - 1, len(mixed) - 1)) for _ in range(20000)]
    texts += [unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD") for text in texts[-20000:]]
    (tmp_path / "tokenizer.json").write_bytes(web.tokenizer_files(model)["tokenizer.json"])
    shutil.copy(web.WEB / "tokenizer.js", tmp_path / "tokenizer.mjs")
    (tmp_path / "ids.mjs").write_text(
        'import fs from "fs"; import { Tokenizer } from "./tokenizer.mjs";'
        'const read = file => JSON.parse(fs.readFileSync(file)), words = new Tokenizer(read("tokenizer.json"));'
        "console.log(JSON.stringify(read(0).map(text => words.encode(text))))"
    )
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "check": True}
    found = json.loads(subprocess.run([node, "ids.mjs"], input=json.dumps(texts), **run).stdout)
    assert [text for text, ids in zip(texts, found, strict=True) if model.tokenizer.encode(text) != ids] == []


def test_an_unsupported_tokenizer_is_refused(model):
    def refused(change):
        about = json.loads(model.tokenizer.pipeline.to_str())
        change(about)
        pipeline = tokenizers.Tokenizer.from_str(json.dumps(about))
        with pytest.raises(CheckpointError, match="the page reads tokenizers of the kind"):
            web.tokenizer_files(dataclasses.replace(model, tokenizer=tokenizer.PieceTokenizer(pipeline)))

    refused(lambda about: about.update(normalizer={"type": "NFKC"}))
    refused(lambda about: about.update(normalizer=None))
    refused(lambda about: about.update(pre_tokenizer={"type": "Whitespace"}))
    for flag in ("lstrip", "rstrip", "single_word", "normalized"):
        refused(lambda about, flag=flag: about["added_tokens"][-1].update({flag: True}))
    with pytest.raises(CheckpointError, match="the page reads tokenizers of the kind"):
        web.tokenizer_files(dataclasses.replace(model, tokenizer=tokenizer.ByteTokenizer()))


def test_adam_equals_python(browser):
    rng = np.random.default_rng(0)
    params, grads = rng.normal(size=12).astype(np.float32), rng.normal(size=(5, 12)).astype(np.float32)
    grads[:, 0] *= 1e-6
    grads[:, 1] *= 1e6
    adam, trainable = optim.adam(), {"x": params}
    state = adam.init(trainable)
    for step, gradient in enumerate(grads):
        trainable, state = adam.update(trainable, {"x": gradient}, state, 0.3 - 0.05 * step)
    code = "(() => { const x = Float32Array.from(given[0]), adam = new tune.Adam(12); "
    code += "given[1].forEach((gradient, i) => adam.update(x, gradient, .3 - .05 * i)); return [...x] })()"
    open_page(browser, None)
    found = compute(browser, code, params.tolist(), grads.tolist())
    assert np.allclose(found, trainable["x"], rtol=1e-5, atol=0)


def test_an_epoch_has_every_row_once_and_seeds_differ(browser):
    open_page(browser, None)
    code = "(() => { const b = tune.batches([0, 1, 2, 3, 4, 5, 6], 3, given[0]); "
    code += "return [...Array(14)].map(() => b.next().value) })()"
    first, same, other = (compute(browser, code, seed) for seed in (0, 0, 1))
    assert first == same != other
    assert {len(batch) for batch in first} == {3}
    rows = np.ravel(first).reshape(6, 7)
    assert (np.sort(rows, axis=1) == np.arange(7)).all()
    assert len({tuple(row) for row in rows}) == 6


def first_prompt(model, site, words):
    """Return the first prompt of a training: the label words, then the exported vectors."""
    first, by_words = np.load(site / "prompt.npy"), Settings(prompt_length=len(words), init="labels")
    first[: len(words)] = init_params(model, by_words, words)[PROMPT]
    return first


def train_in_python(model, site, steps):
    """Return losses and prompt after steps in float64 on ROWS, which form one batch."""
    params = nest({name: value.astype(np.float64) for name, value in flatten(model.params).items()})
    trainable, adam = {PROMPT: first_prompt(model, site, ("bad", "good")).astype(np.float64)}, optim.adam()
    state, losses = adam.init(trainable), []
    batch = data.batch_of([data.Row(text, word) for word, text in ROWS], model.tokenizer, SHAPE.input_tokens)
    for step in range(steps):
        loss, grads = training.loss_and_grads(trainable, params, model.config, batch)
        losses.append(float(loss))
        rate = web.SETTINGS["learning_rate"] * (1 - step / steps)
        trainable, state = adam.update(trainable, grads, state, rate)
    return losses, trainable[PROMPT]


def test_five_steps_equal_python(browser, site, model):
    """Losses agree to 1e-5. The prompt agrees to 1e-4: Adam's division amplifies rounding of small gradients."""
    tune(open_page(browser), 3)
    tune(browser, 5)  # restarts
    losses, prompt = train_in_python(model, site, 5)
    assert np.allclose(compute(browser, "state.losses"), losses, rtol=1e-5, atol=0)
    found = np.reshape(compute(browser, "[...state.model.prompt.data]"), prompt.shape)
    assert np.linalg.norm(found - prompt) < 1e-4 * np.linalg.norm(prompt)
    assert losses[-1] < losses[0]


def test_the_saved_prompt_works_in_python(browser, model, downloads, tmp_path, monkeypatch, capsys):
    """The commands on the page give the same accuracy and shares, and PEFT gets the same vectors."""
    open_page(browser, None)
    message = tune(browser, 5)
    browser.find_element("id", "save").click()
    wait_until(lambda: (downloads / "topic.npy").exists())
    monkeypatch.chdir(tmp_path)
    shutil.copy(downloads / "topic.npy", tmp_path)
    commands = browser.find_element("id", "commands").text.replace("\\\n", "").splitlines()
    assert [command.split()[1] for command in commands] == ["convert", "predict", "convert"]
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    vectors = np.load("topic.npy", allow_pickle=False)
    assert (Path("topic.npy").stat().st_size - vectors.nbytes) % 64 == 0
    assert (vectors.dtype, vectors.shape) == (np.float32, (5, 32))
    assert (vectors.ravel() == np.float32(compute(browser, "[...state.model.prompt.data]"))).all()
    assert (prompts.load_prompt("topic-for-peft").array == vectors).all()
    capsys.readouterr()
    assert main(["eval", "topic.safetensors", str(DEMO / "topic.test.tsv"), "--model", "tiny", "--json"]) == 0
    accuracy = json.loads(capsys.readouterr().out)["scores"]["accuracy"]
    assert f"accuracy {accuracy:.3f} on 200 test rows" in message
    texts = ["Two goals in the last minute.", "Bread", "x " * 100]
    shares = compute(browser, "Promise.all(given[0].map(text => state.model.classify(text, state.words)))", texts)
    prompt = prompts.load_prompt("topic.safetensors")
    cut = Prompt(prompt.params, None, None, prompt.label_words, {"max_input_tokens": SHAPE.input_tokens})
    assert np.allclose(shares, probabilities(label_scores(model, cut, texts, "numpy")), atol=1e-4)


def test_bars_follow_typing_and_training(browser):
    open_page(browser)
    text = browser.find_element("id", "text")
    text.clear()
    text.send_keys("Cold soup")

    def bars():
        read = "return [...document.querySelectorAll('#answer li')]"
        read += ".map(li => [...li.querySelectorAll('span')].map(span => span.textContent))"
        return browser.execute_script(read)

    before = wait_until(bars)
    assert [word for word, _ in before] == ["bad", "good"]
    assert sum(float(share[:-1]) for _, share in before) == pytest.approx(100, abs=0.11)
    assert "accuracy" in tune(browser, 30)
    after = wait_until(lambda: (now := bars()) != before and now)
    shares = compute(browser, "state.model.classify('Cold soup', state.words)")
    assert after == [[word, f"{100 * share:.1f}%"] for word, share in zip(("bad", "good"), shares, strict=True)]
    best = browser.find_element("css selector", "#answer li.best span").text
    assert best == ("bad", "good")[int(np.argmax(shares))]
    browser.find_element("id", "task").send_keys("your")
    text.clear()
    text.send_keys("x")
    text.clear()
    text.send_keys(" ")
    wait_until(lambda: not bars())


WRONG = {
    "no colon here": "Line 1: expected a label, a colon and a text",
    "good: a\n\nbad:": "Line 3: expected a label, a colon and a text",
    "good: a": "Expected at least 2 different labels, found 1.",
    "\u200b: a\ngood: b": "has no token",
    "Good: a\ngood: b": "The labels Good and good are the same to the tokenizer; choose others.",
    "good: a\nextraordinarilyunusual label word: b": "tinyprompt export --web DIR --target-tokens 10",
}


def test_invalid_rows_are_explained(browser):
    open_page(browser)
    write = "const box = document.getElementById('rows'); box.value = arguments[0]; "
    write += "box.dispatchEvent(new Event('input'))"
    for text, message in WRONG.items():
        browser.execute_script(write, text)
        assert message in text_of(browser, "counted")
        assert browser.find_element("id", "counted").get_attribute("class") == "wrong"
        assert not browser.find_element("id", "train").is_enabled()
        browser.execute_script(write, "good: a\nbad: b")
        assert text_of(browser, "counted") == "2 rows, of which 0 are held out; labels: bad, good"
        assert browser.find_element("id", "train").is_enabled()


OTHER = {
    "other rows": "at('rows').value = 'a: b\\nc: d'; at('rows').dispatchEvent(new Event('input'))",
    "same labels": "at('task').value = 'sentiment'; at('task').dispatchEvent(new Event('change'))",
}


@pytest.mark.parametrize("code", OTHER.values(), ids=OTHER)
def test_another_task_restarts_from_the_first_prompt(code, browser, site, model):
    tune(open_page(browser), 2)
    before = text_of(browser, "counted")
    browser.execute_script(f"const at = id => document.getElementById(id); {code}")
    wait_until(lambda: text_of(browser, "counted") != before and compute(browser, "state.path.length") == 1)
    first = first_prompt(model, site, tuple(compute(browser, "state.words")))
    assert np.allclose(prompt_of(browser), first, rtol=1e-6)
    assert not browser.find_element("id", "save").is_enabled()


def test_reset_restores_the_first_prompt(browser, site, model):
    tune(open_page(browser), 2)
    first = first_prompt(model, site, ("bad", "good"))
    assert not np.allclose(prompt_of(browser), first)
    browser.find_element("id", "reset").click()
    wait_until(lambda: "first values" in text_of(browser, "progress") and compute(browser, "state.path.length") == 1)
    assert np.allclose(prompt_of(browser), first, rtol=1e-6)
    assert compute(browser, "[state.losses.length, state.scores.length]") == [0, 0]
    browser.execute_script(
        "const init = document.getElementById('init'); init.value = 'prompt'; init.dispatchEvent(new Event('change'))"
    )
    wait_until(lambda: (prompt_of(browser) == np.load(site / "prompt.npy")).all())


# ---- rows of files, and held-out rows ----


TABLE = [
    ("review", "stars", "id"),
    ('He said "hot, fresh bread".', "good", "1"),
    ("We waited,\nan hour", "a: b", "2"),
    ("", "good", "3"),
    ("Füße; kalt\t!", '"so"', "4"),
    ("Kind staff", "good", "5"),
]
CLEAN = [(" ".join(text.split()), label) for text, label, _ in TABLE[1:] if text]


@pytest.mark.parametrize("delimiter", [",", ";"])
@pytest.mark.parametrize("ends", ["\r\n", "\n"])
def test_a_csv_file_fills_the_rows(browser, tmp_path, delimiter, ends):
    """A byte order mark; quotes, line ends and delimiters in fields; a colon in a label; a missing text."""
    written = io.StringIO()
    csv.writer(written, delimiter=delimiter, lineterminator=ends).writerows(TABLE)
    path = tmp_path / "my rows.csv"
    path.write_bytes(written.getvalue().encode("utf-8-sig"))
    open_page(browser).find_element("id", "file").send_keys(str(path))
    wait_until(lambda: "left out" in text_of(browser, "counted"))
    assert text_of(browser, "counted") == (
        '4 rows, of which 0 are held out; labels: "so", a: b, good; 1 lines without a text or a label are left out'
    )
    assert [(row["input"], row["target"]) for row in compute(browser, "state.rows")] == CLEAN
    assert "tinyprompt convert my-rows.npy my-rows.safetensors" in text_of(browser, "commands")
    choose = "const it = document.getElementById(arguments[0]); it[arguments[1]] = arguments[2];"
    choose += "it.dispatchEvent(new Event('change'))"
    browser.execute_script(choose, "label-column", "value", "2")
    assert "labels: 1, 2, 4, 5; 1 lines" in text_of(browser, "counted")
    browser.execute_script(choose, "header", "checked", False)
    assert "labels: 1, 2, 4, 5, id; 1 lines" in text_of(browser, "counted")


def test_a_quote_between_tabs_is_kept(browser, tmp_path, caplog):
    lines = ["input\ttarget", 'say "so"\tgood', '"The soup"\tbad', '"He said ""so""."\tgood', '"\tbad']
    path = tmp_path / "mine.tsv"
    path.write_text("\n".join(lines))
    open_page(browser).find_element("id", "file").send_keys(str(path))
    wait_until(lambda: "the quotes were kept" in text_of(browser, "counted"))
    found = [(row["input"], row["target"]) for row in compute(browser, "state.rows")]
    assert found == [(row.input, row.target) for row in tables.read_rows(path)]
    assert text_of(browser, "counted").endswith("; 1 rows look quoted, as in a .csv; the quotes were kept")
    assert "1 texts look quoted" in caplog.text


def test_a_keystroke_among_many_rows_tokenises_the_changed_row(browser):
    browser = open_page(browser)
    type_in = "const box = document.getElementById('rows'); box.value = arguments[0];"
    type_in += "box.dispatchEvent(new Event('input'))"
    rows = [f"{('good', 'bad')[i % 2]}: The soup number {i} was hot and the bread was fresh." for i in range(5000)]
    browser.execute_script(type_in, "\n".join(rows))
    wait_until(lambda: "5000 rows" in text_of(browser, "counted"))
    record = "text => (state.asked = [...state.asked ?? [], text], state.encode.call(state.model, text))"
    compute(browser, f"(state.encode = state.model.encode, state.model.encode = {record}, 0)")
    browser.execute_script(type_in, "\n".join(rows) + " And cold.")
    asked = set(compute(browser, "state.asked"))  # the example and the label words are asked for repeatedly
    assert {text for text in asked if "And cold" in text} == {rows[-1].partition(": ")[2] + " And cold."}
    assert len(asked) < 10


def test_a_file_can_be_dropped(browser):
    drop = "const data = new DataTransfer(); data.items.add(new File([arguments[0]], 'mine.tsv'));"
    drop += (
        "document.getElementById('rows').dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true }))"
    )
    open_page(browser).execute_script(drop, "\ufeffgood\tThe soup was hot.\nbad\tCold soup\ngood\tKind staff\n")
    wait_until(lambda: "3 rows" in text_of(browser, "counted"))  # no line is taken as a header
    assert [row["target"] for row in compute(browser, "state.rows")] == ["good", "bad", "good"]
    for text, message in {
        "one column\nof text": "The file has one column.",
        "a,b\r\n1,2\r\n3": "Line 3: 1 fields, but the first line has 2.",
        'a,b\n"never closed,2\n': "Line 2: a quote is out of place or never closed.",
    }.items():
        browser.execute_script(drop, text)
        wait_until(lambda message=message: message in text_of(browser, "counted"))
        assert not browser.find_element("id", "train").is_enabled()
    browser.execute_script(drop.replace("[arguments[0]]", "[new Uint8Array([0xff, 0xfe, 65])]"))
    wait_until(lambda: "not UTF-8" in text_of(browser, "counted"))


@pytest.mark.parametrize(
    ("header", "text", "label"),
    [("id,sentence,class", 1, 2), ("label,id,body", 2, 0), ("when,what,kind", 1, 2), ("a,input,b", 1, 2)],
)
def test_the_columns_are_guessed(browser, header, text, label):
    open_page(browser, None)
    rows = [["0", "0", "0"] for _ in range(6)]
    for i, row in enumerate(rows):
        row[3 - text - label] = str(100 + i)
        row[text], row[label] = f"some text of number {i}", ("bad", "good")[i % 2]
    code = "rows.guessColumns({ lines: given[0] })"
    found = compute(browser, code, [header.split(","), *rows])
    assert found == {"text": text, "label": label, "header": True}


def test_held_out_rows_are_a_share_of_each_label_in_any_order(browser):
    open_page(browser, None)
    rows = [{"input": f"text {i}", "target": ("good", "bad", "good", "fair")[i % 4]} for i in range(80)]
    rows += [{"input": "text 7", "target": "fair"}] * 3 + [{"input": "alone", "target": "rare"}]
    order = np.random.default_rng(0).permutation(80)
    code = "given[0].map(some => rows.holdOut(some, given[1]))"
    first, shuffled, fewer = compute(browser, code, [rows, [rows[i] for i in order] + rows[80:], rows[:40]], 0.2)
    held = {row["input"] for row in first["held"]}
    assert held == {row["input"] for row in shuffled["held"]}
    assert held.isdisjoint({row["input"] for row in first["rows"]})
    assert first["rows"] + first["held"] != rows
    assert len(first["rows"]) + len(first["held"]) == len(rows)
    times = [sum(row["target"] == word for row in fewer["held"]) for word in ("good", "bad", "fair", "rare")]
    assert times == [4, 2, 2, 0]
    assert "alone" not in held
    assert len({row["input"] for row in compute(browser, code, [rows], 0.9)[0]["rows"]}) >= 4


def test_accuracy_on_held_out_rows_is_shown_with_the_majority_class(browser):
    rows = [("bad" if i % 3 else "good", f"{('cold', 'hot')[i % 3 == 0]} soup {i}") for i in range(30)]
    message = tune(open_page(browser, rows), 30)
    assert "30 rows, of which 6 are held out" in text_of(browser, "counted")
    held, scores = compute(browser, "[state.held, state.scores]")
    assert [step for step, _ in scores] == [10, 20, 30]
    code = "Promise.all(state.held.map(row => state.model.classify(row.input, state.words)))"
    shares = np.array(compute(browser, code))
    right = np.mean([("bad", "good")[i] == row["target"] for i, row in zip(shares.argmax(1), held, strict=True)])
    assert scores[-1][1] == pytest.approx(right)
    assert message.endswith(f"accuracy {right:.3f} on 6 held-out rows; majority class {4 / 6:.3f}")


def test_shares_of_many_labels_equal_python(browser, model, site):
    """There are more labels than the graph scores at once."""
    words = ("red", "blue", "green", "black", "white", "pink", "gold", "grey", "brown")
    rows = [(word, f"a {word} wall") for word in words]
    open_page(browser, rows)
    tune(browser, 1)
    shares = compute(browser, "state.model.classify('a red wall', state.words)")
    prompt = Prompt({PROMPT: prompt_of(browser)}, label_words=tuple(sorted(words)))
    assert np.allclose(shares, probabilities(label_scores(model, prompt, ["a red wall"], "numpy"))[0], atol=1e-4)


# ---- views inside the prompt ----


def test_the_graph_of_the_views_equals_numpy(model):
    import onnxruntime

    rng = np.random.default_rng(0)
    prompt = rng.normal(size=(SHAPE.prompt_length, model.config.d_model)).astype(np.float32)
    ids = np.array([model.tokenizer.encode("Two goals in the last minute.")])
    P, L = len(prompt), ids.shape[1]
    padded = np.pad(ids, [(0, 0), (0, SHAPE.input_tokens - L)])
    mask = (np.arange(SHAPE.input_tokens) < L)[None].astype(np.int64)
    inputs = {"prompt": prompt, "input_ids": padded, "attention_mask": mask}
    session = onnxruntime.InferenceSession(onnx_file(web.look, inputs, model, {}))
    outputs = ["cosine", "attention", "embedding"]
    found = dict(zip(outputs, session.run(outputs, inputs), strict=True))
    table = model.params["shared"]["weight"].astype(np.float32)
    assert np.allclose(found["cosine"], describe.unit(prompt) @ describe.unit(table).T, atol=1e-5)
    assert (found["embedding"][0, :L] == table[ids[0]]).all()
    params, seen = nest({name: value.astype(np.float64) for name, value in flatten(model.params).items()}), {}
    prompted = merge(params, {PROMPT: prompt.astype(np.float64)})
    t5.encode(prompted, model.config, ids, np.ones_like(ids), t5.recorder(seen))
    layers = [seen[f"encoder.block.{i}.layer.0.attention_weights"] for i in range(model.config.num_layers)]
    assert np.allclose(found["attention"][:, :L], np.mean(layers, axis=(0, 2))[:, P:, :P], atol=1e-5)


def test_the_page_shows_nearest_words_attention_and_paths(browser, model, site):
    tune(open_page(browser), 20)
    wait_until(
        lambda: compute(browser, "state.path.length") == 4
    )  # the first prompt, steps 10 and 20, and the last prompt
    table = model.params["shared"]["weight"][: len(model.tokenizer)]
    read = "return [...document.querySelectorAll('#nearest tr')].map(tr => [...tr.cells].map(td => td.textContent))"

    def wanted():
        ids, cosines = nearest_pieces(prompt_of(browser), table, 3)
        return [
            ", ".join(f"{model.tokenizer.piece(i)} {c:.2f}" for i, c in zip(*row, strict=True))
            for row in zip(ids.tolist(), cosines.tolist(), strict=True)
        ]

    cells = wait_until(lambda: (now := browser.execute_script(read)) and [row[2] for row in now] == wanted() and now)
    first = first_prompt(model, site, ("bad", "good"))
    began = [model.tokenizer.piece(int(i)) for i in nearest_pieces(first, table, 1)[0][:, 0]]
    assert [row[1] for row in cells] == began
    moved = np.linalg.norm(prompt_of(browser) - first, axis=1) / np.linalg.norm(first, axis=1)
    assert np.allclose([float(row[3][:-1]) for row in cells], 100 * moved, atol=0.06)
    stayed = sum(row[1] == row[2].split()[0] for row in cells)
    assert text_of(browser, "stayed").startswith(f"{stayed} of 5 vectors")
    tokens = len(model.tokenizer.encode(browser.find_element("id", "text").get_attribute("value")))
    assert len(browser.find_elements("css selector", "#attention rect")) == tokens * 5
    lines = browser.find_elements("css selector", "#paths polyline")
    assert [len(line.get_attribute("points").split()) for line in lines] == [4] * 5


def test_the_plane_of_the_paths_equals_numpy(browser):
    points = np.random.default_rng(0).normal(size=(40, 8)) * [5, 3, 1, 1, 1, 1, 1, 1]
    open_page(browser, None)
    code = "(() => { const { axes } = inside.directions(given[0]); return inside.directions(given[0], axes) })()"
    found = compute(browser, code, points.tolist())
    centred = points - points.mean(0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    assert found["share"] == pytest.approx((sizes[:2] ** 2).sum() / (sizes**2).sum(), rel=1e-6)
    assert np.allclose(np.abs(found["mapped"]), np.abs(centred @ axes[:2].T), atol=1e-2)


@pytest.mark.parametrize("losses", [[0.004, 0.001], [7.5, 0.2], [640.0, 1234.5], [0.26, 0.3], []])
def test_the_curve_is_drawn_inside_its_frame(browser, losses):
    """Every element is inside the drawing, and the axis ends near the highest loss."""
    open_page(browser, None)
    code = "(() => { const node = document.getElementById('curve'), frame = node.getBoundingClientRect();"
    code += "draw.chart(node, [{ kind: 'each', points: given[0].map((loss, i) => [i + 1, loss]) }], 2);"
    code += "const boxes = [...node.children].filter(x => x.tagName !== 'line').map(x => x.getBoundingClientRect());"
    code += "return [boxes.filter(b => b.width + b.height).map(b => [b.left - frame.left, b.top - frame.top,"
    code += "frame.right - b.right, frame.bottom - b.bottom]), [...node.querySelectorAll('text[text-anchor=end]')]"
    code += ".map(x => x.textContent)] })()"
    boxes, texts = compute(browser, code, losses)
    assert np.min(boxes) >= -0.5
    marks = [float(text) for text in texts if "step" not in text]
    assert marks == sorted({*marks})
    assert marks[0] == 0
    if losses:
        assert max(losses) <= marks[-1] <= 1.5 * max(losses)


def test_loaded_bytes_are_counted(browser, site):
    open_page(browser, None)
    code = "(async () => { const calls = [];"
    code += "const model = await tune.Model.open('wasm', (...call) => calls.push(call));"
    code += "await model.close(); return calls.filter(call => call.length === 3) })()"
    calls = compute(browser, code)
    total = sum((site / name).stat().st_size for name in ("model.safetensors", "vendor/ort-wasm-simd-threaded.wasm"))
    assert calls[-1][1:] == [total, total]
    assert calls[0][1] < total / 2
    assert len(calls) > 10
    assert [count for _, count, _ in calls] == sorted(count for _, count, _ in calls)
    assert not browser.find_element("id", "loading").is_displayed()


def test_the_example_follows_the_task_until_a_text_is_typed(browser):
    open_page(browser, None)
    text = browser.find_element("id", "text")
    choose = (
        "const it = document.getElementById('task'); it.value = arguments[0]; it.dispatchEvent(new Event('change'))"
    )
    for task in ("sentiment", "topic"):
        browser.execute_script(choose, task)
        first = tables.read_rows(DEMO / f"{task}.test.tsv")[0].input
        wait_until(lambda first=first: text.get_attribute("value") == first)
        wait_until(lambda task=task: f"tinyprompt convert {task}.npy" in text_of(browser, "commands"))
    text.clear()
    text.send_keys("my own")
    browser.execute_script(choose, "sentiment")
    wait_until(lambda: "sentiment.npy" in text_of(browser, "commands"))
    assert text.get_attribute("value") == "my own"


def test_webgpu_is_offered_if_it_supports_the_weights(browser):
    open_page(browser, None)
    code = "(Object.defineProperty(navigator, 'gpu', { configurable: true, value: { requestAdapter: async () => "
    code += "given[0] && { features: new Set(given[0]) } } }), tune.Model.runsOnGpu({ weights_dtype: given[1] }))"
    half = ["shader-f16"]
    for features, dtype, wanted in [
        (None, "float32", False), ([], "float32", True), ([], "float16", False), (half, "float16", True),
        (half, "bfloat16", False),
    ]:  # fmt: skip
        assert compute(browser, code, features, dtype) is wanted


def test_stop_keeps_the_current_prompt(browser):
    open_page(browser)
    field = browser.find_element("id", "steps")
    field.clear()
    field.send_keys("10000")
    browser.find_element("id", "train").click()
    wait_until(lambda: text_of(browser, "progress").startswith("step "))
    browser.find_element("id", "stop").click()
    wait_until(lambda: browser.find_element("id", "train").is_enabled(), 20)
    assert re.match(r"\d+ steps, .* accuracy", text_of(browser, "progress"))
    assert browser.find_element("id", "save").is_enabled()


def test_the_page_requests_its_own_folder_only_and_logs_nothing(browser):
    browser.get_log("browser")  # discard the log of earlier pages
    open_page(browser, None)
    tune(browser, 2)
    assert not browser.find_element("id", "device").is_displayed()  # without a GPU
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(asked) > 8
    assert {name for name in asked if not name.startswith((browser.url, f"blob:{browser.url}", "data:"))} == set()
    logged = [entry["message"] for entry in browser.get_log("browser")]
    assert [message for message in logged if "No available adapters" not in message] == []  # WebGPU logs this message


def test_a_different_tokenizer_is_detected(browser, site, tmp_path):
    other = shutil.copytree(site, tmp_path / "other", copy_function=os.link)
    about = json.loads((site / "page.json").read_text())
    about["probes"][0]["ids"][0] += 1
    (other / "page.json").unlink()
    (other / "page.json").write_text(json.dumps(about))
    with serve_folder(other) as url:
        browser.get(url)
        wait_until(lambda: "otherwise than tinyprompt" in text_of(browser, "status"), 20)
        assert not browser.find_element("id", "train").is_enabled()


def test_it_is_readable_in_light_and_dark_mode_and_on_a_phone(browser):
    tune(open_page(browser, None), 2)
    for dark in (False, True):
        for width in (320, 390, 1100):
            set_view(browser, width, dark)
            assert browser.execute_script("return document.documentElement.scrollWidth") == width
            found = browser.execute_script(CONTRAST)
            assert len(found) > 10
            assert not [pair for pair in found if pair[1] < (1.5 if pair[0] == "B" else 4.5)]  # WCAG 2.2, 1.4.3
    set_view(browser)


def test_export_web_fails_in_one_line(tmp_path, capsys, monkeypatch, folder):
    out = tmp_path / "out"

    def refused(*words):
        assert main(["export", "--web", str(out), *map(str, words)]) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "--web: has its own folder; leave out --out" in refused("--out", "other")
    assert "the page reads tokenizers of the kind" in refused("--model", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9")
    assert "onnxruntime-web-1.30.0.tgz: cannot be fetched" in refused()


def test_the_files_of_the_page_are_in_the_package():
    assert {path.name for path in web.WEB.iterdir()} == set(web.PAGE)
    wheel = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'include = ["/tinyprompt",' in wheel


def test_the_probes_have_an_unknown_piece_and_a_split_word(model):
    ids = [model.tokenizer.encode(text) for text in web.PROBES]
    assert any(tokenizer.UNK in tokens for tokens in ids)
    assert max(map(len, ids)) > 10
