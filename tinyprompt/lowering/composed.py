"""Rules that are compositions of NumPy functions. Each step lowers by its own rule.

The rules in `STEPWISE` consist of NumPy calls only. They also run on autograd's boxes, so they need no gradient rule.
"""

import builtins
import math
import re
import string

import numpy as np
from numpy.lib.array_utils import normalize_axis_index, normalize_axis_tuple

from tinyprompt.lowering.calls import RULES, STEPWISE, LoweringError
from tinyprompt.lowering.graph import Traced
from tinyprompt.lowering.rules import added_up, cast, einsum_of_letters, promoted, traced


def truth(x: Traced):
    """Convert an array to booleans."""
    return x if x.dtype == bool else np.not_equal(x, 0)


def all(a, axis=None, *, keepdims=False):
    return np.equal(np.sum(np.logical_not(truth(a)), axis=axis, keepdims=keepdims), 0)


def any(a, axis=None, *, keepdims=False):
    return np.not_equal(np.sum(truth(a), axis=axis, keepdims=keepdims), 0)


def var(a, axis=None, *, ddof=0, keepdims=False):
    centred = a - np.mean(a, axis=axis, keepdims=True)
    squares = np.sum(centred * centred, axis=axis, keepdims=keepdims)
    return squares / max(a.size // squares.size - ddof, 0)


def std(a, axis=None, *, ddof=0, keepdims=False):
    return np.sqrt(np.var(a, axis=axis, ddof=ddof, keepdims=keepdims))


def nansum(a, axis=None, *, keepdims=False):
    return np.sum(np.where(np.isnan(a), 0, a), axis=axis, keepdims=keepdims)


def norm(x, ord=None, axis=None, *, keepdims=False):
    """Lower `numpy.linalg.norm`: vector norms of order 1, 2, inf and -inf, and the Frobenius norm."""
    axes = tuple(range(x.ndim)) if axis is None else normalize_axis_tuple(axis, x.ndim)
    size = np.abs(x if x.dtype.kind == "f" else np.astype(x, np.float64))
    if (ord is None and (axis is None or len(axes) <= 2)) or (ord, len(axes)) in ((2, 1), ("fro", 2)):
        return np.sqrt(np.sum(size * size, axis=axes, keepdims=keepdims))
    if ord == 1 and len(axes) == 1:
        return np.sum(size, axis=axes, keepdims=keepdims)
    if ord in (math.inf, -math.inf) and len(axes) == 1:
        return (np.max if ord > 0 else np.min)(size, axis=axes, keepdims=keepdims)
    raise LoweringError(f"numpy.linalg.norm of order {ord!r} over {len(axes)} axes has no rule")


def cumsum(a, axis=None):
    if axis is None:
        a, axis = np.ravel(a), 0
    axis = normalize_axis_index(axis, a.ndim)
    a = added_up(a)
    return a.graph.emit("CumSum", a, np.array(axis, np.int64), shape=a.shape, dtype=a.dtype)


def diff(a, n=1, axis=-1):
    if n < 0:
        raise LoweringError(f"numpy.diff: expected n of at least 0, found {n}")
    axis = normalize_axis_index(axis, a.ndim)
    full = (slice(None),) * axis
    for _ in range(n):
        a = a[(*full, slice(1, None))] - a[(*full, slice(None, -1))]
    return a


def outer(a, b):
    a, b = traced(a, b)
    return np.ravel(a)[:, None] * np.ravel(b)


def tensordot(a, b, axes=2):
    """Lower `numpy.tensordot` to one matrix product: the summed axes become the last of a and the first of b."""
    a, b = traced(a, b)
    if isinstance(axes, int | np.integer):
        axes = range(a.ndim - axes, a.ndim), range(axes)
    summed_a, summed_b = (
        normalize_axis_tuple(np.atleast_1d(x).tolist(), n) for x, n in zip(axes, (a.ndim, b.ndim), strict=True)
    )
    if [a.shape[i] for i in summed_a] != [b.shape[i] for i in summed_b]:
        raise LoweringError(f"numpy.tensordot: the shapes {a.shape} and {b.shape} do not fit along {axes}")
    left = [i for i in range(a.ndim) if i not in summed_a]
    right = [i for i in range(b.ndim) if i not in summed_b]
    inner = math.prod(a.shape[i] for i in summed_a)
    rows, columns = (math.prod(x.shape[i] for i in kept) for x, kept in ((a, left), (b, right)))
    product = np.matmul(
        np.reshape(np.transpose(a, (*left, *summed_a)), (rows, inner)),
        np.reshape(np.transpose(b, (*summed_b, *right)), (inner, columns)),
    )
    return np.reshape(product, (*(a.shape[i] for i in left), *(b.shape[i] for i in right)))


def dot(a, b):
    a, b = traced(a, b)
    if not np.ndim(a) or not np.ndim(b):
        return a * b
    return np.matmul(a, b) if np.ndim(b) <= 2 else np.tensordot(a, b, ([np.ndim(a) - 1], [np.ndim(b) - 2]))


def axes_in_letters(subscripts: str, arrays) -> tuple[list[str], str]:
    """Return subscripts in which every axis of `...` has a letter: one string per array, and one for the result."""
    given, arrow, wanted = str(subscripts).replace(" ", "").partition("->")
    terms = given.split(",")
    if not re.fullmatch(r"([a-zA-Z]|\.\.\.|,)*", given + "," + wanted) or len(terms) != len(arrays):
        raise LoweringError(
            f"numpy.einsum of {subscripts!r} and {len(arrays)} arrays has no rule; write it as 'ab,bc->ac'"
        )
    rest = [x.ndim - len(term.replace("...", "")) for term, x in zip(terms, arrays, strict=True)]
    if min(rest) < 0 or builtins.any("..." not in term and n for term, n in zip(terms, rest, strict=True)):
        raise LoweringError(f"numpy.einsum: {given!r} does not fit the shapes {[x.shape for x in arrays]}")
    letters = sorted(set(given) - set(".,"))
    spare = "".join(x for x in string.ascii_letters if x not in letters)[: max(rest)]
    if not arrow:
        wanted = "..." * ("..." in given) + "".join(x for x in letters if given.count(x) == 1)
    terms = [term.replace("...", spare[len(spare) - n :]) for term, n in zip(terms, rest, strict=True)]
    return terms, wanted.replace("...", spare)


def einsum(subscripts, *operands, optimize=None):
    arrays = traced(*operands)
    return einsum_of_letters(*axes_in_letters(subscripts, arrays), arrays)


def atleast(n: int):
    """Return a rule for `numpy.atleast_1d` or `atleast_2d`, which prepend axes of length 1."""

    def rule(*arrays):
        out = tuple(np.reshape(x, (1,) * (n - x.ndim) + tuple(x.shape)) for x in traced(*arrays))
        return out[0] if len(out) == 1 else out

    return rule


def stack(arrays, axis=0):
    return np.concatenate([np.expand_dims(x, axis) for x in traced(*arrays)], axis)


def tile(A, reps):
    reps = [int(n) for n in (reps if np.iterable(reps) else [reps])]
    reps = [1] * (A.ndim - len(reps)) + reps
    shape = [1] * (len(reps) - A.ndim) + list(A.shape)
    apart = np.broadcast_to(
        np.reshape(A, [n for pair in zip([1] * len(shape), shape, strict=True) for n in pair]),
        [n for pair in zip(reps, shape, strict=True) for n in pair],
    )
    return np.reshape(apart, [r * n for r, n in zip(reps, shape, strict=True)])


def repeat(a, repeats, axis=None):
    if axis is None:
        a, axis = np.ravel(a), 0
    return np.take(a, np.repeat(np.arange(a.shape[axis]), repeats), axis)


def pad(array, pad_width, mode="constant", *, constant_values=0):
    if mode != "constant" or np.ndim(constant_values):
        raise LoweringError("numpy.pad has a rule for mode 'constant' with one value alone")
    for axis, pair in enumerate(np.broadcast_to(pad_width, (array.ndim, 2)).tolist()):
        before, after = (
            np.full((*array.shape[:axis], n, *array.shape[axis + 1 :]), constant_values, array.dtype) for n in pair
        )
        array = np.concatenate([before, array, after], axis=axis)
    return array


def array_split(ary, indices_or_sections, axis=0):
    axis = normalize_axis_index(axis, ary.ndim)
    parts = np.array_split(np.arange(ary.shape[axis]), indices_or_sections)
    return [ary[(slice(None),) * axis + (slice(*(x[0], x[-1] + 1) if x.size else (0, 0)),)] for x in parts]


def split(ary, indices_or_sections, axis=0):
    np.split(np.broadcast_to(False, ary.shape), indices_or_sections, axis)  # raises for parts of unequal length
    return array_split(ary, indices_or_sections, axis)


def flip(m, axis=None):
    axes = range(m.ndim) if axis is None else normalize_axis_tuple(axis, m.ndim)
    return m[tuple(slice(None, None, -1 if i in axes else 1) for i in range(m.ndim))]


def moveaxis(a, source, destination):
    return np.transpose(a, np.moveaxis(np.empty(range(a.ndim)), source, destination).shape)


def roll(a, shift, axis=None):
    if axis is None:
        return np.reshape(roll(np.ravel(a), shift, 0), a.shape)
    for n, along in np.broadcast(shift, axis):
        a = np.take(a, np.roll(np.arange(a.shape[along]), n), along)
    return a


def triangle(function):
    """Return a rule for `numpy.tril` or `triu`."""
    return lambda m, k=0: np.where(function(np.ones(m.shape[-2:], bool), k), m, np.zeros((), m.dtype))


def trace(a, offset=0, axis1=0, axis2=1):
    a = np.moveaxis(a, (axis1, axis2), (-2, -1))
    return np.sum(np.where(np.eye(a.shape[-2], a.shape[-1], offset, bool), a, np.zeros((), a.dtype)), axis=(-2, -1))


def logarithm(ufunc, base: float):
    """Return a rule for the logarithm to another base."""

    def rule(x):
        (x,) = promoted(ufunc, x)
        return np.log(x) / x.dtype.type(math.log(base))

    return rule


def reciprocal(x):
    if x.dtype.kind != "f":
        raise LoweringError("numpy.reciprocal of integers has no rule; cast them first")
    return 1 / x


def isclose(a, b, rtol=1e-5, atol=1e-8, equal_nan=False):
    a, b = traced(a, b)
    b = cast(b, np.result_type(b.dtype, 1.0))  # differences of unsigned integers would wrap
    near = np.logical_and(np.less_equal(np.abs(a - b), atol + rtol * np.abs(b)), np.isfinite(b))
    near = np.logical_or(near, np.equal(a, b))
    return np.logical_or(near, np.logical_and(np.isnan(a), np.isnan(b))) if equal_nan else near


def log1p(x):
    """Compute log(1 + x). The rounding error of 1 + x cancels (Kahan)."""
    (x,) = promoted(np.log1p, x)
    y = 1 + x
    exact = np.logical_or(np.equal(y, 1), np.isinf(y))
    return np.where(exact, np.where(np.equal(y, 1), x, np.log(y)), np.log(y) * (x / np.where(exact, 1, y - 1)))


def expm1(x):
    """Compute exp(x) - 1. The rounding error of exp(x) cancels (Kahan)."""
    (x,) = promoted(np.expm1, x)
    y = np.exp(x)
    exact = np.logical_or(np.equal(y, 1), np.logical_or(np.equal(y, 0), np.isinf(y)))
    middle = (y - 1) * (x / np.where(exact, 1, np.log(y)))
    return np.where(exact, np.where(np.equal(y, 1), x, y - 1), middle)


def logaddexp(x, y):
    x, y = promoted(np.logaddexp, x, y)
    apart = np.maximum(x, y) + np.log1p(np.exp(-np.abs(x - y)))
    return np.where(np.equal(x, y), x + math.log(2), apart)  # the difference of two infinities is NaN


def sinh(x):
    (x,) = promoted(np.sinh, x)
    size, half = np.abs(x), np.exp(np.abs(x) / 2)  # exp overflows before sinh does
    small = np.expm1(size)
    small = (small + small / (small + 1)) / 2
    return np.sign(x) * np.where(size < 1, small, half / 2 * half - 1 / half / half / 2)


def cosh(x):
    (x,) = promoted(np.cosh, x)
    half = np.exp(np.abs(x) / 2)
    return half / 2 * half + 1 / half / half / 2


def hypot(x1, x2):
    x, y = (np.abs(x) for x in promoted(np.hypot, x1, x2))
    largest = np.maximum(x, y)
    plain = np.logical_or(np.equal(largest, 0), np.isinf(largest))
    scale = np.where(plain, 1, largest)
    return np.where(plain, largest, scale * np.sqrt((x / scale) ** 2 + (y / scale) ** 2))


def arctan(x):
    """Lower `numpy.arctan`. ONNX Runtime computes it in float32; one step with tan(a - b) refines it to float64."""
    (x,) = promoted(np.arctan, x)
    near = cast(x, np.float32)
    near = cast(x.graph.emit("Atan", near, shape=x.shape, dtype=np.float32), x.dtype)
    if x.dtype != np.float64:
        return near
    step = (x * np.cos(near) - np.sin(near)) / (np.cos(near) + x * np.sin(near))
    return np.where(np.isinf(x), np.sign(x) * (math.pi / 2), near + step)


NAMESAKES = (
    all, any, var, std, nansum, cumsum, diff, outer, tensordot, dot, einsum, tile, repeat, pad, array_split, split,
    flip, moveaxis, roll, trace, stack, reciprocal, isclose, log1p, expm1, logaddexp, sinh, cosh, hypot, arctan,
)  # fmt: skip
RULES |= {getattr(np, rule.__name__): rule for rule in NAMESAKES}
RULES |= {
    np.linalg.norm: norm,
    np.atleast_1d: atleast(1),
    np.atleast_2d: atleast(2),
    np.vstack: lambda tup: np.concatenate([np.atleast_2d(x) for x in tup]),
    np.hstack: lambda tup: np.concatenate([np.atleast_1d(x) for x in tup], axis=min(1, max(map(np.ndim, tup)) - 1)),
    np.tril: triangle(np.tril),
    np.triu: triangle(np.triu),
    np.flipud: lambda m: np.flip(m, 0),
    np.fliplr: lambda m: np.flip(m, 1),
    np.tan: lambda x: np.sin(x) / np.cos(x),
    np.log2: logarithm(np.log2, 2),
    np.log10: logarithm(np.log10, 10),
    np.exp2: lambda x: np.power(2.0, x),
    np.isnan: lambda x: np.not_equal(x, x),
    np.isinf: lambda x: np.equal(np.abs(x), math.inf),
    np.isfinite: lambda x: np.less(np.abs(x), math.inf),
}
STEPWISE |= {
    np.linalg.norm, np.atleast_1d, np.atleast_2d, np.vstack, np.hstack, np.stack, np.flip, np.flipud, np.fliplr,
    np.nansum, np.diff, np.outer, np.tensordot, np.dot, np.tile, np.repeat, np.pad, np.array_split, np.split, np.roll,
    np.trace,
}  # fmt: skip
