"""Tuning methods. A method adds keys to the frozen weights, or replaces some of them.

    trainable = init_params(model, Settings(method="lora", rank=4), ("bad", "good"))   # the optimiser updates these
    params = apply(model.params, stored(trainable, model.config))                      # t5.py computes with these

The *trained* arrays become the *stored* arrays (a network is replaced by its output), which are *applied* (a low-rank
product is added to its weight). Both steps are differentiable. For most methods they change nothing.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import autograd.numpy as np
import numpy as onp

from tinyprompt import ops
from tinyprompt.config import Config, Shapes, weight_shapes
from tinyprompt.errors import CheckpointError
from tinyprompt.model import PROMPT, Model, Prompt
from tinyprompt.tree import Array, Flat, Tree, flatten, merge

if TYPE_CHECKING:
    from tinyprompt.settings import Settings

HEAD = "lm_head.weight"
FREQUENT = 5000  # the paper samples from the 5,000 most frequent pieces; vocabularies are sorted by frequency
SPECIAL = 3  # ids of pad, eos and unk precede the first piece


class Start(NamedTuple):
    """The input of an initialiser."""

    model: Model
    settings: "Settings"
    label_words: Sequence[str]
    prompt: Prompt | None  # the saved prompt of init "file"
    rng: onp.random.Generator


Init = Callable[[Start, tuple[int, ...]], onp.ndarray]


class Leaf(NamedTuple):
    """A trained array: its shape, and the initialiser that maps a Start and the shape to its initial value."""

    shape: tuple[int, ...]
    init: Init


Leaves = Iterable[tuple[str, Leaf]]


# ---- initialisers ----


def zeros(start: Start, shape: tuple[int, ...]) -> Array:
    """Return zeros, so that training starts at the frozen model."""
    return onp.zeros(shape)


def ones(start: Start, shape: tuple[int, ...]) -> Array:
    """Return ones, factors without an effect."""
    return onp.ones(shape)


def normal(start: Start, shape: tuple[int, ...]) -> Array:
    """Return normal random numbers that preserve the scale of their input."""
    return start.rng.normal(0, shape[-1] ** -0.5, shape)


def embeddings(model: Model, ids: Array) -> Array:
    """Return the embeddings of ids."""
    return ops.embedding(model.params["shared"]["weight"], onp.asarray(ids))


def from_vocabulary(start: Start, shape: tuple[int, ...]) -> Array:
    """Return the embeddings of random pieces among the 5,000 most frequent."""
    top = min(FREQUENT, len(start.model.tokenizer) - SPECIAL)
    return embeddings(start.model, SPECIAL + start.rng.choice(top, shape[0], replace=shape[0] > top))


def from_labels(start: Start, shape: tuple[int, ...]) -> Array:
    """Return the mean embedding of the pieces of each label word, then random embeddings (the paper's default)."""
    words, encode = start.label_words, start.model.tokenizer.encode
    if not all(word.strip() for word in words):
        raise ValueError(f"prompt init 'labels': expected words, found an empty label in {list(words)}")
    means = [embeddings(start.model, encode(word)[:-1]).mean(0) for word in words][: shape[0]]
    return onp.stack([*means, *from_vocabulary(start, (shape[0] - len(means), shape[1]))])


def from_text(start: Start, shape: tuple[int, ...]) -> Array:
    """Return the embedded pieces of a text, repeated or truncated to the prompt length."""
    ids = start.model.tokenizer.encode(start.settings.init_text or "")[:-1]
    if not ids:
        raise ValueError("prompt init 'text': the text is empty; give one with init_text")
    return embeddings(start.model, onp.resize(ids, shape[0]))


def from_file(start: Start, shape: tuple[int, ...]) -> Array:
    """Return a saved soft prompt. It may come from another model with the same d_model."""
    if start.prompt is None:
        raise ValueError("prompt init 'file': a saved prompt is missing; name it with init_file (--init-file)")
    found, path = start.prompt.vectors(start.settings.init_file), start.settings.init_file
    if found.shape != shape:
        other = found.shape[1] != shape[1]
        advice = "it belongs to another model" if other else f"use a prompt_length of {len(found)}"
        raise CheckpointError(f"{path}: the prompt has shape {list(found.shape)}, expected {list(shape)}; {advice}")
    return found


# Initialisers of a soft prompt (Lester et al. 2021, section 3.2). Uniform: of the paper, and of its released code.
INITS: dict[str, Init] = {
    "labels": from_labels,
    "vocab": from_vocabulary,
    "uniform": lambda start, shape: start.rng.uniform(-0.5, 0.5, shape),
    "uniform-t5x": lambda start, shape: start.rng.uniform(0, 0.5, shape),
    "text": from_text,
    "file": from_file,
}


def as_set(start: Start, shape: tuple[int, ...]) -> Array:
    """Return the initial value selected by the setting `init`."""
    return INITS[start.settings.init](start, shape)


def frozen_weight(name: str) -> Init:
    """Return an initialiser that copies a weight of the frozen model."""
    return lambda start, shape: flatten(start.model.params)[name]


def prefix_of(attention: str, part: str) -> Init:
    """Return an initialiser with the keys or values of frequent pieces in an attention."""

    def init(start: Start, shape: tuple[int, ...]) -> Array:
        weights, config = flatten(start.model.params), start.model.config
        rows = from_vocabulary(start, (shape[0], config.d_model))
        norm = weights[attention.rpartition(".")[0] + ".layer_norm.weight"]
        return ops.linear(ops.rms_norm(rows, norm, config.layer_norm_epsilon), weights[f"{attention}.{part}.weight"])

    return init


def head_rows(start: Start, shape: tuple[int, ...]) -> Array:
    """Return the mean row of the output head over the pieces of each label word."""
    params, config = flatten(start.model.params), start.model.config
    head = params["shared.weight" if config.tied_head else HEAD]
    pieces = [onp.asarray(start.model.tokenizer.encode(word)[:-1]) for word in start.label_words]
    return onp.stack([ops.widen(head[ids]).mean(0) for ids in pieces])


# ---- methods: each yields named leaves for a Config, the settings and the number of label words ----


def attentions(config: Config) -> list[str]:
    """Return the names of all attentions, up to `.SelfAttention` and `.EncDecAttention`."""
    return [name.removesuffix(".q.weight") for name in weight_shapes(config) if name.endswith(".q.weight")]


def prompt(config: Config, settings: "Settings", labels: int) -> Leaves:
    """Yield P vectors that precede the embedded input (Lester et al. 2021, arXiv:2104.08691, section 2)."""
    yield PROMPT, Leaf((settings.prompt_length, config.d_model), as_set)


def layer_prompts(config: Config, settings: "Settings", labels: int) -> Leaves:
    """Yield P vectors that precede the input of every encoder layer and replace those of the previous layer.

    Liu et al. 2022, arXiv:2110.07602.
    """
    yield from prompt(config, settings, labels)
    for i in range(1, config.num_layers):
        yield f"encoder.block.{i}.prompt.embedding", Leaf((settings.prompt_length, config.d_model), from_vocabulary)


def prefix(config: Config, settings: "Settings", labels: int) -> Leaves:
    """Yield P keys and P values that precede those of every attention (Li and Liang 2021, arXiv:2101.00190)."""
    shape = (settings.prompt_length, config.num_heads * config.d_kv)
    for at in attentions(config):
        for part in ("key", "value"):
            yield f"{at}.prefix.{part}", Leaf(shape, prefix_of(at, part[0]))


def prefix_mlp(config: Config, settings: "Settings", labels: int) -> Leaves:
    """Yield P vectors and a network that maps them to a prefix (Li and Liang 2021, section 4.3).

    The network has two layers with tanh between them.
    """
    width = sum(leaf.shape[1] for _, leaf in prefix(config, settings, labels))
    return network("prefix_network.", config, settings, [settings.hidden, width])


def p_tuning(config: Config, settings: "Settings", labels: int) -> Leaves:
    """Yield P vectors and a network that maps them to a prompt (Liu et al. 2021, arXiv:2103.10385).

    The network has three layers with relu between them, as in PEFT.
    """
    return network("prompt_network.", config, settings, [settings.hidden, settings.hidden, config.d_model])


def network(name: str, config: Config, settings: "Settings", widths: Sequence[int]) -> Leaves:
    """Yield P vectors, then a matrix and a bias for each layer."""
    yield f"{name}embedding", Leaf((settings.prompt_length, config.d_model), as_set)
    for i, (before, width) in enumerate(zip([config.d_model, *widths], widths, strict=False)):
        yield f"{name}{i}.weight", Leaf((width, before), normal)
        yield f"{name}{i}.bias", Leaf((width,), zeros)


def warp(config: Config, settings: "Settings", labels: int) -> Leaves:
    """Yield a prompt, and an output head with a row for each label (Hambardzumyan et al. 2021, arXiv:2101.00121).

    The answer is a single decoding step instead of a word.
    """
    if not labels:
        raise ValueError("method 'warp' learns a vector for each label word: it needs a classification task")
    yield from prompt(config, settings, labels)
    yield HEAD, Leaf((labels, config.d_model), head_rows)


def adapter(config: Config, settings: "Settings", labels: int) -> Leaves:
    """Yield a bottleneck after every attention and feed-forward layer (Houlsby et al. 2019, arXiv:1902.00751).

    The layer output y becomes `y + up(relu(down(y)))`.
    """
    for name in weight_shapes(config):
        layer, is_norm, _ = name.partition(".layer_norm.")
        if is_norm:
            yield f"{layer}.adapter.down.weight", Leaf((settings.rank, config.d_model), normal)
            yield f"{layer}.adapter.down.bias", Leaf((settings.rank,), zeros)
            yield f"{layer}.adapter.up.weight", Leaf((config.d_model, settings.rank), zeros)
            yield f"{layer}.adapter.up.bias", Leaf((config.d_model,), zeros)


def lora(config: Config, settings: "Settings", labels: int) -> Leaves:
    """Yield a low-rank product `b @ a` for the query and value matrix of every attention.

    Hu et al. 2022, arXiv:2106.09685.
    """
    for at in attentions(config):
        for part in ("q", "v"):
            rows, columns = weight_shapes(config)[f"{at}.{part}.weight"]
            yield f"{at}.{part}.lora.a", Leaf((settings.rank, columns), normal)
            yield f"{at}.{part}.lora.b", Leaf((rows, settings.rank), zeros)


def ia3(config: Config, settings: "Settings", labels: int) -> Leaves:
    """Yield a factor for each key, each value, and each hidden unit of a feed-forward layer.

    Liu et al. 2022, arXiv:2205.05638.
    """
    for name in weight_shapes(config):
        if name.endswith((".k.weight", ".v.weight")):
            yield name.replace("weight", "ia3.rows"), Leaf((config.num_heads * config.d_kv,), ones)
        elif name.endswith(".wo.weight"):
            yield name.replace("weight", "ia3.columns"), Leaf((config.d_ff,), ones)


def bitfit(config: Config, settings: "Settings", labels: int) -> Leaves:
    """Yield the scales of the norms and the relative position biases. T5 has no other biases.

    Ben Zaken et al. 2022, arXiv:2106.10199.
    """
    for name, shape in weight_shapes(config).items():
        if "layer_norm." in name or "relative_attention_bias" in name:
            yield name, Leaf(shape, frozen_weight(name))


def full(config: Config, settings: "Settings", labels: int) -> Leaves:
    """Return all weights: model tuning, the baseline of the paper (Lester et al. 2021, section 3.1)."""
    return ((name, Leaf(shape, frozen_weight(name))) for name, shape in weight_shapes(config).items())


class Method(NamedTuple):
    """The leaves of a method, and its default learning rate and optimiser."""

    leaves: Callable[..., Leaves]
    learning_rate: float
    optimizer: str = "adafactor-t5x"
    label_head: bool = False  # the output head has one row per label word


METHODS = {
    "prompt": Method(prompt, 0.3),
    "layer-prompts": Method(layer_prompts, 0.3),
    "prefix": Method(prefix, 0.03),
    "prefix-mlp": Method(prefix_mlp, 1e-3),
    "p-tuning": Method(p_tuning, 1e-3),
    "warp": Method(warp, 0.3, label_head=True),
    "adapter": Method(adapter, 3e-3),
    "lora": Method(lora, 0.01),
    "ia3": Method(ia3, 0.1, "adafactor-scaled"),
    "bitfit": Method(bitfit, 0.03, "adafactor-scaled"),
    "full": Method(full, 1e-3, "adafactor-scaled"),
}

# Name prefix of a network -> the method whose arrays it computes, and its activation function.
NETWORKS: dict[str, tuple[Callable[..., Leaves], Callable]] = {
    "prompt_network.": (prompt, ops.relu),
    "prefix_network.": (prefix, np.tanh),
}


def network_of(names: Iterable[str]) -> str | None:
    """Return the name prefix of the network among trained arrays, or None without a network."""
    return next((start for name in names for start in NETWORKS if name.startswith(start)), None)


def has_label_head(config: Config, params: Flat) -> bool:
    """Return whether a method replaces the output head by a head with one row per label word."""
    return len(params.get(HEAD, ())) not in (0, config.vocab_size)


# ---- from trained arrays to the weights of a forward pass ----


def init_params(
    model: Model, settings: "Settings", label_words: Sequence[str] | None, init: Sequence[str] | Prompt = ()
) -> Flat:
    """Initialise the arrays that a method trains, in float32.

    Args:
        model: The frozen model.
        settings: The method, its sizes, and `init`.
        label_words: The label words, or None for free text.
        init: Words that initialise the prompt if there are no label words, or the saved prompt of init "file".

    Returns:
        The trained arrays by name.

    Raises:
        ValueError: The argument of `init` is missing, or the method does not train a prompt.
        CheckpointError: The saved prompt has another shape.
    """
    leaves = dict(METHODS[settings.method].leaves(model.config, settings, len(label_words or ())))
    if settings.init != "labels" and not any(leaf.init is as_set for leaf in leaves.values()):
        raise ValueError(f"prompt init {settings.init!r}: method {settings.method!r} does not train a prompt")
    prompt = init if isinstance(init, Prompt) else None
    words = label_words or (() if isinstance(init, Prompt) else init)
    start = Start(model, settings, words, prompt, onp.random.default_rng(settings.seed))
    return {name: onp.array(leaf.init(start, leaf.shape), onp.float32) for name, leaf in leaves.items()}


def trained_shapes(config: Config, settings: "Settings", labels: int = 0) -> Shapes:
    """Return the names and shapes of the arrays that a method trains. `labels` is the number of label words."""
    return {name: leaf.shape for name, leaf in METHODS[settings.method].leaves(config, settings, labels)}


def stored_shapes(config: Config, settings: "Settings", labels: int = 0) -> Shapes:
    """Return the names and shapes of the stored arrays. For a network, these are its outputs."""
    shapes = trained_shapes(config, settings, labels)
    start = network_of(shapes)
    return (
        shapes if start is None else {name: leaf.shape for name, leaf in NETWORKS[start][0](config, settings, labels)}
    )


class Count(NamedTuple):
    """Numbers of parameters."""

    trained: int
    stored: int
    model: int  # frozen and added parameters; replaced ones count once

    @property
    def percent(self) -> float:
        """The stored parameters in percent of the model (table 4 of Lester et al. 2021)."""
        return 100 * self.stored / self.model


def count(config: Config, settings: "Settings", labels: int = 0) -> Count:
    """Count the parameters that a method trains and stores, without loading weights."""
    frozen, stored = weight_shapes(config), stored_shapes(config, settings, labels)
    trained = trained_shapes(config, settings, labels)
    return Count(*(sum(map(math.prod, shapes.values())) for shapes in (trained, stored, stored | frozen)))


def stored(trainable: Flat, config: Config) -> Flat:
    """Return the arrays to store: the trained arrays, or the prompt or prefix that a network computes."""
    start = network_of(trainable)
    if start is None:
        return trainable
    made, between = NETWORKS[start]
    x, last = trainable[f"{start}embedding"], sum(name.endswith(".weight") for name in trainable) - 1
    for i in range(last + 1):
        x = ops.linear(x, trainable[f"{start}{i}.weight"]) + trainable[f"{start}{i}.bias"]
        x = between(x) if i < last else x
    prefixes = [f"{at}.prefix.{part}" for at in attentions(config) for part in ("key", "value")]
    names = [PROMPT] if made is prompt else prefixes
    width = x.shape[1] // len(names)
    return {name: x[:, i * width : (i + 1) * width] for i, name in enumerate(names)}


def apply(params: Tree, added: Flat) -> Tree:
    """Return the weights for a forward pass: add or replace keys, add low-rank products, and apply factors."""
    frozen = {} if all(".lora." not in name and ".ia3." not in name for name in added) else flatten(params)
    out: Flat = {}
    for name, value in added.items():
        weight = name.partition(".lora.")[0].partition(".ia3.")[0] + ".weight"
        if name.endswith(".lora.a"):
            out[weight] = ops.widen(frozen[weight]) + added[name[:-1] + "b"] @ value
        elif ".ia3." in name:
            out[weight] = ops.widen(frozen[weight]) * (value[:, None] if name.endswith("rows") else value)
        elif not name.endswith(".lora.b"):
            out[name] = value
    return merge(params, out)
