"""T5, whole: functions over a nested dict of weights that carries the checkpoint's own names.

Covers T5 1.0, T5 1.1 (LM-adapted, Flan), mT5, UMT5 and ByT5. They differ in three places only:
the activation (relu or gated gelu), whether the output head is the embedding table (then the
logits are scaled), and whether every layer has its own relative position bias or shares the first.

Each function takes its part of the tree by `**`, so its signature is the list of weights it needs. That is why some
have more than six parameters.
Dimensions, where a name ends in them:
    B batch   P prompt   S encoder positions (P + tokens)   T decoder positions   L keys
    D d_model   H heads   K d_kv   F d_ff   V vocabulary

Raffel et al. 2020 (arXiv:1910.10683); the prompt: Lester et al. 2021 (arXiv:2104.08691), section 2.
"""

import math
from collections.abc import Callable
from typing import Any

import autograd.numpy as np
import numpy as onp

from tinyprompt import ops
from tinyprompt.config import Config
from tinyprompt.tree import Flat, Tree, merge

MASKED = -1e9  # added to a score: exp() of it is exactly 0, and a row without any key stays finite

# Every intermediate value passes through a `visit(name, value)` and goes on as the result: the value, or the value with
# dropout. So the functions that compute also show what they compute.
Visit = Callable[[str, Any], Any]


def unchanged(name: str, x):
    """Visit every value and change nothing."""
    return x


def dropout(rate: float, rng: onp.random.Generator) -> Visit:
    """Inverted dropout: set a share `rate` of the entries to zero, scale the rest by 1 / (1 - rate)."""

    def visit(name, x):
        if name.endswith("hidden_states"):  # T5 drops parts of what a layer adds, not the sum
            return x
        return x * (ops.keep(x, rate, rng) / (1 - rate))

    return visit if rate else unchanged


def recorder(values: Flat) -> Visit:
    """Keep every value under its name, such as `encoder.block.0.layer.0.attention_weights`."""

    def visit(name, x):
        values[name] = x
        return x

    return visit


def relative_position_bucket(distance, bidirectional: bool, num_buckets: int, max_distance: int):
    """Bucket of each signed distance key - query: exact when near, logarithmic when far.

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
    # float32 on purpose: at a bucket's edge the rounding decides, and checkpoints were trained with it.
    ratio = onp.log(onp.maximum(distance, 1).astype(onp.float32) / onp.float32(exact))
    far = exact + (ratio / onp.float32(math.log(max_distance / exact)) * onp.float32(num_buckets - exact)).astype(int)
    return bucket + onp.where(distance < exact, distance, onp.minimum(far, num_buckets - 1))


def behind_prefix(mask, prefix: Tree | None):
    """Put the keys of a prefix in front of an additive mask; every query sees them: (..., L) -> (..., P + L)."""
    if prefix is None:
        return mask
    return onp.concatenate([onp.zeros((*mask.shape[:-1], prefix["key"].shape[-2]), mask.dtype), mask], axis=-1)


def position_biases(block: Tree, mask, positions, bidirectional: bool, config: Config, query=None) -> list:
    """Relative position bias plus mask for each layer; a layer without a table shares the one before it.

    Shapes: positions integer (L,), mask additive (B or 1, 1, L or 1, L), each result (B or 1, H, L, L), or
    (..., P + L) in a layer with a prefix, which has the positions before 0. With `query`, integer (T,), only the rows
    of these queries: (..., T, L).
    """
    biases: list = []
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
    x, states, bias, visit: Visit, config: Config, *,
    q, k, v, o, relative_attention_bias=None, prefix=None, kv_cache=None,
):  # fmt: skip
    """Multi-head attention of x to states: queries of x, keys and values of states, each head's `attend`.

    Shapes: x and result (B, T, D), states (B, L, D), bias (B or 1, H or 1, T or 1, P + L). T5 leaves out the division
    by sqrt(d_kv): it is part of q's initial scale. A prefix, learned keys and values (P, H * K), stands before those of
    the states (Li and Liang 2021, arXiv:2101.00190). A kv_cache replaces them.
    """
    queries_BHTK = heads(ops.linear(x, q["weight"]), config)
    if kv_cache and "slot" in kv_cache:
        mixed_BHTK = attend_next(queries_BHTK, kv_cache, keys_and_values(x, config, k, v), bias, visit)
    elif not kv_cache and not prefix and is_short(queries_BHTK, states):
        mixed_BHTK = attend_short(queries_BHTK, states, k["weight"], v["weight"], bias, visit)
    else:
        kv = kv_cache or keys_and_values(states, config, k, v, prefix)
        mixed_BHTK = attend(queries_BHTK, kv["key"], kv["value"], bias, visit)
    return ops.linear(np.transpose(mixed_BHTK, (0, 2, 1, 3)).reshape(*x.shape[:2], -1), o["weight"])


def attend(queries, keys, values, bias, visit: Visit = unchanged):
    """Softmax of the scores, times the values: (B,H,T,K) (B,H,L,K) (B,H,L,K) (B,H,T,L) -> (B,H,T,K)."""
    scores = queries @ np.transpose(keys, (0, 1, 3, 2)) + bias
    return visit("attention_weights", ops.softmax(scores)) @ values


def attend_short(queries, states, wk, wv, bias, visit: Visit = unchanged):
    """Compute `attend` without keys and values, for few queries: Q (S Wk)' is (Q Wk') S', and p (S Wv) is (p S) Wv.

    That costs T (K + L) instead of K L a head: next to nothing in a decoder that reads a long input and writes a label.
    Shapes: queries (B, H, T, K), states (B, L, D), wk and wv (H * K, D).
    """
    (B, H, T, K), L = queries.shape, states.shape[1]

    def headwise(y, weight_HIO):  # (B, H, T, I) -> (B, H, T, O)
        y = ops.headwise(np.transpose(y, (1, 0, 2, 3)).reshape(H, B * T, -1), weight_HIO)
        return np.transpose(y.reshape(H, B, T, -1), (1, 0, 2, 3))

    wk_HKD, wv_HKD = wk.reshape(H, K, -1), wv.reshape(H, K, -1)
    queries_BND = headwise(queries, wk_HKD).reshape(B, H * T, -1)
    scores_BHTL = (queries_BND @ np.transpose(states, (0, 2, 1))).reshape(B, H, T, L) + bias
    weights_BNL = visit("attention_weights", ops.softmax(scores_BHTL)).reshape(B, H * T, L)
    return headwise((weights_BNL @ states).reshape(B, H, T, -1), np.transpose(wv_HKD, (0, 2, 1)))


def is_short(queries, states) -> bool:
    """Whether `attend_short` needs fewer operations than keys and values: T (K + L) < K L."""
    T, K, L = queries.shape[2], queries.shape[3], states.shape[1]
    return T * (K + L) < K * L


def attend_next(queries, kv_cache: Tree, new: Tree, bias, visit: Visit = unchanged):
    """Compute `attend` for one token whose own key and value are not in the cache yet: its slot there is still zero.

    `slot` is a one-hot row (1, P + L) that marks the position. As a product is linear, the new key and value are added
    to the result and not to the cache, which would copy it. Shapes: queries, new key and value (B, H, 1, K).
    """
    key, value = visit("new_key", new["key"]), visit("new_value", new["value"])
    scores = queries @ np.transpose(kv_cache["key"], (0, 1, 3, 2)) + bias
    scores = scores + (queries * key).sum(-1, keepdims=True) * kv_cache["slot"]
    weights = visit("attention_weights", ops.softmax(scores))
    return weights @ kv_cache["value"] + (weights * kv_cache["slot"]).sum(-1, keepdims=True) * value


def heads(y, config: Config):
    """Split the last axis into heads: (B, T, H * K) -> (B, H, T, K)."""
    return np.transpose(y.reshape(*y.shape[:2], config.num_heads, config.d_kv), (0, 2, 1, 3))


def keys_and_values(states, config: Config, k, v, prefix=None) -> Tree:
    """Keys and values of a prefix, if there is one, and of states (B, L, D): {"key", "value"} of (B, H, P + L, K)."""
    kv = {"key": ops.linear(states, k["weight"]), "value": ops.linear(states, v["weight"])}
    if prefix is not None:
        for name, learned in prefix.items():  # (P, H * K) or, one for each row, (B, P, H * K)
            learned = ops.broadcast_to(learned, (len(states), *learned.shape[-2:]))
            kv[name] = np.concatenate([learned, kv[name]], axis=1)
    return {name: heads(y, config) for name, y in kv.items()}


def feed_forward(x, visit: Visit, config: Config, *, wo, wi=None, wi_0=None, wi_1=None):
    """`wo(relu(wi(x)))`, or gated: `wo(gelu(wi_0(x)) * wi_1(x))` (Shazeer 2020, arXiv:2002.05202)."""
    if config.gated:
        hidden = ops.geglu(ops.linear(x, wi_0["weight"]), ops.linear(x, wi_1["weight"]))
    else:
        hidden = ops.relu(ops.linear(x, wi["weight"]))
    return ops.linear(visit("hidden", hidden), wo["weight"])


def adapter(y, *, down, up):
    """A bottleneck behind a layer, `y + up(relu(down(y)))`, with biases (Houlsby et al. 2019, arXiv:1902.00751)."""
    hidden = ops.relu(ops.linear(y, down["weight"]) + down["bias"])
    return y + ops.linear(hidden, up["weight"]) + up["bias"]


def stack(
    x, biases, visit: Visit, config: Config, *, block, final_layer_norm, prompt=None, states=None, states_bias=None
):
    """The blocks of the encoder, or (given encoder states to attend to) of the decoder: pre-norm residual layers."""

    def norm(y, weight):
        return ops.rms_norm(y, weight, config.layer_norm_epsilon)

    x = visit("embedding", x)
    for i, bias in enumerate(biases):
        if "prompt" in block[str(i)]:  # replaces what became of the prompt before
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
    """A visit whose names begin with a scope."""
    return lambda name, x: visit(f"{scope}.{name}", x)


def encode(params: Tree, config: Config, input_ids, attention_mask, visit: Visit = unchanged):
    """Run the encoder, with the soft prompt in front if `params` has `encoder.prompt.embedding`.

    Shapes: input_ids integer (B, L), or vectors (B, L, D) in their place (`inputs_embeds` in transformers);
    attention_mask (B, L) with 0 at padding; prompt (P, D), or one for each row (B, P, D). Returns the encoder states
    (B, S, D) and their mask (B, S), S = P + L.
    Raises ValueError for a row without a token (which a lowered graph cannot).
    """
    if isinstance(attention_mask, onp.ndarray) and not attention_mask.any(1).all():
        raise ValueError(f"row {int(attention_mask.any(1).argmin())} has no token: its attention_mask is 0 everywhere")
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


def decode(params: Tree, config: Config, decoder_input_ids, states, mask, visit: Visit = unchanged):
    """Run the decoder over given tokens: the logits of the next one at each place.

    Shapes: ids (B, T), states and mask of `encode`, logits (B, T, V); or those of `decoder_states`, V in place of D.
    """
    return logits(params, config, decoder_states(params, config, decoder_input_ids, states, mask, visit))


def decoder_states(params: Tree, config: Config, decoder_input_ids, states, mask, visit: Visit = unchanged):
    """What the output head reads at each place of given tokens.

    Shapes: ids (B, T), states and mask of `encode`, result (B, T, D). Or ids (B, N, T) and result (B, N, T, D): N
    sequences side by side in each row, which do not see each other and read the same states.
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


def first_cache(params: Tree, config: Config, states) -> Flat:
    """The kv_cache that `decode_next` begins with: of each cross-attention, and of prefixes in self-attention.

    Shapes: states (B, S, D); each array (B, H, P + S, K) or (B, H, P, K).
    """
    cache: Flat = {}
    for i, block in params["decoder"]["block"].items():
        for j, kind, source in (("0", "SelfAttention", states[:, :0]), ("1", "EncDecAttention", states)):
            weights = block["layer"][j][kind]
            kv = keys_and_values(source, config, weights["k"], weights["v"], weights.get("prefix"))
            cache |= {f"block.{i}.layer.{j}.{kind}.kv_cache.{name}": value for name, value in kv.items()}
    return cache


def decode_next(params: Tree, config: Config, cache: Flat, tokens, position, width: int, mask):
    """Run the decoder over one token a row: `decode`, but what it computed for the tokens before is in the cache.

    Shapes: tokens (B,), at `position`, integer (1,); cache of `first_cache`, in self-attentions with `width` further
    slots, zero from `position` on; mask of `encode`. Returns logits (B, V), and the new keys and values (B, H, 1, K),
    named as the cache, that belong at `position`. Seven parameters: a graph has no state, so it is given all of it.
    """
    x = ops.embedding(params["shared"]["weight"], tokens[:, None])
    slots: Flat = {}
    for name, keys in cache.items():
        if name.endswith("SelfAttention.kv_cache.key"):
            prefix = onp.zeros((width, keys.shape[-2] - width), x.dtype)
            one_hot = onp.concatenate([prefix, onp.eye(width, dtype=x.dtype)], axis=1)
            slots[name.replace(".key", ".slot")] = ops.embedding(one_hot, position)
    weights = merge(params["decoder"], cache | slots)
    earlier = ops.embedding(causal(width, x.dtype), position)[None, None]
    biases = position_biases(weights["block"], earlier, onp.arange(width), False, config, position)
    seen: Flat = {}
    x = stack(x, biases, recorder(seen), config, states_bias=additive(mask, x.dtype), **weights)
    new = {name.replace("new_", "SelfAttention.kv_cache."): y for name, y in seen.items() if ".new_" in name}
    return logits(params, config, x)[:, 0], new


def logits(params: Tree, config: Config, x):
    """The output head: (..., D) to (..., V)."""
    if config.scaled_logits:
        x = x * onp.asarray(config.d_model**-0.5, x.dtype)
    head = params["lm_head"] if "lm_head" in params else params["shared"]
    return ops.linear(x, head["weight"])


def causal(length: int, dtype, sequences: int = 1):
    """An additive mask that hides from each token those after it, and other sequences: (sequences * length) squared."""
    seen = onp.kron(onp.eye(sequences), onp.tri(length))
    return onp.where(seen, 0, MASKED).astype(dtype)


def additive(mask, dtype):
    """A 0/1 mask (B, L) as what is added to scores: 0 or MASKED, (B, 1, 1, L)."""
    return ((1 - mask.astype(dtype)) * onp.asarray(MASKED, dtype))[:, None, None, :]


def forward(params: Tree, config: Config, input_ids, attention_mask, decoder_input_ids, visit: Visit = unchanged):
    """Logits (B, T, V) of the decoder tokens given the input tokens: the whole model."""
    states, mask = encode(params, config, input_ids, attention_mask, visit)
    return decode(params, config, decoder_input_ids, states, mask, visit)
