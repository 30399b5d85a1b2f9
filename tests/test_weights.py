"""The model that the package carries: what it is, and that transformers reads it as we do."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from reference import batch, torch, transformers
from safetensors import safe_open

from tinyprompt import checkpoint, generate, t5, tokenizer, tree

FOLDER = checkpoint.default_model()
FOLDERS = [FOLDER, FOLDER.with_name("tinyprompt-t5-span")]
README = Path(__file__).parents[1] / "weights" / "README.md"
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
    return checkpoint.load()


def test_vocabulary(model):
    words = model.tokenizer
    assert len(words) == model.config.vocab_size == 8192
    ids = [words.pipeline.token_to_id(piece) for piece in ("<pad>", "</s>", "<unk>")]
    assert ids == [tokenizer.PAD, tokenizer.EOS, tokenizer.UNK] == [0, 1, 2]
    assert [words.pipeline.token_to_id(f"<extra_id_{i}>") for i in range(100)] == list(range(8191, 8091, -1))


def test_size(model):
    assert 5e6 < tree.count(tree.flatten(model.params)) < 10e6
    assert (FOLDER / "model.safetensors").stat().st_size <= 20 * MEGABYTE
    assert sum(path.stat().st_size for path in FOLDER.parent.rglob("*") if path.is_file()) < 40 * MEGABYTE
    with safe_open(FOLDER / "model.safetensors", "numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118 - not a dict


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_logits_equal_transformers(folder):
    model = checkpoint.load(folder)
    reference, info = transformers.T5ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    ids, mask, labels, _ = batch(0, 8192, rows=3, length=50, out=6)
    start = generate.shift_right(labels)
    ours = t5.forward(model.params, model.config, ids, mask, start)
    with torch.no_grad():
        theirs = reference.eval()(*map(torch.from_numpy, (ids, mask, start)), use_cache=False).logits.numpy()
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_ids_equal_transformers(model):
    words = transformers.AutoTokenizer.from_pretrained(FOLDER)
    assert (words.pad_token_id, words.eos_token_id, words.unk_token_id) == (0, 1, 2)
    for text in SENTENCES:
        assert model.tokenizer.encode(text) == words(text).input_ids


@pytest.mark.parametrize("text", ["the cat sat on the mat.", "a small model, frozen; a prompt that learns!", "x", "42"])
def test_plain_text_comes_back(model, text):
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text
    assert model.tokenizer.encode(text.upper()) == model.tokenizer.encode(text)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_readme_names_these_weights(folder):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest in README.read_text(encoding="utf-8")
