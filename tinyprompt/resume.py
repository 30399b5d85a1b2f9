"""The training state of a saved prompt: packed into arrays, and checked before training continues."""

from dataclasses import asdict
from typing import Any

import numpy as np

from tinyprompt import methods
from tinyprompt.errors import CheckpointError, DataError
from tinyprompt.fit import check_fit
from tinyprompt.model import Model, Prompt
from tinyprompt.settings import Settings
from tinyprompt.train import TaskData, TrainState, first_state, out_of_patience
from tinyprompt.tree import Flat, leaves, refill


def pack(state: TrainState) -> Flat:
    """Return the leaves of a state as float arrays by name, because a safetensors file stores only tensors."""
    return {name: np.atleast_1d(value) * 1.0 for name, value in leaves(state)}


def unpack(packed: Flat, like: TrainState) -> TrainState:
    """Return a packed state with the structure of `like`.

    Raises:
        CheckpointError: An array is missing, has another shape or is not finite.
    """

    def leaf(name: str, like: Any) -> Any:
        found = packed[name].reshape({"losses": (-1,), "scores": (-1, 3)}.get(name, np.shape(like)))
        return found.astype(like.dtype) if isinstance(like, np.ndarray) else type(like)(found)

    try:
        state = refill(like, iter([leaf(name, value) for name, value in leaves(like)]))
        if not all(np.isfinite(x).all() for _, x in leaves(state)):
            raise ValueError("it is not finite")
        if not 1 <= state.step == len(state.losses) or state.best_step not in state.scores[:, 0]:
            raise ValueError("its history is incomplete")
        return state
    except (KeyError, ValueError, OverflowError) as error:
        raise CheckpointError(f"the training state is damaged ({error}); tune again") from None


def resumed(model: Model, task: TaskData, settings: Settings, saved: Prompt) -> TrainState:
    """Return the state of a saved prompt, to continue the same run. Only steps and patience may differ.

    Raises:
        CheckpointError: The prompt belongs to another model, or its state is damaged.
        DataError: The rows differ.
        ValueError: A setting differs, there is no state, or the run is complete.
    """
    if saved.train_state is None:
        raise ValueError("this prompt has no training state to resume; to start from it: --init file --init-file FILE")
    check_fit(saved, model)
    for name, value in (asdict(settings) | {"labels": task.label_words}).items():
        before = saved.label_words if name == "labels" else asdict(Settings.saved(saved.settings))[name]
        if name not in ("steps", "patience") and value != before:
            raise ValueError(f"setting {name}: expected {before!r} as in the run to resume, found {value!r}")
    shapes = methods.trained_shapes(model.config, settings, len(task.label_words or ()))
    like = first_state(model, task, settings, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    state = unpack(saved.train_state, like)
    if state.rows != like.rows:
        raise DataError("the train or dev rows differ from those of the run to resume; name the same files")
    if out_of_patience(state, settings):
        raise ValueError(f"setting patience: the run stopped early at step {state.step}; increase it, or set it to 0")
    if state.step >= settings.steps:
        raise ValueError(f"setting steps: expected more than the {state.step} completed steps, found {settings.steps}")
    return state
