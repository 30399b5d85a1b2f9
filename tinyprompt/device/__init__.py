"""Run a function on a device: in NumPy, or lowered and run by a provider of ONNX Runtime.

    step = compile(train.loss_and_grads, "cpu", frozen="params")
    loss, grads = step(trainable, params, config, batch)    # the result of loss_and_grads

A device is a name in DEVICES. It selects where a function runs, and the precision.
"""

from tinyprompt.device.providers import (
    DEVICES,
    PROVIDERS,
    check_device,
    default_device,
    describe_device,
    open_session,
    threads,
    version,
)
from tinyprompt.device.sessions import compile
from tinyprompt.device.values import derived, on_device

__all__ = [
    "DEVICES",
    "PROVIDERS",
    "check_device",
    "compile",
    "default_device",
    "derived",
    "describe_device",
    "on_device",
    "open_session",
    "threads",
    "version",
]
