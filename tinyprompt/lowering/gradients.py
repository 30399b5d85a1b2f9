"""Gradients of NumPy functions on traced arrays, where autograd's are missing or do not cover all arguments.

Each function returns a vector-Jacobian product (VJP) for one argument. The VJP calls NumPy on traced arrays, or on
boxes for a second derivative. `ans` is the result, and `g` the gradient with respect to it.
"""

import contextlib
import threading
import types
from collections.abc import Callable, Iterator

import numpy as np
from autograd.extend import vspace
from autograd.numpy import numpy_wrapper
from numpy.lib.array_utils import normalize_axis_tuple

from tinyprompt.lowering.calls import GRADIENTS, RULES, LoweringError, vjp_of
from tinyprompt.lowering.composed import axes_in_letters
from tinyprompt.lowering.graph import Traced
from tinyprompt.lowering.rules import cast, traced


def summed_to(g, like):
    """Sum a gradient over the broadcast axes of `like`, and cast it to the dtype of `like`."""
    new = g.ndim - np.ndim(like)
    repeated = tuple(new + i for i, n in enumerate(np.shape(like)) if n == 1)
    return np.astype(np.reshape(np.sum(g, axis=(*range(new), *repeated)), np.shape(like)), like.dtype)


def zero(argnum, ans, *args, **kwargs):
    """Return a VJP of zeros, for a function that is constant in this argument."""
    zeros = vspace(args[argnum]).zeros()
    return lambda g: zeros


def where(argnum, ans, condition, x, y):
    if argnum == 0:
        return zero(0, ans, condition)
    choose = (lambda g: (g, 0)) if argnum == 1 else (lambda g: (0, g))
    return lambda g: summed_to(np.where(condition, *choose(g)), (x, y)[argnum - 1])


def clip(argnum, ans, a, a_min=None, a_max=None, *, min=None, max=None):
    """Route the gradient to the bound of clipped elements, and to `a` elsewhere. The signature is NumPy's."""
    low, high = a_min if min is None else min, a_max if max is None else max
    bounds = [bound for bound in (low, high) if bound is not None]
    if argnum == 0:

        def kept(g):
            for bound in bounds:
                g = np.where(np.not_equal(ans, bound), g, 0)
            return g

        return lambda g: summed_to(kept(g), a)
    bound, beyond = (low, np.less) if argnum == 1 else (high, np.greater)
    return lambda g: summed_to(np.where(np.logical_and(beyond(a, bound), np.equal(ans, bound)), g, 0), bound)


def broadcast_to(argnum, ans, array, shape):
    return lambda g: summed_to(g, array)


def astype(argnum, ans, x, dtype, copy=True):
    if np.dtype(ans.dtype).kind in "iub":
        return zero(0, ans, x)
    return lambda g: np.astype(g, x.dtype)


def positive(argnum, ans, x):
    return lambda g: g


def transpose(argnum, ans, a, axes=None):
    back = None if axes is None else tuple(np.argsort(normalize_axis_tuple(axes, a.ndim)).tolist())
    return lambda g: np.transpose(g, back)


def take(argnum, ans, a, indices, axis=None):
    index = (slice(None),) * normalize_axis_tuple(axis, a.ndim)[0]
    indices = indices if isinstance(indices, Traced) else np.asarray(indices)
    return vjp_of(lambda a: a[(*index, indices)], a)


def take_along_axis(argnum, ans, arr, indices, axis=-1):
    (axis,) = normalize_axis_tuple(axis, arr.ndim)
    places = list(np.ogrid[tuple(slice(n) for n in np.shape(indices))])
    places[axis] = indices
    return vjp_of(lambda arr: arr[tuple(places)], arr)


def prod(argnum, ans, a, axis=None, *, keepdims=False):
    """Multiply g by the product of the other elements. Nothing is divided, because an element may be 0."""
    axes = tuple(range(a.ndim)) if axis is None else normalize_axis_tuple(axis, a.ndim)
    kept = [i for i in range(a.ndim) if i not in axes]
    order = (*kept, *axes)
    moved = np.transpose(a, order)
    rows = np.reshape(moved, (*(a.shape[i] for i in kept), 1, -1))
    n = rows.shape[-1]
    others = np.reshape(np.prod(np.where(np.eye(n, dtype=bool), 1, rows), axis=-1), moved.shape)
    others = np.transpose(others, tuple(np.argsort(order).tolist()))
    shape = [1 if i in axes else n for i, n in enumerate(a.shape)]
    return lambda g: np.astype(np.reshape(g, shape) * others, a.dtype)


def einsum(argnum, ans, subscripts, *operands, optimize=None):
    """Compute the einsum of g, the other operands, and ones for the axes that only this operand has."""
    arrays = [*operands]
    terms, wanted = axes_in_letters(subscripts, arrays)
    own, array = terms.pop(argnum - 1), arrays.pop(argnum - 1)
    alone = [axis for axis, letter in enumerate(own) if letter not in wanted + "".join(terms)]
    ones = np.ones([array.shape[axis] for axis in alone], ans.dtype)
    equation = f"{','.join([wanted, ''.join(own[axis] for axis in alone), *terms])}->{own}"
    return lambda g: summed_to(np.einsum(equation, g, ones, *arrays), array)


def sort(argnum, ans, x, axis=-1, kind=None, order=None, *, stable=None):
    """Move every element of g back by the inverse permutation. The signature is NumPy's."""
    apart, along = (np.ravel(x), 0) if axis is None else (x, axis)
    places = np.argsort(np.argsort(apart, axis=along), axis=along)
    return lambda g: np.reshape(np.take_along_axis(g, places, along), x.shape)


NAMESAKES = (
    where, clip, broadcast_to, astype, positive, transpose, take, take_along_axis, prod, einsum, sort,
)  # fmt: skip
GRADIENTS |= {getattr(np, vjp.__name__): vjp for vjp in NAMESAKES}

TRACING = threading.RLock()  # autograd numbers the traces of all threads together


def array(parts, *args, **kwargs):
    """`numpy.array` as autograd calls it: with a tuple of arrays and numbers, or with a single array or number."""
    among = parts if isinstance(parts, tuple) else (parts,)
    if not any(isinstance(x, Traced) for x in among):
        return np.array(parts, *args, **kwargs)
    if args or kwargs.keys() - {"dtype"}:
        raise LoweringError("numpy.array of traced arrays accepts only the argument dtype")
    out = RULES[np.stack](traced(*parts)) if isinstance(parts, tuple) else parts
    return out.copy() if kwargs.get("dtype") is None else cast(out, kwargs["dtype"])


@contextlib.contextmanager
def traced_arrays_in_autograd() -> Iterator[None]:
    """Let autograd's `array` and `stack`, which call `numpy.array`, accept traced arrays. One thread at a time.

    NumPy does not dispatch `numpy.array` to other array types. Results in other threads are unaffected.
    """
    with TRACING:
        own = numpy_wrapper._np
        patched: Callable = types.SimpleNamespace(**{**vars(np), "array": array})  # type: ignore[assignment]
        numpy_wrapper._np = patched
        try:
            yield
        finally:
            numpy_wrapper._np = own
