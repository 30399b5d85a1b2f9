# %% [markdown]
# # 3 T5 in one file
#
# **You need:** attention and position biases (lesson 2). **Time:** 15 minutes to read,
# less than 90 seconds to run on two cores.
#
# `tinyprompt/t5.py` is a whole T5 in some 350 lines: an encoder that reads, a decoder
# that writes, no classes. In this lesson you take it apart with your own hands. You
# will compute one layer of the encoder step by step and compare it with the model, let
# the decoder choose an answer, and see where the weights of a T5 lie.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
from classroom import BLUE, GREY, HATCHES, ORANGE, check, diagram, figure

import tinyprompt as tp
from tinyprompt import ops, t5
from tinyprompt.config import weight_shapes

# %% alt="The encoder reads the text; the decoder reads it by cross-attention."
diagram(
    {
        "text": ("text, embedded", 0, 0, GREY),
        "look": ("self-attention", 0, 1, BLUE),
        "think": ("feed-forward", 0, 2, BLUE),
        "read": ("answer so far", 1, 0, GREY),
        "causal": ("causal\nself-attention", 1, 1, BLUE),
        "cross": ("cross-attention", 1, 2, ORANGE),
        "dense": ("feed-forward", 1, 3, BLUE),
        "logits": ("logits", 1, 4, GREY),
    },
    [
        ("text", "look", BLUE),
        ("look", "think", BLUE),
        ("think", "cross", ORANGE),
        ("read", "causal", BLUE),
        ("causal", "cross", BLUE),
        ("cross", "dense", BLUE),
        ("dense", "logits", BLUE),
    ],
    height=4.6,
)
plt.show()

# %% [markdown]
# ## Weights are a dict
#
# A model is two things: numbers, and what is done with them. The numbers are in a dict,
# under the names that the file of the checkpoint gives them. Dots in a name are levels
# of the dict.

# %%
model = tp.load("small")
print(model)
for name, shape in weight_shapes(model.config).items():
    if name.startswith(("shared", "encoder.block.1.")):
        print(f"{name:58}{shape}")

# %% [markdown]
# That is one block of the encoder, and the table of word vectors. What is done with
# them is plain functions. Each takes its part of the dict by `**`, so that a function's
# parameters are the list of the weights it needs:
# `def feed_forward(x, visit, config, *, wo, wi_0, wi_1)`, a little shortened. (`visit`
# is called on values on their way, so that they can be kept. We pass `t5.unchanged`,
# which does nothing.)
#
# ## From text to vectors
#
# The tokenizer cuts a text into pieces of its vocabulary and gives each a number.
# Number 1 at the end means "end of text". The embedding looks up a row of the table for
# each number. From here on the model sees only vectors.

# %%
text = "The band played two songs."
ids = model.tokenizer.encode(text)
print([(i, model.tokenizer.piece(i)) for i in ids])
x = ops.embedding(model.params["shared"]["weight"], np.array([ids]))
print("x:", x.shape, "(texts, words, d_model)")

# %% [markdown]
# ## One layer by hand
#
# Every layer of a T5 has the same form. It *adds* something to the vectors:
#
# $$x \leftarrow x + \text{layer}(\text{norm}(x))$$
#
# The vectors that run through are called the **residual stream**. The norm divides each
# vector by its root mean square and scales each of its numbers,
# $\text{norm}(x) = w \cdot x / \sqrt{\text{mean}(x^2)}$. So a layer always reads
# vectors of a known size, however long the stream has become.
#
# There are two kinds of layers. **Attention** lets words look at each other (lesson 2).
# The **feed-forward** looks at each word alone:
# $W_o\,(\text{gelu}(W_0 x) \odot W_1 x)$, a hidden layer in which one half opens or
# shuts the gates of the other ($\odot$ multiplies number by number). A block of the
# encoder is one of each. Here it is, from the functions of `t5.py`:

# %%
block = model.params["encoder"]["block"]["0"]["layer"]
everything = np.ones(
    (1, len(ids)), np.float32
)  # the attention mask: all words may be seen
may_see = t5.additive(everything, np.float32)
biases = t5.position_biases(
    model.params["encoder"]["block"], may_see, np.arange(len(ids)), True, model.config
)

norm = ops.rms_norm(x, block["0"]["layer_norm"]["weight"], 1e-6)
looked = t5.attention(
    norm, norm, biases[0], t5.unchanged, model.config, **block["0"]["SelfAttention"]
)
after_attention = x + looked

norm = ops.rms_norm(after_attention, block["1"]["layer_norm"]["weight"], 1e-6)
thought = t5.feed_forward(
    norm, t5.unchanged, model.config, **block["1"]["DenseReluDense"]
)
after_block = after_attention + thought

values = tp.intermediates(model, tp.Prompt(), text, "music")
by_hand = np.abs(after_block - values["encoder.block.0.layer.1.hidden_states"]).max()
print("largest difference from the model's own block 0:", by_hand)

# %% [markdown]
# You have just run a quarter of the encoder of this model; the rest repeats it with
# other weights. `t5.stack` is that loop.
#
# ## The stream grows
#
# Layers only add, and in this model what they add does not cancel what is there. So the
# vectors grow on their way. Let us look: the size of the stream behind each layer, and
# the size of what the layer added. `tp.intermediates` has kept both.
#
# **Guess before you run:** by which factor does the stream grow from the embedding to
# the last layer: 2, 5, or 50?

# %% alt="The residual stream of the encoder grows from layer to layer."
layers = [
    f"encoder.block.{i}.layer.{j}"
    for i in range(model.config.num_layers)
    for j in range(2)
]


def rms(x):
    """Root mean square: the typical size of a number."""
    return float(np.sqrt(np.mean(x * x)))


stream = [
    rms(values["encoder.embedding"]),
    *(rms(values[f"{at}.hidden_states"]) for at in layers),
]
added = [rms(values[f"{at}.output"]) for at in layers]
fig, axes = figure()
axes.plot(stream, label="the stream")
axes.bar(
    range(1, len(added) + 1),
    added,
    width=0.5,
    color="0.8",
    edgecolor="0.3",
    label="what the layer adds",
)
names = [
    "embedding",
    *(f"{kind} {i}" for i in range(4) for kind in ("attention", "feed-fwd.")),
]
axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
axes.set(ylabel="root mean square", title="The residual stream of the encoder")
axes.legend()
plt.show()
print("the stream grows from", round(stream[0], 2), "to", round(stream[-1], 2))

# %% [markdown]
# Keep this picture for lessons 5 and 6. A prompt is put into the stream at the left end
# of the picture, where the vectors of words have this size. A vector much shorter than
# that is not weaker for it: the norm in front of attention makes all vectors the same
# size. What counts about a prompt's vector is its direction, and how much of it is left
# after the layers have added their part.
#
# ## The decoder chooses an answer
#
# The decoder is made of the same parts, with three differences:
#
# - its self-attention is **causal**: a word sees only those before it;
# - between the two layers of each block is a third, **cross-attention**, whose queries
#   come from the decoder and whose keys and values come from the encoder. Through it,
#   and only through it, the decoder knows the text;
# - at the end, the **output head** gives each word of the vocabulary a score, a
#   *logit*. The softmax of the scores is the probability of the next word.
#
# To score a given answer, say "music", we let the decoder read a start mark and the
# answer without its last word, and look at the probability of each word that really
# follows. This is called **teacher forcing**: the decoder reads the right words, not
# those it would have written. `shift_right` makes that input.

# %%
labels = np.array([model.tokenizer.encode("music")])
print("the answer:", labels, "  the decoder reads:", t5.shift_right(labels))
states, mask = t5.encode(model.params, model.config, np.array([ids]), everything)
logits = t5.decode(model.params, model.config, t5.shift_right(labels), states, mask)
log_p = np.take_along_axis(ops.log_softmax(logits), labels[..., None], -1)[..., 0]
print(
    "log probability of each word:",
    log_p.round(2),
    "  of the answer:",
    log_p.sum().round(2),
)

# %% [markdown]
# To classify, score every label word in this way and take the likeliest. That is what
# `tp.answer` does. The probabilities that it gives are shares *among the label words*,
# and sum to 1: "music" is unlikely among all words, but far likelier than the other
# four. The empty prompt stands for the bare frozen model. It has seen no example of
# this task, and yet:

# %%
topics = ("food", "money", "music", "nature", "sport")
base = tp.load("base")
answers = {}
for name, asked in (("small", model), ("base", base)):
    answers[name] = tp.answer(asked, [(tp.Prompt(label_words=topics), text)])[0]
    shares = ", ".join(
        f"{word} {p:.2f}" for word, p in answers[name].probabilities.items()
    )
    print(f"{name:6} {answers[name].text:8}{shares}")

# %% [markdown]
# ## Where the weights are
#
# In which parts do the weights of a T5 lie? We count them for three sizes: our small
# one, and the smallest and the largest T5 1.1 of the paper. `weight_shapes` needs only
# the configuration, so this takes no memory, even for 11 billion weights.
#
# **Guess before you run:** which share of the weights of our small model is in its word
# tables: a tenth, a third, or more than a half?

# %% alt="Share of the weights in each part of a T5, for three sizes."
configs = {
    "ours, small": model.config,
    "T5 1.1 small": tp.config.T5_1_1["small"],
    "T5 1.1 XXL": tp.config.T5_1_1["xxl"],
}


def part(name):
    """The part of the model that a weight belongs to."""
    if name.startswith(("shared", "lm_head")):
        return "word tables"
    stack = name.partition(".")[0]
    return f"{stack} {'feed-forward' if 'Dense' in name else 'attention'}"


parts = [
    "word tables",
    "encoder attention",
    "encoder feed-forward",
    "decoder attention",
    "decoder feed-forward",
]
counts = {name: dict.fromkeys(parts, 0) for name in configs}
for name, config in configs.items():
    for weight, shape in weight_shapes(config).items():
        counts[name][part(weight)] += math.prod(shape)
totals = {name: sum(found.values()) for name, found in counts.items()}

fig, axes = figure(height=3)
left = np.zeros(len(configs))
for i, kind in enumerate(parts):
    share = np.array([100 * counts[name][kind] / totals[name] for name in configs])
    axes.barh(
        list(configs),
        share,
        left=left,
        color=str(0.95 - 0.17 * i),
        edgecolor="black",
        hatch=HATCHES[i],
    )
    left += share
axes.legend(parts, loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=3, fontsize=8)
axes.set(xlabel="share of the weights (%)", title="Where the weights are")
plt.show()
for name, total in totals.items():
    print(
        f"{name:13}{total:>15,} weights, "
        f"{100 * counts[name]['word tables'] / total:.0f} % in word tables"
    )

# %% [markdown]
# Our small model is mostly a dictionary; the largest mostly thinks. That is worth
# remembering when lesson 10 compares sizes: "five times as many weights" means more
# than five times as many in the layers.

# %% [markdown]
# ## Exercises
#
# **Exercise 1.** Write the norm: each vector of `x` divided by its root mean square,
# times `weight`. Add `eps` to the mean of the squares, so that a vector of zeros gives
# no division by zero.

# %% tags=["exercise-1"]


def my_norm(x, weight, eps=1e-6):
    """x / sqrt(mean(x ** 2) + eps) * weight over the last axis. Shapes: x (..., D),
    weight (D,)."""
    ...  # your turn


# %%
@check("Exercise 1", my_norm, lambda x, weight: x)
def _(mine):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(3, 1, size=(2, 5, 8)), rng.normal(size=8)
    yield (
        np.shape(mine(x, weight)) == x.shape,
        f"expected shape {x.shape}, found {np.shape(mine(x, weight))}",
    )
    yield (
        np.isfinite(mine(0 * x, weight)).all(),
        "of a vector of zeros, it makes something that is not finite",
    )
    sizes = np.sqrt((mine(x, np.ones(8)) ** 2).mean(-1))
    yield (
        np.allclose(sizes, 1, atol=1e-3),
        f"each vector should have the root mean square 1, one has {sizes[0, 0]:.2f}",
    )
    yield (
        not np.allclose(mine(x, weight), mine(x, np.ones(8))),
        "the weight changes nothing",
    )
    yield (
        np.allclose(mine(x, weight), ops.rms_norm(x, weight, 1e-6)),
        "the size is right, the direction is not",
    )
    short = 1e-3 * x
    yield (
        np.allclose(mine(short, weight), ops.rms_norm(short, weight, 1e-6)),
        "of short vectors: where is eps added?",
    )


# %% [markdown]
# **Exercise 2.** Write `shift_right(labels)` for `labels` of shape `(B, T)`: what the
# decoder reads under teacher forcing. The start mark has the number 0.

# %% tags=["exercise-2"]


def my_shift_right(labels):
    """Decoder input (B, T): the start mark in front, the last label dropped."""
    ...  # your turn


# %%
@check("Exercise 2", my_shift_right, lambda labels: labels)
def _(mine):
    labels = np.array([[7, 8, 9, 1], [5, 6, 1, 0]])
    found = np.asarray(mine(labels.copy()))
    yield (
        found.shape == labels.shape,
        f"as many words are read as are scored: {labels.shape}, not {found.shape}",
    )
    yield (
        (found[:, 0] == 0).all(),
        f"the decoder begins with the start mark, 0, and not with {found[0, 0]}",
    )
    cheating = [t for t in range(1, 4) if found[0, t] == labels[0, t]]
    yield (
        not cheating,
        f"in place {cheating[:1]} it reads the very word that it has to guess there",
    )
    yield (
        (found == t5.shift_right(labels)).all(),
        f"for {labels[1]} it reads {found[1]}",
    )


# %% [markdown]
# **Exercise 3.** Write the gated feed-forward, $W_o\,(\text{gelu}(W_0 x) \odot W_1 x)$,
# in NumPy alone. Each matrix is stored as (outputs, inputs). T5 1.1 takes gelu in its
# tanh form:
#
# $$\text{gelu}(h) = \tfrac12\, h\, \bigl(1 + \tanh(\sqrt{2/\pi}\,
# (h + 0.044715\, h^3))\bigr)$$

# %% tags=["exercise-3"]


def my_feed_forward(x, wi_0, wi_1, wo):
    """Shapes: x and result (..., D), wi_0 and wi_1 (F, D), wo (D, F)."""
    ...  # your turn


# %%
@check("Exercise 3", my_feed_forward, lambda x, *_, **__: x)
def _(mine):
    weights = {name: w["weight"] for name, w in block["1"]["DenseReluDense"].items()}
    zero = np.zeros_like(weights["wi_1"])
    shut = np.abs(mine(norm, weights["wi_0"], zero, weights["wo"])).max()
    yield (
        shut == 0,
        f"where W_1 x is 0, the gate is shut; yours lets {shut:.2g} through",
    )
    off = np.abs(mine(norm, zero, weights["wi_1"], weights["wo"])).max()
    yield off == 0, f"gelu(0) is 0; with W_0 = 0 yours returns {off:.2g}"
    one = np.ones((1, 1))
    for h in (-1.0, 1.0, 2.0):  # W_1 = 1 / h opens the gate to 1
        value, right = mine(np.array([[h]]), one, one / h, one)[0, 0], ops.gelu(h)
        yield abs(value - right) < 1e-6, f"gelu({h}) is {right:.4f}, yours {value:.4f}"
    hint = "gelu is right, the whole is not: which matrix has the gate, which the gelu?"
    yield np.allclose(mine(norm, **weights), thought, rtol=1e-4, atol=1e-4), hint


# %% [markdown]
# [Solutions, and a common mistake for each](solutions/03_t5_in_one_file.py)
#
# ## What holds

# %%
assert by_hand < 1e-5
assert stream[-1] > 3 * stream[0]
assert answers["small"].text == answers["base"].text == "music"
assert counts["ours, small"]["word tables"] / totals["ours, small"] > 0.5
assert counts["T5 1.1 XXL"]["word tables"] / totals["T5 1.1 XXL"] < 0.05
assert (
    totals["T5 1.1 XXL"] == 11_135_332_352
)  # what is left in table 4 of the paper without the prompt
