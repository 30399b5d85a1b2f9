"""Check that a prompt belongs to a model."""

import re
from typing import Any

import numpy as np

from tinyprompt.config import weight_shapes
from tinyprompt.errors import CheckpointError
from tinyprompt.methods import stored_shapes
from tinyprompt.model import PROMPT, Model, Prompt
from tinyprompt.settings import Settings

SELF_ATTENTION = re.compile(r"decoder\.block\.\d+\.layer\.0\.SelfAttention")


def check_fit(prompt: Prompt, model: Model, path: Any = "this prompt") -> None:
    """Raise CheckpointError, with the file, if a prompt was tuned on another model or does not fit this model.

    If the prompt does not store its model, only shapes are checked.
    """
    if prompt.fingerprint is not None:
        _check_fingerprint(prompt.fingerprint, prompt, model, path)
    of_peft = bool(prompt.params) and PROMPT not in prompt.params  # LoRA or IA3; their settings name the method
    if "method" in prompt.settings and (prompt.fingerprint is not None or of_peft):
        _check_method(prompt, model, path)
    else:
        _check_shapes(prompt, model, path)


def _check_fingerprint(known: str, prompt: Prompt, model: Model, path: Any) -> None:
    """Compare the digests of the weights, and of the tokenizers if both are known."""
    weights, _, tokenizer = known.partition("-")
    own_weights, _, own_tokenizer = model.fingerprint.partition("-")
    if weights != own_weights:
        raise CheckpointError(
            f"{path}: was tuned on {prompt.model!r} (sha256 {weights[:12]}...), "
            f"not on {model.name!r} (sha256 {own_weights[:12]}...): "
            "a soft prompt works only on its own frozen model; name that model or tune again"
        )
    if tokenizer and own_tokenizer and tokenizer != own_tokenizer:
        raise CheckpointError(
            f"{path}: was tuned on {prompt.model!r} with another tokenizer than {model.name!r} now has, so texts "
            "get other ids; restore the tokenizer files of the model, or tune again"
        )


def _check_method(prompt: Prompt, model: Model, path: Any) -> None:
    """Check the names and shapes of a method's arrays."""
    settings = Settings.saved(prompt.settings, path)
    try:
        expected = stored_shapes(model.config, settings, len(prompt.label_words or ()))
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged: {error}; tune it again") from None
    found = {name: value.shape for name, value in prompt.params.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            wanted, there = (shapes.get(name, "nothing") for shapes in (expected, found))
            raise CheckpointError(f"{path}: is damaged: key {name!r}: expected {wanted}, found {there}; tune it again")


def _check_shapes(prompt: Prompt, model: Model, path: Any) -> None:
    """Check a soft prompt or a prefix of unknown origin.

    A prefix for more self-attentions than the decoder has is accepted. The surplus is ignored, as in PEFT.
    """
    c, shapes, advice = model.config, weight_shapes(model.config), "name the model that it was tuned on"
    prefixes: dict[str, dict[str, np.ndarray]] = {}
    for name, value in prompt.params.items():
        attention, prefix, part = name.partition(".prefix.")
        if prefix:
            prefixes.setdefault(attention, {})[part] = value
        elif value.shape[1:] != (c.d_model,) if name == PROMPT else prompt.fingerprint is None:
            raise CheckpointError(
                f"{path}: does not fit {model.name!r}: key {name!r} has shape {list(value.shape)}, "
                f"expected {PROMPT!r} of (P, {c.d_model}); {advice}"
            )
    layers = {name for name in prefixes if SELF_ATTENTION.fullmatch(name)}
    used = {f"decoder.block.{i}.layer.0.SelfAttention" for i in range(c.num_decoder_layers)}
    if layers and not layers >= used:
        raise CheckpointError(
            f"{path}: this prefix is for {len(layers)} decoder layers, {model.name!r} has {c.num_decoder_layers} "
            f"and needs a prefix for each; {advice}"
        )
    width = c.num_heads * c.d_kv
    for name, parts in prefixes.items():
        sizes = {part: value.shape for part, value in parts.items()}
        known = f"{name}.q.weight" in shapes or name in layers
        rows = next(iter(sizes.values()))[0]
        if not known or sizes != {"key": (rows, width), "value": (rows, width)}:
            raise CheckpointError(
                f"{path}: does not fit {model.name!r}: the prefix at {name!r} has the shapes {sizes}, "
                f"expected key and value of (P, {width}) at an attention; {advice}"
            )
