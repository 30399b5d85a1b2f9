"""The gradient of every NumPy function that docs/devices.md lists, lowered and compared with finite differences.

    python tests/gradient_table.py          # a table: right, refused, silently wrong, odd exceptions
    python tests/gradient_table.py dot      # the cases of functions with this name

Each case is written twice, with `numpy` and with `autograd.numpy`. It runs inside `grad` and `value_and_grad`, in
float32 and float64, with and without a second term. The reference is the same case in plain NumPy.
"""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import autograd.numpy as anp
import numpy as np
from autograd import grad, value_and_grad
from autograd.builtins import SequenceBox

from tinyprompt.device import compile
from tinyprompt.lowering import LoweringError

PAGE = Path(__file__).parents[1] / "docs" / "devices.md"
MODULES = {"numpy": np, "autograd.numpy": anp}
OUTCOMES = ("right", "refused", "silently wrong", "odd")
LIMITS = {np.float32: 2e-4, np.float64: 1e-6}

# A case is a function of a module, of w (2, 3), which is differentiated, of x (2, 3), which is traced too, of c (2, 3),
# a constant of the graph, and of i (3,), traced integers. Operators and methods are listed under their functions.
CASES: dict[str, list[Callable]] = {
    "absolute": [
        lambda np, w, x, c, i: np.absolute(w - 1) * x,
        lambda np, w, x, c, i: abs(w - x),
        lambda np, w, x, c, i: np.absolute(x - 1) * w,
    ],
    "add": [
        lambda np, w, x, c, i: np.add(w, x) + np.add(x, w[0]),
        lambda np, w, x, c, i: np.add(c, w) * np.add(w, c[0]),
        lambda np, w, x, c, i: (w + x) * (x + w) * (c + w) * (w + c) + 2 + w,
        lambda np, w, x, c, i: np.add(np.add(x, c), w[:, :1]),
    ],
    "all": [
        lambda np, w, x, c, i: np.all(w > 1, axis=0) * w,
        lambda np, w, x, c, i: (w > x).all(1, keepdims=True) * x * w,
        lambda np, w, x, c, i: np.where(np.all(w), w, x),
        lambda np, w, x, c, i: np.where(w.all(), w, x),
    ],
    "amax": [
        lambda np, w, x, c, i: np.amax(w, axis=1) * x[:, 0],
        lambda np, w, x, c, i: np.amax(w * x) + np.amax(x, axis=0) * w,
        lambda np, w, x, c, i: np.amax(w * c, axis=(0, 1), keepdims=True),
    ],
    "amin": [
        lambda np, w, x, c, i: np.amin(w, axis=1) * x[:, 0],
        lambda np, w, x, c, i: np.amin(w * x) + np.amin(x, axis=0) * w,
        lambda np, w, x, c, i: np.amin(w * c, axis=0, keepdims=True),
    ],
    "any": [
        lambda np, w, x, c, i: np.any(w > 1, axis=0) * w,
        lambda np, w, x, c, i: (w > x).any(1, keepdims=True) * x * w,
        lambda np, w, x, c, i: np.where(np.any(w), w, x),
    ],
    "arctan": [lambda np, w, x, c, i: np.arctan(w * x), lambda np, w, x, c, i: np.arctan(30 * w) + np.arctan(x) * w],
    "argmax": [
        lambda np, w, x, c, i: np.argmax(w, axis=1) + x[:, 0],
        lambda np, w, x, c, i: w.T[np.argmax(x, axis=1)],
        lambda np, w, x, c, i: x[w.argmax(0)] * w[:1] + w.argmax(),
    ],
    "argmin": [
        lambda np, w, x, c, i: np.argmin(w, axis=1) + x[:, 0],
        lambda np, w, x, c, i: w.T[np.argmin(x, axis=1)],
        lambda np, w, x, c, i: x[w.argmin(0)] * w[:1] + w.argmin(),
    ],
    "argsort": [
        lambda np, w, x, c, i: np.argsort(w, axis=1) * x,
        lambda np, w, x, c, i: np.take_along_axis(w, np.argsort(x, axis=1), 1),
        lambda np, w, x, c, i: np.take_along_axis(x, w.argsort(0), 0) * w,
    ],
    "around": [
        lambda np, w, x, c, i: np.around(w, 1) * w,
        lambda np, w, x, c, i: np.around(x * w) * w + np.around(x) * w,
    ],
    "array_split": [
        lambda np, w, x, c, i: np.array_split(w, 2, axis=1)[0] * x[:, :2],
        lambda np, w, x, c, i: np.array_split(w * x, [1, 2], axis=-1),
        lambda np, w, x, c, i: np.array_split(x, 2)[1] * w,
        lambda np, w, x, c, i: [part * k for k, part in enumerate(np.array_split(w, 3, axis=1))],
    ],
    "astype": [
        lambda np, w, x, c, i: np.astype(w, np.float64) * x,
        lambda np, w, x, c, i: w.astype(x.dtype) * x.astype(np.float64) + (3 * w).astype(np.int64) * w,
        lambda np, w, x, c, i: (w > 1).astype(w.dtype) * w,
        lambda np, w, x, c, i: np.astype(x, np.float64) * w + np.astype(w, int),
    ],
    "atleast_1d": [
        lambda np, w, x, c, i: np.atleast_1d(w) * np.atleast_1d(x),
        lambda np, w, x, c, i: np.atleast_1d(w[0, 0]) * w,
        lambda np, w, x, c, i: np.atleast_1d(x, w, w[0, 0]),
    ],
    "atleast_2d": [
        lambda np, w, x, c, i: np.atleast_2d(w[0]) * np.atleast_2d(x[0]),
        lambda np, w, x, c, i: np.atleast_2d(w[0, 0]) * w,
        lambda np, w, x, c, i: np.atleast_2d(w[0], x, w),
    ],
    "bitwise_and": [
        lambda np, w, x, c, i: np.bitwise_and(w > 1, x > 1) * w,
        lambda np, w, x, c, i: ((w > 1) & (c > 1)) * w,
    ],
    "bitwise_or": [
        lambda np, w, x, c, i: np.bitwise_or(w > 1, x > 1) * w,
        lambda np, w, x, c, i: ((c > 1) | (w > 1)) * w,
    ],
    "bitwise_xor": [
        lambda np, w, x, c, i: np.bitwise_xor(w > 1, x > 1) * w,
        lambda np, w, x, c, i: ((w > 1) ^ (x > 1)) * w,
    ],
    "broadcast_to": [
        lambda np, w, x, c, i: np.broadcast_to(w, (4, 2, 3)) * np.arange(1, 5).reshape(4, 1, 1),
        lambda np, w, x, c, i: np.broadcast_to(w[:, :1], (2, 3)) * x,
        lambda np, w, x, c, i: np.broadcast_to(x[0], w.shape) * w,
        lambda np, w, x, c, i: np.broadcast_to(w[0, 0], (2, 3)) * x,
    ],
    "ceil": [lambda np, w, x, c, i: np.ceil(w) * w, lambda np, w, x, c, i: np.ceil(w * x) + np.ceil(x) * w],
    "clip": [
        lambda np, w, x, c, i: np.clip(w, 0.5, 1.5) * x,
        lambda np, w, x, c, i: w.clip(0.5, 1.5) * np.clip(x, None, 1.0),
        lambda np, w, x, c, i: np.clip(w, None, 1.2),
        lambda np, w, x, c, i: np.clip(x, 0.7 * w, 2 * w),
        lambda np, w, x, c, i: np.clip(w, a_min=x, a_max=None),
        lambda np, w, x, c, i: np.clip(w, min=0.5, max=1.5) + w.clip(min=1.1),
    ],
    "concatenate": [
        lambda np, w, x, c, i: np.concatenate([w, x]),
        lambda np, w, x, c, i: np.concatenate((x, w), axis=1),
        lambda np, w, x, c, i: np.concatenate([x, c, w * x, w], axis=-1),
        lambda np, w, x, c, i: np.concatenate([np.concatenate([x, x]), w]),
    ],
    "conjugate": [lambda np, w, x, c, i: np.conjugate(w) * x, lambda np, w, x, c, i: np.conjugate(x * w)],
    "cos": [lambda np, w, x, c, i: np.cos(w) * x, lambda np, w, x, c, i: np.cos(x * w) + np.cos(x) * w],
    "cosh": [lambda np, w, x, c, i: np.cosh(w) * x, lambda np, w, x, c, i: np.cosh(x * w) + np.cosh(x) * w],
    "cumsum": [
        lambda np, w, x, c, i: np.cumsum(w, axis=1) * x,
        lambda np, w, x, c, i: np.cumsum(w * x),
        lambda np, w, x, c, i: w.cumsum(0) * x.cumsum(-1),
        lambda np, w, x, c, i: np.cumsum(w, axis=-1) * np.cumsum(c, 0),
    ],
    "diff": [
        lambda np, w, x, c, i: np.diff(w),
        lambda np, w, x, c, i: np.diff(w * x, axis=0) * x,
        lambda np, w, x, c, i: np.diff(w, 2) * np.diff(x),
        lambda np, w, x, c, i: np.diff(w, n=2, axis=-1),
    ],
    "divide": [
        lambda np, w, x, c, i: np.divide(w, x) + np.divide(x, w[0]),
        lambda np, w, x, c, i: w / x / c + x / w + c / w + 2 / w + w / 2,
        lambda np, w, x, c, i: np.divide(c, w) * np.divide(w, c),
    ],
    "dot": [
        lambda np, w, x, c, i: np.dot(x, w.T),
        lambda np, w, x, c, i: np.dot(w, x.T),
        lambda np, w, x, c, i: x.dot(w.T),
        lambda np, w, x, c, i: w.dot(x.T),
        lambda np, w, x, c, i: np.dot(x, w[0]) + np.dot(w[:, 0], x[:, 1]) * np.dot(w, x[0]),
        lambda np, w, x, c, i: np.dot(c, w.T) + np.dot(w, c.T),
        lambda np, w, x, c, i: np.dot(w[0, 0], x) + np.dot(x, w[0, 1]),
        lambda np, w, x, c, i: np.dot(x[:, None] * x, w.T) + np.dot(w, w.T),
    ],
    "einsum": [
        lambda np, w, x, c, i: np.einsum("ij,kj->ik", x, w),
        lambda np, w, x, c, i: np.einsum("ij,ij->j", w, x),
        lambda np, w, x, c, i: np.einsum("ij,kj,lk->il", x, w, c[:, :2]),
        lambda np, w, x, c, i: np.einsum("...i,...i->...", c, w) + np.einsum("ij->", w),
        lambda np, w, x, c, i: np.einsum("ij,kj", w, w) * np.einsum("ij,kj->ki", x, x),
        lambda np, w, x, c, i: np.einsum("i,j", x[0], w[0]),
    ],
    "equal": [lambda np, w, x, c, i: np.equal(w, x) * w + w, lambda np, w, x, c, i: (x == w) * 1.0 + (w == 1) * w],
    "exp": [lambda np, w, x, c, i: np.exp(w) * x, lambda np, w, x, c, i: np.exp(x * w) + np.exp(x) * w],
    "exp2": [lambda np, w, x, c, i: np.exp2(w) * x, lambda np, w, x, c, i: np.exp2(x * w) + np.exp2(x) * w],
    "expand_dims": [
        lambda np, w, x, c, i: np.expand_dims(w, 1) * x,
        lambda np, w, x, c, i: np.expand_dims(x, (0, 2)) * np.expand_dims(w, axis=-1),
    ],
    "expm1": [lambda np, w, x, c, i: np.expm1(w) * x, lambda np, w, x, c, i: np.expm1(1e-3 * x * w) + np.expm1(x) * w],
    "flip": [
        lambda np, w, x, c, i: np.flip(w) * x,
        lambda np, w, x, c, i: np.flip(w, 1) * np.flip(x, axis=0),
        lambda np, w, x, c, i: np.flip(w * x, axis=(0, 1)),
    ],
    "fliplr": [lambda np, w, x, c, i: np.fliplr(w) * x, lambda np, w, x, c, i: np.fliplr(x) * w],
    "flipud": [lambda np, w, x, c, i: np.flipud(w) * x, lambda np, w, x, c, i: np.flipud(x) * w],
    "floor": [lambda np, w, x, c, i: np.floor(w) * w, lambda np, w, x, c, i: np.floor(w * x) + np.floor(x) * w],
    "full_like": [
        lambda np, w, x, c, i: np.full_like(w, 2.0) * w,
        lambda np, w, x, c, i: np.full_like(x, w[0, 0]) * w,
        lambda np, w, x, c, i: np.full_like(c, w[0, 0]) * w,
        lambda np, w, x, c, i: np.full_like(w, x[0, 0]) * w,
    ],
    "greater": [lambda np, w, x, c, i: np.greater(w, x) * w, lambda np, w, x, c, i: (x > w) * x * w + (c > w) * w],
    "greater_equal": [
        lambda np, w, x, c, i: np.greater_equal(w, x) * w,
        lambda np, w, x, c, i: (x >= w) * x * w + (c >= w) * w,
    ],
    "hstack": [
        lambda np, w, x, c, i: np.hstack([w, x]),
        lambda np, w, x, c, i: np.hstack((x, c, w * x)),
        lambda np, w, x, c, i: np.hstack([x[0], w[0], w[0, 0]]),
    ],
    "hypot": [lambda np, w, x, c, i: np.hypot(w, x), lambda np, w, x, c, i: np.hypot(c, w) * np.hypot(x[0], w)],
    "invert": [lambda np, w, x, c, i: np.invert(w > 1) * w, lambda np, w, x, c, i: ~(w > x) * w],
    "isclose": [
        lambda np, w, x, c, i: np.isclose(w, x) * 1.0 + w,
        lambda np, w, x, c, i: np.isclose(x, w, 0.5, 0.1) * w,
        lambda np, w, x, c, i: np.isclose(w, w, equal_nan=True) * w,
    ],
    "iscomplexobj": [
        lambda np, w, x, c, i: w * (1 + np.iscomplexobj(w)),
        lambda np, w, x, c, i: w * np.iscomplexobj(x),
    ],
    "isfinite": [lambda np, w, x, c, i: np.isfinite(w) * w, lambda np, w, x, c, i: np.isfinite(x) * w],
    "isinf": [lambda np, w, x, c, i: np.isinf(w) * w + w, lambda np, w, x, c, i: np.where(np.isinf(x), x, w)],
    "isnan": [lambda np, w, x, c, i: np.isnan(w) * w + w, lambda np, w, x, c, i: np.where(np.isnan(x), x, w)],
    "less": [lambda np, w, x, c, i: np.less(w, x) * w, lambda np, w, x, c, i: (x < w) * x * w + (c < w) * w],
    "less_equal": [
        lambda np, w, x, c, i: np.less_equal(w, x) * w,
        lambda np, w, x, c, i: (x <= w) * x * w + (c <= w) * w,
    ],
    "linalg.norm": [
        lambda np, w, x, c, i: np.linalg.norm(w) * w,
        lambda np, w, x, c, i: np.linalg.norm(w * x, axis=1) + np.linalg.norm(x) * w[:, 0],
        lambda np, w, x, c, i: np.linalg.norm(w, 1, axis=0),
        lambda np, w, x, c, i: np.linalg.norm(w, np.inf, 1) + np.linalg.norm(w, -np.inf, axis=1),
        lambda np, w, x, c, i: np.linalg.norm(w, "fro", keepdims=True) * np.linalg.norm(w - c, axis=-1, keepdims=True),
    ],
    "log": [lambda np, w, x, c, i: np.log(w) * x, lambda np, w, x, c, i: np.log(x * w) + np.log(x) * w],
    "log10": [lambda np, w, x, c, i: np.log10(w) * x, lambda np, w, x, c, i: np.log10(x * w) + np.log10(x) * w],
    "log1p": [lambda np, w, x, c, i: np.log1p(w) * x, lambda np, w, x, c, i: np.log1p(1e-3 * x * w) + np.log1p(x) * w],
    "log2": [lambda np, w, x, c, i: np.log2(w) * x, lambda np, w, x, c, i: np.log2(x * w) + np.log2(x) * w],
    "logaddexp": [
        lambda np, w, x, c, i: np.logaddexp(w, x),
        lambda np, w, x, c, i: np.logaddexp(30 * x, 30 * w) + np.logaddexp(c, w),
        lambda np, w, x, c, i: np.logaddexp(x[0], w) * np.logaddexp(w[0], 1.0),
    ],
    "logical_and": [
        lambda np, w, x, c, i: np.logical_and(w > 1, x > 1) * w,
        lambda np, w, x, c, i: np.logical_and(w, x) * w,
    ],
    "logical_not": [
        lambda np, w, x, c, i: np.logical_not(w > 1) * w,
        lambda np, w, x, c, i: np.logical_not(w) * w + np.logical_not(x) * w + w,
    ],
    "logical_or": [
        lambda np, w, x, c, i: np.logical_or(w > 1, x > 1) * w,
        lambda np, w, x, c, i: np.logical_or(x, w) * w,
    ],
    "matmul": [
        lambda np, w, x, c, i: np.matmul(x, w.T),
        lambda np, w, x, c, i: w @ x.T + x @ w.T,
        lambda np, w, x, c, i: c @ w.T + w @ c.T,
        lambda np, w, x, c, i: np.matmul(w, x[0]) + x @ w[0] + w[0] @ x.T,
        lambda np, w, x, c, i: (x[:, None] * x) @ w.T + w[0] @ w[1],
    ],
    "max": [
        lambda np, w, x, c, i: np.max(w, axis=1) * x[:, 0],
        lambda np, w, x, c, i: w.max() * x + np.max(x) * w + (w * x).max(0),
        lambda np, w, x, c, i: np.max(w * c, axis=(0, 1), keepdims=True),
    ],
    "maximum": [
        lambda np, w, x, c, i: np.maximum(w, x),
        lambda np, w, x, c, i: np.maximum(x, w) * np.maximum(c, w) * np.maximum(w, 1.0),
        lambda np, w, x, c, i: np.maximum(x[0], w) * np.maximum(w[:, :1], x),
    ],
    "mean": [
        lambda np, w, x, c, i: np.mean(w) * x,
        lambda np, w, x, c, i: np.mean(w * x, axis=1) + x.mean(1) * w[:, 0],
        lambda np, w, x, c, i: w.mean((0, 1), keepdims=True) * w,
    ],
    "min": [
        lambda np, w, x, c, i: np.min(w, axis=1) * x[:, 0],
        lambda np, w, x, c, i: w.min() * x + np.min(x) * w + (w * x).min(0),
    ],
    "minimum": [
        lambda np, w, x, c, i: np.minimum(w, x),
        lambda np, w, x, c, i: np.minimum(x, w) * np.minimum(c, w) * np.minimum(w, 1.0),
        lambda np, w, x, c, i: np.minimum(x[0], w) * np.minimum(w[:, :1], x),
    ],
    "moveaxis": [
        lambda np, w, x, c, i: np.moveaxis(w[None] * x[:, None], 0, -1),
        lambda np, w, x, c, i: np.moveaxis(w, 0, 1) * np.moveaxis(x, 1, 0),
        lambda np, w, x, c, i: np.moveaxis(w[None] * x[:, None], (0, 1), (2, 0)),
    ],
    "multiply": [
        lambda np, w, x, c, i: np.multiply(w, x) + np.multiply(x, w[0]),
        lambda np, w, x, c, i: w * x * c + c * w + 2 * w * np.multiply(c, w),
    ],
    "nansum": [
        lambda np, w, x, c, i: np.nansum(w * x),
        lambda np, w, x, c, i: np.nansum(w, axis=1, keepdims=True) * x,
        lambda np, w, x, c, i: np.nansum(x, 0) * w,
    ],
    "ndim": [lambda np, w, x, c, i: np.ndim(w) * w, lambda np, w, x, c, i: x.ndim * w * w.ndim * np.ndim(x)],
    "negative": [lambda np, w, x, c, i: np.negative(w) * x, lambda np, w, x, c, i: -(x * w) + np.negative(x) * w],
    "not_equal": [lambda np, w, x, c, i: np.not_equal(w, x) * w, lambda np, w, x, c, i: (x != w) * w],
    "ones_like": [lambda np, w, x, c, i: np.ones_like(w) * w, lambda np, w, x, c, i: np.ones_like(x) * w],
    "outer": [
        lambda np, w, x, c, i: np.outer(x[0], w[0]),
        lambda np, w, x, c, i: np.outer(w[0], x[0]) * np.outer(c[0], w[1]),
        lambda np, w, x, c, i: np.outer(w, x),
    ],
    "pad": [
        lambda np, w, x, c, i: np.pad(w, 1, mode="constant"),
        lambda np, w, x, c, i: np.pad(w * x, ((1, 0), (0, 2)), mode="constant", constant_values=3.0),
        lambda np, w, x, c, i: np.pad(w, (1, 2)),
        lambda np, w, x, c, i: np.pad(x, ((0, 0), (1, 1)), "constant")[:, :3] * w,
    ],
    "positive": [lambda np, w, x, c, i: np.positive(w) * x, lambda np, w, x, c, i: +w * +x],
    "power": [
        lambda np, w, x, c, i: np.power(w, x),
        lambda np, w, x, c, i: x**w + w**x[0] + 2.0**w,
        lambda np, w, x, c, i: w**2 + w**3 + w**0.5 + w**-1 + w**1.7,
        lambda np, w, x, c, i: c**w + w**c + np.power(w, 2) + np.power(w[0], x),
    ],
    "prod": [
        lambda np, w, x, c, i: np.prod(w, axis=1) * x[:, 0],
        lambda np, w, x, c, i: (w * x).prod() + np.prod(x, 0) * w,
        lambda np, w, x, c, i: np.prod(w - 1, axis=(0, 1), keepdims=True) + np.prod(w.shape),
    ],
    "ravel": [
        lambda np, w, x, c, i: np.ravel(w) * x.ravel(),
        lambda np, w, x, c, i: w.ravel() * np.ravel(c) + w.flatten() * x.flatten(),
    ],
    "real": [lambda np, w, x, c, i: np.real(w) * x, lambda np, w, x, c, i: np.real(x * w)],
    "reciprocal": [
        lambda np, w, x, c, i: np.reciprocal(w) * x,
        lambda np, w, x, c, i: np.reciprocal(x * w) + np.reciprocal(x) * w,
    ],
    "repeat": [
        lambda np, w, x, c, i: np.repeat(w, 2, axis=1) * np.repeat(x, 2, axis=1),
        lambda np, w, x, c, i: np.repeat(w * x, 3),
        lambda np, w, x, c, i: w.repeat(2, 0) * x[0],
        lambda np, w, x, c, i: np.repeat(w, [2, 0, 1], axis=1) * np.repeat(x, 3, axis=-1)[:, :3],
        lambda np, w, x, c, i: np.repeat(w[:1], 4, axis=0),
        lambda np, w, x, c, i: np.repeat(w, 2, axis=-1),
    ],
    "reshape": [
        lambda np, w, x, c, i: np.reshape(w, (3, 2)) * x.reshape(3, 2),
        lambda np, w, x, c, i: w.reshape(-1) * np.reshape(x, -1),
        lambda np, w, x, c, i: w.reshape(3, -1) + w.reshape((3, 2)) * np.reshape(c, (3, 2)),
    ],
    "result_type": [
        lambda np, w, x, c, i: w.astype(np.result_type(w, x)) * x,
        lambda np, w, x, c, i: x.astype(np.result_type(x, 1.0)) * w,
    ],
    "rint": [lambda np, w, x, c, i: np.rint(w) * w, lambda np, w, x, c, i: np.rint(w * x) + np.rint(x) * w],
    "roll": [
        lambda np, w, x, c, i: np.roll(w, 1) * x,
        lambda np, w, x, c, i: np.roll(w, 2, axis=1) * np.roll(x, 1, axis=0),
        lambda np, w, x, c, i: np.roll(w * x, (1, 2), axis=(0, 1)) * x,
    ],
    "round": [
        lambda np, w, x, c, i: np.round(w, 1) * w,
        lambda np, w, x, c, i: w.round(1) * w + x.round() * w,
        lambda np, w, x, c, i: np.round(x * w) * w + np.round(x, 2) * w,
    ],
    "shape": [
        lambda np, w, x, c, i: np.shape(w)[0] * w,
        lambda np, w, x, c, i: w * x.shape[1] * w.shape[0] * np.shape(x)[1] * len(w) * len(x),
    ],
    "sign": [lambda np, w, x, c, i: np.sign(w - 1) * w, lambda np, w, x, c, i: np.sign(w * x - 1) + np.sign(x - 1) * w],
    "sin": [lambda np, w, x, c, i: np.sin(w) * x, lambda np, w, x, c, i: np.sin(x * w) + np.sin(x) * w],
    "sinh": [lambda np, w, x, c, i: np.sinh(w) * x, lambda np, w, x, c, i: np.sinh(x * w) + np.sinh(x) * w],
    "size": [
        lambda np, w, x, c, i: np.size(w) * w + np.size(w, 1),
        lambda np, w, x, c, i: x.size * w * w.size * np.size(x, axis=0),
    ],
    "sort": [
        lambda np, w, x, c, i: np.sort(w, axis=1) * x,
        lambda np, w, x, c, i: np.sort(w * x, axis=None),
        lambda np, w, x, c, i: np.sort(w, axis=0) * np.sort(x),
        lambda np, w, x, c, i: np.sort(w[0]) * x,
    ],
    "split": [
        lambda np, w, x, c, i: np.split(w, 2)[0] * x,
        lambda np, w, x, c, i: np.split(w * x, 3, axis=1),
        lambda np, w, x, c, i: np.split(x, [1], axis=-1)[1] * w[:, :2],
        lambda np, w, x, c, i: np.split(w, [1, 2], axis=1)[2],
    ],
    "sqrt": [lambda np, w, x, c, i: np.sqrt(w) * x, lambda np, w, x, c, i: np.sqrt(x * w) + np.sqrt(x) * w],
    "square": [lambda np, w, x, c, i: np.square(w) * x, lambda np, w, x, c, i: np.square(x * w) + np.square(x) * w],
    "squeeze": [
        lambda np, w, x, c, i: np.squeeze(w[:1]) * x,
        lambda np, w, x, c, i: w[:, :1].squeeze(1) * np.squeeze(x[:, None, :1], axis=(1, 2)),
    ],
    "stack": [
        lambda np, w, x, c, i: np.stack([w, x]),
        lambda np, w, x, c, i: np.stack((x, w * x), axis=1),
        lambda np, w, x, c, i: np.stack([c, x, w], axis=-1),
        lambda np, w, x, c, i: np.stack([w[0, 0], x[0, 0], w[1, 1]]) * x,
    ],
    "std": [
        lambda np, w, x, c, i: np.std(w) * x,
        lambda np, w, x, c, i: np.std(w * x, axis=1) + x.std(1) * w[:, 0],
        lambda np, w, x, c, i: w.std(0, ddof=1) * np.std(w, axis=(0, 1), keepdims=True),
    ],
    "subtract": [
        lambda np, w, x, c, i: np.subtract(w, x) * np.subtract(x, w[0]),
        lambda np, w, x, c, i: (w - x) * (x - w) * (c - w) * (w - c) - 2 * (1 - w) * (w - 1),
    ],
    "sum": [
        lambda np, w, x, c, i: np.sum(w) * x,
        lambda np, w, x, c, i: np.sum(w * x, axis=1) + x.sum(1) * w[:, 0],
        lambda np, w, x, c, i: w.sum((0, 1), keepdims=True) * w + np.sum(w, 0) * np.sum(x),
        lambda np, w, x, c, i: sum(row * k for k, row in enumerate(w)) * x[0],
    ],
    "swapaxes": [
        lambda np, w, x, c, i: np.swapaxes(w, 0, 1) * x.swapaxes(0, 1),
        lambda np, w, x, c, i: w.swapaxes(0, -1) * np.swapaxes(x, 1, 0),
    ],
    "take": [
        lambda np, w, x, c, i: np.take(w, i, axis=1) * x,
        lambda np, w, x, c, i: np.take(w, np.array([0, 1, 0]), axis=0) * x[0],
        lambda np, w, x, c, i: w.take([2, 0], axis=1) * x.take([1, 1], axis=1),
        lambda np, w, x, c, i: np.take(x, [0, 0, 2], 1) * w,
        lambda np, w, x, c, i: np.take(w, -1, axis=-1) * x[:, 0],
        lambda np, w, x, c, i: w[:, i] * x + x[:, i] * w,
        lambda np, w, x, c, i: w[np.array([0, 1, 1])] * x[[0, 0, 1]],
        lambda np, w, x, c, i: w[np.array([0, 1, 1]), i] * x[np.array([1, 1, 0]), i],
        lambda np, w, x, c, i: w[np.minimum(i, 1), np.array([0, 1, 1])] + w[np.arange(2), np.argmax(x, axis=1)][0],
        lambda np, w, x, c, i: w[1:, ::-1] * x[:, :1] + w[0, None] * w[..., -1:],
    ],
    "take_along_axis": [
        lambda np, w, x, c, i: np.take_along_axis(w, i[None] * np.ones((2, 1), int), 1) * x,
        lambda np, w, x, c, i: np.take_along_axis(w, np.array([[0], [2]]), axis=1) * x,
        lambda np, w, x, c, i: np.take_along_axis(x, np.argsort(w, axis=1), 1) * w,
        lambda np, w, x, c, i: np.take_along_axis(x * w, np.array([[0, 0, 0]]), 0),
    ],
    "tan": [lambda np, w, x, c, i: np.tan(w / 2) * x, lambda np, w, x, c, i: np.tan(x * w / 9) + np.tan(x / 9) * w],
    "tanh": [lambda np, w, x, c, i: np.tanh(w) * x, lambda np, w, x, c, i: np.tanh(x * w) + np.tanh(x) * w],
    "tensordot": [
        lambda np, w, x, c, i: np.tensordot(x, w, (1, 1)),
        lambda np, w, x, c, i: np.tensordot(w, x, 2) + np.tensordot(w, x.T, 1),
        lambda np, w, x, c, i: np.tensordot(c, w, ([0, 1], [0, 1])) * np.tensordot(w, c, axes=([1], [1])),
        lambda np, w, x, c, i: np.tensordot(x[:, None] * x, w, axes=([2, 0], [1, 0])) + np.tensordot(w, w, 0).sum(),
    ],
    "tile": [
        lambda np, w, x, c, i: np.tile(w, 2) * np.tile(x, 2),
        lambda np, w, x, c, i: np.tile(w * x, (2, 1)),
        lambda np, w, x, c, i: np.tile(w, (2, 1, 2)) * np.tile(x, (1, 2)),
        lambda np, w, x, c, i: np.tile(w[0], (2, 2)),
    ],
    "trace": [
        lambda np, w, x, c, i: np.trace(w) * x,
        lambda np, w, x, c, i: np.trace(w * x, 1) + np.trace(x) * w,
        lambda np, w, x, c, i: np.trace(w, offset=-1) + np.trace(w[None] * x[:, None], 0, 1, 2),
    ],
    "transpose": [
        lambda np, w, x, c, i: np.transpose(w) * x.T,
        lambda np, w, x, c, i: w.T * x.transpose(1, 0) + w.transpose() * np.transpose(x, (1, 0)),
        lambda np, w, x, c, i: np.transpose(w[None] * x[:, None], (2, 0, 1)) + w.transpose((1, 0))[..., None, :],
    ],
    "tril": [lambda np, w, x, c, i: np.tril(w) * x, lambda np, w, x, c, i: np.tril(w * x, -1) + np.tril(x, 1) * w],
    "triu": [lambda np, w, x, c, i: np.triu(w) * x, lambda np, w, x, c, i: np.triu(w * x, k=1) + np.triu(x) * w],
    "var": [
        lambda np, w, x, c, i: np.var(w) * x,
        lambda np, w, x, c, i: np.var(w * x, axis=1) + x.var(1) * w[:, 0],
        lambda np, w, x, c, i: w.var(0, ddof=1) * np.var(w, axis=(0, 1), keepdims=True),
    ],
    "vstack": [
        lambda np, w, x, c, i: np.vstack([w, x]),
        lambda np, w, x, c, i: np.vstack((x, c, w * x)),
        lambda np, w, x, c, i: np.vstack([x[0], w[0], w]),
    ],
    "where": [
        lambda np, w, x, c, i: np.where(x > 1, w, x),
        lambda np, w, x, c, i: np.where(w > x, x, w) * np.where(c > 1, c, w),
        lambda np, w, x, c, i: np.where(x > 1, w[0], 0) + np.where(x > 1, 1.0, w[:, :1]),
        lambda np, w, x, c, i: np.where(w > 1, x, 0) * w + np.where(c > 1, w[0, 0], x),
    ],
    "zeros_like": [
        lambda np, w, x, c, i: np.zeros_like(w) + w,
        lambda np, w, x, c, i: np.zeros_like(x) * w + np.zeros_like(c) + w,
    ],
}  # fmt: skip


class Trial(NamedTuple):
    """One case under one module, inside `grad` or `value_and_grad`, and its outcome."""

    name: str
    case: int
    module: str
    wrapper: str
    dtype: str
    second_term: bool
    outcome: str
    message: str


def listed() -> list[str]:
    """Return the names of the functions in docs/devices.md."""
    block = re.search(r"These functions of NumPy lower.*?```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return block[1].split() if block else []


def arrays(dtype) -> tuple[np.ndarray, ...]:
    """Return w, x, c and i. All elements differ, and none is near a kink of a case."""
    w = np.array([[0.62, 1.41, 0.87], [1.73, 0.56, 1.18]])
    x = np.array([[1.07, 0.78, 1.32], [0.49, 1.63, 0.91]])
    c = np.array([[0.83, 1.56, 1.12], [1.29, 0.71, 0.94]])
    return *(a.astype(dtype) for a in (w, x, c)), np.array([2, 0, 1])


def loss_of(module, case: Callable, constant: np.ndarray, second_term: bool) -> Callable:
    """Return a scalar function of w, x and i that depends on every element of the case's result."""

    def loss(w, x, i):
        out = case(module, w, x, constant, i)
        parts = [out[k] for k in range(len(out))] if isinstance(out, list | tuple | SequenceBox) else [out]
        total = 0.0
        for part in parts:
            shape = part.shape
            factor = np.cos(1.0 + np.arange(int(np.prod(shape)))).reshape(shape)
            total = total + module.sum(part * factor.astype(constant.dtype))
        return total + 0.1 * (w * w).sum() if second_term else total

    return loss


def central_differences(loss: Callable, w: np.ndarray, *more) -> np.ndarray:
    """Return the central differences of a loss with respect to every element of w, in float64."""
    out, step = np.zeros_like(w), 1e-6
    for k in np.ndindex(w.shape):
        moved = np.zeros_like(w)
        moved[k] = step
        out[k] = (loss(w + moved, *more) - loss(w - moved, *more)) / (2 * step)
    return out


def trials(name: str) -> Iterator[Trial]:
    """Run all cases of one function."""
    for case, function in enumerate(CASES[name]):
        for second_term in (False, True):
            w, x, c, i = arrays(np.float64)
            loss = loss_of(np, function, c, second_term)
            value, wanted = loss(w, x, i), central_differences(loss, w, x, i)
            for module in MODULES:
                for dtype in (np.float32, np.float64):
                    for wrapper in (grad, value_and_grad):
                        outcome, message = judge(module, function, dtype, wrapper, second_term, value, wanted)
                        yield Trial(
                            name, case, module, wrapper.__name__, np.dtype(dtype).name, second_term, outcome, message
                        )


def judge(module: str, function: Callable, dtype, wrapper, second_term: bool, value, wanted) -> tuple[str, str]:
    """Return the outcome of one trial, and the exception's message."""
    w, x, c, i = arrays(dtype)
    loss = loss_of(MODULES[module], function, c, second_term)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Output seems independent of input"
            found = compile(wrapper(loss), "cpu")(w, x, i)
    except LoweringError as error:
        named = Path(__file__).name in str(error)
        has_advice = module == "autograd.numpy" or "use autograd.numpy" in str(error)
        return ("refused" if named and has_advice else "odd"), str(error)
    except Exception as error:
        return "odd", f"{type(error).__name__}: {error}"
    gradient = found if wrapper is grad else found[1]
    near = [(gradient, wanted)] if wrapper is grad else [(gradient, wanted), (found[0], value)]
    right = all(
        np.shape(a) == np.shape(b) and np.linalg.norm(a - b) <= LIMITS[dtype] * max(1, np.linalg.norm(b))
        for a, b in near
    )
    return ("right", "") if right else ("silently wrong", f"{np.asarray(gradient).tolist()}, not {wanted.tolist()}")


def table(found: list[Trial]) -> str:
    """Count the outcomes by module and wrapper."""
    rows = [(module, wrapper) for module in MODULES for wrapper in ("grad", "value_and_grad")]
    lines = [f"{len({t.name for t in found})} functions, {len(found)} trials", ""]
    lines += [f"| module | inside | {' | '.join(OUTCOMES)} |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        counts = Counter(t.outcome for t in found if (t.module, t.wrapper) == row)
        lines.append(f"| {row[0]} | {row[1]} | {' | '.join(str(counts[o]) for o in OUTCOMES)} |")
    return "\n".join(lines)


def main(word: str = "") -> int:
    """Print the table. Return exit status 1 if a trial is silently wrong or raises an odd exception."""
    found = [trial for name in listed() if word in name for trial in trials(name)]
    seen = set()
    for t in found:
        if t.outcome != "right" and (t.name, t.case, t.module, t.outcome) not in seen:
            seen.add((t.name, t.case, t.module, t.outcome))
            print(f"{t.outcome}: {t.name}, case {t.case}, {t.module}: {t.message[:160]}")
    print(table(found))
    return int(any(t.outcome in ("silently wrong", "odd") for t in found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
