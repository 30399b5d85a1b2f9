"""Optimisers over the flat dict of trained arrays: pure `init` and `update` functions.

state = optimizer.init(trainable)
trainable, state = optimizer.update(trainable, grads, state, learning_rate)
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tinyprompt.tree import Array, Flat

Moments = dict[str, np.ndarray]
State = dict[str, Moments]


class Optimizer(NamedTuple):
    """A pair of pure functions: `init(trainable)`, and `update(trainable, grads, state, learning_rate)`."""

    init: Callable[[Flat], State]
    update: Callable[[Flat, Flat, State, float], tuple[Flat, State]]


def _per_parameter(
    init_one: Callable[[Array], Moments], update_one: Callable[[Array, Array, Moments, float], tuple[Array, Moments]]
) -> Optimizer:
    def init(trainable: Flat) -> State:
        return {name: {"step": np.zeros((), np.int64), **init_one(p)} for name, p in trainable.items()}

    def update(trainable: Flat, grads: Flat, state: State, learning_rate: float) -> tuple[Flat, State]:
        new, new_state = {}, {}
        for name, p in trainable.items():
            s = state[name] | {"step": state[name]["step"] + 1}
            p_new, s = update_one(p, grads[name].astype(p.dtype, copy=False), s, learning_rate)
            new[name], new_state[name] = p_new.astype(p.dtype, copy=False), s
        return new, new_state

    return Optimizer(init, update)


def adam(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Optimizer:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1)."""

    def init(p: Array) -> Moments:
        return {"m": np.zeros_like(p), "v": np.zeros_like(p)}

    def update(p: Array, g: Array, s: Moments, rate: float) -> tuple[Array, Moments]:
        t = int(s["step"])
        m = beta1 * s["m"] + (1 - beta1) * g
        v = beta2 * s["v"] + (1 - beta2) * g * g
        step = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        return p - rate * step, s | {"m": m, "v": v}

    return _per_parameter(init, update)


def adafactor(
    mode: str = "t5x",
    weight_decay: float = 1e-5,
    decay_rate: float = 0.8,
    clipping_threshold: float = 1.0,
    epsilon: float = 1e-30,
    first_step: int = 0,
    scale_parameters: bool = False,
) -> Optimizer:
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) without momentum.

    There are two modes, because the two common implementations differ:

    - "t5x": second moments are factored only if the second largest dimension is at least 128, so prompts of up to 127
      vectors keep full moments. Weight decay is `(1 - weight_decay) * p`, without the learning rate.
    - "huggingface": every matrix is factored. Weight decay is multiplied by the learning rate.

    The seven parameters are the constants of the implementations.

    Args:
        first_step: Number of steps before this run. The paper continued from step 1,100,000 of the checkpoint, where
            the second moment hardly decays and every update is clipped.
        scale_parameters: Multiply the learning rate by the root mean square of each array, at least 1e-3 (section 8).

    Raises:
        ValueError: The mode is unknown.
    """
    if mode not in ("t5x", "huggingface"):
        raise ValueError(f"adafactor mode {mode!r}: expected 't5x' or 'huggingface'")

    def factored(p: Array) -> bool:
        return p.ndim >= 2 and (mode == "huggingface" or sorted(p.shape)[-2] >= 128)

    def init(p: Array) -> Moments:
        if factored(p):
            return {"row": np.zeros(p.shape[:-1], p.dtype), "column": np.zeros(p.shape[:-2] + p.shape[-1:], p.dtype)}
        return {"v": np.zeros_like(p)}

    def update(p: Array, g: Array, s: Moments, rate: float) -> tuple[Array, Moments]:
        beta2 = 1 - float(int(s["step"]) + first_step) ** -decay_rate
        square = g * g + epsilon
        if factored(p):
            row = beta2 * s["row"] + (1 - beta2) * square.mean(-1)
            column = beta2 * s["column"] + (1 - beta2) * square.mean(-2)
            s = s | {"row": row, "column": column}
            u = g / np.sqrt(row / row.mean(-1, keepdims=True))[..., None] / np.sqrt(column)[..., None, :]
        else:
            v = beta2 * s["v"] + (1 - beta2) * square
            s = s | {"v": v}
            u = g / np.sqrt(v)
        u = u / max(1.0, float(np.sqrt(np.mean(u * u))) / clipping_threshold)
        if scale_parameters:
            rate = rate * max(1e-3, float(np.sqrt(np.mean(p * p))))
        shrink = weight_decay * rate if mode == "huggingface" else weight_decay
        return (1 - shrink) * p - rate * u, s

    return _per_parameter(init, update)


OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {
    "adafactor-t5x": lambda: adafactor("t5x"),
    "adafactor-huggingface": lambda: adafactor("huggingface"),
    "adafactor-scaled": lambda: adafactor("t5x", weight_decay=0.0, scale_parameters=True),  # model tuning in T5X
    "adam": adam,
}


SCHEDULES = ("constant", "linear")


def schedule(kind: str, rate: float, steps: int, warmup: int = 0) -> Callable[[int], float]:
    """Return a function from the step, counted from 0, to the learning rate.

    "constant" is the paper's schedule. "linear" falls to 0 at `steps`. Both rise over the first `warmup` steps.

    Raises:
        ValueError: The kind is unknown.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule {kind!r}: expected one of {', '.join(SCHEDULES)}")

    def at(step: int) -> float:
        share = min(1.0, (step + 1) / max(1, warmup))
        if kind == "linear":
            share = min(share, max(0.0, (steps - step) / max(1, steps - warmup)))
        return rate * share

    return at
