"""Open graphs, and `compile`, which keeps one for every set of shapes.

The first call with new shapes lowers the function and opens a session; later calls with the same shapes only run it.
Frozen weights are read where they lie (also in a mapped file); a GPU copies them once, and all sessions share them.
Results of which a function says so stay on the device, as `Held`, and are arguments of the next call.
"""

import functools
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tinyprompt.device.providers import DEVICES, PROVIDERS, check_device, open_session
from tinyprompt.device.values import Held, allocate, derived, fill, held, on_device, to_value
from tinyprompt.errors import DeviceError
from tinyprompt.tree import leaves, refill

WARM_UP = 2  # runs before the kernels of a graph are recorded
SESSIONS = 40  # open at once for one function; the least recently used is closed first
PACKED = 4  # of those that hold weights
WIDE, LARGEST = (np.int64, np.uint64, np.uint32), 2**31 - 1


class Session:
    """An open graph. It maps arrays by input name to output arrays. Raises DeviceError."""

    def __init__(self, graph, device: str, capture: bool = False):
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


def run_session(session, graph, inputs: Mapping[str, Any], arrays: Mapping[str, Any], device: str) -> list[Any]:
    """Run an open graph on OrtValues, made of `arrays`. The outputs that stay on the device are `Held`."""
    if not graph.kept:
        return [x.numpy() for x in session.run_with_ort_values(None, inputs)]
    binding, provider = session.io_binding(), PROVIDERS[DEVICES[device].place]
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for i, x in enumerate(graph.outputs):
        place = arrays.get(graph.kept.get(x.name))
        if isinstance(place, Held) and provider.in_place:
            binding.bind_ortvalue_output(f"output_{i}", place.value)
        else:
            binding.bind_output(f"output_{i}", provider.memory if x.name in graph.kept else "cpu")
    session.run_with_iobinding(binding)
    values = zip(graph.outputs, binding.get_outputs(), strict=True)
    return [Held(value, x.dtype) if x.name in graph.kept else value.numpy() for x, value in values]


def derived_inputs(graph, arrays: Mapping[str, np.ndarray], memory: str) -> dict[str, Any]:
    """Compute the inputs that derive from other inputs, once for each array."""
    out: dict[str, Any] = {}
    for (source, recipe), parts in graph.derived.items():
        values = derived(arrays[source], recipe, memory)
        out |= {x.name: value for x, value in zip(parts, values, strict=True)}
    return out


class ByWeights:
    """What belongs to each set of weights, dropped when one of its arrays is deleted."""

    def __init__(self) -> None:
        self.bound: dict[tuple[int, ...], Any] = {}

    def forget_with(self, arrays: Iterable[np.ndarray], key: tuple[int, ...]) -> None:
        """Drop `self.bound[key]` when one of the arrays is deleted. The arrays do not keep this object alive."""
        own = weakref.ref(self)

        def forget():
            if alive := own():
                alive.bound.pop(key, None)

        for array in arrays:
            weakref.finalize(array, forget)


class Packed(ByWeights):
    """A session on the CPU that holds the weights of 8 bits, in the layout that products read.

    With few rows, as in decoding, laying out a weight anew takes longer than its product. So each set of weights has a
    session of its own, with a copy of them in it.
    """

    def __init__(self, graph):
        super().__init__()  # sessions, by the arrays that the weights are made of
        self.graph = graph

    def run(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        from tinyprompt import lowering

        sources = [arrays[name] for name, _ in self.graph.derived]
        key = tuple(map(id, sources))
        states = tuple(map(lowering.state_of, sources))
        bound = self.bound.get(key)
        if bound is None:
            self.forget_with(sources, key)
        if bound is None or bound[0] != states:
            bound = states, open_session(self.graph, "cpu", weights=derived_inputs(self.graph, arrays, "cpu"))
            self.bound[key] = bound
        inputs = {x.name: on_device(arrays[x.name], "cpu") for x in self.graph.inputs}
        return run_session(bound[1], self.graph, inputs, arrays, "cpu")


class Captured(Session, ByWeights):
    """A session on the GPU whose kernels are recorded as a CUDA graph in the first run, and launched at once after it.

    A recorded graph reads and writes where it did when it was recorded. So all but the weights is copied to fixed
    places, and for the weights of another model it is recorded again. A graph with dropout is not recorded, because its
    masks change place in every run. Nothing can allocate memory while it is recorded: runs before that make the arena
    large enough. A graph that fails all the same is run as any other from then on.
    """

    def __init__(self, graph):
        Session.__init__(self, graph, "cuda", capture=True)
        ByWeights.__init__(self)  # (binding, options, inputs, outputs), by the places of the weights
        self.recorded, self.refused = 0, False
        self.lock = threading.Lock()  # a recorded graph has one set of places

    @staticmethod
    def fits(graph) -> bool:
        """Whether a graph derives arrays from frozen inputs only, no array is empty, and none stays on the GPU."""
        arrays = (*graph.all_inputs(), *graph.outputs)
        fixed = all(x.size for x in arrays) and all(source in graph.frozen for source, _ in graph.derived)
        return fixed and not graph.kept

    def run(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if self.refused:
            return super().run(arrays)
        try:
            with self.lock:
                return self.launch(arrays)
        except Exception as error:  # ONNX Runtime's own exceptions have no common base below this one
            self.refused = True
            self.bound.clear()
            self.session = open_session(self.graph, self.device)
            found = super().run(arrays)  # if the inputs are wrong, this says so
            said = "warning: a graph is not recorded for the GPU, and runs more slowly: %s"
            logging.getLogger("tinyprompt").warning(said, error)
            return found

    def launch(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Launch the recorded graph. The first call for a set of weights records it."""
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
            self.forget_with(weights.values(), places)  # or the GPU would keep what nobody uses
        binding, options, inputs, outputs = self.bound[places]
        for name, (value, known) in inputs.items():
            x = given[name]
            if not lowering.is_sealed(x) or known() is not x:
                fill(value, x)
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
        inputs = {name: (allocate(np.shape(x), x.dtype), _nothing) for name, x in others.items()}
        outputs = [allocate(x.shape, x.dtype) for x in self.graph.outputs]
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


def open_graph(graph, device: str, packed: bool) -> Session | Packed | None:
    """Open the kind of session that a graph has on a device; None for a graph without outputs."""
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
        keeps: The function returns a pair, and the arrays in the second part stay on the device. They come back as
            objects that the next call takes as arrays, and that `numpy.asarray` copies. An argument that stays on the
            device may be overwritten by the result that `ops.put` makes of it.

    Raises:
        DeviceError: The device cannot be used here, or ONNX Runtime cannot run the function.
        LoweringError: A step of the function has no rule, or a name in `frozen` is no parameter.

    Example:
        >>> step = compile(loss_and_grads, "cpu", frozen="params")
        >>> loss, grads = step(trainable, params, config, batch)
    """
    if check_device(device) == "numpy":
        return function
    from tinyprompt import lowering  # imported when a device first needs it

    sessions: OrderedDict[Any, Any] = OrderedDict()
    lock = threading.Lock()
    how = DEVICES[device].lowering
    packed = writes and "int8" in how
    how = how | {"int8": ""} if packed else how
    memory = PROVIDERS[DEVICES[device].place].memory

    @functools.wraps(function)
    def run(*arguments):
        arrays = refill(arguments, (x.stand_in() if isinstance(x, Held) else x for _, x in leaves(arguments)))
        key = lowering.graph_key(arrays, flags=frozen is None)
        entry = sessions.get(key)
        if entry is None:
            graph, result = lowering.lower(function, *arrays, **how, frozen=frozen)
            names = [name for name, x in lowering.named(function, arrays) if isinstance(x, np.ndarray | np.generic)]
            graph.finish(x for x in graph.outputs if x.value is None)  # a constant is known, and may be empty
            graph.drop_unread_inputs()
            if keeps:
                graph.keep(x for _, x in leaves(result[1]) if isinstance(x, lowering.Traced))
            entry = open_graph(graph, device, packed), names, result
        with lock:  # another thread may close the session of this key at any time
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
