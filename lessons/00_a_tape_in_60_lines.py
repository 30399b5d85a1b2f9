# %% [markdown]
# # 0 A tape in 60 lines
#
# **You need:** Python, NumPy (`@` and broadcasting), and the chain rule for a function
# of one number. **Time:** 15 minutes to read, a few seconds to run.
#
# All lessons of this course use **gradients**: the slope of a loss with respect to each
# of thousands of numbers. A library called autograd computes them. This lesson builds
# such a library from nothing, in 60 lines of NumPy. You check its gradients in three
# independent ways. At the end you tune a first, very small soft prompt with it.

# %%
import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np
from autograd import grad
from classroom import check, figure

import tinyprompt as tp
from tinyprompt.ops import defvjp, primitive

# %% [markdown]
# ## The chain rule, backwards
#
# A loss is a long chain of small operations. Each operation knows its own derivative.
# The chain rule multiplies the derivatives along the chain. You can multiply from the
# input to the output or from the output to the input:
#
# $$\frac{\partial L}{\partial x} = \frac{\partial L}{\partial z}\,
# \frac{\partial z}{\partial y}\, \frac{\partial y}{\partial x}$$
#
# A loss is *one* number, and a model has *many* inputs. From the left, each
# intermediate result is a gradient of one number, so one pass serves all inputs. This
# order is called **reverse mode**. It needs two things:
#
# 1. A record of the operations, in the order in which they ran: the **tape**.
# 2. A rule for each operation. The rule receives $g = \partial L / \partial y$, the
#    gradient of the loss with respect to the result, and returns the gradient with
#    respect to each input.
#
# Here is all of it. A `Node` is a value, its parents, and the rule that sends `g` to
# the parents. `tape` sorts the nodes: each node comes after its parents. `backward`
# goes through this list from the end.


# %% tags=["tape"]
class Node:
    def __init__(self, value, parents=(), rule=None, name="input"):
        self.value, self.parents = np.asarray(value), parents
        self.rule, self.name = rule, name

    def __add__(self, other):
        a, b = self, node(other)
        rule = lambda g: (fit(g, a.value), fit(g, b.value))
        return Node(a.value + b.value, (a, b), rule, "+")

    def __mul__(self, other):
        a, b = self, node(other)
        rule = lambda g: (fit(g * b.value, a.value), fit(g * a.value, b.value))
        return Node(a.value * b.value, (a, b), rule, "*")

    def __matmul__(self, other):  # (N, K) @ (K, M) -> (N, M)
        a, b = self, node(other)
        rule = lambda g: (g @ b.value.T, a.value.T @ g)
        return Node(a.value @ b.value, (a, b), rule, "@")

    def sum(self):
        return Node(self.value.sum(), (self,), lambda g: (g + 0 * self.value,), "sum")

    def exp(self):
        y = np.exp(self.value)
        return Node(y, (self,), lambda g: (g * y,), "exp")

    def log(self):
        return Node(np.log(self.value), (self,), lambda g: (g / self.value,), "log")

    def relu(self):
        on = self.value > 0
        return Node(self.value * on, (self,), lambda g: (g * on,), "relu")

    def cross_entropy(self, labels):  # logits (N, C), labels (N,) -> mean loss
        right = np.eye(self.value.shape[1], dtype=self.value.dtype)[labels]
        p = np.exp(self.value - self.value.max(1, keepdims=True))
        p = p / p.sum(1, keepdims=True)
        loss = -np.log((p * right).sum(1)).mean()
        return Node(loss, (self,), lambda g: (g * (p - right) / len(p),), "loss")


def node(x):
    return x if isinstance(x, Node) else Node(x, name="constant")


def fit(g, x):  # where broadcasting has repeated x, the gradients are summed
    g = g.sum(tuple(range(g.ndim - x.ndim)))
    return g.sum(tuple(i for i, n in enumerate(x.shape) if n == 1), keepdims=True)


def tape(out, order):  # parents first
    if out not in order:
        for parent in out.parents:
            tape(parent, order)
        order.append(out)
    return order


def backward(out):
    order = tape(out, [])
    for n in order:
        n.grad = np.zeros_like(n.value)
    out.grad = np.ones_like(out.value)
    for n in reversed([n for n in order if n.parents]):
        for parent, g in zip(n.parents, n.rule(n.grad), strict=True):
            parent.grad = parent.grad + g


# %% [markdown]
# ## Guess before you run: a number that is used three times
#
# Let $y = x \cdot x + x$ at $x = 3$. The variable `x` has three arrows that leave it.
# **Guess:** which number is in `x.grad` after `backward(y)`?

# %%
x = Node(3.0)
y = x * x + x
backward(y)
print(f"y = {y.value}, x.grad = {x.grad}")

# %% [markdown]
# The derivative is $2x + 1$. Each of the three uses adds its part: $3$ and $3$ from the
# product, $1$ from the sum. This is why the last line of `backward` says
# `parent.grad + g`. With `parent.grad = g`, only one of the parts would be left. It is
# also why the list is sorted: the gradient of `x` is complete only when everything that
# uses `x` has been visited.
#
# ## The tape of a small network
#
# A network with one hidden layer, and the tape that it leaves. Each line is one node.

# %%
rng = np.random.default_rng(0)
inputs, labels = rng.normal(size=(4, 3)), np.array([0, 1, 1, 0])
first, last = rng.normal(size=(3, 5)), rng.normal(size=(5, 2))
x, w1, w2 = Node(inputs, name="x"), Node(first, name="w1"), Node(last, name="w2")
loss = ((x @ w1).relu() @ w2).cross_entropy(labels)
backward(loss)
order = tape(loss, [])
for i, n in enumerate(order):
    parents = ", ".join(str(order.index(parent)) for parent in n.parents)
    value, slope = str(n.value.shape), str(n.grad.shape)
    text = f"{i}  {n.name:5} value {value:7} gradient {slope:7}"
    print(text + (f" parents {parents}" if parents else ""))

# %% alt="x and w1 meet in @, then relu, @ with w2, loss; gradients flow back."
BLUE, ORANGE, GREY = "#3B8BD0", "#D9822B", "#808890"  # readable on white and on black
places = {0: (0, 4), 1: (1, 4), 2: (0, 3), 3: (0, 2), 4: (1, 2), 5: (0, 1), 6: (0, 0)}
fig, axes = figure(width=3.8, height=4.6)
fig.patch.set_alpha(0)
axes.set(xlim=(-0.6, 1.6), ylim=(-0.5, 4.5), facecolor="none")
axes.axis("off")
for i, n in enumerate(order):
    column, row = places[i]
    colour = GREY if n.parents else BLUE
    box = {"boxstyle": "round,pad=0.4", "fc": "none", "ec": colour, "lw": 1.8}
    text = f"{n.name} {n.value.shape if n.value.ndim else ''}".strip()
    middle = {"ha": "center", "va": "center", "size": 12}
    axes.text(column, row, text, color=colour, bbox=box, **middle)
    for parent in n.parents:
        start = np.array(places[order.index(parent)])
        for side, colour, ends in ((-0.07, BLUE, "->"), (0.07, ORANGE, "<-")):
            gap = 15 if start[0] == column else 32  # points, so that boxes stay free
            arrow = {"arrowstyle": ends, "color": colour, "lw": 1.8, "shrinkA": gap}
            arrow |= {"shrinkB": gap, "linestyle": "-" if ends == "->" else "--"}
            move = np.array([side, 0])
            end = np.array([column, row]) + move
            axes.annotate("", end, start + move, arrowprops=arrow)
axes.text(0.35, 0.55, "solid: values", color=BLUE, size=12)
axes.text(0.35, 0.2, "dashed: gradients", color=ORANGE, size=12)
plt.show()

# %% [markdown]
# Values follow the solid arrows down to the loss. Gradients follow the dashed arrows
# back. A gradient always has the shape of its value.
#
# ## Three checks
#
# A gradient that is almost right looks right. So we check one function that uses all
# operations, in three ways:
#
# 1. **Central differences:** nudge each number of the input up and down, and measure
#    the slope. This uses no rule at all.
# 2. **autograd**, which has its own rules, written by other people.
# 3. **`tp.check_vjp`**, the check that lesson 1 explains. It wants an operation and its
#    rule, so we give it our function, and as its rule our tape.

# %%
bias = rng.normal(size=5)


def with_tape(x):
    """All operations of the tape, on an array (4, 3)."""
    hidden = (Node(x, name="x") @ first + bias).relu() * 0.5
    smooth = (hidden.exp() + 1.0).log()
    return (smooth @ last).cross_entropy(labels) + (smooth * smooth).sum() * 0.1


def with_autograd(x):
    """The same formula in NumPy, for autograd."""
    hidden = anp.maximum(x @ first + bias, 0) * 0.5
    smooth = anp.log(anp.exp(hidden) + 1.0)
    logits = smooth @ last
    log_p = logits - anp.log(anp.exp(logits).sum(1, keepdims=True))
    return -log_p[np.arange(4), labels].sum() / 4 + (smooth * smooth).sum() * 0.1


def gradient(x):
    """The gradient with respect to x, by the tape."""
    out = with_tape(x)
    backward(out)
    return next(n.grad for n in tape(out, []) if n.name == "x")


nudges = 1e-5 * np.eye(12).reshape(12, 4, 3)
value = lambda x: float(with_tape(x).value)
measured = [(value(inputs + d) - value(inputs - d)) / 2e-5 for d in nudges]
from_differences = abs(gradient(inputs) - np.reshape(measured, (4, 3))).max()
from_autograd = abs(gradient(inputs) - grad(with_autograd)(inputs)).max()
print(f"largest distance from central differences: {from_differences:.0e}")
print(f"largest distance from autograd:            {from_autograd:.0e}")


# %%
@primitive
def tape_loss(x):
    """The value of the tape's function."""
    return np.asarray(with_tape(x).value, x.dtype)


defvjp(tape_loss, lambda y, x: lambda g: (g * gradient(x)).astype(x.dtype))
report = tp.check_vjp(tape_loss, inputs)
print("\n".join(line for line in str(report).split("\n") if "lowered" not in line))

# %% [markdown]
# The differences agree as far as differences can. The two libraries agree to rounding:
# they multiply the same derivatives. (The cell leaves out the lines of the report about
# *lowering*. Lesson 8 explains lowering.)
#
# **autograd is the same with more rules.** It has a node for each value, a sorted list,
# and a loop that adds gradients to parents. It replaces NumPy's functions by functions
# that also record, and it has a rule for most of them. `tinyprompt` adds some
# rules of its own. From lesson 1 on, we use autograd.
#
# ## A first soft prompt
#
# A toy model reads a text of 3 words in three steps: look up a vector for each word
# (**embedding**), take the **mean**, multiply by a matrix (**linear**). Its answer is
# one of 3 classes. It is frozen, and it has a fault: it answers class 0 too often. A
# soft prompt is 2 more vectors in front of the words. They are in the mean too.
#
# The tape has no lookup and no mean. Both are products: a row of `words` counts how
# often each of 12 words occurs in a text, so `words @ table` is the sum of the vectors.

# %%
P, L, D = 2, 3, 4
answers = np.repeat([0, 1, 2], 20)
table = np.repeat(np.eye(3, D), 4, axis=0) + 0.2 * rng.normal(size=(12, D))
table[:, 3] = 1  # all words share one direction ...
linear = np.concatenate([2 * np.eye(3), [[2.0, 0, 0]]])  # ... and class 0 likes it
words = np.zeros((60, 12))
for row, answer in zip(words, answers, strict=True):
    topic = rng.integers(4, size=2) + 4 * answer  # two words of the topic, one of any
    np.add.at(row, [*topic, rng.integers(12)], 1)


def toy(prompt, table, linear):
    """Logits (60, 3) of all texts; the prompt (P, D) is in front of each."""
    total = Node(words) @ table + Node(np.ones((1, P))) @ prompt  # (60, D) + (1, D)
    return (total * (1 / (P + L))) @ linear


def score(prompt):
    """The share of right answers, and how often the model gives each answer."""
    given = toy(node(prompt), table, linear).value.argmax(1)
    return (given == answers).mean(), np.bincount(given, minlength=3)


prompt, frozen = 0.1 * rng.normal(size=(P, D)), (table.tobytes(), linear.tobytes())
print("accuracy {:.2f}, answers per class {}".format(*score(prompt)))
print("right answers per class", np.bincount(answers))

# %% [markdown]
# ## Guess before you run: which vector moves more?
#
# The two vectors of the prompt begin at different random places. We now move both
# against their gradients, 60 times. **Guess:** which of the two moves further, the one
# that begins further away from where it must go, or the other one?

# %%
start, losses = prompt.copy(), []
for step in range(60):
    learned = Node(prompt)
    loss = toy(learned, Node(table), Node(linear)).cross_entropy(answers)
    backward(loss)
    prompt = prompt - 2.0 * learned.grad  # only the prompt moves
    losses.append(float(loss.value))
    if step in (0, 1, 5, 20, 59):
        print(f"step {step:2}: loss {losses[-1]:.3f}, accuracy {score(prompt)[0]:.2f}")
moved = prompt - start
same = (table.tobytes(), linear.tobytes()) == frozen
for i, row in enumerate(moved):
    print(f"vector {i} has moved by", " ".join(f"{number:+.3f}" for number in row))
print("table and linear as before, to the last bit:", same)

# %% [markdown]
# Both move by the same. The model takes a mean, so each vector has the same gradient,
# wherever it stands. The prompt of this toy can do one thing only: it adds the same
# numbers to the logits of all texts. That is enough to undo a preference for a class.
# It cannot treat two texts differently. A real model has attention between prompt and
# text, and lesson 2 shows what that changes.
#
# Two facts remain true for a T5 with billions of weights. The gradient goes *through*
# the frozen weights, and the weights do not move. Our tape also computes the gradients
# of the weights, and nobody uses them. autograd does not compute them, because it
# follows only the paths that begin at the prompt.

# %% [markdown]
# ## Exercises
#
# Write your code where it says *your turn*, and run the cell below it.
#
# **Exercise 1.** Write the rule of `y = tanh(x)`. You are given `g` and `y`. The
# derivative of tanh is $1 - \tanh^2$.

# %% tags=["exercise-1"]


def tanh_rule(g, y):
    """The gradient with respect to x. Shapes: g, y and the result (3, 5)."""
    ...  # your turn


# %%
@check("Exercise 1", tanh_rule, lambda g, y: y)
def _(mine):
    x, g = rng.normal(size=(2, 3, 5))
    found, zero = mine(g, np.tanh(x)), mine(g, np.zeros((3, 5)))
    yield np.allclose(zero, g), "at x = 0 the slope is 1: there the gradient is g"
    linear = np.allclose(mine(2 * g, np.tanh(x)), 2 * found)
    yield linear, "twice g is twice the gradient"
    slope = (np.tanh(x + 1e-5) - np.tanh(x - 1e-5)) / 2e-5
    at = np.unravel_index(np.abs(found / g - slope).argmax(), x.shape)
    yours = (found / g)[at]
    hint = f"at x = {x[at]:.3f} the slope is {slope[at]:.4f}; yours is {yours:.4f}"
    yield np.allclose(found, g * slope), hint


# %% [markdown]
# **Exercise 2.** Write the rule of `y = x.mean(0)`, from `(N, D)` to `(D,)`.

# %% tags=["exercise-2"]


def mean_rule(g, x):
    """The gradient with respect to x (N, D), where g is (D,)."""
    ...  # your turn


# %%
@check("Exercise 2", mean_rule, lambda g, x: x)
def _(mine):
    x, g = rng.normal(size=(3, 5)), rng.normal(size=5)
    found = mine(g, x)
    yield np.allclose(found, found[0]), "all rows are in the mean in the same way"
    yield np.allclose(mine(g, x[:1]), g), "the mean of one row is the row"
    hint = "if all rows rise by 1, the mean rises by 1: the rows must sum to g"
    yield np.allclose(found.sum(0), g), hint


# %% [markdown]
# **Exercise 3.** Write the rule of a real lookup, `y = table[ids]`, from `(V, D)` to
# `(L, D)`. A word may occur twice in a text.

# %% tags=["exercise-3"]


def lookup_rule(g, ids, table):
    """The gradient with respect to the table (V, D), where g is (L, D)."""
    ...  # your turn


# %%
@check("Exercise 3", lookup_rule, lambda g, ids, table: table)
def _(mine):
    table, g = rng.normal(size=(6, 4)), rng.normal(size=(3, 4))
    found = mine(g, np.array([5, 0, 2]), table)
    yield (found[[1, 3, 4]] == 0).all(), "words that the text lacks have the gradient 0"
    hint = "the row of a word receives the g of its place"
    yield np.allclose(found[[5, 0, 2]], g), hint
    twice = mine(g, np.array([5, 0, 5]), table)[5]
    yield np.allclose(twice, g[0] + g[2]), "a word that occurs twice receives both g"


# %% [markdown]
# [Solutions, and a common mistake for each](solutions/00_a_tape_in_60_lines.py)
#
# ## What holds
#
# The cell below states the numbers of this lesson as assertions. The project's tests
# run it.

# %%
assert y.value == 12 and order[-1].name == "loss" and len(order) == 7
assert all(n.grad.shape == n.value.shape for n in order)
assert from_differences < 1e-8 and from_autograd < 1e-12
assert report.ok
assert same and np.allclose(moved[0], moved[1], rtol=0, atol=1e-12)
assert losses[-1] < losses[0] - 0.1 and score(start)[0] < 0.5 < 0.9 < score(prompt)[0]
