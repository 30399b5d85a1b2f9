"""Lower a NumPy function to an ONNX graph: call it on traced arrays and write down what it does.

    graph, result = lower(lambda x, w: np.tanh(x @ w.T).mean(-1), x, w)
    print(graph)                # one line a node
    model = graph.to_onnx()     # inputs and outputs in the order of the arguments and results

A traced array knows its shape and dtype but holds no numbers. NumPy hands every function called on
one to `__array_ufunc__` or `__array_function__`; there a rule emits ONNX nodes and returns another
traced array. autograd needs to know only that a traced array is an array: its reverse pass then
calls NumPy functions on traced arrays too, so a gradient lowers like any other function.

`UFUNCS` and `FUNCTIONS` are the rules for NumPy, `PRIMITIVES` those for ops.py. Equal nodes are
emitted once, nodes that no output needs are dropped. Knows nothing of T5.
Unlike NumPy's, the max, min and argmax of ONNX Runtime may pass over a NaN.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from autograd.extend import VSpace
from autograd.numpy.numpy_boxes import ArrayBox
from autograd.numpy.numpy_vspaces import ArrayVSpace
from ml_dtypes import bfloat16
from numpy.lib.array_utils import normalize_axis_index, normalize_axis_tuple

from tinyprompt import ops
from tinyprompt.tree import leaves, refill

OPSET, IR_VERSION, MICROSOFT = 21, 10, "com.microsoft"
TINY = np.float32(1e-30)  # instead of 0 in a denominator
FEW = 32  # rows with which a large matrix is better on the left of a product
SHORT = 6  # elements of a constant that is printed in place
# Frames that are not the user's.
HIDDEN = ("tinyprompt/lower.py", "tinyprompt/ops.py", "tinyprompt/backend.py", "/autograd/", "/numpy/")


class LoweringError(TypeError):
    """Something that a graph cannot hold; the message names the NumPy function and the line that called it."""

    def __init__(self, what: str):
        frame: Any = sys._getframe(1)
        while frame.f_back and any(part in frame.f_code.co_filename.replace("\\", "/") for part in HIDDEN):
            frame = frame.f_back
        super().__init__(f"{what} ({frame.f_code.co_filename}, line {frame.f_lineno}, in {frame.f_code.co_name})")


class Traced(np.lib.mixins.NDArrayOperatorsMixin):
    """An array in a graph that is being written: its name, shape and dtype, and the node that makes it."""

    def __init__(self, graph, name, shape, dtype, op=None, inputs=(), attributes=None, value=None):
        self.graph, self.name, self.shape, self.dtype = graph, name, tuple(shape), np.dtype(dtype)
        self.op, self.inputs, self.attributes, self.value = op, inputs, attributes or {}, value

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: int(np.prod(self.shape, dtype=int)))
    T = property(lambda self: transpose(self))

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        if any(isinstance(x, ArrayBox) for x in inputs):
            return NotImplemented  # autograd goes first, and comes back with what is in the box
        if ufunc is np.add and method == "at" and isinstance(inputs[0], Traced):  # autograd's gradient of x[index]
            total, index, x = inputs
            return total.become(total + scatter(cast(as_traced(self.graph, x), total.dtype), index, total.shape))
        if method != "__call__":
            raise LoweringError(f"numpy.{ufunc.__name__}.{method} cannot be lowered")
        if options.get("out") is not None:
            raise LoweringError(f"numpy.{ufunc.__name__} in place cannot be lowered; write x = x + y, not x += y")
        if ufunc not in UFUNCS or options:
            raise LoweringError(f"numpy.{ufunc.__name__}{f' with {list(options)}' if options else ''} has no rule")
        rule = UFUNCS[ufunc]
        return elementwise(ufunc, rule, inputs) if isinstance(rule, str) else rule(*inputs)

    def __array_function__(self, function, types, args, kwargs):
        if any(issubclass(t, ArrayBox) for t in types):
            return NotImplemented
        name = f"{function.__module__}.{function.__name__}"
        if function not in FUNCTIONS:
            raise LoweringError(f"{name} has no rule")
        try:
            return FUNCTIONS[function](*args, **kwargs)
        except LoweringError:
            raise
        except TypeError as error:
            raise LoweringError(f"{name} with these arguments has no rule: {error}") from None

    def __array_primitive__(self, op, function, args, kwargs):
        out = PRIMITIVES[op](*args, **kwargs) if op in PRIMITIVES else NotImplemented
        return function(*args, **kwargs) if out is NotImplemented else out

    def _no_value(self, *_, **__):
        raise LoweringError(
            f"{self!r} has no numbers while it is traced: it cannot become a NumPy array or a Python number, "
            "be iterated over, or decide an `if`"
        )

    __array__ = __iter__ = __bool__ = __int__ = __float__ = __index__ = __contains__ = _no_value
    __hash__ = object.__hash__  # the mixin's `==` is elementwise

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        return getitem(self, index)

    def __setitem__(self, index, value):
        raise LoweringError("x[...] = y in place cannot be lowered; build the array with numpy.concatenate or where")

    def view(self, kind):
        """autograd asks for a view as np.ndarray."""
        return self if kind is np.ndarray else self._no_value()

    def copy(self):
        """The same array of the graph as another Python object."""
        return Traced(**vars(self))

    def become(self, other):
        """Stand for another array from now on: all that `+=` can mean where nothing is in place."""
        vars(self).update(vars(other))

    def __repr__(self):
        return f"{self.name}: {self.dtype}[{','.join(map(str, self.shape))}]"


class TracedVSpace(ArrayVSpace):
    """What autograd asks of an array: zeros and ones of its shape, and sums that it may add to later."""

    def __init__(self, value):
        self.shape, self.dtype, self.graph = value.shape, value.dtype, value.graph

    def zeros(self):
        return self.graph.constant(super().zeros())

    def ones(self):
        return self.graph.constant(super().ones())

    def _add(self, x, y):
        return cast(x + y, x.dtype).copy()

    _mut_add = _add


ArrayBox.register(Traced)
VSpace.register(Traced, TracedVSpace)


class Graph:
    """A straight-line program of ONNX nodes. `print` it; `to_onnx()` is the model."""

    def __init__(self, bf16: bool = False) -> None:
        self.bf16 = bf16  # multiply float32 matrices as bfloat16
        self.inputs: list[Traced] = []
        self.frozen: set[str] = set()  # names of inputs that never change
        self.int8: set[str] = set()  # those among them that are quantised
        self.derived: dict[tuple[str, Callable], list[Traced]] = {}  # what is to be computed once from such an input
        self.nodes: list[Traced] = []
        self.constants: dict[Any, Traced] = {}
        self.outputs: list[Traced] = []
        self._known: dict[Any, Traced] = {}

    def input(self, name: str, shape, dtype) -> Traced:
        """An array that is given when the graph runs."""
        self.inputs.append(Traced(self, name, shape, dtype))
        return self.inputs[-1].copy()

    def derive(self, source: Traced, recipe: Callable, *parts) -> list[Traced]:
        """Further inputs: the arrays `recipe(source)`, to be computed once, for the source is frozen.

        parts: shape and dtype of each of these arrays.
        """
        if (source.name, recipe) not in self.derived:
            self.derived[source.name, recipe] = [
                Traced(self, f"{source.name}.{recipe.__name__}.{i}", *part) for i, part in enumerate(parts)
            ]
        return [x.copy() for x in self.derived[source.name, recipe]]

    def constant(self, value) -> Traced:
        """An array of the graph itself."""
        value = np.array(value, order="C")
        key = (value.dtype, value.shape, value.tobytes())
        if key not in self.constants:
            self.constants[key] = Traced(self, f"c{len(self.constants)}", value.shape, value.dtype, value=value)
        return self.constants[key].copy()

    def emit(self, op: str, *inputs, shape, dtype, **attributes) -> Traced:
        """A node with one output; the node that is there already if there is an equal one."""
        arrays = tuple(as_traced(self, x).copy() for x in inputs)
        key: tuple = (op, tuple(x.name for x in arrays), repr(sorted(attributes.items())))
        if is_widening(op, arrays):  # anew for each use: what waits for the backward pass takes memory
            key += (len(self._known),)
        if key not in self._known:
            self._known[key] = Traced(self, f"v{len(self._known)}", shape, dtype, op, arrays, attributes)
            self.nodes.append(self._known[key])
        return self._known[key].copy()

    def finish(self, outputs: Iterable[Traced]) -> "Graph":
        """Name the outputs and drop what none of them needs."""
        self.outputs = list(outputs)
        needed = {x.name for x in self.outputs}
        for node in reversed(self.nodes):
            if node.name in needed:
                needed |= {x.name for x in node.inputs}
        self.nodes = [node for node in self.nodes if node.name in needed]
        self.constants = {key: c for key, c in self.constants.items() if c.name in needed}
        self.derived = {key: xs for key, xs in self.derived.items() if any(x.name in needed for x in xs)}
        replaced = {name for name, _ in self.derived} - needed
        self.inputs = [x for x in self.inputs if x.name not in replaced]
        return self

    def all_inputs(self) -> list[Traced]:
        """The inputs, then what is derived from them."""
        return [*self.inputs, *(x for xs in self.derived.values() for x in xs)]

    def __str__(self) -> str:
        def show(x):
            return str(x.value.tolist()) if x.value is not None and x.size <= SHORT else x.name

        lines = [f"{x!r} = input" for x in self.all_inputs()]
        lines += [f"{x!r} = constant" for x in self.constants.values() if x.size > SHORT]
        for x in self.nodes:
            arguments = [*map(show, x.inputs), *(f"{k}={v}" for k, v in x.attributes.items() if k != "domain")]
            lines.append(f"{x!r} = {x.op}({', '.join(arguments)})")
        return "\n".join([*lines, f"return {', '.join(map(show, self.outputs))}"])

    def to_onnx(self, outputs: Iterable[str] | None = None):
        """The graph as an onnx.ModelProto, checked. Outputs are called `output_0`, `output_1`, ... or as is said."""
        import onnx
        from onnx import helper

        def kind(dtype):
            return helper.np_dtype_to_tensor_dtype(dtype)

        def info(x, name=None):
            return helper.make_tensor_value_info(name or x.name, kind(x.dtype), x.shape)

        def node(x):
            attributes = {k: kind(v) if isinstance(v, np.dtype) else v for k, v in x.attributes.items()}
            return helper.make_node(x.op, [i.name for i in x.inputs], [x.name], **attributes)

        named = dict(zip(outputs or [f"output_{i}" for i in range(len(self.outputs))], self.outputs, strict=True))
        model = helper.make_model(
            helper.make_graph(
                [node(x) for x in self.nodes]
                + [helper.make_node("Identity", [x.name], [name]) for name, x in named.items()],
                "tinyprompt",
                [info(x) for x in self.all_inputs()],
                [info(x, name) for name, x in named.items()],
                [onnx.numpy_helper.from_array(c.value, c.name) for c in self.constants.values()],
                value_info=[info(x) for x in self.nodes],  # for readers: no other tool knows Microsoft's operators
            ),
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
            ir_version=IR_VERSION,
            producer_name="tinyprompt",
        )
        onnx.checker.check_model(model)
        return model


def is_widening(op: str, inputs) -> bool:
    """Whether a node casts 16-bit weights as they are given."""
    return op == "Cast" and inputs[0].op is None and inputs[0].dtype in (np.float16, bfloat16)


def named(function: Callable, arguments: tuple) -> Iterator[tuple[str, Any]]:
    """All leaves of the arguments with the names they have as inputs.

    The leaves of a dict keep their dotted names (those of a checkpoint), others begin with the parameter's name.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    used = set()
    for i, argument in enumerate(arguments):
        parameter = names[i] if i < len(names) else f"argument_{i}"
        for name, leaf in leaves(argument, "" if isinstance(argument, dict) else parameter):
            while name in used or re.fullmatch(r"([vc]|output_)\d+|", name):  # the graph's own names
                name = f"{parameter}.{name}"
            used.add(name)
            yield name, leaf


def is_frozen(array: Any) -> bool:
    """Whether neither an array nor what it is a view of can be written: what is made of it once stays true."""
    while isinstance(array, np.ndarray):
        if array.flags.writeable:
            return False
        array = array.base
    return True


def lower(function: Callable, *arguments, int8: str | None = None, bf16: bool = False) -> tuple[Graph, Any]:
    """Call `function` on traced arrays in place of every array in `arguments`.

    Arrays may stand in dicts, tuples, lists and named tuples; read are only their shapes and dtypes, and whether they
    are frozen (see `is_frozen`). Everything else (numbers, strings, functions, arrays that the function has from
    elsewhere) becomes part of the graph.
    int8: in `ops.linear`, frozen weights of 16 or 32 bits whose names begin with this are quantised. bf16: float32
    matrices are multiplied as bfloat16. All else, above all softmax and loss, keeps its dtype.
    Returns the graph, and the function's result with a traced array for every output.
    Raises LoweringError for what ONNX cannot say.
    """
    graph = Graph(bf16)

    def given(name, x):
        if not isinstance(x, np.ndarray | np.generic):
            return x
        if x.ndim == 2 and is_frozen(x):
            graph.frozen.add(name)
            if int8 is not None and name.startswith(int8) and x.dtype in (np.float16, bfloat16, np.float32):
                graph.int8.add(name)
        return graph.input(name, x.shape, x.dtype)

    result = function(*refill(arguments, (given(name, x) for name, x in named(function, arguments))))
    found = [graph.constant(x) if isinstance(x, np.ndarray | np.generic) else x for _, x in leaves(result)]
    return graph.finish(x for x in found if isinstance(x, Traced)), refill(result, iter(found))


# ---- rules for ufuncs: the name of the ONNX operator, or a function ----


def elementwise(ufunc, op: str, inputs) -> Traced:
    """One node, after the casts and the broadcasting that NumPy would do."""
    graph = next(x.graph for x in inputs if isinstance(x, Traced))
    inputs = [x if isinstance(x, Traced) or type(x) in (int, float) else np.asarray(x) for x in inputs]
    *kinds, kind = ufunc.resolve_dtypes((*(x.dtype if hasattr(x, "dtype") else type(x) for x in inputs), None))
    if op in ("And", "Or", "Not"):
        kinds = [np.dtype(bool)] * len(inputs)
    elif np.dtype(bool) in kinds and op != "Equal":
        raise LoweringError(f"numpy.{ufunc.__name__} of booleans has no rule; cast them first")
    arrays = [
        cast(x, k) if isinstance(x, Traced) else graph.constant(np.asarray(x, k))
        for x, k in zip(inputs, kinds, strict=True)
    ]
    shape = np.broadcast_shapes(*(x.shape for x in arrays))
    if all(x.value is not None for x in arrays):
        return graph.constant(ufunc(*(x.value for x in arrays)))
    for i, x in enumerate(arrays):
        if len(arrays) == 2 and arrays[1 - i].shape == shape and is_one_number(x):  # a reverse pass makes many
            number = x.value.flat[0]
            if number == NEUTRAL.get(ufunc) and (i == 1 or ufunc in (np.add, np.multiply)):
                return arrays[1 - i].copy()
            arrays[i] = graph.constant(number)
    return graph.emit(op, *arrays, shape=shape, dtype=kind)


def is_one_number(x: Traced) -> bool:
    """Whether x is a constant whose elements are all the same."""
    return x.value is not None and x.size > 0 and x.value.tobytes() == x.value.flat[0].tobytes() * x.size


NEUTRAL = {np.add: 0, np.subtract: 0, np.multiply: 1, np.true_divide: 1}
UNROLLED: dict[float, Callable] = {
    1: lambda x: x.copy(),
    2: lambda x: x * x,
    3: lambda x: x * x * x,
    -1: lambda x: 1 / x,
}


def power(x, y) -> Traced:
    """`x ** y` of floats; as products where y is a small whole number."""
    kind = np.result_type(*(a.dtype if hasattr(a, "dtype") else a for a in (x, y)))
    if kind.kind != "f":
        raise LoweringError("numpy.power of integers has no rule; cast them first")
    if isinstance(x, Traced) and type(y) in (int, float) and y in UNROLLED:
        return UNROLLED[y](cast(x, kind))
    return elementwise(np.power, "Pow", (x, y))


def matmul(a, b) -> Traced:
    """`a @ b`. The transpose of an operand becomes a flag, so that no transposed copy is made."""
    graph = a.graph if isinstance(a, Traced) else b.graph
    a, b = as_traced(graph, a), as_traced(graph, b)
    if not a.ndim or not b.ndim or a.shape[-1] != b.shape[max(0, b.ndim - 2)]:
        raise LoweringError(f"numpy.matmul: the shapes {a.shape} and {b.shape} do not fit")
    kind = np.matmul.resolve_dtypes((a.dtype, b.dtype, None))[-1]
    a, b = cast(a, kind), cast(b, kind)
    if b.ndim == 1:
        return reshape(matmul(a, reshape(b, -1, 1)), a.shape[:-1])
    if a.ndim == 1:
        return reshape(matmul(reshape(a, 1, -1), b), (*b.shape[:-2], b.shape[-1]))
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    product = np.dtype(bfloat16) if graph.bf16 and kind == np.float32 else kind
    a, b = cast(a, product), cast(b, product)
    (a_source, a_flag), (b_source, b_flag) = untransposed(a), untransposed(b)
    if product in (np.float32, bfloat16) and (a_flag or b_flag):
        flags = {name: 1 for name, flag in (("transA", a_flag), ("transB", b_flag)) if flag}
        out = graph.emit("FusedMatMul", a_source, b_source, shape=shape, dtype=product, domain=MICROSOFT, **flags)
    else:
        out = graph.emit("MatMul", a, b, shape=shape, dtype=product)
    return cast(out, kind)


def untransposed(x: Traced) -> tuple[Traced, bool]:
    """(y, True) where x is y with its last two axes swapped, else (x, False)."""
    axes = [*range(x.ndim - 2), x.ndim - 1, x.ndim - 2]
    return (x.inputs[0], True) if x.op == "Transpose" and x.attributes["perm"] == axes else (x, False)


UFUNCS: dict[Any, Any] = {
    np.add: "Add",
    np.subtract: "Sub",
    np.multiply: "Mul",
    np.true_divide: "Div",
    np.maximum: "Max",
    np.minimum: "Min",
    np.negative: "Neg",
    np.absolute: "Abs",
    np.sign: "Sign",
    np.exp: "Exp",
    np.log: "Log",
    np.sqrt: "Sqrt",
    np.tanh: "Tanh",
    np.sin: "Sin",
    np.cos: "Cos",
    np.floor: "Floor",
    np.ceil: "Ceil",
    np.greater: "Greater",
    np.greater_equal: "GreaterOrEqual",
    np.less: "Less",
    np.less_equal: "LessOrEqual",
    np.equal: "Equal",
    np.logical_and: "And",
    np.logical_or: "Or",
    np.logical_not: "Not",
    np.not_equal: lambda x, y: np.logical_not(np.equal(x, y)),
    np.square: lambda x: x * x,
    np.power: power,
    np.matmul: matmul,
    np.cosh: lambda x: (np.exp(x) + np.exp(-x)) / 2,  # in autograd's gradient of tanh
    np.conjugate: lambda x: x.copy(),
}


# ---- rules for functions, with NumPy's own signatures ----


def as_traced(graph: Graph, x) -> Traced:
    """A traced array as it is, anything else as a constant."""
    return x if isinstance(x, Traced) else graph.constant(x)


def cast(x: Traced, dtype) -> Traced:
    """`x.astype(dtype)`."""
    dtype = np.dtype(dtype)
    if x.dtype == dtype:
        return x.copy()
    if x.value is not None:
        return x.graph.constant(x.value.astype(dtype))
    if x.op == "Transpose":
        return transpose(cast(x.inputs[0], dtype), x.attributes["perm"])
    if x.op == "Reshape":
        return reshape(cast(x.inputs[0], dtype), x.shape)
    if is_widening(x.op, x.inputs) and x.dtype.kind == "f" and dtype in (x.inputs[0].dtype, bfloat16):
        return cast(x.inputs[0], dtype)
    if x.name in x.graph.frozen and dtype == bfloat16:
        return x.graph.derive(x, rounded, (x.shape, dtype))[0]
    return x.graph.emit("Cast", x, shape=x.shape, dtype=dtype, to=dtype)


def reshape(x, *shape, order=None) -> Traced:
    """`x.reshape(shape)`; one after another is one."""
    if order not in (None, "C"):
        raise LoweringError(f"numpy.reshape in order {order!r} has no rule")
    wanted = [int(n) for n in (shape if len(shape) != 1 or isinstance(shape[0], int | np.integer) else shape[0])]
    if -1 in wanted:
        known = int(np.prod([n for n in wanted if n != -1], dtype=int))
        wanted[wanted.index(-1)] = x.size // known if known else 0
    if int(np.prod(wanted, dtype=int)) != x.size or min(wanted, default=0) < 0:
        raise LoweringError(f"numpy.reshape: {x!r} does not fit the shape {tuple(wanted)}")
    if x.value is not None:
        return x.graph.constant(x.value.reshape(wanted))
    if x.op == "Reshape":
        x = x.inputs[0]
    if x.shape == tuple(wanted):
        return x.copy()
    zero = {"allowzero": 1} if 0 in wanted else {}
    return x.graph.emit("Reshape", x, np.array(wanted, np.int64), shape=wanted, dtype=x.dtype, **zero)


def transpose(x, *axes) -> Traced:
    """`x.transpose(axes)`; one after another is one, and moving axes of length 1 only is a reshape."""
    given = axes[0] if len(axes) == 1 and not isinstance(axes[0], int | np.integer) else axes or None
    order = list(normalize_axis_tuple(tuple(range(x.ndim)[::-1] if given is None else given), x.ndim))
    if len(order) != x.ndim:
        raise LoweringError(f"numpy.transpose: {x!r} does not have {len(order)} axes")
    shape = [x.shape[a] for a in order]
    moved = [a for a in order if x.shape[a] != 1]
    if moved == sorted(moved):
        return reshape(x, shape)
    if x.op == "Transpose":
        x, order = x.inputs[0], [x.attributes["perm"][a] for a in order]
        if order == sorted(order):
            return x.copy()
    return x.graph.emit("Transpose", x, shape=shape, dtype=x.dtype, perm=order)


def swapaxes(a, axis1, axis2) -> Traced:
    axes = list(range(a.ndim))
    axes[axis1], axes[axis2] = axes[axis2], axes[axis1]
    return transpose(a, axes)


def reduction(op: str):
    """A rule for np.sum and its kind."""

    def rule(a, axis=None, *, keepdims=False):
        axes = sorted(range(a.ndim) if axis is None else normalize_axis_tuple(axis, a.ndim))
        if a.size == 0 and op != "ReduceSum":
            raise LoweringError(f"{op} of {a!r}, which is empty, has no rule")
        if op == "ReduceSum" and a.dtype.kind in "bi":
            a = cast(a, np.int64)
        if op == "ReduceMean" and a.dtype.kind != "f":
            a = cast(a, np.float64)
        shape = [1 if i in axes else n for i, n in enumerate(a.shape) if keepdims or i not in axes]
        if all(a.shape[i] == 1 for i in axes):
            return reshape(a, shape)
        return a.graph.emit(op, a, np.array(axes, np.int64), shape=shape, dtype=a.dtype, keepdims=int(keepdims))

    return rule


def argmax(a, axis=None, *, keepdims=False) -> Traced:
    if axis is None:
        return argmax(reshape(a, -1), 0)
    axis = normalize_axis_index(axis, a.ndim)
    shape = [1 if i == axis else n for i, n in enumerate(a.shape) if keepdims or i != axis]
    return a.graph.emit("ArgMax", a, shape=shape, dtype=np.int64, axis=axis, keepdims=int(keepdims))


def dot(a, b) -> Traced:
    if np.ndim(a) == 0 or np.ndim(b) == 0:
        return a * b
    if np.ndim(b) > 2:
        raise LoweringError("numpy.dot with more than two axes on the right has no rule; use numpy.matmul")
    return np.matmul(a, b)


def einsum(subscripts, *operands, optimize=None) -> Traced:
    """The inner product over the last axis is a product and a sum; other sums go to ONNX's Einsum."""
    graph = next(x.graph for x in operands if isinstance(x, Traced))
    arrays = [as_traced(graph, x) for x in operands]
    kind = np.result_type(*(x.dtype for x in arrays))
    if subscripts == "...i,...i->...":
        return cast(np.sum(arrays[0] * arrays[1], axis=-1), kind)
    if not re.fullmatch(r"[a-z]+(,[a-z]+)*->[a-z]*", subscripts):
        raise LoweringError(f"numpy.einsum of {subscripts!r} has no rule; write it as 'ab,bc->ac'")
    letters = "".join(subscripts.partition("->")[0].split(","))
    length = dict(zip(letters, [n for x in arrays for n in x.shape], strict=True))
    shape = [length[letter] for letter in subscripts.partition("->")[2]]
    return graph.emit("Einsum", *(cast(x, kind) for x in arrays), shape=shape, dtype=kind, equation=subscripts)


def concatenate(arrays, axis=0) -> Traced:
    graph = next(x.graph for x in arrays if isinstance(x, Traced))
    arrays = [as_traced(graph, x) for x in arrays]
    kind = np.result_type(*(x.dtype for x in arrays))
    axis = normalize_axis_index(axis, arrays[0].ndim)
    shape = list(arrays[0].shape)
    if any(
        x.ndim != len(shape) or (*x.shape[:axis], *x.shape[axis + 1 :]) != (*shape[:axis], *shape[axis + 1 :])
        for x in arrays
    ):
        raise LoweringError(f"numpy.concatenate: the shapes {[x.shape for x in arrays]} do not fit along axis {axis}")
    shape[axis] = sum(x.shape[axis] for x in arrays)
    return graph.emit("Concat", *(cast(x, kind) for x in arrays), shape=shape, dtype=kind, axis=axis)


def stack(arrays, axis=0) -> Traced:
    graph = next(x.graph for x in arrays if isinstance(x, Traced))
    return concatenate([np.expand_dims(as_traced(graph, x), axis) for x in arrays], axis)


def expand_dims(a, axis) -> Traced:
    axes = axis if isinstance(axis, tuple | list) else (axis,)
    axes = normalize_axis_tuple(axes, a.ndim + len(axes))
    rest = iter(a.shape)
    return reshape(a, [1 if i in axes else next(rest) for i in range(a.ndim + len(axes))])


def squeeze(a, axis=None) -> Traced:
    axes = [i for i, n in enumerate(a.shape) if n == 1] if axis is None else normalize_axis_tuple(axis, a.ndim)
    return reshape(a, [n for i, n in enumerate(a.shape) if i not in axes])


def broadcast_to(array, shape) -> Traced:
    shape = tuple(int(n) for n in shape)
    if np.broadcast_shapes(array.shape, shape) != shape:
        raise LoweringError(f"numpy.broadcast_to: {array!r} does not fit the shape {shape}")
    if array.shape == shape:
        return array.copy()
    return array.graph.emit("Expand", array, np.array(shape, np.int64), shape=shape, dtype=array.dtype)


def where(condition, x, y) -> Traced:
    graph = next(a.graph for a in (condition, x, y) if isinstance(a, Traced))
    x, y = (a if isinstance(a, Traced) or type(a) in (int, float) else np.asarray(a) for a in (x, y))
    kind = np.result_type(*(a.dtype if hasattr(a, "dtype") else a for a in (x, y)))
    x, y = (cast(a, kind) if isinstance(a, Traced) else graph.constant(np.asarray(a, kind)) for a in (x, y))
    condition = as_traced(graph, condition)
    if condition.dtype != bool:
        condition = np.not_equal(condition, 0)
    shape = np.broadcast_shapes(condition.shape, x.shape, y.shape)
    return graph.emit("Where", condition, x, y, shape=shape, dtype=kind)


def clip(a, a_min=None, a_max=None, *, min=None, max=None) -> Traced:
    low, high = a_min if min is None else min, a_max if max is None else max
    a = a if low is None else np.maximum(a, low)
    return a if high is None else np.minimum(a, high)


def take(a, indices, axis=None) -> Traced:
    graph = a.graph if isinstance(a, Traced) else indices.graph
    if axis is None:
        raise LoweringError("numpy.take without an axis has no rule")
    a, indices = as_traced(graph, a), cast(as_traced(graph, indices), np.int64)
    axis = normalize_axis_index(axis, a.ndim)
    shape = (*a.shape[:axis], *indices.shape, *a.shape[axis + 1 :])
    return graph.emit("Gather", a, indices, shape=shape, dtype=a.dtype, axis=axis)


def take_along_axis(arr, indices, axis=-1) -> Traced:
    graph = arr.graph if isinstance(arr, Traced) else indices.graph
    arr, indices = as_traced(graph, arr), cast(as_traced(graph, indices), np.int64)
    axis = normalize_axis_index(axis, arr.ndim)
    rest = [i for i in range(arr.ndim) if i != axis]
    if arr.ndim != indices.ndim or any(arr.shape[i] != indices.shape[i] for i in rest):
        raise LoweringError("numpy.take_along_axis that broadcasts has no rule")
    return graph.emit("GatherElements", arr, indices, shape=indices.shape, dtype=arr.dtype, axis=axis)


def getitem(x: Traced, index) -> Traced:
    """Integers, slices, None and ... as NumPy has them; one array of integers among full slices."""
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, np.ndarray | Traced | list) for i in index):
        at = [k for k, i in enumerate(index) if i is not Ellipsis and not (isinstance(i, slice) and i == slice(None))]
        if len(at) == 1 and Ellipsis not in index[: at[0]]:
            indices = as_traced(x.graph, index[at[0]])
            if indices.dtype.kind in "iu":
                return take(x, indices, at[0])
        raise LoweringError("x[...] with a mask or with several index arrays has no rule; use numpy.where or take")
    shape = np.broadcast_to(np.zeros((), bool), x.shape)[index].shape  # NumPy checks the bounds
    if Ellipsis not in index:
        index += (Ellipsis,)
    gap, given = index.index(Ellipsis), len(index) - 1 - index.count(None)
    index = (*index[:gap], *[slice(None)] * (x.ndim - given), *index[gap + 1 :])
    kept, limits = list(x.shape), []
    for axis, i in enumerate(i for i in index if i is not None):
        n = x.shape[axis]
        start, stop, step = (i if isinstance(i, slice) else slice(i, i + 1 or None)).indices(n)
        kept[axis] = len(range(start, stop, step))
        if kept[axis] == 0:
            limits.append((0, 0, axis, 1))
        elif (start, stop, step) != (0, n, 1):
            limits.append((start, stop if stop >= 0 else -n - 1, axis, step))
    if limits:
        x = x.graph.emit("Slice", x, *np.array(limits, np.int64).T, shape=kept, dtype=x.dtype)
    return reshape(x, shape)


def scatter(x: Traced, index, shape) -> Traced:
    """Zeros of a shape with x added at an index: the gradient of `y[index]`."""
    if any(isinstance(i, Traced) for i in (index if isinstance(index, tuple) else (index,))):
        raise LoweringError("the gradient of x[indices] with traced indices has no rule")
    at = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)[index]
    zeros = np.zeros(int(np.prod(shape, dtype=int)), x.dtype)
    x = reshape(broadcast_to(x, at.shape), -1)
    out = x.graph.emit("ScatterElements", zeros, at.reshape(-1), x, shape=zeros.shape, dtype=x.dtype, reduction="add")
    return reshape(out, shape)


FUNCTIONS: dict[Any, Callable] = {
    # These answer with numbers, for they depend on nothing but shape and dtype.
    np.shape: lambda a: a.shape,
    np.ndim: lambda a: a.ndim,
    np.result_type: lambda *a: np.result_type(*(x.dtype if isinstance(x, Traced) else x for x in a)),
    np.iscomplexobj: lambda x: False,
    np.zeros_like: lambda a, dtype=None: np.zeros(a.shape, dtype or a.dtype),
    np.ones_like: lambda a, dtype=None: np.ones(a.shape, dtype or a.dtype),
    np.full_like: lambda a, fill_value, dtype=None: np.full(a.shape, fill_value, dtype or a.dtype),
    np.sum: reduction("ReduceSum"),
    np.mean: reduction("ReduceMean"),
    np.max: reduction("ReduceMax"),
    np.min: reduction("ReduceMin"),
    np.argmax: argmax,
    np.dot: dot,
    np.einsum: einsum,
    np.reshape: reshape,
    np.ravel: lambda a: reshape(a, -1),
    np.transpose: transpose,
    np.swapaxes: swapaxes,
    np.expand_dims: expand_dims,
    np.squeeze: squeeze,
    np.broadcast_to: broadcast_to,
    np.concatenate: concatenate,
    np.stack: stack,
    np.where: where,
    np.clip: clip,
    np.take: take,
    np.take_along_axis: take_along_axis,
    np.astype: lambda x, dtype, copy=True: cast(x, dtype),
}


def method(function):
    """A NumPy function as the method of a traced array."""
    return lambda self, *args, **kwargs: self.__array_function__(function, (), (self, *args), kwargs)


METHODS = "sum mean max min argmax dot reshape ravel transpose swapaxes squeeze clip take astype"
for _name in METHODS.split():
    setattr(Traced, _name, method(getattr(np, _name)))


# ---- rules for the primitives of ops.py, where ONNX has one node for them; the others lower as they are written ----


def same_shape(op: str, **attributes):
    """A rule for an operator whose result looks like its input."""
    return lambda x: x.graph.emit(op, x, shape=x.shape, dtype=x.dtype, **attributes)


def gelu(x) -> Traced:
    if x.dtype == np.float64:  # ONNX Runtime's double kernel has constants in float32
        return NotImplemented
    return same_shape("Gelu", approximate="tanh")(x)


def keep(x, rate, rng) -> Traced:
    """Other numbers than NumPy's: from a generator seeded by `rng` that each run of the graph carries on."""
    seed = float(rng.integers(2**24))
    return cast(same_shape("RandomUniformLike", seed=seed)(x) >= rate, x.dtype)


def linear(x, weight) -> Traced:
    """With a weight that is to be in int8: it is quantised once, by columns, and x every time anew, by rows.

    A few rows go to the right, `(weight @ x.T).T`: ONNX Runtime copies the right side of a product into another layout.
    """
    if not isinstance(x, Traced) or not isinstance(weight, Traced) or x.dtype != np.float32 or not x.size:
        return NotImplemented
    source, transposed = untransposed(weight)
    n_out, n_in = weight.shape
    if source.name not in x.graph.int8:
        if transposed or not 1 < x.size // n_in <= FEW:
            return NotImplemented
        return reshape(transpose(ops.widen(weight, x.dtype) @ transpose(reshape(x, -1, n_in))), *x.shape[:-1], n_out)
    parts = ((n_in, n_out), np.int8), ((n_out,), np.float32)
    columns = x.graph.derive(source, quantized if transposed else quantized_transpose, *parts)
    rows = reshape(x, -1, n_in)
    largest = np.maximum(np.max(np.abs(rows), axis=-1, keepdims=True), TINY)
    operands, shape = (rows / largest, *columns), (rows.shape[0], n_out)
    out = x.graph.emit("DynamicQuantizeMatMul", *operands, shape=shape, dtype=x.dtype, domain=MICROSOFT)
    return reshape(out * largest, *x.shape[:-1], n_out)


def add_rows(g, ids, count) -> Traced:
    """One ScatterND, for ids that are known only when the graph runs."""
    zeros = broadcast_to(as_traced(g.graph, np.zeros((1, 1), g.dtype)), (count, g.shape[-1]))
    at = reshape(as_traced(g.graph, ids), -1, 1)
    rows = reshape(g, -1, g.shape[-1])
    return g.graph.emit("ScatterND", zeros, at, rows, shape=zeros.shape, dtype=g.dtype, reduction="add")


def quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (I, O) as int8 (I, O) and the scale of each column (O,): `weight` is about `int8 * scale`."""
    weight = ops.widen(weight).astype(np.float32, copy=False)
    scale = np.maximum(np.abs(weight).max(0), TINY) / np.float32(largest_int8())
    return np.rint(weight / scale).astype(np.int8), scale


@functools.cache
def largest_int8() -> int:
    """What the largest weight of a column becomes: 127, or 64 where the machine cannot sum products of 8 bits exactly.

    x86 without VNNI (before 2019, and AMD before 2022) adds two products of 255 in 16 bits, which hold 2 x 255 x 64 but
    not 2 x 255 x 127, and saturates silently. A product of the worst case tells.
    """
    return 127 if int8_is_exact(127) else 64


def int8_is_exact(largest: int) -> bool:
    """Whether the largest activations times weights of `largest` and `-largest` sum up right, in few rows and many."""
    import onnxruntime

    width, columns = 256, 32
    weight = np.full((width, columns), largest, np.int8) * np.array([1, -1] * (columns // 2), np.int8)
    for rows in (1, 16):
        x = np.ones((rows, width), np.float32)
        values: dict[str, np.ndarray] = {"x": x, "weight": weight, "scale": np.ones(columns, np.float32)}
        graph = Graph()
        operands = [graph.input(name, value.shape, value.dtype) for name, value in values.items()]
        shape = (rows, columns)
        out = graph.emit("DynamicQuantizeMatMul", *operands, shape=shape, dtype=np.float32, domain=MICROSOFT)
        model = graph.finish([out]).to_onnx().SerializeToString()
        (found,) = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, values)
        if not np.allclose(found, x @ weight, rtol=1e-4):
            return False
    return True


def quantized_transpose(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of the transpose."""
    return quantized(weight.T)


def rounded(weight: np.ndarray) -> tuple[np.ndarray]:
    """An array as bfloat16."""
    return (weight.astype(bfloat16),)


PRIMITIVES: dict[Any, Callable] = {
    ops.embedding: lambda table, ids: ops.widen(take(table, ids, 0)),
    ops.add_rows: add_rows,
    ops.linear: linear,
    ops.softmax: same_shape("Softmax", axis=-1),
    ops.log_softmax: same_shape("LogSoftmax", axis=-1),
    ops.logistic: same_shape("Sigmoid"),
    ops.relu: same_shape("Relu"),
    ops.gelu: gelu,
    ops.keep: keep,
}
