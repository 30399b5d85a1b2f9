"""Random models of every T5 family, and random batches. Depends on tinyprompt only."""

import numpy as np

from tinyprompt.config import weight_shapes

# All dimensions differ, and d_model != num_heads * d_kv.
SHAPE = dict(vocab_size=61, d_model=20, d_kv=6, d_ff=28, num_heads=3, num_layers=2, num_decoder_layers=3)
FAMILIES = {
    "t5-1.0": dict(model_type="t5", feed_forward_proj="relu"),
    "t5-1.1": dict(model_type="t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "byt5": dict(model_type="t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=1),
    "mt5": dict(model_type="mt5", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "umt5": dict(model_type="umt5", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "umt5-tied": dict(model_type="umt5", feed_forward_proj="gated-gelu"),
}


def raw_config(family, **changes):
    """Return the config.json dict of a small model of one family."""
    return SHAPE | FAMILIES[family] | changes


def random_weights(config, seed):
    """Return flat float64 random weights for a configuration, scaled so that activations stay near 1."""
    rng = np.random.default_rng(seed)

    def drawn(name, shape):
        if name.endswith("layer_norm.weight"):
            return rng.uniform(0.5, 1.5, shape)
        scale = 1.0 if name == "shared.weight" or "bias" in name else shape[-1] ** -0.5
        return rng.normal(0, scale, shape)

    return {name: drawn(name, shape) for name, shape in weight_shapes(config).items()}


def batch(seed, vocab, rows, length, out, left=False):
    """Return random input ids, mask, labels and label weights. One row at random is full; others may be padded."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, vocab, (rows, length))
    lengths = rng.integers(1, length + 1, rows)
    lengths[rng.integers(rows)] = length
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)[:, :: -1 if left else 1]
    labels = rng.integers(1, vocab, (rows, out))
    ends = rng.integers(1, out + 1, rows)
    weights = (np.arange(out) < ends[:, None]).astype(float)
    return ids * mask, mask, np.where(weights > 0, labels, 0), weights
