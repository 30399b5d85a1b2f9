# %% [markdown]
# # 8 From NumPy to a graph: a compiler in an evening
#
# **You need:** vector-Jacobian products (lesson 1). A tape (lesson 0) helps. **Time:**
# 15 minutes to read, less than 90 seconds to run on two cores.
#
# So far NumPy has run the model, and autograd has differentiated it. This lesson is
# about a third way to read the same code: **write it down**. A function goes in, a list
# of operations comes out, and any program that knows these operations can run the list:
# on a phone, on a GPU, without Python. People call it *tracing* or *lowering*.
# `jax.jit` begins with it, and `torch.compile` with something close to it.
#
# You will build a tracer in some thirty lines, see what it can never do, and then use
# the tracer of `tinyprompt` on the *gradient* of a T5.

# %%
from collections import Counter

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np
from autograd import grad
from classroom import BLUE, GREY, HATCHES, ORANGE, check, diagram, figure, seconds

import tinyprompt as tp
from tinyprompt import PROMPT, LoweringError, compile, lower, train

# %% alt="A function, or its gradient, called with ghosts gives a list that others run."
diagram(
    {
        "f": ("function f", 0, 0, BLUE),
        "grad": ("grad(f)", 1, 0, ORANGE),
        "ghosts": ("called with ghosts", 0.5, 1, BLUE),
        "list": ("list of operations", 0.5, 2, BLUE),
        "numpy": ("NumPy", 0, 3, GREY),
        "onnx": ("ONNX Runtime", 1, 3, GREY),
    },
    [
        ("f", "ghosts", BLUE),
        ("grad", "ghosts", ORANGE),
        ("ghosts", "list", BLUE),
        ("list", "numpy", GREY),
        ("list", "onnx", GREY),
    ],
)
plt.show()

# %% [markdown]
# ## The idea: an array without numbers
#
# Call a function with a strange argument: an object that says it is an array, has a
# shape, but holds no numbers. Whenever the function computes something with it, the
# object does not compute. It writes a line into a notebook, and returns another such
# object, for the result. When the function is done, the notebook is the program.
#
# NumPy makes this easy. If one of the arguments of `np.tanh`, `+` or `@` has a method
# `__array_ufunc__`, NumPy calls that instead, and tells it which function it was going
# to run.

# %%


def shape_of(function, a, b=()):
    """The shape of a result, from the shapes of the inputs."""
    if function is np.matmul:
        return (*a[:-1], b[-1])
    return np.broadcast_shapes(a, b)  # one number out for each number in


class Ghost(np.lib.mixins.NDArrayOperatorsMixin):
    """An array without numbers, which writes down what is done with it.

    The mixin calls the NumPy function for each operator, such as `np.add` for `+`.
    """

    def __init__(self, program, name, shape):
        self.program, self.name, self.shape = program, name, shape

    def __array_ufunc__(self, function, method, *inputs):
        shape = shape_of(function, *(np.shape(x) for x in inputs))
        names = [x.name if isinstance(x, Ghost) else x for x in inputs]
        result = Ghost(self.program, f"v{len(self.program)}", shape)
        self.program.append((result.name, function, names, shape))
        return result

    def __bool__(self):  # without this method, Python takes every ghost for true
        raise TypeError(f"{self.name} has no numbers: it cannot decide an `if`")


def trace(function, **shapes):
    """The program of a function: (name, NumPy function, names of its inputs, shape) for
    each line."""
    program = []
    function(*(Ghost(program, name, shape) for name, shape in shapes.items()))
    return program


def run(program, **values):
    """Run a program. This loop is all that a machine must have."""
    for name, function, inputs, _ in program:
        values[name] = function(
            *(values[x] if isinstance(x, str) else x for x in inputs)
        )
    return values[name]


# %% [markdown]
# A small network, traced. The function never saw a number.

# %%


def network(x, w, b):
    """A layer and a gate."""
    h = np.tanh(x @ w + b)
    return h * (1 + np.exp(-h)) ** -1.0


program = trace(network, x=(2, 3), w=(3, 4), b=(4,))
for name, function, inputs, shape in program:
    print(f"{name}: {shape!s:7} = {function.__name__}({', '.join(map(str, inputs))})")

rng = np.random.default_rng(0)
values = dict(
    x=rng.normal(size=(2, 3)), w=rng.normal(size=(3, 4)), b=rng.normal(size=4)
)
same = np.array_equal(run(program, **values), network(**values))
print("the program says the same as the function:", same)

# %% [markdown]
# That is a compiler's front end. What it cannot do follows from how it works: **a ghost
# has no numbers, so no decision can depend on them.** `if x > 0` has no answer while
# tracing. Shapes are another matter. They are known, so a loop over layers, or an `if`
# on a length, is simply carried out, and only what it did is written down. A traced
# program has no loops and no branches at all.
#
# `tinyprompt.lowering.lower` is this idea grown up: it knows many more functions, gives
# each result the type that NumPy would give it, names your line in an error, and writes
# ONNX, a format that many programs run.

# %%
graph, _ = lower(
    lambda x, w: anp.tanh(x @ w.T).mean(-1),
    np.ones((2, 3), np.float32),
    np.ones((4, 3), np.float32),
)
print(graph)
try:
    lower(lambda x: x if x.sum() > 0 else -x, np.ones(3))
except LoweringError as error:
    refused = str(error)
print("\nrefused:", refused.partition(": it cannot")[0])

# %% [markdown]
# ## The gradient comes for free
#
# Here is the point of the whole design. autograd computes a gradient by *calling NumPy
# functions*, those in the rules of lesson 1. If they are called on ghosts, they write
# themselves down. So there is no second compiler for gradients: trace `grad(f)` in
# place of `f`.
#
# **Guess before you run:** the next cell lowers the gradient of a sum of exponentials.
# Is the sum in the list?

# %%


def loss(w, x):
    """A layer, added up."""
    return anp.exp(x @ w).sum()


slope, _ = lower(grad(loss), np.ones((3, 4), np.float32), np.ones((2, 3), np.float32))
print(slope)

# %% [markdown]
# Read it from the top. First comes what the loss needs. The derivative of exp is exp
# itself, so its value is used again. The last line is a product with the transposed
# input. It is the chain rule, carried out. A few things have been tidied up on the way.
# Equal lines are written once. A multiplication by 1, the gradient of the sum, has
# gone. The transposition has become a flag of the product. And the sum itself is not in
# the list: only the gradient was asked for, and **what no result needs is dropped.**
#
# ## A whole T5
#
# Nothing new is needed for a model. `train.loss_and_grads` is a NumPy function of a
# prompt, the weights and a batch. We lower the loss alone, and the loss with its
# gradient, and count the lines by kind.

# %% alt="Most frequent operations of the loss, and of the loss with its gradient."
model = tp.load("small")
case = tp.draw(model)  # a random batch, and a prompt of 20 vectors
arguments = {PROMPT: case.prompt}, model.params, model.config, case.batch
forward, _ = lower(train.loss, *arguments)
backward, _ = lower(train.loss_and_grads, *arguments)
kinds = [
    Counter(node.op.replace("Fused", "") for node in graph.nodes)
    for graph in (forward, backward)
]
most = [kind for kind, _ in kinds[1].most_common(10)]
fig, axes = figure(height=3.6)
places = np.arange(len(most))
for i, (label, counts) in enumerate(
    zip(("loss", "loss and gradient"), kinds, strict=True)
):
    axes.barh(
        places + 0.4 * i,
        [counts[kind] for kind in most],
        height=0.4,
        label=label,
        color=("0.9", "0.55")[i],
        edgecolor="black",
        hatch=HATCHES[i],
    )
axes.set_yticks(places + 0.2, most)
axes.invert_yaxis()
axes.set(
    xlabel="lines of the program", title="A T5 of 4 + 2 layers as a list of operations"
)
axes.legend()
plt.show()
for label, graph in (("loss", forward), ("loss and gradient", backward)):
    print(
        f"{label:18}{len(graph.nodes):5} lines, {len(graph.inputs)} "
        f"inputs, {len(graph.constants)} constants"
    )

# %% [markdown]
# A forward pass of this T5 is some four hundred lines, and training is about a
# thousand. There is no operation for "attention" or "gradient" in the list, and no
# training framework is needed to run it. It is ordinary arithmetic. This is how
# tinyprompt trains on a machine that only knows inference. (`FusedMatMul`, the product
# with a flag, is an operator of ONNX Runtime alone.
# [A plain graph](../docs/export.md) has only operators of the ONNX standard, for other
# runtimes.)
#
# ## The same list as C
#
# A list without loops and branches can also become C. With the extra `embedded`,
#
#     tinyprompt export --c in-c --model tiny --batch-size 8 --input-tokens 32 \
#         --prompt-length 8
#
# writes `in-c/step.c`: a function for each line of the training step. Here is one
# product of the first layer. Its 320 rows are 8 texts, each of 8 vectors of the prompt
# and 32 tokens. The weight matrix has 32 inputs and 64 outputs.
#
# ```c
# void node25_matmul(const float input0[320][32], const float input1[32][64],
#                    float output[320][64]) {
#     for (idx_t i0 = 0; i0 < 320; ++i0) {
#         for (idx_t i1 = 0; i1 < 64; ++i1) {
#             float acc = 0.0f;
#             for (idx_t k = 0; k < 32; ++k) {
#                 acc += input0[i0][k] * input1[k][i1];
#             }
#             output[i0][i1] = acc;
#         }
#     }
# }
# ```
#
# Three loops and one line are a matrix product. [docs/embedded.md](../docs/embedded.md)
# trains a prompt with this code.
#
# ## Does it say the same?
#
# A fast path deserves trust only if something holds it to the slow one.
# `compile(f, "cpu")` lowers `f` at its first call and runs the graph in ONNX Runtime
# from then on. In float64, the two must agree to rounding.

# %%
exact = (
    {PROMPT: case.prompt.astype(float)},
    tp.in_dtype(model.params, float),
    model.config,
    case.batch,
)
step = compile(train.loss_and_grads, "cpu")
value, grads = train.loss_and_grads(*exact)
value_too, grads_too = step(*exact)
apart = np.linalg.norm(grads[PROMPT] - grads_too[PROMPT]) / np.linalg.norm(
    grads[PROMPT]
)
print(
    f"loss {value:.12f} and {value_too:.12f}; "
    f"gradients differ by {apart:.0e} of their length"
)

# %% [markdown]
# ## Does it pay?
#
# The first call traces, optimises and opens a session. Later calls only run. So
# compiling is an investment, and whether it pays depends on the number of steps. We
# measure it, for a batch of 3 texts in float32.
#
# **Guess before you run:** after how many steps has the first call paid?

# %%
step = compile(
    train.loss_and_grads, "cpu"
)  # the same function, but the graph below is for float32
jobs = {
    "graph": lambda: step(*arguments),
    "NumPy": lambda: train.loss_and_grads(*arguments),
}
first_call = seconds(jobs, 1)["graph"]
by_graph, by_numpy = seconds(jobs, 20).values()
print(
    f"first call {1000 * first_call:.0f} ms, later ones "
    f"{1000 * by_graph:.1f} ms; NumPy {1000 * by_numpy:.1f} ms"
)
if by_graph < by_numpy:
    print(
        f"steps until the first call has paid: {first_call / (by_numpy - by_graph):.0f}"
    )

# %% [markdown]
# Among other things, the graph saves the walk through Python for each of the thousand
# lines. How much that is depends on the model, on the machine, and on the cores: the
# larger the products, the less it matters. To a GPU, the graph is the only way that
# tinyprompt has; [docs/devices.md](../docs/devices.md) has figures.

# %% [markdown]
# ## Exercises
#
# Here a program is a list of lines `(name, operation, inputs)`, with strings in all
# places, such as `("v0", "exp", ("x",))`. Lines come in the order in which they run.
#
# **Exercise 1.** *Dead code.* Write `needed(program, outputs)`: the lines that the
# outputs need, in the same order.

# %% tags=["exercise-1"]


def needed(program, outputs):
    """The program without the lines that none of the outputs needs."""
    ...  # your turn


# %%
@check("Exercise 1", needed, [])
def _(mine):
    a, b, c, d = (
        ("a", "exp", ("x",)),
        ("b", "add", ("a", "a")),
        ("c", "exp", ("b",)),
        ("d", "mul", ("a", "x")),
    )
    yield (
        list(mine([a], ["a"])) == [a],
        "of one line, which is the output, nothing may go",
    )
    yield (
        c not in mine([a, b, c, d], ["d"]),
        "nobody needs c, whose result no output uses",
    )
    yield (
        b not in mine([a, b, c, d], ["d"]),
        "only c needs b, and nobody needs c: so b must go too",
    )
    yield a in mine([a, b, c, d], ["c"]), "c needs b, and b needs a: so a must stay"
    yield (
        list(mine([a, b, c, d], ["c", "d"])) == [a, b, c, d],
        "all lines are needed, in this order",
    )


# %% [markdown]
# **Exercise 2.** *Common subexpressions.* Write `merged(program)`: of lines with the
# same operation and the same inputs, keep the first. Later lines that used the name of
# a dropped line use the name of the kept line.

# %% tags=["exercise-2"]


def merged(program):
    """The program with equal lines written once."""
    ...  # your turn


# %%
@check("Exercise 2", merged, [])
def _(mine):
    a, b = ("a", "exp", ("x",)), ("b", "exp", ("x",))
    c, d, e = ("c", "neg", ("a",)), ("d", "neg", ("b",)), ("e", "add", ("c", "d"))
    yield (
        list(mine([a, c])) == [a, c],
        "no two lines are equal here, nothing may change",
    )
    yield list(mine([a, b])) == [a], "a and b compute the same"
    yield (
        ("e", "add", ("c", "c")) in mine([a, b, c, d, e]),
        "if b is a, then -b is -a: d is equal to c as well",
    )
    yield (
        list(mine([a, b, c, d, e])) == [a, c, ("e", "add", ("c", "c"))],
        "three lines are left, in this order",
    )
    sub, bus = ("f", "sub", ("x", "y")), ("g", "sub", ("y", "x"))
    yield list(mine([sub, bus])) == [sub, bus], "x - y is not y - x"
    yield (
        list(mine([a, ("h", "neg", ("x",))])) == [a, ("h", "neg", ("x",))],
        "exp(x) is not -x",
    )


# %% [markdown]
# **Exercise 3.** *Shapes.* Our ghost's rule for `@` is wrong if the second array has
# batches: NumPy multiplies the last two axes and *broadcasts* the others. Write the
# rule for arrays of at least two axes. `np.broadcast_shapes` helps.

# %% tags=["exercise-3"]


def matmul_shape(a, b):
    """The shape of a product of arrays with the shapes a and b, such as (8, 2, 3) and
    (3, 4)."""
    ...  # your turn


# %%
@check("Exercise 3", matmul_shape, ())
def _(mine):
    for a, b in (
        ((2, 3), (3, 4)),
        ((8, 2, 3), (3, 4)),
        ((2, 3), (8, 3, 4)),
        ((5, 1, 2, 3), (8, 3, 4)),
    ):
        right = (np.zeros(a) @ np.zeros(b)).shape
        found = tuple(mine(a, b))
        yield (
            len(found) == len(right),
            f"{a} @ {b} has {len(right)} axes, yours has {len(found)}",
        )
        yield (
            found[-2:] == right[-2:],
            f"{a} @ {b}: the last two axes are not {found[-2:]}",
        )
        yield found == right, f"{a} @ {b}: the axes in front are not {found[:-2]}"


# %% [markdown]
# [Solutions, and a common mistake for each](solutions/08_from_numpy_to_a_graph.py)
#
# ## What holds

# %%
assert same
assert "bool" in refused or "numbers" in refused
assert [node.op for node in slope.nodes] == ["MatMul", "Exp", "FusedMatMul"]
assert (
    350 < len(forward.nodes) < 500
    and 2 * len(forward.nodes) < len(backward.nodes) < 1100
)
assert apart < 1e-12
assert first_call > by_graph
