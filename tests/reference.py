"""Random models of every T5 family, in tinyprompt and in transformers, with the same float64 weights."""

import copy

import numpy as np
import pytest

from tinyprompt import tree
from tinyprompt.config import Config, weight_shapes

torch = pytest.importorskip("torch", reason="the reference needs torch: pip install '.[test]'")
transformers = pytest.importorskip("transformers", reason="the reference needs transformers")
check_torch = pytest.importorskip("tinyprompt.tools.check_torch")

# Every dimension different; d_model != num_heads * d_kv.
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
    """A config.json dict of a small model of one family."""
    return SHAPE | FAMILIES[family] | changes


def random_weights(config, seed):
    """Random float64 weights for a configuration, flat; scaled so that activations stay near 1."""
    rng = np.random.default_rng(seed)

    def one(name, shape):
        if name.endswith("layer_norm.weight"):
            return rng.uniform(0.5, 1.5, shape)
        scale = 1.0 if name == "shared.weight" or "bias" in name else shape[-1] ** -0.5
        return rng.normal(0, scale, shape)

    return {name: one(name, shape) for name, shape in weight_shapes(config).items()}


def hugging_face(raw, flat):
    """The transformers model of a config.json dict with given weights, float64, no dropout."""
    name = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}[raw["model_type"]]
    settings = {k: v for k, v in raw.items() if k != "model_type"}
    config = getattr(transformers, name + "Config")(
        **copy.deepcopy(settings), dropout_rate=0.0, decoder_start_token_id=0
    )
    model = getattr(transformers, name + "ForConditionalGeneration")(config).double().eval()
    # transformers 5 ties every new model and sets this flag; put back what the file says.
    tied = raw["model_type"] != "mt5" and raw.get("tie_word_embeddings", True)
    model.config.tie_word_embeddings = tied
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in flat.items()}
    for module in model.modules():
        if type(module).__name__.endswith("LayerNorm"):
            module.forward = check_torch.exact_norm.__get__(module)
    missing, surplus = model.load_state_dict(tensors, strict=False)
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} | ({"lm_head.weight"} if tied else set())
    assert set(missing) <= copies
    assert not surplus
    return model


def batch(seed, vocab, rows, length, out, left=False):
    """Random ids with padding in all rows but one. Returns input ids, mask, labels, label weights."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, vocab, (rows, length))
    lengths = rng.integers(1, length + 1, rows)
    lengths[rng.integers(rows)] = length
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)[:, :: -1 if left else 1]
    labels = rng.integers(1, vocab, (rows, out))
    ends = rng.integers(1, out + 1, rows)
    weights = (np.arange(out) < ends[:, None]).astype(float)
    return ids * mask, mask, np.where(weights > 0, labels, 0), weights


def pair(family, seed=0, **changes):
    """(config, nested params, transformers model) with the same weights."""
    raw = raw_config(family, **changes)
    config = Config.from_dict(raw)
    flat = random_weights(config, seed)
    return config, tree.nest(flat), hugging_face(raw, flat)
