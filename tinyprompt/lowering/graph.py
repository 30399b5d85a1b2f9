"""Traced arrays and the ONNX graph that they build.

    graph, result = lower(lambda x, w: np.tanh(x @ w.T).mean(-1), x, w)
    print(graph)                # one line per node
    model = graph.to_onnx()     # inputs and outputs in the order of the arguments and results

A traced array has a shape and a dtype but no values. NumPy dispatches every function called on a traced array to its
rule (calls.py). The rule emits ONNX nodes and returns another traced array. autograd's reverse pass also calls NumPy
functions on traced arrays, so a gradient lowers like any other function.

Equal nodes are emitted once. Nodes that no output needs are dropped.
"""

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from autograd.extend import VSpace
from autograd.numpy.numpy_vspaces import ArrayVSpace
from autograd.tracer import isbox
from ml_dtypes import bfloat16

from tinyprompt.lowering.calls import (
    RULES,
    USE_AUTOGRAD,
    Dispatched,
    LoweringError,
    MissingAttribute,
    TracedBox,
    check_array,
    user_line,
)

__all__ = ["RULES", "Graph", "LoweringError", "Traced", "array_kind", "check_dtype", "listing", "user_line"]

OPSET, IR_VERSION, MICROSOFT = 21, 10, "com.microsoft"
OUTPUT = "output"  # attribute that selects the output of an operator with several outputs
SHORT = 6  # constants with at most this many elements are printed in place
DTYPES = {np.dtype(kind) for kind in "?bhilqBHILQefd"} | {np.dtype(bfloat16)}


def without_numbers(advice: str) -> Callable:
    """Return a method that raises LoweringError with advice, for operations that need values."""

    def method(self: Any, *_: Any, **__: Any) -> Any:
        raise LoweringError(f"{self!r} has no numbers while it is traced: {advice}")

    return method


@dataclass(eq=False, repr=False)
class Traced(Dispatched, np.lib.mixins.NDArrayOperatorsMixin):
    """An array in a graph under construction: its name, shape, dtype, and the node that computes it."""

    graph: "Graph"
    name: str
    shape: tuple[int, ...]
    dtype: Any
    op: str | None = None
    inputs: tuple["Traced", ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    value: Any = None  # the value of a constant

    def __post_init__(self) -> None:
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

    def __array_primitive__(
        self, op: Any, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        out = RULES[op](*args, **kwargs) if op in RULES else NotImplemented
        return function(*args, **kwargs) if out is NotImplemented else out

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(np.ndarray, name):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        raise MissingAttribute(f"x.{name} has no rule: {self!r} is traced")

    def __len__(self) -> int:
        if not self.shape:
            raise LoweringError(f"{self!r} is one number and has no length")
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        return RULES[operator.getitem](self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise LoweringError("x[...] = y in place cannot be lowered; build the array with numpy.concatenate or where")

    def __format__(self, spec: str) -> str:
        return repr(self) if not spec else without_numbers(f"{spec!r} cannot format it")(self)

    def view(self, kind: Any) -> Any:
        """Return the array itself. autograd requests a view as np.ndarray."""
        if kind is not np.ndarray:
            raise LoweringError("x.view(dtype) has no rule")
        return self

    def copy(self, order: str = "C") -> "Traced":
        """Return the same graph array as a new Python object."""
        return Traced(**vars(self))

    def become(self, other: "Traced") -> None:
        """Become another array. This implements `+=` in a graph, where arrays are immutable."""
        vars(self).update(vars(other))

    def __repr__(self) -> str:
        return f"{self.name}: {array_kind(self.dtype, self.shape)}"


class TracedVSpace(ArrayVSpace):
    """The vector space of a traced array, as autograd's reverse pass needs it."""

    def __init__(self, value: Any) -> None:
        self.shape, self.dtype, self.graph = value.shape, value.dtype, value.graph

    def zeros(self) -> Any:
        return self.graph.array(super().zeros())

    def ones(self) -> Any:
        return self.graph.array(super().ones())

    def _add(self, x: Any, y: Any) -> Any:
        return np.astype(x + y, x.dtype)

    _mut_add = _add


TracedBox.register(Traced)
VSpace.register(Traced, TracedVSpace)


def check_dtype(dtype: Any) -> None:
    """Raise LoweringError for a dtype that ONNX Runtime does not support."""
    if np.dtype(dtype).kind == "c":
        raise LoweringError(f"{dtype} cannot be lowered: ONNX Runtime does not compute with complex numbers")
    if np.dtype(dtype) not in DTYPES:
        raise LoweringError(f"{dtype} cannot be lowered: expected booleans, integers or floats of at most 64 bits")


class Graph:
    """A straight-line program of ONNX nodes. `print(graph)` shows it, and `graph.to_onnx()` is the model."""

    def __init__(self, int8: str | None = None, bf16: bool = False, plain: bool = False) -> None:
        self.int8, self.bf16, self.plain = int8, bf16, plain  # the options of `lower`
        self.inputs: list[Traced] = []
        self.frozen: set[str] = set()  # names of the matrices among the inputs that never change
        self.derived: dict[tuple[str, Callable], list[Traced]] = {}  # arrays that NumPy computes from an input
        self.nodes: list[Traced] = []
        self.constants: dict[Any, Traced] = {}
        self.outputs: list[Traced] = []
        self.kept: dict[str, str | None] = {}  # of the outputs that stay on the device: see `keep`
        self._known: dict[Any, Traced] = {}

    def input(self, name: str, shape: tuple[int, ...], dtype: Any) -> Traced:
        """Add an input of the graph."""
        check_dtype(dtype)
        self.inputs.append(Traced(self, name, shape, dtype))
        return self.inputs[-1].copy()

    def derive(self, source: Traced, recipe: Callable, *parts: Any) -> list[Traced]:
        """Add the arrays `recipe(source)` as inputs. They are computed once for each source array.

        Args:
            source: An input of the graph.
            recipe: A function from the source array to a tuple of arrays.
            *parts: The shape and dtype of each of its results.
        """
        if (source.name, recipe) not in self.derived:
            self.derived[source.name, recipe] = [
                Traced(self, f"{source.name}.{recipe.__name__}.{i}", *part) for i, part in enumerate(parts)
            ]
        return [x.copy() for x in self.derived[source.name, recipe]]

    def array(self, value: Any) -> Traced:
        """Return a traced array unchanged, and any other array or number as a constant of the graph.

        Raises:
            LoweringError: The value is an array subclass, or an array of Python objects.
        """
        if isinstance(value, Traced):
            return value
        if isbox(value):
            raise LoweringError(f"an array that is being differentiated has no rule here; {USE_AUTOGRAD}")
        check_array(value)
        value = np.array(value, order="C")
        check_array(value)
        check_dtype(value.dtype)
        key = (value.dtype, value.shape, value.tobytes())
        if key not in self.constants:
            self.constants[key] = Traced(self, f"c{len(self.constants)}", value.shape, value.dtype, value=value)
        return self.constants[key].copy()

    def emit(self, op: str, *inputs: Any, shape: Any, dtype: Any, anew: bool = False, **attributes: Any) -> Traced:
        """Add a node with one output, or return an equal node of the graph.

        A node with an empty output becomes a constant.

        Args:
            op: The ONNX operator.
            *inputs: Arrays of the graph, or constants.
            shape: The shape of the output.
            dtype: The dtype of the output.
            anew: Add a node even if the graph has an equal node.
            **attributes: Attributes of the operator, and `domain` for an operator of another domain than ONNX's.
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
        """Remove and return all nodes, so that a pass can rewrite them."""
        nodes, self.nodes, self._known = self.nodes, [], {}
        return nodes

    def finish(self, outputs: Iterable[Traced]) -> "Graph":
        """Set the outputs, and drop the nodes, constants and inputs that no output needs."""
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

    def reads(self) -> Counter[str]:
        """Count how many times the nodes and the outputs read each array."""
        return Counter([i.name for x in self.nodes for i in x.inputs] + [x.name for x in self.outputs])

    def drop_unread_inputs(self) -> None:
        """Drop the inputs that no node reads. ONNX Runtime would copy them from the GPU in every run."""
        read = self.reads()
        self.inputs = [x for x in self.inputs if x.name in read]

    def all_inputs(self) -> list[Traced]:
        """Return the inputs, followed by the arrays derived from them."""
        return [*self.inputs, *(x for xs in self.derived.values() for x in xs)]

    def keep(self, outputs: Iterable[Traced]) -> None:
        """Mark outputs that stay on the device, each with the input whose memory it may reuse, or None.

        A scatter may overwrite its input if the graph does not read or return that input elsewhere.
        """
        read, inputs = self.reads(), {x.name for x in self.inputs}
        for x in outputs:
            place = x.inputs[0].name if x.op == "ScatterND" and not x.attributes else None
            self.kept[x.name] = place if place in inputs and read[place] == 1 else None

    def large_constants(self) -> list[Traced]:
        """Return the float constants that a product could read as a square matrix: those with at least 4 elements."""
        return [c for c in self.constants.values() if c.size > 3 and c.dtype.kind == "f"]

    def __str__(self) -> str:
        constants = self.constants.values()
        given = [(x, "input") for x in self.all_inputs()] + [(x, "constant") for x in constants if x.size > SHORT]
        texts = {x.name: str(x.value.tolist()) for x in constants if x.size <= SHORT}
        nodes = [
            ([x], x.op, [i.name for i in x.inputs], {k: v for k, v in x.attributes.items() if k != "domain"})
            for x in self.nodes
        ]
        return "\n".join(listing(given, texts, nodes, [x.name for x in self.outputs]))

    def to_onnx(self, outputs: Iterable[str] | None = None, within: bool = False, constants: bool = True) -> Any:
        """Return the graph as a checked onnx.ModelProto.

        Args:
            outputs: Names of the outputs. The default is `output_0`, `output_1`, and so on.
            within: Turn the arrays derived from frozen inputs into initializers without values instead of inputs. The
                caller supplies the values when it opens a session.
            constants: False turns `large_constants` into inputs, so that no runtime folds them.
        """
        import onnx
        from onnx import helper

        kind: Callable = helper.np_dtype_to_tensor_dtype
        named = dict(zip(outputs or [f"output_{i}" for i in range(len(self.outputs))], self.outputs, strict=True))
        made = {x.name for x in self.nodes}
        own = {x.name: name for name, x in named.items() if x.name in made}  # outputs that a node writes directly

        def renamed(x: Traced) -> str:
            return own.get(x.name, x.name)

        def info(x: Traced, name: str | None = None) -> Any:
            return helper.make_tensor_value_info(name or x.name, kind(x.dtype), x.shape)

        def node(x: Any) -> Any:
            attributes = {k: kind(v) if isinstance(v, np.dtype) else v for k, v in x.attributes.items()}
            name = renamed(x)
            names, at = [name], attributes.pop(OUTPUT, None)
            if at is not None:
                names = [name if i == at else f"{name}.{i}" for i in range(2)]
            return helper.make_node(x.op, [*map(renamed, x.inputs)], names, **attributes)

        def stub(x: Any) -> Any:
            elsewhere: Any = dict(
                data_location=onnx.TensorProto.EXTERNAL, external_data=[dict(key="location", value="-")]
            )
            return onnx.TensorProto(name=x.name, dims=x.shape, data_type=kind(x.dtype), **elsewhere)

        large = {} if constants else {c.name: c for c in self.large_constants()}
        derived = [x for xs in self.derived.values() for x in xs]
        model = helper.make_model(
            helper.make_graph(
                [node(x) for x in self.nodes]
                + [helper.make_node("Identity", [renamed(x)], [k]) for k, x in named.items() if own.get(x.name) != k],
                "tinyprompt",
                [info(x) for x in [*(self.inputs if within else self.all_inputs()), *large.values()]],
                [info(x, name) for name, x in named.items()],
                [onnx.numpy_helper.from_array(c.value, c.name) for c in self.constants.values() if c.name not in large],
                # Shape inference does not cover Microsoft's operators.
                value_info=[info(x) for x in self.nodes if x.name not in own],
            ),
            opset_imports=[helper.make_opsetid("", OPSET)] + [helper.make_opsetid(MICROSOFT, 1)] * (not self.plain),
            ir_version=IR_VERSION,
            producer_name="tinyprompt",
        )
        if within:
            model.graph.initializer.extend(map(stub, derived))
        else:
            onnx.checker.check_model(model)
        return model


def array_kind(dtype: Any, shape: Iterable[Any]) -> str:
    """Format an array type: `float32[2,3]`."""
    return f"{dtype}[{','.join(map(str, shape))}]"


def listing(given: Iterable, texts: Mapping[str, str | None], nodes: Iterable, outputs: Iterable[str]) -> list[str]:
    """Return the lines of a printed graph.

    Args:
        given: Pairs of an array and its origin ("input" or "constant").
        texts: Values of short constants by name. They are printed in place.
        nodes: Tuples of the output arrays, the operator, the names of the arguments and the attributes.
        outputs: Names of the outputs.
    """

    def show(names: Iterable[str]) -> list[str]:
        return [texts.get(name) or name or "none" for name in names]

    lines = [f"{array} = {origin}" for array, origin in given]
    for arrays, op, names, attributes in nodes:
        arguments = [*show(names), *(f"{key}={value}" for key, value in attributes.items())]
        lines.append(f"{', '.join(map(str, arrays))} = {op}({', '.join(arguments)})")
    return [*lines, f"return {', '.join(show(outputs))}"]
