# %% [markdown]
# # 9 One frozen model, many tasks
#
# **You need:** attention masks (lesson 3), a tuned prompt (lesson 4) and other methods
# (lesson 7). **Time:** 15 minutes to read, less than 90 seconds to run on two cores.
#
# Lesson 7 ended with a promise. A prompt is not the method that learns most, nor the
# fastest. But it is *part of the input*, and the model behind it stays the same for
# everybody. Many tasks can then share one model, and even one batch. Several prompts of
# one task can vote. And the paper claims a third thing: that a prompt carries over
# better to texts of another kind. You will measure all three. The first one holds to
# rounding, the second one disappoints, and the third one our models are too small to
# show.

# %%
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
from classroom import BLUE, DEMO, GREY, ORANGE, check, diagram, figure

import tinyprompt as tp
from tinyprompt import methods, ops, t5

model = tp.load("small")
settings = tp.Settings(
    steps=120,
    prompt_length=20,
    batch_size=16,
    optimizer="adam",
    schedule="linear",
    eval_every=40,
)
rows = {
    (task, part): tp.read_rows(DEMO / f"{task}.{part}.tsv")
    for task in ("topic", "sentiment")
    for part in ("train", "dev", "test")
}


def tune(task, **changes):
    """A prompt, or another method's arrays, tuned on a task of the demo."""
    found, dev = rows[task, "train"], rows[task, "dev"]
    return tp.tune(model, found, dev, settings, progress=False, **changes).prompt


topic = [tune("topic", seed=seed) for seed in (0, 1, 2)]
sentiment = [tune("sentiment", seed=seed) for seed in (0, 1)]
print(topic[0], sentiment[0], sep="\n")

# %% alt="Rows with prompts of two tasks share a batch and a model; answers differ."
diagram(
    {
        "topic": ("topic prompt\nand a text", 0, 0, BLUE),
        "mood": ("sentiment prompt\nand a text", 1, 0, ORANGE),
        "model": ("one batch,\none frozen model", 0.5, 1, GREY),
        "sport": ("sport", 0, 2, BLUE),
        "bad": ("bad", 1, 2, ORANGE),
    },
    [
        ("topic", "model", BLUE),
        ("mood", "model", ORANGE),
        ("model", "sport", BLUE),
        ("model", "bad", ORANGE),
    ],
    height=3.4,
)
plt.show()

# %% [markdown]
# ## One batch, two tasks
#
# Each row of a batch brings its own prompt. The vectors stand directly in front of the
# row's words, and all padding is at the end, where the attention mask hides it:
#
# | | | | | | | |
# | --- | --- | --- | --- | --- | --- | --- |
# | row 1 | topic | topic | topic | Two | goals | - |
# | row 2 | sentiment | sentiment | The | soup | was | cold |
#
# Why padding at the end? T5 knows positions only as *distances* (lesson 2). If the
# padding stood between the prompt and the words, the distances would depend on the
# longest row of the batch, and so would the answers. A row must not notice its
# neighbours.

# %%
asked = [
    (topic[0], "Two goals in the last minute."),
    (sentiment[0], "The soup was cold, and nobody cared."),
    (topic[0], "The soup was cold, and nobody cared."),
    (sentiment[0], "Two goals in the last minute."),
]
mixed = tp.answer(model, asked)
alone = [tp.answer(model, [row])[0] for row in asked]
for (prompt, text), answer in zip(asked, mixed, strict=True):
    task = "topic" if prompt is topic[0] else "sentiment"
    print(f"{task:10}{text:38} {answer.text:8}{answer.probabilities[answer.text]:.2f}")
apart = max(
    abs(a.probabilities[word] - b.probabilities[word])
    for a, b in zip(mixed, alone, strict=True)
    for word in a.probabilities
)
print(f"largest difference of a probability from that of the row alone: {apart:.0e}")

# %% [markdown]
# The same text got two different answers in one batch, from two tasks that know nothing
# of each other.
#
# ## What it saves
#
# A tuned copy for each task takes the whole model each time. With prompts there is one
# model and a small file for each task. We count bytes for the T5 1.1 XXL of the paper,
# at 4 bytes a number.

# %% alt="Storage against the number of tasks, for whole models and for prompts."
xxl = tp.config.T5_1_1["xxl"]
whole = 4 * methods.count(xxl, tp.Settings(method="full")).stored
small = 4 * methods.count(xxl, tp.Settings(prompt_length=100)).stored
tasks = np.array([1, 3, 10, 30, 100, 300, 1000])
fig, axes = figure(height=3.1)
axes.loglog(tasks, tasks * whole / 1e9, label="a tuned model for each task")
axes.loglog(
    tasks, (whole + tasks * small) / 1e9, label="one model, a prompt of 100 for each"
)
axes.set(xlabel="number of tasks", ylabel="storage (gigabytes)", title="T5 1.1 XXL")
axes.legend()
plt.show()
print(
    f"the model: {whole / 1e9:.1f} GB; a prompt: {small / 1e6:.1f} MB; "
    f"a thousand tasks: {1000 * whole / 1e12:.1f} TB "
    f"or {(whole + 1000 * small) / 1e9:.1f} GB"
)

# %% [markdown]
# A thousand prompts take less room than one spare copy of the model. What counts in
# practice is not the disk but the *memory of the machine that answers*: it holds one
# model, and any row of any task can be next.
#
# ## Prompts that vote
#
# Ensembles are an old trick. Train several models, let them vote, and errors that are
# not shared are outvoted. With whole models that is expensive. With prompts it is one
# batch, in which each text appears several times. Three prompts for the topics, which
# differ only in their seed:
#
# **Guess before you run:** is the vote better than the average of its three voters?

# %%
test = rows["topic", "test"]
texts, targets = [row.input for row in test], [row.target for row in test]


def accuracy(answers):
    """The share of right answers to the test rows."""
    return float(
        np.mean(
            [found == target for found, target in zip(answers, targets, strict=True)]
        )
    )


votes = tp.ensemble(model, topic, texts)
each = [accuracy(answers) for answers in votes.each]
together = {
    "majority": accuracy(votes.majority),
    "mean probability": accuracy(votes.mean),
}
agree = np.mean(
    [
        np.mean([x == y for x, y in zip(a, b, strict=True)])
        for a, b in combinations(votes.each, 2)
    ]
)
shared = np.mean(
    [all(a != t for a in found) for *found, t in zip(*votes.each, targets, strict=True)]
)
alike = (1 - np.mean(each)) ** 3  # if their errors had nothing to do with each other
print(
    "each alone:",
    ", ".join(f"{score:.3f}" for score in each),
    f"  average {np.mean(each):.3f}",
)
print(", ".join(f"{name} {score:.3f}" for name, score in together.items()))
print(f"two prompts give the same answer to {100 * agree:.0f} % of the texts")
print(
    f"all three are wrong on {100 * shared:.0f} %; "
    f"independent ones would be on {100 * alike:.0f} %"
)

# %% [markdown]
# What could one hope for? If three voters are right with probability $p$ *independently
# of each other*, then (with two answers to choose from) most of them are right with
# probability $p^3 + 3 p^2 (1 - p)$. For $p = 0.65$ that is $0.72$. But the prompts are
# not independent. They share the frozen model, and its errors: they are all wrong far
# more often than independent ones would be, and no vote can help there. So here the
# vote is no better than the average of its voters, as far as 200 texts can say. Its
# merit is that one need not know which voter is the best. In the paper, the vote of
# five prompts beats even the best of them (its table 3): on average they have 90.5
# points on SuperGLUE, the best has 91.0, the vote 91.3. Its model makes few errors, and
# the prompts do not share all of them.
#
# ## Other texts than those it was tuned on
#
# The third claim. If all weights are tuned on film reviews, the model may learn things
# that are only true of films. A prompt has fewer ways to do so. The paper tests six
# sets of questions from elsewhere (table 1 there): prompt tuning leads on four, by up
# to 12.5 points, and is up to 1.8 behind on two. We tune on film reviews, and test on
# film reviews and on *restaurant* reviews.
#
# **Guess before you run:** which of the two gains more on restaurants, compared with
# the frozen model?

# %% alt="Accuracy of three prompts and their vote; of films and of restaurants."
restaurants = tp.read_rows(DEMO / "sentiment.restaurants.tsv")
films = rows["sentiment", "test"]
full = [
    tune("sentiment", seed=seed, method="full", optimizer=None, schedule="constant")
    for seed in (0, 1)
]
bare = [tp.Prompt(label_words=("bad", "good"))]
scores = {
    name: [
        [tp.evaluate(model, one, part).mean for part in (films, restaurants)]
        for one in tuned
    ]
    for name, tuned in (
        ("model tuning", full),
        ("prompt tuning", sentiment),
        ("frozen model", bare),
    )
}

fig, (left, right) = figure(2, width=9, height=3.4)
shown = (
    {f"prompt {i}": score for i, score in enumerate(each)}
    | {"average": np.mean(each)}
    | together
)
chance = [np.sqrt(score * (1 - score) / len(test)) for score in shown.values()]
left.errorbar(list(shown.values()), list(shown), xerr=chance, ls="", ms=6, capsize=3)
left.invert_yaxis()
left.set(
    xlabel="test accuracy on topics, one standard error",
    title="Three prompts, and their vote",
)
for name, found in scores.items():
    right.plot([0, 1], np.mean(found, 0), label=name)
    colour = right.lines[-1].get_color()
    for one in found:
        right.plot([0, 1], one, color=colour, lw=0.5, ls=":", marker="")
right.set_xticks([0, 1], ["films\n(tuned on)", "restaurants\n(never seen)"])
right.set(
    ylabel="test accuracy",
    xlim=(-0.2, 1.2),
    ylim=(0.5, 0.85),
    title="Another kind of review",
)
right.legend(fontsize=8, loc="lower right")
plt.show()
for name, found in scores.items():
    print(
        f"{name:14} films {np.mean(found, 0)[0]:.3f}, "
        f"restaurants {np.mean(found, 0)[1]:.3f}"
    )
gain = {
    name: np.mean(found, 0) - scores["frozen model"][0]
    for name, found in scores.items()
}
for name in ("model tuning", "prompt tuning"):
    print(
        f"gain of {name} over the frozen model: "
        f"{gain[name][0]:+.3f} and {gain[name][1]:+.3f}"
    )

# %% [markdown]
# Model tuning has learned from films, and little of its gain is left on restaurants, as
# if most of what it learned was about films. That fits the paper's story, as far as 200
# rows can say.
#
# But look at the prompt. On films, it is no better than the frozen model (a standard
# error of one accuracy is 0.03), and on restaurants all three are within chance of each
# other. A method that has learned nothing has nothing to lose, and nothing can be said
# about what it would have kept. In the paper, prompt and model tuning are level on the
# field that they are tuned on, and *then* the comparison elsewhere means something.
# **Before you ask whether a method generalises, ask whether it has learned.**

# %% [markdown]
# ## Exercises
#
# **Exercise 1.** Put two rows of different length into one batch. `prompts` is a list
# of arrays `(P_i, D)`, `texts` a list of arrays `(L_i, D)`. Return vectors `(B, S, D)`
# and the mask `(B, S)`, `S` as small as possible.

# %% tags=["exercise-1"]


def batch_of(prompts, texts):
    """Vectors (B, S, D), zeros where nothing is, and the mask (B, S), float32."""
    ...  # your turn


# %%
def one_batch(prompts, texts):
    """What the result is like."""
    places = (
        len(texts),
        max(len(p) + len(w) for p, w in zip(prompts, texts, strict=True)),
    )
    return np.zeros((*places, texts[0].shape[1])), np.zeros(places)


@check("Exercise 1", batch_of, one_batch)
def _(mine):
    table = model.params["shared"]["weight"]
    words = [
        ops.embedding(table, np.array(model.tokenizer.encode(text)))
        for text in ("Two goals.", "Cold, cold soup.")
    ]
    prompts = [topic[0].array, sentiment[0].array[:7]]
    x, mask = mine(prompts, words)
    lengths = [len(p) + len(w) for p, w in zip(prompts, words, strict=True)]
    yield (
        x.shape == (2, max(lengths), 96),
        f"expected vectors of the shape {(2, max(lengths), 96)}, found {x.shape}",
    )
    yield (
        (mask.sum(1) == lengths).all(),
        f"rows of {lengths} places; your mask shows {mask.sum(1).astype(int).tolist()}",
    )
    states, _ = t5.encode(model.params, model.config, x, mask)
    for i, (p, w) in enumerate(zip(prompts, words, strict=True)):
        one = np.concatenate([p, w])[None]
        right, _ = t5.encode(
            model.params, model.config, one, np.ones(one.shape[:2], np.float32)
        )
        same = np.allclose(states[i][mask[i] > 0], right[0], atol=1e-3)
        yield (
            same,
            f"row {i} is not what it is alone: has a "
            "distance between a vector and a word changed?",
        )


# %% [markdown]
# **Exercise 2.** Let prompts vote. `answers` is a list of the answers of each prompt to
# *one* text. Of answers with equally many votes, the one that was named first wins.

# %% tags=["exercise-2"]


def vote(answers):
    """The answer of the majority."""
    ...  # your turn


# %%
@check("Exercise 2", vote, "")
def _(mine):
    yield mine(["food"]) == "food", "one voter decides alone"
    yield (
        mine(["food", "money", "money"]) == "money",
        "two for money and one for food is money",
    )
    ties = (
        ["sport", "food"],
        ["food", "sport"],
        ["nature", "money", "food", "money", "nature"],
    )
    for tie in ties:
        yield (
            mine(tie) == tie[0],
            f"of {tie}, {tie[0]!r} was named first, you say {mine(tie)!r}",
        )


# %% [markdown]
# **Exercise 3.** Write the probability that most of $n$ independent voters are right,
# for odd $n$ and two answers to choose from. Each is right with probability `p`. (After
# `import math`, `math.comb(n, k)` counts the ways to choose $k$ of $n$.)

# %% tags=["exercise-3"]


def majority_right(p, n):
    """The probability that more than half of n independent voters are right."""
    ...  # your turn


# %%
@check("Exercise 3", majority_right, 0.0)
def _(mine):
    yield np.isclose(mine(0.65, 1), 0.65), "one voter is a majority of one"
    yield (
        np.isclose(mine(0.5, 5), 0.5),
        "five who toss a coin are right half of the time",
    )
    yield (
        np.isclose(mine(0.65, 3), 0.65**3 + 3 * 0.65**2 * 0.35),
        "for three voters the text has the formula",
    )
    drawn = np.random.default_rng(0).random((200_000, 7)) < 0.6
    often = (drawn.sum(1) > 3).mean()
    yield (
        abs(mine(0.6, 7) - often) < 0.01,
        f"of seven voters at p = .6, drawn at random, most are right in {often:.2f}",
    )


# %% [markdown]
# [Solutions, and a common mistake for each](solutions/09_one_model_many_tasks.py)
#
# ## What holds

# %%
assert apart < 1e-5
assert mixed[0].text == "sport" and mixed[2].text == "food"
assert mixed[1].text in ("bad", "good") and set(mixed[3].probabilities) == {
    "bad",
    "good",
}
assert 44 < whole / 1e9 < 45 and small == 4 * 409_600 and 1000 * small < whole
assert round(0.65**3 + 3 * 0.65**2 * 0.35, 2) == 0.72
assert agree > 0.6 and shared > 2 * alike
assert abs(together["majority"] - np.mean(each)) < 0.03
assert gain["model tuning"][0] > 0.05
assert gain["model tuning"][1] < 0.8 * gain["model tuning"][0]
assert abs(gain["prompt tuning"]).max() < 0.06
