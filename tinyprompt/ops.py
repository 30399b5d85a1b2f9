"""The primitives of the model, each with its own vector-Jacobian product (VJP).

autograd differentiates `+`, `*`, `@`, `reshape`, `transpose` and `concatenate`. This file defines the operations for
which a hand-written VJP is shorter, faster or more accurate: autograd's rules for `mean`, `max`, `where` and `tanh`
turn float32 into float64.

Every primitive preserves the dtype of its input, forward and backward. Frozen weights may be stored in 16 bits (float16
or bfloat16). They are widened where they are used.

Each primitive is a formula, followed by `defvjp` with one rule for each differentiable argument. In a rule, `ans` is
the output and `g` is the gradient with respect to it.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import autograd.extend
import numpy as np
from autograd.extend import defvjp, defvjp_argnums
from ml_dtypes import bfloat16

from tinyprompt.tree import Array


def primitive(function: Callable[..., Any], kind: Callable[..., Any] = autograd.extend.primitive) -> Callable[..., Any]:
    """Declare an autograd primitive. An array with `__array_primitive__` may override `function` (see lowering)."""

    @functools.wraps(function)
    @kind
    def op(*args: Any, **kwargs: Any) -> Array:
        for x in args:
            if hasattr(x, "__array_primitive__"):
                return x.__array_primitive__(op, function, args, kwargs)
        return function(*args, **kwargs)

    return op


def widen(weight: Array, dtype: Any = np.float32) -> Array:
    """Convert a weight from 16 bits to `dtype`. Other weights are returned unchanged."""
    return weight.astype(dtype) if weight.dtype in (np.float16, bfloat16) else weight


@primitive
def linear(x: Array, weight: Array) -> Array:
    """Compute `x @ weight.T` over the last axis. Shapes: x (..., I), weight (O, I), result (..., O)."""
    return (x.reshape(-1, x.shape[-1]) @ widen(weight, x.dtype).T).reshape(*x.shape[:-1], weight.shape[0])


defvjp(
    linear,
    lambda ans, x, weight: lambda g: linear(g, weight.T),
    lambda ans, x, weight: lambda g: g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1]),
)


@primitive
def headwise(x: Array, weight: Array) -> Array:
    """Compute `x @ weight` for each head. Shapes: x (H, N, I), weight (H, I, O), result (H, N, O)."""
    return x @ widen(weight, x.dtype)


defvjp(
    headwise,
    lambda ans, x, weight: lambda g: headwise(g, np.transpose(weight, (0, 2, 1))),
    lambda ans, x, weight: lambda g: np.transpose(x, (0, 2, 1)) @ g,
)


@primitive
def embedding(table: Array, ids: Array) -> Array:
    """Look up rows of a table. Shapes: table (V, D), ids integer (...), result (..., D)."""
    return widen(table[ids])


@primitive
def add_rows(g: Array, ids: Array, count: int) -> Array:
    """Add g to zeros at the rows `ids`, which may repeat. Shapes: g (..., D), ids (...), result (count, D)."""
    out = np.zeros((count, g.shape[-1]), g.dtype)
    np.add.at(out, ids, g)
    return out


defvjp(embedding, lambda ans, table, ids: lambda g: add_rows(g, ids, len(table)), argnums=(0,))


@primitive
def broadcast_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Compute `numpy.broadcast_to`. The gradient sums over the repeated axes."""
    return np.broadcast_to(x, shape)


def _broadcast_vjp(ans: Array, x: Array, shape: tuple[int, ...]) -> Callable[..., Any]:
    new = len(shape) - x.ndim
    repeated = tuple(new + i for i, n in enumerate(x.shape) if n == 1)
    return lambda g: g.sum(axis=(*range(new), *repeated)).reshape(x.shape)


defvjp(broadcast_to, _broadcast_vjp, argnums=(0,))


@primitive
def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Compute `x / rms(x) * weight` over the last axis, without mean and bias (Zhang and Sennrich 2019)."""
    return x * _inverse_rms(x, eps) * widen(weight, x.dtype)


def _inverse_rms(x: Array, eps: float) -> Array:
    mean_square = np.einsum("...i,...i->...", x, x)[..., None] / x.shape[-1]
    return (1 / np.sqrt(mean_square + eps)).astype(x.dtype, copy=False)


def _rms_norm_vjp(ans: Array, x: Array, weight: Array, eps: float) -> Callable[..., Any]:
    r = _inverse_rms(x, eps)

    def vjp(g: Array) -> Array:
        g = g * widen(weight, x.dtype)
        along = np.einsum("...i,...i->...", g, x)[..., None] / x.shape[-1]
        return r * (g - x * (r * r * along))

    return vjp


def _rms_norm_weight_vjp(ans: Array, x: Array, weight: Array, eps: float) -> Callable[..., Any]:
    rows = x.size // x.shape[-1]  # a matrix product sums more accurately than sum(0)
    return lambda g: np.ones(rows, x.dtype) @ (g * x * _inverse_rms(x, eps)).reshape(rows, -1)


defvjp(rms_norm, _rms_norm_vjp, _rms_norm_weight_vjp, argnums=(0, 1))


@primitive
def softmax(x: Array) -> Array:
    """Compute the softmax over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    e /= e.sum(-1, keepdims=True)
    return e


defvjp(softmax, lambda y, x: lambda g: y * (g - np.einsum("...i,...i->...", g, y)[..., None]))


@primitive
def relu(x: Array) -> Array:
    """Compute `max(x, 0)`."""
    return np.maximum(x, 0)


defvjp(relu, lambda ans, x: lambda g: g * (x > 0))


@primitive
def logistic(x: Array) -> Array:
    """Compute `1 / (1 + exp(-x))` without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)


defvjp(logistic, lambda y, x: lambda g: g * (y * (1 - y)))

_C = 2 * 0.7978845608028654  # 2 sqrt(2 / pi)
_K = _C * 0.044715


@primitive
def gelu(x: Array) -> Array:
    """Compute the Gaussian error linear unit in its tanh form (Hendrycks and Gimpel 2016), as T5 1.1 does.

    With the logistic function s, (1 + tanh(u)) / 2 = s(2 u), so the formula is `x * s(x * (C + K * x**2))`.
    """
    return x * logistic(x * (_C + _K * (x * x)))


def _gelu_and_slope(x: Array) -> tuple[Array, Array]:
    square = x * x
    s = logistic(x * (_C + _K * square))
    y = x * s
    return y, s + y * (1 - s) * (_C + 3 * _K * square)


defvjp(gelu, lambda y, x: lambda g: g * _gelu_and_slope(x)[1])


@primitive
def geglu(x: Array, y: Array) -> Array:
    """Compute `gelu(x) * y`, the gated unit of T5 1.1 (Shazeer 2020, arXiv:2002.05202).

    The gradient recomputes gelu(x). This is cheap, and the largest arrays of a layer need not be stored.
    """
    return gelu(x) * y


def _geglu_vjp(argnums: Sequence[int], ans: Array, args: Sequence[Array], kwargs: dict[str, Any]) -> Callable[..., Any]:
    def vjp(g: Array) -> Array:
        value, slope = _gelu_and_slope(args[0])  # shared by both gradients
        return tuple((g * args[1] * slope, g * value)[i] for i in argnums)

    return vjp


defvjp_argnums(geglu, _geglu_vjp)


@primitive
def log_softmax(x: Array) -> Array:
    """Compute the logarithm of the softmax over the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


defvjp(log_softmax, lambda y, x: lambda g: g - np.exp(y) * g.sum(-1, keepdims=True))


@primitive
def cross_entropy(logits: Array, targets: Array, weights: Array, z_loss: float) -> Array:
    """Compute the weighted mean of `-log p(target) + z_loss * log(Z)**2` over all positions.

    Shapes: logits (..., V), targets integer (...), weights (...), result (). Z is the softmax denominator. The z-loss
    keeps it near 1 (Mesh TensorFlow; T5X uses 1e-4). A weight of 0 excludes a position. The sum is divided by the sum
    of the weights.
    """
    log_z, nll = _nll(logits, targets)
    return ((nll + z_loss * log_z * log_z) * weights).sum() / weights.sum()


def _nll(logits: Array, targets: Array) -> tuple[Array, Array]:
    top = logits.max(-1)
    log_z = np.log(np.exp(logits - top[..., None]).sum(-1)) + top
    return log_z, log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


def _cross_entropy_vjp(ans: Array, logits: Array, targets: Array, weights: Array, z_loss: float) -> Callable[..., Any]:
    def vjp(g: Array) -> Array:
        log_z, _ = _nll(logits, targets)
        scale = (g * weights / weights.sum()).astype(logits.dtype, copy=False)
        p = np.exp(logits - log_z[..., None])
        at_target = targets[..., None] == np.arange(logits.shape[-1])
        return p * (scale * (1 + 2 * z_loss * log_z))[..., None] - at_target * scale[..., None]

    return vjp


defvjp(cross_entropy, _cross_entropy_vjp, argnums=(0,))


@functools.partial(primitive, kind=autograd.extend.notrace_primitive)
def keep(x: Array, rate: float, key: Array, name: str) -> Array:
    """Draw a mask of the shape and dtype of x: 0 with probability `rate`, else 1. It is not differentiated.

    Args:
        key: Non-negative integers (n,). Key and name seed the mask.
    """
    return mask(key, x.shape, rate, name).astype(x.dtype)


def mask(key: Array, shape: tuple[int, ...], rate: float, name: str) -> Array:
    """Draw booleans that are True with probability 1 - rate."""
    seed = [*map(int, key), zlib.crc32(name.encode())]
    return np.random.default_rng(seed).random(shape, np.float32) >= rate


# ---- for decoding, without a gradient ----


@functools.partial(primitive, kind=autograd.extend.notrace_primitive)
def put(x: Array, position: Array, values: Array) -> Array:
    """Write values into x, at a position of its axis 2, and return x.

    Shapes: x (B, H, L, K), position integer (1,), values (B, H, 1, K).
    """
    x[:, :, position] = values
    return x


@functools.partial(primitive, kind=autograd.extend.notrace_primitive)
def largest(x: Array, count: int) -> tuple[Array, Array]:
    """Return the largest values of each row in descending order, and their indices: (B, N) -> (B, min(count, N))."""
    at = np.argpartition(-x, min(count, x.shape[1]) - 1, axis=1)[:, :count]
    values = np.take_along_axis(x, at, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(values, order, 1), np.take_along_axis(at, order, 1)
