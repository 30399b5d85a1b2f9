"""Dispatch NumPy calls to their rules, inside and outside autograd.

NumPy asks a traced array (`Traced`, in graph.py) how to run a function, through `__array_ufunc__` or
`__array_function__`. During differentiation, autograd wraps the traced array in a box (`TracedBox`), which dispatches
here as well. A function therefore lowers alike as `numpy.dot` and as `autograd.numpy.dot`:

- without a box, the rule in `RULES` emits nodes;
- with a box, autograd's primitive records the call. Its gradient comes from `GRADIENTS`, from the rule itself
  (`STEPWISE`), or from autograd.

rules.py, composed.py and primitives.py fill `RULES` and `GRADIENTS`.
"""

import functools
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
from autograd.builtins import SequenceBox
from autograd.core import VJPNode, backward_pass, vspace
from autograd.numpy.numpy_boxes import ArrayBox
from autograd.tracer import Box, getval, isbox, new_box, notrace_primitives
from autograd.util import subval

from tinyprompt.errors import TinypromptError

RULES: dict[Any, Callable] = {}  # NumPy function, operator or primitive of ops.py -> rule for traced arrays
GRADIENTS: dict[Any, Callable] = {}  # NumPy function -> VJP maker (argnum, result, *arguments), in place of autograd's
STEPWISE: set[Any] = set()  # NumPy functions whose rule also runs on boxes; autograd differentiates its steps
SEQUENCES = {np.concatenate: anp.concatenate}  # autograd's functions that accept a list of boxes
USE_AUTOGRAD = "use autograd.numpy, for example `import autograd.numpy as np`"
REFUSED = {  # advice in place of "has no rule"
    np.copyto: "a NumPy array cannot hold a traced array; use numpy.broadcast_to or numpy.where; "
    "if it is being differentiated, use autograd.numpy"
}

PACKAGE = Path(__file__).parents[1]
HIDDEN = (  # files whose frames are never the user's line
    *(str(PACKAGE / name) for name in ("lowering", "ops.py", "device", "tree.py")),
    os.path.dirname(autograd.__file__),
    os.path.dirname(np.__file__),
    os.path.join(os.path.dirname(os.path.dirname(np.__file__)), "scipy"),
)


class LoweringError(TinypromptError, TypeError):
    """The function cannot be lowered. The message names the NumPy function and the user's line."""

    def __init__(self, message: str):
        super().__init__(f"{message} ({user_line(sys._getframe(1))})")


class MissingAttribute(LoweringError, AttributeError):
    """Traced arrays lack this attribute of NumPy arrays."""


def user_line(frame: Any) -> str:
    """Return the innermost user line. In a backward pass, return the line that is being differentiated."""
    while frame.f_back and frame.f_code.co_filename.startswith(HIDDEN):
        if frame.f_code.co_name == "vjp_of_line":
            return f"in the gradient of {frame.f_locals['line']}"
        frame = frame.f_back
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}, in {frame.f_code.co_name}"


def inside(values: Any) -> Iterator[Any]:
    """Yield all leaves of nested lists, tuples and dicts."""
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        yield values
        return
    for value in values:
        yield from inside(value)


def check_array(value: Any) -> None:
    """Raise LoweringError for an array subclass or an array of Python objects."""
    if not isinstance(value, np.ndarray):
        return
    if type(value) not in (np.ndarray, np.memmap):
        name = f"{type(value).__module__}.{type(value).__name__}"
        raise LoweringError(
            f"{name} cannot be lowered: a graph computes with plain arrays; convert it by numpy.asarray"
        )
    if value.dtype == object:
        boxed = any(isinstance(x, Box) for x in value.ravel()[:1])
        told = f"NumPy made it of an array that is being differentiated; {USE_AUTOGRAD}" if boxed else "give it a dtype"
        raise LoweringError(f"an array of Python objects cannot be lowered: {told}")


def call(function: Callable, args: tuple, kwargs: dict, name: str) -> Any:
    """Run the rule of a NumPy function. If an argument is boxed, record the call for differentiation."""
    leaves = list(inside((args, kwargs)))
    for leaf in leaves:
        check_array(leaf)
    if any(isinstance(leaf, Box) for leaf in leaves):
        graph = next((value.graph for leaf in leaves if hasattr(value := getval(leaf), "__array_primitive__")), None)
        args, kwargs = unpacked(args, graph), unpacked(kwargs, graph)
        rule = RULES.get(function) if function in STEPWISE else recorded(function, args, kwargs, name)
    else:
        rule = RULES.get(function)
    if rule is None:
        raise LoweringError(REFUSED.get(function, f"{name} has no rule"))
    try:
        return rule(*args, **kwargs)
    except LoweringError:
        raise
    except (TypeError, NotImplementedError) as error:
        raise LoweringError(f"{name} with these arguments has no rule: {error}") from None


def unpacked(value: Any, graph: Any) -> Any:
    """Unbox lists, and convert every boxed constant to an array of the graph."""
    if isinstance(value, dict):
        return {key: unpacked(x, graph) for key, x in value.items()}
    if isinstance(value, list | tuple):
        items = [unpacked(x, graph) for x in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, SequenceBox):
        return [unpacked(value[i], graph) for i in range(len(value))]
    if type(value) is ArrayBox and graph is not None and isinstance(value._value, np.ndarray | np.generic | float):
        return TracedBox(graph.array(value._value), value._trace, value._node)
    return value


def recorded(function: Callable, args: tuple, kwargs: dict, name: str) -> Callable:
    """Return a function that calls autograd's primitive with every box as a positional argument."""
    if function in SEQUENCES:
        return SEQUENCES[function]
    primitive = PRIMITIVES.get(function)
    if primitive is None:
        raise LoweringError(f"{name} of an array that is being differentiated has no rule; {USE_AUTOGRAD}")
    if any(isinstance(x, Box) for x in inside(kwargs)):
        try:
            bound = inspect.signature(function).bind(*args, **kwargs)
        except (TypeError, ValueError):
            raise LoweringError(f"{name}: give the differentiated array by position; {USE_AUTOGRAD}") from None
        args, kwargs = bound.args, bound.kwargs
    nested = any(isinstance(x, Box) for x in inside((kwargs, [x for x in args if isinstance(x, list | tuple)])))
    if nested:
        raise LoweringError(f"{name}: a differentiated array inside a list or a keyword has no rule; {USE_AUTOGRAD}")
    return lambda *_, **__: primitive(*args, **kwargs)


def primitives_of(ours: Any, numpys: Any) -> Iterator[tuple[Any, Callable]]:
    """Yield every NumPy function that autograd wraps, with its wrapper."""
    for name, function in vars(numpys).items():
        if callable(function) and not isinstance(function, type) and callable(wrapper := getattr(ours, name, None)):
            yield function, wrapper


PRIMITIVES = dict([*primitives_of(anp.linalg, np.linalg), *primitives_of(anp, np)])


class TracedNode(VJPNode):
    """A recorded step on traced arrays. Its gradient comes from `GRADIENTS` or from the rule."""

    __slots__ = ()

    def __init__(self, value, fun, args, kwargs, parent_argnums, parents):
        function: Any = getattr(fun, "fun", None)
        maker = GRADIENTS.get(function, by_steps(function) if function in STEPWISE else None)
        if maker is None:
            try:
                super().__init__(value, fun, args, kwargs, parent_argnums, parents)
            except NotImplementedError as error:
                raise LoweringError(f"autograd has no gradient of {fun.__name__}: {error}") from None
            return
        self.parents = parents  # type: ignore[misc]
        vjps = [maker(argnum, value, *args, **kwargs) for argnum in parent_argnums]
        self.vjp = lambda g: [vjp(g) for vjp in vjps]  # type: ignore[misc]


def by_steps(function: Callable) -> Callable:
    """Differentiate a function through the NumPy functions in its rule."""

    def maker(argnum, ans, *args, **kwargs):
        return vjp_of(lambda x: RULES[function](*subval(args, argnum, x), **kwargs), args[argnum])

    return maker


class Unrecorded:
    """The primitives without a gradient. `full_like` is differentiable with respect to its fill value."""

    extra = (anp.bitwise_and, anp.bitwise_or, anp.bitwise_xor, anp.invert, anp.logical_xor)

    def __contains__(self, primitive):
        return primitive in self.extra or (primitive in notrace_primitives[VJPNode] and primitive is not anp.full_like)


notrace_primitives[TracedNode] = Unrecorded()
LEVELS = itertools.count(10**9)  # above every level that autograd assigns, and never reused


def vjp_of(function: Callable, x: Any) -> Callable:
    """Return the vector-Jacobian product of a function at x, inside another differentiation."""
    level = next(LEVELS)
    out = function(new_box(x, level, TracedNode.new_root()))

    def vjp_of_one(out):
        if isbox(out) and out._trace == level:
            return lambda g: backward_pass(g, out._node)
        return lambda g: vspace(x).zeros()

    if not isinstance(out, list | tuple):
        return vjp_of_one(out)
    vjps = [vjp_of_one(part) for part in out]
    return lambda g: functools.reduce(np.add, [vjp(g[i]) for i, vjp in enumerate(vjps)])


class Dispatched:
    """An array, boxed or not, whose NumPy calls go to their rules."""

    __slots__ = ()
    real = property(lambda self: np.real(self))

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        return call_ufunc(ufunc, method, inputs, options)

    def __array_function__(self, function, types, args, kwargs):
        return call(function, args, kwargs, f"{function.__module__}.{function.__name__}")

    def __iter__(self: Any):
        return (self[i] for i in range(len(self)))


class TracedBox(Dispatched, ArrayBox):
    """autograd's box around a traced array. It dispatches NumPy calls and remembers the user's line."""

    __slots__ = ()

    def __init__(self, value, trace, node):
        if type(node) is VJPNode:
            node.__class__ = TracedNode  # the next primitive creates a node of this class
        super().__init__(value, trace, node)
        if isinstance(node, TracedNode) and node.parents:
            vjp = node.vjp

            def vjp_of_line(g, line=user_line(sys._getframe(1))):  # noqa: B008
                return tuple(vjp(g))

            node.vjp = vjp_of_line

    def __array__(self, *_, **__):
        raise LoweringError(f"a NumPy array cannot hold an array that is being differentiated; {USE_AUTOGRAD}")

    def __setitem__(self, index, value):
        self._value[index] = value  # raises

    def __getattr__(self, name):
        if name.startswith("__") or not hasattr(np.ndarray, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(getval(self), name)  # raises

    def __format__(self, spec):
        return format(getval(self), spec)

    __int__ = lambda self: int(getval(self))
    __float__ = lambda self: float(getval(self))
    __complex__ = lambda self: complex(getval(self))
    __index__ = lambda self: getval(self).__index__()
    __contains__ = lambda self, x: x in getval(self)
    __pos__ = lambda self: np.positive(self)
    __invert__ = lambda self: np.invert(self)
    __and__ = __rand__ = lambda self, other: np.bitwise_and(self, other)
    __or__ = __ror__ = lambda self, other: np.bitwise_or(self, other)
    __xor__ = __rxor__ = lambda self, other: np.bitwise_xor(self, other)
    __floordiv__ = lambda self, other: np.floor_divide(self, other)
    __rfloordiv__ = lambda self, other: np.floor_divide(other, self)

    def copy(self):
        return self


def call_ufunc(ufunc: np.ufunc, method: str, inputs: tuple, options: dict) -> Any:
    """Run a ufunc, or one of its methods, on traced or boxed arrays."""
    function = ufunc if method == "__call__" else getattr(ufunc, method)
    name = f"numpy.{ufunc.__name__}{'' if function is ufunc else f'.{method}'}"
    if options.get("out") is not None:
        raise LoweringError(f"{name} in place cannot be lowered; write x = x + y, not x += y")
    if options or (function is not ufunc and function not in RULES):
        raise LoweringError(f"{name}{f' with {list(options)}' if options else ''} has no rule")
    return call(function, inputs, {}, name)
