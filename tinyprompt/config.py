"""The numbers that a T5 is built from, and the name and shape of each of its weights. Knows no arrays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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

        for key, expected in (("eos_token_id", 1), ("pad_token_id", 0), ("decoder_start_token_id", 0)):
            if raw.get(key) not in (None, expected, [expected]):
                raise ValueError(f"key {key!r}: expected {expected}, as in every T5 of the papers, found {raw[key]!r}")
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


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
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
