"""config.json, and the shapes of the weights."""

import pytest
from random_models import random_weights, raw_config
from reference import FAMILIES, hugging_face

from tinyprompt.config import T5_1_1, weight_shapes
from tinyprompt.files.config import parse_config


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weight_shapes_equal_transformers(family):
    raw = raw_config(family, num_layers=3, num_decoder_layers=2)
    config = parse_config(raw)
    model = hugging_face(raw, random_weights(config, 0))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if "embed_tokens" not in name}
    if config.tied_head:
        del shapes["lm_head.weight"]
    assert weight_shapes(config) == shapes


def test_parameter_counts_of_the_published_sizes():
    import math

    millions = {name: sum(map(math.prod, weight_shapes(config).values())) / 1e6 for name, config in T5_1_1.items()}
    assert {name: round(x) for name, x in millions.items()} == {
        "small": 77, "base": 248, "large": 783, "xl": 2850, "xxl": 11135,
    }  # fmt: skip
