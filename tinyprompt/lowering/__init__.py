"""NumPy functions to ONNX graphs. Knows nothing of T5, of devices or, but for one test product, of sessions."""

from tinyprompt.lowering import composed, primitives, rules  # all three fill RULES
from tinyprompt.lowering.graph import RULES, Graph, LoweringError, Traced
from tinyprompt.lowering.trace import is_frozen, lower, named

__all__ = [
    "RULES",
    "Graph",
    "LoweringError",
    "Traced",
    "composed",
    "is_frozen",
    "lower",
    "named",
    "primitives",
    "rules",
]
