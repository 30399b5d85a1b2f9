# %% [markdown]
# # 11 The whole thing, with your own code
#
# **You need:** the tape (lesson 0), a T5 layer (lesson 3), Adam (lesson 6) and a tracer
# (lesson 8). **Time:** 20 minutes to read, less than 90 seconds to run on two cores.
#
# You have written attention, a norm, a feed-forward, a loss, an optimiser and the rules
# of a compiler. In this lesson you put them together, and they tune a prompt for a T5.
# The logits, the gradient and the steps come from your functions and NumPy, without
# autograd. Then your code writes its own training step as an ONNX graph, and ONNX
# Runtime trains the same prompt.
#
# This lesson adds the frame around the pieces: a tape and a tracer in one, which you
# know from lessons 0 and 8. `tinyprompt` reads the weights and the rows, and it judges.
# At each step its loss must be yours, to 1e-6.

# %%
import time

import matplotlib.pyplot as plt
import numpy as np
import onnx
import onnxruntime
from classroom import BLUE, DEMO, GREY, ORANGE, check, diagram, figure, pieces
from onnx import helper, numpy_helper

import tinyprompt as tp
from tinyprompt import PROMPT, data, optim, train

# %% [markdown]
# ## Your pieces
#
# If an exercise is right, and this lesson needs its function, the check keeps your code
# in the folder `pieces`. Here the pieces come back. The solution stands in for a piece
# that you have not written. To write it now, open the lesson that is named beside it.
# Files that you edit in `pieces` are not checked again. If your loss differs from the
# loss of `tinyprompt` below, delete the edited files, and run their exercises again.

# %%
tanh_rule, log_softmax_vjp = pieces("tanh_rule", "log_softmax_vjp")
attend, causal_bias = pieces("my_attention", "causal_bias")
norm, shift_right, feed_forward = pieces("my_norm", "my_shift_right", "my_feed_forward")
put_in_front, mean_loss = pieces("put_in_front", "mean_loss")
(adam,) = pieces("adam")
needed, merged, matmul_shape = pieces("needed", "merged", "matmul_shape")

# %% alt="Text and prompt enter the T5, then the loss; gradients go back to the prompt."
diagram(
    {
        "prompt": ("put_in_front (4)", 0.1, 0, BLUE),
        "text": ("text", 1.3, 0, GREY),
        "model": ("my_norm (3)\nmy_attention (2)\nmy_feed_forward (3)", 0.8, 1, BLUE),
        "loss": ("mean_loss (4)", 0.8, 2, BLUE),
        "list": ("needed, merged,\nmatmul_shape (8)", 0.8, 3, GREY),
        "rules": ("tanh_rule (0)\nlog_softmax_vjp (1)", -0.3, 2, ORANGE),
        "adam": ("adam (6)", -0.3, 1, ORANGE),
    },
    [
        ("prompt", "model", BLUE),
        ("text", "model", GREY),
        ("model", "loss", BLUE),
        ("loss", "list", GREY),
        ("loss", "rules", ORANGE),
        ("rules", "adam", ORANGE),
        ("adam", "prompt", ORANGE),
    ],
    width=4.4,
)
plt.show()

# %% [markdown]
# ## One list is tape and program
#
# The tape of lesson 0 is a list of operations with their rules. The program of lesson 8
# is a list of operations without numbers. Here both are the same list. A line is
# `(name, operation, inputs)`, as in the exercises of lesson 8. The operation is a
# tuple: a kind, and a setting if it has one, such as the axes of a sum.
#
# The table has everything that this lesson knows about an operation: the function of
# NumPy, the operator of ONNX, and the rule. A rule receives `g`, the result `y`, the
# inputs and the setting. It returns a gradient for each input. Two of the rules are
# yours.


# %%
def cut(x, axis, first, last):
    """A part of an array along one axis."""
    return x[(slice(None),) * axis + (slice(first, last),)]


def log_softmax(x):
    """Over the last axis, for arrays and for ghosts."""
    if isinstance(x, Ghost):
        return ghost(("log_softmax",), x)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def two_parts(g, y, a, b, axis):
    """The rule of a concatenation: each input receives its part of g."""
    middle, end = a.shape[axis], y.shape[axis]
    return ghost(("cut", axis, 0, middle), g), ghost(("cut", axis, middle, end), g)


OPS = {
    "add": (np.add, "Add", lambda g, y, a, b: (g, g)),
    "subtract": (np.subtract, "Sub", lambda g, y, a, b: (g, -g)),
    "multiply": (np.multiply, "Mul", lambda g, y, a, b: (g * b, g * a)),
    "divide": (np.divide, "Div", lambda g, y, a, b: (g / b, -g * y / b)),
    "negative": (np.negative, "Neg", lambda g, y, x: (-g,)),
    "exp": (np.exp, "Exp", lambda g, y, x: (g * y,)),
    "log": (np.log, "Log", lambda g, y, x: (g / x,)),
    "sqrt": (np.sqrt, "Sqrt", lambda g, y, x: (g / (y + y),)),
    "tanh": (np.tanh, "Tanh", lambda g, y, x: (tanh_rule(g, y),)),
    "matmul": (np.matmul, "MatMul", lambda g, y, a, b: (g @ b.mT, a.mT @ g)),
    "log_softmax": (
        log_softmax,
        "LogSoftmax",
        lambda g, y, x: (log_softmax_vjp(g, y),),
    ),
    "equal": (lambda a, b: (a == b) * 1.0, "Equal", None),
    "cut": (cut, "Slice", None),
    "sum": (
        lambda x, axes: x.sum(axes, keepdims=True),
        "ReduceSum",
        lambda g, y, x, axes: (np.broadcast_to(g, x.shape),),
    ),
    "max": (
        lambda x, axes: x.max(axes, keepdims=True),
        "ReduceMax",
        lambda g, y, x, axes: (g * ghost(("equal",), x, y),),
    ),
    "reshape": (np.reshape, "Reshape", lambda g, y, x, shape: (g.reshape(x.shape),)),
    "transpose": (
        np.transpose,
        "Transpose",
        lambda g, y, x, order: (g.transpose([order.index(i) for i in range(x.ndim)]),),
    ),
    "broadcast": (np.broadcast_to, "Expand", lambda g, y, x, shape: (g,)),
    "concatenate": (
        lambda a, b, axis: np.concatenate([a, b], axis),
        "Concat",
        two_parts,
    ),
}

# %% [markdown]
# ## An array without numbers
#
# A `Ghost` is the tracer of lesson 8. NumPy calls `__array_ufunc__` for functions such
# as `np.exp` and `+`, and `__array_function__` for the others. `FUNCTIONS` says how
# these others are made of the operations in the table. Your pieces were written for
# arrays, and they do not notice the difference.


# %%
class Program:
    """The lines, the shape of each name, and the constants."""

    def __init__(self):
        self.lines, self.shapes, self.constants, self.known = [], {}, {}, {}

    def name(self, x):
        """The name of a ghost, or of a constant. Equal constants share a name."""
        if isinstance(x, Ghost):
            return x.name
        x = np.asarray(x, float)
        key = x.shape, x.tobytes()
        if key not in self.known:
            self.known[key] = f"c{len(self.known)}"
            self.constants[self.known[key]], self.shapes[self.known[key]] = x, x.shape
        return self.known[key]

    def input(self, name, shape):
        self.shapes[name] = tuple(shape)
        return Ghost(self, name)


def ghost(operation, *inputs):
    """Write down a line, and return the ghost of its result."""
    program = next(x.program for x in inputs if isinstance(x, Ghost))
    names = tuple(program.name(x) for x in inputs)
    shapes = [program.shapes[name] for name in names]
    kind, *setting = operation
    if kind == "matmul":
        shape = tuple(matmul_shape(*shapes))
    else:  # NumPy says it, for ones that take no memory
        shape = OPS[kind][0](*(np.broadcast_to(1.0, s) for s in shapes), *setting).shape
    name = f"v{len(program.lines)}"
    program.lines.append((name, operation, names))
    program.shapes[name] = shape
    return Ghost(program, name)


def unknown(what):
    """The error of a piece that this tracer cannot follow."""
    return TypeError(
        f"this tracer does not know {what}: write your piece without it, or delete its "
        "file in `pieces` to use the solution"
    )


class Ghost(np.lib.mixins.NDArrayOperatorsMixin):
    """A name in a program, with a shape."""

    dtype = np.dtype(float)

    def __init__(self, program, name):
        self.program, self.name = program, name

    def __array_ufunc__(self, function, method, *inputs, out=None):
        kind = function.__name__
        if method == "__call__" and kind in FUNCTIONS:
            return FUNCTIONS[kind](*inputs)
        if method != "__call__" or kind not in OPS:
            raise unknown(f"np.{kind}")
        return ghost((kind,), *inputs)

    def __array_function__(self, function, types, args, kwargs):
        if function.__name__ not in FUNCTIONS:
            raise unknown(f"np.{function.__name__}")
        return FUNCTIONS[function.__name__](*args, **kwargs)

    def __getitem__(self, key):
        """A new axis where the key has None; nothing else."""
        key = key if isinstance(key, tuple) else (key,)
        sizes = iter(self.shape)
        if not all(
            k is None or (isinstance(k, slice) and k == slice(None)) for k in key
        ):
            raise unknown("an index other than None and `:`")
        shape = [1 if k is None else next(sizes) for k in key]
        return self.reshape((*shape, *sizes))

    def __bool__(self):
        raise TypeError("a ghost has no numbers: it cannot decide an `if`")

    def __len__(self):
        return self.shape[0]

    shape = property(lambda x: x.program.shapes[x.name])
    ndim = property(lambda x: len(x.shape))
    T = property(lambda x: x.transpose())
    mT = property(lambda x: np.swapaxes(x, -1, -2))
    sum = lambda x, axis=None, keepdims=False: reduced("sum", x, axis, keepdims)
    max = lambda x, axis=None, keepdims=False: reduced("max", x, axis, keepdims)
    mean = lambda x, axis=None, keepdims=False: mean(x, axis, keepdims)
    astype = lambda x, dtype: x
    copy = lambda x: x

    def reshape(x, *shape):
        shape = shape if isinstance(shape[0], int) else tuple(shape[0])
        size = int(np.prod(x.shape))
        known = -int(np.prod(shape)) if -1 in shape else 1
        return ghost(
            ("reshape", tuple(size // known if n == -1 else n for n in shape)), x
        )

    def transpose(x, *order):
        order = order[0] if order and not isinstance(order[0], int) else order
        return ghost(("transpose", tuple(order) or tuple(range(x.ndim))[::-1]), x)


def reduced(kind, x, axis, keepdims):
    """A sum or a maximum over axes."""
    axes = range(x.ndim) if axis is None else np.atleast_1d(axis)
    axes = tuple(int(a) % x.ndim for a in axes)
    y = ghost((kind, axes), x)
    rest = [n for i, n in enumerate(x.shape) if i not in axes]
    return y if keepdims else y.reshape(rest)


def mean(x, axis=None, keepdims=False):
    """The sum, divided by the count."""
    total = x.sum(axis, keepdims)
    return total * (np.prod(total.shape) / np.prod(x.shape))


def power(x, n):
    """Whole powers, the square root, and one divided by them."""
    if n < 0:
        return 1 / power(x, -n)
    if n == 0.5:
        return np.sqrt(x)
    if n != int(n) or n == 0:
        raise unknown(f"** {n}")
    return x if n == 1 else x * power(x, n - 1)


def concatenate(arrays, axis=0):
    """Two at a time."""
    first, *others = arrays
    for x in others:
        ndim = max(np.ndim(first), np.ndim(x))
        first = ghost(("concatenate", axis % ndim), first, x)
    return first


def tile(x, times):
    """Copies side by side along each axis."""
    x = x.reshape((1,) * (len(times) - x.ndim) + x.shape)
    for axis, n in enumerate(times):
        x = concatenate([x] * n, axis)
    return x


def repeat(x, n, axis):
    """Copies of an axis of size 1."""
    if x.shape[axis] != 1:
        raise unknown("np.repeat along an axis that is longer than 1")
    return concatenate([x] * n, axis)


def pad(x, width, mode="constant", constant_values=0):
    """Constants in front of each axis, and behind it."""
    for axis, sizes in enumerate(width):
        shapes = [(*x.shape[:axis], n, *x.shape[axis + 1 :]) for n in sizes]
        front, behind = (np.full(shape, constant_values) for shape in shapes)
        x = concatenate([part for part in (front, x, behind) if np.size(part)], axis)
    return x


def swapaxes(x, a, b):
    """A transposition of two axes."""
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    return x.transpose(order)


FUNCTIONS = {
    "sum": lambda x, axis=None, keepdims=False: x.sum(axis, keepdims),
    "max": lambda x, axis=None, keepdims=False: x.max(axis, keepdims),
    "amax": lambda x, axis=None, keepdims=False: x.max(axis, keepdims),
    "mean": mean,
    "power": power,
    "square": lambda x: x * x,
    "reciprocal": lambda x: 1 / x,
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": lambda x, order=(): x.transpose(order),
    "swapaxes": swapaxes,
    "concatenate": concatenate,
    "stack": lambda arrays: concatenate([x[None] for x in arrays]),
    "tile": tile,
    "repeat": repeat,
    "pad": pad,
    "size": lambda x: int(np.prod(x.shape)),
    "broadcast_to": lambda x, shape: ghost(("broadcast", tuple(map(int, shape))), x),
    "ones_like": lambda x: np.ones(x.shape),
    "zeros_like": lambda x: np.zeros(x.shape),
    "shape": lambda x: x.shape,
    "ndim": lambda x: x.ndim,
}

# %% [markdown]
# ## Your T5
#
# Here is the model. The frozen weights come from the file of the built-in `tiny`, in
# float64, under their own names. Your pieces do the work. This cell adds the three
# things that no exercise had: the buckets of lesson 2, the heads, and the loop over the
# layers.

# %%
model = tp.load("tiny")
c, frozen = model.config, tp.in_dtype(model.params, float)
table = frozen["shared"]["weight"]


def position_bias(block, length, both_ways):
    """A table entry for the bucket of each pair of positions: (1, H, L, L)."""
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    buckets = c.relative_attention_num_buckets // (2 if both_ways else 1)
    bucket = (distance > 0) * buckets if both_ways else 0 * distance
    distance = abs(distance) if both_ways else np.maximum(-distance, 0)
    near = buckets // 2  # so many distances have a bucket each
    ratio = np.log(np.maximum(distance, 1) / near)
    far = ratio / np.log(c.relative_attention_max_distance / near) * (buckets - near)
    far = np.minimum(near + far.astype(int), buckets - 1)
    bucket = bucket + np.where(distance < near, distance, far)
    entries = block["0"]["layer"]["0"]["SelfAttention"]["relative_attention_bias"]
    return entries["weight"][bucket].transpose(2, 0, 1)[None]


def heads(y):
    """(B, T, H * K) -> (B, H, T, K)."""
    return y.reshape((*y.shape[:2], c.num_heads, c.d_kv)).transpose((0, 2, 1, 3))


def attention(x, states, bias, q, k, v, o, **_):
    """Queries from x, keys and values from the states."""
    queries = heads(x @ q["weight"].T)
    keys, values = heads(states @ k["weight"].T), heads(states @ v["weight"].T)
    mixed = attend(queries, keys, values, bias).transpose((0, 2, 1, 3))
    return mixed.reshape((*x.shape[:2], -1)) @ o["weight"].T


def stack(x, bias, weights, states=None, seen=None):
    """All blocks of the encoder; with the states of the encoder, of the decoder."""
    for i in range(len(weights["block"])):
        for layer in weights["block"][str(i)]["layer"].values():
            y = norm(x, layer["layer_norm"]["weight"])
            if "SelfAttention" in layer:
                y = attention(y, y, bias, **layer["SelfAttention"])
            elif "EncDecAttention" in layer:
                y = attention(y, states, seen, **layer["EncDecAttention"])
            else:
                dense = layer["DenseReluDense"]
                y = feed_forward(
                    y, *(dense[w]["weight"] for w in ("wi_0", "wi_1", "wo"))
                )
            x = x + y
    return norm(x, weights["final_layer_norm"]["weight"])


def loss(prompt, words, mask, read, right, weights):
    """The loss of a batch, with the prompt in front of each text.

    Shapes: words (B, L, D) and mask (B, L) of the texts; read (B, T, D), the input of
    the decoder; right (B, T, V), a 1 at each answer; weights (B, T), 0 at padding.
    """
    x, mask = put_in_front(prompt, words, mask)
    seen = ((1 - mask) * -1e9)[:, None, None, :]
    bias = position_bias(frozen["encoder"]["block"], x.shape[1], True)
    states = stack(x, bias + seen, frozen["encoder"])
    length = read.shape[1]
    bias = position_bias(frozen["decoder"]["block"], length, False)
    x = stack(read, bias + causal_bias(length), frozen["decoder"], states, seen)
    logits = (x * c.d_model**-0.5) @ table.T
    return mean_loss((log_softmax(logits) * right).sum(-1), weights)


# %% [markdown]
# ## Batches, and the first values
#
# The rows of the demo, in batches of one shape, so that one list serves all. Texts are
# cut after 24 tokens. The lookup of words is outside the list, because nobody needs its
# gradient. The prompt begins with the vectors of random words.

# %%
P, B = 10, 16
rows = tp.read_rows(DEMO / "topic.train.tsv")
whole = data.batch_of(rows, model.tokenizer, 24)


def inputs_of(i):
    """The inputs of `loss` for one batch."""
    ids, mask, labels, weights = (x[i * B : (i + 1) * B] for x in whole)
    right = (labels[..., None] == np.arange(c.vocab_size)) * 1.0
    read = table[shift_right(labels)]
    return dict(words=table[ids], mask=mask, read=read, right=right, weights=weights)


batches = [inputs_of(i) for i in range(len(rows) // B)]
rng = np.random.default_rng(0)
first = table[rng.choice(np.arange(3, 5000), P, replace=False)]
plain = loss(first, **batches[0])
print(f"the loss of your model, on plain arrays: {plain:.12f}")

# %% [markdown]
# ## Reverse mode writes more lines
#
# `gradient` is `backward` of lesson 0. It goes through the list from the end. Each rule
# is called on ghosts, so it computes nothing: it adds lines to the list. `live` are the
# names that depend on the prompt. Nobody asks for the gradient of the weights, so no
# line for it is written. This is all there is to freezing.
#
# **Guess before you run:** the loss of this model takes some four hundred lines. How
# many lines does the gradient add: half as many, as many, or twice as many?


# %%
def fit(g, shape):
    """Sum over the axes along which a value was repeated, as in lesson 0."""
    front = len(g.shape) - len(shape)
    axes = [i for i in range(front, g.ndim) if shape[i - front] == 1 < g.shape[i]]
    axes = (*range(front), *axes)
    return g.sum(axes).reshape(shape) if axes else g


def gradient(out, source):
    """Write down the gradient of a number with respect to an input."""
    program, lines, live = out.program, list(out.program.lines), {source.name}
    for name, _, inputs in lines:
        live |= {name} if live & set(inputs) else set()
    grads = {out.name: np.ones(())}
    for name, (kind, *setting), inputs in reversed(lines):
        if name not in grads:
            continue
        values = [program.constants.get(x, Ghost(program, x)) for x in inputs]
        found = OPS[kind][2](grads[name], Ghost(program, name), *values, *setting)
        for x, g in zip(inputs, found, strict=True):
            if x in live:
                g = fit(g, program.shapes[x])
                grads[x] = grads[x] + g if x in grads else g
    return grads[source.name]


program = Program()
shapes = {"prompt": first.shape} | {name: x.shape for name, x in batches[0].items()}
ghosts = {name: program.input(name, shape) for name, shape in shapes.items()}
value = loss(**ghosts)
forward = len(program.lines)
slope = gradient(value, ghosts["prompt"])
outputs = [value.name, slope.name]
lines = needed(merged(program.lines), outputs)
print(f"loss: {forward} lines; with gradient: {len(program.lines)} lines")
print(f"after your `merged` and `needed`: {len(lines)} lines; the last four:")
for name, operation, inputs in lines[-4:]:
    print(f"  {name} {program.shapes[name]} = {operation} of {', '.join(inputs)}")

# %% [markdown]
# ## Tune
#
# `run` is the interpreter of lesson 8. It computes the lines in their order. The loop
# below is the training loop: a batch, the lines, a step of your Adam. Beside it,
# `tinyprompt` takes its own steps, from the same start and on the same batches.
#
# **Guess before you run:** both compute in float64, with other formulas in another
# order. Will the two losses of a step be equal to the last digit?


# %%
def run(lines, outputs, **inputs):
    """The values of the outputs."""
    values = program.constants | inputs
    for name, (kind, *setting), names in lines:
        values[name] = OPS[kind][0](*(values[x] for x in names), *setting)
    return [values[name] for name in outputs]


def tune(step, steps=40, learning_rate=0.1):
    """The losses, the prompt, and the seconds. `step` computes loss and gradient."""
    prompt, m, v, losses = first, 0 * first, 0 * first, []
    start = time.perf_counter()
    for t in range(1, steps + 1):
        found, g = step(prompt, batches[t % len(batches)])
        prompt, m, v = adam(prompt, g, m, v, t, learning_rate)
        losses.append(float(found))
    return np.array(losses), prompt, time.perf_counter() - start


mine, prompt, by_numpy = tune(lambda p, batch: run(lines, outputs, prompt=p, **batch))

parts = [
    data.Batch(*(x[i * B : (i + 1) * B] for x in whole)) for i in range(len(batches))
]
optimizer, trainable, theirs = optim.adam(), {PROMPT: first}, []
state = optimizer.init(trainable)
for t in range(1, len(mine) + 1):
    found, grads = train.loss_and_grads(trainable, frozen, c, parts[t % len(parts)])
    trainable, state = optimizer.update(trainable, grads, state, 0.1)
    theirs.append(float(found))
apart = np.abs(mine - theirs).max()
for t in (0, 9, 39):
    print(f"step {t + 1:2}: yours {mine[t]:.12f}, tinyprompt {theirs[t]:.12f}")
print(f"largest difference in {len(mine)} steps: {apart:.1e}")
final = float(train.loss({PROMPT: prompt}, frozen, c, parts[0]))
yours = float(run(lines, outputs, prompt=prompt, **batches[0])[0])
print(f"your tuned prompt: your loss {yours:.12f}, tinyprompt {final:.12f}")
print(f"difference: {abs(yours - final):.1e}")

# %% [markdown]
# The losses agree to rounding: the formulas are the same, the order of the sums is not.
#
# ## To a graph
#
# Your list has everything that an ONNX graph needs. A line becomes a node. A constant
# becomes an initializer. A setting becomes an attribute or a small input of whole
# numbers. The result of `Equal` is not a number, so a `Cast` follows.


# %%
def to_onnx(lines, outputs, shapes):
    """A model of ONNX with these lines."""
    used = {x for _, _, inputs in lines for x in inputs}
    constants = {name: x for name, x in program.constants.items() if name in used}
    nodes = []

    def whole_numbers(name, values):
        constants[name] = np.array(values, np.int64)
        return name

    for name, (kind, *setting), inputs in lines:
        attributes, inputs, result = {}, list(inputs), name
        if kind in ("reshape", "broadcast", "sum", "max"):
            inputs.append(whole_numbers(f"{name}.setting", setting[0]))
        elif kind == "cut":
            axis, first, last = ([n] for n in setting)
            extra = {"first": first, "last": last, "axis": axis}
            inputs += [whole_numbers(f"{name}.{word}", n) for word, n in extra.items()]
        elif kind in ("transpose", "concatenate", "log_softmax"):
            word = "perm" if kind == "transpose" else "axis"
            attributes = {word: setting[0] if setting else -1}
        elif kind == "equal":
            result = f"{name}.bool"
        nodes.append(helper.make_node(OPS[kind][1], inputs, [result], **attributes))
        if kind == "equal":
            double = onnx.TensorProto.DOUBLE
            nodes.append(helper.make_node("Cast", [result], [name], to=double))
    double = lambda name, shape: helper.make_tensor_value_info(name, 11, shape)
    graph = helper.make_graph(
        nodes,
        "a training step",
        [double(name, shape) for name, shape in shapes.items()],
        [double(name, program.shapes[name]) for name in outputs],
        [
            numpy_helper.from_array(np.ascontiguousarray(x), n)
            for n, x in constants.items()
        ],
    )
    opset = helper.make_opsetid("", 18)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10)


file = to_onnx(lines, outputs, shapes)
onnx.checker.check_model(file, full_check=True)
session = onnxruntime.InferenceSession(
    file.SerializeToString(), providers=["CPUExecutionProvider"]
)
print(f"{len(file.graph.node)} nodes, {file.ByteSize():,} bytes")


def by_runtime(prompt, batch):
    """Loss and gradient by ONNX Runtime."""
    given = {"prompt": prompt} | batch
    return session.run(
        outputs, {name: np.asarray(x, float) for name, x in given.items()}
    )


graph_losses, graph_prompt, by_graph = tune(by_runtime)
graph_apart = np.abs(graph_losses - mine).max()
print(f"ONNX Runtime and NumPy: the losses of all steps differ by {graph_apart:.1e}")
print(f"{len(mine)} steps: in NumPy {by_numpy:.1f} s, as a graph {by_graph:.1f} s")

# %% alt="Loss over 40 steps: three curves that lie on each other."
fig, axes = figure()
axes.plot(theirs, label="tinyprompt", marker="", lw=5, color="0.8", ls="-")
axes.plot(mine, label="your pieces, in NumPy", marker="", ls="--")
axes.plot(graph_losses, label="your graph, in ONNX Runtime", ls="", marker="o")
axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
axes.set_title("Three ways to one curve")
axes.legend()
plt.show()

# %% [markdown]
# This is all of it: a T5, a soft prompt, reverse mode, an optimiser, a compiler. What
# `tinyprompt` adds are other methods and formats, faster forms, care with float32, and
# errors that say how to go on. The loss falls, but `tiny` stays a small model. Lesson
# 10 asks what size changes.

# %% [markdown]
# ## Exercises
#
# A program is again a list of lines `(name, operation, inputs)`.
#
# **Exercise 1.** *Where to sum.* A value of shape `small` was broadcast to the shape
# `large`. Write `summed_axes(small, large)`: the axes of the gradient, which has the
# shape `large`, over which `fit` sums.

# %% tags=["exercise-1"]


def summed_axes(small, large):
    """The axes along which a value was repeated, as a tuple in rising order."""
    ...  # your turn


# %%
@check("Exercise 1", summed_axes, ())
def _(mine):
    cases = {
        ((3, 5), (3, 5)): "the shapes are equal, so nothing was repeated",
        ((5,), (2, 3, 5)): "axes in front that the value lacks were repeated",
        ((3, 1), (3, 5)): "an axis of size 1 was repeated",
        ((3, 1), (3, 1)): "an axis of size 1 that stays 1 was not repeated",
        (
            (1, 4),
            (2, 3, 4),
        ): "axes are counted in the large shape, not in the small one",
    }
    for (small, large), hint in cases.items():
        found = tuple(mine(small, large))
        repeated = np.broadcast_to(np.zeros(small), large).strides
        right = tuple(i for i, n in enumerate(large) if repeated[i] == 0 and n > 1)
        yield found == right, f"{small} to {large}: {hint}"


# %% [markdown]
# **Exercise 2.** *The prompt's part.* Write `depends(program, source)`: the names of
# the lines whose value changes with the input `source`, in their order. All other lines
# could be computed once, before training.

# %% tags=["exercise-2"]


def depends(program, source):
    """The names of the lines that depend on the source."""
    ...  # your turn


# %%
@check("Exercise 2", depends, [])
def _(mine):
    a, b = ("a", "exp", ("x",)), ("b", "exp", ("w",))
    c, d = ("c", "add", ("a", "b")), ("d", "neg", ("b",))
    yield "a" in mine([a, b], "x"), "a reads x itself"
    yield "b" not in mine([a, b], "x"), "b reads only w"
    yield "c" in mine([a, b, c], "x"), "c reads a, and a changes with x"
    yield (
        list(mine([a, b, c, d], "x")) == ["a", "c"],
        "two of the four lines depend on x",
    )
    yield list(mine([a, b, c, d], "w")) == ["b", "c", "d"], "three depend on w"


# %% [markdown]
# **Exercise 3.** *Memory.* After the last line that reads a value, its memory is free.
# Write `last_use(program)`: for each name that a line reads, the index of the last line
# that reads it.

# %% tags=["exercise-3"]


def last_use(program):
    """A dict from a name to the index of a line."""
    ...  # your turn


# %%
def of_inputs(program):
    """What the result is like."""
    return {x: 0 for _, _, inputs in program for x in inputs}


@check("Exercise 3", last_use, of_inputs)
def _(mine):
    a, b = ("a", "exp", ("x",)), ("b", "mul", ("a", "x"))
    c = ("c", "add", ("b", "b"))
    yield mine([a])["x"] == 0, "the lines are counted from 0"
    yield mine([a, b])["x"] == 1, "line 1 reads x again"
    yield mine([a, b, c]) == {"x": 1, "a": 1, "b": 2}, "x, a and b: lines 1, 1 and 2"


# %% [markdown]
# [Solutions, and a common mistake for each](solutions/11_the_whole_thing.py)
#
# ## What holds

# %%
assert abs(plain - float(train.loss({PROMPT: first}, frozen, c, parts[0]))) < 1e-6
assert apart < 1e-6 and abs(yours - final) < 1e-6
assert graph_apart < 1e-6 and np.abs(graph_prompt - prompt).max() < 1e-6
assert 1.5 * forward < len(lines) < len(program.lines) < 4 * forward
assert mine[-4:].mean() < mine[:4].mean() / 2
