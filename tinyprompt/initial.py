"""First values of what is trained."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tinyprompt import ops
from tinyprompt.checkpoint import CheckpointError, Model
from tinyprompt.methods import HEAD, METHODS, PROMPT, Sizes
from tinyprompt.prompts import load_prompt
from tinyprompt.tree import Flat, flatten

FREQUENT = 5000  # the paper samples from the 5,000 most common pieces; vocabularies are in that order
INITS = ("labels", "vocab", "uniform", "uniform-t5x", "text", "file")


def first(
    model: Model,
    method: str,
    sizes: Sizes,
    init: str = "labels",
    *,
    labels: Sequence[str] | None = None,
    text: str | None = None,
    file: str | Path | None = None,
    seed: int = 0,
) -> Flat:
    """What a method is trained from, float32: a model that computes as before where the method allows it.

    Prompts begin as `init` says (Lester et al. 2021, section 3.2), and so do the vectors that a network takes; a prefix
    as the keys and values of frequent pieces; label vectors as the head's rows for the label words.
    Raises ValueError for an unknown method, an unknown init, one whose argument is missing or that begins nothing.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    shapes = METHODS[method].shapes(model.config, sizes)
    begun = {name for name in shapes if name == PROMPT or name.endswith("_network.embedding")}  # as `init` says
    if init != "labels" and not begun:
        raise ValueError(f"prompt init {init!r}: method {method!r} has no prompt that could begin so")
    rng = np.random.default_rng(seed)
    weights = flatten(model.params)
    config = model.config
    out: Flat = {}
    for name, shape in shapes.items():
        if name in begun:
            value = first_prompt(model, sizes.length, init, rng, labels, text, file)
        elif name.endswith(".prompt.embedding"):
            value = first_prompt(model, sizes.length, "vocab", rng)
        elif ".prefix." in name:
            at, _, kind = name.partition(".prefix.")
            rows = first_prompt(model, sizes.length, "vocab", rng)
            norm = weights[at.rpartition(".")[0] + ".layer_norm.weight"]
            value = ops.linear(ops.rms_norm(rows, norm, config.layer_norm_epsilon), weights[f"{at}.{kind[0]}.weight"])
        elif name == HEAD and method == "warp":
            head = weights["shared.weight" if config.tied_head else HEAD]
            words = [model.tokenizer.encode(word)[:-1] for word in labels or ()]
            value = np.stack([ops.widen(head[np.asarray(ids)]).mean(0) for ids in words])
        elif ".ia3." in name:
            value = np.ones(shape)
        elif name in weights:
            value = weights[name]
        elif name.endswith((".bias", ".up.weight", ".lora.b")):
            value = np.zeros(shape)
        else:
            value = rng.normal(0, shape[-1] ** -0.5, shape)
        out[name] = np.array(value, np.float32)
    return out


def first_prompt(
    model: Model,
    length: int,
    init: str,
    rng: np.random.Generator,
    labels: Sequence[str] | None = None,
    text: str | None = None,
    file: str | Path | None = None,
) -> np.ndarray:
    """The first vectors of a soft prompt: (length, d_model).

    init (Lester et al. 2021, section 3.2):
    - "labels": the mean embedding of each label word's pieces; the rest as "vocab" (the paper's default)
    - "vocab": rows of the embedding table drawn from its 5,000 most frequent pieces
    - "uniform": uniform in [-0.5, 0.5) as in the paper; "uniform-t5x": in [0, 0.5) as in its released code
    - "text": the pieces of `text`, repeated or cut to `length`
    - "file": a soft prompt of any format that `load_prompt` reads, of any frozen model with the same d_model

    Raises ValueError for an unknown init or one whose argument is missing.
    """
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
    return prompt
