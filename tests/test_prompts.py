"""Prompt files: saved prompts can be read again, and broken files are refused."""

import io
import json
import os
import pickle
import re
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import writers
from files import SMALL, A, B, by_hand, weights, write
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from profiles import examples
from reference import batch, pair, torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tinyprompt import methods, t5, tree
from tinyprompt.errors import CheckpointError
from tinyprompt.files import io as files_io
from tinyprompt.files import models, prompts
from tinyprompt.files.config import parse_config
from tinyprompt.files.prompts import load_prompt, load_prompts, save_prompt
from tinyprompt.fit import check_fit
from tinyprompt.model import PROMPT, Model, Prompt

peft = pytest.importorskip("peft", reason="the reference needs PEFT: pip install '.[test]'")
REAL = Path(__file__).parents[2] / "shared" / "data" / "t5_prompts"
real = pytest.mark.skipif(not REAL.is_dir(), reason="real prompts are not beside the checkout")


def prompt_for(model, **changes):
    params = {"encoder.prompt.embedding": np.random.default_rng(0).normal(0, 1, (4, 5)).astype(np.float32).T}
    about = dict(model=model.name, fingerprint=model.fingerprint, label_words=("good", "schlecht ü"))
    settings = {"seed": 3, "learning_rate": 0.1, "init": "labels", "length_penalty": None}
    return Prompt(**dict(params=params, **about, settings=settings) | changes)


def about(prompt):
    """Return all metadata of a prompt, without its arrays."""
    return prompt.model, prompt.fingerprint, prompt.label_words, prompt.settings


@pytest.mark.parametrize("words", [("good", "schlecht ü"), (), None])
def test_a_saved_prompt_can_be_read(folder, tmp_path, words):
    model = models.load(folder)
    prompt = prompt_for(model, label_words=words)
    path = prompts.save_prompt(prompt, tmp_path / "new" / "p.safetensors")
    prompts.save_prompt(prompt, path)  # overwrite the first
    assert [p.name for p in path.parent.iterdir()] == ["p.safetensors"]
    again = prompts.load_prompt(path)
    assert about(again) == about(prompt) == (model.name, model.fingerprint, words, prompt.settings)
    assert again.train_state is None
    assert again.params.keys() == prompt.params.keys()
    for name, value in again.params.items():
        assert value.dtype == np.float32
        assert value.flags.writeable
        assert (value == prompt.params[name]).all()
    check_fit(again, model)


def test_a_prompt_is_refused_on_another_model(folder, tmp_path):
    prompt = prompt_for(models.load(folder))
    other = models.load(write(tmp_path / "other", SMALL, weights(seed=1)))
    with pytest.raises(CheckpointError, match=r"'small'.*'other'"):
        check_fit(prompt, other)


def test_a_model_is_not_a_prompt(folder):
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a prompt"):
        prompts.load_prompt(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        prompts.load_prompt(folder / "p.safetensors")


@examples(100)
@given(data=st.data())
def test_a_truncated_prompt_is_refused(shared, data):
    folder, whole = shared
    (folder / "model.safetensors").write_bytes(whole)
    path = prompts.save_prompt(prompt_for(models.load(folder)), folder / "p.safetensors")
    contents = path.read_bytes()
    path.write_bytes(contents[: data.draw(st.integers(0, len(contents) - 1))])
    with pytest.raises(CheckpointError, match=r"p\.safetensors: .*(cut short|damaged)"):
        prompts.load_prompt(path)


GOOD = dict(format="tinyprompt", model="m", fingerprint="f", settings="{}", label_words='["a"]')


@pytest.mark.parametrize(
    "about",
    [
        None,
        {},
        {"format": "pt"},
        GOOD | {"settings": "{"},
        GOOD | {"settings": "3"},
        GOOD | {"label_words": "["},
        GOOD | {"label_words": "3"},
        *({k: v for k, v in GOOD.items() if k != missing} for missing in ("format", "settings")),
    ],
)
def test_damaged_metadata_of_a_prompt_is_refused(tmp_path, about):
    path = by_hand(tmp_path / "p.safetensors", {"a": A, "b": B, "__metadata__": about})
    with pytest.raises(CheckpointError, match=r"p\.safetensors: "):
        prompts.load_prompt(path)
    assert prompts.load_prompt(by_hand(path, {"a": A, "b": B, "__metadata__": GOOD})).label_words == ("a",)


def vectors(rows=5, width=4, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(0, 3, (rows, width)).astype(dtype)


def assert_same(first, second):
    """Assert that two prompts have equal bits, dtypes and metadata."""
    assert about(first) == about(second)
    for a, b in ((first.params, second.params), (first.train_state or {}, second.train_state or {})):
        assert a.keys() == b.keys()
        assert all(a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a)


FOREIGN = dict(model=None, fingerprint=None, label_words=None, settings={})
NAMES = st.text(min_size=1, max_size=8)


@examples(60)
@given(data=st.data())
def test_a_prompt_survives_every_format_that_can_hold_it(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("formats")
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
    numbers = data.draw(st.lists(floats, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    array = np.array(numbers, np.float32).reshape(shape[::-1]).T  # not contiguous
    state = {"trainable.a": array.T, "step": np.float64(3).reshape(1)}
    prompt = Prompt(
        {PROMPT: array},
        model=data.draw(st.none() | NAMES),
        fingerprint=data.draw(st.none() | NAMES),
        label_words=data.draw(st.none() | st.lists(NAMES, max_size=3).map(tuple)),
        settings=data.draw(st.dictionaries(NAMES, st.none() | st.integers() | floats | NAMES, max_size=3)),
        train_state=data.draw(st.sampled_from([None, state])),
    )
    ours, adapter, google = (folder / name for name in ("p.safetensors", "adapter", "p.npy"))
    for path in (ours, adapter):
        assert_same(load_prompt(save_prompt(prompt, path)), prompt)
        assert_same(load_prompt(save_prompt(prompt, path)), prompt)  # overwrite the first
    assert_same(load_prompt(save_prompt(load_prompt(adapter), ours)), prompt)
    assert_same(load_prompt(save_prompt(prompt, google)), Prompt({PROMPT: array}, **FOREIGN))
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "p.npy", "p.safetensors"]
    assert google.read_bytes() == npy(np.ascontiguousarray(array))
    files = {"adapter_config.json", "adapter_model.safetensors"} | (
        {prompts.TRAINING_STATE} if prompt.train_state else set()
    )
    assert {path.name for path in adapter.iterdir()} == files


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


OURS = {"format": "tinyprompt", "settings": "{}"}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, bfloat16], ids=str)
def test_our_file_may_have_any_floating_type(tmp_path, dtype):
    params = {PROMPT: vectors(dtype=dtype), "encoder.bias": np.ones(3, dtype)}
    save_file(params, tmp_path / "p.safetensors", OURS)
    wanted = {name: array.astype(np.float32) for name, array in params.items()}
    assert_same(load_prompt(tmp_path / "p.safetensors"), Prompt(wanted, **FOREIGN))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "contains no prompt"),
        ({"state.step": np.ones(1)}, "contains no prompt"),
        ({"a.lora": np.array([1, np.inf], np.float32)}, "key 'a.lora': holds NaN"),
        ({PROMPT: np.full((2, 3), np.nan, np.float32)}, f"key '{PROMPT}': holds NaN"),
        ({PROMPT: np.full((2, 3), 1e39)}, "beyond float32"),
        ({PROMPT: np.ones(3, np.float32)}, "found float32 of shape \\[3\\]"),
        ({"x.prefix.key": np.ones(3, np.float32)}, "key 'x.prefix.key': expected the float32 vectors"),
        ({PROMPT: np.ones((0, 3), np.float32)}, "is empty"),
        ({PROMPT: np.ones((2, 3), np.int32)}, "has dtype I32"),
    ],
)
def test_invalid_arrays_in_our_file_are_refused(tmp_path, params, message):
    save_file(params, tmp_path / "p.safetensors", OURS)
    with pytest.raises(CheckpointError, match=rf"p\.safetensors: .*{message}"):
        load_prompt(tmp_path / "p.safetensors")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, bfloat16, ">f4", ">f8"], ids=str)
@pytest.mark.parametrize("name", ["p.npy", "encoder.prompt.prompt.prompt"])
def test_npy_may_have_any_floating_type(tmp_path, name, dtype):
    array = vectors(dtype=np.float32).astype(dtype)
    for stored in (array, np.asfortranarray(array)):
        (tmp_path / name).write_bytes(npy(stored))
        assert_same(load_prompt(tmp_path / name), Prompt({PROMPT: array.astype(np.float32)}, **FOREIGN))
    assert list(load_prompts(tmp_path / name)) == [name.removesuffix(".npy")]


def test_npz_holds_several_prompts(tmp_path):
    path = tmp_path / "all.npz"
    one, two = vectors(), vectors(3, 6, np.float64)
    np.savez_compressed(path, one=one, **{"a/b:c": two})
    assert [(k, v.params[PROMPT].shape) for k, v in load_prompts(path).items()] == [("one", (5, 4)), ("a/b:c", (3, 6))]
    for name, array in (("one", one), ("a/b:c", two)):
        assert (load_prompt(f"{path}:{name}").params[PROMPT] == array.astype(np.float32)).all()
        assert list(load_prompts(f"{path}:{name}")) == [name]
    with pytest.raises(CheckpointError, match=r"all\.npz: contains 2 prompts; .* as .*all\.npz:NAME of one, a/b:c"):
        load_prompt(path)
    with pytest.raises(CheckpointError, match=r"all\.npz: expected the prompt 'two', found one, a/b:c"):
        load_prompt(f"{path}:two")
    with pytest.raises(CheckpointError, match=r"none\.npz: no such file"):
        load_prompt(tmp_path / "none.npz:two")
    np.savez(path, one=one)
    assert (load_prompt(path).params[PROMPT] == one).all()
    np.savez(path)
    with pytest.raises(CheckpointError, match=r"all\.npz: expected a prompt, found nothing"):
        load_prompt(path)


BAD_ARRAYS = {
    "flat": (np.ones(3, np.float32), "(P, d_model); found float32 of shape [3]"),
    "three axes": (np.ones((1, 2, 3), np.float32), "found float32 of shape [1, 2, 3]"),
    "empty": (np.ones((0, 3), np.float32), "found float32 of shape [0, 3]"),
    "ids": (np.ones((2, 3), np.int64), "found int64"),
    "complex": (np.ones((2, 3), complex), "found complex128"),
    "fields": (np.ones((2, 3), [("a", "f4")]), "found [('a', '<f4')]"),
    "text": (np.array([["a"]]), "found <U1"),
    "nan": (np.full((2, 3), np.nan), "holds NaN"),
    "beyond": (np.full((2, 3), 1e39), "beyond float32"),
    "pickled": (np.array([[{}]]), "pickled Python objects"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_an_invalid_array_is_refused(tmp_path, case):
    array, message = BAD_ARRAYS[case]
    (tmp_path / "p.npy").write_bytes(npy(array))
    np.savez(tmp_path / "p.npz", good=vectors(), bad=array)
    for path in ("p.npy", "p.npz:bad", "p.npz"):
        with pytest.raises(CheckpointError) as caught:
            load_prompts(tmp_path / path)
        assert str(caught.value).startswith(f"{tmp_path}/p.np")
        assert message in str(caught.value)
    if case != "pickled":
        assert (load_prompt(tmp_path / "p.npz:good").params[PROMPT] == vectors()).all()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "p.npy").write_bytes(pickle.dumps(vectors()))
    (tmp_path / "q.npy").write_text("no array")
    (tmp_path / "r.npz").touch()
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as file:
        file.writestr("readme.txt", "no array")
    (tmp_path / "t").write_bytes(npy(vectors())[:3])
    for name, message in (
        ("p.npy", "pickled|not a file of NumPy arrays"),
        ("q.npy", "pickled|not a file of NumPy arrays"),
        ("r.npz", "not a file of NumPy arrays"),
        ("s.npz", "expected the float32 vectors"),
        ("t", "not a safetensors file"),
        ("u.npy", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=rf"{name}.*({message})"):
            load_prompt(tmp_path / name)


@pytest.fixture(scope="module")
def saved_prompts(tmp_path_factory):
    """Write a prompt in every format; return the folder and the files."""
    folder = tmp_path_factory.mktemp("whole")
    state = {"trainable.a": vectors(), "step": np.ones(1)}
    prompt = Prompt({PROMPT: vectors()}, "m", "f", ("a", "b"), {"seed": 1}, state)
    for name in ("p.safetensors", "adapter", "p.npy"):
        save_prompt(prompt, folder / name)
    np.savez(folder / "p.npz", p=vectors(), q=vectors(seed=1))
    np.savez_compressed(folder / "c.npz", p=vectors())
    return folder, {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@examples(400)
@given(data=st.data())
def test_a_damaged_file_raises_one_error_or_is_still_a_prompt(saved_prompts, data):
    folder, files = saved_prompts
    path = data.draw(st.sampled_from(sorted(files)))
    contents = bytearray(files[path])
    if data.draw(st.booleans()):
        del contents[data.draw(st.integers(0, len(contents) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if contents:
            where = st.one_of(st.integers(0, min(200, len(contents)) - 1), st.integers(0, len(contents) - 1))
            contents[data.draw(where)] = data.draw(st.integers(0, 255))
    thing = path.parent if path.parent != folder else path
    path.write_bytes(contents)
    message = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load_prompts(thing)
        assert all(np.isfinite(p.vectors(thing)).all() for p in found.values())
    except CheckpointError as error:
        message = str(error)
    finally:
        path.write_bytes(files[path])
    assert message is None or (message.startswith(str(thing)) and "\n" not in message)


ADAPTER = dict(peft_type="PROMPT_TUNING", task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, token_dim=4)
PREFIX = ADAPTER | dict(peft_type="PREFIX_TUNING", num_layers=1, num_attention_heads=2, num_transformer_submodules=2)


def adapter(folder, config, **tensors):
    """Write a PEFT directory by hand."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors or {"prompt_embeddings": vectors()}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("more", "rows"),
    [
        ({}, 5),
        ({}, 10),
        ({"token_dim": None}, 10),
        ({"num_transformer_submodules": 2, "x": "y"}, 10),
        ({"num_transformer_submodules": 1, "peft_type": "P_TUNING", "task_type": None}, 5),
    ],
)
def test_a_handwritten_adapter_is_read(tmp_path, more, rows):
    array = vectors(rows)
    folder = adapter(tmp_path / "a", ADAPTER | {"base_model_name_or_path": "org/t5"} | more, prompt_embeddings=array)
    assert_same(load_prompt(folder), Prompt({PROMPT: array[:5]}, "org/t5", None, None, {}))
    assert list(load_prompts(folder)) == ["a"]


BAD_ADAPTERS = {
    "method": ({"peft_type": "ADALORA"}, {}, ["'peft_type'", "PREFIX_TUNING", "'ADALORA'"]),
    "method missing": ({"peft_type": None}, {}, ["'peft_type'", "PREFIX_TUNING", "None"]),
    "a list": ({"peft_type": []}, {}, ["'peft_type'", "[]"]),
    "task": ({"task_type": "CAUSAL_LM"}, {}, ["'task_type'", "SEQ_2_SEQ_LM", "CAUSAL_LM"]),
    "length missing": ({"num_virtual_tokens": None}, {}, ["'num_virtual_tokens'", "positive", "None"]),
    "length": ({"num_virtual_tokens": 4}, {}, ["[5, 4]", "adapter_config.json", "[4, 4]"]),
    "true": ({"num_virtual_tokens": True}, {}, ["'num_virtual_tokens'", "True"]),
    "parts": ({"num_transformer_submodules": 2}, {}, ["[5, 4]", "[10, 4]"]),
    "three parts": ({}, {"prompt_embeddings": vectors(15)}, ["[15, 4]", "[5, 4]"]),
    "width": ({"token_dim": 3}, {}, ["[5, 4]", "[5, 3]"]),
    "key": ({}, {"weight": vectors()}, ["adapter_model.safetensors", "'prompt_embeddings'", "'weight'"]),
    "ids": ({}, {"prompt_embeddings": np.ones((5, 4), np.int32)}, ["'prompt_embeddings'", "I32"]),
    "flat": ({}, {"prompt_embeddings": np.ones(5, np.float32)}, ["'prompt_embeddings'", "[5]"]),
    "nan": ({}, {"prompt_embeddings": np.full((5, 4), np.nan)}, ["'prompt_embeddings'", "NaN"]),
    "prefix width": (PREFIX, {}, ["[5, 4]", "[5, 8]"]),
    "prefix layers": (PREFIX | {"num_layers": None}, {}, ["'num_layers'", "positive", "None"]),
    "prefix parts": (PREFIX | {"num_transformer_submodules": 1}, {}, ["'num_transformer_submodules'", "2", "1"]),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_an_unusable_adapter_is_refused(tmp_path, case):
    more, tensors, words = BAD_ADAPTERS[case]
    folder = adapter(tmp_path / "a", ADAPTER | more, **tensors)
    with pytest.raises(CheckpointError) as caught:
        load_prompt(folder)
    assert [word for word in (str(folder), *words) if word not in str(caught.value)] == []


def test_an_incomplete_adapter_is_refused(tmp_path):
    folder = adapter(tmp_path / "a", ADAPTER)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: no such file"):
        load_prompt(folder)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: not valid JSON"):
        load_prompt(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"a: no adapter_config\.json"):
        load_prompt(folder)
    for name in prompts.ADAPTER_WEIGHTS:
        (path := adapter(tmp_path / "b", ADAPTER) / name).touch()
        with pytest.raises(CheckpointError, match=rf"{name}: is part of a PEFT adapter; name the directory"):
            load_prompt(path)


def test_a_written_adapter_has_the_format_of_peft(tmp_path):
    prompt = Prompt({PROMPT: vectors()}, "org/t5", "f", ("a",), {"seed": 1}, {"step": np.ones(1)})
    folder = save_prompt(prompt, tmp_path / "new" / "adapter")
    model = pair("t5-1.1", d_model=4)[2]
    peft.get_peft_model(model, peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)).save_pretrained(
        tmp_path / "theirs"
    )
    ours, theirs = ((f / "adapter_config.json").read_text() for f in (folder, tmp_path / "theirs"))
    assert json.loads(ours).keys() == json.loads(theirs).keys()
    assert ours == json.dumps(json.loads(ours), indent=2, sort_keys=True)
    assert json.loads(ours)["base_model_name_or_path"] == "org/t5"
    assert list(load_file(folder / "adapter_model.safetensors")) == ["prompt_embeddings"]
    with safe_open(folder / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata()["format"] == "pt"
    save_prompt(replace(prompt, train_state=None), folder)
    assert load_prompt(folder).train_state is None


@pytest.mark.parametrize("name", ["p.npz", "p.bin", "p.json", "full", "dir.npy", "file", "file/p.npy", "/proc/no/a"])
def test_an_unsupported_target_is_refused(tmp_path, name):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other").touch()
    (tmp_path / "dir.npy").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=rf"{name}: .*(\.safetensors|name a file|name another target)"):
        save_prompt(Prompt({PROMPT: vectors()}, **FOREIGN), tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["adapter_model.safetensors", prompts.TRAINING_STATE])
def test_a_directory_in_place_of_an_adapter_file_is_refused(tmp_path, name):
    folder = adapter(tmp_path / "a", ADAPTER)
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    before = (folder / "adapter_config.json").read_bytes()
    with pytest.raises(CheckpointError, match=rf"a/{name}: is a directory"):
        save_prompt(Prompt({PROMPT: vectors(6)}, **FOREIGN), folder)
    assert (folder / "adapter_config.json").read_bytes() == before


def test_a_prefix_can_be_saved_in_our_format_only(tmp_path):
    prompt = load_prompt(adapter(tmp_path / "a", PREFIX, prompt_embeddings=vectors(5, 8)))
    assert_same(load_prompt(save_prompt(prompt, tmp_path / "p.safetensors")), prompt)
    for name in ("p.npy", "b"):
        with pytest.raises(CheckpointError, match=rf"{name}: expected a soft prompt, .*found 'decoder.block.0"):
            save_prompt(prompt, tmp_path / name)
        assert not (tmp_path / name).exists()


def test_a_failed_write_leaves_the_old_prompt(tmp_path, monkeypatch):
    old = Prompt({PROMPT: vectors()}, **FOREIGN, train_state={"step": np.ones(1)})
    places = [save_prompt(old, tmp_path / name) for name in ("p.safetensors", "p.npy", "a")]
    written = []

    def full(descriptor):
        os.ftruncate(descriptor, 9)
        written.append(os.fstat(descriptor).st_size)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files_io.os, "fsync", full)
    before = sorted(tmp_path.rglob("*"))
    for path in places:
        with pytest.raises(OSError, match="No space"):
            save_prompt(replace(old, params={PROMPT: vectors(6)}), path)
        assert len(load_prompt(path).params[PROMPT]) == 5
    assert sorted(tmp_path.rglob("*")) == before
    assert written == [9, 9, 9]


def test_a_foreign_prompt_is_checked_by_its_shape(folder):
    model = models.load(folder)
    check_fit(Prompt({PROMPT: vectors()}, **FOREIGN), model)
    with pytest.raises(CheckpointError, match=r"'small': key 'encoder.prompt.embedding' .*\[5, 3\].*\(P, 4\)"):
        check_fit(Prompt({PROMPT: vectors(width=3)}, **FOREIGN), model)
    with pytest.raises(CheckpointError, match=r"key 'shared\.weight' has shape"):
        check_fit(Prompt({"shared.weight": vectors()}, **FOREIGN), model)
    at = "decoder.block.{}.layer.0.SelfAttention.prefix.{}"
    names = ("key", "value")
    prefix = lambda layers, width: {at.format(i, n): vectors(width=width) for i in range(layers) for n in names}
    check_fit(Prompt(prefix(1, 6), **FOREIGN), model)
    check_fit(Prompt(prefix(2, 6), **FOREIGN), model)  # surplus layers are ignored
    deeper = replace(model, config=parse_config(SMALL | {"num_decoder_layers": 2}))
    for width in (4, 6):
        with pytest.raises(CheckpointError, match="p: this prefix is for 1 decoder layers, 'small' has 2"):
            check_fit(Prompt(prefix(1, width), **FOREIGN), deeper, "p")
    base, key, value = prefix(1, 6), *(at.format(0, name) for name in names)
    bad = [
        prefix(1, 4),
        {key: base[key]},
        base | {value: vectors(4, 6)},
        base | {at.format(0, "query"): base[key]},
        base | {f"{key}.more": base[key]},
        base | {"encoder.block.7.layer.0.SelfAttention.prefix." + name: base[key] for name in names},
    ]
    for params in bad:
        with pytest.raises(CheckpointError, match=r"p: does not fit.* the prefix at '.*\(P, 6\) at an attention"):
            check_fit(Prompt(params, **FOREIGN), model, "p")
    ours = Prompt({"shared.weight": vectors(), "lora.a": vectors()}, "small", model.fingerprint, None, {})
    check_fit(ours, model)  # a method without a shape check


KINDS = {
    "prompt": lambda: peft.PromptTuningConfig(num_transformer_submodules=1, **TASK),
    "prompt, two parts": lambda: peft.PromptTuningConfig(**TASK),
    "MLP": lambda: peft.PromptEncoderConfig(encoder_hidden_size=7, **TASK),
    "LSTM": lambda: peft.PromptEncoderConfig(encoder_reparameterization_type="LSTM", encoder_hidden_size=7, **TASK),
    "prefix": lambda: peft.PrefixTuningConfig(**TASK),
    "projected prefix": lambda: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=7, **TASK),
}
TASK = dict(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)


def both_logits(config, params, added, theirs):
    """Return our logits with a prompt's arrays, and those of a PEFT model, for a batch with padding."""
    ids, mask, labels, _ = batch(1, 61, rows=3, length=11, out=4)
    start = t5.shift_right(labels)
    ours = t5.forward(tree.merge(params, added), config, ids, mask, start)
    inputs = dict(input_ids=ids, attention_mask=mask, decoder_input_ids=start)
    with torch.no_grad():
        return ours, theirs(**{name: torch.from_numpy(x) for name, x in inputs.items()}).logits.numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(("family", "layers", "decoder"), [("t5-1.0", 3, 3), ("t5-1.1", 2, 2), ("umt5", 4, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_saved_by_peft_give_its_logits(kind, family, layers, decoder, safe, tmp_path):
    # PEFT's prefixes need d_model == num_heads * d_kv, and at most as many decoder as encoder layers.
    shape = dict(num_layers=layers, num_decoder_layers=decoder) | (dict(d_model=18) if "prefix" in kind else {})
    config, params, model = pair(family, **shape)
    torch.manual_seed(0)
    trained = peft.get_peft_model(model, KINDS[kind]()).eval()
    with torch.no_grad():
        for parameter in trained.prompt_encoder.parameters():
            parameter.normal_()
    trained.save_pretrained(tmp_path / "a", safe_serialization=safe)
    assert (tmp_path / "a" / "adapter_model.bin").exists() == (not safe)
    prompt = load_prompt(tmp_path / "a")
    check_fit(prompt, Model(config, params, None, "m"))
    loaded = peft.PeftModel.from_pretrained(pair(family, **shape)[2], tmp_path / "a").eval()
    ours, wanted = both_logits(config, params, prompt.params, loaded)
    assert np.abs(ours - wanted).max() < 1e-10
    bare, unsaved = both_logits(config, params, {}, trained)
    assert np.abs(ours - bare).max() > 0.1
    # An encoder (MLP, LSTM, projection) runs in float32, and rounding depends on the batch.
    assert np.abs(ours - unsaved).max() < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["t5-1.0", "t5-1.1", "umt5"])
def test_peft_loads_our_adapters(family, tmp_path):
    config, params, model = pair(family)
    added = {PROMPT: vectors(5, 20)}
    folder = save_prompt(Prompt(added, "m", "f", ("a",), {"seed": 1}, {"step": np.ones(1)}), tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(model, folder).eval()
    assert (theirs.get_prompt(1)[0].detach().numpy() == added[PROMPT]).all()
    ours, wanted = both_logits(config, params, added, theirs)
    assert np.abs(ours - wanted).max() < 1e-10
    theirs.save_pretrained(tmp_path / "b")
    assert_same(load_prompt(tmp_path / "b"), Prompt(added, "m", None, None, {}))


@pytest.mark.filterwarnings("ignore")
def test_peft_logits_equal_prepended_vectors_bit_for_bit(tmp_path):
    _, _, model = pair("t5-1.1")
    model, prompt = model.float(), vectors(5, 20)
    ids, mask, labels, _ = (torch.from_numpy(x) for x in batch(1, 61, rows=3, length=11, out=4))
    joined = torch.cat([torch.from_numpy(prompt).expand(3, -1, -1), model.get_input_embeddings()(ids)], 1)
    full = torch.cat([torch.ones(3, 5), mask], 1)
    with torch.no_grad():
        wanted = model(inputs_embeds=joined, attention_mask=full, decoder_input_ids=labels).logits
        theirs = peft.PeftModel.from_pretrained(model, save_prompt(Prompt({PROMPT: prompt}, **FOREIGN), tmp_path / "a"))
        found = theirs.eval()(input_ids=ids, attention_mask=mask, decoder_input_ids=labels).logits
    assert (found == wanted).all()


@real
@pytest.mark.parametrize("task", ["sst2", "mrpc", "rte"])
def test_prompts_released_by_google_are_read(task, tmp_path):
    path = REAL / f"google_t5_1_1_lm100k_base.{task}.npy"
    prompt = load_prompt(path)
    assert prompt.vectors(path).shape == (100, 768)
    assert list(load_prompts(path)) == [path.stem]
    assert save_prompt(prompt, tmp_path / "p.npy").read_bytes() == path.read_bytes()
    again = load_prompt(save_prompt(prompt, tmp_path / "a"))
    assert save_prompt(again, tmp_path / "q.npy").read_bytes() == path.read_bytes()


@real
def test_prompts_released_by_thunlp_are_read():
    found = load_prompts(REAL / "thunlp_t5_small_100tok.npz")
    assert len(found) == 17
    assert {prompt.params[PROMPT].shape for prompt in found.values()} == {(100, 512)}
    prompt = load_prompt(f"{REAL}/thunlp_t5_small_100tok.npz:SST2")
    assert (prompt.params[PROMPT] == found["SST2"].params[PROMPT]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: {}, "contains no prompt"),
        (lambda x: {PROMPT: x * np.nan}, "NaN"),
        (lambda x: {PROMPT: x[0]}, "(P, d_model)"),
    ],
)
def test_invalid_arrays_of_our_writer_are_refused(folder, tmp_path, change, words):
    prompt = prompt_for(models.load(folder), train_state={"step": np.ones(1)})
    path = prompts.save_prompt(replace(prompt, params=change(prompt.params[PROMPT])), tmp_path / "p.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        prompts.load_prompt(path)
    assert str(path) in str(caught.value)


def test_integers_are_neither_written_nor_read(folder, tmp_path):
    prompt, path = prompt_for(models.load(folder)), tmp_path / "p.safetensors"
    params = {PROMPT: np.ascontiguousarray(prompt.params[PROMPT].astype(int))}
    with pytest.raises(CheckpointError, match=f"key '{PROMPT}' has dtype int64; expected one of float64"):
        prompts.save_prompt(replace(prompt, params=params), path)
    assert not path.exists()
    prompts.save_prompt(prompt, path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    save_file(params | {"state.step": np.ones(1)}, path, metadata)
    with pytest.raises(CheckpointError, match="I64") as caught:
        prompts.load_prompt(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, bfloat16], ids=str)
def test_our_files_are_converted_to_float32(folder, tmp_path, dtype):
    prompt = prompt_for(models.load(folder))
    narrow = prompt.params[PROMPT].astype(dtype)
    path = prompts.save_prompt(replace(prompt, params={PROMPT: narrow}), tmp_path / "p.safetensors")
    found = prompts.load_prompt(path).params[PROMPT]
    assert found.dtype == np.float32
    assert (found == narrow.astype(np.float32)).all()


AT = "decoder.block.0.layer.0.SelfAttention.prefix"


@pytest.mark.parametrize(
    "params",
    [
        {f"{AT}.key": np.ones((3, 6))},
        {f"{AT}.key": np.ones((3, 6)), f"{AT}.value": np.ones((2, 6))},
        {f"{AT}.key": np.ones((3, 6)), f"{AT}.value": np.ones((3, 6)), f"{AT}.foo": np.ones((3, 6))},
    ],
)
def test_a_malformed_prefix_is_refused(folder, params):
    with pytest.raises(CheckpointError, match=r"as many keys as values|does not fit"):
        check_fit(Prompt(params, None, None, None, {}), models.load(folder))


def test_an_adapter_in_a_subfolder_is_named(tmp_path):
    (tmp_path / "saved" / "mine").mkdir(parents=True)
    (tmp_path / "saved" / "mine" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json; name an adapter in it: .*saved/mine"):
        load_prompt(tmp_path / "saved")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_torch_file_is_named(tmp_path, legacy):
    torch = pytest.importorskip("torch")
    path = tmp_path / "prompt.pt"
    torch.save({"soft_embeds": torch.ones(3, 4)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="is a file of torch"):
        prompts.load_prompt(path)


# ---- files that other processes write ----


def test_prompts_are_not_memory_mapped(saved_prompts, monkeypatch, tmp_path):
    """A mapped file that is truncated would crash the process."""
    torch.save({"prompt_embeddings": torch.zeros(5, 4)}, adapter(tmp_path / "bin", ADAPTER) / "adapter_model.bin")
    (tmp_path / "bin" / "adapter_model.safetensors").unlink()
    for name in ("numpy.memmap", "mmap.mmap"):
        monkeypatch.setattr(name, type("Never", (), {}))  # any call fails
    for name in ("p.safetensors", "adapter", "p.npy", "p.npz:p", "c.npz"):
        assert load_prompt(saved_prompts[0] / name).params
    assert load_prompt(tmp_path / "bin").params


@pytest.mark.parametrize("name", ["p.safetensors", "adapter"])
def test_two_writers_never_produce_a_mixture(tmp_path, name):
    found = writers.count_reads(
        writers.versions(models.load(write(tmp_path / "t5", SMALL, weights()))), tmp_path / name, 0.7
    )
    assert found["mixed"] == 0
    assert found["first"]
    assert found["second"]
    assert name == "adapter" or not found["refused"]


def test_an_adapter_that_changes_during_reading_is_read_again(tmp_path, monkeypatch):
    folder, read = adapter(tmp_path / "a", ADAPTER), prompts.read_tensors

    def later(path):
        monkeypatch.setattr(prompts, "read_tensors", read)
        adapter(folder, ADAPTER | {"base_model_name_or_path": "new"}, prompt_embeddings=vectors(seed=1))
        return read(path)

    monkeypatch.setattr(prompts, "read_tensors", later)
    assert_same(load_prompt(folder), Prompt({PROMPT: vectors(seed=1)}, "new", None, None, {}))


def header_of(shape, length=None):
    """Build a safetensors file of our format with one tensor by hand."""
    about = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}
    text = json.dumps({PROMPT: about, "__metadata__": GOOD}).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(4)


ODD = {
    "dimensions.safetensors": lambda path: path.write_bytes(header_of([1] * 100)),
    "folder.safetensors": lambda path: path.mkdir(),
    "pipe.npy": os.mkfifo,
    "link.npz": lambda path: path.symlink_to("nowhere"),
    "loop.npy": lambda path: path.symlink_to(path.name),
    "header.safetensors": lambda path: path.write_bytes(header_of([1], 2**63)),
    "empty.safetensors": lambda path: path.touch(),
    "device.npy": lambda path: path.symlink_to("/dev/zero"),
    "sparse.npz": lambda path: [path.touch(), os.truncate(path, 2**40)],
    "adapter": lambda path: adapter(path, ADAPTER, prompt_embeddings=np.ones((5, 4), np.int32)),
    "closed": lambda path: adapter(path, ADAPTER).chmod(0),
    "shut.npy": lambda path: [np.save(path, vectors()), path.chmod(0)],
}


@pytest.fixture
def odd_folder(tmp_path):
    yield tmp_path / "prompts"
    for path in (tmp_path / "prompts").iterdir():
        if path.exists():
            path.chmod(0o700)


def test_a_bad_entry_is_named_and_does_not_affect_others(tmp_path, odd_folder):
    model = models.load(write(tmp_path / "t5", SMALL, weights()))
    save_prompt(prompt_for(model, params={PROMPT: vectors()}, settings={}), odd_folder / "good.safetensors")
    for name, make in ODD.items():
        make(odd_folder / name)
    found = prompts.Prompts(odd_folder, model)
    allowed = set() if os.getuid() else {"closed", "shut"}  # root can read every file
    assert set(found) - allowed == {"good"}
    assert {Path(name).stem for name in found.errors} == {Path(name).stem for name in ODD} - allowed
    assert all(message.startswith(f"{odd_folder / name}") for name, message in found.errors.items())
    assert "100 dimensions" in found.errors["dimensions.safetensors"]
    save_prompt(prompt_for(model, params={PROMPT: vectors(seed=1)}, settings={}), odd_folder / "good.safetensors")
    assert found.refresh() == ["good"]


def test_any_error_of_an_entry_is_limited_to_it(tmp_path, monkeypatch):
    model = models.load(write(tmp_path / "t5", SMALL, weights()))
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, vectors())
    load = prompts.load_prompts

    def fails(path):
        if path.name == "a.npy":
            raise MemoryError("no room")
        return load(path)

    monkeypatch.setattr(prompts, "load_prompts", fails)
    found = prompts.Prompts(tmp_path, model)
    assert list(found) == ["b"]
    assert found.errors == {"a.npy": f"{tmp_path / 'a.npy'}: MemoryError: no room"}


def test_a_prompt_replaced_with_equal_size_and_time_is_read_again(tmp_path):
    model = models.load(write(tmp_path / "t5", SMALL, weights()))
    (tmp_path / "p").mkdir()
    path = tmp_path / "p" / "a.npy"
    np.save(path, vectors())
    os.utime(path, (10**9, 10**9))
    found = prompts.Prompts(path.parent, model)
    for seed in (1, 2, 3):  # also if the file is rewritten right after it was read
        path.write_bytes(npy(vectors(seed=seed)))
        os.utime(path, (10**9, 10**9))
        found.refresh()
        assert (found["a"].params[PROMPT] == vectors(seed=seed)).all()
    time.sleep(2 * prompts.TICK)
    found.refresh()
    assert found.refresh() == []


def test_a_recently_written_prompt_is_read_again(tmp_path, monkeypatch):
    model = models.load(write(tmp_path / "t5", SMALL, weights()))
    (tmp_path / "p").mkdir()
    now = (("a.npy", 0, 0, 0, time.time_ns() + 10**9),)  # two writes within a clock tick leave the same state
    monkeypatch.setattr(prompts, "state", lambda path: now)
    monkeypatch.setattr(prompts, "TICK", 2)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    np.save(tmp_path / "p" / "a.npy", vectors())
    found = prompts.Prompts(tmp_path / "p", model)
    np.save(tmp_path / "p" / "a.npy", vectors(seed=1))
    found.refresh()
    assert (found["a"].params[PROMPT] == vectors(seed=1)).all()


# ---- LoRA and IA3, from PEFT and for PEFT ----

SEQUENCES = dict(task_type="SEQ_2_SEQ_LM", inference_mode=False)
CONFIGS = {
    "lora": lambda: peft.LoraConfig(**SEQUENCES, r=3, lora_alpha=7, lora_dropout=0.0, target_modules=["q", "v"]),
    "ia3": lambda: peft.IA3Config(**SEQUENCES, target_modules=["k", "v", "wo"], feedforward_modules=["wo"]),
}


def with_adapter(family, method, seed):
    """Return a random model of ours, and PEFT's with a random adapter."""
    config, params, reference = pair(family)
    theirs = peft.get_peft_model(reference, CONFIGS[method]()).double().eval()
    rng = torch.Generator().manual_seed(seed)
    for name, value in theirs.named_parameters():
        if "lora_" in name or "ia3_l" in name:
            value.data = torch.randn(value.shape, generator=rng, dtype=torch.float64) * 0.3 + ("ia3" in name)
    return config, params, theirs


def logits_of_peft(theirs, ids, mask, start):
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    inputs = {name: torch.from_numpy(value) for name, value in zip(names, (ids, mask, start), strict=True)}
    with torch.no_grad():
        return theirs(**inputs, use_cache=False).logits.numpy()


@pytest.mark.parametrize("family", ["t5-1.0", "t5-1.1", "umt5"])
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_adapters_are_exchanged_with_peft(family, method, tmp_path):
    config, params, theirs = with_adapter(family, method, 3)
    ids, mask, labels, _ = batch(5, 61, rows=2, length=6, out=3)
    start = t5.shift_right(labels)
    wanted = logits_of_peft(theirs, ids, mask, start)
    theirs.save_pretrained(tmp_path / "theirs")
    prompt = load_prompt(tmp_path / "theirs")
    model = Model(config, params, None, "m")
    check_fit(prompt, model)
    assert prompt.settings["method"] == method
    double = {name: value.astype(np.float64) for name, value in prompt.params.items()}
    found = t5.forward(methods.apply(params, double), config, ids, mask, start)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    plain = t5.forward(params, config, ids, mask, start)
    assert np.abs(plain - wanted).max() > 1e-2 * np.abs(wanted).max()
    save_prompt(prompt, tmp_path / "ours")
    assert load_prompt(tmp_path / "ours").params.keys() == prompt.params.keys()
    again = peft.PeftModel.from_pretrained(pair(family)[2], tmp_path / "ours").double().eval()
    assert np.abs(logits_of_peft(again, ids, mask, start) - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("lora", {"use_rslora": True}, "key 'use_rslora': True is not supported"),
        ("lora", {"use_dora": True}, "key 'use_dora'"),
        ("lora", {"rank_pattern": {"q": 5}}, "key 'rank_pattern'"),
        ("lora", {"bias": "all"}, "key 'bias'"),
        ("lora", {"target_modules": ["k", "wi"]}, "key 'target_modules': expected q, v"),
        ("lora", {"r": 0}, "key 'r': expected a positive number"),
        ("ia3", {"target_modules": "all-linear"}, "key 'target_modules': expected k, v, wo"),
    ],
)
def test_unsupported_options_of_peft_are_refused_by_key(method, changes, message, tmp_path):
    with_adapter("t5-1.0", method, 1)[2].save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {message}"):
        load_prompt(tmp_path)
