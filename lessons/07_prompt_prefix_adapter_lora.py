# %% [markdown]
# # 7 Prompt, prefix, adapter, LoRA, full tuning: what each adds and costs
#
# **You need:** attention (lesson 2) and a tuned prompt (lesson 4). **Time:** 15 minutes
# to read, less than 90 seconds to run on two cores.
#
# A soft prompt is one way to change what a frozen model does. There are others, and
# papers compare them under many names. Here you see that they are variations of one
# sentence: **take the dict of weights, and add or replace some keys.** Then you compare
# five of them by what they add, what they cost, and what they learn.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from classroom import (
    BLUE,
    DEMO,
    GREY,
    HATCHES,
    MARKERS,
    check,
    diagram,
    figure,
    seconds,
)

import tinyprompt as tp
from tinyprompt import data, methods, t5

model = tp.load("small")
rows, dev, test = (
    tp.read_rows(DEMO / f"topic.{part}.tsv") for part in ("train", "dev", "test")
)
words = tp.label_words(rows)
NAMES = ("prompt", "prefix", "adapter", "lora", "full")
settings = tp.Settings(
    steps=100,
    prompt_length=20,
    rank=8,
    batch_size=16,
    optimizer="adam",
    schedule="linear",
    eval_every=25,
)
own = {"full": dict(optimizer=None, schedule="constant")}  # model tuning as T5 does it
of = {name: replace(settings, method=name, **own.get(name, {})) for name in NAMES}

# %% alt="Where each method acts: input, keys and values, matrices, behind each layer."
diagram(
    {
        "prompt": ("prompt", 0, 0, BLUE),
        "text": ("text, embedded", 1, 0, GREY),
        "prefix": ("prefix: keys\nand values", 0, 1, BLUE),
        "lora": ("LoRA: matrices\nof q and v", 0, 2, BLUE),
        "attention": ("attention", 1, 1.5, GREY),
        "adapter": ("adapter", 0, 3, BLUE),
        "dense": ("feed-forward", 1, 2.5, GREY),
        "next": ("next block", 1, 3.5, GREY),
    },
    [
        ("prompt", "attention", BLUE),
        ("text", "attention", GREY),
        ("prefix", "attention", BLUE),
        ("lora", "attention", BLUE),
        ("attention", "dense", GREY),
        ("adapter", "dense", BLUE),
        ("adapter", "next", BLUE),
        ("dense", "next", GREY),
    ],
    height=4.4,
)
plt.show()

# %% [markdown]
# ## Five sentences
#
# - **Prompt.** $P$ vectors in front of the embedded text: $x \leftarrow [P_e; x]$. One
#   array, at the very bottom.
# - **Prefix.** $P$ keys and $P$ values in front of all others, in *every* attention:
#   $k \leftarrow [P_k; k]$, $v \leftarrow [P_v; v]$. A prompt for each layer, without
#   the need to pass through the layers below.
# - **Adapter.** Behind every layer a small network with a narrow waist of $r$ numbers:
#   $y \leftarrow y + W_{up}\, \text{relu}(W_{down}\, y)$.
# - **LoRA.** A product of two thin matrices added to a weight: $W \leftarrow W + B A$,
#   with $A$ of $r$ rows and $B$ of $r$ columns, in every attention for the weights of
#   queries and values. No new layer, only a different matrix, which differs from the
#   old one in a few directions.
# - **Full.** All weights: what the paper calls model tuning.
#
# `methods.init_params` makes the arrays of a method, and you can read the sentences off
# their names (here without the block that they are in).

# %%
first = {name: methods.init_params(model, of[name], words) for name in NAMES}
for name in NAMES:
    arrays = list(first[name].items())
    shown = ", ".join(
        f"{key.split('block.0.')[-1]} {array.shape}" for key, array in arrays[:2]
    )
    print(f"{name:8}{len(arrays):4} arrays: {shown}{' ...' if len(arrays) > 2 else ''}")

# %% [markdown]
# ## Where does training start?
#
# A good beginning leaves the frozen model as it is, and then improves it. Look at the
# formulas: if $B = 0$, LoRA changes nothing. If $W_{up} = 0$, an adapter changes
# nothing. Full tuning starts from the weights themselves. But vectors in front of a
# text cannot be "nothing": attention sees them, whatever they are. We measure how far
# the encoder's output is from the frozen one before the first step.

# %%
batch = data.batch_of(rows[:16], model.tokenizer, 256)
frozen, _ = t5.encode(model.params, model.config, batch.input_ids, batch.attention_mask)
moved = {}
for name in NAMES:
    params = methods.apply(model.params, methods.stored(first[name], model.config))
    states, _ = t5.encode(params, model.config, batch.input_ids, batch.attention_mask)
    states = states[:, -frozen.shape[1] :]  # the text, without the prompt
    seen = batch.attention_mask > 0
    moved[name] = np.linalg.norm((states - frozen)[seen]) / np.linalg.norm(frozen[seen])
    print(
        f"{name:8} the encoder's output differs by "
        f"{100 * moved[name]:5.1f} % before training"
    )

# %% [markdown]
# Remember lesson 4: with its first vectors, the tuned prompt started *below* the frozen
# model. Now you know that adapter, LoRA and full tuning are spared this.
#
# ## How many numbers?
#
# `methods.count` counts from the configuration alone, so we can ask about models that
# we could never load. Once for our model and once for the T5 1.1 XXL of the paper, with
# the same 20 vectors and rank 8.
#
# **Guess before you run:** as the model grows, whose share of the model falls most?

# %%
counts = {}
for title, config in (
    ("ours, small", model.config),
    ("T5 1.1 XXL", tp.config.T5_1_1["xxl"]),
):
    for name in NAMES:
        found = counts[title, name] = methods.count(config, of[name], len(words))
        print(
            f"{title:12}{name:8}{found.stored:>15,} "
            f"numbers{found.percent:11.4f} % of the model"
        )

# %% [markdown]
# Look at the last column. As the model grows, the shares *fall*: prefix, adapter and
# LoRA to about a thirteenth, the prompt to less than a hundredth. A prompt grows with
# the width of the model, the three with width times depth, and the model with width
# squared times depth. This is one half of why the paper is about
# scale. (The other half, that it also *learns* better, is lesson 10.)
#
# ## What each one learns
#
# Same rows, same number of steps, each method with its own learning rate (`METHODS` in
# `methods.py`). Two seeds each, on the topics.

# %%
tuned, scores = {}, {}
for name in NAMES:
    for seed in (0, 1):
        *_, last = tp.run(model, rows, dev, of[name], seed=seed)
        tuned[name] = last.prompt
        scores.setdefault(name, []).append(tp.evaluate(model, last.prompt, test).mean)
none = tp.evaluate(model, tp.Prompt(label_words=words), test).mean

# %% [markdown]
# And what each one costs when it *answers*. A LoRA can be added to its matrix once, and
# the matrix is then an ordinary one. A prompt makes every text 20 places longer, a
# prefix every attention. An adapter is more layers.
#
# **Guess before you run:** which of the five makes a text slowest to read?

# %% alt="Test accuracy against numbers stored, and time to read, for five methods."


def reading(params):
    """A job: these weights read a batch."""
    return lambda: t5.encode(
        params, model.config, batch.input_ids, batch.attention_mask
    )


jobs = {
    name: reading(methods.apply(model.params, tuned[name].params)) for name in NAMES
}
costs = seconds(jobs | {"frozen": reading(model.params)}, 40)
bare = costs["frozen"]
print(f"a text has {batch.attention_mask.sum(1).mean():.0f} tokens in the mean")

fig, (left, right) = figure(2, width=9, height=3.5)
for name, marker in zip(NAMES, MARKERS, strict=True):
    stored = counts["ours, small", name].stored
    left.plot([stored] * 2, scores[name], marker=marker, ls=":", ms=6, label=name)
left.axhline(none, color="0.4", ls="--", marker="", lw=1, label="frozen model")
left.set(
    xscale="log",
    xlabel="numbers that a task stores",
    ylabel="test accuracy (two seeds)",
)
left.set(title="What it learns", ylim=(0.5, 0.85))
left.legend(fontsize=8, ncols=2, loc="upper left")
bars = right.barh(
    NAMES, [costs[name] / bare for name in NAMES], color="0.8", edgecolor="black"
)
for bar, hatch in zip(bars, HATCHES, strict=True):
    bar.set_hatch(hatch)
right.axvline(1, color="0.2", lw=1, ls="-", marker="")
right.invert_yaxis()
right.set(
    xlabel="time to read a text (frozen model = 1)", title="What it costs to answer"
)
plt.show()
for name in NAMES:
    shown = " and ".join(f"{score:.3f}" for score in scores[name])
    print(
        f"{name:8} test accuracy {shown}; reading "
        f"takes {costs[name] / bare:.2f} times as long"
    )
print(f"frozen   test accuracy {none:.3f}")

# %% [markdown]
# The picture suggests two groups. Adapter, LoRA and full tuning change *what the layers
# compute*. Prompt and prefix only add something *to attend to*, and for a model as
# small as this, they seem to learn less. That a prefix stores more numbers than an
# adapter does not help it. But be careful with small differences: the standard error of
# one accuracy is 0.03. Within a group, they are hardly more than chance, and the lead
# of the adapter over the prompt is no larger. LoRA and full tuning are clearer. This is
# the left end of the paper's figure 1, where prompts are behind. The paper's finding is
# that the gap closes as the model grows.
#
# A prompt is not the fastest to answer either. It makes the input longer, and our texts
# are so short that 20 more places double them. (For a text of 500 words they are
# little.)
#
# So what speaks for a prompt? Something that this table does not show. Full tuning and
# a merged LoRA *change weights*, and an adapter puts its own between the layers. Two
# texts with two different tasks then need two different models, one after the other, or
# code that gives each row its own matrices. A prompt is *part of the input*. Texts of
# many tasks can share one batch on one frozen model, and no code is special. That is
# lesson 9. The next cell counts the changed weights.

# %%
before, unlike = tp.tree.flatten(model.params), {}
for name in NAMES:
    after = tp.tree.flatten(methods.apply(model.params, tuned[name].params))
    unlike[name] = sum(
        not np.array_equal(array, after[key]) for key, array in before.items()
    )
print("weights of the frozen model that are different now:", unlike)

# %% [markdown]
# ## Exercises
#
# **Exercise 1.** Merge a LoRA into its weight. `w` is `(O, I)`, `a` is `(r, I)`, `b` is
# `(O, r)`. A layer computes `x @ w.T`.

# %% tags=["exercise-1"]


def merge_lora(w, a, b):
    """The weight (O, I) that computes what w and the LoRA compute together."""
    ...  # your turn


# %%
@check("Exercise 1", merge_lora, lambda w, a, b: w)
def _(mine):
    rng = np.random.default_rng(0)
    w, a, b, x = (rng.normal(size=shape) for shape in ((6, 6), (2, 6), (6, 2), (3, 6)))
    found = mine(w, a, b)
    yield (
        np.shape(found) == (6, 6),
        f"expected the shape {w.shape}, found {np.shape(found)}",
    )
    yield np.allclose(mine(w, a, 0 * b), w), "with b = 0, the weight stays as it is"
    yield (
        np.linalg.matrix_rank(found - w) == 2,
        f"what is added has the rank 2, not {np.linalg.matrix_rank(found - w)}",
    )
    yield (
        np.allclose(x @ found.T, x @ w.T + (x @ a.T) @ b.T),
        "x goes through a first, and then through b",
    )


# %% [markdown]
# **Exercise 2.** How many numbers has a prefix of `P` places? Write it for a
# configuration `c`: every attention has keys and values, of `c.num_heads * c.d_kv`
# numbers each. (A block of the encoder has one attention, a block of the decoder two.
# The numbers of blocks are `c.num_layers` and `c.num_decoder_layers`.)

# %% tags=["exercise-2"]


def prefix_numbers(c, P):
    """The numbers that a prefix stores."""
    ...  # your turn


# %%
@check("Exercise 2", prefix_numbers, 0)
def _(mine):
    sizes = {
        "ours, small": model.config,
        "T5 1.1 small": tp.config.T5_1_1["small"],
        "T5 1.1 XXL": tp.config.T5_1_1["xxl"],
    }
    for title, c in sizes.items():
        right, found = methods.count(c, of["prefix"]).stored, mine(c, 20)
        yield (
            2 * found != right,
            f"{title}: your number is half as large as it should be: keys and values",
        )
        yield mine(c, 40) == 2 * found, "twice as many places are twice as many numbers"
        ratio = found / right
        what = "count the attentions, and the numbers of a key, again"
        yield (
            found == right,
            f"{title}: your number is {ratio:.3f} times the right one; {what}",
        )


# %% [markdown]
# **Exercise 3.** Write an adapter: `y + up(relu(down(y)))`, with `down` of shape
# `(r, D)` and `up` of shape `(D, r)` (without biases).

# %% tags=["exercise-3"]


def my_adapter(y, down, up):
    """The output of a layer, y (..., D), with what the adapter adds."""
    ...  # your turn


# %%
@check("Exercise 3", my_adapter, lambda y, *_: y)
def _(mine):
    rng = np.random.default_rng(0)
    y, down, up = (
        rng.normal(size=(2, 5, 8)),
        rng.normal(size=(3, 8)),
        rng.normal(size=(8, 3)),
    )
    found = mine(y, down, up)
    yield (
        np.shape(found) == y.shape,
        f"expected the shape {y.shape}, found {np.shape(found)}",
    )
    yield (
        np.allclose(mine(y, down, 0 * up), y),
        "with up = 0, the output stays as it is: y itself is missing",
    )
    yield (
        not np.allclose(found - y, -(mine(-y, down, up) + y)),
        "it is linear: something between the two is missing",
    )
    right = t5.adapter(
        y,
        down=dict(weight=down, bias=np.zeros(3)),
        up=dict(weight=up, bias=np.zeros(8)),
    )
    yield (
        np.allclose(found, right),
        "the function between the two, or its place, is another one",
    )


# %% [markdown]
# [Solutions, and a common mistake for each](solutions/07_prompt_prefix_adapter_lora.py)
#
# ## What holds

# %%
assert moved["adapter"] == moved["lora"] == moved["full"] == 0
assert min(moved["prompt"], moved["prefix"]) > 0.05
order = [
    counts["ours, small", name].stored
    for name in ("prompt", "adapter", "lora", "prefix", "full")
]
assert order[0] == min(order) and order[-1] == max(order)
assert (
    counts["T5 1.1 XXL", "prompt"].percent
    < counts["ours, small", "prompt"].percent / 50
)
mean = {name: np.mean(found) for name, found in scores.items()}
assert min(mean["adapter"], mean["lora"], mean["full"]) > max(
    mean["prompt"], mean["prefix"], none
)
assert counts["ours, small", "prefix"].stored > counts["ours, small", "adapter"].stored
assert costs["prompt"] > 1.1 * bare and 10 < batch.attention_mask.sum(1).mean() < 25
assert unlike["prompt"] == unlike["prefix"] == unlike["adapter"] == 0
assert unlike["full"] > unlike["lora"] > 0
