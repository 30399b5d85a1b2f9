"""T5, whole: functions over a nested dict of weights that carries the checkpoint's own names.

Covers T5 1.0, T5 1.1 (LM-adapted, Flan), mT5, UMT5 and ByT5. They differ in three places only:
the activation (relu or gated gelu), whether the output head is the embedding table (then the
logits are scaled), and whether every layer has its own relative position bias or shares the first.

Each function takes its part of the tree by `**`, so its signature is the list of weights it needs.
Dimensions, where a name ends in them:
    B batch   P prompt   S encoder positions (P + tokens)   T decoder positions   L context length
    D d_model   H heads   K d_kv   F d_ff   V vocabulary

Raffel et al. 2020 (arXiv:1910.10683); the prompt: Lester et al. 2021 (arXiv:2104.08691), section 2.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import autograd.numpy as np
import numpy as onp

from tinyprompt import ops
from tinyprompt.tree import Flat, Tree, merge

MASKED = -1e9  # added to a score: exp() of it is exactly 0, and a row without any key stays finite

Drop = Callable[[Any], Any]


@dataclass(frozen=True)
class Config:
    """The numbers of a Hugging Face config.json that the model depends on."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    num_decoder_layers: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    gated: bool = True  # gated gelu, else relu (T5 1.0)
    tied_head: bool = False  # the output head is the embedding table (T5 1.0)
    scaled_logits: bool = False  # times d_model ** -0.5; goes with the tied head
    bias_in_every_layer: bool = False  # UMT5

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Config":
        """Read a config.json dict. Raises ValueError that names the key."""
        family = raw.get("model_type", "t5")
        if family not in ("t5", "mt5", "umt5"):
            raise ValueError(f"key 'model_type': {family!r} is not of the T5 family; expected 't5', 'mt5' or 'umt5'")

        def number(key, default=None, kind=int):
            value = raw.get(key, default)
            most = {"num_layers": 1000, "num_decoder_layers": 1000, "layer_norm_epsilon": 1}.get(key, 2**31 - 1)
            if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value <= most:
                raise ValueError(f"key {key!r}: expected a positive number, at most {most}, found {value!r}")
            return value

        buckets = number("relative_attention_num_buckets", 32)
        furthest = number("relative_attention_max_distance", 128)
        if buckets < 4 or buckets % 2:
            raise ValueError(
                f"key 'relative_attention_num_buckets': expected an even number from 4 on, found {buckets}"
            )
        if furthest <= buckets // 2:  # in the decoder, half of the buckets are for single distances
            raise ValueError(
                f"key 'relative_attention_max_distance': expected more than {buckets // 2}, found {furthest}"
            )

        kinds = {"relu": False, "gated-gelu": True, "gated-gelu_new": True}
        kind = raw.get("feed_forward_proj", "gated-gelu" if family != "t5" else "relu")
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f"key 'feed_forward_proj': expected one of {sorted(kinds)}, found {kind!r}")
        # mT5 never ties its head. T5 1.0 leaves the key out, which means tied.
        # Whatever it was, transformers 5 saves a T5 as tied, and keeps the answer under another key.
        tied = raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True)) is not False and family != "mt5"
        return cls(
            **{k: number(k) for k in ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers")},
            num_decoder_layers=number("num_decoder_layers", raw.get("num_layers")),
            relative_attention_num_buckets=buckets,
            relative_attention_max_distance=furthest,
            layer_norm_epsilon=number("layer_norm_epsilon", 1e-6, float),
            gated=kinds[kind],
            tied_head=tied,
            scaled_logits=tied,
            bias_in_every_layer=family == "umt5",
        )


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a checkpoint: the schema, flat."""
    c, inner = config, config.num_heads * config.d_kv
    out: dict[str, tuple[int, ...]] = {"shared.weight": (c.vocab_size, c.d_model)}
    if not c.tied_head:
        out["lm_head.weight"] = (c.vocab_size, c.d_model)
    attention = {"q": (inner, c.d_model), "k": (inner, c.d_model), "v": (inner, c.d_model), "o": (c.d_model, inner)}
    dense = {name: (c.d_ff, c.d_model) for name in (("wi_0", "wi_1") if c.gated else ("wi",))}
    dense["wo"] = (c.d_model, c.d_ff)
    table = (c.relative_attention_num_buckets, c.num_heads)
    stacks: tuple[tuple[str, int, dict[str, dict[str, tuple[int, int]]]], ...] = (
        ("encoder", c.num_layers, {"SelfAttention": attention, "DenseReluDense": dense}),
        (
            "decoder",
            c.num_decoder_layers,
            {"SelfAttention": attention, "EncDecAttention": attention, "DenseReluDense": dense},
        ),
    )
    for stack, depth, layers in stacks:
        out[f"{stack}.final_layer_norm.weight"] = (c.d_model,)
        for i in range(depth):
            for j, (kind, weights) in enumerate(layers.items()):
                at = f"{stack}.block.{i}.layer.{j}"
                out[f"{at}.layer_norm.weight"] = (c.d_model,)
                out |= {f"{at}.{kind}.{name}.weight": shape for name, shape in weights.items()}
            if i == 0 or c.bias_in_every_layer:
                out[f"{stack}.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight"] = table
    return out


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


def in_sight(mask, prefix: Tree | None):
    """An additive mask with the keys of a prefix in front, which every query sees: (..., L) to (..., P + L)."""
    if prefix is None:
        return mask
    return onp.concatenate([onp.zeros((*mask.shape[:-1], prefix["key"].shape[-2]), mask.dtype), mask], axis=-1)


def self_attention_biases(block: Tree, mask, length: int, bidirectional: bool, config: Config, at=None) -> list:
    """Relative position bias plus mask for each layer; a layer without a table shares the one before it.

    Shapes: mask additive (B or 1, 1, length or 1, length), each result (B or 1, H, length, length), or
    (..., P + length) in a layer with a prefix, which has the positions before the first. With `at`, integer (T,),
    the rows of these queries alone: (..., T, length).
    """
    biases: list = []
    table, before = None, 0
    for i in range(config.num_layers if bidirectional else config.num_decoder_layers):
        weights = block[str(i)]["layer"]["0"]["SelfAttention"]
        keys = in_sight(mask, weights.get("prefix"))
        first = length - keys.shape[-1]
        if "relative_attention_bias" in weights or first != before:
            table, before = weights.get("relative_attention_bias", table), first
            buckets = relative_position_bucket(
                onp.arange(first, length)[None, :] - onp.arange(length)[:, None],
                bidirectional,
                config.relative_attention_num_buckets,
                config.relative_attention_max_distance,
            )
            buckets = buckets if at is None else ops.embedding(buckets, at)
            biases.append(np.transpose(ops.embedding(table["weight"], buckets), (2, 0, 1))[None] + keys)
        else:
            biases.append(biases[-1])
    return biases


def heads(y, weight, config: Config, before=None):
    """`ops.linear`, head by head: (B, T, D), and (P, H * K) before it, to (B, H, P + T, K)."""
    B, y = len(y), ops.linear(y, weight["weight"])
    if before is not None:
        y = np.concatenate([ops.broadcast_to(before, (B, *before.shape[-2:])), y], axis=1)
    return np.transpose(y.reshape(B, y.shape[1], config.num_heads, config.d_kv), (0, 2, 1, 3))


def keys_and_values(context, config: Config, k, v, prefix=None) -> Tree:
    """What queries meet, {"key", "value"} of shape (B, H, P + L, K): of a prefix, if there is one, and a context."""
    before = prefix or {"key": None, "value": None}
    return {name: heads(context, weight, config, before[name]) for name, weight in (("key", k), ("value", v))}


def attention(
    x, context, bias, drop, config: Config, own=None, here=None, *,
    q, k, v, o, relative_attention_bias=None, prefix=None, cache=None,
):  # fmt: skip
    """Multi-head attention. T5 leaves out the division by sqrt(d_kv): it is folded into q's initial scale.

    A prefix, learned keys and values (P, H * K), stands before those of the context (Li and Liang 2021,
    arXiv:2101.00190). Without one, few queries meet the context C itself, as a product is associative: Q (C Wk)' is
    (Q Wk') C', and p (C Wv) is (p C) Wv. That costs T (K + L) instead of K L a head: next to nothing in a decoder
    that reads a long input and writes a label.
    A cache holds the keys and values already. In self-attention it has 0 for the one token of x yet: its `own` belong
    `here`, (1, L) and 0 but for a 1. As a product is linear, they are not put there, which would copy the whole cache.
    """
    (B, T), L, H, K = x.shape[:2], 0 if cache else context.shape[1], config.num_heads, config.d_kv

    def headwise(y, weight_HIO):  # (B, H, T, I) to (B, H, T, O)
        y = ops.headwise(np.transpose(y, (1, 0, 2, 3)).reshape(H, B * T, -1), weight_HIO)
        return np.transpose(y.reshape(H, B, T, -1), (1, 0, 2, 3))

    queries_BHTK = heads(x, q, config)
    if prefix is None and T * (K + L) < K * L:
        wk_HKD, wv_HKD = (w["weight"].reshape(H, K, -1) for w in (k, v))
        queries_BND = headwise(queries_BHTK, wk_HKD).reshape(B, H * T, -1)
        scores_BHTL = (queries_BND @ np.transpose(context, (0, 2, 1))).reshape(B, H, T, L) + bias
        mixed_BND = drop(ops.softmax(scores_BHTL)).reshape(B, H * T, L) @ context
        mixed_BHTK = headwise(mixed_BND.reshape(B, H, T, -1), np.transpose(wv_HKD, (0, 2, 1)))
    else:
        known = cache or keys_and_values(context, config, k, v, prefix)
        scores_BHTL = queries_BHTK @ np.transpose(known["key"], (0, 1, 3, 2)) + bias
        if own:
            here = in_sight(here, prefix)
            scores_BHTL = scores_BHTL + (queries_BHTK * own["key"]).sum(-1, keepdims=True) * here
        shares_BHTL = drop(ops.softmax(scores_BHTL))
        mixed_BHTK = shares_BHTL @ known["value"]
        if own:
            mixed_BHTK = mixed_BHTK + (shares_BHTL * here).sum(-1, keepdims=True) * own["value"]
    return ops.linear(np.transpose(mixed_BHTK, (0, 2, 1, 3)).reshape(B, T, -1), o["weight"])


def feed_forward(x, drop, config: Config, *, wo, wi=None, wi_0=None, wi_1=None):
    """`wo(relu(wi(x)))`, or gated: `wo(gelu(wi_0(x)) * wi_1(x))` (Shazeer 2020, arXiv:2002.05202)."""
    if config.gated:
        hidden = ops.geglu(ops.linear(x, wi_0["weight"]), ops.linear(x, wi_1["weight"]))
    else:
        hidden = ops.relu(ops.linear(x, wi["weight"]))
    return ops.linear(drop(hidden), wo["weight"])


def adapter(y, *, down, up):
    """A bottleneck behind a layer, `y + up(relu(down(y)))`, with biases (Houlsby et al. 2019, arXiv:1902.00751)."""
    hidden = ops.relu(ops.linear(y, down["weight"]) + down["bias"])
    return y + ops.linear(hidden, up["weight"]) + up["bias"]


def stack(
    x, self_biases, drop, config: Config, here=None, *,
    block, final_layer_norm, context=None, context_bias=None, prompt=None,
):  # fmt: skip
    """The blocks of the encoder, or (given a context to attend to) of the decoder: pre-norm residual layers.

    Returns x and, where there is a cache, what is to be put `here` in it.
    """
    new: Flat = {}

    def norm(y, weight):
        return ops.rms_norm(y, weight, config.layer_norm_epsilon)

    x = drop(x)
    for i, bias in enumerate(self_biases):
        if "prompt" in block[str(i)]:  # in place of what became of the one before
            own = block[str(i)]["prompt"]["embedding"]
            x = np.concatenate([ops.broadcast_to(own, (len(x), *own.shape[-2:])), x[:, own.shape[-2] :]], axis=1)
        for j, layer in block[str(i)]["layer"].items():
            y = norm(x, layer["layer_norm"]["weight"])
            if "SelfAttention" in layer:
                weights, own = layer["SelfAttention"], None
                if "cache" in weights:
                    own = keys_and_values(y, config, weights["k"], weights["v"])
                    new |= {f"block.{i}.layer.{j}.SelfAttention.cache.{name}": value for name, value in own.items()}
                y = attention(y, y, bias, drop, config, own, here, **weights)
            elif "EncDecAttention" in layer:
                weights = layer["EncDecAttention"]
                y = attention(y, context, in_sight(context_bias, weights.get("prefix")), drop, config, **weights)
            else:
                y = feed_forward(y, drop, config, **layer["DenseReluDense"])
            if "adapter" in layer:
                y = adapter(y, **layer["adapter"])
            x = x + drop(y)
    return drop(norm(x, final_layer_norm["weight"])), new


def identity(x):
    """No dropout."""
    return x


def dropout(rate: float, rng: onp.random.Generator) -> Drop:
    """Inverted dropout: zero a share `rate` of the entries, scale the rest by 1 / (1 - rate)."""

    def drop(x):
        return x * (ops.keep(x, rate, rng) / (1 - rate))

    return drop if rate else identity


def encode(params: Tree, config: Config, input_ids, attention_mask, drop: Drop = identity):
    """Run the encoder, with the soft prompt in front where `params` has `encoder.prompt.embedding`.

    Shapes: input_ids integer (B, L), attention_mask (B, L) with 0 at padding, prompt (P, D) or one
    for each row (B, P, D). Returns the context (B, S, D) and its mask (B, S), S = P + L.
    Raises ValueError for a row without a token (which a lowered graph cannot).
    """
    if isinstance(attention_mask, onp.ndarray) and not attention_mask.any(1).all():
        raise ValueError(f"row {int(attention_mask.any(1).argmin())} has no token: its attention_mask is 0 everywhere")
    weights = params["encoder"]
    x = ops.embedding(params["shared"]["weight"], input_ids)
    mask = attention_mask
    if "prompt" in weights:
        prompt = weights["prompt"]["embedding"]
        rows = (len(input_ids), *prompt.shape[-2:])
        x = np.concatenate([ops.broadcast_to(prompt, rows), x], axis=1)
        mask = onp.concatenate([onp.ones(rows[:2], mask.dtype), mask], axis=1)
    biases = self_attention_biases(weights["block"], additive(mask, x.dtype), mask.shape[1], True, config)
    return stack(x, biases, drop, config, **weights)[0], mask


def decode(params: Tree, config: Config, decoder_input_ids, context, mask, drop: Drop = identity):
    """Run the decoder over given tokens. Shapes: ids (B, T), context and mask of `encode`; logits (B, T, V)."""
    weights = params["decoder"]
    x = ops.embedding(params["shared"]["weight"], decoder_input_ids)
    length = decoder_input_ids.shape[1]
    biases = self_attention_biases(weights["block"], causal(length, x.dtype)[None, None], length, False, config)
    x, _ = stack(x, biases, drop, config, context=context, context_bias=additive(mask, x.dtype), **weights)
    return logits(params, config, x)


def first_cache(params: Tree, config: Config, context) -> Flat:
    """What `decode_next` begins with: keys and values of each cross-attention, and of prefixes in self-attention.

    Shapes: context (B, S, D); each (B, H, P + S, K) or (B, H, P, K).
    """
    cache: Flat = {}
    for i, block in params["decoder"]["block"].items():
        for j, kind, source in (("0", "SelfAttention", context[:, :0]), ("1", "EncDecAttention", context)):
            weights = block["layer"][j][kind]
            found = keys_and_values(source, config, weights["k"], weights["v"], weights.get("prefix"))
            cache |= {f"block.{i}.layer.{j}.{kind}.cache.{name}": value for name, value in found.items()}
    return cache


def decode_next(params: Tree, config: Config, cache: Flat, tokens, at, width: int, mask):
    """Run the decoder over one token a row: `decode`, but what it computed for those before is in the cache.

    Shapes: tokens (B,), of position `at`, integer (1,); cache of `first_cache`, in self-attentions with `width` further
    places, 0 from `at` on; mask of `encode`. Returns logits (B, V), and the keys and values (B, H, 1, K), named as the
    cache, that belong at `at`.
    """
    weights = merge(params["decoder"], cache)
    x = ops.embedding(params["shared"]["weight"], tokens[:, None])
    earlier = ops.embedding(causal(width, x.dtype), at)[None, None]
    here = ops.embedding(onp.eye(width, dtype=x.dtype), at)
    biases = self_attention_biases(weights["block"], earlier, width, False, config, at)
    x, new = stack(x, biases, identity, config, here, context_bias=additive(mask, x.dtype), **weights)
    return logits(params, config, x)[:, 0], new


def logits(params: Tree, config: Config, x):
    """The output head: (B, T, D) to (B, T, V)."""
    if config.scaled_logits:
        x = x * onp.asarray(config.d_model**-0.5, x.dtype)
    head = params["lm_head"] if "lm_head" in params else params["shared"]
    return ops.linear(x, head["weight"])


def causal(length: int, dtype):
    """An additive mask (length, length) that hides from each token those after it."""
    return onp.triu(onp.full((length, length), MASKED, dtype), 1)


def additive(mask, dtype):
    """A 0/1 mask (B, L) as what is added to scores: 0 or MASKED, (B, 1, 1, L)."""
    return ((1 - mask.astype(dtype)) * onp.asarray(MASKED, dtype))[:, None, None, :]


def forward(params: Tree, config: Config, input_ids, attention_mask, decoder_input_ids, drop: Drop = identity):
    """Logits (B, T, V) of the decoder tokens given the input tokens: the whole model."""
    context, mask = encode(params, config, input_ids, attention_mask, drop)
    return decode(params, config, decoder_input_ids, context, mask, drop)
