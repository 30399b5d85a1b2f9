"""tinyprompt: learn a soft prompt for a frozen T5 by backpropagation through NumPy."""

__version__ = "0.1.0"

from tinyprompt.data import Row, label_words, read_rows
from tinyprompt.ensemble import Ensemble, ensemble
from tinyprompt.errors import CheckpointError, DataError, DeviceError
from tinyprompt.files.models import load
from tinyprompt.files.prompts import Prompts, load_prompt, save_prompt
from tinyprompt.model import Model, Prompt
from tinyprompt.predict import Answer, answer, intermediates, predict
from tinyprompt.settings import Settings
from tinyprompt.tasks.registry import evaluate
from tinyprompt.tools.check import check_gradient, check_model, check_vjp
from tinyprompt.train import gradient, tune

__all__ = [
    "Answer",
    "CheckpointError",
    "DataError",
    "DeviceError",
    "Ensemble",
    "Model",
    "Prompt",
    "Prompts",
    "Row",
    "Settings",
    "answer",
    "check_gradient",
    "check_model",
    "check_vjp",
    "ensemble",
    "evaluate",
    "gradient",
    "intermediates",
    "label_words",
    "load",
    "load_prompt",
    "predict",
    "read_rows",
    "save_prompt",
    "tune",
]
