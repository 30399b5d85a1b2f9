# %% [markdown]
# # 2 Attention and relative positions
#
# **You need:** Python and NumPy. Lesson 1 defines softmax. **Time:** 15 minutes to
# read, less than 90 seconds to run on two cores.
#
# A soft prompt acts on a text in one way only: through attention. So before we learn a
# prompt, we look at what attention can see of it. The answer has a surprise. In the
# first layer of a T5, words from the 91st on cannot tell in which *order* the vectors
# of a prompt of 100 stand. For them, the prompt is a bag. You will derive this from one
# function and then measure it in a model, in the first layer and in the last. (A "word"
# here is a token of the vocabulary: a short word, or a piece of a long one.)

# %%
import matplotlib.pyplot as plt
import numpy as np
from classroom import BLUE, GREY, ORANGE, check, diagram, figure

import tinyprompt as tp
from tinyprompt import ops, t5

# %% alt="Query, keys and bias give scores, then weights; weights and values a mean."
diagram(
    {
        "query": ("query", 0, 0, BLUE),
        "keys": ("keys", 0.7, 0, BLUE),
        "values": ("values", 1.4, 0, BLUE),
        "bias": ("bias of the\ndistance", -0.15, 1, ORANGE),
        "scores": ("scores", 0.7, 1, GREY),
        "weights": ("weights,\nsum 1", 0.7, 2, GREY),
        "mean": ("weighted mean", 1.2, 3, BLUE),
    },
    [
        ("query", "scores", BLUE),
        ("keys", "scores", BLUE),
        ("bias", "scores", ORANGE),
        ("scores", "weights", GREY),
        ("weights", "mean", GREY),
        ("values", "mean", BLUE),
    ],
)
plt.show()

# %% [markdown]
# ## Attention is a weighted mean
#
# Each word asks a question, the *query*, and gives a key and a value. The query of one
# word is compared with the keys of all words; where they fit, the value counts more.
# With a query $q$ for each of $T$ words, and keys $k$ and values $v$ of $L$ words,
#
# $$\text{attend}(q, k, v) = \text{softmax}(q k^\top + b)\, v .$$
#
# The softmax makes positive weights with sum 1 out of the scores in each row, so the
# result is a mean of values. The *bias* $b$ is added to the scores. Set it aside for a
# moment. In `t5.py` the formula is two lines long (T5 does without the usual division
# by $\sqrt{d}$; that factor is part of its initial weights).
#
# **Guess before you run:** the next cell puts the keys and the values into another
# order, the same for both. How far does the result move?

# %%
rng = np.random.default_rng(0)
queries, keys, values = rng.normal(
    size=(3, 1, 1, 5, 4)
)  # one row, one head, 5 words, 4 numbers each
no_bias = np.zeros((1, 1, 5, 5))
mixed = t5.attend(queries, keys, values, no_bias)
order = np.array([3, 0, 4, 1, 2])
shuffled = t5.attend(queries, keys[:, :, order], values[:, :, order], no_bias)
print(
    f"in order and shuffled, the results differ by {np.abs(mixed - shuffled).max():.0e}"
)

# %% [markdown]
# Nothing changed. A mean does not depend on the order of what it is a mean of.
# **Without a bias, attention reads a bag of words**: "dog bites man" and "man bites
# dog" are the same to it. Something has to tell it about positions.
#
# ## A bias for each distance
#
# T5 puts positions into the bias. If word $i$ looks at word $j$, all that counts is the
# distance $j - i$:
#
# $$b_{ij} = \text{table}[\text{bucket}(j - i)]$$
#
# The table is learned, one number for each bucket and head. There are 32 buckets, 16
# for words that come before (and the word itself) and 16 for words that come after.
# Near distances have a bucket each, because it matters whether an adjective stands one
# or two words before its noun. Far distances share: buckets grow wider and wider, with
# the logarithm of the distance. Beyond some distance, all words lie in the last bucket.
# Here is the function of `t5.py`, called on every distance; we print the buckets of
# words that come before.

# %%
model = tp.load("small")
c = model.config
buckets = c.relative_attention_num_buckets, c.relative_attention_max_distance
distance = np.arange(-140, 141)
bucket = t5.relative_position_bucket(distance, True, *buckets)
behind = {
    b: distance[bucket == b] for b in range(buckets[0] // 2)
}  # buckets of words that came before
for b, found in behind.items():
    far, near = -found.min(), -found.max()
    print(f"bucket {b:2}: {near}" if far == near else f"bucket {b:2}: {near} to {far}")
last = int(-behind[buckets[0] // 2 - 1].max())
print("the last bucket begins at distance", last)

# %% [markdown]
# (The printed end of the last bucket is only where our list of distances ends.) The
# paper of T5 speaks of a maximal distance of 128. That is the 128 in the formula of the
# logarithm. Because buckets are rounded down, the last one begins earlier.
#
# ## Where a prompt becomes a bag
#
# Now put $P = 100$ vectors in front of a text. The word with index $i$ (counted from 0)
# stands at position $100 + i$, and the vector $j$ at position $j$. The nearest vector,
# number 99, is $i + 1$ positions away. All others are further. So if $i + 1$ is at
# least 91, the start of the last bucket, *every* vector of the prompt is in the last
# bucket: same table entry, same bias. The picture shows the bucket for every pair of a
# word and a vector.

# %% alt="Buckets of words and vectors; from word 90 on there is only one bucket."
P, words = 100, 130
apart = np.arange(P)[None, :] - (P + np.arange(words))[:, None]  # (words, P)
seen = t5.relative_position_bucket(apart, True, *buckets)

kinds = np.array([len(np.unique(row)) for row in seen])
first_bag = int((kinds == 1).argmax())
fig, (left, right) = figure(2, width=8.5, height=3.6)
image = left.imshow(seen, cmap="Greys", aspect="auto", vmin=4, vmax=16)
left.axhline(first_bag - 0.5, color="#D55E00", ls="--", lw=1.5)
left.set(
    xlabel="vector of the prompt",
    ylabel="index of the word",
    title="Bucket of each pair",
)
left.grid(False)
fig.colorbar(image, ax=left, label="bucket")
right.plot(kinds, np.arange(words), marker="")
right.axhline(first_bag - 0.5, color="#D55E00", ls="--", marker="", lw=1.5)
right.invert_yaxis()
right.set(
    xlabel="buckets that a word tells apart",
    ylabel="index of the word",
    xlim=(0, None),
    xticks=(1, 5, 10, 15),
)
right.set_title(f"One bucket from word {first_bag} on")
plt.show()
print(
    f"words 0, 10, 50 tell {kinds[0]}, {kinds[10]}, "
    f"{kinds[50]} buckets apart; from {first_bag} on, one"
)

# %% [markdown]
# Even the first word, in the top row, can tell no more than 15 groups of vectors apart,
# and the ten vectors at the left edge share the last bucket for every word. From the
# dashed line on, there is one group.
#
# ## Measure it
#
# A derivation is a claim about code, so let us test the code. Take a prompt of 100
# vectors, and the same vectors in another order. Give both to the model in front of one
# long text. `tp.intermediates` keeps every hidden state of a forward pass. How much
# does the state of each word change, behind the first attention and behind the last?
#
# **Guess before you run:** behind the last attention, do the words at the end of the
# text move less than the first words, as much, or not at all?

# %% alt="Change of each word's state; behind the first attention none from word 90."
vectors = ops.embedding(
    model.params["shared"]["weight"], rng.choice(np.arange(3, 5000), P, replace=False)
)
text = " ".join(
    ["The band played two songs, and then the rain came down on all of us."] * 12
)


def states(prompt, layer):
    """The hidden states (words, d_model) of the text behind a layer of the encoder."""
    values = tp.intermediates(model, tp.Prompt({tp.PROMPT: prompt}), text)
    return values[f"encoder.block.{layer}.layer.0.hidden_states"][0, P:]


def change(layer):
    """How far each word's state moves if the vectors of the prompt change places,
    relative to its length."""
    straight, mixed_up = states(vectors, layer), states(rng.permutation(vectors), layer)
    return np.linalg.norm(straight - mixed_up, axis=-1) / np.linalg.norm(
        straight, axis=-1
    )


first, final = change(0), change(c.num_layers - 1)
fig, axes = figure()
axes.semilogy(first, label="behind the first attention", markevery=10)
axes.semilogy(final, label=f"behind the last, number {c.num_layers}", markevery=10)
axes.axvline(first_bag, color="0.6", ls="--", marker="", lw=1)
axes.annotate(f"word {first_bag}", (first_bag + 2, 1e-5), color="0.4")
axes.set(
    xlabel="index of the word",
    ylabel="relative change of its state",
    title="A shuffled prompt",
)
axes.legend(loc="center left")
plt.show()
for name, moved in (("first", first), ("last", final)):
    near, far = moved[:first_bag].mean(), moved[first_bag:].mean()
    print(
        f"behind the {name} attention: words before {first_bag} "
        f"move by {near:.0e}, later ones by {far:.0e}"
    )

# %% [markdown]
# The first attention does what the derivation says. From word 90 on, the change falls
# to the rounding of float32.
#
# The last one does not, and it is worth a moment to see why. Behind the first layer,
# *the vectors of the prompt have looked at each other*, and the first words have looked
# at them. Those are near enough to tell the order, and later layers can carry it on to
# every word. So a prompt can have an order, but its vectors have to work it out among
# themselves. Keep this in mind when lesson 5 compares long prompts with short ones.

# %% [markdown]
# ## Exercises
#
# **Exercise 1.** Write attention yourself, in NumPy alone. Shapes: queries
# `(..., T, K)`, keys and values `(..., L, K)`, bias `(..., T, L)`. The axes in front,
# such as rows and heads, are independent of each other. `keys.mT` swaps the last two
# axes. Subtract the largest score of each row before `exp`: the softmax is the same,
# and no number overflows.

# %% tags=["exercise-1"]


def my_attention(queries, keys, values, bias):
    """The weighted means of the values, (..., T, K)."""
    ...  # your turn


# %%
@check("Exercise 1", my_attention, lambda q, k, v, bias: q)
def _(mine):
    q, k, v, b = (rng.normal(size=shape) for shape in ((3, 4), (6, 4), (6, 4), (3, 6)))
    ones = np.ones((6, 4))
    hint = "a mean of ones is 1: do the weights of a row sum to 1?"
    yield np.allclose(mine(q, k, ones, b), 1), hint
    hidden = np.where(np.arange(6) == 2, 0, -1e9) + np.zeros((3, 1))
    hint = "if the bias hides all words but one, the result is its value"
    yield np.allclose(mine(q, k, v, hidden), v[2]), hint
    right = t5.attend(q[None, None], k[None, None], v[None, None], 0 * b)[0, 0]
    hint = "without a bias, the weights are not those of q k'"
    yield np.allclose(mine(q, k, v, 0 * b), right), hint
    right = t5.attend(q[None, None], k[None, None], v[None, None], b)[0, 0]
    hint = "without a bias it is right, with a bias it is not: how often is it added?"
    yield np.allclose(mine(q, k, v, b), right), hint
    large = mine(100 * q, 100 * k, v, b)
    yield np.isfinite(large).all(), "large scores overflow: subtract the largest first"
    q, k, v, b = (np.stack([x, 2 * x, -x])[:, None] for x in (q, k, v, b))
    hint = "one row is right, several rows and heads are not: which axes are swapped?"
    yield np.allclose(mine(q, k, v, b), t5.attend(q, k, v, b)), hint


# %% [markdown]
# **Exercise 2.** A model may have a table of another size. Write
# `last_bucket(num_buckets, max_distance)` for an encoder: the smallest distance from
# which on all words that come before share one bucket. You may call
# `t5.relative_position_bucket`.

# %% tags=["exercise-2"]


def last_bucket(num_buckets, max_distance):
    """The smallest distance in the last bucket."""
    ...  # your turn


# %%
@check("Exercise 2", last_bucket, 0)
def _(mine):
    for table in ((32, 128), (32, 64), (64, 256), (8, 20)):
        start = mine(*table)
        near, here = t5.relative_position_bucket(
            -np.array([start - 1, start]), True, *table
        )
        yield (
            here == table[0] // 2 - 1,
            f"of {table}: distance {start} is in bucket {here}, which is not the last",
        )
        yield near < here, f"of {table}: distance {start - 1} is in that bucket too"


# %% [markdown]
# **Exercise 3.** A decoder must not look ahead. Its bias *hides* later words. Write it:
# `(T, T)`, 0 where word $i$ may see word $j$, and -1e9 where it may not. A word may see
# itself.

# %% tags=["exercise-3"]


def causal_bias(length):
    """An additive bias that hides from each word the words after it."""
    ...  # your turn


# %%
@check("Exercise 3", causal_bias, lambda n: np.zeros((n, n)))
def _(mine):
    bias = mine(5)
    yield np.shape(bias) == (5, 5), f"expected the shape (5, 5), found {np.shape(bias)}"
    q, k, v = rng.normal(size=(3, 1, 1, 5, 4))
    later = v + np.array([0, 0, 0, 100, 0])[:, None]  # word 3 says something else
    moved = (
        np.abs(t5.attend(q, k, later, bias) - t5.attend(q, k, v, bias))[0, 0].max(-1)
        > 1e-6
    )
    yield (
        not moved[:3].any(),
        f"word {int(moved.argmax())} changes if word 3 does: it looks ahead",
    )
    yield moved[3], "word 3 does not see itself"
    yield moved[4], "word 4 does not see word 3, which came before"


# %% [markdown]
# [Solutions, and a common mistake for
# each](solutions/02_attention_and_relative_positions.py)
#
# ## What holds

# %%
assert np.allclose(mixed, shuffled)
assert last == 91 and first_bag == 90 == last - 1
assert kinds[0] == 15 and (seen[0] == 15).sum() == 10
assert kinds[0] > kinds[50] > kinds[89] >= 2
assert first[:first_bag].mean() > 1e-4
assert first[first_bag:].max() < 1e-5
assert final[first_bag:].mean() > 1e-3
