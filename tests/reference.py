"""Random models of every T5 family in transformers, with the float64 weights of `random_models`."""

import copy

import numpy as np
import pytest
from random_models import FAMILIES, SHAPE, batch, random_weights, raw_config  # noqa: F401 - re-exported for comparisons

from tinyprompt import tree
from tinyprompt.files.config import parse_config

torch = pytest.importorskip("torch", reason="the reference needs torch: pip install '.[test]'")
transformers = pytest.importorskip("transformers", reason="the reference needs transformers")
check_torch = pytest.importorskip("tinyprompt.check.torch_side")


def hugging_face(raw, flat):
    """Return the transformers model of a config.json dict with given weights: float64, no dropout."""
    name = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}[raw["model_type"]]
    settings = {k: v for k, v in raw.items() if k != "model_type"}
    config = getattr(transformers, name + "Config")(
        **copy.deepcopy(settings), dropout_rate=0.0, decoder_start_token_id=0
    )
    model = getattr(transformers, name + "ForConditionalGeneration")(config).double().eval()
    # transformers 5 ties every new model and sets this flag; restore the value of the file.
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


def pair(family, seed=0, **changes):
    """Return (config, nested params, transformers model) with the same weights."""
    raw = raw_config(family, **changes)
    config = parse_config(raw)
    flat = random_weights(config, seed)
    return config, tree.nest(flat), hugging_face(raw, flat)
