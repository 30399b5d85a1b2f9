"""Tokenizers: `tokenizer.json`, `spiece.model`, or ByT5's bytes.

`load` builds each of them from a Hugging Face directory. The ids of pad, eos and unk are 0, 1 and 2.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from tinyprompt.config import EOS, PAD, UNK
from tinyprompt.model import Tokenizer

MAX_EXTRA_IDS = 10_000
NO_TOKENS: Mapping[int, AddedToken] = MappingProxyType({})


class PieceTokenizer:
    """A `tokenizers` pipeline as a `Tokenizer`.

    If `ids_of` is given, the pipeline only finds added tokens, and `ids_of` encodes the text between them.
    """

    def __init__(self, pipeline: tokenizers.Tokenizer, ids_of: Callable[[str], list[int]] | None = None):
        self.pipeline, self.ids_of = pipeline, ids_of
        # A file may request padding or truncation, which batches handle here.
        pipeline.no_padding()
        pipeline.no_truncation()
        self.added: dict[int, AddedToken] = pipeline.get_added_tokens_decoder()

    def encode(self, text: str) -> list[int]:
        found = self.pipeline.encode(text, add_special_tokens=False)
        if not self.ids_of:
            return [*found.ids, EOS]
        ids: list[int] = []
        for id, (start, end) in zip(found.ids, found.offsets, strict=True):
            part = text[start:end]
            is_token = id in self.added and (id != UNK or part.strip() == "<unk>")
            ids += [id] if is_token else self.ids_of(part)
        return [*ids, EOS]

    def decode(self, ids: Sequence[int]) -> str:
        return self.pipeline.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def piece(self, id: int) -> str:
        return self.pipeline.id_to_token(id) or f"<{id}>"

    def __len__(self) -> int:
        return self.pipeline.get_vocab_size()


class ByteTokenizer(PieceTokenizer):
    """ByT5: a byte b is id b + 3 (Xue et al. 2022, arXiv:2105.13626)."""

    def __init__(self, extra_ids: int = 125, added: Mapping[int, AddedToken] = NO_TOKENS, path: Path = Path("ByT5")):
        special = {"<pad>": PAD, "</s>": EOS, "<unk>": UNK}
        pipeline = finder(special | {f"<{b}>": b + 3 for b in range(256)})
        pipeline.add_special_tokens([AddedToken(token, lstrip=True, rstrip=True) for token in special])
        pipeline.add_special_tokens([f"<extra_id_{i}>" for i in range(extra_ids)])
        if word := next((token.content for token in added.values() if token.single_word), None):
            told = "which has another meaning for ByT5; add it without"  # transformers asks for spaces
            raise ValueError(f"{path}: added token {word!r} is single_word, {told}")
        plain = {  # there is no normaliser, so all tokens are plain
            id: AddedToken(t.content, lstrip=t.lstrip, rstrip=t.rstrip, special=t.special, normalized=False)
            for id, t in added.items()
        }
        super().__init__(with_added(pipeline, plain, path), lambda text: [b + 3 for b in text.encode()])

    def decode(self, ids: Sequence[int]) -> str:
        kept = {id: token.content.encode() for id, token in self.added.items() if not token.special}
        kept |= {b + 3: bytes([b]) for b in range(256)}
        return b"".join(kept.get(int(i), b"") for i in ids).decode(errors="ignore").strip()

    def piece(self, id: int) -> str:
        return self.added[id].content if id in self.added else chr(id - 3) if 32 < id - 3 < 127 else f"<{id}>"


def finder(vocabulary: Mapping[str, int]) -> tokenizers.Tokenizer:
    """Build a pipeline that finds added tokens. The text between two tokens becomes one unknown word."""
    pipeline = tokenizers.Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<unk>"))
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace("\0", prepend_scheme="always", split=False)  # no piece has a NUL
    return pipeline


def load(folder: str | Path) -> Tokenizer:
    """Load the tokenizer of a Hugging Face directory, or of a single file (`.json`, else sentencepiece).

    Raises:
        ValueError, FileNotFoundError: The tokenizer cannot be loaded. The message names the file.
    """
    folder = Path(folder)
    if folder.is_file():
        return _from_json(folder, NO_TOKENS) if folder.suffix == ".json" else from_sentencepiece(folder)
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
        return from_sentencepiece(path, settings.get("extra_ids"), added)
    if settings.get("tokenizer_class") == "ByT5Tokenizer":
        return ByteTokenizer(settings.get("extra_ids", 125), added, folder)
    raise FileNotFoundError(
        f"{folder}: no tokenizer; expected tokenizer.json, spiece.model, "
        "or tokenizer_config.json with tokenizer_class ByT5Tokenizer"
    )


def added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return the added tokens by id, from tokenizer_config.json or else from added_tokens.json, as in transformers.

    Raises:
        ValueError: The file does not map ids and tokens.
    """
    path = folder / "added_tokens.json"
    try:
        if (decoder := settings.get("added_tokens_decoder")) is not None:
            path = folder / "tokenizer_config.json"
            return {int(id): AddedToken(**token) for id, token in decoder.items()}
        found = dict(json.loads(path.read_text(encoding="utf-8")).items()) if path.exists() else {}
        if not all(type(id) is int for id in found.values()):
            raise ValueError("an id is not an integer")
        special = str({k: v for k, v in settings.items() if k.endswith(("_token", "_special_tokens"))})
        return {
            id: AddedToken(token, special=repr(token) in special, normalized=repr(token) not in special)
            for token, id in found.items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a map of added tokens and their ids ({error!r})") from None


def with_added(pipeline: tokenizers.Tokenizer, added: Mapping[int, AddedToken], path: Path) -> tokenizers.Tokenizer:
    """Add tokens with given ids and flags to a pipeline. An existing token keeps its flags.

    Raises:
        ValueError: A token cannot get its id.
    """
    before = {token.content for token in pipeline.get_added_tokens_decoder().values()}
    for id, token in sorted(added.items()):
        pipeline.add_tokens([token] if token.content not in before else [])
        if pipeline.token_to_id(token.content) != id:
            found = pipeline.token_to_id(token.content)
            raise ValueError(f"{path}: added token {token.content!r}: expected id {id}, found {found}")
    return pipeline


def _from_json(path: Path, added: Mapping[int, AddedToken]) -> Tokenizer:
    try:
        pipeline = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises bare Exception, and panics that are not an Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"{path}: not a file of the tokenizers library: {error}") from None
    for token, id in (("<pad>", PAD), ("</s>", EOS)):
        if pipeline.token_to_id(token) not in (None, id):
            raise ValueError(f"{path}: {token} has id {pipeline.token_to_id(token)}, expected {id}, as in every T5")
    return PieceTokenizer(with_added(pipeline, added, path))


def from_sentencepiece(
    path: str | Path, extra_ids: int | None = None, added: Mapping[int, AddedToken] = NO_TOKENS
) -> PieceTokenizer:
    """Load a sentencepiece model file. The sentencepiece library encodes, so all settings of the file apply.

    The sentinels <extra_id_0> ... are appended as in T5, with the highest id for <extra_id_0>. Their number is 100 by
    default, or 0 if the file already contains sentinels, as for mT5.

    Raises:
        ValueError: The file is not a sentencepiece model, or the ids of pad, eos or unk are not T5's.
    """
    from sentencepiece import SentencePieceProcessor

    data = Path(path).read_bytes()
    try:
        model = SentencePieceProcessor(model_proto=data)
        pieces = model.id_to_piece(list(range(len(model))))
    except (RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a sentencepiece model, or truncated ({error})") from None
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    for token, id in (("<pad>", PAD), ("</s>", EOS), ("<unk>", UNK)):
        if vocabulary.setdefault(token, id) != id:
            raise ValueError(f"{path}: {token} has id {vocabulary[token]}, expected {id}, as in every T5")
    if extra_ids is None:
        extra_ids = 0 if any(piece.endswith("<extra_id_0>") for piece in pieces) else 100
    pipeline = finder(vocabulary)
    if any(token.normalized for token in added.values()):
        settings = dict(_protobuf_fields(dict(_protobuf_fields(data)).get(3, b"")))
        pipeline.normalizer = normalizers.Precompiled(settings[2]) if settings.get(2) else None
    has_bytes = any(map(model.is_byte, range(len(model))))
    pipeline.decoder = decoders.Sequence([decoders.ByteFallback()] * has_bytes + [decoders.Replace("▁", " ")])
    control = [piece for id, piece in enumerate(pieces) if model.is_control(id) or model.is_unknown(id)]
    pipeline.add_special_tokens([*control, *(f"<extra_id_{i}>" for i in reversed(range(extra_ids)))])
    return PieceTokenizer(with_added(pipeline, added, Path(path)), model.encode)


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the field number and the raw value of each field of a protobuf message: int for a varint, else bytes."""
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
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, data[at : at + size]
        at += size
