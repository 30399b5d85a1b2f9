"""Rules for NumPy's ufuncs and functions, and the methods of traced arrays.

A rule has the signature of its NumPy function. It computes shape and dtype as NumPy does, and emits nodes.
ONNX Runtime's max, min, argmax and sort may order NaN differently from NumPy's.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd.tracer import getval, isbox
from ml_dtypes import bfloat16
from numpy.lib.array_utils import normalize_axis_index, normalize_axis_tuple

from tinyprompt.lowering.calls import RULES, STEPWISE, LoweringError, TracedBox, call
from tinyprompt.lowering.graph import MICROSOFT, Graph, Traced


def graph_of(*arrays) -> Graph:
    """Return the graph of the first traced array. Arrays may be boxed."""
    return next(x.graph for x in map(getval, arrays) if isinstance(x, Traced))


def traced(*arrays) -> list:
    """Return the arguments as arrays of one graph. Constants are added to it; boxes stay boxes."""
    graph = graph_of(*arrays)
    return [x if isbox(x) else graph.array(x) for x in arrays]


ELEMENTWISE = {  # ufuncs with an equivalent ONNX operator
    np.add: "Add", np.subtract: "Sub", np.multiply: "Mul", np.true_divide: "Div", np.negative: "Neg",
    np.maximum: "Max", np.minimum: "Min", np.absolute: "Abs", np.floor: "Floor", np.ceil: "Ceil",
    np.rint: "Round", np.exp: "Exp", np.log: "Log", np.sqrt: "Sqrt", np.tanh: "Tanh", np.sin: "Sin", np.cos: "Cos",
    np.greater: "Greater", np.greater_equal: "GreaterOrEqual", np.less: "Less", np.less_equal: "LessOrEqual",
    np.equal: "Equal", np.logical_and: "And", np.logical_or: "Or", np.logical_not: "Not",
}  # fmt: skip


def elementwise(ufunc, op: str, *inputs) -> Traced:
    """Emit one node, after NumPy's casts and broadcasting."""
    graph, (*kinds, kind) = graph_of(*inputs), resolved(ufunc, *inputs)
    if op in ("And", "Or", "Not"):
        kinds = [np.dtype(bool)] * len(inputs)
    elif np.dtype(bool) in kinds and op != "Equal":
        if ufunc not in OF_BOOLEANS:
            raise LoweringError(f"numpy.{ufunc.__name__} of booleans has no rule; write x.astype(int)")
        return OF_BOOLEANS[ufunc](*inputs)
    arrays = of_kinds(graph, inputs, kinds)
    shape = np.broadcast_shapes(*(x.shape for x in arrays))
    if all(x.value is not None for x in arrays):
        return graph.array(ufunc(*(x.value for x in arrays)))
    for i, x in enumerate(arrays):
        if (
            len(arrays) == 2 and arrays[1 - i].shape == shape and is_one_number(x)
        ):  # reverse passes add 0 and multiply by 1
            number = x.value.flat[0]
            if number == NEUTRAL.get(ufunc) and (i == 1 or ufunc in (np.add, np.multiply)):
                return arrays[1 - i].copy()
            arrays[i] = graph.array(number)
    return graph.emit(op, *arrays, shape=shape, dtype=kind)


OF_BOOLEANS: dict[np.ufunc, Callable] = {
    np.add: np.logical_or, np.maximum: np.logical_or, np.multiply: np.logical_and, np.minimum: np.logical_and,
    np.absolute: lambda x: x.copy(),
}  # fmt: skip


def bitwise(ufunc, of_booleans: Callable):
    """Return a rule for `&`, `|`, `^` or `~` of booleans."""

    def rule(*inputs):
        if any(as_array(x).dtype != bool for x in inputs if not isinstance(x, bool)):
            raise LoweringError(f"numpy.{ufunc.__name__} of numbers has no rule; it has one for booleans")
        return of_booleans(*inputs)

    return rule


def resolved(ufunc, *inputs) -> list[np.dtype]:
    """Resolve a ufunc's dtypes as NumPy does: one for each input, and one for the result."""
    inputs = tuple(map(as_array, inputs))
    return list(ufunc.resolve_dtypes((*(x.dtype if hasattr(x, "dtype") else type(x) for x in inputs), None)))


def of_kinds(graph: Graph, arrays, kinds) -> list[Traced]:
    """Return arrays of the graph, each cast to its dtype."""
    return [
        cast(x, kind) if isinstance(x, Traced) else graph.array(np.asarray(x, kind))
        for x, kind in zip(arrays, kinds, strict=True)
    ]


def promoted(ufunc, *inputs) -> list[Traced]:
    """Return the inputs of a ufunc as arrays of the graph, cast as NumPy does."""
    return of_kinds(graph_of(*inputs), inputs, resolved(ufunc, *inputs)[:-1])


def as_array(x):
    """Convert x to an array, unless it is traced. Python numbers stay as they are, because their dtype is weak."""
    return x if isinstance(x, Traced) or type(x) in (int, float) else np.asarray(x)


def is_one_number(x: Traced) -> bool:
    """Return whether x is a constant with equal elements."""
    return x.value is not None and x.size > 0 and x.value.tobytes() == x.value.flat[0].tobytes() * x.size


NEUTRAL = {np.add: 0, np.subtract: 0, np.multiply: 1, np.true_divide: 1}
UNROLLED: dict[float, Callable] = {
    0.5: np.sqrt,
    1: lambda x: x.copy(),
    2: lambda x: x * x,
    3: lambda x: x * x * x,
    -1: lambda x: 1 / x,
}


def power(x, y) -> Traced:
    """Lower `x ** y` of floats. An exponent of 1/2 becomes a square root, a small integer exponent becomes products."""
    kind = np.result_type(x, y)
    if kind.kind != "f":
        raise LoweringError("numpy.power of integers has no rule; cast them first")
    if isinstance(x, Traced) and type(y) in (int, float) and y in UNROLLED:
        return UNROLLED[y](cast(x, kind))
    return elementwise(np.power, "Pow", x, y)


def matmul(a, b) -> Traced:
    """Lower `a @ b`. A transposed operand becomes a flag of the node, which saves the copy."""
    a, b = traced(a, b)
    if not a.ndim or not b.ndim or a.shape[-1] != b.shape[max(0, b.ndim - 2)]:
        raise LoweringError(f"numpy.matmul: the shapes {a.shape} and {b.shape} do not fit")
    kind = np.matmul.resolve_dtypes((a.dtype, b.dtype, None))[-1]
    a, b = cast(a, kind), cast(b, kind)
    if b.ndim == 1:
        return reshape(matmul(a, reshape(b, -1, 1)), a.shape[:-1])
    if a.ndim == 1:
        return reshape(matmul(reshape(a, 1, -1), b), (*b.shape[:-2], b.shape[-1]))
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    if not a.shape[-1]:  # an empty sum
        return a.graph.array(np.zeros(shape, kind))
    product = np.dtype(bfloat16) if a.graph.bf16 and kind == np.float32 else kind
    a, b = cast(a, product), cast(b, product)
    (a_source, a_flag), (b_source, b_flag) = untransposed(a), untransposed(b)
    if product in (np.float32, bfloat16) and (a_flag or b_flag) and not a.graph.plain:
        flags = {name: 1 for name, flag in (("transA", a_flag), ("transB", b_flag)) if flag}
        out = a.graph.emit("FusedMatMul", a_source, b_source, shape=shape, dtype=product, domain=MICROSOFT, **flags)
    else:
        out = a.graph.emit("MatMul", a, b, shape=shape, dtype=product)
    return cast(out, kind)


def untransposed(x: Traced) -> tuple[Traced, bool]:
    """Return (y, True) if x is y with its last two axes swapped, else (x, False)."""
    axes = [*range(x.ndim - 2), x.ndim - 1, x.ndim - 2]
    return (x.inputs[0], True) if x.op == "Transpose" and x.attributes["perm"] == axes else (x, False)


def cast(x: Traced, dtype) -> Traced:
    """Lower `x.astype(dtype)`."""
    dtype = np.dtype(dtype)
    if x.dtype == dtype:
        return x.copy()
    if x.value is not None:
        return x.graph.array(x.value.astype(dtype))
    if x.op == "Transpose":
        return transpose(cast(x.inputs[0], dtype), x.attributes["perm"])
    if x.op == "Reshape":
        return reshape(cast(x.inputs[0], dtype), x.shape)
    if x.op == "Cast" and x.dtype.kind == "f" and is_16_bits(x.inputs[0]) and dtype in (x.inputs[0].dtype, bfloat16):
        return cast(x.inputs[0], dtype)
    if x.name in x.graph.frozen and dtype == bfloat16:
        return x.graph.derive(x, rounded, (x.shape, dtype))[0]
    # Each use casts a 16-bit weight again. A shared wide copy would stay in memory until the backward pass.
    return x.graph.emit("Cast", x, shape=x.shape, dtype=dtype, anew=is_16_bits(x), to=dtype)


def is_16_bits(x: Traced) -> bool:
    """Return whether x is an input stored in 16 bits, such as a weight."""
    return x.op is None and x.dtype in (np.float16, bfloat16)


def rounded(weight: np.ndarray) -> tuple[np.ndarray]:
    """Round a weight to bfloat16."""
    return (weight.astype(bfloat16),)


def reshape(x, *shape, order=None) -> Traced:
    """Lower `x.reshape(shape)`. Two consecutive reshapes are merged."""
    if order not in (None, "C"):
        raise LoweringError(f"numpy.reshape in order {order!r} has no rule")
    wanted = [int(n) for n in (shape if len(shape) != 1 or isinstance(shape[0], int | np.integer) else shape[0])]
    if -1 in wanted:
        known = int(np.prod([n for n in wanted if n != -1], dtype=int))
        wanted[wanted.index(-1)] = x.size // known if known else 0
    if int(np.prod(wanted, dtype=int)) != x.size or min(wanted, default=0) < 0:
        raise LoweringError(f"numpy.reshape: {x!r} does not fit the shape {tuple(wanted)}")
    if x.value is not None:
        return x.graph.array(x.value.reshape(wanted))
    if x.op == "Reshape":
        x = x.inputs[0]
    if x.shape == tuple(wanted):
        return x.copy()
    zero = {"allowzero": 1} if 0 in wanted else {}
    return x.graph.emit("Reshape", x, np.array(wanted, np.int64), shape=wanted, dtype=x.dtype, **zero)


def transpose(x, *axes) -> Traced:
    """Lower `x.transpose(axes)`. Consecutive transposes are merged. If only axes of length 1 move, it is a reshape."""
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
    """Return a rule for np.sum, np.mean and similar functions."""

    def rule(a, axis=None, *, keepdims=False):
        axes = sorted(range(a.ndim) if axis is None else normalize_axis_tuple(axis, a.ndim))
        if a.size == 0 and op != "ReduceSum":
            raise LoweringError(f"{op} of {a!r}, which is empty, has no rule")
        if op in PAIRED and a.dtype.kind != "f":
            a = added_up(a)
        if op == "ReduceMean" and a.dtype.kind != "f":
            a = cast(a, np.float64)
        shape = [1 if i in axes else n for i, n in enumerate(a.shape) if keepdims or i not in axes]
        if not a.size:  # CUDA's kernel refuses empty arrays
            return a.graph.array(np.zeros(shape, a.dtype))
        if all(a.shape[i] == 1 for i in axes):
            return reshape(a, shape)
        if op in PAIRED and a.dtype.kind == "i":
            kept = [i for i in range(a.ndim) if i not in axes]
            last = reshape(transpose(a, kept + axes), *(a.shape[i] for i in kept), -1)
            return reshape(in_pairs(PAIRED[op], last), shape)
        return a.graph.emit(op, a, np.array(axes, np.int64), shape=shape, dtype=a.dtype, keepdims=int(keepdims))

    return rule


PAIRED = {"ReduceSum": np.add, "ReduceProd": np.multiply}


def added_up(a: Traced) -> Traced:
    """Cast an array to the dtype of its sum."""
    if a.dtype.kind == "u":
        raise LoweringError("sums and products of unsigned integers have no rule; cast them to int64 first")
    return cast(a, np.int64) if a.dtype.kind in "bi" else a


def in_pairs(ufunc, x: Traced) -> Traced:
    """Sum or multiply over the last axis by halving it. ONNX Runtime's own reductions round integers to 53 bits."""
    while (n := x.shape[-1]) > 1:
        halves = ufunc(x[..., : n // 2], x[..., n // 2 : n // 2 * 2])
        x = concatenate([halves, x[..., -1:]], axis=-1) if n % 2 else halves
    return x


def position(op: str):
    """Return a rule for np.argmax or np.argmin."""

    def rule(a, axis=None, *, keepdims=False):
        if axis is None:
            shape = (1,) * a.ndim if keepdims else ()
            return reshape(rule(reshape(a, -1), 0), shape)
        axis = normalize_axis_index(axis, a.ndim)
        shape = [1 if i == axis else n for i, n in enumerate(a.shape) if keepdims or i != axis]
        return a.graph.emit(op, a, shape=shape, dtype=np.int64, axis=axis, keepdims=int(keepdims))

    return rule


def in_order(output: int):
    """Return a rule for np.sort (output 0) or np.argsort (output 1). The sort is stable for every `kind`."""

    def rule(a, axis=-1, kind=None, order=None, *, stable=None):
        if axis is None:
            return rule(reshape(a, -1), 0)
        axis = normalize_axis_index(axis, a.ndim)
        if a.dtype == np.uint64 or a.dtype.kind not in "fiub":
            raise LoweringError(f"numpy.{('sort', 'argsort')[output]} of {a.dtype} has no rule")
        wide = np.float64 if a.dtype == np.float64 else np.float32 if a.dtype.kind == "f" else np.int64
        inputs, dtype = (cast(a, wide), np.array([a.shape[axis]])), (wide, np.int64)[output]
        out = a.graph.emit("TopK", *inputs, shape=a.shape, dtype=dtype, axis=axis, largest=0, sorted=1, output=output)
        return out if output else cast(out, a.dtype)

    return rule


def einsum_of_letters(terms, wanted: str, arrays) -> Traced:
    """Lower an einsum whose axes all have a letter: `terms` of each array, and `wanted` of the result."""
    kind = np.result_type(*(x.dtype for x in arrays))
    if [*terms] == [terms[0]] * 2 and wanted == terms[0][:-1] and len(set(terms[0])) == len(terms[0]) > 0:
        return cast(np.sum(arrays[0] * arrays[1], axis=-1), kind)  # faster than ONNX's Einsum
    length: dict[str, int] = {}
    for letters, x in zip(terms, arrays, strict=True):
        for letter, n in zip(letters, x.shape, strict=True):
            if 1 not in (n, length.get(letter, n)) and n != length.get(letter, n):
                raise LoweringError(f"numpy.einsum: {letter!r} is {length[letter]} and {n} long")
            length[letter] = max(n, length.get(letter, 1))
    if len(set(wanted)) < len(wanted) or not set(wanted) <= set(length):
        raise LoweringError(f"numpy.einsum: {wanted!r} must name each axis of the result once, from {terms}")
    full = [[length[letter] for letter in letters] for letters in terms]
    arrays = [broadcast_to(cast(x, kind), shape) for x, shape in zip(arrays, full, strict=True)]
    if kind.kind != "f":  # ONNX Runtime's Einsum rounds integers to 53 bits
        return cast(sum_of_products(terms, wanted, arrays), kind)
    equation = f"{','.join(terms)}->{wanted}"
    return arrays[0].graph.emit("Einsum", *arrays, shape=[length[x] for x in wanted], dtype=kind, equation=equation)


def sum_of_products(terms, wanted: str, arrays) -> Traced:
    """Lower an einsum as one product over all axes and one sum."""
    letters = wanted + "".join(sorted(set("".join(terms)) - set(wanted)))
    factors = []
    for term, x in zip(terms, arrays, strict=True):
        if len(set(term)) < len(term):
            raise LoweringError(f"numpy.einsum of integers with {term!r} has no rule; cast them to float64 first")
        length = dict(zip(term, x.shape, strict=True))
        x = transpose(x, [term.index(letter) for letter in letters if letter in term])
        factors.append(reshape(x, [length.get(letter, 1) for letter in letters]))
    return np.sum(functools.reduce(operator.mul, factors), axis=tuple(range(len(wanted), len(letters))))


def concatenate(arrays, axis=0) -> Traced:
    arrays = traced(*arrays)
    kind = np.result_type(*(x.dtype for x in arrays))
    axis = normalize_axis_index(axis, arrays[0].ndim)
    if len({(x.ndim, x.shape[:axis], x.shape[axis + 1 :]) for x in arrays}) > 1:
        raise LoweringError(f"numpy.concatenate: the shapes {[x.shape for x in arrays]} do not fit along axis {axis}")
    shape = (*arrays[0].shape[:axis], sum(x.shape[axis] for x in arrays), *arrays[0].shape[axis + 1 :])
    arrays = [cast(x, kind) for x in arrays]
    return arrays[0].graph.emit("Concat", *arrays, shape=shape, dtype=kind, axis=axis)


def broadcast_to(array, shape) -> Traced:
    shape = tuple(int(n) for n in shape)
    if np.broadcast_shapes(array.shape, shape) != shape:
        raise LoweringError(f"numpy.broadcast_to: {array!r} does not fit the shape {shape}")
    if array.shape == shape:
        return array.copy()
    return array.graph.emit("Expand", array, np.array(shape, np.int64), shape=shape, dtype=array.dtype)


def where(condition, x, y) -> Traced:
    graph, x, y = graph_of(condition, x, y), as_array(x), as_array(y)
    kind = np.result_type(x, y)
    x, y = of_kinds(graph, (x, y), (kind, kind))
    condition = graph.array(condition)
    if condition.dtype != bool:
        condition = np.not_equal(condition, 0)
    shape = np.broadcast_shapes(condition.shape, x.shape, y.shape)
    return graph.emit("Where", condition, x, y, shape=shape, dtype=kind)


def clip(a, a_min=None, a_max=None, *, min=None, max=None) -> Traced:
    low, high = a_min if min is None else min, a_max if max is None else max
    a = a if low is None else np.maximum(a, low)
    return a if high is None else np.minimum(a, high)


def take(a, indices, axis=None) -> Traced:
    if axis is None:
        raise LoweringError("numpy.take without an axis has no rule")
    a, indices = traced(a, indices)
    axis = normalize_axis_index(axis, a.ndim)
    shape = (*a.shape[:axis], *indices.shape, *a.shape[axis + 1 :])
    return a.graph.emit("Gather", a, cast(indices, np.int64), shape=shape, dtype=a.dtype, axis=axis)


def take_along_axis(arr, indices, axis=-1) -> Traced:
    arr, indices = traced(arr, indices)
    axis = normalize_axis_index(axis, arr.ndim)
    if len({(x.ndim, x.shape[:axis], x.shape[axis + 1 :]) for x in (arr, indices)}) > 1:
        raise LoweringError("numpy.take_along_axis that broadcasts has no rule")
    indices = cast(indices, np.int64)
    if arr.graph.plain and axis == arr.ndim - 1:  # onnx's own evaluator limits GatherElements to axes of 64
        n = arr.shape[axis]
        begin = np.arange(0, arr.size, n).reshape(*arr.shape[:-1], 1)
        return take(reshape(arr, -1), np.where(indices < 0, indices + n, indices) + begin, 0)
    return arr.graph.emit("GatherElements", arr, indices, shape=indices.shape, dtype=arr.dtype, axis=axis)


def getitem(x: Traced, index) -> Traced:
    """Lower `x[index]` for integers, slices, None, `...`, integer arrays, and constant masks."""
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, np.ndarray | Traced | list | tuple) for i in index):
        return gather(x, index)
    shape = np.broadcast_to(False, x.shape)[index].shape  # NumPy checks the bounds
    kept, limits = list(x.shape), []
    for axis, i in enumerate(i for i in full_index(index, x.ndim) if i is not None):
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


def full_index(index: tuple, ndim: int) -> tuple:
    """Expand an index with a full slice for every axis that it omits or covers by `...`."""
    gap = next((k for k, i in enumerate(index) if i is Ellipsis), len(index))
    given = sum(1 for i in index if i is not None and i is not Ellipsis)
    return (*index[:gap], *[slice(None)] * (ndim - given), *index[gap + 1 :])


def gather(x: Traced, index: tuple) -> Traced:
    """Lower `x[index]` with index arrays: move their axes to the front, merge them, and emit one Gather."""
    spread: list[Any] = []
    for i in index:
        i = np.asarray(i) if isinstance(i, list | tuple) else i
        if isinstance(i, Traced | np.ndarray) and i.dtype.kind not in "iu":
            if isinstance(i, Traced) or i.dtype != bool:
                raise LoweringError("x[...] with a mask or with floats has no rule; use numpy.where or take")
            spread.extend(i.nonzero())
        else:
            spread.append(i)
    index = full_index(tuple(spread), x.ndim)
    places = [k for k, i in enumerate(index) if not (i is None or isinstance(i, slice))]
    # Apply slices and new axes first. Then the axes of x are the axes of the index.
    x = getitem(x, tuple(slice(None) if k in places else i for k, i in enumerate(index)))
    lengths = [x.shape[k] for k in places]
    arrays = [x.graph.array(np.asarray(i) if not isinstance(i, Traced) else i) for i in (index[k] for k in places)]
    for i, n in zip(arrays, lengths, strict=True):
        if i.value is not None and i.size and not (-n <= i.value.min() and i.value.max() < n):
            raise IndexError(f"index {i.value.tolist()} is out of bounds for an axis of length {n}")
    if len(places) == 1:
        return take(x, arrays[0], places[0])
    flat = x.graph.array(0)
    for i, n in zip(arrays, lengths, strict=True):
        i = cast(i, np.int64)
        flat = flat * n + (x.graph.array(i.value % n) if i.value is not None and n else np.where(i < 0, i + n, i))
    rest = [k for k in range(x.ndim) if k not in places]
    rows = reshape(transpose(x, [*places, *rest]), math.prod(lengths), *(x.shape[k] for k in rest))
    out = take(rows, flat, 0)
    if places == [*range(places[0], places[-1] + 1)]:  # as NumPy does, at the first array's axis
        new = list(range(flat.ndim))
        out = RULES[np.moveaxis](out, new, [places[0] + k for k in new])
    return out


def add_at(total, index, x) -> None:
    """Lower `numpy.add.at`, which autograd calls for the gradient of `y[index]`. `total` becomes the result."""
    if not isinstance(total, Traced):
        raise LoweringError("numpy.add.at to an array that is not traced has no rule")
    at = getitem(total.graph.array(np.arange(total.size).reshape(total.shape)), index)
    x = reshape(broadcast_to(cast(total.graph.array(x), total.dtype), at.shape), -1)
    operands = np.zeros(total.size, x.dtype), reshape(at, -1), x
    sums = x.graph.emit("ScatterElements", *operands, shape=(total.size,), dtype=x.dtype, reduction="add")
    total.become(total + reshape(sums, total.shape))


def sign(x) -> Traced:
    """Lower `numpy.sign`. float16 is computed in float32, because ONNX Runtime returns 0 for a NaN in float16."""
    kind = np.sign.resolve_dtypes((x.dtype, None))[-1]
    return cast(elementwise(np.sign, "Sign", cast(x, np.float32) if kind == np.float16 else x), kind)


def round(a, decimals=0) -> Traced:
    if a.dtype.kind in "iu":
        if decimals < 0:
            raise LoweringError("numpy.round of integers to tens has no rule; cast them first")
        return a.copy()
    scale = a.dtype.type(10.0 ** abs(decimals))
    return np.rint(a * scale) / scale if decimals > 0 else np.rint(a / scale) * scale


def astype(x, dtype, copy=True):
    if not isbox(x):
        return cast(x, dtype)
    floats = np.dtype(dtype) in (np.float16, bfloat16, np.float32, np.float64)
    return anp.astype(x, dtype) if floats else cast(getval(x), dtype)  # integers have no gradient


def full_like(a, fill_value, dtype=None):
    dtype = a.dtype if dtype is None else dtype
    if not isinstance(getval(fill_value), Traced):
        return np.full(np.shape(a), fill_value, dtype)
    return np.broadcast_to(np.astype(fill_value, dtype), np.shape(a))


NAMESAKES = (
    power, sign, round, matmul, reshape, transpose, swapaxes, broadcast_to, concatenate, where, clip,
    take, take_along_axis, astype, full_like,
)  # fmt: skip
RULES |= {getattr(np, rule.__name__): rule for rule in NAMESAKES}
RULES |= {ufunc: functools.partial(elementwise, ufunc, op) for ufunc, op in ELEMENTWISE.items()}
RULES |= {
    np.not_equal: lambda x, y: np.logical_not(np.equal(x, y)),
    np.square: lambda x: x * x,
    np.positive: lambda x: x.copy(),
    np.conjugate: lambda x: x.copy(),
    np.real: lambda val: val.copy(),
    np.bitwise_and: bitwise(np.bitwise_and, np.logical_and),
    np.bitwise_or: bitwise(np.bitwise_or, np.logical_or),
    np.bitwise_xor: bitwise(np.bitwise_xor, lambda x, y: np.not_equal(x, y)),
    np.invert: bitwise(np.invert, np.logical_not),
    np.add.at: add_at,
    operator.getitem: getitem,
    # The next six return numbers, because they depend only on shape and dtype.
    np.shape: lambda a: a.shape,
    np.size: lambda a, axis=None: a.size if axis is None else a.shape[axis],
    np.ndim: lambda a: a.ndim,
    np.result_type: lambda *a: np.result_type(*(x.dtype if isinstance(x, Traced) else x for x in a)),
    np.iscomplexobj: lambda x: False,
    np.zeros_like: lambda a, dtype=None: np.zeros(a.shape, dtype or a.dtype),
    np.ones_like: lambda a, dtype=None: np.ones(a.shape, dtype or a.dtype),
    np.sum: reduction("ReduceSum"),
    np.mean: reduction("ReduceMean"),
    np.max: reduction("ReduceMax"),
    np.amax: reduction("ReduceMax"),
    np.min: reduction("ReduceMin"),
    np.amin: reduction("ReduceMin"),
    np.prod: reduction("ReduceProd"),
    np.argmax: position("ArgMax"),
    np.argmin: position("ArgMin"),
    np.sort: in_order(0),
    np.argsort: in_order(1),
    np.around: round,
    np.ravel: lambda a: reshape(a, -1),
    np.expand_dims: lambda a, axis: reshape(a, np.expand_dims(np.broadcast_to(False, a.shape), axis).shape),
    np.squeeze: lambda a, axis=None: reshape(a, np.squeeze(np.broadcast_to(False, a.shape), axis).shape),
}
STEPWISE |= {np.astype, np.full_like}


def method(name: str, function: Callable) -> None:
    """Make a NumPy function a method of traced arrays, boxed or not."""

    def run(self, *args, **kwargs):
        if name in ("reshape", "transpose") and len(args) > 1:
            args = (args,)  # x.reshape(2, 3) is x.reshape((2, 3))
        return call(function, (self, *args), kwargs, f"numpy.{name}")

    setattr(Traced, name, run)
    setattr(TracedBox, name, run)


METHODS = """
    all any argmax argmin argsort astype clip conjugate cumsum dot max mean min prod ravel repeat reshape round squeeze
    std sum swapaxes take trace transpose var
"""
for _name in METHODS.split():
    method(_name, getattr(np, _name))
method("flatten", np.ravel)
method("conj", np.conjugate)
