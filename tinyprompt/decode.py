"""Decoding: the key-value cache, greedy search, beam search, and the scores of given labels.

Search calls `step(tokens, origin, pick)` for the next tokens. `tokens` (B,) contains the newest token of every row,
initially pad. `origin` (B,), unless it is None, maps each row to the row that it continues. The result is `pick` of
the logits (B, V). `Cache` is the step of a T5. Tests use tables instead.

Dimensions: B batch   T decoder positions   S encoder positions   V vocabulary   H heads   K d_kv   N labels
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tinyprompt import ops, t5
from tinyprompt.config import EOS, PAD, Config
from tinyprompt.device import compile
from tinyprompt.tree import Array, Flat, Tree, merge

SLOTS = 32  # initial number of positions of a cache
LOGITS = 2**19  # largest number of label logits of a row that are computed at once

Pick = Callable[[Any], Any]
Step = Callable[[np.ndarray, np.ndarray | None, Pick], Any]
LogitsOf = Callable[[np.ndarray], np.ndarray]


# ---- the cache ----


def first_cache(params: Tree, config: Config, states: Array, num_beams: int, width: int) -> tuple[None, Flat]:
    """Compute the keys and values that do not depend on tokens: those of the cross-attention and of prefixes.

    Shapes: states (B, S, D); each array (B * num_beams, H, P + S, K), or (B * num_beams, H, P + width, K) in
    self-attention, with `width` empty slots.
    """
    cache: Flat = {}
    for i, block in params["decoder"]["block"].items():
        for j, kind, source in (("0", "SelfAttention", states[:, :0]), ("1", "EncDecAttention", states)):
            weights = block["layer"][j][kind]
            kv = t5.keys_and_values(source, config, weights["k"], weights["v"], weights.get("prefix"))
            cache |= {f"block.{i}.layer.{j}.{kind}.kv_cache.{name}": value for name, value in kv.items()}
    cache = {name: np.repeat(x, num_beams, 0) for name, x in cache.items()}
    return None, cache | wider({name: x for name, x in cache.items() if "SelfAttention" in name}, width)[1]


def wider(cache: Flat, more: int) -> tuple[None, Flat]:
    """Append slots to arrays (B, H, L, K) of a cache."""
    zeros = {name: np.zeros((*x.shape[:2], more, x.shape[3]), x.dtype) for name, x in cache.items()}
    return None, {name: np.concatenate([x, zeros[name]], axis=2) for name, x in cache.items()}


def decode_next(
    params: Tree,
    config: Config,
    cache: Flat,
    tokens: Array,
    position: Array,
    width: int,
    mask: Array,
    origin: Array | None,
    pick: Pick,
) -> tuple[Array, Flat]:
    """Run the decoder over one token per row. The logits equal those of `t5.decode` at that position.

    A graph has no state, so the whole state is passed as nine parameters.

    Args:
        params: The weights.
        config: The sizes of the model.
        cache: The keys and values so far, with `width` slots in each self-attention.
        tokens: (B,), the tokens at `position`.
        position: Integer (1,).
        width: The number of slots.
        mask: The mask from `t5.encode`.
        origin: The row that each row continues, integer (B,), or None. The beams of an input share its cross-attention.
        pick: A function that selects a part of the logits (B, V).

    Returns:
        The selected part, and the self-attention cache with the new keys and values at `position`.
    """
    x = ops.embedding(params["shared"]["weight"], tokens[:, None])
    own = {name: keys for name, keys in cache.items() if "SelfAttention" in name}
    own = {name: keys if origin is None else np.take(keys, origin, 0) for name, keys in own.items()}
    places = {
        name.replace(".key", ".position"): position + (keys.shape[2] - width)
        for name, keys in own.items()
        if name.endswith(".key")
    }
    weights = merge(params["decoder"], cache | own | places)
    earlier = ops.embedding(t5.causal(width, x.dtype), position)[None, None]
    biases = t5.position_biases(weights["block"], earlier, np.arange(width), False, config, position)
    seen: Flat = {}
    x = t5.stack(x, biases, t5.recorder(seen), config, states_bias=t5.additive(mask, x.dtype), **weights)
    new = {name.replace("kv_cache", "SelfAttention.kv_cache"): y for name, y in seen.items() if "kv_cache" in name}
    return pick(t5.logits(params, config, x)[:, 0]), new


def all_logits(logits: Array) -> Array:
    """Pick all logits (B, V)."""
    return logits


def likeliest(logits: Array) -> Array:
    """Pick the most likely token of every row: (B, V) -> (B,)."""
    return np.argmax(logits, axis=-1)


@dataclass(frozen=True)
class Candidates:
    """Pick the most likely tokens of every row: their log probabilities in descending order, and their ids."""

    number: int

    def __call__(self, logits: Array) -> tuple[Array, Array]:
        """Select from logits (B, V). Returns two arrays (B, min(number, V))."""
        return ops.largest(ops.log_softmax(logits), self.number)


class Cache:
    """The keys and values of the tokens so far. A call with the newest tokens returns the next logits.

    The arrays stay on the device. The cache doubles when it is full, so few shapes need compiling.

    Args:
        params: The weights, with the arrays of the tuning method applied.
        config: The sizes of the model.
        input_ids: The input of the encoder, as in `t5.encode`.
        attention_mask: Its mask, as in `t5.encode`.
        num_beams: Number of decoder rows for each encoder row.
        device: A device of `device.DEVICES`.
    """

    def __init__(
        self,
        params: Tree,
        config: Config,
        input_ids: Array,
        attention_mask: Array,
        num_beams: int = 1,
        device: str = "numpy",
    ) -> None:
        on_device = partial(compile, device=device, writes=True, frozen="params", keeps=True)
        self.compute, self.wider = on_device(decode_next), compile(wider, device, keeps=True)
        states, mask = compile(t5.encode, device, frozen="params")(params, config, input_ids, attention_mask)
        self.config, self.mask = config, np.repeat(mask, num_beams, 0)
        self.position, self.width = 0, SLOTS
        self.arrays: dict[str, Any] = on_device(first_cache)(params, config, states, num_beams, self.width)[1]
        self.params = {name: part for name, part in params.items() if name != "encoder"}

    def __call__(self, tokens: np.ndarray, origin: np.ndarray | None = None, pick: Pick = all_logits) -> Any:
        """Append the newest token (B,) of every row, and select from the logits (B, V) of the next token."""
        if self.position == self.width:
            self.arrays |= self.wider({k: x for k, x in self.arrays.items() if "SelfAttention" in k}, self.width)[1]
            self.width *= 2
        state = tokens, np.array([self.position]), self.width, self.mask, origin, pick
        picked, new = self.compute(self.params, self.config, self.arrays, *state)
        self.arrays |= new
        self.position += 1
        return picked


# ---- search ----


def stream(step: Step, rows: int, max_tokens: int) -> Iterator[np.ndarray]:
    """Yield the most likely next tokens (B,) until every row has reached eos, or `max_tokens`."""
    tokens, done = np.full(rows, PAD), np.zeros(rows, bool)
    for _ in range(max_tokens):
        tokens = np.where(done, PAD, step(tokens, None, likeliest))
        yield tokens
        done |= tokens == EOS
        if done.all():
            break


def greedy(step: Step, rows: int, max_tokens: int) -> list[list[int]]:
    """Return the ids from `stream`, for each row up to its eos."""
    return to_eos(np.stack(list(stream(step, rows, max_tokens)), axis=1))


def beam_search(step: Step, rows: int, max_tokens: int, num_beams: int, length_penalty: float) -> list[list[int]]:
    """Return the best hypothesis of each row, up to its eos, as in transformers 5.

    The score of a finished hypothesis is its log probability divided by `length ** length_penalty`, including eos.
    A row is done when no running beam can beat its worst finished hypothesis. `step` receives rows * num_beams tokens;
    the beams of a row are adjacent. With one beam, it is greedy search.
    """
    K, row = num_beams, np.arange(rows)[:, None]
    running, finished = np.full((2, rows, K, max_tokens + 1), PAD)
    scores, best = np.full((2, rows, K), -np.inf)
    scores[:, 0] = 0  # all beams are equal before the first token, so only the first may branch
    unfinished, origin = np.ones(rows, bool), None
    for length in range(1, max_tokens + 1):
        log_p, ids = step(running[..., length - 1].reshape(-1), origin, Candidates(2 * K))
        log_p, ids = log_p.reshape(rows, K, -1), ids.reshape(rows, -1)
        # The 2 K best continuations of a row are among the 2 K best of each of its beams.
        candidate_scores, chosen = ops.largest((scores[..., None] + log_p).reshape(rows, -1), 2 * K)
        beam, token = chosen // log_p.shape[-1], np.take_along_axis(ids, chosen, 1)
        candidates = running[row, beam]
        candidates[..., length] = token
        ends = (token == EOS) | (length == max_tokens)
        # Running hypotheses: of the 2 K candidates, at most K (one per beam) have ended.
        scores, kept = ops.largest(np.where(ends, -np.inf, candidate_scores), K)
        running, origin = candidates[row, kept], (row * K + beam[row, kept]).reshape(-1)
        # Finished hypotheses: a candidate counts if it is among the K best and its row is not done.
        ended = ends & (np.arange(2 * K) < K) & unfinished[:, None]
        ended_scores = np.where(ended, candidate_scores / length**length_penalty, -np.inf)
        best, kept = ops.largest(np.concatenate([best, ended_scores], axis=1), K)
        finished = np.concatenate([finished, candidates], axis=1)[row, kept]
        unfinished &= scores[:, 0] / length**length_penalty > best[:, -1]
        if not unfinished.any():
            break
    return to_eos(finished[:, 0, 1:])


def to_eos(ids: np.ndarray) -> list[list[int]]:
    """Return rows of ids (B, T) as lists, each up to its first eos."""
    return [row[: row.index(EOS)] if EOS in row else row for row in ids.tolist()]


# ---- the scores of given labels ----


def ranked(
    params: Tree, config: Config, input_ids: Array, attention_mask: Array, labels: Array, weights: Array
) -> Array:
    """Compute the log probability of each label of each row: (B, N), float32.

    Shapes: labels and weights (B, N, T), as in `rank`. The decoder processes the labels of a row side by side, in
    chunks of at most LOGITS logits per row.
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
        logits_of: The output head, (..., D) -> (..., V).
        states: Decoder states (B, N, T, D) for `t5.shift_right(labels)`.
        labels: Ids (B, N, T) including eos, padded on the right.
        weights: (B, N, T), 1 at the tokens of a label and 0 at padding.
    """
    first = np.take_along_axis(ops.log_softmax(logits_of(states[:, 0, 0])), labels[..., 0], -1)
    later = log_probability(logits_of(states[:, :, 1:]), labels[..., 1:])
    return first * weights[..., 0] + (later * weights[..., 1:]).sum(-1)


def log_probability(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the log probability of every label token. Shapes: logits (..., V), labels and result (...)."""
    return np.take_along_axis(ops.log_softmax(logits), labels[..., None], -1)[..., 0]
