"""Decoding over functions that give the logits of the next token. Knows no network.

What writes freely asks a `step(tokens, rows)`: given the newest token of every row, (B,), first the pad token, it
returns the logits of the next one, (B, V), and remembers the token. `rows`, where it is not None, are the rows whose
past each of the tokens goes on from. What scores given labels has the decoder's states and asks a `logits_of(states)`,
(..., D) to (..., V).
"""

from collections.abc import Callable, Iterator

import numpy as np

from tinyprompt import ops
from tinyprompt.tokenizer import EOS, PAD

Step = Callable[[np.ndarray, np.ndarray | None], np.ndarray]
LogitsOf = Callable[[np.ndarray], np.ndarray]


def shift_right(labels: np.ndarray) -> np.ndarray:
    """Decoder input for given labels: pad in front, the last label dropped. Shapes (..., T)."""
    return np.concatenate([np.full_like(labels[..., :1], PAD), labels[..., :-1]], axis=-1)


def stream(step: Step, rows: int, max_tokens: int) -> Iterator[np.ndarray]:
    """The likeliest token of each row (B,), again and again, until every row had its eos, or `max_tokens`."""
    tokens, done = np.full(rows, PAD), np.zeros(rows, bool)
    for _ in range(max_tokens):
        tokens = np.where(done, PAD, step(tokens, None).argmax(-1))
        yield tokens
        done |= tokens == EOS
        if done.all():
            break


def greedy(step: Step, rows: int, max_tokens: int) -> list[list[int]]:
    """What `stream` yields, row by row, each up to its eos."""
    return to_eos(np.stack(list(stream(step, rows, max_tokens)), axis=1))


def beam_search(step: Step, rows: int, max_tokens: int, beams: int, length_penalty: float) -> list[list[int]]:
    """The likeliest text that `beams` running hypotheses a row come upon, up to its eos.

    A finished one's score is its log probability divided by `length ** length_penalty`, eos counted. A row is done
    when its best running one, were it to end now, would not be among its `beams` best finished ones. As transformers 5
    does it. `step` gets rows * beams tokens, those of a row together. One beam is greedy.
    """
    K, row = beams, np.arange(rows)[:, None]
    running, finished = np.full((2, rows, K, max_tokens + 1), PAD)
    scores, best = np.full((2, rows, K), -np.inf)
    scores[:, 0] = 0  # all beams are the same before the first token
    hopeful, origin = np.ones(rows, bool), None
    for length in range(1, max_tokens + 1):
        log_p = ops.log_softmax(step(running[..., length - 1].reshape(-1), origin)).reshape(rows, K, -1)
        vocabulary = log_p.shape[-1]
        candidate_scores, chosen = largest((scores[..., None] + log_p).reshape(rows, -1), 2 * K)
        beam, token = np.divmod(chosen, vocabulary)
        candidates = running[row, beam]
        candidates[..., length] = token
        ends = (token == EOS) | (length == max_tokens)
        # Those that go on: of 2 K candidates at most K end, one for each beam.
        scores, kept = largest(np.where(ends, -np.inf, candidate_scores), K)
        running, origin = candidates[row, kept], (row * K + beam[row, kept]).reshape(-1)
        # Those that have ended, if they were among the K best; a row that is done takes no more.
        ended = ends & (np.arange(2 * K) < K) & hopeful[:, None]
        ended_scores = np.where(ended, candidate_scores / length**length_penalty, -np.inf)
        best, kept = largest(np.concatenate([best, ended_scores], axis=1), K)
        finished = np.concatenate([finished, candidates], axis=1)[row, kept]
        hopeful &= scores[:, 0] / length**length_penalty > best[:, -1]
        if not hopeful.any():
            break
    return to_eos(finished[:, 0, 1:])


def largest(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest values of each row, in order, and where they are. Shapes: x (B, N), each (B, min(count, N))."""
    at = np.argpartition(-x, min(count, x.shape[1]) - 1, axis=1)[:, :count]
    values = np.take_along_axis(x, at, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(values, order, 1), np.take_along_axis(at, order, 1)


def to_eos(ids: np.ndarray) -> list[list[int]]:
    """Rows of ids (B, T) as lists, each up to its first eos."""
    return [row[: row.index(EOS)] if EOS in row else row for row in ids.tolist()]


def rank(logits_of: LogitsOf, states: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Rank classification: the log probability of every label of every row, (B, N).

    Shapes: labels (B, N, T), ids with eos and padding behind it; weights (B, N, T), 1 at their tokens and 0 at padding;
    states (B, N, T, D), the decoder's of `shift_right(labels)`. As all labels of a row begin after the same token, the
    logits of their first tokens are the same, and computed once.
    """
    first = np.take_along_axis(ops.log_softmax(logits_of(states[:, 0, 0])), labels[..., 0], -1)
    later = log_probability(logits_of(states[:, :, 1:]), labels[..., 1:])
    return first * weights[..., 0] + (later * weights[..., 1:]).sum(-1)


def log_probability(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log probability of every label token. Shapes: logits (..., V), labels (...)."""
    return np.take_along_axis(ops.log_softmax(logits), labels[..., None], -1)[..., 0]
