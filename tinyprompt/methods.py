"""What is trained beside the frozen weights: every method is a flat dict that adds keys to them or replaces some.

    trained = first(model, "lora", Sizes(rank=4), labels=("bad", "good"))     # what the optimiser changes
    params = apply(model.params, stored(trained, model.config))               # what t5.py computes with

Three steps of arrays, all differentiable: what is *trained*; what is *stored* (without the network that made it); what
is *applied* (the low-rank product added to its weight). For most methods they are the same.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import autograd.numpy as np

from tinyprompt import ops, t5
from tinyprompt.tree import Flat, Tree, flatten, merge

PROMPT = "encoder.prompt.embedding"
HEAD = "lm_head.weight"

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """The numbers that the shapes of a method depend on, beside the model's."""

    length: int = 100  # vectors of a prompt or prefix
    rank: int = 8  # of a low-rank product; width of an adapter's bottleneck
    hidden: int = 512  # width of the network that makes a prompt or prefix
    labels: int = 2  # label words

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")


class Method(NamedTuple):
    """Shapes of what is trained; the learning rate and the optimiser to begin with."""

    shapes: Callable[[t5.Config, Sizes], Shapes]
    rate: float
    optimizer: str = "adafactor-t5x"


def attentions(config: t5.Config) -> list[str]:
    """The names of all attentions, up to `.SelfAttention` and `.EncDecAttention`."""
    return [name.removesuffix(".q.weight") for name in t5.shapes(config) if name.endswith(".q.weight")]


def prompt(config: t5.Config, sizes: Sizes) -> Shapes:
    """P vectors in front of the embedded input (Lester et al. 2021, arXiv:2104.08691, section 2)."""
    return {PROMPT: (sizes.length, config.d_model)}


def layer_prompts(config: t5.Config, sizes: Sizes) -> Shapes:
    """P vectors in front of the input of every layer of the encoder, in place of what the layer before made of them.

    Liu et al. 2022, arXiv:2110.07602.
    """
    deeper = (f"encoder.block.{i}.prompt.embedding" for i in range(1, config.num_layers))
    return {name: (sizes.length, config.d_model) for name in (PROMPT, *deeper)}


def prefix(config: t5.Config, sizes: Sizes) -> Shapes:
    """P keys and P values in front of those of every attention (Li and Liang 2021, arXiv:2101.00190)."""
    inner = config.num_heads * config.d_kv
    return {f"{at}.prefix.{kind}": (sizes.length, inner) for at in attentions(config) for kind in ("key", "value")}


def prefix_mlp(config: t5.Config, sizes: Sizes) -> Shapes:
    """A prefix that a network makes of P vectors: two layers with tanh between (Li and Liang 2021, section 4.3)."""
    width = sum(shape[1] for shape in prefix(config, sizes).values())
    return network("prefix_network.", config, sizes, [sizes.hidden, width])


def p_tuning(config: t5.Config, sizes: Sizes) -> Shapes:
    """A prompt that a network makes of P vectors: three layers with relu between, as in PEFT.

    Liu et al. 2021, arXiv:2103.10385.
    """
    return network("prompt_network.", config, sizes, [sizes.hidden, sizes.hidden, config.d_model])


def network(name: str, config: t5.Config, sizes: Sizes, widths: Sequence[int]) -> Shapes:
    """P vectors, and matrices with biases one after the other."""
    out: Shapes = {f"{name}embedding": (sizes.length, config.d_model)}
    before = config.d_model
    for i, width in enumerate(widths):
        out |= {f"{name}{i}.weight": (width, before), f"{name}{i}.bias": (width,)}
        before = width
    return out


# How the names of a network begin; what it makes, which is stored in its place; what is between its layers.
NETWORKS: dict[str, tuple[Callable[[t5.Config, Sizes], Shapes], Callable]] = {
    "prompt_network.": (prompt, ops.relu),
    "prefix_network.": (prefix, np.tanh),
}


def network_of(names: Iterable[str]) -> str | None:
    """How the names of the network among what is trained begin; None where there is none."""
    return next((start for name in names for start in NETWORKS if name.startswith(start)), None)


def warp(config: t5.Config, sizes: Sizes) -> Shapes:
    """A prompt, and a vector for each label in place of the output head: the answer is one step, not a word.

    Hambardzumyan et al. 2021, arXiv:2101.00121.
    """
    return {PROMPT: (sizes.length, config.d_model), HEAD: (sizes.labels, config.d_model)}


def adapter(config: t5.Config, sizes: Sizes) -> Shapes:
    """A bottleneck behind every attention and every feed-forward: `y + up(relu(down(y)))`.

    Houlsby et al. 2019, arXiv:1902.00751.
    """
    out: Shapes = {}
    for name in t5.shapes(config):
        layer, is_norm, _ = name.partition(".layer_norm.")
        if is_norm:
            out |= {
                f"{layer}.adapter.down.weight": (sizes.rank, config.d_model),
                f"{layer}.adapter.down.bias": (sizes.rank,),
                f"{layer}.adapter.up.weight": (config.d_model, sizes.rank),
                f"{layer}.adapter.up.bias": (config.d_model,),
            }
    return out


def lora(config: t5.Config, sizes: Sizes) -> Shapes:
    """A product `b @ a` of low rank added to the query and value matrices of every attention.

    Hu et al. 2022, arXiv:2106.09685.
    """
    weights = t5.shapes(config)
    out: Shapes = {}
    for at in attentions(config):
        for part in ("q", "v"):
            rows, columns = weights[f"{at}.{part}.weight"]
            out |= {f"{at}.{part}.lora.a": (sizes.rank, columns), f"{at}.{part}.lora.b": (rows, sizes.rank)}
    return out


def ia3(config: t5.Config, sizes: Sizes) -> Shapes:
    """A factor for each key, each value, and each unit in the middle of a feed-forward.

    Liu et al. 2022, arXiv:2205.05638.
    """
    inner = config.num_heads * config.d_kv
    out: Shapes = {f"{at}.{part}.ia3.rows": (inner,) for at in attentions(config) for part in ("k", "v")}
    middles = (name.removesuffix(".weight") for name in t5.shapes(config) if name.endswith(".wo.weight"))
    return out | {f"{name}.ia3.columns": (config.d_ff,) for name in middles}


def bitfit(config: t5.Config, sizes: Sizes) -> Shapes:
    """The scales of the norms and the relative position biases: T5 has no other vectors, and no biases of layers.

    Ben Zaken et al. 2022, arXiv:2106.10199.
    """
    weights = t5.shapes(config).items()
    return {name: shape for name, shape in weights if "layer_norm." in name or "relative_attention_bias" in name}


def full(config: t5.Config, sizes: Sizes) -> Shapes:
    """All weights of the model: model tuning, what the paper compares with (Lester et al. 2021, section 3.1)."""
    return t5.shapes(config)


METHODS = {
    "prompt": Method(prompt, 0.3),
    "layer-prompts": Method(layer_prompts, 0.3),
    "prefix": Method(prefix, 0.03),
    "prefix-mlp": Method(prefix_mlp, 1e-3),
    "p-tuning": Method(p_tuning, 1e-3),
    "warp": Method(warp, 0.3),
    "adapter": Method(adapter, 3e-3),
    "lora": Method(lora, 0.01),
    "ia3": Method(ia3, 0.1, "adafactor-scaled"),
    "bitfit": Method(bitfit, 0.03, "adafactor-scaled"),
    "full": Method(full, 1e-3, "adafactor-scaled"),
}


def stored_shapes(method: str, config: t5.Config, sizes: Sizes) -> Shapes:
    """Shapes of what is stored: of a network, what it makes."""
    shapes = METHODS[method].shapes(config, sizes)
    start = network_of(shapes)
    return shapes if start is None else NETWORKS[start][0](config, sizes)


class Count(NamedTuple):
    """Numbers of parameters."""

    trained: int
    stored: int
    model: int  # all: the frozen ones, and those beside them; not those in their place

    @property
    def percent(self) -> float:
        """What is stored, in percent of the model with it (table 4 of Lester et al. 2021)."""
        return 100 * self.stored / self.model


def count(method: str, config: t5.Config, sizes: Sizes) -> Count:
    """How many parameters a method trains and stores; no weights are needed."""
    frozen, stored = t5.shapes(config), stored_shapes(method, config, sizes)
    added = {name: shape for name, shape in stored.items() if name not in frozen}
    trained = METHODS[method].shapes(config, sizes)
    return Count(*(sum(map(math.prod, shapes.values())) for shapes in (trained, stored, frozen | added)))


def stored(trained: Flat, config: t5.Config) -> Flat:
    """What of the trained arrays is kept: of a network, the prompt or prefix that it makes."""
    start = network_of(trained)
    if start is None:
        return trained
    made, between = NETWORKS[start]
    x, last = trained[f"{start}embedding"], sum(name.endswith(".weight") for name in trained) - 1
    shapes = made(config, Sizes(length=len(x)))
    for i in range(last + 1):
        x = ops.linear(x, trained[f"{start}{i}.weight"]) + trained[f"{start}{i}.bias"]
        x = between(x) if i < last else x
    out, at = {}, 0
    for name, (_, width) in shapes.items():
        out[name] = x[:, at : at + width]
        at += width
    return out


def apply(params: Tree, delta: Flat) -> Tree:
    """The tree of weights that the model computes with: keys added, replaced, or changed by a product or by factors."""
    frozen = {} if all(".lora." not in name and ".ia3." not in name for name in delta) else flatten(params)
    out: Flat = {}
    for name, value in delta.items():
        weight = name.partition(".lora.")[0].partition(".ia3.")[0] + ".weight"
        if name.endswith(".lora.a"):
            out[weight] = ops.widen(frozen[weight]) + delta[name[:-1] + "b"] @ value
        elif ".ia3." in name:
            out[weight] = ops.widen(frozen[weight]) * (value[:, None] if name.endswith("rows") else value)
        elif not name.endswith(".lora.b"):
            out[name] = value
    return merge(params, out)
