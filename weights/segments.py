"""Inputs of stage 3: segments of text, and both teachers' vectors of the segments. Does not depend on T5.

    python weights/segments.py TEXT_DIR TEACHERS_DIR WORK_DIR --minutes 30

TEXT_DIR contains *.txt.xz files of UTF-8 text with one paragraph per line; files named *.valid.txt.xz are held out.
teachers.py describes TEACHERS_DIR. The student's tokenizer is that of the built-in models. Segments of one to three
sentences are cut once, into WORK_DIR/SOURCE.txt. Then both teachers read blocks of the sources in turn until the
minutes are over; a later call continues after the last complete block. promptable.py trains on the blocks that exist
when it starts.

Sources: `train` is running text; in `mixed`, a tenth to six tenths of the words are replaced by random words of the
teacher's vocabulary, so that the student meets every word; `made` is opinions and questions from frames, `news` is
news from frames, and `phrases` a few words each (frames.py); `valid` is held-out running text. No task data are used.
"""

import argparse
import itertools
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
from frames import made, news, phrases
from prepare import LONGEST, Batches, paragraphs
from teachers import NAMES, WIDTH, Read, load
from tokenizers import Tokenizer

BLOCK = 2_000  # segments
TOKENS = 2048  # per batch, including padding
# Shares of the teachers' reading; valid is read first.
SHARES = dict(valid=10**6, train=2, mixed=1, made=1, phrases=4, news=1)
# Most segments per source.
MOST = dict(valid=BLOCK, train=400_000, mixed=400_000, made=200_000, phrases=400_000, news=200_000)
FRAMES = dict(made=made, news=news)
SHORTEST = 5  # tokens per segment
WIDTHS = range(8, LONGEST + 1, 4)  # of a batch: narrow steps, so that little is padding
TOKENIZER = Path(__file__).parent / "tinyprompt-t5" / "tokenizer.json"


def cut(text, rng):
    """Yield segments of one to three sentences of paragraphs in random order."""
    lines = [p for p in paragraphs(text) if len(p) > 20]
    for i in rng.permutation(len(lines)):
        sentences, at = re.split(r"(?<=[.!?;])[\"')]*\s+", lines[i]), 0
        while at < len(sentences):
            k = int(rng.choice((1, 1, 1, 2, 3)))
            yield " ".join(" ".join(sentences[at : at + k]).split())
            at += k


def mixed(segments, words, rng):
    """Replace some words of segments."""
    for text in segments:
        own, rate = text.split(), rng.uniform(0.1, 0.6)
        other, gone = words[rng.integers(len(words), size=len(own))], rng.random(len(own)) < rate
        yield " ".join(o + w[len(w.rstrip(".,;:!?")) :] if g else w for w, o, g in zip(own, other, gone, strict=True))


def write_segments(text, work, tok, words):
    """Write WORK/SOURCE.txt for each source, one segment per line, without too short and too long segments."""
    files = sorted(text.glob("*.txt.xz"))
    for seed, source in enumerate(SHARES):
        path = work / f"{source}.txt"
        if path.exists():
            continue
        rng = np.random.default_rng([seed, 3])
        segments = cut([f for f in files if (".valid." in f.name) == (source == "valid")], rng)
        if source == "mixed":
            segments = mixed(segments, words, rng)
        elif source in FRAMES:
            segments = FRAMES[source]([*itertools.islice(segments, 100_000)], words, rng)
        elif source == "phrases":
            segments = phrases(words, rng)
        found = 0
        with open(f"{path}.part", "w", encoding="utf-8") as out:
            while found < MOST[source] and (batch := list(itertools.islice(segments, 20_000))):
                encodings = tok.encode_batch_fast(batch, add_special_tokens=False)
                kept = [s for s, e in zip(batch, encodings, strict=True) if SHORTEST <= len(e.ids) <= LONGEST]
                kept = kept[: MOST[source] - found]
                out.write("".join(f"{s}\n" for s in kept))
                found += len(kept)
        os.replace(f"{path}.part", path)


def aligned(found: Read, encodings) -> np.ndarray:
    """Return, for each token of the student, the teacher's vector of the token that contains its first character."""
    rows = []
    for i, e in enumerate(encodings):
        low, high = found.starts[i], found.starts[i + 1] - 1  # the last token has no text
        begins = [a for a, _ in e.offsets]
        rows.append(low + np.maximum(np.searchsorted(found.spans[low:high, 0], begins, "right") - 1, 0))
    return found.tokens[np.concatenate(rows)]


class Store:
    """The files of a source: PATH.student uint16 (N, 48); per teacher, PATH.NAME.tokens and .sentences, fp16."""

    def __init__(self, path):
        self.path = path
        counts = Path(f"{path}.count")
        self.count, self.tokens = map(int, counts.read_text().split()) if counts.exists() else (0, 0)
        self.sizes = {"student": (LONGEST * 2, "count")}
        for name in NAMES:
            self.sizes |= {f"{name}.sentences": (WIDTH * 2, "count"), f"{name}.tokens": (WIDTH * 2, "tokens")}

    def append(self, tok, teachers, texts):
        """Let the teachers read a block of texts, and append their vectors."""
        encodings = tok.encode_batch(texts, add_special_tokens=False)
        ids = np.zeros((len(texts), LONGEST), np.uint16)
        for row, e in zip(ids, encodings, strict=True):
            row[: len(e.ids)] = e.ids
        new = {"student": ids}
        for name, teacher in teachers.items():
            found = teacher.read(texts)
            new[f"{name}.sentences"] = found.sentences.astype(np.float16)
            new[f"{name}.tokens"] = aligned(found, encodings).astype(np.float16)
        for name, array in new.items():
            size, of = self.sizes[name]
            with open(f"{self.path}.{name}", "ab") as file:
                file.truncate(size * getattr(self, of))  # remove an incomplete block of a killed run
                file.seek(0, os.SEEK_END)
                array.tofile(file)
        self.count, self.tokens = self.count + len(texts), self.tokens + int((ids != 0).sum())
        Path(f"{self.path}.count.part").write_text(f"{self.count} {self.tokens}\n")
        os.replace(f"{self.path}.count.part", f"{self.path}.count")

    def map(self, name):
        """Map a file as an array."""
        size, of = self.sizes[name]
        dtype = np.uint16 if name == "student" else np.float16
        return np.memmap(f"{self.path}.{name}", dtype, "r", shape=(getattr(self, of), size // 2))


class Segments(Batches):
    """Segments with both teachers' vectors. Batch i of a seed is always the same until a block is added."""

    def __init__(self, path):
        store = Store(path)
        self.ids = store.map("student")
        self.sentences = {name: store.map(f"{name}.sentences") for name in NAMES}
        self.tokens = {name: store.map(f"{name}.tokens") for name in NAMES}
        self.length = (np.asarray(self.ids) != 0).sum(1)
        self.start = np.concatenate([[0], np.cumsum(self.length)])
        self.group(0, TOKENS, WIDTHS)

    def targets(self, rows, places):
        """Return each teacher's vectors of tokens. places (B, S): a token's index in its segment, -1 for none."""
        known = places >= 0
        at = (self.start[rows][:, None] + places)[known]
        out = {}
        for name, tokens in self.tokens.items():
            out[name] = np.zeros((*places.shape, WIDTH), np.float32)
            out[name][known] = tokens[at]
        return out


def read(text, folder, work, minutes):
    """Let both teachers read for some minutes, and at least one block of each source."""
    started = time.time()
    stores = {source: Store(work / source) for source in SHARES}
    if minutes <= 0 and all(store.count for store in stores.values()):
        return
    work.mkdir(parents=True, exist_ok=True)
    teachers = {name: load(folder, name) for name in NAMES}
    tok, mini = Tokenizer.from_file(str(TOKENIZER)), teachers["mini"].tokenizer
    words = [mini.id_to_token(i) for i in range(1996, mini.get_vocab_size())]
    words = np.array([w for w in words if w.isascii() and w.isalpha() and len(w) > 1])
    write_segments(text, work, tok, words)
    texts = {source: (work / f"{source}.txt").read_text(encoding="utf-8").splitlines() for source in SHARES}
    while left := [s for s in SHARES if stores[s].count < len(texts[s])]:
        source = min(left, key=lambda s: stores[s].count / SHARES[s])
        store = stores[source]
        if store.count and time.time() - started > minutes * 60:
            break
        store.append(tok, teachers, texts[source][store.count : store.count + BLOCK])
        print(f"{source}: {store.count} segments, {time.time() - started:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="folder of *.txt.xz")
    parser.add_argument("teachers", type=Path, help="folder of both teachers")
    parser.add_argument("work", type=Path, help="folder of all output")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    read(args.text, args.teachers, args.work, args.minutes)


if __name__ == "__main__":
    main()
