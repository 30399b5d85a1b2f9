# %% [markdown]
# # 1 A gradient you can check
#
# **You need:** Python, NumPy, and the derivative of a function of one number. Lesson 0
# helps: it builds a tape. **Time:** 15 minutes to read, less than 90 seconds to run on
# two cores.
#
# Prompt tuning puts a few vectors, a **soft prompt**, in front of a text and learns
# them by gradient descent. If the gradient is wrong, training still runs, the loss may
# even fall, and every number behind it is worth nothing. So this course begins with the
# question: **how do you know that a gradient is right?**
#
# You will see a gradient as a slope, measure it without any calculus, build the rule
# for one operation, break that rule on purpose, and watch the check find it. At the end
# you check the gradient of a whole T5, the language model of this course. (Lesson 3
# opens it.)

# %%
import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np
from autograd import grad
from classroom import BLUE, GREY, ORANGE, check, diagram, figure

import tinyprompt as tp
from tinyprompt import ops, train
from tinyprompt.ops import defvjp, primitive

# %% alt="A slope is measured on one path and computed on the other; then compared."
diagram(
    {
        "x": ("prompt x", 0.5, 0, GREY),
        "runs": ("loss at x + h v\nand at x - h v", 0, 1, BLUE),
        "rules": ("rules, from the\nloss back to x", 1, 1, ORANGE),
        "slope": ("difference / 2 h", 0, 2, BLUE),
        "dot": ("gradient times v", 1, 2, ORANGE),
        "same": ("equal?", 0.5, 3, GREY),
    },
    [
        ("x", "runs", BLUE),
        ("x", "rules", ORANGE),
        ("runs", "slope", BLUE),
        ("rules", "dot", ORANGE),
        ("slope", "same", BLUE),
        ("dot", "same", ORANGE),
    ],
)
plt.show()

# %% [markdown]
# ## A slope
#
# A gradient answers one question: *if I nudge the input a little, how much does the
# output change?* For a function of one number, that is the slope. You can measure it by
# nudging:
#
# $$f'(x) \approx \frac{f(x + h) - f(x - h)}{2h}$$
#
# This is a **central difference**. Taylor's formula says how wrong it is. The terms
# $f(x)$ and $f''(x)$ cancel between the two sides, and what is left is about
# $h^2 f'''(x) / 6$. A smaller step is a better step, it seems.
#
# autograd gets the same slope in another way: it records which operations were called,
# and multiplies the derivatives of all of them, from the output back to the input.

# %%


def f(x):
    """Three operations: a tangent, a square, a sum."""
    return (anp.tanh(x) ** 2).sum()


x = np.array([0.7])
h = 1e-5
measured = (f(x + h) - f(x - h)) / (2 * h)
computed = grad(f)(x)[0]
print(f"measured {measured:.12f}\ncomputed {computed:.12f}")

# %% [markdown]
# ## Nudge all inputs at once
#
# A soft prompt has thousands of numbers, and a nudge for each would need thousands of
# runs. One run is enough to check them together. Draw a random direction $v$ and move
# along it:
#
# $$\frac{f(x + hv) - f(x - hv)}{2h} \approx \nabla f(x) \cdot v$$
#
# The right side uses the gradient, the left side only uses the function. A wrong
# gradient would have to be wrong at a right angle to $v$ to pass, and nobody is that
# unlucky with a random $v$.

# %%


def along(function, x, v, h):
    """The slope of a function in the direction v, measured."""
    return (function(x + h * v) - function(x - h * v)) / (2 * h)


rng = np.random.default_rng(0)
x, v = rng.normal(size=1000), rng.normal(size=1000)
slope = grad(f)(x) @ v
print(f"measured {along(f, x, v, 1e-5):.9f}\ncomputed {slope:.9f}")

# %% [markdown]
# ## How small a step?
#
# Let us try all of them. There are two errors in a measured slope, and they pull in
# opposite directions:
#
# - **The formula's own error** falls as $h^2$.
# - **Rounding.** $f(x + hv)$ and $f(x - hv)$ are almost equal, so their difference has
#   few digits left. A rounding error of size $\varepsilon$ in $f$ becomes
#   $\varepsilon / h$ in the slope: it *grows* as the step shrinks.
#
# The sum is smallest about where the two are equal, near $h = \varepsilon^{1/3}$. We
# draw it for float64 and for float32.
#
# **Guess before you run:** at which step is float32 best, and how many times as large
# is its best error as that of float64?

# %% alt="Errors of a slope against the step: float32 turns earlier than float64."
steps = 10.0 ** np.arange(-9, 0.1, 0.5)


def errors(dtype):
    """The relative error of the measured slope, for each step, if everything is
    computed in this dtype."""
    inputs = x.astype(dtype), v.astype(dtype)
    return np.array(
        [abs(along(f, *inputs, dtype(step)) - slope) / abs(slope) for step in steps]
    )


double, single = errors(np.float64), errors(np.float32)
fig, axes = figure()
axes.loglog(steps, double, label="float64")
axes.loglog(steps, single, label="float32")
axes.set(
    xlabel="step $h$",
    ylabel="relative error of the slope",
    title="Steps too large, steps too small",
)
axes.legend()
plt.show()
for found in (double, single):
    kind = np.float64 if found is double else np.float32
    print(
        f"{kind.__name__}: best error {found.min():.0e} "
        f"at h = {steps[found.argmin()]:.0e}, ",
        end="",
    )
    print(f"cube root of epsilon {np.finfo(kind).eps ** (1 / 3):.0e}")

# %% [markdown]
# Read the picture from right to left. Both curves first fall along the same line,
# because the formula's error does not depend on the number format. Then each one turns
# where rounding takes over. float32 turns early, and its best error is tens of
# thousands of times as large.
#
# This is why tinyprompt judges every gradient **in float64**, also the gradients of
# code that trains in float32. In float64 there is a wide valley in which a right
# gradient and a wrong one cannot be confused.

# %% [markdown]
# ## One operation and its rule
#
# autograd needs one rule for every operation. The rule is called the **vector-Jacobian
# product** (VJP). Say the operation turns $x$ into $y$, and we already know
# $g = \partial L / \partial y$, the gradient that arrives from the loss. The rule gives
# $\partial L / \partial x$, without ever writing down the whole matrix of derivatives.
#
# Take softmax, which is in every attention: $y_i = e^{x_i} / \sum_j e^{x_j}$. Its
# derivatives are $\partial y_i / \partial x_j = y_i (\delta_{ij} - y_j)$, and so
#
# $$\frac{\partial L}{\partial x_j} = \sum_i g_i\, y_i (\delta_{ij} - y_j)
# = y_j \Bigl(g_j - \sum_i g_i y_i\Bigr).$$
#
# In `tinyprompt/ops.py` the operation and its rule stand together. `tp.check_vjp`
# compares them with differences, looks whether float32 stays float32, and runs the
# compiled form that lesson 8 is about.

# %%
logits = rng.normal(size=(4, 7))
report = tp.check_vjp(ops.softmax, logits)
print(report)

# %% [markdown]
# ## Break it
#
# A check that cannot fail is worth nothing. So we forget a term: a softmax whose rule
# lacks the sum. It is the classical mistake, and no test of values would notice it,
# because the value of the function stays right.

# %%


@primitive
def careless_softmax(x):
    """The right value ..."""
    return ops.softmax(x)


# ... with a wrong rule. `defvjp` takes a function of the result y and the input x.
# That function returns the rule, a function of g: the gradient that arrives at y.
defvjp(careless_softmax, lambda y, x: lambda g: y * g)

broken = tp.check_vjp(careless_softmax, logits)
print(broken)

# %% [markdown]
# ## Number formats leak
#
# A word on the columns. *differences* is how far the rule is from measured slopes, less
# what rounding explains, so 0 means that nothing is left over. *float32* is how far the
# result in float32 is from that in float64. *lowered* is about the graphs of lesson 8.
#
# The second column also asks a quieter question: *if the input is float32, is the
# gradient float32?* If not, it says `inf`. That sounds pedantic. But one operation that
# answers in float64 turns everything behind it into float64, at twice the memory.
# autograd's own `mean` does that. `tinyprompt/ops.py` brings its own operations for
# this reason.
#
# **Guess before you run:** the next cell takes the gradient of autograd's `mean` of
# float32 numbers. Which dtype does the gradient have?

# %%
half_way = np.ones(3, np.float32)
leak = grad(anp.mean)(half_way).dtype
ours = grad(lambda x: ops.rms_norm(x, np.ones(3, np.float32), 1e-6).sum())(
    half_way
).dtype
print(
    f"autograd's mean: {half_way.dtype} in, {leak} "
    f"out\nops.rms_norm:    {half_way.dtype} in, {ours} out"
)

# %% [markdown]
# ## A whole T5
#
# Nothing changes if the function is a model. The loss of a T5 depends on the vectors of
# a prompt. `loss_and_grads` in `train.py` is autograd's `value_and_grad(loss)`, with
# the prompt as its first argument. We nudge all vectors of the prompt in a random
# direction, in both number formats, and draw the same picture.

# %% alt="The same valley for the loss of a T5, in float64 and in float32."
model = tp.load("tiny")
case = tp.draw(model)  # a random batch, and a prompt of 20 vectors
key = "encoder.prompt.embedding"
v = rng.normal(size=case.prompt.shape)


def model_errors(dtype):
    """As `errors`, for the loss of the T5. The right slope is that of the gradient in
    float64."""
    params = tp.in_dtype(model.params, dtype)

    def loss(prompt):
        return float(train.loss({key: prompt}, params, model.config, case.batch))

    at, direction = case.prompt.astype(dtype), v.astype(dtype)
    slopes = np.array([along(loss, at, direction, dtype(step)) for step in steps])
    return abs(slopes - right) / abs(right)


exact = tp.in_dtype(model.params, float), model.config, case.batch
_, grads = train.loss_and_grads({key: case.prompt.astype(float)}, *exact)
right = float((grads[key] * v).sum())
model_double, model_single = model_errors(np.float64), model_errors(np.float32)
fig, axes = figure()
axes.loglog(steps, model_double, label="float64")
axes.loglog(steps, model_single, label="float32")
axes.set(
    xlabel="step $h$",
    ylabel="relative error of the slope",
    title="The loss of a T5 with 619,136 weights",
)
axes.legend()
plt.show()
print(f"{grads[key].size} numbers checked at once")
print(f"best error: float64 {model_double.min():.0e}, float32 {model_single.min():.0e}")

# %% [markdown]
# The same valley. In float64 the gradient of the whole model agrees with a measured
# slope to many digits. In float32 you could hardly tell a right gradient from one that
# is off by a part in a thousand. (Your own float32 figures may differ by a factor of
# two or three: rounding depends on the machine.)

# %% [markdown]
# ## Exercises
#
# Write your code where it says *your turn*, and run the cell below it.
#
# **Exercise 1.** Write the rule of `y = log_softmax(x)` over the last axis. You are
# given `g` and `y`. The derivatives are
# $\partial y_i / \partial x_j = \delta_{ij} - e^{y_j}$.

# %% tags=["exercise-1"]


def log_softmax_vjp(g, y):
    """The gradient with respect to x. Shapes: g, y and the result (..., N)."""
    ...  # your turn


# %%
@check("Exercise 1", log_softmax_vjp, lambda g, y: y)
def _(mine):
    x, g = rng.normal(size=(3, 5)), rng.normal(size=(3, 5))
    found = mine(g, ops.log_softmax(x))
    yield (
        found.shape == x.shape,
        f"the gradient has the shape of x, {x.shape}; yours has {np.shape(found)}",
    )
    flat = np.abs(found.sum(-1)).max() < 1e-9
    yield (
        flat,
        "adding a constant to a row of x does not "
        "change y: each row of the gradient sums to 0",
    )
    measured = along(lambda x: (ops.log_softmax(x) * g).sum(), x, np.eye(5)[1], 1e-5)
    yield (
        abs(found[:, 1].sum() - measured) < 1e-6,
        f"nudging column 1 gives a slope of {measured:.4f}",
    )
    right = grad(lambda x: (ops.log_softmax(x) * g).sum())(x)
    yield np.allclose(found, right), "some entry differs from the slope"


# %% [markdown]
# **Exercise 2.** A *forward* difference needs one run less: $(f(x + hv) - f(x)) / h$.
# Write the function `best_step(power, epsilon)`: the step at which the formula's error
# $h^{power}$ equals the rounding error $\varepsilon / h$. The power is 2 for a central
# difference, 1 for a forward one.

# %% tags=["exercise-2"]


def best_step(power, epsilon):
    """The step h with h ** power == epsilon / h."""
    ...  # your turn


# %%
@check("Exercise 2", best_step, 0.0)
def _(mine):
    for power in (1, 2, 4):
        step = mine(power, 1e-12)
        left, right = step**power, 1e-12 / step
        yield (
            0 < step < 1,
            f"a step lies between 0 and 1; for power {power} yours is {step}",
        )
        yield (
            np.isclose(left, right),
            f"power {power}: h ** power is {left:.1e}, epsilon / h is {right:.1e}",
        )


# %% [markdown]
# **Exercise 3.** A friend sends you the gradient of a batch. It points in the right
# direction but has the wrong length: perhaps the loss was *summed* over tokens, and not
# averaged. Write `times_as_long(theirs, right)`: the factor $c$ that makes
# $\lVert theirs - c \cdot right \rVert$ smallest. Their gradient may also be noisy.

# %% tags=["exercise-3"]


def times_as_long(theirs, right):
    """How many times as long a gradient is as the right one; negative if it points the
    other way."""
    ...  # your turn


# %%
@check("Exercise 3", times_as_long, 0.0)
def _(mine):
    right = rng.normal(size=(20, 8))
    yield (
        np.ndim(mine(right, right)) == 0,
        f"one number is wanted, found the shape {np.shape(mine(right, right))}",
    )
    yield (
        np.isclose(mine(5 * right, right), 5),
        f"of 5 times the gradient it says {mine(5 * right, right):.3g}",
    )
    yield (
        np.isclose(mine(-right, right), -1),
        "a gradient with the wrong sign is -1 times as long",
    )
    noisy = 5 * right + 10 * rng.normal(size=right.shape)
    c = mine(noisy, right)
    better = min(np.linalg.norm(noisy - (c + d) * right) for d in (-0.01, 0.01))
    yield (
        np.linalg.norm(noisy - c * right) <= better,
        f"with noise, another factor than {c:.3g} comes closer",
    )


# %% [markdown]
# [Solutions, and a common mistake for each](solutions/01_a_gradient_you_can_check.py)
#
# ## What holds
#
# The cell below states the numbers of this lesson as assertions. The project's tests
# run it.

# %%
assert abs(measured - computed) < 1e-9
assert double.min() < 1e-8 and single.min() > 1000 * double.min()
assert 1e-7 < steps[double.argmin()] < steps[single.argmin()]
assert report.ok and not broken.ok
assert leak == np.float64 and ours == np.float32
assert model_double.min() < 1e-7 < 1e-4 < model_single.min()
