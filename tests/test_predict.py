"""Rows of different tasks in one batch: each row is answered as if it were alone."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from random_models import FAMILIES
from tuning import byte_model

from tinyprompt import decode, device, methods, predict, t5
from tinyprompt.data import pad, width
from tinyprompt.device import default_device
from tinyprompt.errors import CheckpointError, DataError
from tinyprompt.files.prompts import Prompts, save_prompt
from tinyprompt.model import PROMPT, Prompt
from tinyprompt.predict import (
    Answer,
    Bound,
    answer,
    batches,
    encode_rows,
    label_scores,
    pad_labels,
    probabilities,
    round_up,
)
from tinyprompt.settings import Settings

needs_onnx = pytest.mark.skipif(default_device() == "numpy", reason="needs onnx")
WORDS = [("bad", "good"), ("a", "bb", "ccc", "dddd", "e"), ("yes", "no", "perhaps"), None, ("one",)]


def prompts_of(model, lengths, seed=0, dtype=np.float32, **settings):
    """Return a prompt of each length, with its own label words or for free text. Length 0 is the bare model."""
    rng = np.random.default_rng(seed)
    width = model.config.d_model
    vectors = [rng.normal(0, 1, (length, width)).astype(dtype) for length in lengths]
    return [
        Prompt(
            {PROMPT: x} if len(x) else {}, label_words=WORDS[i % len(WORDS)], settings={"max_new_tokens": 5} | settings
        )
        for i, x in enumerate(vectors)
    ]


def texts_of(count, seed=0, most=40):
    rng = np.random.default_rng(seed)
    return ["".join(map(chr, rng.integers(97, 123, rng.integers(1, most)))) for _ in range(count)]


def answer_alone(model, prompt, text, device="numpy"):
    """Return the answer of the single-task path, and the log probabilities of the label words."""
    if not prompt.label_words:
        return predict(model, prompt, text, device), None
    scores = label_scores(model, prompt, [text], device)[0]
    return prompt.label_words[scores.argmax()], scores


@examples(15)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    rows=st.integers(1, 9),
    seed=st.integers(0, 999),
    beams=st.sampled_from([1, 1, 3]),
    penalty=st.sampled_from([None, 1.0]),
    few_shapes=st.booleans(),
)
def test_every_row_is_answered_as_if_it_were_alone(family, lengths, rows, seed, beams, penalty, few_shapes):
    model = byte_model(family, np.float64, seed)
    prompts = prompts_of(model, lengths, seed, np.float64, num_beams=beams, length_penalty=penalty)
    rng = np.random.default_rng(seed)
    asked = [(prompts[rng.integers(len(prompts))], text) for text in texts_of(rows, seed)]
    for (prompt, text), found in zip(asked, answer(model, asked, "numpy", few_shapes), strict=True):
        wanted, scores = answer_alone(model, prompt, text)
        assert found.text == wanted
        assert tuple(found.probabilities) == (prompt.label_words or ())
        if scores is not None:
            assert np.abs(np.array([*found.probabilities.values()]) - probabilities(scores)).max() < 1e-6


@examples(15)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    lengths=st.lists(st.integers(1, 100), min_size=5, max_size=5),
    seed=st.integers(0, 999),
)
def test_rows_with_five_prompts_equal_single_rows_in_float64(family, lengths, seed):
    """Compare the encoder states of each row, and the log probabilities of its labels."""
    model = byte_model(family, np.float64, seed)
    prompts = prompts_of(model, lengths, seed, np.float64)
    tasks = [Bound.of(model, prompt) for prompt in prompts]
    texts = texts_of(5, seed)
    ((chosen, _, batch),) = batches(model, encode_rows(model, tasks, texts), range(5), 5, few_shapes=False)
    labels = pad_labels([[(7, 8, 1), (9, 1)]] * len(chosen))
    states, _ = t5.encode(model.params, model.config, *batch)
    scores = decode.ranked(model.params, model.config, *batch, *labels)
    for i, row, score in zip(chosen, states, scores, strict=True):
        params = methods.apply(model.params, prompts[i].params)
        ids = model.tokenizer.encode(texts[i])
        inputs = pad([ids], len(ids))
        wanted, _ = t5.encode(params, model.config, *inputs)
        assert np.abs(row[: wanted.shape[1]] - wanted[0]).max() < 1e-12
        wanted = decode.ranked(params, model.config, *inputs, labels[0][:1], labels[1][:1])[0]
        assert np.abs(score - wanted).max() < 1e-12


@examples(50)
@given(st.integers(1, 5000), st.sampled_from([1, 8]))
def test_sizes_are_rounded_up_to_few_values(size, least):
    found = round_up(size, least)
    assert max(size, least) <= found < max(1.5 * size, least + 1)
    assert found in {least << k for k in range(13)} | {least * 3 << k >> 1 for k in range(1, 13)} | {3}
    assert round_up(found, least) == found


def test_batches_have_few_shapes():
    model, shapes = byte_model(), set()
    prompts = prompts_of(model, [1, 20, 40])
    tasks = [Bound.of(model, prompt) for prompt in prompts]
    for rows in range(1, 17):
        asked = [tasks[i % 3] for i in range(rows)]
        mixed = encode_rows(model, asked, ["x" * (i * rows % 50) for i in range(rows)])
        ((chosen, _, (x, mask)),) = batches(model, mixed, range(rows), 16, few_shapes=True)
        assert set(chosen) == set(range(rows))
        assert len(chosen) == len(x) == len(mask)
        shapes.add(mask.shape)
        ((chosen, _, (x, mask)),) = batches(model, mixed, range(rows), 16, few_shapes=False)
        longest = max(len(ids) for _, ids in mixed)
        assert (sorted(chosen), mask.shape) == (list(range(rows)), (rows, width(longest)))
    assert {rows for rows, _ in shapes} == {1, 2, 3, 4, 6, 8, 12, 16}
    assert {width for _, width in shapes} <= {8, 12, 16, 24, 32, 48, 64, 96}


def test_few_shapes_are_optional(monkeypatch):
    module, seen = sys.modules["tinyprompt.predict"], []
    original = module.batches
    monkeypatch.setattr(module, "batches", lambda *args: seen.append(args[-1]) or original(*args))
    asked = [(Prompt(label_words=("a", "b")), "x")]
    answer(byte_model(), asked, "numpy")
    answer(byte_model(), asked, "numpy", few_shapes=True)
    assert seen == [False, True]


@needs_onnx
def test_onnx_runtime_equals_numpy_to_float32_rounding():
    model = byte_model()
    prompts = prompts_of(model, [1, 100, 17, 5, 40])
    asked = [(prompts[i % 5], text) for i, text in enumerate(texts_of(20))]
    for (prompt, text), found in zip(asked, answer(model, asked, "cpu"), strict=True):
        wanted, scores = answer_alone(model, prompt, text, "numpy")
        assert found.text == wanted
        if scores is not None:
            assert np.abs(np.array([*found.probabilities.values()]) - probabilities(scores)).max() < 1e-5


@needs_onnx
def test_another_prompt_of_the_same_size_opens_no_session(monkeypatch):
    model, opened = byte_model(), []
    monkeypatch.setattr(device.sessions, "open_session", lambda *a, f=device.open_session: opened.append(1) or f(*a))
    texts = texts_of(4)
    answer(model, list(zip(prompts_of(model, [9, 9, 9, 9]), texts, strict=True)), "cpu")
    before = len(opened)
    answer(model, list(zip(prompts_of(model, [9, 9, 9, 9], seed=1), texts, strict=True)), "cpu")
    answer(model, list(zip(prompts_of(model, [10, 8, 9, 10], seed=2), texts, strict=True)), "cpu")  # after padding
    assert len(opened) == before > 0


def test_labels_are_decoded_in_parts(monkeypatch):
    model = byte_model(dtype=np.float64)
    (prompt,) = prompts_of(model, [3])
    prompt = Prompt(prompt.params, label_words=("a", "bb", "ccc", "dddd", "e"))
    whole = label_scores(model, prompt, texts_of(3), "numpy")
    sizes, original = [], t5.decoder_states
    monkeypatch.setattr(
        t5,
        "decoder_states",
        lambda params, config, ids, *more: sizes.append(ids.shape[1]) or original(params, config, ids, *more),
    )
    for some in (0, 1, 2, 4, 5):
        monkeypatch.setattr(decode, "LOGITS", 384 * 5 * some)
        assert np.abs(label_scores(model, prompt, texts_of(3), "numpy") - whole).max() < 1e-6
        assert sizes == {0: [1] * 5, 1: [1] * 5, 2: [2, 2, 1], 4: [4, 1], 5: [5]}[some]
        sizes.clear()


@examples(20)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    count=st.integers(1, 4),
    length=st.integers(1, 5),
    prefix=st.booleans(),
    seed=st.integers(0, 99),
)
def test_parallel_sequences_do_not_see_each_other(family, count, length, prefix, seed):
    model = byte_model(family, np.float64, seed)
    rng = np.random.default_rng(seed)
    params = model.params
    if prefix:
        shapes = methods.trained_shapes(model.config, Settings(method="prefix", prompt_length=4), 2)
        params = methods.apply(params, {name: rng.normal(0, 1, shape) for name, shape in shapes.items()})
    ids, mask = pad([model.tokenizer.encode(text) for text in texts_of(3, seed)])
    states, mask = t5.encode(params, model.config, ids, mask)
    sequences = rng.integers(0, 384, (3, count, length))
    found = t5.decode(params, model.config, sequences, states, mask)
    assert found.shape == (3, count, length, 384)
    for i in range(count):
        wanted = t5.decode(params, model.config, sequences[:, i], states, mask)
        assert np.abs(found[:, i] - wanted).max() < 1e-11


def test_prompts_that_cannot_share_a_batch_are_refused():
    model = byte_model()
    lora = Prompt({"encoder.block.0.layer.0.SelfAttention.q.lora.down": np.ones((2, 20), np.float32)})
    with pytest.raises(
        CheckpointError, match=r"expected 'encoder.prompt.embedding' of \(P, 20\)|expected a soft prompt"
    ):
        answer(model, [(lora, "a")])
    with pytest.raises(CheckpointError, match="does not fit"):
        answer(model, [(Prompt({PROMPT: np.ones((2, 19), np.float32)}), "a")])
    with pytest.raises(DataError, match="label word 'a' is repeated"):
        answer(model, [(Prompt(label_words=("a", "a")), "a")])
    with pytest.raises(FloatingPointError, match="not finite"):
        answer(model, [(Prompt({PROMPT: np.full((2, 20), np.nan, np.float32)}, label_words=("a", "b")), "a")], "numpy")
    assert answer(model, []) == []
    assert answer(model, [(Prompt(label_words=("a",)), "x")], "numpy") == [Answer("a", {"a": 1.0})]


def test_rank_ignores_padding_of_a_label():
    logits = np.random.default_rng(0).normal(size=(2, 3, 4, 9))
    labels, weights = pad_labels([[(5, 1), (6, 7, 1)], [(8, 1)]], 3, 4)
    logits[:, :, 0] = logits[:, :1, 0]  # the first tokens share their logits
    found = decode.rank(lambda x: x, logits, labels, weights)
    other = np.where(weights > 0, labels, 3)
    assert (found == decode.rank(lambda x: x, logits, other, weights)).all()
    assert (found[1, 1:] == 0).all()


def save(folder, name, seed=0, length=3, width=20, words=("bad", "good")):
    """Save a prompt without a fingerprint, so that only its shape is checked."""
    vectors = np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)
    return save_prompt(Prompt({PROMPT: vectors}, label_words=words), folder / name)


def test_a_folder_of_prompts_follows_the_disk(tmp_path):
    save(tmp_path, "topic.safetensors")
    save(tmp_path, "peft", 1)
    save(tmp_path, "bare.npy", 2)
    (tmp_path / "notes.txt").write_text("no prompt")
    (tmp_path / "empty").mkdir()
    prompts = Prompts(tmp_path, byte_model())
    assert sorted(prompts) == ["bare", "peft", "topic"]
    assert len(prompts) == 3
    assert prompts.errors == {}
    assert repr(prompts) == f"Prompts({tmp_path}: bare, peft, topic; of tiny)"
    first = prompts["topic"]
    assert prompts.refresh() == []
    assert prompts["topic"] is first  # the file was not read again
    save(tmp_path, "topic.safetensors", 3)
    save(tmp_path, "new.safetensors", 4)
    (tmp_path / "bare.npy").unlink()
    assert prompts.refresh() == ["bare", "new", "topic"]
    assert sorted(prompts) == ["new", "peft", "topic"]
    assert (prompts["topic"].array != first.array).all()


def test_a_damaged_file_keeps_the_earlier_prompt(tmp_path):
    whole = save(tmp_path, "topic.safetensors").read_bytes()
    prompts = Prompts(tmp_path, byte_model())
    first = prompts["topic"]
    (tmp_path / "topic.safetensors").write_bytes(whole[:-10])  # as during a copy
    save(tmp_path, "other.npy", width=19)
    assert prompts.refresh() == []
    assert prompts["topic"] is first
    assert sorted(prompts.errors) == ["other.npy", "topic.safetensors"]
    assert "does not fit 'tiny'" in prompts.errors["other.npy"]
    assert str(tmp_path / "topic.safetensors") in prompts.errors["topic.safetensors"]
    (tmp_path / "topic.safetensors").write_bytes(whole)
    assert prompts.refresh() == ["topic"]
    assert sorted(prompts.errors) == ["other.npy"]


def test_a_second_file_of_the_same_name_is_refused(tmp_path):
    save(tmp_path, "topic.npy", 1)
    save(tmp_path, "topic.safetensors", 2)
    prompts = Prompts(tmp_path, byte_model())
    assert prompts["topic"].label_words is None  # the .npy file comes first
    assert prompts.errors["topic.safetensors"].endswith("topic.npy already defines the prompt 'topic'; rename one")
    with pytest.raises(CheckpointError, match="expected a folder of prompts"):
        Prompts(tmp_path / "none", byte_model())
    with pytest.raises(KeyError):
        prompts["other"]
