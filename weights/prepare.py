"""Inputs of pre-training: the tokenizer, segments of text, and the teacher's vectors of the segments.

`prepare` writes them into a folder, once for all sizes; `Segments` returns them in batches. pretrain.py calls both.
This module does not depend on T5.
"""

import itertools
import lzma
import os
import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

PAD, EOS, UNK, SENTINELS = 0, 1, 2, 100
PIECES = 16_128  # all are pieces of the teacher's vocabulary, except pad, eos, unk and the sentinels
CLS, SEP = 101, 102  # ids of the teacher
LONGEST = 48  # tokens per segment
WIDTHS = (16, 24, 32, 48)  # segments of similar length share a batch
TOKENS = 4096  # per batch, including padding


def paragraphs(paths):
    """Yield the paragraphs of .txt.xz files."""
    for path in paths:
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            yield from (line.strip() for line in lines)


def make_tokenizer(texts, teacher, path):
    """Reduce the teacher's WordPiece vocabulary: pad 0, eos 1, unk 2, pieces by frequency, then the sentinels.

    The rank of a piece is the mean of its rank by frequency in the texts and its rank in the teacher's vocabulary,
    since the texts are older than the teacher's data. The teacher's id of each piece is stored for looking up its
    vector.
    """
    counts = np.zeros(teacher.get_vocab_size(), int)
    sample = (p for f in texts for i, p in enumerate(paragraphs([f])) if p and i % 4 == 0)
    while block := list(itertools.islice(sample, 10_000)):
        for encoding in teacher.encode_batch_fast(block, add_special_tokens=False):
            np.add.at(counts, encoding.ids, 1)
    names = [teacher.id_to_token(i) for i in range(len(counts))]
    rank = np.empty(len(counts), int)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    rank += np.arange(len(counts))
    usable = [i for i, name in enumerate(names) if name.isascii() and not name.startswith("[")]
    letters = [i for i in usable if len(names[i].removeprefix("##")) == 1]  # single characters can spell every word
    rest = sorted(set(usable) - set(letters), key=lambda i: rank[i])
    chosen = sorted(letters + rest[: PIECES - SENTINELS - 3 - len(letters)], key=lambda i: -counts[i])
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    pieces = ["<pad>", "</s>", "<unk>", *(names[i] for i in chosen), *reversed(sentinels)]
    tok = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece()
    tok.add_special_tokens(["<pad>", "</s>", "<unk>", *sentinels])
    tok.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
    )
    np.save(path.with_name("teacher_ids.npy"), [0, 102, 100, *chosen, *[103] * SENTINELS])
    tok.save(str(path), pretty=False)


def starts_word(tok):
    """Return, for each id, whether its piece begins a word."""
    return np.array([not tok.id_to_token(i).startswith("##") for i in range(tok.get_vocab_size())])


def make_segments(texts, tok, teacher, path, seed, mixed=False, most=10**9):
    """Cut shuffled paragraphs into segments of one to three sentences; write their ids for student and teacher.

    Files: PATH.student uint16 (N, 48), PATH.teacher uint16 (N, 50), and PATH.index uint8 (N, 48): for each token, the
    index of the teacher's token that begins the same word, or 255 at padding. mixed: a tenth to six tenths of the words
    are replaced by random words of the teacher's vocabulary. The student thus meets every word, including words that
    are newer than the texts, and words that it must spell in pieces.
    """
    rng = np.random.default_rng(seed)
    lines = [p for p in paragraphs(texts) if len(p) > 20]
    order = rng.permutation(len(lines))
    begins, teacher_begins = starts_word(tok), starts_word(teacher)
    words = [teacher.id_to_token(i) for i in range(1996, teacher.get_vocab_size())]
    words = np.array([w for w in words if w.isascii() and w.isalpha() and len(w) > 1])

    def mix(text):
        rate = rng.uniform(0.1, 0.6)
        return " ".join(
            words[rng.integers(len(words))] + w[len(w.rstrip(".,;:!?")) :] if rng.random() < rate else w
            for w in text.split()
        )

    found = 0
    with (
        open(f"{path}.student", "wb") as student_file,
        open(f"{path}.teacher", "wb") as teacher_file,
        open(f"{path}.index", "wb") as index_file,
    ):
        for s in range(0, len(order), 20_000):
            batch = []
            for i in order[s : s + 20_000]:
                sentences, at = re.split(r"(?<=[.!?;])[\"')]*\s+", lines[i]), 0
                while at < len(sentences):
                    k = int(rng.choice((1, 1, 1, 2, 3)))
                    batch.append(" ".join(sentences[at : at + k]))
                    at += k
            if mixed:
                batch = [mix(text) for text in batch]
            ids = np.zeros((len(batch), LONGEST), np.uint16)
            teacher_ids = np.zeros((len(batch), LONGEST + 2), np.uint16)
            index, keep = np.full((len(batch), LONGEST), 255, np.uint8), np.zeros(len(batch), bool)
            encodings = (t.encode_batch_fast(batch, add_special_tokens=False) for t in (tok, teacher))
            for row, (a, b) in enumerate(zip(*encodings, strict=True)):
                a, b = np.array(a.ids, int), np.array(b.ids, int)
                if len(a) < 5:
                    continue
                word, first = np.cumsum(begins[a]) - 1, np.flatnonzero(teacher_begins[b])
                if len(a) > LONGEST:  # cut after a whole word
                    whole = word[LONGEST - 1] + (word[LONGEST] != word[LONGEST - 1])
                    a, word = a[word < whole], word[word < whole]
                    b = b[: first[whole]] if whole < len(first) else b
                if len(b) > LONGEST or len(a) < 5 or word[-1] >= len(first):
                    continue
                ids[row, : len(a)], teacher_ids[row, : len(b) + 2] = a, [CLS, *b, SEP]
                index[row, : len(a)], keep[row] = first[word] + 1, True
            for array, file in ((ids, student_file), (teacher_ids, teacher_file), (index, index_file)):
                array[keep].tofile(file)
            found += keep.sum()
            if found > most:
                break


def make_vectors(teacher, path, most, dtype):
    """Write the teacher's float16 vectors of 384 numbers: PATH.tokens, one per token, and PATH.sentence, their mean.

    A second call continues after the last complete block of 16,000 segments.
    """
    ids = np.memmap(f"{path}.teacher", np.uint16, "r").reshape(-1, LONGEST + 2)
    index = np.memmap(f"{path}.index", np.uint8, "r").reshape(-1, LONGEST)
    done = os.path.getsize(f"{path}.sentence") // 768 if os.path.exists(f"{path}.sentence") else 0
    run = None
    while done < min(most, len(ids)):
        run = run or torch.compile(teacher.to(dtype))
        a, at = ids[done : done + 16_000].astype(np.int64), index[done : done + 16_000]
        length, own = (a != 0).sum(1), at != 255
        ends = np.cumsum(own.sum(1))
        tokens, sentences = np.empty((ends[-1], 384), np.float16), np.empty((len(a), 384), np.float16)
        for low, width in itertools.pairwise((0, 16, 24, 32, 40, 50)):
            rows, size = np.flatnonzero((length > low) & (length <= width)), TOKENS // width
            for s in range(0, len(rows), size):
                part = rows[s : s + size]
                x = torch.from_numpy(a[np.resize(part, size), :width])
                mask = (x != 0).long()
                with torch.inference_mode():
                    h = run(input_ids=x, attention_mask=mask).last_hidden_state.float()
                sentences[part] = ((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))[: len(part)].numpy()
                for vectors, row in zip(h.numpy(), part, strict=False):
                    tokens[ends[row] - own[row].sum() : ends[row]] = vectors[at[row][own[row]]]
        with open(f"{path}.tokens", "ab") as token_file, open(f"{path}.sentence", "ab") as sentence_file:
            tokens.tofile(token_file)
            sentences.tofile(sentence_file)
        done += len(a)


class Batches:
    """Batches of segments of similar length. A subclass has `ids`, `length`, `groups` and `size`, the tokens per batch.

    Batch i of a seed is always the same.
    """

    def group(self, shortest, size, widths=WIDTHS):
        """Group the segments by length; drop segments of at most `shortest` tokens."""
        self.size, self.epochs = size, {}  # for each seed: the number of the epoch, and its batches
        self.groups = [
            (width, np.flatnonzero((self.length > low) & (self.length <= width)))
            for low, width in itertools.pairwise((shortest, *widths))
        ]
        self.count = sum(len(rows) // (size // width) for width, rows in self.groups)

    def batch(self, i, seed):
        """Return width and rows of batch i. Every epoch is shuffled."""
        epoch, at = divmod(i, self.count)
        if self.epochs.get(seed, (None,))[0] != epoch:
            rng, batches = np.random.default_rng([seed, epoch]), []
            for width, rows in self.groups:
                rows, size = rng.permutation(rows), self.size // width
                batches += [(width, rows[s : s + size]) for s in range(0, len(rows) - size + 1, size)]
            self.epochs[seed] = epoch, [batches[k] for k in rng.permutation(len(batches))]
        return self.epochs[seed][1][at]

    def row(self, r):
        """Return the ids of one segment."""
        return self.ids[r, : self.length[r]].astype(int)


class Segments(Batches):
    """Segments with the teacher's vectors."""

    def __init__(self, path):
        self.sentences = np.memmap(f"{path}.sentence", np.float16, "r").reshape(-1, 384)
        self.ids = np.memmap(f"{path}.student", np.uint16, "r").reshape(-1, LONGEST)[: len(self.sentences)]
        self.length = np.concatenate([(block != 0).sum(1) for block in np.array_split(self.ids, 100)])
        self.start = np.concatenate([[0], np.cumsum(self.length)])
        self.tokens = np.memmap(f"{path}.tokens", np.float16, "r", shape=(self.start[-1], 384))
        self.group(4, TOKENS)

    def targets(self, rows, places):
        """Return the teacher's vectors of tokens. places (B, S): a token's index in its segment, -1 for none."""
        out = np.zeros((*places.shape, 384), np.float32)
        for i, r in enumerate(rows):
            known = places[i] >= 0
            out[i, known] = np.asarray(self.tokens[self.start[r] : self.start[r + 1]])[places[i, known]]
        return out


def prepare(text, folder, teacher, teacher_tok, most, dtype):
    """Write missing files into a folder; return its Segments by name.

    text: a folder of *.txt.xz; most: the number of segments that the teacher reads, for "valid", "train" and "mixed".
    """
    files = sorted(Path(text).glob("*.txt.xz"))
    held_out, texts = ([f for f in files if (".valid." in f.name) is held] for held in (True, False))
    if not (folder / "tokenizer.json").exists():
        make_tokenizer(texts, teacher_tok, folder / "tokenizer.json")
    tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
    out = {}
    for name, paths, seed in (("valid", held_out, 1), ("train", texts, 0), ("mixed", texts, 2)):
        if not (folder / f"{name}.done").exists():
            limit = most[name] if name == "mixed" else 10**9
            make_segments(paths, tok, teacher_tok, folder / name, seed, name == "mixed", limit)
            (folder / f"{name}.done").touch()
        make_vectors(teacher, folder / name, most[name], dtype)
        out[name] = Segments(folder / name)
    return out
