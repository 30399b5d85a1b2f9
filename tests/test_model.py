"""A model and a prompt: their properties, and their text forms."""

from dataclasses import replace

import numpy as np
import pytest
from tokenizers import AddedToken
from tuning import byte_model

from tinyprompt.errors import CheckpointError
from tinyprompt.model import PROMPT, Prompt
from tinyprompt.tokenizer import ByteTokenizer
from tinyprompt.tree import count, flatten


def test_a_model_prints_its_size():
    model = byte_model()
    assert f"{count(flatten(model.params)):,} parameters, d_model {model.config.d_model}" in repr(model)


def test_vectors_of_a_soft_prompt():
    vectors = np.arange(6.0).reshape(2, 3)
    prompt = Prompt({PROMPT: vectors}, label_words=("bad", "good"))
    assert prompt.array.dtype == np.float32
    assert np.array_equal(prompt.array, vectors)
    assert repr(prompt) == f"Prompt({PROMPT} [2, 3]; bad, good; tuned on an unknown model)"
    assert repr(Prompt()) == "Prompt(empty; free text; tuned on an unknown model)"


@pytest.mark.parametrize(
    "params", [{}, {"lm_head.weight": np.ones((2, 3))}, {PROMPT: np.ones((2, 3)), "x": np.ones(1)}]
)
def test_prompts_of_other_methods_have_no_vectors(params):
    with pytest.raises(CheckpointError, match=r"mine\.npy: expected a soft prompt"):
        Prompt(params).vectors("mine.npy")


def test_a_weight_that_is_not_finite_has_no_fingerprint():
    model = byte_model()
    model.params["shared"]["weight"][3, 1] = np.inf
    with pytest.raises(CheckpointError, match=r"key 'shared\.weight' contains NaN or infinity"):
        model.fingerprint  # noqa: B018


def test_the_fingerprint_depends_on_the_tokenizer():
    model = byte_model()
    added = [{}, {384: AddedToken("[a]")}, {384: AddedToken("[b]")}, {384: AddedToken("[b]", special=True)}]
    prints = [replace(model, tokenizer=ByteTokenizer(added=tokens)).fingerprint for tokens in added]
    assert len({*prints}) == len(prints)
    assert len({x.partition("-")[0] for x in prints}) == 1  # the weights are equal
