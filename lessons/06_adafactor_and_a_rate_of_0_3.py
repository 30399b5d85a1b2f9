# %% [markdown]
# # 6 Adafactor, clipping, and why a learning rate of 0.3 works
#
# **You need:** a training run with its gradient (lesson 4). **Time:** 15 minutes to
# read, less than 90 seconds to run on two cores.
#
# Whoever has trained a network reads "learning rate 0.3" and expects an explosion.
# Model tuning (of all weights of a T5) takes 0.001. The paper takes 0.3 for its
# prompts, and it works. This lesson shows why: the optimiser divides the size of the
# gradient away, so the learning rate *is the distance that each number moves*. And 0.3
# is a small distance for what it moves.

# %%

import matplotlib.pyplot as plt
import numpy as np
from classroom import BLUE, DEMO, GREY, ORANGE, check, diagram, figure

import tinyprompt as tp
from tinyprompt import PROMPT, methods, optim

model = tp.load("small")
rows, dev = (tp.read_rows(DEMO / f"topic.{part}.tsv") for part in ("train", "dev"))
words = tp.label_words(rows)
settings = tp.Settings(steps=80, prompt_length=20, batch_size=16, eval_every=80)


def rms(x):
    """Root mean square: the typical size of a number."""
    return float(np.sqrt(np.mean(np.square(x))))


# %% alt="The gradient is divided by root v, clipped, scaled; then the prompt moves."
diagram(
    {
        "g": ("gradient g", 0, 0, ORANGE),
        "v": ("mean of squares v", 1, 0.5, BLUE),
        "u": ("u = g / root of v", 0.3, 1.3, BLUE),
        "clip": ("clip: RMS at most 1", 0.3, 2.3, BLUE),
        "rate": ("times learning rate", 0.3, 3.3, BLUE),
        "move": ("the prompt moves", 0.3, 4.3, GREY),
    },
    [
        ("g", "v", ORANGE),
        ("g", "u", ORANGE),
        ("v", "u", BLUE),
        ("u", "clip", BLUE),
        ("clip", "rate", BLUE),
        ("rate", "move", BLUE),
    ],
    height=4.4,
)
plt.show()

# %% [markdown]
# ## The gradient is tiny
#
# First the raw numbers: the size of a number in a prompt vector, and of a number in its
# gradient.
#
# **Guess before you run:** how many steps of plain descent at rate 0.3 move a number of
# the prompt by its own size: 10, 100, or more than 1,000?

# %%
first = methods.init_params(model, settings, words)
grads = tp.gradient(model, tp.Prompt(first, label_words=words), rows[:16]).grads
size, slope = rms(first[PROMPT]), rms(grads[PROMPT])
print(f"a number of the prompt: {size:.3f}; of its gradient: {slope:.4f}")
print(
    f"plain descent at rate 0.3 needs {size / (0.3 * slope):.0f} "
    "steps to move it by its own size"
)

# %% [markdown]
# Why so small? A gradient with respect to one vector out of many, through a norm that
# divides by the vector's length, of a mean over a batch: each of these makes it
# smaller. How small depends on the model, the task, the length of the prompt. A
# learning rate for plain descent would have to be found anew for each of them.
#
# ## Divide the size away
#
# Adam and Adafactor do so. They keep a running mean $v$ of the squares of each
# gradient, and divide by its root:
#
# $$v_t = \beta_t\, v_{t-1} + (1 - \beta_t)\, g_t^2, \qquad u_t = g_t / \sqrt{v_t}$$
#
# (Adam also puts a running mean of $g$ in the place of $g$, which we leave aside here.)
#
# A number whose gradient is always about $\pm g$ gets an update $u$ of about $\pm 1$,
# whatever $g$ is. Multiply all gradients by 1000, and $u$ is the same. Then
# $P_e \leftarrow P_e - \eta\, u_t$ moves each number by about $\eta$.
#
# Adafactor lets $\beta$ grow with time, $\beta_t = 1 - t^{-0.8}$. In the first step it
# is 0, so $v_1 = g_1^2$, and every number moves by exactly $\eta$.

# %%
optimizer = optim.adafactor(weight_decay=0.0)
state = optimizer.init(first)
moved, _ = optimizer.update(first, grads, state, 0.3)
louder, _ = optimizer.update(first, {PROMPT: 1000 * grads[PROMPT]}, state, 0.3)
step = np.abs(moved[PROMPT] - first[PROMPT])
print(
    f"first step: the smallest move is {step.min():.4f}, the largest {step.max():.4f}"
)
print(
    "with gradients 1000 times as large: "
    f"{np.abs(louder[PROMPT] - first[PROMPT]).max():.4f}"
)

# %% [markdown]
# ## Clipping
#
# Later steps are less tidy. If the gradients of a number have been small for a while
# and a large one arrives, $v$ lags behind and $u$ becomes large. Adafactor therefore
# *clips* the update: if the root mean square of all $u$ is above 1, it is scaled down
# to 1.
#
# $$u \leftarrow u / \max(1, \text{RMS}(u))$$
#
# Two runs of the same 80 steps. The first counts its steps from 1. The second counts
# them from 1,100,000. That is what the paper's released code does: it goes on from a
# checkpoint that has been trained so long. There $\beta_t$ is almost one. So $v$, which
# begins at 0, hardly grows, and every raw update is huge. Only clipping makes it
# usable. To see the raw size, we run a second optimiser without clipping, and do not
# use its result.

# %% alt="Size of raw and clipped updates, for steps counted from 1 and 1,100,000."


def trace(first_step):
    """RMS of the raw and of the clipped update in each step of a run at rate 0.3."""
    clipping = optim.adafactor(weight_decay=0.0, first_step=first_step)
    bare = optim.adafactor(
        weight_decay=0.0, first_step=first_step, clipping_threshold=np.inf
    )
    trainable, sizes = first, []
    state = clipping.init(first)
    for step in range(80):
        batch = [
            rows[i]
            for i in np.random.default_rng(step).choice(len(rows), 16, replace=False)
        ]
        grads = tp.gradient(model, tp.Prompt(trainable, label_words=words), batch).grads
        raw, _ = bare.update(trainable, grads, state, 1.0)
        after, state = clipping.update(trainable, grads, state, 0.3)
        sizes.append(
            (
                rms(raw[PROMPT] - trainable[PROMPT]),
                rms(after[PROMPT] - trainable[PROMPT]) / 0.3,
            )
        )
        trainable = after
    return np.array(sizes)


traces = {1: trace(0), 1_100_000: trace(1_100_000)}
fig, axes = figure(2, width=9, height=3.3, sharey=True)
for ax, (start, sizes) in zip(axes, traces.items(), strict=True):
    ax.semilogy(sizes[:, 0], label="raw", markevery=8)
    ax.semilogy(sizes[:, 1], label="clipped", markevery=8)
    ax.set(xlabel="step", title=f"steps counted from {start:,}")
    ax.legend()
axes[0].set_ylabel("RMS of the update $u$")
plt.show()
clipped = {start: np.mean(sizes[:, 0] > 1.001) for start, sizes in traces.items()}
for start, share in clipped.items():
    sizes = traces[start]
    print(f"from {start:>9,}: {100 * share:.0f} % of the steps are clipped", end="; ")
    print(f"raw update in the last step {sizes[-1, 0]:.2g}, clipped {sizes[-1, 1]:.2g}")

# %% [markdown]
# On the right, every step is clipped: each moves the prompt by an RMS of exactly
# $\eta$. So in the paper's setting the learning rate has a plain meaning. **0.3 is how
# far a number of the prompt moves in one step**, as a root mean square.
#
# ## Is 0.3 far?
#
# That depends on how large the numbers are. Google's notes on the prompts that it
# released give a mean norm of 297 for the word vectors of its T5 1.1. If that is the
# base size with $d = 768$, the RMS of a number is $297 / \sqrt{768} \approx 10.7$, and
# a step of 0.3 is about 3 % of it. Our model has smaller word vectors, for which 0.3 is
# a long step. If the argument is right, then the best rate *here* is smaller than 0.3
# by about the same ratio.

# %%
word = rms(model.params["shared"]["weight"])
theirs = 297 / np.sqrt(768)
print(
    f"RMS of a number in a word vector: {word:.2f} here, "
    f"{theirs:.1f} there: a ratio of {theirs / word:.1f}"
)
print(f"so 0.3 there is like {0.3 * word / theirs:.2f} here")

# %% [markdown]
# A prediction that can fail. We try rates from 0.003 to 3, with Adafactor and with
# Adam.
#
# **Guess before you run:** at which rate is the loss lowest, and do the two optimisers
# agree?

# %% alt="Final loss, and size of the prompt, against the learning rate."
rates = (0.003, 0.01, 0.03, 0.1, 0.3, 3.0)
losses, lengths = {}, {}
for name in ("adafactor-t5x", "adam"):
    for rate in rates:
        *_, last = tp.run(
            model, rows, dev, settings, optimizer=name, learning_rate=rate
        )
        losses[name, rate] = last.state.losses[-20:].mean()
        lengths[name, rate] = rms(last.state.trainable[PROMPT])
fig, axes = figure(2, width=9, height=3.3)
for name in ("adafactor-t5x", "adam"):
    axes[0].semilogx(rates, [losses[name, rate] for rate in rates], label=name)
    axes[1].loglog(rates, [lengths[name, rate] for rate in rates], label=name)
axes[0].axvline(
    0.3 * word / theirs, color="0.5", ls="--", marker="", lw=1, label="predicted"
)
axes[1].axhline(word, color="0.5", ls="--", marker="", lw=1, label="word vectors")
axes[0].set(
    xlabel="learning rate",
    ylabel="training loss, last 20 steps",
    title="What it learns",
    ylim=(0, None),
)
axes[1].set(
    xlabel="learning rate",
    ylabel="RMS of the prompt at the end",
    title="How far it went",
)
for ax in axes:
    ax.legend()
plt.show()
best = {
    name: min(rates, key=lambda rate: losses[name, rate])
    for name in ("adafactor-t5x", "adam")
}
for name, rate in best.items():
    shown = ", ".join(
        f"{losses[name, at]:.3f} at {at}" for at in (0.003, rate, 0.3, 3.0)
    )
    print(f"{name:14} is best at rate {rate}; its loss is {shown}")

# %% [markdown]
# The valley is wide, a factor of ten or so, and the prediction lies in it. It is a
# rough one: it leaves out that the paper makes 30,000 steps and we make 80. Both
# optimisers roughly agree, because both divide the size away. At 0.3 the loss is
# somewhat higher. (The other lessons keep the paper's 0.3, and let it fall to 0.) Left
# of the valley, the prompt does not get far enough in 80 steps. Right of it, it runs
# away: its vectors become far longer than words, and lesson 5 has shown what very long
# vectors do.
#
# So 0.3 is no magic. It is a small step for long vectors. For another model, begin with
# a few hundredths of the RMS of its word vectors.
#
# And the 0.001 of model tuning? A weight *inside* a model is far smaller than a number
# of a word vector, as the next cell shows. Besides, Adafactor as T5 uses it
# multiplies the rate by the RMS of each array (*parameter scaling*), and the paper
# turns this off for prompts. So 0.001 there means a thousandth of a weight's own size,
# and cannot be set beside 0.3 as it stands.

# %%
matrix = rms(
    model.params["encoder"]["block"]["0"]["layer"]["0"]["SelfAttention"]["q"]["weight"]
)
print(f"RMS of a number in a query matrix: {matrix:.3f}")

# %% [markdown]
# ## Exercises
#
# **Exercise 1.** Write clipping: scale the update so that its root mean square is at
# most `threshold`.

# %% tags=["exercise-1"]


def clip(update, threshold=1.0):
    """The update, or a shorter one in the same direction."""
    ...  # your turn


# %%
@check("Exercise 1", clip, lambda update, *_: update)
def _(mine):
    u = np.random.default_rng(0).normal(size=(20, 8))
    small = 0.1 * u / rms(u)
    for threshold in (1, 0.5):
        kept = np.allclose(mine(small, threshold), small)
        yield (
            kept,
            "an update below the threshold stays as it "
            f"is, also for a threshold of {threshold}",
        )
    found = mine(5 * u)
    yield (
        np.allclose(found / rms(found), u / rms(u)),
        "the direction has changed: no number is cut on its own",
    )
    yield (
        np.isclose(rms(found), 1),
        f"the root mean square of a long update becomes 1; yours is {rms(found):.3f}",
    )
    yield np.isclose(rms(mine(5 * u, 0.5)), 0.5), "the threshold is not heeded"


# %% [markdown]
# **Exercise 2.** Write Adafactor's second moment for a prompt: one step of the running
# mean, with $\beta_t = 1 - t^{-0.8}$. `t` counts from 1.

# %% tags=["exercise-2"]


def second_moment(v, g, t):
    """The running mean of squares after step t."""
    ...  # your turn


# %%
@check("Exercise 2", second_moment, lambda v, *_: v)
def _(mine):
    g = np.array([0.5, -2.0])
    yield (
        np.allclose(mine(7 * g, g, 1), mine(0 * g, g, 1)),
        "in step 1, all of the old value is forgotten",
    )
    yield (
        np.allclose(mine(0 * g, g, 1), g * g),
        "in step 1, the mean of squares is the square of the one gradient",
    )
    yield (mine(g * g, -g, 5) > 0).all(), "a mean of squares is positive"
    yield (
        np.allclose(mine(g * g, g, 9), g * g),
        "if v is the square of g already, it stays: the weights sum to 1",
    )
    old = mine(np.ones(1), np.zeros(1), 1000)[0]
    yield (
        np.isclose(1 - old, 1000**-0.8),
        f"in step 1000, a share of {1000**-0.8:.4f} is new; yours is {1 - old:.4f}",
    )


# %% [markdown]
# **Exercise 3.** Write Adam. It keeps two running means, $m$ of the gradients and $v$
# of their squares. Both begin at 0, so both are too small in the first steps. Adam
# divides this away:
#
# $$m \leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad
# v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2$$
#
# $$p \leftarrow p - \eta\, \frac{m / (1 - \beta_1^t)}
# {\sqrt{v / (1 - \beta_2^t)} + \varepsilon}$$
#
# with $\beta_1 = 0.9$, $\beta_2 = 0.999$, $\varepsilon = 10^{-8}$. `t` counts from 1.

# %% tags=["exercise-3"]


def adam(p, g, m, v, t, learning_rate):
    """The new p, m and v after step t, in new arrays."""
    ...  # your turn


# %%
@check("Exercise 3", adam, lambda p, *_: (p, p, p))
def _(mine):
    p, g = np.random.default_rng(0).normal(size=(2, 5, 3))
    old = p.copy()
    first_p, m, v = mine(p, g, 0 * p, 0 * p, 1, 0.1)
    yield (p == old).all(), "it has changed the array that it was given"
    yield np.allclose(m, 0.1 * g), "after step 1, m is a tenth of the gradient"
    yield np.allclose(v, 0.001 * g * g), "after step 1, v is a thousandth of g squared"
    yield ((first_p - p) * g < 0).all(), "a number must move against its gradient"
    move = np.abs(first_p - p).max()
    hint = f"step 1 moves every number by the learning rate, 0.1; yours by {move:.3g}"
    yield np.allclose(np.abs(first_p - p), 0.1, rtol=1e-4), hint
    right = optim.adam()
    trainable, kept = {"p": p}, right.init({"p": p})
    q, m, v = p, 0 * p, 0 * p
    for t in range(1, 5):
        trainable, kept = right.update(trainable, {"p": t * g - 2}, kept, 0.1)
        q, m, v = mine(q, t * g - 2, m, v, t, 0.1)
        yield np.allclose(q, trainable["p"]), f"in step {t} it leaves Adam's path"


# %% [markdown]
# [Solutions, and a common mistake for
# each](solutions/06_adafactor_and_a_rate_of_0_3.py)
#
# ## What holds

# %%
assert slope < size / 20
assert np.allclose(step, 0.3, rtol=1e-3)
assert np.allclose(moved[PROMPT], louder[PROMPT], atol=1e-4)
assert clipped[1_100_000] == 1 > clipped[1]
assert np.allclose(traces[1_100_000][:, 1], 1, rtol=1e-3)
assert traces[1][:, 1].max() < 1.001
assert 0.01 <= min(best.values()) <= max(best.values()) <= 0.1
for name in best:
    assert losses[name, best[name]] < 0.9 * min(losses[name, 0.003], losses[name, 3.0])
    assert lengths[name, 3.0] > 4 * word
assert matrix < word / 5
