"""From a function and its arguments to a graph."""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tinyprompt.lowering.graph import Graph, LoweringError, Traced
from tinyprompt.lowering.halves import in_halves
from tinyprompt.tree import leaves, refill


def named(function: Callable, arguments: tuple) -> Iterator[tuple[str, Any]]:
    """All leaves of the arguments with the names they have as inputs.

    The leaves of a dict keep their dotted names (those of a checkpoint). Others begin with the parameter's name.
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
    """Whether neither an array nor what it is a view of can be written, so that what is made of it once stays true."""
    while isinstance(array, np.ndarray):
        if array.flags.writeable:
            return False
        array = array.base
    return True


def lower(function: Callable, *arguments, int8: str | None = None, bf16: bool = False) -> tuple[Graph, Any]:
    """Call `function` on traced arrays in place of every array in `arguments`.

    Arrays may stand in dicts, tuples, lists and named tuples. Only their shapes and dtypes are read, and whether they
    are frozen (see `is_frozen`). Everything else (numbers, strings, functions, arrays that the function has from
    elsewhere) becomes part of the graph.
    int8: frozen weights of 16 or 32 bits whose names begin with this are quantised where `ops.linear` multiplies them.
    bf16: float32 matrices are multiplied as bfloat16, and what lies between two products is done in it too (halves.py).
    The residual stream, the logits and the loss keep their dtype.
    Returns the graph, and the function's result with a traced array for every output.
    Raises LoweringError for what ONNX cannot say.
    """
    graph = Graph(int8, bf16)

    def given(name, x):
        if not isinstance(x, np.ndarray | np.generic):
            return x
        if x.ndim == 2 and is_frozen(x):
            graph.frozen.add(name)
        return graph.input(name, x.shape, x.dtype)

    inputs = refill(arguments, (given(name, x) for name, x in named(function, arguments)))
    try:
        result = function(*inputs)
    except ValueError as error:  # `y[0] = x`, of which NumPy says less than what it was told
        if isinstance(error.__cause__, LoweringError):
            raise error.__cause__ from None
        raise
    found = [graph.array(x) if isinstance(x, np.ndarray | np.generic) else x for _, x in leaves(result)]
    if bf16:
        found = in_halves(graph, found)
    return graph.finish(x for x in found if isinstance(x, Traced)), refill(result, iter(found))
