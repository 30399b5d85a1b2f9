"""The whole T5: functions over a nested dict of weights with the names of the checkpoint.

It covers T5 1.0, T5 1.1 (LM-adapted, Flan), mT5, UMT5 and ByT5. These models differ in three places: the activation
(relu or gated gelu), the output head (a matrix of its own, or the embedding table, and then the logits are scaled), and
the relative position bias (one for each layer, or one for all).

Each function receives its part of the tree by `**`, so its signature is the list of its weights. Some functions
therefore have more than six parameters.

The last letters of a name are its dimensions:
    B batch   P prompt   S encoder positions (P + tokens)   T decoder positions   L keys
    D d_model   H heads   K d_kv   F d_ff   V vocabulary

Raffel et al. 2020 (arXiv:1910.10683); the prompt: Lester et al. 2021 (arXiv:2104.08691), section 2.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import autograd.numpy as np
import numpy as onp

from tinyprompt import ops
from tinyprompt.config import PAD, Config
from tinyprompt.tree import Array, Flat, Tree

MASKED = -1e9  # added to a score: its exp() is exactly 0, and a row with every key masked stays finite

# Every intermediate value passes through `visit(name, value)`, which returns the value to compute with: the same value,
# or the value with dropout. A visit may also record it.
Visit = Callable[[str, Any], Any]


def unchanged(name: str, x: Array) -> Array:
    """Return a value unchanged."""
    return x


class Dropout(NamedTuple):
    """A visit that applies inverted dropout: a share `rate` of the entries becomes 0, the rest is divided by 1 - rate.

    A mask depends only on the key and the name of the value, so it is the same on every device.
    """

    rate: float
    key: onp.ndarray  # integers (n,), such as the seed of the run and the step number

    def __call__(self, name: str, x: Any) -> Any:
        if name.endswith("hidden_states"):  # T5 applies dropout to the output of a layer, not to the residual sum
            return x
        return x * (ops.keep(x, self.rate, self.key, name) / (1 - self.rate))


def dropout(rate: float, *key: int) -> Dropout | Visit:
    """Return the visit for a dropout rate, or `unchanged` for a rate of 0."""
    return Dropout(rate, onp.array(key)) if rate else unchanged


def recorder(values: Flat) -> Visit:
    """Return a visit that records values by name, such as `encoder.block.0.layer.0.attention_weights`."""

    def visit(name: str, x: Array) -> Array:
        values[name] = x
        return x

    return visit


def relative_position_bucket(distance: Array, bidirectional: bool, num_buckets: int, max_distance: int) -> Array:
    """Return the bucket of each signed distance (key - query): exact when near, logarithmic when far.

    Shapes: distance integer (...), result integer (...). Raffel et al. 2020, section 2.1.
    """
    bucket = onp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket += (distance > 0) * num_buckets
        distance = onp.abs(distance)
    else:
        distance = onp.maximum(-distance, 0)
    exact = num_buckets // 2
    # float32 on purpose: rounding decides at the edges of buckets, and checkpoints were trained with it.
    ratio = onp.log(onp.maximum(distance, 1).astype(onp.float32) / onp.float32(exact))
    far = exact + (ratio / onp.float32(math.log(max_distance / exact)) * onp.float32(num_buckets - exact)).astype(int)
    return bucket + onp.where(distance < exact, distance, onp.minimum(far, num_buckets - 1))


def behind_prefix(mask: Array, prefix: Tree | None) -> Array:
    """Extend an additive mask by the keys of a prefix, which every query sees: (..., L) -> (..., P + L)."""
    if prefix is None:
        return mask
    return onp.concatenate([onp.zeros((*mask.shape[:-1], prefix["key"].shape[-2]), mask.dtype), mask], axis=-1)


def position_biases(
    block: Tree, mask: Array, positions: Array, bidirectional: bool, config: Config, query: Array | None = None
) -> list[Array]:
    """Compute the relative position bias plus the mask for each layer. A layer without a table uses the previous one.

    Shapes: positions integer (L,), mask additive (B or 1, 1, L or 1, L), each result (B or 1, H, L, L). A layer with a
    prefix has results (..., P + L); the prefix has the positions before 0. With `query`, integer (T,), only the rows of
    these queries are computed: (..., T, L).
    """
    biases: list[Array] = []
    table = before = None
    for i in range(config.num_layers if bidirectional else config.num_decoder_layers):
        weights = block[str(i)]["layer"]["0"]["SelfAttention"]
        keys = behind_prefix(mask, weights.get("prefix"))
        first = len(positions) - keys.shape[-1]
        if "relative_attention_bias" in weights or first != before:
            table, before = weights.get("relative_attention_bias", table), first
            buckets = relative_position_bucket(
                onp.concatenate([onp.arange(first, 0), positions])[None, :] - positions[:, None],
                bidirectional,
                config.relative_attention_num_buckets,
                config.relative_attention_max_distance,
            )
            buckets = buckets if query is None else ops.embedding(buckets, query)
            biases.append(np.transpose(ops.embedding(table["weight"], buckets), (2, 0, 1))[None] + keys)
        else:
            biases.append(biases[-1])
    return biases


def attention(
    x: Array, states: Array, bias: Array, visit: Visit, config: Config, *,
    q: Tree, k: Tree, v: Tree, o: Tree,
    relative_attention_bias: Tree | None = None, prefix: Tree | None = None, kv_cache: Tree | None = None,
) -> Array:  # fmt: skip
    """Compute multi-head attention: queries from x, keys and values from states.

    Shapes: x and result (B, T, D), states (B, L, D), bias (B or 1, H or 1, T or 1, P + L). T5 does not divide by
    sqrt(d_kv), which is part of the initial scale of q. A prefix of learned keys and values (P, H * K) precedes those
    of the states (Li and Liang 2021, arXiv:2101.00190). A kv_cache replaces them. If it has a position, the key and
    the value of x, one token, enter it there.
    """
    queries_BHTK = heads(ops.linear(x, q["weight"]), config)
    if kv_cache and "position" in kv_cache:
        new, at = keys_and_values(x, config, k, v), kv_cache["position"]
        kv_cache = {name: visit(f"kv_cache.{name}", ops.put(kv_cache[name], at, y)) for name, y in new.items()}
    if not kv_cache and not prefix and is_short(queries_BHTK, states):
        mixed_BHTK = attend_short(queries_BHTK, states, k["weight"], v["weight"], bias, visit)
    else:
        kv = kv_cache or keys_and_values(states, config, k, v, prefix)
        mixed_BHTK = attend(queries_BHTK, kv["key"], kv["value"], bias, visit)
    return ops.linear(np.transpose(mixed_BHTK, (0, 2, 1, 3)).reshape(*x.shape[:2], -1), o["weight"])


def attend(queries: Array, keys: Array, values: Array, bias: Array, visit: Visit = unchanged) -> Array:
    """Weight the values by the softmax of the scores: (B,H,T,K) (B,H,L,K) (B,H,L,K) (B,H,T,L) -> (B,H,T,K)."""
    scores = queries @ np.transpose(keys, (0, 1, 3, 2)) + bias
    return visit("attention_weights", ops.softmax(scores)) @ values


def heads(y: Array, config: Config) -> Array:
    """Split the last axis into heads: (B, T, H * K) -> (B, H, T, K)."""
    return np.transpose(y.reshape(*y.shape[:2], config.num_heads, config.d_kv), (0, 2, 1, 3))


def keys_and_values(states: Array, config: Config, k: Tree, v: Tree, prefix: Tree | None = None) -> Tree:
    """Compute keys and values of states (B, L, D), behind those of a prefix: {"key", "value"}, (B, H, P + L, K)."""
    kv = {"key": ops.linear(states, k["weight"]), "value": ops.linear(states, v["weight"])}
    if prefix is not None:
        for name, learned in prefix.items():  # (P, H * K), or (B, P, H * K) with a prefix for each row
            learned = ops.broadcast_to(learned, (len(states), *learned.shape[-2:]))
            kv[name] = np.concatenate([learned, kv[name]], axis=1)
    return {name: heads(y, config) for name, y in kv.items()}


def feed_forward(
    x: Array, visit: Visit, config: Config, *, wo: Tree, wi: Any = None, wi_0: Any = None, wi_1: Any = None
) -> Array:
    """Compute `wo(relu(wi(x)))`, or gated `wo(gelu(wi_0(x)) * wi_1(x))` (Shazeer 2020, arXiv:2002.05202)."""
    if config.gated:
        hidden = ops.geglu(ops.linear(x, wi_0["weight"]), ops.linear(x, wi_1["weight"]))
    else:
        hidden = ops.relu(ops.linear(x, wi["weight"]))
    return ops.linear(visit("hidden", hidden), wo["weight"])


def adapter(y: Array, *, down: Tree, up: Tree) -> Array:
    """Apply a bottleneck with biases: `y + up(relu(down(y)))` (Houlsby et al. 2019, arXiv:1902.00751)."""
    hidden = ops.relu(ops.linear(y, down["weight"]) + down["bias"])
    return y + ops.linear(hidden, up["weight"]) + up["bias"]


def stack(
    x: Array, biases: list[Array], visit: Visit, config: Config, *,
    block: Tree, final_layer_norm: Tree, prompt: Tree | None = None, states: Array = None, states_bias: Array = None,
) -> Array:  # fmt: skip
    """Run the blocks of the encoder, or of the decoder if encoder states are given: pre-norm residual layers."""

    def norm(y: Array, weight: Array) -> Array:
        return ops.rms_norm(y, weight, config.layer_norm_epsilon)

    x = visit("embedding", x)
    for i, bias in enumerate(biases):
        if "prompt" in block[str(i)]:  # replaces the prompt states of the previous layer
            learned = block[str(i)]["prompt"]["embedding"]
            learned = ops.broadcast_to(learned, (len(x), *learned.shape[-2:]))
            x = np.concatenate([learned, x[:, learned.shape[1] :]], axis=1)
        for j, layer in block[str(i)]["layer"].items():
            see = scoped(visit, f"block.{i}.layer.{j}")
            y = norm(x, layer["layer_norm"]["weight"])
            if "SelfAttention" in layer:
                y = attention(y, y, bias, see, config, **layer["SelfAttention"])
            elif "EncDecAttention" in layer:
                weights = layer["EncDecAttention"]
                y = attention(y, states, behind_prefix(states_bias, weights.get("prefix")), see, config, **weights)
            else:
                y = feed_forward(y, see, config, **layer["DenseReluDense"])
            if "adapter" in layer:
                y = adapter(y, **layer["adapter"])
            x = see("hidden_states", x + see("output", y))
    return visit("final", norm(x, final_layer_norm["weight"]))


def scoped(visit: Visit, scope: str) -> Visit:
    """Return a visit that prefixes names with a scope."""
    return lambda name, x: visit(f"{scope}.{name}", x)


def encode(
    params: Tree, config: Config, input_ids: Array, attention_mask: Array, visit: Visit = unchanged
) -> tuple[Array, Array]:
    """Run the encoder. A soft prompt, `encoder.prompt.embedding` in `params`, precedes the input.

    Args:
        params: Nested dict of weights.
        config: Sizes of the model.
        input_ids: Integer (B, L), or vectors (B, L, D) (`inputs_embeds` in transformers).
        attention_mask: (B, L), 0 at padding.
        visit: Called with every intermediate value.

    Returns:
        The encoder states (B, S, D) and their mask (B, S), where S = P + L. The prompt is (P, D), or (B, P, D) with a
        prompt for each row.

    Raises:
        ValueError: A row contains no tokens. A lowered graph cannot check this.
    """
    if isinstance(attention_mask, onp.ndarray) and not attention_mask.any(1).all():
        raise ValueError(f"row {int(attention_mask.any(1).argmin())} contains no tokens: its attention_mask is all 0")
    weights = params["encoder"]
    x = input_ids if input_ids.ndim == 3 else ops.embedding(params["shared"]["weight"], input_ids)
    mask = attention_mask
    if "prompt" in weights:
        prompt = weights["prompt"]["embedding"]
        rows = (len(input_ids), *prompt.shape[-2:])
        x = np.concatenate([ops.broadcast_to(prompt, rows), x], axis=1)
        mask = onp.concatenate([onp.ones(rows[:2], mask.dtype), mask], axis=1)
    biases = position_biases(weights["block"], additive(mask, x.dtype), onp.arange(mask.shape[1]), True, config)
    return stack(x, biases, scoped(visit, "encoder"), config, **weights), mask


def decode(
    params: Tree, config: Config, decoder_input_ids: Array, states: Array, mask: Array, visit: Visit = unchanged
) -> Array:
    """Run the decoder over given tokens and return the logits of the next token at each position.

    Shapes: ids (B, T), states and mask from `encode`, logits (B, T, V). Other shapes are those of `decoder_states`.
    """
    return logits(params, config, decoder_states(params, config, decoder_input_ids, states, mask, visit))


def decoder_states(
    params: Tree, config: Config, decoder_input_ids: Array, states: Array, mask: Array, visit: Visit = unchanged
) -> Array:
    """Run the decoder over given tokens and return the input of the output head.

    Shapes: ids (B, T), states and mask from `encode`, result (B, T, D). With ids (B, N, T), result (B, N, T, D), each
    row has N independent sequences that attend to the same states.
    """
    weights, shape = params["decoder"], decoder_input_ids.shape
    x = ops.embedding(params["shared"]["weight"], decoder_input_ids.reshape(shape[0], -1))
    earlier = causal(shape[-1], x.dtype, math.prod(shape[1:-1]))
    positions = onp.arange(x.shape[1]) % shape[-1]
    biases = position_biases(weights["block"], earlier[None, None], positions, False, config)
    x = stack(
        x, biases, scoped(visit, "decoder"), config, states=states, states_bias=additive(mask, x.dtype), **weights
    )
    return x.reshape(*shape, -1)


def logits(params: Tree, config: Config, x: Array) -> Array:
    """Apply the output head: (..., D) -> (..., V)."""
    if config.scaled_logits:
        x = x * onp.asarray(config.d_model**-0.5, x.dtype)
    head = params["lm_head"] if "lm_head" in params else params["shared"]
    return ops.linear(x, head["weight"])


def causal(length: int, dtype: Any, sequences: int = 1) -> Array:
    """Build an additive mask that hides later tokens and other sequences: (N * length, N * length) for N sequences."""
    seen = onp.kron(onp.eye(sequences), onp.tri(length))
    return onp.where(seen, 0, MASKED).astype(dtype)


def additive(mask: Array, dtype: Any) -> Array:
    """Turn a 0/1 mask (B, L) into an additive mask of 0 and MASKED, (B, 1, 1, L)."""
    return ((1 - mask.astype(dtype)) * onp.asarray(MASKED, dtype))[:, None, None, :]


def forward(
    params: Tree,
    config: Config,
    input_ids: Array,
    attention_mask: Array,
    decoder_input_ids: Array,
    visit: Visit = unchanged,
) -> Array:
    """Run the whole model: the logits (B, T, V) of the decoder tokens, given the input tokens."""
    states, mask = encode(params, config, input_ids, attention_mask, visit)
    return decode(params, config, decoder_input_ids, states, mask, visit)


def shift_right(labels: onp.ndarray) -> onp.ndarray:
    """Return the decoder input for given labels: pad first, then all labels but the last. Shapes: (..., T)."""
    return onp.concatenate([onp.full_like(labels[..., :1], PAD), labels[..., :-1]], axis=-1)


# ---- faster equivalents of `attend`, each tested against it ----


def attend_short(queries: Array, states: Array, wk: Array, wv: Array, bias: Array, visit: Visit = unchanged) -> Array:
    """Compute `attend` for few queries, without keys and values: Q (S Wk)' is (Q Wk') S', and p (S Wv) is (p S) Wv.

    The cost for each head is T (K + L) instead of K L: very little for a decoder that reads a long input and writes a
    label. Shapes: queries (B, H, T, K), states (B, L, D), wk and wv (H * K, D).
    """
    (B, H, T, K), L = queries.shape, states.shape[1]

    def headwise(y: Array, weight_HIO: Array) -> Array:  # (B, H, T, I) -> (B, H, T, O)
        y = ops.headwise(np.transpose(y, (1, 0, 2, 3)).reshape(H, B * T, -1), weight_HIO)
        return np.transpose(y.reshape(H, B, T, -1), (1, 0, 2, 3))

    wk_HKD, wv_HKD = wk.reshape(H, K, -1), wv.reshape(H, K, -1)
    queries_BND = headwise(queries, wk_HKD).reshape(B, H * T, -1)
    scores_BHTL = (queries_BND @ np.transpose(states, (0, 2, 1))).reshape(B, H, T, L) + bias
    weights_BNL = visit("attention_weights", ops.softmax(scores_BHTL)).reshape(B, H * T, L)
    return headwise((weights_BNL @ states).reshape(B, H, T, -1), np.transpose(wv_HKD, (0, 2, 1)))


def is_short(queries: Array, states: Array) -> bool:
    """Return whether `attend_short` needs fewer operations than `attend`: T (K + L) < K L."""
    T, K, L = queries.shape[2], queries.shape[3], states.shape[1]
    return T * (K + L) < K * L
