"""Model files: directories that transformers wrote, and damaged ones."""

import contextlib
import json
import mmap
import os
import re

import numpy as np
import pytest
from files import SMALL, VOCAB, WORDS, A, B, by_hand, weights, write
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from reference import FAMILIES, batch, hugging_face, pair, raw_config, torch, transformers
from safetensors.numpy import save_file

from tinyprompt import methods, t5, tree
from tinyprompt.errors import CheckpointError
from tinyprompt.files import models
from tinyprompt.files.safetensors import map_tensors
from tinyprompt.model import Prompt
from tinyprompt.predict import predict
from tinyprompt.settings import Settings

WEIGHT = "encoder.block.0.layer.0.SelfAttention.q.weight"
INDEX = "model.safetensors.index.json"


def logits_of(model, ids, mask, start):
    exact = tree.nest({k: v.astype(np.float64) for k, v in tree.flatten(model.params).items()})
    return t5.forward(exact, model.config, ids, mask, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_saved_by_transformers_have_its_logits(family, dtype, tmp_path):
    reference = pair(family, vocab_size=VOCAB)[2].to(dtype)
    # float32 is saved in one file, the 16-bit types in shards
    reference.save_pretrained(tmp_path, max_shard_size="1GB" if dtype == torch.float32 else "20KB")
    assert (tmp_path / INDEX).exists() == (dtype != torch.float32)
    (tmp_path / "tokenizer_config.json").write_text(WORDS)
    model = models.load(tmp_path)
    assert {v.dtype for v in tree.flatten(model.params).values()} == {np.dtype(np.float32)}
    ids, mask, labels, _ = batch(1, VOCAB, rows=3, length=17, out=4)
    start = t5.shift_right(labels)
    with torch.no_grad():
        theirs = reference.double()(*map(torch.from_numpy, (ids, mask, start)), use_cache=False).logits.numpy()
    assert np.abs(logits_of(model, ids, mask, start) - theirs).max() < 1e-10


@pytest.mark.parametrize("family", ["t5-1.0", "t5-1.1", "mt5"])
def test_a_model_saved_twice_by_transformers_is_unchanged(family, tmp_path):
    # transformers 5 writes tie_word_embeddings true for every T5 that it has read.
    pair(family, vocab_size=VOCAB)[2].float().save_pretrained(tmp_path / "a")
    reference = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "a")
    reference.save_pretrained(tmp_path / "b")
    (_, first, *_), (_, second, *_) = found = [models.open_model(tmp_path / part) for part in "ab"]
    assert first == second
    flat = [weights for _, _, weights in found]
    assert all((flat[0][name] == flat[1][name]).all() for name in flat[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_16_bit_weights_stay_in_the_file(dtype, tmp_path, monkeypatch):
    hugging_face(SMALL, weights()).to(dtype).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(WORDS)
    wide = models.load(tmp_path)
    monkeypatch.setattr(models, "WIDEN", 0)
    monkeypatch.setattr(models, "COPY", 0)
    model = models.load(tmp_path)
    for name, value in tree.flatten(model.params).items():
        assert isinstance(value, np.memmap)
        assert not value.flags.writeable
        assert value.dtype.itemsize == 2
        assert (value.astype(np.float32) == tree.flatten(wide.params)[name]).all()
    assert model.fingerprint == wide.fingerprint
    settings = Settings(prompt_length=3)
    mapped, widened = (methods.init_params(m, settings, ["good", "bad one"]) for m in (model, wide))
    assert all((mapped[name] == widened[name]).all() for name in mapped)


def test_64_bit_weights_are_converted_to_float32(folder, tmp_path):
    write(tmp_path, SMALL, {name: value.astype(np.float64) for name, value in weights().items()})
    found, wanted = (tree.flatten(models.load(path).params) for path in (tmp_path, folder))
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}
    assert all((found[name] == wanted[name]).all() for name in wanted)


def test_large_float32_weights_are_views_of_the_file(folder, monkeypatch):
    monkeypatch.setattr(models, "COPY", 0)
    for value in tree.flatten(models.load(folder).params).values():
        assert not value.flags.owndata
        assert not value.flags.writeable
        while isinstance(value, np.ndarray):
            value = value.base
        assert isinstance(value, mmap.mmap)


def test_redundant_copies_are_accepted(folder):
    flat = weights()
    before = models.load(folder).fingerprint
    flat |= {f"{part}.embed_tokens.weight": flat["shared.weight"] for part in ("encoder", "decoder")}
    assert models.load(write(folder, SMALL, flat)).fingerprint == before
    del flat["shared.weight"]
    assert models.load(write(folder, SMALL, flat)).fingerprint == before


def config(**changes):
    return lambda folder: (folder / "config.json").write_text(json.dumps(SMALL | changes))


def instead(name, content):
    """Return a function that damages a directory: a file replaces the weights."""

    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_text(content)

    return damage


def text(name, contents):
    return lambda folder: (folder / name).write_text(contents)


def without(name):
    return lambda folder: (folder / name).unlink()


def tensors(**changes):
    """Return a function that rewrites the weights with some arrays replaced, or removed by None."""
    changes = {k.replace("__", "."): v for k, v in changes.items()}
    return lambda folder: save_file(
        {k: v for k, v in (weights() | changes).items() if v is not None}, folder / "model.safetensors"
    )


def shards(*parts, index=True):
    """Return a function that writes shards and an index, which also names a missing file if index is a name."""

    def change(folder):
        (folder / "model.safetensors").unlink()
        flat = weights()
        where = {}
        for i, names in enumerate(parts):
            save_file({name: flat[name] for name in (names or flat)}, folder / f"{i}.safetensors")
            where |= dict.fromkeys(names or flat, f"{i}.safetensors")
        if isinstance(index, str):
            where["other"] = index
        (folder / INDEX).write_text(json.dumps({"weight_map": where}))

    return change


Q = WEIGHT.replace(".", "__")
TIED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=True)
BROKEN = {
    "config missing": (without("config.json"), ["config.json", "has no config.json"]),
    "config not JSON": (text("config.json", "{"), ["config.json", "JSON"]),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff"), ["config.json", "JSON"]),
    "config a list": (text("config.json", "[]"), ["config.json", "list"]),
    "model_type": (config(model_type="bert"), ["config.json", "'model_type'", "bert"]),
    "activation": (config(feed_forward_proj=[]), ["config.json", "'feed_forward_proj'"]),
    "d_model": (config(d_model="4"), ["config.json", "'d_model'"]),
    "tokenizer missing": (without("tokenizer_config.json"), ["small", "tokenizer.json"]),
    "bad tokenizer": (text("tokenizer_config.json", "["), ["tokenizer_config.json"]),
    "too many pieces": (
        text("tokenizer_config.json", '{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 126}'),
        ["385", "vocab_size 384"],
    ),
    "weights missing": (without("model.safetensors"), ["model.safetensors", "no such file"]),
    "missing": (tensors(**{Q: None}), ["small", repr(WEIGHT), "missing"]),
    "surplus": (tensors(extra=np.ones(2)), ["model.safetensors", "'extra'"]),
    "shape": (tensors(**{Q: np.ones((4, 6), np.float32)}), ["model.safetensors", repr(WEIGHT), "[4, 6]", "[6, 4]"]),
    "dtype": (tensors(**{Q: np.ones((6, 4), np.int64)}), ["model.safetensors", repr(WEIGHT), "I64", "F32"]),
    "empty": (tensors(**{Q: np.ones((0, 4), np.float32)}), ["model.safetensors", repr(WEIGHT), "empty"]),
    "not safetensors": (
        text("model.safetensors", "<html>not found</html>"),
        ["model.safetensors", "not a safetensors"],
    ),
    "head not tied": (config(**TIED), ["model.safetensors", "'lm_head.weight'", "tie_word_embeddings"]),
    "shard missing": (shards(None, index="9.safetensors"), ["9.safetensors", "no such file"]),
    "twice": (shards(None, [WEIGHT]), ["1.safetensors", repr(WEIGHT), "0.safetensors"]),
    "shard elsewhere": (shards(None, index="../0.safetensors"), [INDEX, "'weight_map'", "'../0.safetensors'"]),
    "index empty": (instead(INDEX, "{}"), [INDEX, "'weight_map'"]),
    "index a list": (instead(INDEX, '{"weight_map": ["0.safetensors"]}'), [INDEX, "'weight_map'"]),
    "index of numbers": (instead(INDEX, '{"weight_map": {"a": 3, "b": "c"}}'), [INDEX, "'weight_map'"]),
    "index not JSON": (instead(INDEX, "{"), [INDEX, "JSON"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_errors_name_the_file_and_the_key(case, folder):
    change, words = BROKEN[case]
    models.load(folder)
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        models.load(folder)
    assert str(folder) in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        models.load(tmp_path / "nowhere")


@examples(150)
@given(data=st.data())
def test_a_truncated_file_is_refused(shared, data):
    folder, whole = shared
    cut = data.draw(st.one_of(st.integers(0, 20), st.integers(0, len(whole) - 1)))
    path = folder / "model.safetensors"
    path.write_bytes(whole[:cut])
    with pytest.raises(CheckpointError, match=rf"model.safetensors: .*\b{cut}\b") as caught:
        models.load(folder)
    header_ends = 8 + int.from_bytes(whole[:8], "little")
    assert ("cut short: key " in str(caught.value)) == (cut >= header_ends)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {k: v for k, v in A.items() if k != "data_offsets"}, "b": B},
        {"a": A | {"shape": [-2, -2]}, "b": B},
        {"a": A | {"shape": [4.0]}, "b": B},
        {"a": A | {"shape": [2**32, 2**32]}, "b": B},
        {"a": A, "b": B | {"data_offsets": [8, 24]}},
        {"a": A, "b": A},
        {"a": A},
        {"a": A, "b": B | {"data_offsets": [32, 16]}},
        {"a": A, "b": B | {"data_offsets": [16]}},
        {"a": A, "b": B | {"dtype": "F7"}},
        {"a": A, "b": None},
        {"a": A, "b": B, "__metadata__": {"x": 1}},
        [A, B],
        None,
    ],
)
def test_a_malformed_header_is_refused(tmp_path, header):
    with pytest.raises(CheckpointError, match=r"a\.safetensors: not a safetensors file"):
        map_tensors(by_hand(tmp_path / "a.safetensors", header))


numbers = st.one_of(st.integers(-3, 40), st.integers(), st.floats(), st.none(), st.text(max_size=3))
values = st.one_of(numbers, st.lists(numbers, max_size=3), st.sampled_from(["F32", "F16", "BF16", "I8", [4], [0, 16]]))


@examples(300)
@given(
    entry=st.dictionaries(st.sampled_from([*A, "more"]), values), name=st.sampled_from(["a", "b", "c", "__metadata__"])
)
def test_a_random_header_raises_no_other_exception(shared, entry, name):
    header = {"a": A, "b": B}
    path = by_hand(shared[0] / "fuzz.safetensors", header | {name: header.get(name, {}) | entry})
    try:
        found = map_tensors(path)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017 - a header may also be valid
    else:
        assert sum(value.nbytes for value in found.values()) == 32


@examples(60)
@given(data=st.data())
def test_the_fingerprint_changes_with_one_bit(shared, data):
    folder, whole = shared
    (folder / "model.safetensors").write_bytes(whole)
    before = models.load(folder).fingerprint
    assert before == models.load(folder).fingerprint
    start = 8 + int.from_bytes(whole[:8], "little")
    at, bit = data.draw(st.integers(start, len(whole) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(whole)
    changed[at] ^= 1 << bit
    (folder / "model.safetensors").write_bytes(changed)
    finite = all(np.isfinite(x).all() for x in map_tensors(folder / "model.safetensors").values())
    with contextlib.nullcontext() if finite else pytest.raises(CheckpointError, match="contains NaN or infinity"):
        assert models.load(folder).fingerprint != before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_fingerprint_depends_on_values_not_on_storage(dtype, tmp_path):
    model = hugging_face(SMALL, weights()).to(dtype)
    found = []
    for storage in (dtype, torch.float32):
        model.to(storage).save_pretrained(tmp_path / str(storage))
        (tmp_path / str(storage) / "tokenizer_config.json").write_text(WORDS)
        found.append(models.load(tmp_path / str(storage)).fingerprint)
    assert found[0] == found[1]


def model_dir(folder, change, raw=SMALL):
    """Write a model directory with weights that a function has changed."""
    flat = weights(raw)
    change(flat)
    return write(folder, raw, flat)


def renamed(old, new):
    return lambda flat: flat.update({new: flat.pop(old)})


def test_a_stale_index_is_ignored_beside_a_whole_file(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"shared.weight": "model-00001-of-00002.safetensors"}}))
    assert models.load(folder).config.d_model == 4


def test_a_tied_table_may_be_stored_as_the_head(tmp_path):
    raw = raw_config("t5-1.0", vocab_size=VOCAB)
    shared = models.load(write(tmp_path / "one", raw, weights(raw)))
    renamed_table = models.load(model_dir(tmp_path / "two", renamed("shared.weight", "lm_head.weight"), raw))
    assert shared.fingerprint == renamed_table.fingerprint


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_a_stack_with_its_own_table_is_refused(tmp_path, name):
    other = model_dir(tmp_path / "m", lambda flat: flat.update({name: flat["shared.weight"] + 1}))
    with pytest.raises(CheckpointError, match=f"key '{name}' differs from 'shared.weight'"):
        models.load(other)
    ours, theirs = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
    both = model_dir(
        tmp_path / "n", lambda flat: flat.update({ours: flat.pop("shared.weight"), theirs: np.ones((VOCAB, 4), "f")})
    )
    with pytest.raises(CheckpointError, match=r"differs from 'shared\.weight'"):
        models.load(both)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_the_prefix_of_a_wrapped_model_is_named(tmp_path, prefix):
    def change(flat):
        for name in list(flat):
            flat[prefix + name] = flat.pop(name)

    with pytest.raises(CheckpointError, match=rf"names begin with '{re.escape(prefix)}', as in a wrapped model"):
        models.load(model_dir(tmp_path / "m", change))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["shared.weight", "decoder.block.0.layer.2.DenseReluDense.wo.weight"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, monkeypatch, name, value):
    def change(flat):
        flat[name].flat[-1] = value

    path = model_dir(tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=f"key '{name}' contains NaN or infinity"):
        models.load(path)
    monkeypatch.setattr(models, "WIDEN", 0)  # a limit that makes every model count as large
    with pytest.raises(CheckpointError, match=f"key '{name}' contains NaN or infinity"):
        _ = models.load(path).fingerprint


@pytest.mark.parametrize(("key", "value"), [("eos_token_id", 2), ("pad_token_id", 1), ("decoder_start_token_id", 5)])
def test_unusual_special_ids_are_refused_by_key(tmp_path, key, value):
    path = write(tmp_path / "m", SMALL | {key: value}, weights())
    with pytest.raises(
        CheckpointError,
        match=f"key '{key}': expected . as in every published T5, found {value}".replace("expected .", "expected .,"),
    ):
        models.load(path)
    for known in ([1] if key == "eos_token_id" else 0, None):
        models.load(write(tmp_path / "m", SMALL | {key: known}, weights()))


@pytest.mark.parametrize("family", ["T5", "MT5", "UMT5"])
def test_a_new_model_of_transformers_5_is_tied_and_not_scaled(tmp_path, family):
    made = dict(
        vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=24, num_heads=3, num_layers=2, feed_forward_proj="gated-gelu"
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **made, decoder_start_token_id=0, tie_word_embeddings=family != "T5"
    )
    reference = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    reference.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(WORDS)
    model, ids, out = models.load(tmp_path), np.array([[5, 60, 70, 1]]), np.array([[0, 50]])
    reference = type(reference).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted = reference(input_ids=torch.from_numpy(ids), decoder_input_ids=torch.from_numpy(out)).logits.numpy()
    found = t5.forward(model.params, model.config, ids, np.ones_like(ids), out)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_a_change_of_a_mapped_file_is_detected(folder, monkeypatch):
    prompt, texts = Prompt(label_words=("bad", "good")), ["a film"]
    small = models.load(folder)
    monkeypatch.setattr(models, "COPY", 0)
    large, path = models.load(folder), folder / "model.safetensors"
    wanted, whole = predict(large, prompt, texts, "numpy"), path.read_bytes()
    path.write_bytes(whole[:-4] + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was changed while it was in use"):
        predict(large, prompt, texts, "numpy")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was changed"):
        large.check_files()
    assert predict(small, prompt, texts, "numpy") == wanted  # the small model is a copy


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_pipe_in_place_of_a_file_is_refused(folder, name):
    (folder / "model.safetensors").unlink() if name != "config.json" else (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: is a device or a pipe"):
        models.load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("decoder_start_token_id", 70),
        ("eos_token_id", [1, 167]),
        ("forced_bos_token_id", 75),
        ("suppress_tokens", [5]),
        ("no_repeat_ngram_size", 3),
        ("repetition_penalty", 1.2),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_keys_that_change_the_generated_text_are_refused(folder, name, key, value):
    path = folder / name
    path.write_text(json.dumps((SMALL if name == "config.json" else {}) | {key: value}))
    with pytest.raises(CheckpointError, match=f"{name}: key '{key}'"):
        models.load(folder)


def test_neutral_generation_keys_are_accepted(folder):
    neutral = {
        "eos_token_id": 1,
        "pad_token_id": 0,
        "num_beams": 4,
        "no_repeat_ngram_size": 0,
        "forced_bos_token_id": None,
    }
    (folder / "generation_config.json").write_text(json.dumps(neutral))
    models.load(folder)
