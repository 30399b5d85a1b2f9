"""The built-in models: their sizes and weights, and that transformers reads them as we do."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from reference import batch, torch, transformers
from safetensors import safe_open

import tinyprompt
from tinyprompt import t5, tokenizer, tree
from tinyprompt.errors import CheckpointError
from tinyprompt.files import models

FOLDER = models.default_model()
WEIGHTS = Path(__file__).parents[1] / "weights"
FOLDERS = sorted(path.parent for path in WEIGHTS.glob("*/model.safetensors"))
MILLIONS = {"tinyprompt-t5": 9.25, "tinyprompt-t5-small": 2.18, "tinyprompt-t5-tiny": 0.62}
README = WEIGHTS / "README.md"
PIECES = 16_128
MEGABYTE = 10**6
SENTENCES = [
    "the cat sat on the mat.",
    "It is 20 degrees in Paris, isn't it?",
    "  Prompt tuning:\tlearn a few vectors,  freeze\nthe rest!  ",
    "Naïve café … “quotes” and ﬁgures ½ ①",
    "translate <extra_id_0> to <extra_id_1> now",
    "日本語 🙂",
    "",
]


@pytest.fixture(scope="module")
def model():
    return models.load()


def test_vocabulary(model):
    words = model.tokenizer
    assert len(words) == model.config.vocab_size == PIECES
    ids = [words.pipeline.token_to_id(piece) for piece in ("<pad>", "</s>", "<unk>")]
    assert ids == [tokenizer.PAD, tokenizer.EOS, tokenizer.UNK] == [0, 1, 2]
    assert [words.pipeline.token_to_id(f"<extra_id_{i}>") for i in range(100)] == list(
        range(PIECES - 1, PIECES - 101, -1)
    )


def test_all_sizes_are_present():
    assert {folder.name for folder in FOLDERS} == set(MILLIONS)
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 45 * MEGABYTE


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_size(folder):
    count = tree.count(tree.flatten(models.load(folder).params))
    assert round(count / 1e6, 2) == MILLIONS[folder.name]
    assert (folder / "model.safetensors").stat().st_size <= 20 * MEGABYTE
    with safe_open(folder / "model.safetensors", "numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118 - not a dict


@pytest.mark.parametrize(("name", "folder"), [("tiny", "-tiny"), ("small", "-small"), ("base", ""), (None, "")])
def test_a_built_in_size_opens_by_its_name(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tinyprompt.load(name)
    assert model.name == f"tinyprompt-t5{folder}"
    assert model.fingerprint == models.load(WEIGHTS / f"tinyprompt-t5{folder}").fingerprint


def test_a_folder_has_priority_over_a_built_in_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(WEIGHTS / "tinyprompt-t5-tiny", "small")
    assert models.load("small").config.d_model == models.load("tiny").config.d_model
    assert models.load().config.d_model == models.load("base").config.d_model


def test_a_size_that_is_not_included_names_the_command():
    with pytest.raises(CheckpointError, match=r"'large' is not included; weights/README.md shows the command"):
        models.load("large")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_logits_equal_transformers(folder):
    model = models.load(folder)
    reference, info = transformers.T5ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    ids, mask, labels, _ = batch(0, PIECES, rows=3, length=50, out=6)
    start = t5.shift_right(labels)
    ours = t5.forward(model.params, model.config, ids, mask, start)
    with torch.no_grad():
        theirs = reference.eval()(*map(torch.from_numpy, (ids, mask, start)), use_cache=False).logits.numpy()
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_all_sizes_share_a_tokenizer():
    assert len({(folder / "tokenizer.json").read_bytes() for folder in FOLDERS}) == 1


def test_ids_equal_transformers(model):
    words = transformers.AutoTokenizer.from_pretrained(FOLDER)
    assert (words.pad_token_id, words.eos_token_id, words.unk_token_id) == (0, 1, 2)
    for text in SENTENCES:
        assert model.tokenizer.encode(text) == words(text).input_ids


@pytest.mark.parametrize("text", ["the cat sat on the mat.", "a small model, frozen, that learns!", "x", "42"])
def test_plain_text_survives_encoding_and_case_is_ignored(model, text):
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text
    assert model.tokenizer.encode(text.upper()) == model.tokenizer.encode(text)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_readme_has_the_digests_of_the_weights(folder):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest in README.read_text(encoding="utf-8")
