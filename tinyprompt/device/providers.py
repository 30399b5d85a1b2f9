"""The devices, and how ONNX Runtime opens a session on each.

PROVIDERS lists all properties of each provider of ONNX Runtime. The name of a device combines a provider and a
precision.
"""

import functools
import importlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyprompt.errors import DeviceError

if TYPE_CHECKING:
    from tinyprompt.lowering.graph import Graph


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def threads() -> int:
    """Return the number of threads of a session: OMP_NUM_THREADS as for BLAS libraries, or 0, ONNX Runtime's default.

    ONNX Runtime reads neither that variable nor the CPU affinity of the process. joblib, Dask and Ray set the variable
    in their workers, so that the workers share the cores.
    """
    found = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(found) if found.isdecimal() else 0


# ---- the providers ----


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime, and the options of its sessions."""

    name: str  # the name in ONNX Runtime
    packages: tuple[str, ...]  # required packages besides onnx; the last contains the provider
    extra: str  # the extra of this package that installs them
    options: Callable[[str, bool], dict[str, str]] = lambda precision, capture: {}
    entries: Mapping[str, str] = field(default_factory=dict)  # entries of the session configuration
    memory: str = "cpu"  # device memory of its arrays
    prepare: Callable[[], None] | None = None  # called before the first session, which is tested with a small product
    plugin: bool = False  # registered at run time, and passed to a session as a device
    constants: bool = True  # False: large constants become inputs, because constants give wrong results
    wide: bool = True  # False: 64-bit numbers are computed in 32 bits, so they are refused
    in_place: bool = True  # whether an output may reuse the memory of an input
    update: str = ""  # advice if results are wrong


def _cuda_options(precision: str, capture: bool) -> dict[str, str]:
    return {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested", "enable_cuda_graph": str(int(capture))}


def _find_cuda() -> None:
    import onnxruntime as ort

    ort.preload_dlls()


def _openvino_options(precision: str, capture: bool) -> dict[str, str]:
    """Return the precision option. By default, OpenVINO computes in bfloat16 on processors that support it."""
    config = {"INFERENCE_PRECISION_HINT": precision} | ({"INFERENCE_NUM_THREADS": str(threads())} if threads() else {})
    return {"load_config": json.dumps({"CPU": config})}


@functools.cache
def _register(name: str, path: str) -> None:
    """Register the library of a plug-in once. ONNX Runtime refuses a second registration."""
    import onnxruntime as ort

    ort.register_execution_provider_library(name, path)


def _register_openvino() -> None:
    import onnxruntime as ort

    name = PROVIDERS["openvino"].name
    if all(x.ep_name != name for x in ort.get_ep_devices()):
        _register(name, importlib.import_module("onnxruntime_ep_openvino").get_library_path())
    if not processors(name):
        raise DeviceError("device 'openvino': its plug-in finds no processor here; some versions support only Intel")


PROVIDERS = {
    "cpu": Provider("CPUExecutionProvider", ("onnxruntime",), "ort"),
    "cuda": Provider(
        "CUDAExecutionProvider",
        ("onnxruntime-gpu",),
        "gpu",
        _cuda_options,
        {"session.disable_cpu_ep_fallback": "1"},
        memory="cuda",
        prepare=_find_cuda,
        update="update the driver",
    ),
    "openvino": Provider(
        "OpenVINOExecutionProvider",
        ("onnxruntime", "onnxruntime-ep-openvino"),
        "openvino",
        _openvino_options,
        prepare=_register_openvino,
        plugin=True,
        constants=False,
        wide=False,
        in_place=False,  # not tested
        update="update onnxruntime-ep-openvino",
    ),
}


class Device:
    """A device name of --device: the provider and the precision."""

    def __init__(self, place: str, precision: str = "f32", **lowering: Any) -> None:
        self.place = place  # "numpy" or the name of a provider
        self.precision = precision  # precision of the provider itself
        self.lowering = lowering  # options for `lower`


# int8 covers the encoder, which does almost all of the work. The gradient from an output head has outliers that 8 bits
# cannot resolve. A function that only generates has no gradient, so all its weights are quantised (see `compile`).
DEVICES = {
    "numpy": Device("numpy"),
    "cpu": Device("cpu"),
    "cpu-int8": Device("cpu", int8="encoder."),
    "cuda": Device("cuda"),
    "cuda-bf16": Device("cuda", bf16=True),
    "openvino": Device("openvino"),
    "openvino-bf16": Device("openvino", precision="bf16"),
}


# ---- availability ----


def default_device() -> str:
    """Return the default device: "cpu" if ONNX Runtime is installed, else "numpy"."""
    return "cpu" if version("onnx") and (version("onnxruntime") or version("onnxruntime-gpu")) else "numpy"


def check_device(device: str) -> str:
    """Return the place of a device: "numpy" or a provider. Raises DeviceError if it is not available."""
    if device not in DEVICES:
        raise DeviceError(f"device {device!r}: expected one of {', '.join(DEVICES)}")
    place = DEVICES[device].place
    if place == "numpy":
        return place
    provider = PROVIDERS[place]
    if version("onnxruntime") and version("onnxruntime-gpu"):
        raise DeviceError(
            f"device {device!r}: onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            f"uninstall both (pip uninstall onnxruntime onnxruntime-gpu), then install only {provider.packages[0]}"
        )
    for package in ("onnx", *provider.packages):
        if not version(package) and not (package == "onnxruntime" and version("onnxruntime-gpu")):
            extra = f"pip install 'tinyprompt-t5[{provider.extra}]'"
            raise DeviceError(f"device {device!r}: {package} is not installed; {extra}")
    if provider.prepare:
        _try(place)
    return place


def describe_device(device: str) -> str:
    """Describe a device in one line: the computing library and its version. Raises DeviceError."""
    place = check_device(device)
    if place == "numpy":
        hint = "" if default_device() == "cpu" else "; faster with ONNX Runtime: pip install 'tinyprompt-t5[ort]'"
        return f"device: numpy {np.__version__}{hint}"
    package = next(package for package in (*PROVIDERS[place].packages[::-1], "onnxruntime-gpu") if version(package))
    hint = ""
    if DEVICES[device].precision == "bf16":
        found = [x.ep_metadata.get("OPTIMIZATION_CAPABILITIES", "") for x in processors(PROVIDERS[place].name)]
        wide = not any("BF16" in x for x in found)
        hint = "; this processor has no bfloat16, so it computes in float32" if wide else ""
    return f"device: {device} ({package} {version(package)}){hint}"


def processors(name: str) -> list[Any]:
    """List the processors of a registered plug-in."""
    import onnxruntime as ort

    return [x for x in ort.get_ep_devices() if x.ep_name == name and x.device.type == ort.OrtHardwareDeviceType.CPU]


@functools.cache
def _try(place: str) -> None:
    """Test a provider with a product and a maximum, because ONNX Runtime lists providers that cannot compute.

    A CUDA session opens even without cuDNN, which only reductions need, and without cuBLAS kernels for this GPU.
    """
    from tinyprompt import lowering
    from tinyprompt.device.values import to_value

    provider = PROVIDERS[place]
    if provider.prepare:
        provider.prepare()
    x = np.arange(4, dtype=np.float32).reshape(2, 2)
    graph, _ = lowering.lower(lambda x: (x @ x).max(-1), x)
    session, name = open_session(graph, place), graph.inputs[0].name
    try:
        (found,) = (value.numpy() for value in session.run_with_ort_values(None, {name: to_value(x, provider.memory)}))
    except Exception as error:
        raise DeviceError(f"device {place!r}: ONNX Runtime cannot compute on it: {error}") from None
    if found.tolist() != [3.0, 11.0]:
        raise DeviceError(f"device {place!r}: a 2 x 2 product returned {found.tolist()}; {provider.update}")


# ---- sessions ----


@functools.cache
def _share_memory() -> None:
    """Let all sessions share a memory arena."""
    import onnxruntime as ort

    cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(cpu, None)


def open_session(graph: "Graph", device: str, capture: bool = False, weights: Mapping[str, Any] | None = None) -> Any:
    """Open an onnxruntime.InferenceSession for a lowered graph.

    Args:
        graph: The graph.
        device: A device of DEVICES.
        capture: Record the kernels of a run as a CUDA graph on the GPU, and launch the CUDA graph in later runs (see
            `Captured`).
        weights: Arrays derived from frozen inputs, which the session copies into the layout of its products (see
            `Packed`).

    Raises:
        DeviceError: ONNX Runtime cannot open the session.
    """
    import onnxruntime as ort

    _share_memory()
    provider = PROVIDERS[DEVICES[device].place]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads()
    # The graph is already optimised. Prepacking and constant folding would copy the weights, and the memory pattern
    # would double the memory of a gradient step.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_pattern = False
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # in the written order, so recomputation happens late
    options.add_session_config_entry("session.disable_prepacking", "0" if weights else "1")
    if weights:
        options.add_external_initializers([*weights], [*weights.values()])
    # Threads may spin during a run, but not after it, when NumPy or another session needs the cores. (A global thread
    # pool would prevent other code in the process from opening a session without it.)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.use_env_allocators", "1")
    for entry in provider.entries.items():
        options.add_session_config_entry(*entry)
    settings = provider.options(DEVICES[device].precision, capture)
    try:
        if provider.plugin:
            options.add_provider_for_devices(processors(provider.name)[:1], settings)
        model = graph.to_onnx(within=bool(weights), constants=provider.constants).SerializeToString()
        providers = None if provider.plugin else [(provider.name, settings)]
        session = ort.InferenceSession(model, options, providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class below Exception
        raise DeviceError(f"device {device!r}: ONNX Runtime cannot open a session: {error}") from None
    if session.get_providers()[0] != provider.name:
        raise DeviceError(f"device {device!r}: ONNX Runtime would fall back to {session.get_providers()[0]}")
    return session
