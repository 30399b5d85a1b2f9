"""The devices, and how ONNX Runtime opens a session on each.

Everything that is particular to a provider of ONNX Runtime is a line of PROVIDERS. A device is a word: a provider, and
how exactly it computes.
"""

import functools
import importlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinyprompt.errors import DeviceError


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def threads() -> int:
    """Threads of a session: OMP_NUM_THREADS, as BLAS libraries read it; 0 without it, ONNX Runtime's own choice.

    ONNX Runtime itself reads neither that variable nor the affinity of the process. joblib, Dask and Ray set the
    variable in their workers, which so share the cores.
    """
    found = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(found) if found.isdecimal() else 0


# ---- the providers ----


@dataclass(frozen=True)
class Provider:
    """A library that runs graphs, and how a session of it is opened."""

    name: str  # ONNX Runtime's own
    packages: tuple[str, ...]  # needed beside onnx; the last one computes
    extra: str  # of this package, with which these are installed
    options: Callable[[str, bool], dict[str, str]] = lambda precision, capture: {}
    entries: Mapping[str, str] = field(default_factory=dict)  # of the session's configuration
    memory: str = "cpu"  # where its arrays lie
    prepare: Callable[[], None] | None = None  # runs before the first session, which is tried by a small product
    plugin: bool = False  # registered at run time, and given to a session as a device
    constants: bool = True  # False: large constants of a graph become inputs, because it computes wrongly with them
    wide: bool = True  # False: it computes numbers of 64 bits in 32, so that they are refused
    in_place: bool = True  # an output may be written into the memory of an input
    update: str = ""  # what to do if it computes wrongly


def _cuda_options(precision: str, capture: bool) -> dict[str, str]:
    return {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested", "enable_cuda_graph": str(int(capture))}


def _find_cuda() -> None:
    import onnxruntime as ort

    ort.preload_dlls()


def _openvino_options(precision: str, capture: bool) -> dict[str, str]:
    """Say the precision: by default, OpenVINO computes in bfloat16 where the processor has it."""
    config = {"INFERENCE_PRECISION_HINT": precision} | ({"INFERENCE_NUM_THREADS": str(threads())} if threads() else {})
    return {"load_config": json.dumps({"CPU": config})}


@functools.cache
def _register(name: str, path: str) -> None:
    """Register the library of a plug-in, which ONNX Runtime refuses to do twice."""
    import onnxruntime as ort

    ort.register_execution_provider_library(name, path)


def _register_openvino() -> None:
    import onnxruntime as ort

    name = PROVIDERS["openvino"].name
    if all(x.ep_name != name for x in ort.get_ep_devices()):
        _register(name, importlib.import_module("onnxruntime_ep_openvino").get_library_path())
    if not processors(name):
        raise DeviceError("device 'openvino': its plug-in finds no processor here; some versions know Intel's only")


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
        in_place=False,  # not tried
        update="update onnxruntime-ep-openvino",
    ),
}


class Device:
    """A word of --device: where a function runs, and how exactly."""

    def __init__(self, place: str, precision: str = "f32", **lowering: Any) -> None:
        self.place = place  # "numpy", or a provider
        self.precision = precision  # of the provider's own arithmetic
        self.lowering = lowering  # options of `lower`


# In int8: the encoder, which does nearly all of the work; the gradient that comes from an output head has spikes beside
# which 8 bits leave nothing. A function that writes has no gradient, and is in int8 as a whole (see `compile`).
DEVICES = {
    "numpy": Device("numpy"),
    "cpu": Device("cpu"),
    "cpu-int8": Device("cpu", int8="encoder."),
    "cuda": Device("cuda"),
    "cuda-bf16": Device("cuda", bf16=True),
    "openvino": Device("openvino"),
    "openvino-bf16": Device("openvino", precision="bf16"),
}


# ---- what can be used here ----


def default_device() -> str:
    """Return the default device: "cpu" if ONNX Runtime is installed, else "numpy"."""
    return "cpu" if version("onnx") and (version("onnxruntime") or version("onnxruntime-gpu")) else "numpy"


def check_device(device: str) -> str:
    """Return the place of a device: "numpy" or a provider. Raises DeviceError if it cannot be used here."""
    if device not in DEVICES:
        raise DeviceError(f"device {device!r}: expected one of {', '.join(DEVICES)}")
    place = DEVICES[device].place
    if place == "numpy":
        return place
    provider = PROVIDERS[place]
    if version("onnxruntime") and version("onnxruntime-gpu"):
        raise DeviceError(
            f"device {device!r}: onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            f"uninstall both (pip uninstall onnxruntime onnxruntime-gpu), then install {provider.packages[0]} alone"
        )
    for package in ("onnx", *provider.packages):
        if not version(package) and not (package == "onnxruntime" and version("onnxruntime-gpu")):
            extra = f"pip install 'tinyprompt-t5[{provider.extra}]'"
            raise DeviceError(f"device {device!r}: {package} is not installed; {extra}")
    if provider.prepare:
        _try(place)
    return place


def describe_device(device: str) -> str:
    """Describe a device in one line: the library that computes, and its version. Raises DeviceError."""
    place = check_device(device)
    if place == "numpy":
        hint = "" if default_device() == "cpu" else "; faster with ONNX Runtime: pip install 'tinyprompt-t5[ort]'"
        return f"device: numpy {np.__version__}{hint}"
    package = next(package for package in (*PROVIDERS[place].packages[::-1], "onnxruntime-gpu") if version(package))
    wide = DEVICES[device].precision == "bf16" and not any("BF16" in x for x in capabilities(PROVIDERS[place].name))
    hint = "; this processor has no bfloat16, so it computes in float32" if wide else ""
    return f"device: {device} ({package} {version(package)}){hint}"


def processors(name: str) -> list[Any]:
    """List the processors that a registered plug-in offers."""
    import onnxruntime as ort

    return [x for x in ort.get_ep_devices() if x.ep_name == name and x.device.type == ort.OrtHardwareDeviceType.CPU]


def capabilities(name: str) -> list[str]:
    """List the precisions in which a plug-in says that the processors here compute."""
    return [x.ep_metadata.get("OPTIMIZATION_CAPABILITIES", "") for x in processors(name)]


@functools.cache
def _try(place: str) -> None:
    """Run a product and a maximum. ONNX Runtime lists providers that cannot compute.

    A session of CUDA opens without cuDNN, which only a reduction needs, and without cuBLAS's kernels for this GPU.
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
        raise DeviceError(f"device {place!r}: a product of 2 x 2 came out as {found.tolist()}; {provider.update}")


# ---- sessions ----


@functools.cache
def _share_memory() -> None:
    """Let all sessions share one memory arena."""
    import onnxruntime as ort

    cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(cpu, None)


def open_session(graph, device: str, capture: bool = False, weights: Mapping[str, Any] | None = None):
    """An onnxruntime.InferenceSession of a lowered graph. Raises DeviceError.

    capture: on the GPU, record the kernels of a run as a CUDA graph and launch that from then on (see `Captured`).
    weights: what is derived from frozen inputs, to be copied into the layout that products read (see `Packed`).
    """
    import onnxruntime as ort

    _share_memory()
    provider = PROVIDERS[DEVICES[device].place]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads()
    # The graph is lean already. Prepacking and constant folding would copy the weights, the memory pattern doubles
    # what a gradient step holds.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_pattern = False
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # as written: what is computed again waits till then
    options.add_session_config_entry("session.disable_prepacking", "0" if weights else "1")
    if weights:
        options.add_external_initializers([*weights], [*weights.values()])
    # Threads may wait by spinning within a run, but not after it, when NumPy or another session wants the cores. (One
    # pool for all sessions would forbid everybody else in the process to open a plain session.)
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
    except Exception as error:  # ONNX Runtime's own exceptions have no common base below this one
        raise DeviceError(f"device {device!r}: ONNX Runtime cannot open a session: {error}") from None
    if session.get_providers()[0] != provider.name:
        raise DeviceError(f"device {device!r}: ONNX Runtime would fall back to {session.get_providers()[0]}")
    return session
