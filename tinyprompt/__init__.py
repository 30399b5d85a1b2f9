"""tinyprompt: learn a soft prompt for a frozen T5 by backpropagation through NumPy."""

__version__ = "0.1.0"

from tinyprompt.check import check_gradient, check_model, check_vjp
from tinyprompt.checkpoint import CheckpointError, Model, load
from tinyprompt.data import DataError, Row, label_words, read_rows
from tinyprompt.prompts import Prompt, load_prompt, save_prompt
from tinyprompt.train import Settings, predict, tune

__all__ = [
    "CheckpointError",
    "DataError",
    "Model",
    "Prompt",
    "Row",
    "Settings",
    "check_gradient",
    "check_model",
    "check_vjp",
    "label_words",
    "load",
    "load_prompt",
    "predict",
    "read_rows",
    "save_prompt",
    "tune",
]
