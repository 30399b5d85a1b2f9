"""Measure how fast one library multiplies matrices on this machine. The best rate is the yardstick of a step.

It runs in its own process, because the threads of two libraries compete. No other module imports this one.
"""

import json
import sys
from collections.abc import Callable
from functools import partial

import numpy as np

from tinyprompt import ops
from tinyprompt.check.process import timed
from tinyprompt.device import DEVICES, compile, describe_device
from tinyprompt.tree import freeze

TRIES, SECONDS = 5, 0.5  # minimal number of products, and minimal duration
SMALLEST, SLOW = 240, 0.05  # side of the first matrices, and seconds of a product after which they do not grow


def rate(product_of: Callable[[int], Callable[[], object]], size: int) -> float:
    """Return the best rate of several products, in GFLOP/s.

    A library without fast products in a precision needs minutes for matrices of the full size: torch in bfloat16 on a
    processor with AVX2 only. Its rate is measured with smaller matrices.

    Args:
        product_of: A function that returns the product of two square matrices of a given side.
        size: The side of the matrices.
    """
    side = min(size, SMALLEST)
    while side < size and min(timed(product_of(side), 0, 3)) < SLOW:
        side = min(size, 2 * side)
    return 2 * side**3 / min(timed(product_of(side), SECONDS, TRIES)) / 1e9


def torch_rates(size: int, where: str) -> dict[str, float]:
    """Return torch's rates in GFLOP/s by precision."""
    import torch

    def product(dtype, side):
        a, b = (torch.randn(side, side, device=where, dtype=dtype) for _ in range(2))

        def run():
            torch.mm(a, b)
            if where == "cuda":
                torch.cuda.synchronize()

        return run

    with torch.inference_mode():
        return {name: rate(partial(product, getattr(torch, name)), size) for name in ("float32", "bfloat16")}


def device_rates(device: str, size: int) -> dict[str, float]:
    """Return the rate of a device in GFLOP/s by precision, or an empty dict if the processor lacks that precision."""
    if "computes in float32" in describe_device(device):
        return {}
    linear = compile(lambda x, weights: ops.linear(x, weights["encoder.w"]), device, frozen="weights")

    def product(side):
        x, w = np.random.default_rng(0).standard_normal((2, side, side), np.float32)
        return partial(linear, x, {"encoder.w": freeze(w)})

    precision = {"int8": "int8", "bf16": "bfloat16"}.get(device.partition("-")[2], "float32")
    return {precision: rate(product, size)}


if __name__ == "__main__":
    name, size, where = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    print(json.dumps(device_rates(name, size) if name in DEVICES else torch_rates(size, where)))
