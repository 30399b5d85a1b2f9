"""Run a function on a device: in NumPy, or lowered and run by ONNX Runtime on a CPU or a CUDA GPU.

    step = compile(train.loss_and_grads, "cpu")
    loss, grads = step(trainable, params, config, batch)    # the result of loss_and_grads

The first call with new shapes lowers the function and opens a session; later calls with the same shapes
only run it. Arrays that nobody can write are frozen weights: on "cpu" they are read where they lie (also in a mapped
file), on "cuda" they are copied once, and all sessions share them.
"""

import functools
import importlib.metadata
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from tinyprompt.errors import DeviceError
from tinyprompt.tree import leaves, refill

# One word says where a function runs and how exactly: the place, and how the function is lowered. In int8: the encoder,
# which does nearly all of the work; the gradient that comes from an output head has spikes beside which 8 bits leave
# nothing. A function that writes has no gradient, and is in int8 as a whole (see `compile`).
DEVICES: dict[str, tuple[str, dict[str, Any]]] = {
    "numpy": ("numpy", {}),
    "cpu": ("cpu", {}),
    "cpu-int8": ("cpu", {"int8": "encoder."}),
    "cuda": ("cuda", {}),
    "cuda-bf16": ("cuda", {"bf16": True}),
}
BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
WARM_UP = 2  # runs before the kernels of a graph are recorded
SESSIONS = 40  # open at once for one function; the least recently used is closed first
PACKED = 4  # of those that hold weights


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def default_device() -> str:
    """Return the default device: "cpu" if ONNX Runtime is installed, else "numpy"."""
    return "cpu" if version("onnx") and (version("onnxruntime") or version("onnxruntime-gpu")) else "numpy"


def check_device(device: str) -> str:
    """Return the place of a device: "numpy", "cpu" or "cuda". Raises DeviceError if it cannot be used here."""
    if device not in DEVICES:
        raise DeviceError(f"device {device!r}: expected one of {', '.join(DEVICES)}")
    place, _ = DEVICES[device]
    if place == "numpy":
        return place
    wanted, extra = ("onnxruntime-gpu", "gpu") if place == "cuda" else ("onnxruntime", "ort")
    if version("onnxruntime") and version("onnxruntime-gpu"):
        raise DeviceError(
            f"device {device!r}: onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            f"uninstall both (pip uninstall onnxruntime onnxruntime-gpu), then install {wanted} alone"
        )
    for package in ("onnx", wanted):
        if not version(package) and not (package == "onnxruntime" and version("onnxruntime-gpu")):
            raise DeviceError(f"device {device!r}: {package} is not installed; pip install 'tinyprompt-t5[{extra}]'")
    if place == "cuda":
        _probe_cuda()
    return place


def describe_device(device: str) -> str:
    """Describe a device in one line: the library that computes, and its version. Raises DeviceError."""
    if check_device(device) == "numpy":
        hint = "" if default_device() == "cpu" else "; faster with ONNX Runtime: pip install 'tinyprompt-t5[ort]'"
        return f"device: numpy {np.__version__}{hint}"
    package = "onnxruntime" if version("onnxruntime") else "onnxruntime-gpu"
    return f"device: {device} ({package} {version(package)})"


@functools.cache
def _probe_cuda() -> None:
    """Run a product and a maximum on the GPU. ONNX Runtime lists providers that cannot compute.

    A session opens without cuDNN, which only a reduction needs, and without cuBLAS's kernels for this GPU.
    """
    import onnxruntime as ort

    from tinyprompt import lowering

    ort.preload_dlls()
    x = np.arange(4, dtype=np.float32).reshape(2, 2)
    graph, _ = lowering.lower(lambda x: (x @ x).max(-1), x)
    session, name = open_session(graph, "cuda"), graph.inputs[0].name
    try:
        (found,) = (value.numpy() for value in session.run_with_ort_values(None, {name: _value(x, "cuda")}))
    except Exception as error:
        raise DeviceError(f"device 'cuda': ONNX Runtime cannot compute on this GPU: {error}") from None
    if found.tolist() != [3.0, 11.0]:
        raise DeviceError(f"device 'cuda': a product of 2 x 2 came out as {found.tolist()}; update the driver")


@functools.cache
def _share_memory() -> None:
    """Let all sessions share one memory arena."""
    import onnxruntime as ort

    cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(cpu, None)


def threads() -> int:
    """Threads of a session: OMP_NUM_THREADS, as BLAS libraries read it; 0 without it, ONNX Runtime's own choice.

    ONNX Runtime itself reads neither that variable nor the affinity of the process. joblib, Dask and Ray set the
    variable in their workers, which so share the cores.
    """
    found = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(found) if found.isdecimal() else 0


def open_session(graph, device: str, capture: bool = False, weights: Mapping[str, Any] | None = None):
    """An onnxruntime.InferenceSession of a lowered graph. Raises DeviceError.

    capture: on the GPU, record the kernels of a run as a CUDA graph and launch that from then on (see `Captured`).
    weights: what is derived from frozen inputs, to be copied into the layout that products read (see `Packed`).
    """
    import onnxruntime as ort

    _share_memory()
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
    provider: Any = "CPUExecutionProvider"
    if device == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        settings = {
            "use_tf32": "0",
            "arena_extend_strategy": "kSameAsRequested",
            "enable_cuda_graph": str(int(capture)),
        }
        provider = ("CUDAExecutionProvider", settings)
    try:
        model = graph.to_onnx(within=bool(weights)).SerializeToString()
        session = ort.InferenceSession(model, options, [provider], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's own exceptions have no common base below this one
        raise DeviceError(f"device {device!r}: ONNX Runtime cannot open a session: {error}") from None
    if session.get_providers()[0] != (provider if isinstance(provider, str) else provider[0]):
        raise DeviceError(f"device {device!r}: ONNX Runtime would fall back to {session.get_providers()[0]}")
    return session


_made: dict[tuple[int, Any, str], tuple[Any, list[Any]]] = {}  # (id of an array, recipe, device): its state, the values


def on_device(array: np.ndarray | np.generic, device: str) -> Any:
    """An array as an OrtValue: a view on the CPU; on the GPU a copy, made once for an array that cannot change."""
    if device == "cuda" and isinstance(array, np.ndarray):
        from tinyprompt import lowering

        if lowering.is_sealed(array):
            return derived(array, _itself, device)[0]
    return _value(array, device)


def derived(array: np.ndarray, recipe: Callable, device: str) -> list[Any]:
    """The arrays `recipe(array)` as OrtValues, made once for as long as the array lives and keeps its contents."""
    from tinyprompt import lowering

    key, state = (id(array), recipe, device), lowering.state_of(array)
    made = _made.get(key)
    if made is None:
        weakref.finalize(array, _made.pop, key, None)
    if made is None or made[0] != state:
        made = _made[key] = state, [_value(x, device) for x in recipe(array)]
    return made[1]


def _itself(array: np.ndarray) -> tuple[np.ndarray]:
    return (array,)


def _value(array: np.ndarray | np.generic, device: str) -> Any:
    import onnxruntime as ort

    if array.dtype != bfloat16:
        return ort.OrtValue.ortvalue_from_numpy(_bits(array), device, 0)
    if device == "cpu":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(_bits(array), BFLOAT16)
    value = _place(array.shape, array.dtype)
    _fill(value, array)
    return value


def _place(shape: Sequence[int], dtype: np.dtype) -> Any:
    """Allocate an array on the GPU."""
    import onnxruntime as ort

    kind = BFLOAT16 if dtype == bfloat16 else dtype
    return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), kind, "cuda", 0)


def _fill(value: Any, array: np.ndarray | np.generic) -> None:
    value.update_inplace(_bits(array))


def _bits(array: np.ndarray | np.generic) -> np.ndarray:
    """An array as ONNX Runtime takes it: contiguous, and bfloat16, which it does not know, as 16 bits."""
    array = np.asarray(array, order="C")
    return array.view(np.uint16) if array.dtype == bfloat16 else array


class Session:
    """An open graph. It maps arrays by input name to output arrays. Raises DeviceError."""

    bound: dict[tuple[int, ...], Any]  # of a session that holds weights: what belongs to each set of them

    def __init__(self, graph, place: str, capture: bool = False):
        self.graph, self.place = graph, place
        self.session = open_session(graph, place, capture)

    def run(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        inputs = {x.name: on_device(arrays[x.name], self.place) for x in self.graph.inputs} | self.derived(arrays)
        return [x.numpy() for x in self.session.run_with_ort_values(None, inputs)]

    def forget_with(self, arrays: Iterable[np.ndarray], key: tuple[int, ...]) -> None:
        """Drop `self.bound[key]` when one of the arrays is deleted. The arrays do not keep this session alive."""
        own = weakref.ref(self)

        def forget():
            if session := own():
                session.bound.pop(key, None)

        for array in arrays:
            weakref.finalize(array, forget)

    def derived(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Compute the inputs that derive from other inputs, once for each array."""
        out: dict[str, Any] = {}
        for (source, recipe), parts in self.graph.derived.items():
            values = derived(arrays[source], recipe, self.place)
            out |= {x.name: value for x, value in zip(parts, values, strict=True)}
        return out


class Packed(Session):
    """A session on the CPU that holds the weights of 8 bits, in the layout that products read.

    With few rows, as in decoding, laying out a weight anew takes longer than its product. So each set of weights has a
    session of its own, with a copy of them in it.
    """

    def __init__(self, graph):
        self.graph, self.place = graph, "cpu"
        self.bound = {}  # sessions, by the arrays that the weights are made of

    def run(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        from tinyprompt import lowering

        sources = [arrays[name] for name, _ in self.graph.derived]
        key = tuple(map(id, sources))
        states = tuple(map(lowering.state_of, sources))
        bound = self.bound.get(key)
        if bound is None:
            self.forget_with(sources, key)
        if bound is None or bound[0] != states:
            bound = states, open_session(self.graph, self.place, weights=self.derived(arrays))
            self.bound[key] = bound
        inputs = {x.name: on_device(arrays[x.name], self.place) for x in self.graph.inputs}
        return [x.numpy() for x in bound[1].run_with_ort_values(None, inputs)]


class Captured(Session):
    """A session on the GPU whose kernels are recorded as a CUDA graph in the first run, and launched at once after it.

    A recorded graph reads and writes where it did when it was recorded. So all but the weights is copied to fixed
    places, and for the weights of another model it is recorded again. A graph with dropout is not recorded, because its
    masks change place in every run. Nothing can allocate memory while it is recorded: runs before that make the arena
    large enough. A graph that fails all the same is run as any other from then on.
    """

    def __init__(self, graph):
        super().__init__(graph, "cuda", capture=True)
        self.bound = {}  # (binding, options, inputs, outputs), by the places of the weights
        self.recorded, self.refused = 0, False
        self.lock = threading.Lock()  # a recorded graph has one set of places

    @staticmethod
    def fits(graph) -> bool:
        """Whether a graph derives arrays from frozen inputs only, and no array is empty."""
        arrays = (*graph.all_inputs(), *graph.outputs)
        return all(x.size for x in arrays) and all(source in graph.frozen for source, _ in graph.derived)

    def run(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if not self.refused:
            try:
                with self.lock:
                    return self.launch(arrays)
            except Exception:  # ONNX Runtime's own exceptions have no common base below this one
                self.refused = True
                self.bound.clear()
                self.session = open_session(self.graph, self.place)
        return super().run(arrays)

    def launch(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Launch the recorded graph. The first call for a set of weights records it."""
        from tinyprompt import lowering

        given = {name: x if isinstance(x, np.ndarray) else np.array(x) for name, x in arrays.items()}
        given = {x.name: given[x.name] for x in self.graph.inputs}
        weights = {name: x for name, x in given.items() if np.ndim(x) <= 2 and lowering.is_sealed(x)}
        values = {name: on_device(x, self.place) for name, x in weights.items()} | self.derived(arrays)
        places = tuple(value.data_ptr() for value in values.values())
        new = places not in self.bound
        if new:
            self.bound[places] = self.bind(values, {name: x for name, x in given.items() if name not in weights})
            self.forget_with(weights.values(), places)  # or the GPU would keep what nobody uses
        binding, options, inputs, outputs = self.bound[places]
        for name, (value, known) in inputs.items():
            x = given[name]
            if not lowering.is_sealed(x) or known() is not x:
                _fill(value, x)
                inputs[name] = value, weakref.ref(x) if lowering.is_sealed(x) else _nothing
        for _ in range(WARM_UP if new else 0):
            self.session.run_with_iobinding(binding, _unrecorded())
        self.session.run_with_iobinding(binding, options)
        return [x.numpy() for x in outputs]

    def bind(self, weights: Mapping[str, Any], others: Mapping[str, np.ndarray]) -> tuple:
        """Bind every input and output to a fixed address."""
        import onnxruntime as ort

        self.recorded += 1
        binding, options = self.session.io_binding(), ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(self.recorded))
        inputs = {name: (_place(np.shape(x), x.dtype), _nothing) for name, x in others.items()}
        outputs = [_place(x.shape, x.dtype) for x in self.graph.outputs]
        for name, value in (dict(weights) | {name: value for name, (value, _) in inputs.items()}).items():
            binding.bind_ortvalue_input(name, value)
        for output, value in zip(self.session.get_outputs(), outputs, strict=True):
            binding.bind_ortvalue_output(output.name, value)
        return binding, options, inputs, outputs


def _unrecorded() -> Any:
    """Return the options of a run that is not recorded."""
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "-1")
    return options


def _nothing() -> None:
    """A weak reference that is always dead."""


@functools.lru_cache(64)
def compile(
    function: Callable, device: str, writes: bool = False, frozen: str | tuple[str, ...] | None = None
) -> Callable:
    """`function` on a device, one word of DEVICES: same positional arguments, same results.

    Arguments that are no arrays must be hashable; they become part of the graph, and so does whatever the function
    reads from elsewhere.

    Args:
        function: A NumPy function that lowers.
        device: A word of DEVICES.
        writes: The function has no gradient and takes few rows, so a device of 8 bits quantises all frozen weights.
        frozen: Names of the parameters whose arrays are frozen weights. By default, arrays that are read-only are.
            The values that a device derives from a weight are made once for an array of `tree.freeze`; any other
            array is looked at in every call.

    Raises:
        DeviceError: The device cannot be used here, or ONNX Runtime cannot run the function.
        LoweringError: A step of the function has no rule, or a name in `frozen` is no parameter.

    Example:
        >>> step = compile(loss_and_grads, "cpu", frozen="params")
        >>> loss, grads = step(trainable, params, config, batch)
    """
    place = check_device(device)
    if place == "numpy":
        return function
    from tinyprompt import lowering  # imported when a device first needs it

    sessions: OrderedDict[Any, Any] = OrderedDict()
    lock = threading.Lock()
    how = DEVICES[device][1]
    packed = writes and "int8" in how
    how = how | {"int8": ""} if packed else how

    @functools.wraps(function)
    def run(*arguments):
        key = lowering.graph_key(arguments, flags=frozen is None)
        entry = sessions.get(key)
        if entry is None:
            graph, result = lowering.lower(function, *arguments, **how, frozen=frozen)
            names = [name for name, x in lowering.named(function, arguments) if isinstance(x, np.ndarray | np.generic)]
            if packed and graph.derived:
                session: Session = Packed(graph)
            else:
                session = Captured(graph) if place == "cuda" and Captured.fits(graph) else Session(graph, place)
            entry = session, names, result
        with lock:  # another thread may close the session of this key at any time
            sessions[key] = entry
            sessions.move_to_end(key)
            if len(sessions) > (PACKED if packed else SESSIONS):
                sessions.popitem(last=False)
        session, names, result = entry
        found: Any = (x for _, x in leaves(arguments) if isinstance(x, np.ndarray | np.generic))
        try:
            outputs = iter(session.run(dict(zip(names, found, strict=True))))
        except Exception as error:
            raise DeviceError(f"device {device!r}: ONNX Runtime: {error}") from None
        return refill(result, (next(outputs) if isinstance(x, lowering.Traced) else x for _, x in leaves(result)))

    return run
