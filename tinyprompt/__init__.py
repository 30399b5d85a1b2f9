"""tinyprompt: learn a soft prompt for a frozen T5 by backpropagation through NumPy.

The core modules, in reading order, are `tree`, `ops`, `config`, `t5`, `methods`, `optim`, `data` and `train`.
Importing the package opens no device and changes nothing outside it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tinyprompt import config, data, methods, ops, optim, t5, train, tree
from tinyprompt.config import Config
from tinyprompt.data import Batch, Row, batch_of, label_words
from tinyprompt.device import compile
from tinyprompt.ensemble import Ensemble, ensemble
from tinyprompt.errors import CheckpointError, DataError, DeviceError, TinypromptError
from tinyprompt.model import PROMPT, Model, Prompt, Tokenizer
from tinyprompt.predict import Answer, answer, intermediates, label_scores, predict, stream
from tinyprompt.settings import Settings
from tinyprompt.train import Progress
from tinyprompt.version import VERSION

if TYPE_CHECKING:
    from tinyprompt.check.ledger import Case, Report, check_gradient, check_model, check_vjp, draw, in_dtype
    from tinyprompt.classifier import PromptClassifier
    from tinyprompt.describe import nearest_pieces
    from tinyprompt.files.models import load
    from tinyprompt.files.prompts import Prompts, load_prompt, save_prompt
    from tinyprompt.files.tables import read_rows
    from tinyprompt.lowering import Graph, LoweringError, lower
    from tinyprompt.tasks.registry import Scores
    from tinyprompt.tuning import Gradient, Result, evaluate, gradient, run, tune

__version__ = VERSION

# Imported on first use: these modules read files, trace functions, open devices or draw.
_LAZY = {
    name: module
    for module, names in {
        "check.ledger": "Case Report check_gradient check_model check_vjp draw in_dtype",
        "classifier": "PromptClassifier",
        "files.models": "load",
        "files.prompts": "Prompts load_prompt save_prompt",
        "files.tables": "read_rows",
        "describe": "nearest_pieces",
        "lowering": "Graph LoweringError lower",
        "tasks.registry": "Scores",
        "tuning": "Gradient Result evaluate gradient run tune",
    }.items()
    for name in names.split()
}

__all__ = [
    "PROMPT",
    "Answer",
    "Batch",
    "Case",
    "CheckpointError",
    "Config",
    "DataError",
    "DeviceError",
    "Ensemble",
    "Gradient",
    "Graph",
    "LoweringError",
    "Model",
    "Progress",
    "Prompt",
    "PromptClassifier",
    "Prompts",
    "Report",
    "Result",
    "Row",
    "Scores",
    "Settings",
    "TinypromptError",
    "Tokenizer",
    "answer",
    "batch_of",
    "check_gradient",
    "check_model",
    "check_vjp",
    "compile",
    "config",
    "data",
    "draw",
    "ensemble",
    "evaluate",
    "gradient",
    "in_dtype",
    "intermediates",
    "label_scores",
    "label_words",
    "load",
    "load_prompt",
    "lower",
    "methods",
    "nearest_pieces",
    "ops",
    "optim",
    "predict",
    "read_rows",
    "run",
    "save_prompt",
    "stream",
    "t5",
    "train",
    "tree",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'tinyprompt' has no attribute {name!r}")
    return getattr(import_module(f"tinyprompt.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
