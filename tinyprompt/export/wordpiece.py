"""The table of a WordPiece tokenizer that `c/encode.c` reads: pieces, kinds of characters, and added tokens.

The rules of the tokenizer are found by asking it: each character is encoded between two letters. So they hold for every
text if no rule looks at two characters, as in BERT's normaliser and pre-tokeniser. Only canonical reordering does. It
changes marks that are in no piece, and a word with one of them is unknown in any order.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers

from tinyprompt.config import EOS
from tinyprompt.model import Tokenizer
from tinyprompt.tokenizer import PieceTokenizer

BERT = ("BertNormalizer", "BertPreTokenizer", "WordPiece")
MAGIC = 0x31505754  # "TWP1"
CHUNK = 100  # characters that are encoded at once
UNKNOWN, DROPPED, SPACE, ALONE, PART = range(5)  # the kinds of characters


def bert(tokenizer: Tokenizer) -> tuple[PieceTokenizer, dict[str, Any]]:
    """Return a tokenizer of BERT's kind, without flags of added tokens, and its settings. Raises ValueError."""
    wanted = f"tokenizers of the kind {BERT} without flags"
    if not isinstance(tokenizer, PieceTokenizer) or tokenizer.ids_of:
        raise ValueError(f"{wanted}, and this is another one")
    settings = json.loads(tokenizer.pipeline.to_str())
    found = tuple((settings[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model"))
    added = tokenizer.added.values()
    flagged = [t.content for t in added if t.lstrip or t.rstrip or t.single_word or t.normalized]
    if found != BERT or flagged:
        other = f"flags of the added token {flagged[0]!r}" if found == BERT else str(found)
        raise ValueError(f"{wanted}; found {other}")
    return tokenizer, settings


def table(tokenizer: Tokenizer) -> bytes | None:
    """Return the table of a tokenizer, or None if it is not WordPiece, or has rules that the table cannot say."""
    try:
        words, settings = bert(tokenizer)
    except ValueError:
        return None
    pipeline, model = words.pipeline, settings["model"]
    if model["continuing_subword_prefix"] != "##":
        return None
    added = {token["content"]: token["id"] for token in settings["added_tokens"]}
    pieces = {piece.encode(): id for piece, id in model["vocab"].items() if piece not in added}
    ranges = list(joined(characters(pipeline, set("".join(model["vocab"])))))
    tokens = sorted(added.items(), key=lambda item: -len(item[0].encode()))
    blob, numbers = bytearray(), [MAGIC, len(pieces), len(ranges), len(tokens), model["max_input_chars_per_word"]]
    numbers += [pipeline.token_to_id(model["unk_token"]), EOS]

    def stored(text: bytes) -> list[int]:
        at = len(blob)
        blob.extend(text)
        return [at, len(text)]

    for piece in sorted(pieces):
        numbers += [*stored(piece), pieces[piece]]
    for content, id in tokens:
        numbers += [*stored(content.encode()), id]
    for first, last, kind, text in ranges:
        numbers += [first, last, kind, *stored(text.encode())]
    return np.array(numbers, "<i4").tobytes() + bytes(blob)


def between_letters(pipeline: tokenizers.Tokenizer) -> Iterator[tuple[int, list[str]]]:
    """Yield the code point of each character, and the words that it makes between two letters `a`."""
    codes = [code for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(codes), CHUNK):
        chunk = codes[start : start + CHUNK]
        text = pipeline.normalizer.normalize_str(" zz ".join(f"a{chr(code)}a" for code in chunk))
        words = [word for word, _ in pipeline.pre_tokenizer.pre_tokenize_str(text)]
        for code, found in zip(chunk, "\n".join(words).split("\nzz\n"), strict=True):
            yield code, found.split("\n")


def characters(pipeline: tokenizers.Tokenizer, alphabet: set[str]) -> Iterator[tuple[int, int, str]]:
    """Yield each character but NUL that is not simply unknown: code point, kind, and the text that it becomes."""
    for code, words in itertools.islice(between_letters(pipeline), 1, None):
        match words:
            case ["aa"]:
                yield code, DROPPED, ""
            case ["a", "a"]:
                yield code, SPACE, ""
            case ["a", part, "a"]:
                yield code, ALONE, part if alphabet.issuperset(part) else ""
            case [word] if alphabet.issuperset(word):
                yield code, PART, word[1:-1]
            case [_]:
                continue
            case _:
                raise ValueError(f"character {code:#x} becomes {words}")


def joined(found: Iterator[tuple[int, int, str]]) -> Iterator[tuple[int, int, int, str]]:
    """Join neighbours of the same kind and text into ranges: first, last, kind, text."""
    first, last, kind, text = 0, -1, UNKNOWN, ""
    for code, own_kind, own_text in found:
        if code == last + 1 and (own_kind, own_text) == (kind, text):
            last = code
            continue
        if last >= first:
            yield first, last, kind, text
        first, last, kind, text = code, code, own_kind, own_text
    yield first, last, kind, text
