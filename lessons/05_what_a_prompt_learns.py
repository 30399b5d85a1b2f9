# %% [markdown]
# # 5 What a prompt learns
#
# **You need:** a tuned prompt (lesson 4), and why far words see a prompt as a bag
# (lesson 2). **Time:** 15 minutes to read, less than 90 seconds to run on two cores.
#
# A tuned prompt is a table of numbers. Can you *read* it? The paper looks up the
# nearest words of each vector and finds tight groups, such as {Technology, technology,
# Technologies}. That is tempting to interpret. In this lesson you do the same, and then
# the experiment that should follow every tempting picture: change the thing, and see
# whether it matters.
#
# After that, two questions of the paper in miniature: does it matter where the vectors
# begin, and how many there are?

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from classroom import BLUE, DEMO, GREY, ORANGE, check, diagram, figure

import tinyprompt as tp
from tinyprompt import PROMPT, methods, nearest_pieces

model = tp.load("small")
rows, dev, test = (
    tp.read_rows(DEMO / f"topic.{part}.tsv") for part in ("train", "dev", "test")
)
words = tp.label_words(rows)
settings = tp.Settings(
    steps=120,
    prompt_length=20,
    batch_size=16,
    optimizer="adam",
    schedule="linear",
    eval_every=20,
)


def unit(vectors):
    """Vectors of length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def tune(**changes):
    """The last Progress of a run with some settings changed."""
    *_, last = tp.run(model, rows, dev, settings, **changes)
    return last


def begin(**changes):
    """The first vectors of such a run, (P, d_model)."""
    return methods.init_params(model, replace(settings, **changes), words)[PROMPT]


# %% alt="A tuned vector: its nearest words are a story; a change and a score, a test."
diagram(
    {
        "vector": ("tuned vector", 0.5, 0, BLUE),
        "words": ("nearest words", 0, 1, GREY),
        "change": ("another length,\norder or word", 1, 1, ORANGE),
        "story": ("a story", 0, 2, GREY),
        "test": ("accuracy before\nand after", 1, 2, ORANGE),
    },
    [
        ("vector", "words", GREY),
        ("vector", "change", ORANGE),
        ("words", "story", GREY),
        ("change", "test", ORANGE),
    ],
    height=3.4,
)
plt.show()

# %% [markdown]
# ## Length and direction
#
# A vector has a length and a direction. We tune a prompt of 20 vectors and compare
# three sets: the words of the vocabulary, the vectors before the first step, the
# vectors after the last one.

# %%
table = model.params["shared"]["weight"][: len(model.tokenizer)]
first, last = begin(), tune()
tuned = last.prompt.array
norms = {
    "words of the vocabulary": table,
    "prompt, first vectors": first,
    "prompt, tuned": tuned,
}
norms = {name: np.linalg.norm(vectors, axis=1) for name, vectors in norms.items()}
for name, found in norms.items():
    print(f"{name:24} {len(found):6} vectors, mean length {found.mean():5.1f}")
turned = (unit(tuned) * unit(first)).sum(1)
print(
    "cosine between a vector's first and last value: "
    f"{turned.mean():.2f} in the mean, {turned.min():.2f} at least"
)

# %% [markdown]
# Tuning has made the vectors longer and has turned them by some 40 degrees (a cosine of
# 1 would be no turn, 0 a right angle). In a space of 96 dimensions that is less than it
# sounds. Two random directions are nearly at a right angle, so a vector that has turned
# by 40 degrees is still far closer to where it began than to almost anything else.
#
# ## Nearest words
#
# The **cosine** of two vectors compares their directions:
#
# $$\cos(a, b) = \frac{a \cdot b}{\lVert a \rVert\, \lVert b \rVert}$$

# %%


def nearest(vectors, k=3):
    """The k nearest words of each vector, and the cosine to the first of them."""
    ids, cosines = nearest_pieces(vectors, table, k)
    return [[model.tokenizer.piece(i) for i in row] for row in ids.tolist()], cosines[
        :, 0
    ]


read, cosines = nearest(tuned)
began, _ = nearest(first)
for i in range(0, 20, 2):
    print(
        f"vector {i:2}  began as {began[i][0]:12} now "
        f"near {', '.join(read[i]):36} {cosines[i]:.2f}"
    )
stayed = sum(now[0] == before[0] for now, before in zip(read, began, strict=True))
_, by_chance = nearest(np.random.default_rng(0).normal(size=tuned.shape))
print(
    f"{stayed} of 20 are nearest to the word they "
    f"began as; mean cosine {cosines.mean():.2f}",
    end="; ",
)
print(f"random vectors have {by_chance.mean():.2f}")

# %% [markdown]
# Many are tight groups of related words, as in the paper: *music, song, songs*. And the
# label words are there. (We print every second vector; *money* and *nature* are between
# these.) Has the prompt learned to say "food, money, music, nature, sport"?
#
# Look at the last line before you believe it. Every vector is nearest to the word *it
# began as*. The label words are there because we put them there. *Friendly* and
# *assistance* are there because chance put them there.
#
# ## Read it aloud
#
# So here is the experiment. If the meaning of a prompt lies in its nearest words, then
# we may replace each vector by its nearest word and lose little. And while we are at
# it: scale all vectors, and change their order.
#
# **Guess before you run:** which change costs most: twice the length, ten times the
# length, another order, or the nearest words?

# %% alt="Lengths of vectors, and the test accuracy of changed prompts."


def accuracy(vectors):
    """Test accuracy with these vectors as the prompt."""
    return tp.evaluate(
        model,
        replace(last.prompt, params={PROMPT: np.asarray(vectors, np.float32)}),
        test,
    ).mean


rng = np.random.default_rng(1)
ids, _ = nearest_pieces(tuned, table, 1)
variants = {
    "tuned": tuned,
    "twice as long": 2 * tuned,
    "half as long": 0.5 * tuned,
    "ten times as long": 10 * tuned,
    "another order": rng.permutation(tuned),
    "read aloud: nearest words": table[ids[:, 0]],
    "first vectors": first,
}
scores = {name: accuracy(vectors) for name, vectors in variants.items()}
none = tp.evaluate(model, tp.Prompt(label_words=words), test).mean
fig, (left, right) = figure(2, width=9, height=3.2)
bins = np.linspace(5, 40, 36)
for (name, found), style in zip(norms.items(), ("0.85", "0.5", "0.1"), strict=True):
    left.hist(
        found,
        bins,
        density=True,
        color=style,
        edgecolor="black",
        lw=0.4,
        alpha=0.8,
        label=name,
    )
left.set(
    xlabel="length of a vector", ylabel="density", title="Tuned vectors are longer"
)
left.set_ylim(0, 0.42)
left.legend(fontsize=8)
right.barh(list(scores), list(scores.values()), color="0.75", edgecolor="black")
right.axvline(none, color="#D55E00", ls="--", marker="", label="no prompt")
right.invert_yaxis()
right.set(
    xlabel="test accuracy", title="What may be changed, and what not", xlim=(0, 1)
)
right.legend(loc="lower right")
plt.show()
for name, score in scores.items():
    print(f"{name:26} {score:.3f}")
print(f"{'no prompt':26} {none:.3f}")

# %% [markdown]
# (The standard error of an accuracy on 200 rows is about 0.03. So the lead of the tuned
# prompt over no prompt is within chance for a model as small as this. Its lead over its
# own first vectors, 0.095, is two standard errors of a difference, and that is the one
# we ask about.)
#
# - **Length** hardly matters within a factor of two. Lesson 3 said why: attention reads
#   the vectors through a norm. Ten times as long is too much: what the layers add is
#   then lost beside it.
# - **Order** seems to matter (we tried one other), although lesson 2 warned that far
#   words cannot see it. These texts are short, and so is the prompt.
# - **The nearest words say nothing that the first vectors did not say.** Read aloud,
#   the prompt is as good as at its start, because it *is* the start. What was learned
#   here lies in the part of the vectors that no nearest word names.
#
# The paper reports this too: label words persist as neighbours of the vectors that
# began as them. Such neighbours show where a prompt comes from. To learn what it does,
# change it and measure.
#
# But the paper reports a second thing: label words also become neighbours of vectors
# that began as *something else*. That would be learned, and the next section has the
# runs to look for it.

# %% [markdown]
# ## Where to begin, and how many
#
# The paper compares three beginnings: embeddings of the **label words**, of words
# sampled from the **vocabulary**, and **uniform** random numbers. And it compares
# lengths, from 1 to 150 vectors. Here are both, with two seeds each.
#
# **Guess before you run:** a prompt begins with uniform random numbers. How many of its
# 20 vectors have a label word among their three nearest words before training, and how
# many after it?

# %% alt="Dev loss for three beginnings, and test accuracy for four lengths."
seeds = (0, 1)
inits = {
    "labels": [last, tune(init="labels", seed=1)],
    "vocab": [tune(init="vocab", seed=seed) for seed in seeds],
    "uniform": [tune(init="uniform", seed=seed) for seed in seeds],
}
lengths = {
    P: inits["labels"]
    if P == 20
    else [tune(prompt_length=P, seed=seed) for seed in seeds]
    for P in (1, 5, 20, 60)
}


def curve(runs):
    """Steps, and the loss on the dev rows, mean of the seeds."""
    return runs[0].state.scores[:, 0], np.mean(
        [run.state.scores[:, 2] for run in runs], 0
    )


def tested(runs):
    """Test accuracy of each run."""
    return [tp.evaluate(model, run.prompt, test).mean for run in runs]


def near_a_label(vectors):
    """How many vectors have a label word among their three nearest words."""
    return sum(not set(words).isdisjoint(found) for found in nearest(vectors)[0])


of_init = {init: tested(runs) for init, runs in inits.items()}
of_length = {P: tested(runs) for P, runs in lengths.items()}
fig, (left, right) = figure(2, width=9, height=3.4)
for init, runs in inits.items():
    left.plot(*curve(runs), label=init)
left.set(
    xlabel="step",
    ylabel="dev loss (nats per token)",
    title="Where the vectors begin",
    yscale="log",
)
left.legend()
right.plot(
    list(of_length),
    [np.mean(found) for found in of_length.values()],
    label="mean of two seeds",
)
for P, found in of_length.items():
    right.plot([P] * len(found), found, color="0.5", ls="", marker="_", ms=9)
right.axhline(none, color="#D55E00", ls="--", marker="", label="no prompt")
right.set(
    xlabel="vectors of the prompt",
    ylabel="test accuracy",
    title="How many there are",
    xscale="log",
)
right.set_xticks(list(of_length), [str(P) for P in of_length], minor=False)
right.minorticks_off()
right.set_ylim(0.4, 0.8)
right.legend()
plt.show()
for name, found in (of_init | of_length).items():
    print(f"{name!s:8} test accuracy {' and '.join(f'{score:.3f}' for score in found)}")
came = {
    init: [
        (near_a_label(begin(init=init, seed=seed)), near_a_label(run.prompt.array))
        for seed, run in zip(seeds, runs, strict=True)
    ]
    for init, runs in inits.items()
}
for init, found in came.items():
    print(
        f"{init:8} vectors near a label word: "
        f"{' and '.join(f'{a} before, {b} after' for a, b in found)}, of 20"
    )
aloud = [
    accuracy(table[nearest_pieces(run.prompt.array, table, 1)[0][:, 0]])
    for run in inits["uniform"]
]
print(
    "uniform  read aloud: test accuracy "
    f"{' and '.join(f'{score:.3f}' for score in aloud)}"
)

# %% [markdown]
# The beginnings differ at step 0 and hardly at the end: as far as the loss can tell,
# all three runs have forgotten where they came from. In the paper, label words are
# clearly better for small models, and the gap vanishes for the largest. This task does
# not show the gap, and one task is not enough to deny it. In a longer study of ours
# ([docs/studies.md](../docs/studies.md)), label words lead on the other task of the
# demo, *sentiment*. A miniature can fail to show an effect that is real.
#
# Now the last four lines. Of the vectors that began as uniform numbers, none was near a
# label word. After training, most are, and nobody put them there. So label words *are*
# learned, as the paper says. The vectors that began as label words could not show it:
# there, what was learned looks just like what was put in. But even now, the words are
# not the whole: read aloud, these prompts are far worse than as they were tuned. Two
# lessons in one: **before you read a result, ask how it would look if nothing had been
# learned; and before you trust the reading, put it to use.**
#
# Among the lengths, one vector scores lowest. From five on, the differences drown in
# the noise of two seeds. The paper, too, finds little gain beyond 20, and its largest
# model does well with a single one.

# %% [markdown]
# ## Exercises
#
# **Exercise 1.** Find the nearest word: for one vector `(D,)` and a table `(V, D)`, the
# number of the row with the greatest cosine.

# %% tags=["exercise-1"]


def nearest_row(vector, table):
    """The row of the table whose direction is closest to the vector's."""
    ...  # your turn


# %%
@check("Exercise 1", nearest_row, 0)
def _(mine):
    rng = np.random.default_rng(0)
    words = rng.normal(size=(50, 16)) * np.geomspace(0.1, 10, 50)[:, None]
    for i in (0, 20, 49):
        yield (
            int(mine(words[i], words)) == i,
            f"row {i} is not nearest to itself; a long row must not win by its length",
        )
    yield int(mine(-words[7], words)) != 7, "the opposite direction is not near"
    v = rng.normal(size=16)
    yield (
        int(mine(v, words)) == int(mine(100 * v, words)),
        "the length of the vector changes the answer",
    )


# %% [markdown]
# **Exercise 2.** A long prompt often says things twice. Count the vectors that have a
# *twin*: another vector of the prompt with a cosine above 0.99.

# %% tags=["exercise-2"]


def with_a_twin(prompt):
    """How many vectors of a prompt (P, D) have a cosine above 0.99 to another one."""
    ...  # your turn


# %%
@check("Exercise 2", with_a_twin, 0)
def _(mine):
    rng = np.random.default_rng(0)
    three = rng.normal(size=(3, 16))
    found = int(mine(three))
    yield (
        found == 0,
        "three random vectors have no twins, you "
        f"count {found}: nobody is a twin of oneself",
    )
    twins = np.concatenate([three, 5 * three[:1]])
    yield int(mine(twins)) != 1, "if a has the twin b, then b has the twin a"
    yield (
        int(mine(twins)) == 2,
        f"a vector and five times the same are twins: 2, you count {int(mine(twins))}",
    )
    yield (
        int(mine(np.concatenate([three, -three]))) == 0,
        "opposite vectors are no twins",
    )
    count = int(mine(np.concatenate([twins, 2 * three[:1]])))
    yield (
        count == 3,
        f"three times the same direction: 3 vectors have a twin, you count {count}",
    )


# %% [markdown]
# **Exercise 3.** A label word may have several pieces. The paper begins with the *mean*
# of their embeddings. Write it. `ids` is what the tokenizer gives for the word, which
# ends with the mark 1 for "end of text".

# %% tags=["exercise-3"]


def label_vector(table, ids):
    """The first vector (D,) for a label word."""
    ...  # your turn


# %%
@check("Exercise 3", label_vector, lambda table, ids: table[0])
def _(mine):
    rows = np.arange(20.0)[:, None] * np.ones(4)
    yield (
        np.shape(mine(rows, [7, 1])) == (4,),
        f"expected one vector (4,), found {np.shape(mine(rows, [7, 1]))}",
    )
    yield (
        (mine(rows, [7, 1]) == 7).all(),
        "a word of one piece begins as this piece: is the end mark part of a word?",
    )
    yield (
        (mine(rows, [6, 8, 10, 1]) == 8).all(),
        "of pieces 6, 8 and 10 the mean is wanted",
    )
    word = begin()[1]
    yield (
        np.allclose(mine(table, model.tokenizer.encode(words[1])), word),
        f"{words[1]!r} begins elsewhere",
    )


# %% [markdown]
# [Solutions, and a common mistake for each](solutions/05_what_a_prompt_learns.py)
#
# ## What holds

# %%
assert (
    norms["prompt, tuned"].mean()
    > norms["words of the vocabulary"].mean()
    > norms["prompt, first vectors"].mean()
)
assert 0.7 < turned.mean() < 0.85  # 45 to 32 degrees
assert stayed == 20
assert cosines.mean() > by_chance.mean() + 0.3
assert scores["tuned"] > scores["read aloud: nearest words"] + 0.04
assert abs(scores["read aloud: nearest words"] - scores["first vectors"]) < 0.03
assert abs(scores["twice as long"] - scores["tuned"]) < 0.06
assert scores["ten times as long"] < scores["tuned"] - 0.1
assert scores["another order"] < scores["tuned"]
at_start, at_end = (
    np.ptp([curve(runs)[1][at] for runs in inits.values()]) for at in (0, -1)
)
assert at_end < at_start / 3
assert all(before == 0 and after >= 10 for before, after in came["uniform"])
assert max(aloud) < min(of_init["uniform"]) - 0.1
assert max(of_length[1]) < np.mean([of_length[P] for P in (5, 20, 60)])
