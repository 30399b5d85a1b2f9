"""Convert arrays for ONNX Runtime, and cache the values derived from frozen weights."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16

_made: dict[tuple[int, Any, str], tuple[Any, list[Any]]] = {}  # (id of an array, recipe, memory) -> state, values


class Held:
    """An array that stays on a device. Graphs read it and may overwrite it; `numpy.asarray` copies it."""

    def __init__(self, value: Any, dtype: np.dtype) -> None:
        self.value, self.dtype, self.shape = value, dtype, tuple(value.shape())  # value is an OrtValue

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.value.numpy(), dtype)

    def stand_in(self) -> np.ndarray:
        """Return an array of this shape and dtype without allocating memory."""
        return np.broadcast_to(np.zeros((), self.dtype), self.shape)


def on_device(array: np.ndarray | np.generic | Held, memory: str) -> Any:
    """Return an array as an OrtValue. An immutable array is copied to the GPU once; others become CPU views.

    ONNX Runtime copies the inputs of a run to the GPU asynchronously.
    """
    if isinstance(array, Held):
        return array.value
    if memory == "cuda" and isinstance(array, np.ndarray):
        from tinyprompt import lowering

        if lowering.is_sealed(array):
            return derived(array, _itself, memory)[0]
    return to_value(array, "cpu")


def held(array: np.ndarray | Held, memory: str) -> Held:
    """Return an array that is on the device, or copy it there."""
    return array if isinstance(array, Held) else Held(to_value(array, memory), array.dtype)


def derived(array: np.ndarray, recipe: Callable, memory: str) -> list[Any]:
    """Return the arrays `recipe(array)` as OrtValues. They are cached while the array lives and keeps its contents."""
    from tinyprompt import lowering

    key, state = (id(array), recipe, memory), lowering.state_of(array)
    made = _made.get(key)
    if made is None:
        weakref.finalize(array, _made.pop, key, None)
    if made is None or made[0] != state:
        made = _made[key] = state, [to_value(x, memory) for x in recipe(array)]
    return made[1]


def _itself(array: np.ndarray) -> tuple[np.ndarray]:
    return (array,)


def to_value(array: np.ndarray | np.generic, memory: str) -> Any:
    """Convert an array to an OrtValue."""
    import onnxruntime as ort

    if array.dtype != bfloat16:
        return ort.OrtValue.ortvalue_from_numpy(_bits(array), memory, 0)
    if memory == "cpu":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(_bits(array), BFLOAT16)
    value = allocate(array.shape, array.dtype)
    fill(value, array)
    return value


def allocate(shape: Sequence[int], dtype: np.dtype) -> Any:
    """Allocate an array on the GPU."""
    import onnxruntime as ort

    kind = BFLOAT16 if dtype == bfloat16 else dtype
    return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), kind, "cuda", 0)


def fill(value: Any, array: np.ndarray | np.generic) -> None:
    """Copy an array to its buffer on the GPU."""
    value.update_inplace(_bits(array))


def _bits(array: np.ndarray | np.generic) -> np.ndarray:
    """Return a contiguous array. bfloat16, which ONNX Runtime's Python API does not support, becomes uint16."""
    array = np.asarray(array, order="C")
    return array.view(np.uint16) if array.dtype == bfloat16 else array
