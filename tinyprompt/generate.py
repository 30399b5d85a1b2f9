"""Decoding over a function `logits_of(decoder_ids)`, (B, T) to (B, T, V). Knows no network.

`decoder_ids` starts with the pad token; `logits_of` may compute whatever it likes for a fixed input.
"""

from collections.abc import Callable, Sequence

import numpy as np

from tinyprompt import ops
from tinyprompt.tokenizer import EOS, PAD

LogitsOf = Callable[[np.ndarray], np.ndarray]


def shift_right(labels: np.ndarray) -> np.ndarray:
    """Decoder input for given labels: pad in front, the last label dropped. Shapes (B, T)."""
    return np.concatenate([np.full_like(labels[:, :1], PAD), labels[:, :-1]], axis=1)


def greedy(logits_of: LogitsOf, rows: int, max_tokens: int) -> list[list[int]]:
    """The likeliest token, again and again, until eos or `max_tokens`. Returns ids without eos, a list a row."""
    ids = np.full((rows, max_tokens + 8), PAD)
    done = np.zeros(rows, bool)
    for t in range(max_tokens):
        width = t // 8 * 8 + 8  # few widths, as each is another graph; no token sees those after it
        token = logits_of(ids[:, :width])[:, t].argmax(-1)
        ids[:, t + 1] = np.where(done, PAD, token)
        done |= token == EOS
        if done.all():
            break
    return [[int(t) for t in row if t not in (PAD, EOS)] for row in ids]


def rank(logits_of: LogitsOf, rows: int, labels: Sequence[Sequence[int]]) -> np.ndarray:
    """Rank classification: log probability of every label (ids with eos). Shape (rows, labels)."""
    scores = []
    for label in labels:
        ids = np.broadcast_to(np.asarray(label), (rows, len(label)))
        scores.append(log_probability(logits_of, ids).sum(-1))
    return np.stack(scores, axis=1)


def log_probability(logits_of: LogitsOf, labels: np.ndarray) -> np.ndarray:
    """Log probability of every label token after those before it. Shapes (B, T)."""
    log_p = ops.log_softmax(logits_of(shift_right(labels)))
    return np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
