"""Tuning methods: what is trained beside the frozen weights. Every method only adds keys to them or replaces some.

    trainable = init_params(model, Settings(method="lora", rank=4), ("bad", "good"))   # what the optimiser changes
    params = apply(model.params, stored(trainable, model.config))                      # what t5.py computes with

The arrays take three steps, all of them differentiable: what is *trained*; what is *stored* (without the network that
made it); what is *applied* (a low-rank product added to its weight). For most methods the three are the same.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import autograd.numpy as np
import numpy as onp

from tinyprompt import ops
from tinyprompt.config import Config, weight_shapes
from tinyprompt.errors import CheckpointError
from tinyprompt.model import PROMPT, Model, Prompt
from tinyprompt.tree import Flat, Tree, flatten, merge

if TYPE_CHECKING:
    from tinyprompt.settings import Settings

HEAD = "lm_head.weight"
FREQUENT = 5000  # the paper samples from the 5,000 most common pieces; vocabularies are in that order
SPECIAL = 3  # ids of pad, eos and unk, before the first piece

Shapes = dict[str, tuple[int, ...]]


class Start(NamedTuple):
    """What first values are made from."""

    model: Model
    settings: "Settings"
    label_words: Sequence[str]
    prompt: Prompt | None  # the saved one of init "file"
    rng: onp.random.Generator


Init = Callable[[Start, tuple[int, ...]], onp.ndarray]


class Leaf(NamedTuple):
    """A trained array: its shape, and a function of a Start and the shape that makes its first value."""

    shape: tuple[int, ...]
    init: Init


Leaves = Iterable[tuple[str, Leaf]]


# ---- first values ----


def zeros(start: Start, shape):
    """So that training begins at the frozen model."""
    return onp.zeros(shape)


def ones(start: Start, shape):
    """Factors that change nothing."""
    return onp.ones(shape)


def normal(start: Start, shape):
    """Random numbers that keep the size of what they are multiplied with."""
    return start.rng.normal(0, shape[-1] ** -0.5, shape)


def embeddings(model: Model, ids):
    """Rows of the embedding table."""
    return ops.embedding(model.params["shared"]["weight"], onp.asarray(ids))


def from_vocabulary(start: Start, shape):
    """Embeddings of pieces drawn from the 5,000 most frequent ones."""
    top = min(FREQUENT, len(start.model.tokenizer) - SPECIAL)
    return embeddings(start.model, SPECIAL + start.rng.choice(top, shape[0], replace=shape[0] > top))


def from_labels(start: Start, shape):
    """The mean embedding of each label word's pieces; the rest as "vocab" (the paper's default)."""
    words, encode = start.label_words, start.model.tokenizer.encode
    if not all(word.strip() for word in words):
        raise ValueError(f"prompt init 'labels': expected words, found an empty label in {list(words)}")
    means = [embeddings(start.model, encode(word)[:-1]).mean(0) for word in words][: shape[0]]
    return onp.stack([*means, *from_vocabulary(start, (shape[0] - len(means), shape[1]))])


def from_text(start: Start, shape):
    """The embedded pieces of a text, repeated or cut to the length."""
    ids = start.model.tokenizer.encode(start.settings.init_text or "")[:-1]
    if not ids:
        raise ValueError("prompt init 'text': the text is empty; give one with init_text")
    return embeddings(start.model, onp.resize(ids, shape[0]))


def from_file(start: Start, shape):
    """A saved soft prompt, of any frozen model with the same d_model."""
    if start.prompt is None:
        where = "--init-file, or from Python TaskData.init of train.run"
        raise ValueError(f"prompt init 'file': a saved prompt is missing; give one: {where}")
    found, path = start.prompt.vectors(start.settings.init_file), start.settings.init_file
    if found.shape != shape:
        other = found.shape[1] != shape[1]
        advice = "it is of another model" if other else f"use a prompt_length of {len(found)}"
        raise CheckpointError(f"{path}: the prompt has shape {list(found.shape)}, expected {list(shape)}; {advice}")
    return found


# First vectors of a soft prompt (Lester et al. 2021, section 3.2). Uniform: as in the paper, and in its released code.
INITS: dict[str, Init] = {
    "labels": from_labels,
    "vocab": from_vocabulary,
    "uniform": lambda start, shape: start.rng.uniform(-0.5, 0.5, shape),
    "uniform-t5x": lambda start, shape: start.rng.uniform(0, 0.5, shape),
    "text": from_text,
    "file": from_file,
}


def as_set(start: Start, shape):
    """As the setting `init` says."""
    return INITS[start.settings.init](start, shape)


def frozen_weight(name: str) -> Init:
    """The value that a weight of the frozen model has."""
    return lambda start, shape: flatten(start.model.params)[name]


def prefix_of(attention: str, part: str) -> Init:
    """The keys or values that an attention makes of frequent pieces."""

    def init(start: Start, shape):
        weights, config = flatten(start.model.params), start.model.config
        rows = from_vocabulary(start, (shape[0], config.d_model))
        norm = weights[attention.rpartition(".")[0] + ".layer_norm.weight"]
        return ops.linear(ops.rms_norm(rows, norm, config.layer_norm_epsilon), weights[f"{attention}.{part}.weight"])

    return init


def head_rows(start: Start, shape):
    """The rows of the output head for each label word, averaged over its pieces."""
    params, config = flatten(start.model.params), start.model.config
    head = params["shared.weight" if config.tied_head else HEAD]
    pieces = [onp.asarray(start.model.tokenizer.encode(word)[:-1]) for word in start.label_words]
    return onp.stack([ops.widen(head[ids]).mean(0) for ids in pieces])


# ---- methods: functions of a configuration, the settings and the number of label words, that yield named leaves ----


def attentions(config: Config) -> list[str]:
    """The names of all attentions, up to `.SelfAttention` and `.EncDecAttention`."""
    return [name.removesuffix(".q.weight") for name in weight_shapes(config) if name.endswith(".q.weight")]


def prompt(config: Config, settings: "Settings", labels: int) -> Leaves:
    """P vectors in front of the embedded input (Lester et al. 2021, arXiv:2104.08691, section 2)."""
    yield PROMPT, Leaf((settings.prompt_length, config.d_model), as_set)


def layer_prompts(config: Config, settings: "Settings", labels: int) -> Leaves:
    """P vectors in front of the input of every encoder layer. They replace what the layer before made of its own.

    Liu et al. 2022, arXiv:2110.07602.
    """
    yield from prompt(config, settings, labels)
    for i in range(1, config.num_layers):
        yield f"encoder.block.{i}.prompt.embedding", Leaf((settings.prompt_length, config.d_model), from_vocabulary)


def prefix(config: Config, settings: "Settings", labels: int) -> Leaves:
    """P keys and P values in front of those of every attention (Li and Liang 2021, arXiv:2101.00190)."""
    shape = (settings.prompt_length, config.num_heads * config.d_kv)
    for at in attentions(config):
        for part in ("key", "value"):
            yield f"{at}.prefix.{part}", Leaf(shape, prefix_of(at, part[0]))


def prefix_mlp(config: Config, settings: "Settings", labels: int) -> Leaves:
    """A prefix that a network makes of P vectors: two layers with tanh between (Li and Liang 2021, section 4.3)."""
    width = sum(leaf.shape[1] for _, leaf in prefix(config, settings, labels))
    return network("prefix_network.", config, settings, [settings.hidden, width])


def p_tuning(config: Config, settings: "Settings", labels: int) -> Leaves:
    """A prompt that a network makes of P vectors: three layers with relu between, as in PEFT.

    Liu et al. 2021, arXiv:2103.10385.
    """
    return network("prompt_network.", config, settings, [settings.hidden, settings.hidden, config.d_model])


def network(name: str, config: Config, settings: "Settings", widths: Sequence[int]) -> Leaves:
    """P vectors, then a matrix and a bias for each layer."""
    yield f"{name}embedding", Leaf((settings.prompt_length, config.d_model), as_set)
    for i, (before, width) in enumerate(zip([config.d_model, *widths], widths, strict=False)):
        yield f"{name}{i}.weight", Leaf((width, before), normal)
        yield f"{name}{i}.bias", Leaf((width,), zeros)


def warp(config: Config, settings: "Settings", labels: int) -> Leaves:
    """A prompt, and a vector for each label in place of the output head: the answer is one step, not a word.

    Hambardzumyan et al. 2021, arXiv:2101.00121.
    """
    if not labels:
        raise ValueError("method 'warp' learns a vector for each label word: it needs a classification task")
    yield from prompt(config, settings, labels)
    yield HEAD, Leaf((labels, config.d_model), head_rows)


def adapter(config: Config, settings: "Settings", labels: int) -> Leaves:
    """A bottleneck behind every attention and every feed-forward: `y + up(relu(down(y)))`.

    Houlsby et al. 2019, arXiv:1902.00751.
    """
    for name in weight_shapes(config):
        layer, is_norm, _ = name.partition(".layer_norm.")
        if is_norm:
            yield f"{layer}.adapter.down.weight", Leaf((settings.rank, config.d_model), normal)
            yield f"{layer}.adapter.down.bias", Leaf((settings.rank,), zeros)
            yield f"{layer}.adapter.up.weight", Leaf((config.d_model, settings.rank), zeros)
            yield f"{layer}.adapter.up.bias", Leaf((config.d_model,), zeros)


def lora(config: Config, settings: "Settings", labels: int) -> Leaves:
    """A product `b @ a` of low rank added to the query and value matrices of every attention.

    Hu et al. 2022, arXiv:2106.09685.
    """
    for at in attentions(config):
        for part in ("q", "v"):
            rows, columns = weight_shapes(config)[f"{at}.{part}.weight"]
            yield f"{at}.{part}.lora.a", Leaf((settings.rank, columns), normal)
            yield f"{at}.{part}.lora.b", Leaf((rows, settings.rank), zeros)


def ia3(config: Config, settings: "Settings", labels: int) -> Leaves:
    """A factor for each key, each value, and each hidden unit of a feed-forward.

    Liu et al. 2022, arXiv:2205.05638.
    """
    for name in weight_shapes(config):
        if name.endswith((".k.weight", ".v.weight")):
            yield name.replace("weight", "ia3.rows"), Leaf((config.num_heads * config.d_kv,), ones)
        elif name.endswith(".wo.weight"):
            yield name.replace("weight", "ia3.columns"), Leaf((config.d_ff,), ones)


def bitfit(config: Config, settings: "Settings", labels: int) -> Leaves:
    """The scales of the norms and the relative position biases: T5 has no other vectors, and no biases of layers.

    Ben Zaken et al. 2022, arXiv:2106.10199.
    """
    for name, shape in weight_shapes(config).items():
        if "layer_norm." in name or "relative_attention_bias" in name:
            yield name, Leaf(shape, frozen_weight(name))


def full(config: Config, settings: "Settings", labels: int) -> Leaves:
    """All weights of the model: model tuning, what the paper compares with (Lester et al. 2021, section 3.1)."""
    return ((name, Leaf(shape, frozen_weight(name))) for name, shape in weight_shapes(config).items())


class Method(NamedTuple):
    """The leaves of a method, and what it is tuned with unless the settings say otherwise."""

    leaves: Callable[..., Leaves]
    learning_rate: float
    optimizer: str = "adafactor-t5x"
    label_head: bool = False  # it has a vector for each label word in place of the output head


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

# How the names of a network begin; the method whose arrays it makes, which are stored; what is between its layers.
NETWORKS: dict[str, tuple[Callable[..., Leaves], Callable]] = {
    "prompt_network.": (prompt, ops.relu),
    "prefix_network.": (prefix, np.tanh),
}


def network_of(names: Iterable[str]) -> str | None:
    """How the names of the network among trained arrays begin; None if there is none."""
    return next((start for name in names for start in NETWORKS if name.startswith(start)), None)


# ---- from what is trained to what is applied ----


def init_params(
    model: Model, settings: "Settings", label_words: Sequence[str] | None, init: Sequence[str] | Prompt = ()
) -> Flat:
    """The first values of the arrays that a method trains, float32: the model computes as before, if it can.

    init: words for the first prompt if there are no label words, or the saved prompt of init "file".
    Raises ValueError for an init whose argument is missing or that begins nothing, CheckpointError for a saved prompt
    of another shape.
    """
    leaves = dict(METHODS[settings.method].leaves(model.config, settings, len(label_words or ())))
    if settings.init != "labels" and not any(leaf.init is as_set for leaf in leaves.values()):
        raise ValueError(f"prompt init {settings.init!r}: method {settings.method!r} has no prompt that could begin so")
    prompt = init if isinstance(init, Prompt) else None
    words = label_words or (() if isinstance(init, Prompt) else init)
    start = Start(model, settings, words, prompt, onp.random.default_rng(settings.seed))
    return {name: onp.array(leaf.init(start, leaf.shape), onp.float32) for name, leaf in leaves.items()}


def trained_shapes(config: Config, settings: "Settings", labels: int = 0) -> Shapes:
    """Names and shapes of the arrays that a method trains. labels: the number of label words."""
    return {name: leaf.shape for name, leaf in METHODS[settings.method].leaves(config, settings, labels)}


def stored_shapes(config: Config, settings: "Settings", labels: int = 0) -> Shapes:
    """Names and shapes of the arrays that are stored: of a network, those that it makes."""
    shapes = trained_shapes(config, settings, labels)
    start = network_of(shapes)
    return (
        shapes if start is None else {name: leaf.shape for name, leaf in NETWORKS[start][0](config, settings, labels)}
    )


class Count(NamedTuple):
    """Numbers of parameters."""

    trained: int
    stored: int
    model: int  # all: the frozen ones, and those beside them; not those in their place

    @property
    def percent(self) -> float:
        """The stored share of the model that includes it, in percent (table 4 of Lester et al. 2021)."""
        return 100 * self.stored / self.model


def count(config: Config, settings: "Settings", labels: int = 0) -> Count:
    """Count the parameters that a method trains and stores. No weights are needed."""
    frozen, stored = weight_shapes(config), stored_shapes(config, settings, labels)
    trained = trained_shapes(config, settings, labels)
    return Count(*(sum(map(math.prod, shapes.values())) for shapes in (trained, stored, stored | frozen)))


def stored(trainable: Flat, config: Config) -> Flat:
    """The arrays that are kept of the trained ones: of a network, the prompt or prefix that it makes."""
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
    """The weights that the model computes with: keys added, replaced, or changed by a product or by factors."""
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
