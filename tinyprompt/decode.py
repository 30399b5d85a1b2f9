"""Decoding: the key-value cache, greedy search, beam search, and the scores of given labels.

Search asks a `step(tokens, origin)` for the next logits. `tokens` (B,) holds the newest token of every row, pad at
first; the result is (B, V). `origin` (B,), unless it is None, holds for each row the row whose past it continues.
`Cache` is the step of a T5. Tests use tables instead.

Dimensions: B batch   T decoder positions   S encoder positions   V vocabulary   H heads   K d_kv   N labels
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from tinyprompt import ops, t5
from tinyprompt.config import EOS, PAD, Config
from tinyprompt.device import compile
from tinyprompt.tree import Flat, Tree, freeze, merge

SLOTS = 32  # positions of a new cache
LOGITS = 2**19  # logits of the labels of a row that are computed at once

Step = Callable[[np.ndarray, np.ndarray | None], np.ndarray]
LogitsOf = Callable[[np.ndarray], np.ndarray]


# ---- the cache ----


def first_cache(params: Tree, config: Config, states) -> Flat:
    """Compute the keys and values that are known before the first token: cross-attention, and prefixes.

    Shapes: states (B, S, D); each array (B, H, P + S, K), or (B, H, P, K) in self-attention.
    """
    cache: Flat = {}
    for i, block in params["decoder"]["block"].items():
        for j, kind, source in (("0", "SelfAttention", states[:, :0]), ("1", "EncDecAttention", states)):
            weights = block["layer"][j][kind]
            kv = t5.keys_and_values(source, config, weights["k"], weights["v"], weights.get("prefix"))
            cache |= {f"block.{i}.layer.{j}.{kind}.kv_cache.{name}": value for name, value in kv.items()}
    return cache


def decode_next(params: Tree, config: Config, cache: Flat, tokens, position, width: int, mask):
    """Run the decoder over one token per row. The result equals `t5.decode` at that position.

    A graph has no state, so the whole state is passed: seven parameters.

    Args:
        cache: `first_cache`, with `width` more slots in each self-attention. Slots from `position` on are zero.
        tokens: (B,), the tokens at `position`.
        position: integer (1,).
        width: number of slots.
        mask: the mask of `t5.encode`.

    Returns:
        Logits (B, V), and the new keys and values (B, H, 1, K) under the names of the cache.
    """
    x = ops.embedding(params["shared"]["weight"], tokens[:, None])
    slots: Flat = {}
    for name, keys in cache.items():
        if name.endswith("SelfAttention.kv_cache.key"):
            prefix = np.zeros((width, keys.shape[-2] - width), x.dtype)
            one_hot = np.concatenate([prefix, np.eye(width, dtype=x.dtype)], axis=1)
            slots[name.replace(".key", ".slot")] = ops.embedding(one_hot, position)
    weights = merge(params["decoder"], cache | slots)
    earlier = ops.embedding(t5.causal(width, x.dtype), position)[None, None]
    biases = t5.position_biases(weights["block"], earlier, np.arange(width), False, config, position)
    seen: Flat = {}
    x = t5.stack(x, biases, t5.recorder(seen), config, states_bias=t5.additive(mask, x.dtype), **weights)
    new = {name.replace("new_", "SelfAttention.kv_cache."): y for name, y in seen.items() if ".new_" in name}
    return t5.logits(params, config, x)[:, 0], new


class Cache:
    """The keys and values of the tokens so far. Calling it with the newest tokens returns the next logits.

    The cache doubles when it is full, so few shapes need compiling.

    Args:
        params, config: the model, with the arrays of its tuning method applied.
        input_ids, attention_mask: what the encoder reads, as in `t5.encode`.
        num_beams: decoder rows for each encoder row.
        device: a name in `device.DEVICES`.
    """

    def __init__(self, params: Tree, config: Config, input_ids, attention_mask, num_beams=1, device="numpy"):
        self.compute = compile(decode_next, device, writes=True, frozen="params")
        states, mask = compile(t5.encode, device, frozen="params")(params, config, input_ids, attention_mask)
        self.config, self.mask = config, np.repeat(mask, num_beams, 0)
        first = compile(first_cache, device, writes=True, frozen="params")(params, config, states)
        self.params = {name: part for name, part in params.items() if name != "encoder"}
        repeated = {name: np.repeat(x, num_beams, 0) for name, x in first.items()}
        # Cross-attention never changes: a GPU copies a frozen array once.
        self.arrays = {name: x if "SelfAttention" in name else freeze(x) for name, x in repeated.items()}
        self.position = self.width = 0

    def __call__(self, tokens: np.ndarray, origin: np.ndarray | None = None) -> np.ndarray:
        """Append the newest token of every row and return the logits of the next one: (B,) -> (B, V)."""
        if origin is not None:
            self.reorder(origin)
        if self.position == self.width:
            self.grow()
        position = np.array([self.position])
        logits, new = self.compute(self.params, self.config, self.arrays, tokens, position, self.width, self.mask)
        self.append(new)
        return logits

    def reorder(self, origin: np.ndarray) -> None:
        """Let row i continue the past of row `origin[i]`. All beams of an input share its cross-attention."""
        self.arrays |= {name: x[origin] for name, x in self.arrays.items() if "SelfAttention" in name}

    def grow(self) -> None:
        """Double the number of slots."""
        more = self.width or SLOTS
        pad = ((0, 0), (0, 0), (0, more), (0, 0))
        self.arrays |= {name: np.pad(x, pad) for name, x in self.arrays.items() if "SelfAttention" in name}
        self.width += more

    def append(self, new: Flat) -> None:
        """Write the keys and values (B, H, 1, K) of the newest token into the next slot."""
        for name, value in new.items():
            self.arrays[name][:, :, [self.position - self.width]] = value
        self.position += 1


# ---- search ----


def stream(step: Step, rows: int, max_tokens: int) -> Iterator[np.ndarray]:
    """Yield the likeliest next tokens (B,) until every row has written eos, or `max_tokens`."""
    tokens, done = np.full(rows, PAD), np.zeros(rows, bool)
    for _ in range(max_tokens):
        tokens = np.where(done, PAD, step(tokens, None).argmax(-1))
        yield tokens
        done |= tokens == EOS
        if done.all():
            break


def greedy(step: Step, rows: int, max_tokens: int) -> list[list[int]]:
    """Return the ids that `stream` yields, for each row up to its eos."""
    return to_eos(np.stack(list(stream(step, rows, max_tokens)), axis=1))


def beam_search(step: Step, rows: int, max_tokens: int, num_beams: int, length_penalty: float) -> list[list[int]]:
    """Return the best hypothesis of each row, up to its eos, as transformers 5 finds it.

    The score of a finished hypothesis is its log probability divided by `length ** length_penalty`; eos counts.
    A row is done when no running beam can beat its worst finished hypothesis. `step` reads rows * num_beams tokens;
    the beams of a row are adjacent. One beam is greedy search.
    """
    K, row = num_beams, np.arange(rows)[:, None]
    running, finished = np.full((2, rows, K, max_tokens + 1), PAD)
    scores, best = np.full((2, rows, K), -np.inf)
    scores[:, 0] = 0  # the beams are equal before the first token: only the first may branch
    unfinished, origin = np.ones(rows, bool), None
    for length in range(1, max_tokens + 1):
        log_p = ops.log_softmax(step(running[..., length - 1].reshape(-1), origin)).reshape(rows, K, -1)
        vocabulary = log_p.shape[-1]
        candidate_scores, chosen = largest((scores[..., None] + log_p).reshape(rows, -1), 2 * K)
        beam, token = np.divmod(chosen, vocabulary)
        candidates = running[row, beam]
        candidates[..., length] = token
        ends = (token == EOS) | (length == max_tokens)
        # Running hypotheses: at most K of the 2 K candidates end, one for each beam.
        scores, kept = largest(np.where(ends, -np.inf, candidate_scores), K)
        running, origin = candidates[row, kept], (row * K + beam[row, kept]).reshape(-1)
        # Finished hypotheses: a candidate counts if it is among the K best and its row is not done.
        ended = ends & (np.arange(2 * K) < K) & unfinished[:, None]
        ended_scores = np.where(ended, candidate_scores / length**length_penalty, -np.inf)
        best, kept = largest(np.concatenate([best, ended_scores], axis=1), K)
        finished = np.concatenate([finished, candidates], axis=1)[row, kept]
        unfinished &= scores[:, 0] / length**length_penalty > best[:, -1]
        if not unfinished.any():
            break
    return to_eos(finished[:, 0, 1:])


def largest(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest values of each row in descending order, and their indices: (B, N) -> (B, min(count, N))."""
    at = np.argpartition(-x, min(count, x.shape[1]) - 1, axis=1)[:, :count]
    values = np.take_along_axis(x, at, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(values, order, 1), np.take_along_axis(at, order, 1)


def to_eos(ids: np.ndarray) -> list[list[int]]:
    """Return rows of ids (B, T) as lists, each up to its first eos."""
    return [row[: row.index(EOS)] if EOS in row else row for row in ids.tolist()]


# ---- the scores of given labels ----


def ranked(params: Tree, config: Config, input_ids, attention_mask, labels, weights):
    """Compute the log probability of each label of each row: (B, N), float32.

    Shapes: labels and weights (B, N, T), as in `rank`. The decoder reads the labels of a row side by side, in chunks of
    at most LOGITS logits a row.
    """
    encoded, logits_of = t5.encode(params, config, input_ids, attention_mask), partial(t5.logits, params, config)
    chunk = max(1, LOGITS // (config.vocab_size * labels.shape[2]))
    scores = []
    for i in range(0, labels.shape[1], chunk):
        ids, weight = labels[:, i : i + chunk], weights[:, i : i + chunk]
        states = t5.decoder_states(params, config, t5.shift_right(ids), *encoded)
        scores.append(rank(logits_of, states, ids, weight))
    return np.concatenate(scores, axis=1)


def rank(logits_of: LogitsOf, states: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute the log probability of every label of every row, (B, N), for rank classification.

    All labels of a row share the logits of their first token, which are computed once.

    Args:
        logits_of: the output head, (..., D) -> (..., V).
        states: decoder states (B, N, T, D) of `t5.shift_right(labels)`.
        labels: ids (B, N, T), eos included, padded on the right.
        weights: (B, N, T), 1 at the tokens of a label and 0 at padding.
    """
    first = np.take_along_axis(ops.log_softmax(logits_of(states[:, 0, 0])), labels[..., 0], -1)
    later = log_probability(logits_of(states[:, :, 1:]), labels[..., 1:])
    return first * weights[..., 0] + (later * weights[..., 1:]).sum(-1)


def log_probability(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the log probability of every label token. Shapes: logits (..., V), labels and result (...)."""
    return np.take_along_axis(ops.log_softmax(logits), labels[..., None], -1)[..., 0]
