"""The sizes of a T5, and the name and shape of each of its weights."""

from dataclasses import dataclass

PAD, EOS, UNK = 0, 1, 2  # the same token ids in every T5

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Config:
    """The fields of a Hugging Face `config.json` that affect the model."""

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
    scaled_logits: bool = False  # logits are multiplied by d_model ** -0.5; only with a tied head
    bias_in_every_layer: bool = False  # UMT5


# T5 1.1, as published: d_ff, num_heads and layers grow with d_model.
T5_1_1 = {
    "small": Config(32128, 512, 64, 1024, 6, 8, 8),
    "base": Config(32128, 768, 64, 2048, 12, 12, 12),
    "large": Config(32128, 1024, 64, 2816, 16, 24, 24),
    "xl": Config(32128, 2048, 64, 5120, 32, 24, 24),
    "xxl": Config(32128, 4096, 64, 10240, 64, 24, 24),
}


def weight_shapes(config: Config) -> Shapes:
    """Return the name and the shape of every weight of a checkpoint."""
    c, inner = config, config.num_heads * config.d_kv
    out: Shapes = {"shared.weight": (c.vocab_size, c.d_model)}
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
