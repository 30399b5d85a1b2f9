"""The page of `export --web` in headless Chromium: tokens, Adam, training, ranking and files are those of Python."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from browsing import chromium, look, served, until
from test_page import CONTRAST

from tinyprompt import data, optim, tokenizer
from tinyprompt import train as training
from tinyprompt.cli.main import main
from tinyprompt.errors import CheckpointError
from tinyprompt.export import npm
from tinyprompt.export import page as web
from tinyprompt.files import models, prompts, tables
from tinyprompt.model import PROMPT, Prompt
from tinyprompt.predict import label_scores, probabilities
from tinyprompt.tasks.registry import DEMO
from tinyprompt.tree import flatten, nest

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
    """The folder of a page for the smallest model."""
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
    with chromium(downloads=downloads) as driver, served(site) as url:
        look(driver)
        driver.url = url
        yield driver


@pytest.fixture(scope="module")
def model():
    return models.load("tiny")


def opened(browser, rows=ROWS):
    """The page once it is ready, with rows in its text box."""
    browser.get(browser.url)
    until(lambda: said(browser, "status").startswith("ready"), 20)
    if rows:
        browser.execute_script(
            "const [box, text] = [document.getElementById('rows'), arguments[0]];"
            "document.getElementById('task').value = ''; box.value = text; box.dispatchEvent(new Event('input'))",
            "\n".join(f"{word}: {text}" for word, text in rows),
        )
    return browser


def said(browser, name):
    return browser.find_element("id", name).text


def tune(browser, steps):
    """Train in the page as a visitor does; what it says at the end."""
    field = browser.find_element("id", "steps")
    field.clear()
    field.send_keys(str(steps))
    browser.find_element("id", "train").click()
    until(lambda: browser.find_element("id", "train").is_enabled(), 30)
    assert browser.find_element("id", "progress").get_attribute("class") == "quiet", said(browser, "progress")
    return said(browser, "progress")


def compute(browser, code, *given):
    """What an expression in JavaScript is, with `tune` the module tune.js, `state` that of the page, and `given`."""
    script = "const given = [...arguments], done = given.pop(); Promise.all([import('./tune.js'), import('./app.js')])"
    script += f".then(async ([tune, {{ state }}]) => ({code})).then(done, error => done({{ error: String(error) }}))"
    found = browser.execute_async_script(script, *given)
    assert not (isinstance(found, dict) and "error" in found), found
    return found


def test_the_tokens_are_those_of_python(browser, model):
    texts = [row.input for name in ("topic", "sentiment") for row in tables.read_rows(DEMO / f"{name}.train.tsv")] + ODD
    opened(browser, None)
    assert compute(browser, "given[0].map(text => state.model.encode(text))", texts) == [
        model.tokenizer.encode(text) for text in texts
    ]


def test_the_ids_of_every_character_are_those_of_python(model, tmp_path):
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


def test_a_tokenizer_whose_ids_the_page_may_not_give_is_refused(model):
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


def test_adam_is_that_of_python(browser):
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
    opened(browser, None)
    found = compute(browser, code, params.tolist(), grads.tolist())
    assert np.allclose(found, trainable["x"], rtol=1e-5, atol=0)


def test_an_epoch_has_every_row_once_and_seeds_differ(browser):
    opened(browser, None)
    code = "(() => { const b = tune.batches([0, 1, 2, 3, 4, 5, 6], 3, given[0]); "
    code += "return [...Array(14)].map(() => b.next().value) })()"
    first, same, other = (compute(browser, code, seed) for seed in (0, 0, 1))
    assert first == same != other
    assert {len(batch) for batch in first} == {3}
    rows = np.ravel(first).reshape(6, 7)
    assert (np.sort(rows, axis=1) == np.arange(7)).all()
    assert len({tuple(row) for row in rows}) == 6


def by_python(model, site, steps):
    """Losses and prompt in float64 of steps on ROWS, which are one batch."""
    params = nest({name: value.astype(np.float64) for name, value in flatten(model.params).items()})
    trainable, adam = {PROMPT: np.load(site / "prompt.npy").astype(np.float64)}, optim.adam()
    state, losses = adam.init(trainable), []
    batch = data.batch_of([data.Row(text, word) for word, text in ROWS], model.tokenizer, SHAPE.input_tokens)
    for step in range(steps):
        loss, grads = training.loss_and_grads(trainable, params, model.config, batch)
        losses.append(float(loss))
        rate = web.SETTINGS["learning_rate"] * (1 - step / steps)
        trainable, state = adam.update(trainable, grads, state, rate)
    return losses, trainable[PROMPT]


def test_five_steps_are_those_of_python(browser, site, model):
    """Losses to 1e-5. The prompt to 1e-4: Adam divides each number of a gradient, and its rounding, by its size."""
    tune(opened(browser), 3)
    tune(browser, 5)  # begins anew
    losses, prompt = by_python(model, site, 5)
    assert np.allclose(compute(browser, "state.losses"), losses, rtol=1e-5, atol=0)
    found = np.reshape(compute(browser, "[...state.model.prompt.data]"), prompt.shape)
    assert np.linalg.norm(found - prompt) < 1e-4 * np.linalg.norm(prompt)
    assert losses[-1] < losses[0]


def test_the_prompt_goes_on_in_python(browser, model, downloads, tmp_path, monkeypatch, capsys):
    """The commands of the page: the same accuracy and shares; PEFT has the same vectors."""
    opened(browser, None)
    told = tune(browser, 5)
    browser.find_element("id", "save").click()
    until(lambda: (downloads / "topic.npy").exists())
    monkeypatch.chdir(tmp_path)
    shutil.copy(downloads / "topic.npy", tmp_path)
    commands = browser.find_element("id", "commands").text.replace("\\\n", "").splitlines()
    assert [command.split()[1] for command in commands] == ["convert", "predict", "convert"]
    for command in commands:
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)][1:]
        assert main(words) == 0, capsys.readouterr().err
    vectors = np.load("topic.npy", allow_pickle=False)
    assert (Path("topic.npy").stat().st_size - vectors.nbytes) % 64 == 0
    assert (vectors.dtype, vectors.shape) == (np.float32, (5, 32))
    assert (vectors.ravel() == np.float32(compute(browser, "[...state.model.prompt.data]"))).all()
    assert (prompts.load_prompt("topic-for-peft").array == vectors).all()
    capsys.readouterr()
    assert main(["eval", "topic.safetensors", str(DEMO / "topic.test.tsv"), "--model", "tiny", "--json"]) == 0
    accuracy = json.loads(capsys.readouterr().out)["scores"]["accuracy"]
    assert f"accuracy {accuracy:.3f} on 200 test rows" in told
    texts = ["Two goals in the last minute.", "Bread", "x " * 100]
    shares = compute(browser, "Promise.all(given[0].map(text => state.model.classify(text, state.words)))", texts)
    prompt = prompts.load_prompt("topic.safetensors")
    cut = Prompt(prompt.params, None, None, prompt.label_words, {"max_input_tokens": SHAPE.input_tokens})
    assert np.allclose(shares, probabilities(label_scores(model, cut, texts, "numpy")), atol=1e-4)


def test_bars_follow_what_is_typed_and_what_is_learned(browser):
    opened(browser)
    text = browser.find_element("id", "text")
    text.clear()
    text.send_keys("Cold soup")

    def bars():
        read = "return [...document.querySelectorAll('#answer li')]"
        read += ".map(li => [...li.querySelectorAll('span')].map(span => span.textContent))"
        return browser.execute_script(read)

    before = until(bars)
    assert [word for word, _ in before] == ["bad", "good"]
    assert sum(float(share[:-1]) for _, share in before) == pytest.approx(100, abs=0.11)
    assert "accuracy" in tune(browser, 30)
    after = until(lambda: (now := bars()) != before and now)
    shares = compute(browser, "state.model.classify('Cold soup', state.words)")
    assert after == [[word, f"{100 * share:.1f}%"] for word, share in zip(("bad", "good"), shares, strict=True)]
    best = browser.find_element("css selector", "#answer li.best span").text
    assert best == ("bad", "good")[int(np.argmax(shares))]
    browser.find_element("id", "task").send_keys("your")
    text.clear()
    text.send_keys("x")
    text.clear()
    text.send_keys(" ")
    until(lambda: not bars())


WRONG = {
    "no colon here": "Line 1: expected a label, a colon and a text",
    "good: a\n\nbad:": "Line 3: expected a label, a colon and a text",
    "good: a": "Expected 2 to 8 different labels, found 1.",
    "\n".join(f"l{i}: a" for i in range(9)): "Expected 2 to 8 different labels, found 9.",
    "Good: a\ngood: b": "The labels Good and good are the same to the tokenizer; choose others.",
    "good: a\nextraordinarilyunusual label word: b": "pieces; at most 3 fit",
}


def test_rows_that_cannot_be_used(browser):
    opened(browser)
    write = "const box = document.getElementById('rows'); box.value = arguments[0]; "
    write += "box.dispatchEvent(new Event('input'))"
    for text, message in WRONG.items():
        browser.execute_script(write, text)
        assert message in said(browser, "counted")
        assert browser.find_element("id", "counted").get_attribute("class") == "wrong"
        assert not browser.find_element("id", "train").is_enabled()
        browser.execute_script(write, "good: a\nbad: b")
        assert said(browser, "counted") == "2 rows; labels: bad, good"
        assert browser.find_element("id", "train").is_enabled()


OTHER = {
    "other rows": "at('rows').value = 'a: b\\nc: d'; at('rows').dispatchEvent(new Event('input'))",
    "same labels": "at('task').value = 'sentiment'; at('task').dispatchEvent(new Event('change'))",
}


@pytest.mark.parametrize("code", OTHER.values(), ids=OTHER)
def test_another_task_begins_with_the_first_prompt_again(code, browser, site):
    tune(opened(browser), 2)
    before, first = said(browser, "counted"), np.load(site / "prompt.npy").ravel()
    assert (np.float32(compute(browser, "[...state.model.prompt.data]")) != first).any()
    browser.execute_script(f"const at = id => document.getElementById(id); {code}")
    until(lambda: said(browser, "counted") != before)
    assert (np.float32(compute(browser, "[...state.model.prompt.data]")) == first).all()
    assert not browser.find_element("id", "save").is_enabled()


def test_webgpu_is_offered_where_it_computes_with_the_weights(browser):
    opened(browser, None)
    code = "(Object.defineProperty(navigator, 'gpu', { configurable: true, value: { requestAdapter: async () => "
    code += "given[0] && { features: new Set(given[0]) } } }), tune.Model.runsOnGpu({ weights_dtype: given[1] }))"
    half = ["shader-f16"]
    for features, dtype, wanted in [
        (None, "float32", False), ([], "float32", True), ([], "float16", False), (half, "float16", True),
        (half, "bfloat16", False),
    ]:  # fmt: skip
        assert compute(browser, code, features, dtype) is wanted


def test_stop_keeps_what_is_there(browser):
    opened(browser)
    field = browser.find_element("id", "steps")
    field.clear()
    field.send_keys("10000")
    browser.find_element("id", "train").click()
    until(lambda: said(browser, "progress").startswith("step "))
    browser.find_element("id", "stop").click()
    until(lambda: browser.find_element("id", "train").is_enabled(), 20)
    assert re.match(r"\d+ steps, .* accuracy", said(browser, "progress"))
    assert browser.find_element("id", "save").is_enabled()


def test_only_its_own_folder_is_asked_and_nothing_is_logged(browser):
    browser.get_log("browser")  # of the pages before
    opened(browser, None)
    tune(browser, 2)
    assert not browser.find_element("id", "device").is_displayed()  # there is no GPU
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(asked) > 8
    assert {name for name in asked if not name.startswith((browser.url, f"blob:{browser.url}", "data:"))} == set()
    logged = [entry["message"] for entry in browser.get_log("browser")]
    assert [message for message in logged if "No available adapters" not in message] == []  # of WebGPU


def test_a_tokenizer_that_differs_is_found_out(browser, site, tmp_path):
    other = shutil.copytree(site, tmp_path / "other", copy_function=os.link)
    about = json.loads((site / "page.json").read_text())
    about["probes"][0]["ids"][0] += 1
    (other / "page.json").unlink()
    (other / "page.json").write_text(json.dumps(about))
    with served(other) as url:
        browser.get(url)
        until(lambda: "otherwise than tinyprompt" in said(browser, "status"), 20)
        assert not browser.find_element("id", "train").is_enabled()


def test_it_can_be_read_in_light_and_dark_and_on_a_phone(browser):
    tune(opened(browser, None), 2)
    for dark in (False, True):
        for width in (320, 390, 1100):
            look(browser, width, dark)
            assert browser.execute_script("return document.documentElement.scrollWidth") == width
            found = browser.execute_script(CONTRAST)
            assert len(found) > 10
            assert not [pair for pair in found if pair[1] < (1.5 if pair[0] == "B" else 4.5)]  # WCAG 2.2, 1.4.3
    look(browser)


def test_what_a_folder_cannot_be_made_of(tmp_path, capsys, monkeypatch, folder):
    out = tmp_path / "out"

    def refused(*words):
        assert main(["export", "--web", str(out), *map(str, words)]) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "--web: is a folder of its own; leave out --out" in refused("--out", "other")
    assert "the page reads tokenizers of the kind" in refused("--model", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9")
    assert "onnxruntime-web-1.30.0.tgz: cannot be fetched" in refused()


def test_its_files_are_in_the_package():
    assert {path.name for path in web.WEB.iterdir()} == set(web.PAGE)
    wheel = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'include = ["/tinyprompt",' in wheel


def test_the_probes_have_an_unknown_piece_and_a_cut_word(model):
    ids = [model.tokenizer.encode(text) for text in web.PROBES]
    assert any(tokenizer.UNK in one for one in ids)
    assert max(map(len, ids)) > 10
