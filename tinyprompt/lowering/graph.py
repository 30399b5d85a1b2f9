"""Traced arrays and the graph that they write: what a NumPy function does, as nodes of ONNX.

    graph, result = lower(lambda x, w: np.tanh(x @ w.T).mean(-1), x, w)
    print(graph)                # one line a node
    model = graph.to_onnx()     # inputs and outputs in the order of the arguments and results

A traced array has a shape and a dtype but no numbers. NumPy hands every function called on one to
`__array_ufunc__` or `__array_function__`. There a rule emits ONNX nodes and returns another traced
array. autograd only has to know that a traced array is an array: its reverse pass then calls NumPy
functions on traced arrays too, so a gradient lowers like any other function.

The graph knows no rule: `rules` and `primitives` fill `RULES`. Equal nodes are emitted once; nodes
that no output needs are dropped.
"""

import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from autograd.extend import VSpace
from autograd.numpy.numpy_boxes import ArrayBox
from autograd.numpy.numpy_vspaces import ArrayVSpace

OPSET, IR_VERSION, MICROSOFT = 21, 10, "com.microsoft"
OUTPUT = "output"  # among attributes: which one of an operator's two outputs an array is
SHORT = 6  # elements of a constant that is printed in place
# Frames that are not the user's.
OURS = ("lowering/", "ops.py", "device.py", "tree.py")
HIDDEN = (*(f"tinyprompt/{name}" for name in OURS), "/autograd/", "/numpy/", "/scipy/")
RULES: dict[Any, Callable] = {}  # what runs on traced arrays in place of a function of NumPy, Python or ops.py


class LoweringError(TypeError):
    """Something that a graph cannot hold; the message names the NumPy function and the line that called it."""

    def __init__(self, what: str):
        super().__init__(f"{what} ({user_line(sys._getframe(1))})")


def user_line(frame: Any) -> str:
    """The user's line that led to a frame; in a backward pass, the line whose gradient it is."""
    while frame.f_back and any(part in frame.f_code.co_filename.replace("\\", "/") for part in HIDDEN):
        if frame.f_code.co_name == "vjp_of_line":
            return f"in the gradient of {frame.f_locals['line']}"
        frame = frame.f_back
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}, in {frame.f_code.co_name}"


def without_numbers(what: str) -> Callable:
    """A method that a traced array cannot have, with what to do in its place."""

    def method(self, *_, **__):
        raise LoweringError(f"{self!r} has no numbers while it is traced: {what}")

    return method


@dataclass(eq=False, repr=False)
class Traced(np.lib.mixins.NDArrayOperatorsMixin):
    """An array in a graph that is being written: its name, shape and dtype, and the node that makes it."""

    graph: "Graph"
    name: str
    shape: tuple[int, ...]
    dtype: Any
    op: str | None = None
    inputs: tuple["Traced", ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    value: Any = None  # the numbers of a constant

    def __post_init__(self):
        self.shape, self.dtype = tuple(self.shape), np.dtype(self.dtype)

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: int(np.prod(self.shape, dtype=int)))
    T = property(lambda self: np.transpose(self))

    __array__ = without_numbers(
        "a NumPy array cannot hold it; use numpy.stack, concatenate or where, or autograd's array"
    )
    __bool__ = without_numbers("it cannot decide an `if`, `and`, `or` or `not`; use numpy.where or numpy.logical_and")
    __int__ = __float__ = __complex__ = __index__ = item = tolist = without_numbers(
        "it cannot become a Python number; let the function return it"
    )
    __contains__ = without_numbers("`in` needs them; use numpy.any(x == y)")
    __hash__ = object.__hash__  # the mixin's `==` is elementwise

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        if any(isinstance(x, ArrayBox) for x in inputs):
            return NotImplemented  # autograd goes first, and comes back with what is in the box
        function = ufunc if method == "__call__" else getattr(ufunc, method)
        name = f"numpy.{ufunc.__name__}{'' if function is ufunc else f'.{method}'}"
        if options.get("out") is not None:
            raise LoweringError(f"{name} in place cannot be lowered; write x = x + y, not x += y")
        if function not in RULES or options:
            raise LoweringError(f"{name}{f' with {list(options)}' if options else ''} has no rule")
        return RULES[function](*inputs)

    def __array_function__(self, function, types, args, kwargs):
        if any(issubclass(t, ArrayBox) for t in types):
            return NotImplemented
        name = f"{function.__module__}.{function.__name__}"
        if function not in RULES:
            raise LoweringError(f"{name} has no rule")
        try:
            return RULES[function](*args, **kwargs)
        except LoweringError:
            raise
        except TypeError as error:
            raise LoweringError(f"{name} with these arguments has no rule: {error}") from None

    def __array_primitive__(self, op, function, args, kwargs):
        out = RULES[op](*args, **kwargs) if op in RULES else NotImplemented
        return function(*args, **kwargs) if out is NotImplemented else out

    def __len__(self):
        if not self.shape:
            raise LoweringError(f"{self!r} is one number and has no length")
        return self.shape[0]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        return RULES[operator.getitem](self, index)

    def __setitem__(self, index, value):
        raise LoweringError("x[...] = y in place cannot be lowered; build the array with numpy.concatenate or where")

    def __format__(self, spec):
        return repr(self) if not spec else without_numbers(f"{spec!r} cannot format it")(self)

    def view(self, kind):
        """The array itself: autograd asks for a view as np.ndarray."""
        if kind is not np.ndarray:
            raise LoweringError("x.view(dtype) has no rule")
        return self

    def copy(self):
        """The same array of the graph as another Python object."""
        return Traced(**vars(self))

    def become(self, other):
        """Stand for another array from now on: all that `+=` can mean where nothing is in place."""
        vars(self).update(vars(other))

    def __repr__(self):
        return f"{self.name}: {array_kind(self.dtype, self.shape)}"


class TracedVSpace(ArrayVSpace):
    """What autograd asks of an array: zeros and ones of its shape, and sums that it may add to later."""

    def __init__(self, value):
        self.shape, self.dtype, self.graph = value.shape, value.dtype, value.graph

    def zeros(self):
        return self.graph.array(super().zeros())

    def ones(self):
        return self.graph.array(super().ones())

    def _add(self, x, y):
        return np.astype(x + y, x.dtype)

    _mut_add = _add


class TracedBox(ArrayBox):
    """What autograd wraps a traced array in; it remembers the line for errors of the backward pass."""

    __slots__ = ()

    def __init__(self, value, trace, node):
        super().__init__(value, trace, node)
        if node.parents:
            vjp = node.vjp

            def vjp_of_line(g, line=user_line(sys._getframe(1))):  # noqa: B008
                return vjp(g)

            node.vjp = vjp_of_line


TracedBox.register(Traced)
VSpace.register(Traced, TracedVSpace)


def refuse_complex(dtype) -> None:
    """Raise LoweringError for complex numbers."""
    if np.dtype(dtype).kind == "c":
        raise LoweringError(f"{dtype} cannot be lowered: ONNX Runtime does not compute with complex numbers")


class Graph:
    """A straight-line program of ONNX nodes. `print` it; `to_onnx()` is the model."""

    def __init__(self, int8: str | None = None, bf16: bool = False) -> None:
        self.int8, self.bf16 = int8, bf16  # what `lower` was told, for the rules
        self.inputs: list[Traced] = []
        self.frozen: set[str] = set()  # names of matrices among the inputs that never change
        self.derived: dict[tuple[str, Callable], list[Traced]] = {}  # what is computed once from such an input
        self.nodes: list[Traced] = []
        self.constants: dict[Any, Traced] = {}
        self.outputs: list[Traced] = []
        self._known: dict[Any, Traced] = {}

    def input(self, name: str, shape, dtype) -> Traced:
        """An array that is given when the graph runs."""
        refuse_complex(dtype)
        self.inputs.append(Traced(self, name, shape, dtype))
        return self.inputs[-1].copy()

    def derive(self, source: Traced, recipe: Callable, *parts) -> list[Traced]:
        """Further inputs: the arrays `recipe(source)`, to be computed once, since the source is frozen.

        parts: shape and dtype of each of these arrays.
        """
        if (source.name, recipe) not in self.derived:
            self.derived[source.name, recipe] = [
                Traced(self, f"{source.name}.{recipe.__name__}.{i}", *part) for i, part in enumerate(parts)
            ]
        return [x.copy() for x in self.derived[source.name, recipe]]

    def array(self, value) -> Traced:
        """A traced array as it is, anything else as a constant of the graph."""
        if isinstance(value, Traced):
            return value
        value = np.array(value, order="C")
        refuse_complex(value.dtype)
        key = (value.dtype, value.shape, value.tobytes())
        if key not in self.constants:
            self.constants[key] = Traced(self, f"c{len(self.constants)}", value.shape, value.dtype, value=value)
        return self.constants[key].copy()

    def emit(self, op: str, *inputs, shape, dtype, anew: bool = False, **attributes) -> Traced:
        """A node with one output; if there is an equal one already, that one, unless it is to be made anew.

        An empty array is a constant: nothing has to be computed.
        """
        if 0 in shape:
            return self.array(np.empty(shape, dtype))
        arrays = tuple(self.array(x).copy() for x in inputs)
        key = (op, *(x.name for x in arrays), repr(sorted(attributes.items())), len(self._known) if anew else None)
        if key not in self._known:
            self._known[key] = Traced(self, f"v{len(self._known)}", shape, dtype, op, arrays, attributes)
            self.nodes.append(self._known[key])
        return self._known[key].copy()

    def clear(self) -> list[Traced]:
        """Forget all nodes, so that a pass can write them anew; the nodes that there were."""
        nodes, self.nodes, self._known = self.nodes, [], {}
        return nodes

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
        constants = self.constants.values()
        given = [(x, "input") for x in self.all_inputs()] + [(x, "constant") for x in constants if x.size > SHORT]
        texts = {x.name: str(x.value.tolist()) for x in constants if x.size <= SHORT}
        nodes = [
            ([x], x.op, [i.name for i in x.inputs], {k: v for k, v in x.attributes.items() if k != "domain"})
            for x in self.nodes
        ]
        return "\n".join(listing(given, texts, nodes, [x.name for x in self.outputs]))

    def to_onnx(self, outputs: Iterable[str] | None = None, within: bool = False):
        """The graph as an onnx.ModelProto, checked. Outputs are called `output_0`, `output_1`, ... or as is said.

        within: what is derived from frozen inputs is no input of the model, but an initializer without values, which
        whoever opens a session gives.
        """
        import onnx
        from onnx import helper

        kind: Callable = helper.np_dtype_to_tensor_dtype

        def info(x, name=None):
            return helper.make_tensor_value_info(name or x.name, kind(x.dtype), x.shape)

        def node(x):
            attributes = {k: kind(v) if isinstance(v, np.dtype) else v for k, v in x.attributes.items()}
            names, at = [x.name], attributes.pop(OUTPUT, None)
            if at is not None:
                names = [x.name if i == at else f"{x.name}.{i}" for i in range(2)]
            return helper.make_node(x.op, [i.name for i in x.inputs], names, **attributes)

        def stub(x):
            elsewhere: Any = dict(
                data_location=onnx.TensorProto.EXTERNAL, external_data=[dict(key="location", value="-")]
            )
            return onnx.TensorProto(name=x.name, dims=x.shape, data_type=kind(x.dtype), **elsewhere)

        derived = [x for xs in self.derived.values() for x in xs]
        named = dict(zip(outputs or [f"output_{i}" for i in range(len(self.outputs))], self.outputs, strict=True))
        model = helper.make_model(
            helper.make_graph(
                [node(x) for x in self.nodes]
                + [helper.make_node("Identity", [x.name], [name]) for name, x in named.items()],
                "tinyprompt",
                [info(x) for x in (self.inputs if within else self.all_inputs())],
                [info(x, name) for name, x in named.items()],
                [onnx.numpy_helper.from_array(c.value, c.name) for c in self.constants.values()],
                value_info=[info(x) for x in self.nodes],  # for readers: no other tool knows Microsoft's operators
            ),
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
            ir_version=IR_VERSION,
            producer_name="tinyprompt",
        )
        if within:
            model.graph.initializer.extend(map(stub, derived))
        else:
            onnx.checker.check_model(model)
        return model


def array_kind(dtype, shape) -> str:
    """`float32[2,3]`."""
    return f"{dtype}[{','.join(map(str, shape))}]"


def listing(given: Iterable, texts: Mapping[str, str | None], nodes: Iterable, outputs: Iterable[str]) -> list[str]:
    """The lines of a printed graph, in which an array that is made is `name: kind`.

    given: (array, where it comes from). texts: short constants by name, which are printed in place.
    nodes: (arrays, operator, names of the arguments, attributes). outputs: names.
    """

    def show(names):
        return [texts.get(name) or name or "none" for name in names]

    lines = [f"{array} = {origin}" for array, origin in given]
    for arrays, op, names, attributes in nodes:
        arguments = [*show(names), *(f"{key}={value}" for key, value in attributes.items())]
        lines.append(f"{', '.join(map(str, arrays))} = {op}({', '.join(arguments)})")
    return [*lines, f"return {', '.join(show(outputs))}"]
