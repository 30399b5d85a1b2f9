"""Tokenizers against sentencepiece, transformers, and the ids of the real T5 vocabulary."""

import io
import json
import lzma
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from tinyprompt import tokenizer
from tinyprompt.tokenizer import from_sentencepiece

sentencepiece = pytest.importorskip("sentencepiece", reason="the reference: pip install '.[test]'")
transformers = pytest.importorskip("transformers", reason="the reference: pip install '.[test]'")

T5 = Path(__file__).parents[2] / "shared/data/t5_tokenizer"
needs_t5 = pytest.mark.skipif(not T5.is_dir(), reason=f"the real T5 vocabulary is not at {T5}")

CORPUS = """the cat sat on the mat. a dog saw the cat, and the cat ran away again.
numbers: 1 2 3 42 1999 (ten, twenty) "quoted" it's; yes? no! -- and again
the quick brown fox jumps over the lazy dog. Früh übt sich, wer ein Meister werden will.
ça va? un café naïf. prompt tuning of a frozen model learns only a few vectors."""
ODD = [
    "",
    " ",
    "  a",
    "a  b ",
    "\t\n\r\n",
    "\tcat\n\nsat ",
    "\u3000a\u00a0b\u200bc",
    "①½ﬁ…™",
    "▁a ▁",
    "<x>",
    "0GGG",
    "\0\x85",
]

parts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["the", "cat", "  ", "\t", "\r\n", "\u3000", "\u00a0", "\x85", "▁", "①", "½", "ﬁ", "e\u0301"]),
    st.sampled_from(
        ["각", "ㄱㅏ", "ｶﾞ", "ﾊﾟ", "ế", "ぽ", "👩\u200d🚀", "½\u0301", "\u0fb2\u0f81", "<0x41>", "\U000e0001"]
    ),
)
forms = st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"])
SPECIAL = ("</s>", "<pad>", "<unk>", "<extra_id_")
texts = st.builds(unicodedata.normalize, forms, st.lists(parts, max_size=10).map("".join)).filter(
    lambda text: not any(s in text for s in SPECIAL)
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Write a directory that contains only a spiece.model of 80 pieces."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 5),
        model_writer=out,
        vocab_size=80,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "spiece.model").write_bytes(out.getvalue())
    return folder


@pytest.fixture(scope="session", params=["tiny", pytest.param("t5", marks=needs_t5)])
def pair(request, tiny):
    """Return our tokenizer and sentencepiece's for one model file."""
    path = tiny / "spiece.model" if request.param == "tiny" else T5 / "t5.spiece.model"
    return from_sentencepiece(path), sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize("text", ODD)
def test_ids_of_odd_texts_equal_sentencepiece(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == [*theirs.encode(text), tokenizer.EOS]


@examples(300)
@given(texts)
def test_ids_equal_sentencepiece(pair, text):
    test_ids_of_odd_texts_equal_sentencepiece(pair, text)


@examples(100)
@given(st.text(alphabet=sorted(set(CORPUS) - {"\n"}), max_size=40))
def test_texts_of_known_characters_survive_encoding(pair, text):
    ours, theirs = pair
    ids = ours.encode(text)
    if tokenizer.UNK not in ids:
        assert ours.decode([*ids, tokenizer.PAD]) == theirs.decode(ids[:-1]) == " ".join(text.split())


def test_pieces_are_spelled_as_in_the_vocabulary(pair):
    words, reference = pair
    size = reference.get_piece_size()
    assert [words.piece(i) for i in range(size)] == [reference.id_to_piece(i) for i in range(size)]
    assert words.piece(10**6) == "<1000000>"
    assert [tokenizer.ByteTokenizer().piece(ord(c) + 3) for c in "a\n~"] == ["a", "<13>", "~"]


def test_sentinels_are_last_in_descending_order(tiny):
    words = tokenizer.load(tiny)
    assert len(words) == 180
    assert [i for i in words.encode("the <extra_id_0> sat<extra_id_99>.") if i >= 80] == [179, 80]
    assert [words.pipeline.token_to_id(f"<extra_id_{i}>") for i in range(100)] == list(range(179, 79, -1))
    assert words.decode([179, *words.encode("the cat"), 80]) == "the cat"


@pytest.mark.parametrize("extra_ids", [0, 7])
def test_extra_ids_of_the_configuration_are_used(tiny, tmp_path, extra_ids):
    shutil.copy(tiny / "spiece.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": extra_ids}))
    words = tokenizer.load(tmp_path)
    assert len(words) == 80 + extra_ids
    assert words.pipeline.token_to_id("<extra_id_0>") == (80 + extra_ids - 1 if extra_ids else None)


@needs_t5
@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
def test_the_real_vocabulary(file, tmp_path):
    source = {"spiece.model": "t5.spiece.model", "tokenizer.json": "t5-base.tokenizer.json"}[file]
    shutil.copy(T5 / source, tmp_path / file)
    words = tokenizer.load(tmp_path)
    assert len(words) == 32100
    assert words.pipeline.token_to_id("<extra_id_0>") == 32099
    with lzma.open(T5 / "t5-base-tokenizer-tests.json.xz") as lines:
        vectors = json.load(lines)
    assert len(vectors) == 1995
    for text, ids, decoded in vectors:
        assert words.encode(text) == ids
        shown = words.pipeline.decode(ids, skip_special_tokens=False).lstrip()
        assert re.sub(" ?<unk> ?", "<unk>", clean_up(shown)) == re.sub(" ?<unk> ?", "<unk>", decoded)
        if tokenizer.UNK not in ids:
            assert clean_up(words.decode(ids)) + "</s>" == decoded


def clean_up(text):
    """Remove spaces before English punctuation, which was the default of transformers."""
    for mark in (".", "?", "!", ","):
        text = text.replace(" " + mark, mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(" " + ending, ending)
    return text


def byte_tokenizer(folder, **changes):
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"} | changes))
    return tokenizer.load(folder)


@examples(200)
@given(st.one_of(st.text(), texts).filter(lambda text: not any(s in text for s in SPECIAL)))
def test_bytes_equal_byt5(byt5, text):
    ours, theirs = byt5
    ids = ours.encode(text)
    assert ids == theirs(text).input_ids
    assert ours.decode([0, *ids, 0]) == text.strip() == theirs.decode(ids, skip_special_tokens=True).strip()


@examples(200)
@given(st.lists(st.integers(0, 383), max_size=20))
def test_any_ids_decode_like_byt5(byt5, ids):
    ours, theirs = byt5
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True).strip()


@pytest.fixture(scope="session")
def byt5(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("byt5")), transformers.ByT5Tokenizer()


def test_extra_ids_of_the_byte_tokenizer(tmp_path):
    assert len(byte_tokenizer(tmp_path)) == len(transformers.ByT5Tokenizer()) == 384
    assert len(byte_tokenizer(tmp_path, extra_ids=3)) == 262


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no tokenizer"):
        tokenizer.load(tmp_path)


@pytest.fixture(scope="session")
def empty(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


def load_broken(folder, name, contents):
    """Load a tokenizer from this file alone. Return None after a ValueError that names the file."""
    path = folder / name
    path.write_bytes(contents)
    try:
        return tokenizer.load(folder)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017 - both outcomes are valid
        return None
    finally:
        path.unlink()


@pytest.mark.parametrize(
    "contents", [b"", b"{", b"[]", b"null", b"\xff", b'{"extra_ids": "many"}', b'{"extra_ids": null}']
)
def test_a_broken_tokenizer_config_is_named(empty, contents):
    assert load_broken(empty, "tokenizer_config.json", contents) is None


@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b"{}", b"\xff", b'{"version": "1.0", "model": {"type": "?"}}'])
def test_a_broken_tokenizer_json_is_named(empty, contents):
    assert load_broken(empty, "tokenizer.json", contents) is None


# The tiny model has 80 pieces in 1,200 bytes, the trainer's settings, and a table of 239,000 bytes.
places = st.one_of(st.integers(0, 1500), st.integers(0, 240_000))


@examples(200)
@given(cut=places)
def test_a_truncated_sentencepiece_model_is_refused_or_usable(tiny, empty, cut):
    words = load_broken(empty, "spiece.model", (tiny / "spiece.model").read_bytes()[:cut])
    assert words is None or 100 < len(words) <= 180


@examples(300)
@given(at=st.integers(0, 1500), wrong=st.binary(min_size=1, max_size=3))
def test_changed_bytes_of_a_sentencepiece_model_raise_only_value_errors(tiny, empty, at, wrong):
    data = (tiny / "spiece.model").read_bytes()
    load_broken(empty, "spiece.model", data[:at] + wrong + data[at + len(wrong) :])


@examples(300)
@given(st.one_of(st.binary(), st.binary(max_size=40).map(lambda b: b"\x0a" + bytes([len(b)]) + b)))
def test_random_bytes_raise_only_value_errors(empty, contents):
    load_broken(empty, "spiece.model", contents)


def trained(path, **more):
    """Train a sentencepiece model on the corpus with other settings; return sentencepiece's tokenizer."""
    out = io.BytesIO()
    known = dict(vocab_size=80, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    lines = iter(CORPUS.splitlines() * 5)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=out, **known | more)
    path.write_bytes(out.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_byte_pieces_are_decoded_to_characters(tmp_path):
    theirs = trained(tmp_path / "spiece.model", byte_fallback=True, vocab_size=310, character_coverage=0.98)
    words = tokenizer.load(tmp_path)
    for text in ("the cat 好 sat", "日本", "naïf 😀 é", "the"):
        ids = words.encode(text)
        assert ids[:-1] == theirs.encode(text)
        assert words.decode(ids) == theirs.decode(ids[:-1])


def test_a_model_with_sentinels_gets_no_additional_ones(tmp_path):
    sentinels = [f"▁<extra_id_{i}>" for i in reversed(range(100))]
    theirs = trained(tmp_path / "spiece.model", user_defined_symbols=sentinels, vocab_size=180)
    words = tokenizer.load(tmp_path)
    assert len(words) == theirs.get_piece_size() == 180
    for text in ("the cat", "the <extra_id_0> cat <extra_id_1>"):
        assert words.encode(text)[:-1] == theirs.encode(text)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"unk_id": 3, "bos_id": 2}, "<unk> has id 3, expected 2"),
        ({"eos_id": 2, "unk_id": 1}, "</s> has id 2, expected 1"),
        ({"pad_id": 1, "eos_id": 0}, "</s> has id 0, expected 1|<pad> has id 1, expected 0"),
    ],
)
def test_special_ids_unlike_t5_are_refused(tmp_path, setting, message):
    trained(tmp_path / "spiece.model", **setting)
    with pytest.raises(ValueError, match=message):
        tokenizer.load(tmp_path)


FLAGS = {
    "split_by_whitespace": False,
    "split_by_number": False,
    "split_by_unicode_script": False,
    "split_digits": True,
    "treat_whitespace_as_suffix": True,
    "allow_whitespace_only_pieces": True,
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "normalization_rule_name": "identity",
    "user_defined_symbols": ["<cat>", "at"],
    "control_symbols": ["<c>"],
    "model_type": "bpe",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_settings_of_the_trainer_are_respected(tmp_path, flag):
    theirs = trained(tmp_path / "spiece.model", **{flag: FLAGS[flag]})
    words = tokenizer.load(tmp_path)
    for text in ("the cat  sat on the mat", " a dog\t12 <cat> ", "ﬁve cats", "3a b3", "a  b   c"):
        ids = words.encode(text)
        assert ids[:-1] == theirs.encode(text)
        if tokenizer.UNK not in ids:
            assert words.decode(ids) == theirs.decode(ids[:-1]).strip()


@pytest.mark.parametrize("where", ["added_tokens.json", "added_tokens_decoder"])
def test_added_tokens_keep_their_ids(tiny, tmp_path, where):
    shutil.copy(tiny / "spiece.model", tmp_path)
    added = {"<speaker>": 180, "<table>": 181}
    config = {"extra_ids": 100}
    if where == "added_tokens.json":
        (tmp_path / where).write_text(json.dumps(added))
    else:
        config["added_tokens_decoder"] = {str(id): {"content": token} for token, id in added.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    words, plain = tokenizer.load(tmp_path), tokenizer.load(tiny)
    assert len(words) == 182
    assert words.encode("<speaker> the cat")[0] == 180
    assert words.encode("<table>")[:-1] == [181]
    assert words.encode("the cat") == plain.encode("the cat")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<speaker>": 300}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="added token '<speaker>': expected id 300, found 180"):
        tokenizer.load(tmp_path)
    for wrong in ("[]", "{", '{"a": "b"}', '{"a": true}'):
        (tmp_path / "added_tokens.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"added_tokens\.json"):
            tokenizer.load(tmp_path)


flags = st.fixed_dictionaries(
    {flag: st.booleans() for flag in ("lstrip", "rstrip", "normalized", "single_word", "special")}
)
between = st.sampled_from(
    [" ", "  ", "a", "the", "<cat>", "cat", "<t>", "\uff43\uff41\uff54", ".", "1", "</s>", "<extra_id_1>", "_"]
)


@examples(200)
@given(st.tuples(flags, flags, flags), st.lists(between, max_size=9).map("".join))
def test_flags_of_added_tokens_equal_transformers(tiny, empty, chosen, text):
    ids = {"<cat>": 180, "cat": 181, "a": tokenizer.load(tiny).pipeline.token_to_id("a")}  # "a" is a piece
    decoder = {
        id: chosen_flags | {"content": token} for (token, id), chosen_flags in zip(ids.items(), chosen, strict=True)
    }
    config = {"extra_ids": 100, "added_tokens_decoder": decoder, "tokenizer_class": "T5Tokenizer"}
    (empty / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(tiny / "spiece.model", empty)
    try:
        ours, theirs = tokenizer.load(empty), transformers.T5Tokenizer.from_pretrained(empty)
    finally:
        for file in empty.iterdir():
            file.unlink()
    ids = ours.encode(text)
    assert ids == theirs(text).input_ids
    decoded = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.decode(ids) == decoded.strip()


@examples(100)
@given(st.tuples(flags, flags), st.lists(between, max_size=9).map("".join))
def test_added_tokens_of_byt5_equal_transformers(empty, chosen, text):
    theirs = transformers.ByT5Tokenizer()
    for token, chosen_flags in zip(("<cat>", "cat"), chosen, strict=True):
        theirs.add_tokens([transformers.AddedToken(token, **chosen_flags | {"single_word": False})])
    theirs.save_pretrained(empty)
    try:
        ours = tokenizer.load(empty)
    finally:
        for file in empty.iterdir():
            file.unlink()
    ids = ours.encode(text)
    assert ids == [*theirs.encode(text, add_special_tokens=False), tokenizer.EOS]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True).strip()
    assert len(ours) == len(theirs) == 386


def test_byt5_refuses_added_tokens_that_match_whole_words_only(tmp_path):
    with pytest.raises(ValueError, match="added token 'cat' is single_word"):
        byte_tokenizer(tmp_path, added_tokens_decoder={"384": {"content": "cat", "single_word": True}})


@pytest.mark.parametrize("text", ["a</s>b", "<pad>", "x<extra_id_0> y<extra_id_124>", "<unk>é", "<extra_id_125>"])
def test_byt5_reads_its_special_tokens(tmp_path, text):
    reference = transformers.ByT5Tokenizer()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    assert tokenizer.load(tmp_path).encode(text) == [*reference.encode(text, add_special_tokens=False), 1]


def test_a_tokenizer_json_with_another_eos_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="</s> has id 2, expected 1"):
        tokenizer.load(tmp_path)
