"""Survey the devices of this machine: whether each is usable, correct, and how fast it is.

print(Survey.of(load("tiny"), load("base")))    # like `tinyprompt devices`
"""

import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from tinyprompt import train
from tinyprompt.check.ledger import ALONE, COARSE, ROUGH, Case, distance, draw, in_dtype, run
from tinyprompt.check.process import timed
from tinyprompt.data import random_batch
from tinyprompt.device import DEVICES, check_device, compile
from tinyprompt.errors import DeviceError
from tinyprompt.model import PROMPT, Model

EXACTNESS = ("float32", "bf16", "int8")  # in descending order; a device without a suffix computes in float32
AUTO = ("auto", "auto-bf16", "auto-int8")  # the fastest device with at least this exactness
SECONDS = 1.0  # duration of a speed measurement
ROWS, TOKENS, TARGETS = 8, 32, 4  # shape of the batch for the speed measurement


class Line(NamedTuple):
    """The result for one device: its error and speed, or the reason why it cannot be used."""

    device: str
    why: str = ""
    error: float = float("nan")  # relative error of loss and gradient against float64
    limit: float = 0.0
    steps_per_second: float = 0.0

    @property
    def right(self) -> bool:
        return self.error <= self.limit  # False if the error is NaN

    def __str__(self) -> str:
        if self.why:
            return f"{self.device:<15}{self.why.removeprefix(f'device {self.device!r}: ')}"
        verdict = "right" if self.right else f"WRONG: at most {self.limit:.0e}"
        return f"{self.device:<15}{self.error:<11.1e}{self.steps_per_second:<11.3g}{verdict}"


class Survey(NamedTuple):
    """The result of `tinyprompt devices`: a line for each device."""

    lines: list[Line]

    @classmethod
    def of(
        cls,
        exact: Model,
        timed: Model,
        devices: Iterable[str] = tuple(DEVICES),
        report: Callable[[str], None] = lambda device: None,
    ) -> "Survey":
        """Measure the error and the speed of devices.

        Args:
            exact: The model whose loss and gradient are compared with NumPy in float64.
            timed: The model whose training step is timed.
            devices: Names from DEVICES.
            report: Called with each name before the device is measured.
        """
        case = draw(exact)
        (wanted,) = run(exact, in_dtype(exact.params, np.float64), [case], "numpy")
        lines = []
        for device in devices:
            report(device)
            try:
                check_device(device)
                (found,) = run(exact, in_dtype(exact.params, np.float32), [case], device)
                error = float(np.max([distance(found[part], wanted[part]) for part in ("loss", "gradient")]))
                limit = (ALONE, ROUGH, COARSE)[exactness(device)]
                lines.append(Line(device, "", error, limit, speed(timed, device)))
            except DeviceError as problem:
                lines.append(Line(device, str(problem)))
        return cls(lines)

    def fastest(self, auto: str) -> Line:
        """Return the fastest correct device with the exactness of a name of AUTO. NumPy always qualifies."""
        limit = exactness(auto)
        return max(
            (line for line in self.lines if line.right and exactness(line.device) <= limit),
            key=lambda line: line.steps_per_second,
        )

    def as_dict(self) -> dict[str, Any]:
        # JSON does not support NaN.
        finite = lambda x: x.error if np.isfinite(x.error) else None
        return {"devices": [line._asdict() | {"error": finite(line), "right": line.right} for line in self.lines]}

    def __str__(self) -> str:
        return "\n".join([f"{'device':<15}{'error':<11}{'steps/s':<11}", *map(str, self.lines)])


def exactness(device: str) -> int:
    """Return the rank of a device, or of a name of AUTO, in EXACTNESS."""
    suffix = device.partition("-")[2]
    return EXACTNESS.index(suffix) if suffix else 0


def speed(model: Model, device: str) -> float:
    """Measure training steps per second: loss and prompt gradient of a small batch, after one warm-up step."""
    case = Case(draw(model).prompt, random_batch(model.config.vocab_size, ROWS, TOKENS, TARGETS))
    step = compile(train.loss_and_grads, device, frozen="params")
    call = lambda: step({PROMPT: case.prompt}, model.params, model.config, case.batch)
    return 1 / statistics.median(timed(call, SECONDS))
