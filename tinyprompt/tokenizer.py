"""Text to ids and back: `tokenizer.json`, `spiece.model`, or ByT5's bytes.

All three are built from a Hugging Face directory by `load`. Ids: pad 0, eos 1, unk 2.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from tinyprompt.config import EOS, PAD, UNK
from tinyprompt.model import Tokenizer

MAX_EXTRA_IDS = 10_000


class PieceTokenizer:
    """A `tokenizers` pipeline as a `Tokenizer`."""

    def __init__(self, pipeline: tokenizers.Tokenizer):
        self.pipeline = pipeline
        # A file may ask for padding or cutting; both are the batch's business here.
        pipeline.no_padding()
        pipeline.no_truncation()

    def encode(self, text: str) -> list[int]:
        ids = self.pipeline.encode(text, add_special_tokens=False).ids
        return [*ids, EOS]

    def decode(self, ids: Sequence[int]) -> str:
        return self.pipeline.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def piece(self, id: int) -> str:
        return self.pipeline.id_to_token(id) or f"<{id}>"

    def __len__(self) -> int:
        return self.pipeline.get_vocab_size()


class ByteTokenizer:
    """ByT5: a byte b is id b + 3 (Xue et al. 2022, arXiv:2105.13626)."""

    def __init__(self, extra_ids: int = 125, added: Mapping[str, int] = MappingProxyType({})):
        self.extra_ids = extra_ids
        sentinels = {f"<extra_id_{i}>": 259 + i for i in range(extra_ids)}
        self.special = {"<pad>": PAD, "</s>": EOS, "<unk>": UNK} | sentinels | dict(added)
        self.split = re.compile("|".join(sorted(map(re.escape, self.special), key=len, reverse=True)))

    def encode(self, text: str) -> list[int]:
        ids, end = [], 0
        for found in self.split.finditer(text):
            ids += [*(b + 3 for b in text[end : found.start()].encode()), self.special[found[0]]]
            end = found.end()
        return [*ids, *(b + 3 for b in text[end:].encode()), EOS]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) - 3 for i in ids if 3 <= int(i) < 259).decode(errors="ignore").strip()

    def piece(self, id: int) -> str:
        return chr(id - 3) if 32 < id - 3 < 127 else f"<{id}>"

    def __len__(self) -> int:
        return 256 + 3 + self.extra_ids


def load(folder: str | Path) -> Tokenizer:
    """Load the tokenizer of a Hugging Face directory, or of one file (`.json`, else sentencepiece).

    Raises ValueError or FileNotFoundError that names the file.
    """
    folder = Path(folder)
    if folder.is_file():
        return _from_json(folder, {}) if folder.suffix == ".json" else PieceTokenizer(from_sentencepiece(folder))
    settings: dict[str, Any] = {}
    if (path := folder / "tokenizer_config.json").exists():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        extra = settings.get("extra_ids", 0) if isinstance(settings, dict) else None
        if not isinstance(extra, int) or not 0 <= extra <= MAX_EXTRA_IDS:
            raise ValueError(f"{path}: expected a JSON object; extra_ids, if there, from 0 to {MAX_EXTRA_IDS}")
    added = added_tokens(folder, settings)
    if (path := folder / "tokenizer.json").exists():
        return _from_json(path, added)
    if (path := folder / "spiece.model").exists():
        return PieceTokenizer(with_added(from_sentencepiece(path, settings.get("extra_ids")), added, path))
    if settings.get("tokenizer_class") == "ByT5Tokenizer":
        return ByteTokenizer(settings.get("extra_ids", 125), {token: id for token, id in added.items() if id >= 259})
    raise FileNotFoundError(
        f"{folder}: no tokenizer; expected tokenizer.json, spiece.model, "
        "or tokenizer_config.json with tokenizer_class ByT5Tokenizer"
    )


def added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens of added_tokens.json or tokenizer_config.json, and their ids.

    Raises ValueError for anything but a map of tokens and ids.
    """
    added: dict[str, Any] = {}
    decoder = settings.get("added_tokens_decoder") or {}
    path = folder / "added_tokens.json"
    try:
        added |= {token["content"]: int(id) for id, token in decoder.items()}
        added |= dict(json.loads(path.read_text(encoding="utf-8")).items()) if path.exists() else {}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: or added_tokens_decoder beside it, is no map of tokens and ids ({error!r})"
        ) from None
    if not all(isinstance(token, str) and type(id) is int for token, id in added.items()):
        raise ValueError(f"{path}: expected a map of tokens to ids")
    return added


def with_added(pipeline: tokenizers.Tokenizer, added: Mapping[str, int], path: Path) -> tokenizers.Tokenizer:
    """Add tokens with given ids to a pipeline. Raises ValueError if an id cannot be had."""
    for token, id in sorted(added.items(), key=lambda pair: pair[1]):
        if pipeline.token_to_id(token) is None:
            pipeline.add_tokens([tokenizers.AddedToken(token, normalized=False)])
        if pipeline.token_to_id(token) != id:
            raise ValueError(f"{path}: added token {token!r}: expected id {id}, found {pipeline.token_to_id(token)}")
    return pipeline


def _from_json(path: Path, added: Mapping[str, int]) -> Tokenizer:
    try:
        pipeline = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises bare Exception, and its panics are no Exception at all
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"{path}: not a file of the tokenizers library: {error}") from None
    for token, id in (("<pad>", PAD), ("</s>", EOS)):
        if pipeline.token_to_id(token) not in (None, id):
            raise ValueError(f"{path}: {token} has id {pipeline.token_to_id(token)}, expected {id}, as in every T5")
    return PieceTokenizer(with_added(pipeline, added, path))


def from_sentencepiece(path: str | Path, extra_ids: int | None = None) -> tokenizers.Tokenizer:
    """Build the `tokenizers` Unigram pipeline of a sentencepiece model file.

    The sentinels <extra_id_0> ... are appended as T5 does, <extra_id_0> with the highest id: 100 unless said otherwise,
    or none if the file holds its own, as mT5's does. Raises ValueError for a file that is no Unigram model, or whose
    settings no T5 has.
    """
    data = Path(path).read_bytes()
    try:
        return _unigram(data, extra_ids)
    except Exception as error:  # wrong bytes show up anywhere, and the library raises bare Exception
        raise ValueError(f"{path}: not a sentencepiece model of type unigram, or cut short ({error})") from None


def _unigram(data: bytes, extra_ids: int | None) -> tokenizers.Tokenizer:
    pieces, trainer, normalizer = _read_sentencepiece(data)
    if not pieces or trainer.get(3, 1) != 1:
        raise ValueError(f"{len(pieces)} pieces, type {trainer.get(3, 1)}")
    if not normalizer.get(4, 1) or not normalizer.get(5, 1) or trainer.get(24, 0):
        flags = "remove_extra_whitespaces, escape_whitespaces and not treat_whitespace_as_suffix"
        raise ValueError(f"expected {flags}, as T5's, but it treats white space otherwise")
    for token, id in (("<pad>", PAD), ("</s>", EOS)):
        found = next((i for i, (piece, _, _) in enumerate(pieces) if piece == token), id)
        if found != id:
            raise ValueError(f"{token} has id {found}, expected {id}, as in every T5")
    if extra_ids is None:
        extra_ids = 0 if any(piece.endswith("<extra_id_0>") for piece, _, _ in pieces) else 100
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]
    vocabulary = [(piece, score) for piece, score, _ in pieces] + [(s, 0.0) for s in sentinels]
    pipeline = tokenizers.Tokenizer(
        models.Unigram(vocabulary, unk_id=trainer.get(40, 0), byte_fallback=bool(trainer.get(35, 0)))
    )
    steps: list[Any] = [normalizers.Precompiled(normalizer[2])] if normalizer.get(2) else []
    # Not normalizers.Strip, which takes all white space.
    steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    pipeline.normalizer = normalizers.Sequence(steps)
    scheme = "always" if normalizer.get(3, 1) else "never"  # add_dummy_prefix
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    metaspace = decoders.Metaspace(prepend_scheme=scheme)
    pipeline.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace]) if trainer.get(35, 0) else metaspace
    pipeline.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
    )
    control = [piece for piece, _, kind in pieces if kind in (2, 3)]  # unknown and control pieces
    pipeline.add_special_tokens([*control, *sentinels])
    return pipeline


def _read_sentencepiece(data: bytes) -> tuple[list[tuple[str, float, int]], dict[int, Any], dict[int, Any]]:
    """Return pieces (text, score, kind), and trainer and normaliser settings by their protobuf field numbers."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _protobuf_fields(data):
        if field == 1:
            piece = dict(_protobuf_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, 1)))
        elif field == 2:
            trainer = dict(_protobuf_fields(value))
        elif field == 3:
            normalizer = dict(_protobuf_fields(value))
    return pieces, trainer, normalizer


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield field number and raw value of a protobuf message: int for a varint, else bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise struct.error(f"wire type {kind} at byte {at}")
        size = {1: 8, 5: 4}.get(kind) or varint()
        if at + size > len(data):
            raise IndexError(f"byte {at + size} of {len(data)}")
        yield key >> 3, data[at : at + size]
        at += size
