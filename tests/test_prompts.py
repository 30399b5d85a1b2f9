"""Files of prompts: they come back, and broken ones are refused."""

import numpy as np
import pytest
from files import SMALL, A, B, by_hand, weights, write
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyprompt import checkpoint, prompts
from tinyprompt.checkpoint import CheckpointError
from tinyprompt.prompts import Prompt


def prompt_for(model, **changes):
    delta = {"encoder.prompt.embedding": np.random.default_rng(0).normal(0, 1, (4, 5)).astype(np.float32).T}
    about = dict(model=model.name, fingerprint=model.fingerprint(), labels=("good", "schlecht ü"))
    return Prompt(**dict(delta=delta, **about, settings={"seed": 3, "rate": 0.1, "init": None}) | changes)


@pytest.mark.parametrize("labels", [("good", "schlecht ü"), (), None])
def test_a_prompt_comes_back(folder, tmp_path, labels):
    model = checkpoint.load(folder)
    prompt = prompt_for(model, labels=labels)
    path = prompts.save_prompt(prompt, tmp_path / "new" / "p.safetensors")
    prompts.save_prompt(prompt, path)  # over the first
    assert [p.name for p in path.parent.iterdir()] == ["p.safetensors"]
    again = prompts.load_prompt(path)
    assert again._replace(delta=None) == prompt._replace(delta=None)
    assert again.delta.keys() == prompt.delta.keys()
    for name, value in again.delta.items():
        assert value.dtype == np.float32
        assert value.flags.writeable
        assert (value == prompt.delta[name]).all()
    again.check(model)


def test_a_prompt_is_refused_on_another_model(folder, tmp_path):
    prompt = prompt_for(checkpoint.load(folder))
    other = checkpoint.load(write(tmp_path / "other", SMALL, weights(seed=1)))
    with pytest.raises(CheckpointError, match=r"'small'.*'other'"):
        prompt.check(other)


def test_a_model_is_no_prompt(folder):
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a prompt"):
        prompts.load_prompt(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        prompts.load_prompt(folder / "p.safetensors")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_prompt_cut_short(shared, data):
    folder, whole = shared
    (folder / "model.safetensors").write_bytes(whole)
    path = prompts.save_prompt(prompt_for(checkpoint.load(folder)), folder / "p.safetensors")
    contents = path.read_bytes()
    path.write_bytes(contents[: data.draw(st.integers(0, len(contents) - 1))])
    with pytest.raises(CheckpointError, match=r"p\.safetensors: .*(cut short|damaged)"):
        prompts.load_prompt(path)


GOOD = dict(format="tinyprompt", model="m", fingerprint="f", settings="{}", labels='["a"]')


@pytest.mark.parametrize(
    "about",
    [
        None,
        {},
        {"format": "pt"},
        GOOD | {"settings": "{"},
        GOOD | {"settings": "3"},
        GOOD | {"labels": "["},
        GOOD | {"labels": "3"},
        *({k: v for k, v in GOOD.items() if k != missing} for missing in GOOD if missing != "labels"),
    ],
)
def test_damaged_metadata_of_a_prompt(tmp_path, about):
    path = by_hand(tmp_path / "p.safetensors", {"a": A, "b": B, "__metadata__": about})
    with pytest.raises(CheckpointError, match=r"p\.safetensors: "):
        prompts.load_prompt(path)
    assert prompts.load_prompt(by_hand(path, {"a": A, "b": B, "__metadata__": GOOD})).labels == ("a",)
