"""Run a function on a device: by NumPy as it stands, or lowered and run by ONNX Runtime on a CPU or CUDA GPU.

    step = compile(train.loss_and_gradient, "cpu")
    value, gradient = step(delta, params, config, batch)    # as loss_and_gradient itself

The first call with new shapes lowers the function and opens a session; later calls with the same shapes
only run it. Read-only arrays are frozen weights: on "cpu" they are read where they lie (also in a mapped
file), on "cuda" they are copied once, and all sessions share them.
"""

import functools
import importlib.metadata
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyprompt.lower import Traced, lower
from tinyprompt.tree import leaves, refill

DEVICES = ("numpy", "cpu", "cuda")
SESSIONS = 32  # open at once for one function; the least recently used is closed first


class DeviceError(RuntimeError):
    """A device that cannot be used here; the message says what is missing and how to mend it."""


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def default() -> str:
    """The device to use unless one is named: "cpu" where ONNX Runtime is installed, else "numpy"."""
    return "cpu" if version("onnx") and (version("onnxruntime") or version("onnxruntime-gpu")) else "numpy"


def check(device: str) -> None:
    """Raise DeviceError unless functions can run on the device."""
    if device not in DEVICES:
        raise DeviceError(f"device {device!r}: expected one of {', '.join(DEVICES)}")
    if device == "numpy":
        return
    wanted, extra = ("onnxruntime-gpu", "gpu") if device == "cuda" else ("onnxruntime", "ort")
    if version("onnxruntime") and version("onnxruntime-gpu"):
        raise DeviceError(
            f"device {device!r}: onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            f"uninstall both (pip uninstall onnxruntime onnxruntime-gpu), then install {wanted} alone"
        )
    for package in ("onnx", wanted):
        if not version(package) and not (package == "onnxruntime" and version("onnxruntime-gpu")):
            raise DeviceError(f"device {device!r}: {package} is not installed; pip install 'tinyprompt[{extra}]'")
    if device == "cuda":
        _probe_cuda()


def describe(device: str) -> str:
    """One line: where things run, and with what. Raises DeviceError."""
    check(device)
    if device == "numpy":
        hint = "" if default() == "cpu" else "; faster with ONNX Runtime: pip install 'tinyprompt[ort]'"
        return f"device: numpy {np.__version__}{hint}"
    package = "onnxruntime" if version("onnxruntime") else "onnxruntime-gpu"
    return f"device: {device} ({package} {version(package)})"


@functools.cache
def _probe_cuda() -> None:
    """Open a session of one node on the GPU: ONNX Runtime's own list of providers promises what it cannot do."""
    import onnxruntime as ort

    ort.preload_dlls()
    open_session(lower(lambda x: x + 1, np.zeros(1, np.float32))[0], "cuda")


@functools.cache
def _share_threads_and_memory() -> None:
    """One thread pool and one arena for all sessions of the process: each would bring its own."""
    import onnxruntime as ort

    ort.set_global_thread_pool_sizes(0, 1)
    cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(cpu, None)


def open_session(graph, device: str):
    """An onnxruntime.InferenceSession of a lowered graph. Raises DeviceError."""
    import onnxruntime as ort

    _share_threads_and_memory()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # The graph is lean already. Prepacking and constant folding would copy the weights, the memory pattern doubles
    # what a gradient step holds.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_pattern = False
    options.use_per_session_threads = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.use_env_allocators", "1")
    provider: Any = "CPUExecutionProvider"
    if device == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        provider = ("CUDAExecutionProvider", {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"})
    try:
        session = ort.InferenceSession(graph.to_onnx().SerializeToString(), options, [provider], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's own exceptions have no common base below this one
        raise DeviceError(f"device {device!r}: ONNX Runtime cannot open a session: {error}") from None
    if session.get_providers()[0] != (provider if isinstance(provider, str) else provider[0]):
        raise DeviceError(f"device {device!r}: ONNX Runtime would fall back to {session.get_providers()[0]}")
    return session


_copies: dict[int, Any] = {}  # id of a read-only array: its copy on the GPU


def on_device(array: np.ndarray | np.generic, device: str) -> Any:
    """An array as an OrtValue: a view on the CPU; on the GPU a copy, made once for a read-only array."""
    import onnxruntime as ort

    frozen = device == "cuda" and isinstance(array, np.ndarray) and not array.flags.writeable
    if frozen and id(array) in _copies:
        return _copies[id(array)]
    value = ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"), device, 0)
    if frozen:
        _copies[id(array)] = value
        weakref.finalize(array, _copies.pop, id(array))
    return value


def _key(value: Any) -> Any:
    """What a graph depends on: the containers, shapes and dtypes of arrays, and everything else itself."""
    if isinstance(value, np.ndarray | np.generic):
        return value.shape, value.dtype
    if isinstance(value, dict):
        return dict, tuple((k, _key(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_key, value))
    return type(value), value


@functools.lru_cache(64)
def compile(function: Callable, device: str) -> Callable:
    """`function` on a device: same positional arguments, same results.

    What is not an array in the arguments must be hashable; it becomes part of the graph, and so does whatever the
    function reads from elsewhere. Raises DeviceError, also for what ONNX Runtime cannot run.
    """
    check(device)
    if device == "numpy":
        return function
    sessions: OrderedDict[Any, Any] = OrderedDict()

    @functools.wraps(function)
    def run(*arguments):
        key = _key(arguments)
        if key not in sessions:
            graph, result = lower(function, *arguments)
            sessions[key] = open_session(graph, device), [x.name for x in graph.inputs], result
            if len(sessions) > SESSIONS:
                sessions.popitem(last=False)
        sessions.move_to_end(key)
        session, names, result = sessions[key]
        arrays = (x for _, x in leaves(arguments) if isinstance(x, np.ndarray | np.generic))
        inputs = {name: on_device(x, device) for name, x in zip(names, arrays, strict=True)}
        try:
            outputs = iter([x.numpy() for x in session.run_with_ort_values(None, inputs)])
        except Exception as error:
            raise DeviceError(f"device {device!r}: ONNX Runtime: {error}") from None
        return refill(result, (next(outputs) if isinstance(x, Traced) else x for _, x in leaves(result)))

    return run
