"""Trace a function and its arguments to a graph."""

import dataclasses
import inspect
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from tinyprompt.lowering.calls import LoweringError, check_array
from tinyprompt.lowering.gradients import traced_arrays_in_autograd
from tinyprompt.lowering.graph import Graph, Traced
from tinyprompt.lowering.halves import in_halves
from tinyprompt.tree import leaves, refill


def parameters_of(function: Callable, count: int) -> list[str]:
    """Return the names of a function's positional parameters. Unnamed arguments become `argument_2` and so on."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return names + [f"argument_{i}" for i in range(len(names), count)]


def check_frozen(function: Callable, arguments: tuple, frozen: Iterable[str]) -> set[str]:
    """Return the names in `frozen` as a set. Raises LoweringError for an unknown parameter."""
    told, known = {frozen} if isinstance(frozen, str) else set(frozen), parameters_of(function, len(arguments))
    if unknown := told.difference(known):
        name = getattr(function, "__name__", "the function")
        raise LoweringError(f"frozen: {name} has the parameters {', '.join(known)}, not {', '.join(sorted(unknown))}")
    return told


def named(function: Callable, arguments: tuple) -> Iterator[tuple[str, str, Any]]:
    """Yield the parameter, the name as an input of the graph, and the value of every leaf of the arguments.

    The leaves of a dict keep their dotted names, as in a checkpoint. Other names begin with the parameter's name.
    """
    used = set()
    for parameter, argument in zip(parameters_of(function, len(arguments)), arguments, strict=False):
        for name, leaf in leaves(argument, "" if isinstance(argument, dict) else parameter):
            while name in used or re.fullmatch(r"([vc]|output_)\d+|", name):  # the graph's own names
                name = f"{parameter}.{name}"
            used.add(name)
            yield parameter, name, leaf


def is_frozen(array: Any) -> bool:
    """Return whether an array and all its bases are read-only."""
    while isinstance(array, np.ndarray):
        if array.flags.writeable:
            return False
        array = array.base
    return True


def is_sealed(array: Any) -> bool:
    """Return whether an array is permanently read-only, like the arrays that `tree.freeze` returns."""
    if not is_frozen(array):
        return False
    while isinstance(array, np.ndarray):
        array = array.base
    try:
        return array is not None and memoryview(array).readonly
    except TypeError:
        return False


def state_of(array: np.ndarray) -> int | None:
    """Return a checksum of a frozen array, or None if its contents cannot change.

    An array with `flags.writeable = False` can still be made writable, changed, and made read-only again.
    """
    if is_sealed(array):
        return None
    bits: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return zlib.crc32(bits)


def graph_key(value: Any, flags: bool = True) -> Any:
    """Return a hashable key of arguments. Arguments with equal keys have the same graph.

    The key of an array is its shape, its dtype, and with `flags` whether it is read-only. The key of any other value
    is its type and value, so 0.0 and -0.0, or 1 and True, differ.

    Raises:
        LoweringError: An array is a subclass, or an array of Python objects.
    """
    if type(value) in (str, int):
        return type(value), value
    if isinstance(value, np.ndarray | np.generic):
        check_array(value)
        return value.shape, value.dtype, flags and is_frozen(value)
    if hasattr(value, "stand_in"):  # an array that stays on a device
        return value.shape, value.dtype, flags
    if isinstance(value, dict):
        return type(value), tuple((graph_key(k, flags), graph_key(v, flags)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(graph_key(x, flags) for x in value)
    if isinstance(value, frozenset):
        return type(value), frozenset(graph_key(x, flags) for x in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = tuple(graph_key(getattr(value, field.name), flags) for field in dataclasses.fields(value))
        return type(value), fields, value
    if type(value).__eq__ is object.__eq__ or isinstance(value, str | bytes | int):  # type: ignore[comparison-overlap]
        return type(value), value
    return type(value), repr(value), value if value == value else None  # NaN differs from itself


def lower(
    function: Callable,
    *arguments: Any,
    int8: str | None = None,
    bf16: bool = False,
    plain: bool = False,
    frozen: Iterable[str] | None = None,
) -> tuple[Graph, Any]:
    """Lower a function of NumPy arrays to an ONNX graph, by calling it on traced arrays.

    Every array in the arguments becomes an input of the graph. Only its shape and dtype are read. Numbers, strings,
    functions, and arrays from the function's closure become part of the graph.

    Args:
        function: A function of NumPy functions that have a rule (see docs/devices.md for a list). It may contain
            `autograd.grad` and `value_and_grad`.
        *arguments: Its arguments. Arrays may be nested in dicts, tuples, lists and named tuples.
        int8: Quantise the frozen 16-bit and 32-bit weights whose names begin with this prefix, where `ops.linear`
            multiplies them.
        bf16: Multiply float32 matrices in bfloat16, and compute in bfloat16 between two products (halves.py). The
            residual stream, the logits and the loss keep their dtype.
        plain: Emit standard ONNX operators only, without ONNX Runtime's own. Not supported with int8.
        frozen: Names of the parameters whose arrays are frozen weights. By default, read-only arrays are frozen.

    Returns:
        The graph, and the function's result with a traced array in place of every output.

    Raises:
        LoweringError: A step of the function has no rule. The message names the step and the user's line.

    Example:
        >>> graph, _ = lower(lambda x: np.tanh(x).sum(-1), np.ones((2, 3), np.float32))
        >>> print(graph)
        x: float32[2,3] = input
        v0: float32[2,3] = Tanh(x)
        v1: float32[2] = ReduceSum(v0, [1], keepdims=0)
        return v1
    """
    graph = Graph(int8, bf16, plain)
    told = None if frozen is None else check_frozen(function, arguments, frozen)

    def given(parameter: str, name: str, x: Any) -> Any:
        if not isinstance(x, np.ndarray | np.generic):
            return x
        check_array(x)
        if x.ndim == 2 and (is_frozen(x) if told is None else parameter in told):
            graph.frozen.add(name)
        return graph.input(name, x.shape, x.dtype)

    inputs = refill(arguments, (given(*leaf) for leaf in named(function, arguments)))
    try:
        with traced_arrays_in_autograd():
            result = function(*inputs)
    except ValueError as error:  # `y[0] = x`: NumPy raises its own error on top
        if isinstance(error.__cause__, LoweringError):
            raise error.__cause__ from None
        raise
    found = [graph.array(x) if isinstance(x, np.ndarray | np.generic) else x for _, x in leaves(result)]
    if bf16:
        found = in_halves(graph, found)
    return graph.finish(x for x in found if isinstance(x, Traced)), refill(result, iter(found))
