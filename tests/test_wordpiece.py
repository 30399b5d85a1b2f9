"""encode.c gives a text the ids of the tokenizer."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from tinyprompt.config import EOS, UNK
from tinyprompt.data import encode_inputs
from tinyprompt.export import wordpiece
from tinyprompt.files import models
from tinyprompt.tokenizer import ByteTokenizer, PieceTokenizer

C = Path(wordpiece.__file__).parent / "c"
pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")


@pytest.fixture(scope="module")
def model():
    return models.load("tiny")


@pytest.fixture(scope="module")
def encode(model, tmp_path_factory):
    """Return a function that computes the ids of a text with encode.c, at most `most`."""
    made = tmp_path_factory.mktemp("c")
    (made / "words.bin").write_bytes(wordpiece.table(model.tokenizer))
    flags = "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"
    subprocess.run(["cc", *flags, "-o", made / "encode.so", C / "encode.c"], check=True)
    library = ctypes.CDLL(str(made / "encode.so"))
    assert library.encode_load(str(made / "encode.c").encode()) == 0
    assert library.encode_load(str(made / "words.bin").encode()) == 1

    def encoded(text, most=4000):
        ids = (ctypes.c_int32 * most)()
        return ids[: library.encode(text if isinstance(text, bytes) else text.encode(), ids, most)]

    return encoded


TOKENS = st.sampled_from(["<extra_id_0>", "<extra_id_99>", "<extra_id_1", "</s>", "<unk>", "<pad>", "<<unk>"])
WORDS = st.sampled_from(
    ["unbelievable", "Café", "e\u0301", "don't", "x" * 100, "x" * 101, "\u0130", "한국", "日本", "ß", "½"]
)
LETTERS = st.characters(codec="utf-8", exclude_characters="\0") | st.characters(
    max_codepoint=0x17F, exclude_characters="\0"
)
TEXTS = st.lists(TOKENS | WORDS | st.text(LETTERS, max_size=12) | st.sampled_from(" \t\n,.-"), max_size=12).map("".join)


@examples(1000)
@given(text=TEXTS)
def test_ids_equal_the_tokenizer(model, encode, text):
    assert encode(text) == model.tokenizer.encode(text)


@examples(100)
@given(text=TEXTS, most=st.integers(1, 9))
def test_a_long_text_is_truncated(model, encode, text, most):
    assert encode(text, most) == encode_inputs([text], model.tokenizer, most)[0]


def test_ids_of_every_character(model, encode):
    """Each character occurs between letters, and after another word."""
    codes = [code for code in range(1, 0x30000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(codes), 1000):
        text = " ".join(f"a{chr(code)}b {chr(code)}" for code in codes[start : start + 1000])
        assert encode(text, 10_000) == model.tokenizer.encode(text)


@pytest.mark.parametrize("bad", [b"\xff", b"a\xc3", b"\xe2\x82", b"\xf0\x9f\x98z", b"\xc0\xaf"])
def test_invalid_utf8_makes_its_word_unknown(encode, bad):
    assert encode(b"a " + bad + b" a") == [encode("a")[0], UNK, encode("a")[0], EOS]


def test_other_tokenizers_have_no_table(model):
    assert wordpiece.table(ByteTokenizer()) is None
    settings = model.tokenizer.pipeline.to_str()
    for old, new in [('"BertPreTokenizer"', '"Whitespace"'), ('"lstrip":false', '"lstrip":true')]:
        assert old in settings
        changed = tokenizers.Tokenizer.from_str(settings.replace(old, new, 1))
        assert wordpiece.table(PieceTokenizer(changed)) is None
