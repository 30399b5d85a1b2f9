"""What is trained beside the frozen weights. A method adds or replaces keys; this is prompt tuning."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tinyprompt import ops
from tinyprompt.checkpoint import CheckpointError, Model
from tinyprompt.prompts import PROMPT, load_prompt
from tinyprompt.tree import Flat

FREQUENT = 5000  # the paper samples from the 5,000 most common pieces; vocabularies are in that order
INITS = ("labels", "vocab", "uniform", "uniform-t5x", "text", "file")


def prompt_tuning(
    model: Model,
    length: int,
    init: str = "labels",
    *,
    labels: Sequence[str] | None = None,
    text: str | None = None,
    file: str | Path | None = None,
    seed: int = 0,
) -> Flat:
    """The first soft prompt: `{"encoder.prompt.embedding": (length, d_model)}`, float32.

    init (Lester et al. 2021, section 3.2):
    - "labels": the mean embedding of each label word's pieces; the rest as "vocab" (the paper's default)
    - "vocab": rows of the embedding table drawn from its 5,000 most frequent pieces
    - "uniform": uniform in [-0.5, 0.5) as in the paper; "uniform-t5x": in [0, 0.5) as in its released code
    - "text": the pieces of `text`, repeated or cut to `length`
    - "file": a soft prompt of any format that `load_prompt` reads, of any frozen model with the same d_model

    Raises ValueError for an unknown init or one whose argument is missing.
    """
    if length < 1:
        raise ValueError(f"prompt length {length}: expected at least 1")
    rng = np.random.default_rng(seed)
    table, width = model.params["shared"]["weight"], model.config.d_model

    def rows(ids):
        return ops.embedding(table, np.asarray(ids))

    first = 3  # after pad, eos and unk
    top = min(FREQUENT, len(model.tokenizer) - first)

    def sampled(n):
        return rows(first + rng.choice(top, n, replace=n > top))

    if init == "uniform":
        prompt = rng.uniform(-0.5, 0.5, (length, width))
    elif init == "uniform-t5x":
        prompt = rng.uniform(0, 0.5, (length, width))
    elif init == "vocab" or (init == "labels" and not labels):
        prompt = sampled(length)
    elif init == "labels":
        if not all(label.strip() for label in labels or ()):
            raise ValueError(f"prompt init 'labels': expected words, found an empty label in {list(labels or ())}")
        means = [rows(model.tokenizer.encode(word)[:-1]).mean(0) for word in labels or ()][:length]
        prompt = np.concatenate([np.stack(means), sampled(length - len(means))])
    elif init == "text":
        ids = model.tokenizer.encode(text or "")[:-1]
        if not ids:
            raise ValueError("prompt init 'text': the text is empty")
        prompt = rows(np.resize(ids, length))
    elif init == "file":
        if file is None:
            raise ValueError("prompt init 'file': no file given")
        prompt = load_prompt(file).vectors(file)
        if prompt.shape != (length, width):
            advice = "it is of another model" if prompt.shape[1] != width else f"use a prompt length of {len(prompt)}"
            raise CheckpointError(
                f"{file}: the prompt has shape {list(prompt.shape)}, expected {[length, width]}; {advice}"
            )
    else:
        raise ValueError(f"prompt init {init!r}: expected one of {', '.join(INITS)}")
    return {PROMPT: np.array(prompt, np.float32)}
