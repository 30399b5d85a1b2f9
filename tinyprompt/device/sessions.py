"""Sessions for graphs, and `compile`, which keeps a session for every set of shapes.

The first call with new shapes lowers the function and opens a session. Later calls with the same shapes only run it.
Frozen weights are read in place (even from a mapped file). A GPU copies them once for all sessions. If a function
declares it, results stay on the device as `Held` arrays, which the next call accepts as arguments.
"""

import functools
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyprompt.device.providers import DEVICES, PROVIDERS, check_device, open_session
from tinyprompt.device.values import Held, allocate, derived, fill, held, on_device, to_value
from tinyprompt.errors import DeviceError
from tinyprompt.tree import leaves, refill

if TYPE_CHECKING:
    from tinyprompt.lowering.graph import Graph

WARM_UP = 2  # runs before the kernels of a graph are recorded
UNRECORDED = -1  # number of a CUDA graph: the run is not recorded
SESSIONS = 40  # open sessions per function; the least recently used session is closed first
PACKED = 4  # open sessions per function that contain weights
WIDE, LARGEST = (np.int64, np.uint64, np.uint32), 2**31 - 1


class Session:
    """An open graph. It maps arrays by input name to output arrays. Raises DeviceError."""

    def __init__(self, graph: "Graph", device: str, capture: bool = False) -> None:
        self.graph, self.device = graph, device
        provider = PROVIDERS[DEVICES[device].place]
        self.memory, self.wide = provider.memory, provider.wide
        if not self.wide and any(x.dtype == np.float64 for x in (*graph.inputs, *graph.nodes)):
            raise DeviceError(f"device {device!r} computes float64 in 32 bits; give float32 arrays, or use 'cpu'")
        self.session = open_session(graph, device, capture)
        large = [] if provider.constants else graph.large_constants()
        self.constants = {c.name: to_value(c.value, self.memory) for c in large}

    def run(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        for x in () if self.wide else self.graph.inputs:
            given = arrays[x.name]
            if x.dtype in WIDE and (given.max(initial=0) > LARGEST or given.min(initial=0) < -LARGEST):
                raise DeviceError(f"device {self.device!r} computes integers in 32 bits, and {x.name} has larger ones")
        inputs = {x.name: on_device(arrays[x.name], self.memory) for x in self.graph.inputs}
        inputs |= derived_inputs(self.graph, arrays, self.memory) | self.constants
        return run_session(self.session, self.graph, inputs, arrays, self.device)


def run_session(
    session: Any, graph: "Graph", inputs: Mapping[str, Any], arrays: Mapping[str, Any], device: str
) -> list[Any]:
    """Run a session with `arrays` as OrtValues. Outputs that stay on the device are `Held`."""
    if not graph.kept:
        return [x.numpy() for x in session.run_with_ort_values(None, inputs)]
    binding, provider = session.io_binding(), PROVIDERS[DEVICES[device].place]
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for i, x in enumerate(graph.outputs):
        place = arrays.get(graph.kept.get(x.name) or "")
        if isinstance(place, Held) and provider.in_place:
            binding.bind_ortvalue_output(f"output_{i}", place.value)
        else:
            binding.bind_output(f"output_{i}", provider.memory if x.name in graph.kept else "cpu")
    session.run_with_iobinding(binding)
    values = zip(graph.outputs, binding.get_outputs(), strict=True)
    return [Held(value, x.dtype) if x.name in graph.kept else value.numpy() for x, value in values]


def derived_inputs(graph: "Graph", arrays: Mapping[str, np.ndarray], memory: str) -> dict[str, Any]:
    """Compute the inputs that derive from other inputs, once per array."""
    out: dict[str, Any] = {}
    for (source, recipe), parts in graph.derived.items():
        values = derived(arrays[source], recipe, memory)
        out |= {x.name: value for x, value in zip(parts, values, strict=True)}
    return out


class ByWeights(dict[tuple[int, ...], Any]):
    """A cache by set of weights. An entry is dropped when one of its arrays is deleted."""

    def forget_with(self, arrays: Iterable[np.ndarray], key: tuple[int, ...]) -> None:
        """Drop `self[key]` when one of the arrays is deleted. The arrays do not keep this cache alive."""
        own = weakref.ref(self)

        def forget() -> None:
            if (alive := own()) is not None:
                alive.pop(key, None)

        for array in arrays:
            weakref.finalize(array, forget)


class Packed:
    """A CPU session that contains the int8 weights in the layout of its products.

    With few rows, as in decoding, rearranging a weight takes longer than its product. Each set of weights therefore has
    its own session with a copy of the weights.
    """

    def __init__(self, graph: "Graph") -> None:
        self.graph, self.bound = graph, ByWeights()  # sessions by source weights

    def run(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        from tinyprompt import lowering

        sources = [arrays[name] for name, _ in self.graph.derived]
        key = tuple(map(id, sources))
        states = tuple(map(lowering.state_of, sources))
        bound = self.bound.get(key)
        if bound is None:
            self.bound.forget_with(sources, key)
        if bound is None or bound[0] != states:
            bound = states, open_session(self.graph, "cpu", weights=derived_inputs(self.graph, arrays, "cpu"))
            self.bound[key] = bound
        inputs = {x.name: on_device(arrays[x.name], "cpu") for x in self.graph.inputs}
        return run_session(bound[1], self.graph, inputs, arrays, "cpu")


class Captured(Session):
    """A GPU session that records its kernels as a CUDA graph in the first run and launches the CUDA graph afterwards.

    A recorded graph reads and writes fixed addresses. All inputs except the weights are therefore copied to fixed
    buffers, and another model needs another recording. A graph with dropout is not recorded, because the address of its
    masks changes in every run. Memory cannot be allocated during a recording, so earlier runs enlarge the arena. A
    graph that cannot be recorded runs like any other.
    """

    def __init__(self, graph: "Graph") -> None:
        super().__init__(graph, "cuda", capture=True)
        self.bound = ByWeights()  # (binding, options, inputs, outputs) by the addresses of the weights
        self.recorded, self.refused = 0, False
        self.lock = threading.Lock()  # a recorded graph has a single set of buffers

    @staticmethod
    def fits(graph: "Graph") -> bool:
        """Return whether all derived arrays come from frozen inputs, no array is empty, and none stays on the GPU."""
        arrays = (*graph.all_inputs(), *graph.outputs)
        fixed = all(x.size for x in arrays) and all(source in graph.frozen for source, _ in graph.derived)
        return fixed and not graph.kept

    def run(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if self.refused:
            return super().run(arrays)
        try:
            with self.lock:
                return self.launch(arrays)
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            self.refused = True
            self.bound.clear()
            self.session = open_session(self.graph, self.device)
            found = super().run(arrays)  # raises if the inputs are invalid
            said = "warning: a graph could not be recorded for the GPU and runs more slowly: %s"
            logging.getLogger("tinyprompt").warning(said, error)
            return found

    def launch(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Launch the recorded graph. The first call with a set of weights records it."""
        from tinyprompt import lowering

        given = {name: x if isinstance(x, np.ndarray) else np.array(x) for name, x in arrays.items()}
        given = {x.name: given[x.name] for x in self.graph.inputs}
        weights = {name: x for name, x in given.items() if np.ndim(x) <= 2 and lowering.is_sealed(x)}
        values = {name: on_device(x, self.memory) for name, x in weights.items()}
        values |= derived_inputs(self.graph, arrays, self.memory)
        places = tuple(value.data_ptr() for value in values.values())
        new = places not in self.bound
        if new:
            self.bound[places] = self.bind(values, {name: x for name, x in given.items() if name not in weights})
            self.bound.forget_with(weights.values(), places)  # frees unused weights on the GPU
        binding, options, inputs, outputs = self.bound[places]
        for name, (value, known) in inputs.items():
            x = given[name]
            if not lowering.is_sealed(x) or known() is not x:
                fill(value, x)
                inputs[name] = value, weakref.ref(x) if lowering.is_sealed(x) else _nothing
        for _ in range(WARM_UP if new else 0):
            self.session.run_with_iobinding(binding, run_options(UNRECORDED))
        self.session.run_with_iobinding(binding, options)
        return [x.numpy() for x in outputs]

    def bind(self, weights: Mapping[str, Any], others: Mapping[str, np.ndarray]) -> tuple:
        """Bind every input and output to a fixed address."""
        self.recorded += 1
        binding, options = self.session.io_binding(), run_options(self.recorded)
        inputs = {name: (allocate(np.shape(x), x.dtype), _nothing) for name, x in others.items()}
        outputs = [allocate(x.shape, x.dtype) for x in self.graph.outputs]
        for name, value in (dict(weights) | {name: value for name, (value, _) in inputs.items()}).items():
            binding.bind_ortvalue_input(name, value)
        for output, value in zip(self.session.get_outputs(), outputs, strict=True):
            binding.bind_ortvalue_output(output.name, value)
        return binding, options, inputs, outputs


def run_options(graph: int) -> Any:
    """Return the options of a run that records or launches the CUDA graph of this number."""
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def _nothing() -> None:
    """Return a weak reference that is always dead."""


def open_graph(graph: "Graph", device: str, packed: bool) -> Session | Packed | None:
    """Open the appropriate session for a graph on a device, or return None for a graph without outputs."""
    if not graph.outputs:
        return None
    if packed and graph.derived:
        return Packed(graph)
    recorded = DEVICES[device].place == "cuda" and Captured.fits(graph)
    return Captured(graph) if recorded else Session(graph, device)


@functools.lru_cache(64)
def compile(
    function: Callable,
    device: str,
    writes: bool = False,
    frozen: str | tuple[str, ...] | None = None,
    keeps: bool = False,
) -> Callable:
    """Compile a function for a device. The result takes the same positional arguments and returns the same results.

    Arguments other than arrays must be hashable. They become part of the graph, like all values from the function's
    closure.

    Args:
        function: A NumPy function that can be lowered.
        device: A device of DEVICES.
        writes: The function has no gradient and few rows, so an int8 device quantises all frozen weights.
        frozen: Names of the parameters whose arrays are frozen weights. By default, read-only arrays are frozen.
            Values derived from a weight are computed once for an array of `tree.freeze`. Any other array is compared
            with its earlier contents in every call.
        keeps: The function returns a pair, and the arrays in its second part stay on the device. They are returned as
            objects that the next call accepts as arrays, and that `numpy.asarray` copies. The result of `ops.put` may
            overwrite an argument that stays on the device.

    Returns:
        The compiled function.

    Raises:
        DeviceError: The device is not available, or ONNX Runtime cannot run the function.
        LoweringError: A step of the function has no rule, or a name in `frozen` is not a parameter.

    Example:
        >>> step = compile(loss_and_grads, "cpu", frozen="params")
        >>> loss, grads = step(trainable, params, config, batch)
    """
    if check_device(device) == "numpy":
        return function
    from tinyprompt import lowering  # deferred until a device needs it

    sessions: OrderedDict[Any, Any] = OrderedDict()
    lock = threading.Lock()
    how = DEVICES[device].lowering
    packed = writes and "int8" in how
    how = how | {"int8": ""} if packed else how
    memory = PROVIDERS[DEVICES[device].place].memory

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        key = lowering.graph_key(arguments, flags=frozen is None)
        entry = sessions.get(key)
        if entry is None:
            arrays = refill(arguments, (x.stand_in() if isinstance(x, Held) else x for _, x in leaves(arguments)))
            graph, result = lowering.lower(function, *arrays, **how, frozen=frozen)
            names = [name for _, name, x in lowering.named(function, arrays) if isinstance(x, np.ndarray | np.generic)]
            graph.finish(x for x in graph.outputs if x.value is None)  # a constant output is known, and may be empty
            graph.drop_unread_inputs()
            if keeps:
                graph.keep(x for _, x in leaves(result[1]) if isinstance(x, lowering.Traced))
            entry = open_graph(graph, device, packed), names, result
        with lock:  # another thread may close the session at any time
            sessions[key] = entry
            sessions.move_to_end(key)
            if len(sessions) > (PACKED if packed else SESSIONS):
                sessions.popitem(last=False)
        session, names, result = entry
        found: Any = (x for _, x in leaves(arguments) if isinstance(x, np.ndarray | np.generic | Held))
        try:
            outputs = iter(session.run(dict(zip(names, found, strict=True))) if session else ())
        except DeviceError:
            raise
        except Exception as error:
            raise DeviceError(f"device {device!r}: ONNX Runtime: {error}") from None
        known = lambda x: x.value.copy() if x.value is not None else next(outputs)
        found = refill(result, (known(x) if isinstance(x, lowering.Traced) else x for _, x in leaves(result)))
        return (found[0], refill(found[1], (held(x, memory) for _, x in leaves(found[1])))) if keeps else found

    return run
