# %% [markdown]
# # 4 Frozen weights, flowing gradients: the first soft prompt
#
# **You need:** the gradient of a loss (lesson 1) and teacher forcing (lesson 3).
# **Time:** 15 minutes to read, less than 90 seconds to run on two cores.
#
# A language model can be asked in words: "What is this about? ..." The words are a
# prompt, and finding good ones is a guessing game: there is no word a little beside
# another one, so there is no slope to follow. The idea of prompt tuning is to drop the
# words and keep the *vectors*. Put $P$ free vectors in front of the embedded text.
# Vectors can be moved a little, so the loss has a gradient with respect to them. Move
# them downhill. Leave the model as it is.
#
# In this lesson you do exactly that, first one step by hand, then a whole run.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from classroom import BLUE, DEMO, GREY, HATCHES, ORANGE, check, diagram, figure, seconds

import tinyprompt as tp
from tinyprompt import PROMPT, data, methods, ops, t5, train

# %% alt="Prompt and text enter the frozen T5; the gradient goes to the prompt alone."
diagram(
    {
        "prompt": ("prompt", 0, 0, BLUE),
        "text": ("text, embedded", 1, 0, GREY),
        "model": ("frozen T5", 0.7, 1, GREY),
        "loss": ("loss", 0.7, 2, GREY),
        "grad": ("gradient", -0.1, 1, ORANGE),
    },
    [
        ("prompt", "model", BLUE),
        ("text", "model", GREY),
        ("model", "loss", GREY),
        ("loss", "grad", ORANGE),
        ("grad", "prompt", ORANGE),
    ],
    height=3.4,
)
plt.show()

# %% [markdown]
# ## The task
#
# A few hundred sentences, each about one of five topics. The answer is the topic, as a
# word.

# %%
model = tp.load("base")
rows, dev, test = (
    tp.read_rows(DEMO / f"topic.{part}.tsv") for part in ("train", "dev", "test")
)
words = tp.label_words(rows)
print(
    f"{len(rows)} training rows, {len(dev)} dev rows, "
    f"{len(test)} test rows; answers: {', '.join(words)}"
)
for row in rows[:3]:
    print(f"  {row.target:8}{row.input}")

# %% [markdown]
# ## What "frozen" means
#
# The loss is the mean cross entropy of the words of the right answer, under teacher
# forcing (lesson 3):
#
# $$L(P_e) = -\frac{1}{N} \sum_{n} \log
# p_\theta\bigl(y_n \mid [P_e; X_e],\, y_{<n}\bigr)$$
#
# $P_e$ are the vectors of the prompt, $X_e$ those of the text, $\theta$ the weights of
# the model. The logarithm is the natural one, and its unit the *nat*. In `train.py`
# this is the function `loss(trainable, params, ...)`. Its first argument is a dict with
# what we train, its second one the model. `autograd.value_and_grad` differentiates with
# respect to the first argument, and that is all there is to freezing: **nobody asks for
# the gradient of the weights.** They stay plain arrays. The gradient still flows
# *through* them, from the loss back to the prompt, but it never arrives *at* them.

# %%
settings = tp.Settings(
    steps=150,
    prompt_length=20,
    batch_size=16,
    optimizer="adam",
    schedule="linear",
    eval_every=15,
)
first = methods.init_params(model, settings, words)
prompt = tp.Prompt(first, label_words=words)
before = model.fingerprint  # a hash of all weights
value, grads = tp.gradient(model, prompt, rows[:16])
for name, array in grads.items():
    print(f"{name}: gradient of shape {array.shape}")
print(f"loss {value:.3f}; length of the gradient {np.linalg.norm(grads[PROMPT]):.3f}")

# %% [markdown]
# One array. The first values of the vectors are not random. They are the embeddings of
# the label words, and of some frequent words for the places that are left; lesson 5
# asks whether this matters.
#
# ## One step by hand
#
# Move the prompt a little against the gradient, $P_e \leftarrow P_e - \eta\, g$. The
# slope predicts how much the loss falls: by $\eta \lVert g \rVert^2$. How far can we go
# before the prediction fails? The loss of the same 16 rows:
#
# **Guess before you run:** up to which rate does the prediction hold: 0.01, 1, or 100?

# %%
rates = 10.0 ** np.arange(-3, 2.6, 0.5)
gradient = grads[PROMPT]


def loss_at(vectors):
    """The loss of the 16 rows with these vectors."""
    return tp.gradient(
        model, tp.Prompt({PROMPT: vectors}, label_words=words), rows[:16]
    ).loss


fall = np.array(
    [value - loss_at(prompt.array - np.float32(rate) * gradient) for rate in rates]
)
predicted = rates * (gradient**2).sum()
for rate, found, wanted in zip(rates, fall, predicted, strict=True):
    print(
        f"step of {rate:8.3f} times the gradient: the loss "
        f"falls by {found:+.2e}, predicted {wanted:+.2e}"
    )

# %% [markdown]
# For small steps the two columns agree: the gradient is right, and the step works. For
# large ones the ground curves away, and a negative fall is a rise. Notice how large a
# useful rate is, though: from 1 to 10. Lesson 6 says why, and why the
# search begins anew with each model and each task.
#
# ## A whole run
#
# Repeat with new rows each time, and let an optimiser choose the lengths of the steps
# (here Adam, at the paper's learning rate of 0.3, which falls to 0 in the course of the
# run). `tp.run` gives you a `Progress` before the first step and after each, so a
# training loop is a `for`, and stopping early is a `break`. From time to time it
# answers the dev rows, which are not trained on. Only then has the `Progress` a
# `prompt`: the best one so far, which need not be the newest.

# %%
for progress in tp.run(model, rows, dev, settings):
    if progress.prompt:
        print(f"step {progress.step:3}: {progress}")
    if progress.state.best_score[0] > 0.95:
        break  # good enough; this run does not come so far
state, tuned = progress.state, progress.prompt

# %% alt="The training loss falls, and the dev accuracy rises, over 150 steps."
bare, bare_dev = (
    tp.evaluate(model, tp.Prompt(label_words=words), part).mean for part in (test, dev)
)
score = tp.evaluate(model, tuned, test).mean
fig, (left, right) = figure(2, width=8.5)
left.plot(
    range(1, len(state.losses) + 1),
    state.losses,
    color="0.75",
    marker="",
    lw=0.8,
    label="each batch",
)
window = min(20, len(state.losses))  # a short run has fewer steps
smooth = np.convolve(state.losses, np.ones(window) / window, "valid")
label = f"mean of {window} steps"
left.plot(
    range(window, len(state.losses) + 1),
    smooth,
    color="black",
    marker="",
    ls="-",
    label=label,
)
left.set(
    xlabel="step",
    ylabel="training loss (nats per token)",
    ylim=(0, None),
    title="The loss falls",
)
left.legend()
right.plot(state.scores[:, 0], state.scores[:, 1], label="dev rows")
right.axhline(
    state.scores[0, 1], color="#D55E00", ls="--", marker="", label="first vectors"
)
right.axhline(bare_dev, color="#0072B2", ls=":", marker="", label="no prompt")
right.set(
    xlabel="step", ylabel="accuracy", ylim=(0, 1), title="The answers become better"
)
right.legend(loc="lower right")
plt.show()
print(f"dev rows: no prompt {bare_dev:.3f}, first vectors {state.scores[0, 1]:.3f}")
print(
    f"{len(test)} test rows: frozen model {bare:.3f}, with the tuned prompt {score:.3f}"
)

# %% [markdown]
# The first vectors disturb the frozen model: with them it starts below the model
# without a prompt. Training makes up for that, and then goes further. In the very first
# steps, the loss even *rises*: 0.3 is a long step for this model. Lesson 6 measures
# that too.
#
# Is the model really untouched? And how large is what we have learned?

# %%
same = model.fingerprint == before == tp.load("base").fingerprint
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "topic.safetensors"
    tp.save_prompt(tp.Prompt(tuned.params, label_words=words), path)
    size = os.path.getsize(path)
weights = sum(array.size for array in tp.tree.flatten(model.params).values())
print(f"every weight as before: {same}")
print(
    f"the model has {weights:,} numbers, the prompt "
    f"{tuned.array.size:,}: one in {weights // tuned.array.size:,}"
)
print(f"its file has {size:,} bytes")

# %% [markdown]
# ## What it costs
#
# A prompt is tiny, but its gradient is not free. To know how the loss depends on
# vectors at the *bottom* of the model, we must go back through all of it. What is
# saved are the gradients of the weights. Count in products: the forward pass is one
# product for each weight matrix. Going back through a matrix is another. The gradient
# of the matrix itself would be a third one. So we expect 1 : 2 : 3. We measure it in
# NumPy.
#
# **Guess before you run:** will the measured ratios lie above or below the count?

# %% alt="Time of the loss, with the gradient of the prompt, and of all weights."
batch = data.batch_of(rows[:16], model.tokenizer, 256)
full = methods.init_params(
    model, tp.Settings(method="full"), words
)  # all weights, trainable
with_prompt = methods.apply(
    model.params, first
)  # for the last job, so that all read the same
jobs = {
    "loss alone": lambda: train.loss(first, model.params, model.config, batch),
    "and gradient\nof the prompt": lambda: train.loss_and_grads(
        first, model.params, model.config, batch
    ),
    "and gradient\nof all weights": lambda: train.loss_and_grads(
        full, with_prompt, model.config, batch
    ),
}
cost = seconds(jobs, 7)
alone = cost["loss alone"]
fig, axes = figure(width=5.5, height=2.4)
bars = axes.barh(
    list(cost),
    [1000 * t for t in cost.values()],
    color=["0.9", "0.7", "0.5"],
    edgecolor="black",
)
for bar, hatch in zip(bars, HATCHES, strict=False):
    bar.set_hatch(hatch)
axes.invert_yaxis()
axes.set(
    xlabel="time for 16 rows (ms)", title="Gradients of a prompt are cheaper, not free"
)
plt.show()
print("ratio 1 :", " : ".join(f"{t / alone:.1f}" for t in list(cost.values())[1:]))

# %% [markdown]
# The order is as expected, and both ratios are above the count. The count knows only
# the products with weights. More happens on the way back, for example in attention,
# where both sides of a product need a gradient. Prompt tuning saves some time. What it
# really saves is memory and bookkeeping: an optimiser keeps one or two numbers for
# everything that it trains, and a task is a file of some kilobytes.

# %% [markdown]
# ## Exercises
#
# **Exercise 1.** Write one step of gradient descent on a dict of arrays. Return a new
# dict: the old vectors may still be somebody's best prompt.

# %% tags=["exercise-1"]


def descend(trainable, grads, learning_rate):
    """The arrays one step further downhill, in a new dict."""
    ...  # your turn


# %%
@check("Exercise 1", descend, lambda trainable, *_: trainable)
def _(mine):
    start = {"a": np.ones(3), "b": np.zeros((2, 2))}
    kept = {name: array.copy() for name, array in start.items()}
    found = mine(start, {"a": 2 * start["a"], "b": start["b"] + 1}, 0.1)
    yield set(found) == {"a", "b"}, f"expected the names a and b, found {sorted(found)}"
    yield (
        all((start[name] == kept[name]).all() for name in kept),
        "it has changed the arrays that it was given",
    )
    yield (
        (found["a"] ** 2).sum() < (start["a"] ** 2).sum(),
        "the sum of a ** 2 has this gradient, and it did not fall",
    )
    yield (
        np.allclose(found["b"], -0.1),
        f"where the gradient is 1, a step at rate 0.1 gives {found['b'][0, 0]}",
    )
    yield (
        np.allclose(found["a"], 0.8),
        f"where the gradient is 2, a step at rate 0.1 goes from 1 to {found['a'][0]}",
    )


# %% [markdown]
# **Exercise 2.** Write the loss. `log_p` has the log probability of the right word at
# each place, `weights` is 1 where there is a word and 0 where there is only padding.
# Shapes: both `(B, T)`.

# %% tags=["exercise-2"]


def mean_loss(log_p, weights):
    """Mean cross entropy of the words, without the padding."""
    ...  # your turn


# %%
@check("Exercise 2", mean_loss, 0.0)
def _(mine):
    log_p = np.log([[0.5, 0.25, 0.9], [0.5, 0.9, 0.9]])
    weights = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    found = mine(log_p, weights)
    yield (
        np.ndim(found) == 0,
        f"a loss is one number; found the shape {np.shape(found)}",
    )
    yield (
        found > 0,
        "the loss is positive, and 0 if every right word has the probability 1",
    )
    other = np.where(weights == 0, np.log(0.1), log_p)
    yield (
        np.isclose(found, mine(other, weights)),
        "what stands in the padding changes your loss",
    )
    yield (
        np.isclose(mine(log_p[:1], weights[:1]), np.log(8) / 2),
        "the mean is over words, not over all places",
    )
    longer = [np.pad(x, ((0, 0), (0, 4))) for x in (log_p, weights)]
    yield np.isclose(mine(*longer), found), "more padding changes your loss"
    yield (
        np.isclose(found, np.log(16) / 3),
        "the mean is over all words of the batch, not over rows first",
    )


# %% [markdown]
# **Exercise 3.** Put a prompt `(P, D)` in front of embedded texts `(B, L, D)`, and
# extend their attention mask `(B, L)` so that everybody sees the prompt. Return both.

# %% tags=["exercise-3"]


def put_in_front(prompt, x, mask):
    """Vectors (B, P + L, D) and mask (B, P + L)."""
    ...  # your turn


# %%
def in_front(prompt, x, mask):
    """What the result is like."""
    places = (len(x), len(prompt) + x.shape[1])
    return np.zeros((*places, x.shape[2])), np.zeros(places)


@check("Exercise 3", put_in_front, in_front)
def _(mine):
    ids, mask = batch.input_ids[:3], batch.attention_mask[:3]
    x = ops.embedding(model.params["shared"]["weight"], ids)
    vectors, seen = mine(tuned.array, x, mask)
    shape = (3, 20 + ids.shape[1])
    yield (
        vectors.shape == (*shape, 256),
        f"expected vectors {(*shape, 256)}, found {vectors.shape}",
    )
    yield seen.shape == shape, f"expected a mask {shape}, found {seen.shape}"
    yield (seen[:, 20:] == mask).all(), "the mask of the texts has changed its place"
    right, _ = t5.encode(
        methods.apply(model.params, tuned.params), model.config, ids, mask
    )
    found, _ = t5.encode(model.params, model.config, vectors, seen)
    yield (
        np.allclose(found, right, atol=1e-3),
        "the encoder's output differs: is the prompt in front, for all to see?",
    )


# %% [markdown]
# [Solutions, and a common mistake for each](solutions/04_the_first_soft_prompt.py)
#
# ## What holds

# %%
assert np.allclose(fall[:3], predicted[:3], rtol=0.1)  # small steps: the slope is right
assert fall[-1] < predicted[-1] / 2  # large ones: the ground curves
assert list(grads) == [PROMPT] and grads[PROMPT].shape == (20, 256)
assert same
assert state.scores[0, 1] < bare_dev < state.best_score[0]
assert state.losses[-20:].mean() < state.losses[:20].mean() / 2
assert score > bare + 0.03
assert size < 25_000
assert cost["and gradient\nof the prompt"] > 1.3 * alone
assert cost["and gradient\nof the prompt"] < cost["and gradient\nof all weights"]
