"""Lower NumPy functions to ONNX graphs. This folder imports neither the T5 model nor devices."""

from tinyprompt.lowering import composed, gradients, primitives, rules  # these fill RULES and GRADIENTS
from tinyprompt.lowering.graph import RULES, Graph, LoweringError, Traced
from tinyprompt.lowering.trace import graph_key, is_frozen, is_sealed, lower, named, state_of

__all__ = [
    "RULES",
    "Graph",
    "LoweringError",
    "Traced",
    "composed",
    "gradients",
    "graph_key",
    "is_frozen",
    "is_sealed",
    "lower",
    "named",
    "primitives",
    "rules",
    "state_of",
]
