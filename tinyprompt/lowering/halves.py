"""Convert the elementwise work between two bfloat16 products to bfloat16.

On a GPU, the cost of elementwise work is proportional to the size of its arrays. If only the products are in bfloat16,
every product is followed by a cast, work in float32, and a cast back. This pass converts that work if all its readers
are converted or cast it anyway. Arrays that reach a norm, an exponential, a logarithm or an output stay in float32: the
residual stream, the logits and the loss.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from tinyprompt.lowering.graph import Graph, Traced

WORK = {"Add", "Sub", "Mul", "Div", "Neg", "Sigmoid", "Gelu", "Relu", "Softmax", "ReduceSum"}
MOVES = {"Reshape", "Transpose", "Concat", "Slice", "Expand"}
HALF, SINGLE = np.dtype(bfloat16), np.dtype(np.float32)


def is_cast(x: Traced, to: np.dtype) -> bool:
    """Return whether a node casts between float32 and bfloat16, to this dtype."""
    return x.op == "Cast" and x.dtype == to and {x.dtype, x.inputs[0].dtype} == {HALF, SINGLE}


def convertible(nodes: Sequence[Traced], outputs: Iterable[Any]) -> set[str]:
    """Return the names of the nodes to compute in bfloat16.

    Such a node has an input from a product or from another such node. All its readers are such nodes or casts.
    """
    users: dict[str, list[Traced]] = {}
    for x in nodes:
        for i in x.inputs:
            users.setdefault(i.name, []).append(x)
    products = {x.name for x in nodes if is_cast(x, SINGLE)}
    kept = {x.name for x in outputs if isinstance(x, Traced)}
    found = {x.name for x in nodes if x.op in WORK | MOVES and x.dtype == SINGLE and x.name not in kept}
    while True:
        before = len(found)
        for x in nodes:
            if x.name in found and not any(i.name in products | found for i in x.inputs):
                found.discard(x.name)
        for x in reversed(nodes):
            if x.name in found and not all(u.name in found or is_cast(u, HALF) for u in users.get(x.name, ())):
                found.discard(x.name)
        if len(found) == before:
            return found


def in_halves(graph: Graph, outputs: Sequence[Any]) -> list[Any]:
    """Rewrite a graph with the convertible nodes in bfloat16. Returns the new outputs."""
    found, old = convertible(graph.nodes, outputs), graph.clear()
    new: dict[str, Traced] = {}

    def half(x: Traced) -> Traced:
        x = new.get(x.name, x)
        if is_cast(x, SINGLE):
            return x.inputs[0]
        if x.value is not None:
            return graph.array(x.value.astype(HALF))
        return x if x.dtype == HALF else graph.emit("Cast", x, shape=x.shape, dtype=HALF, to=HALF)

    for x in old:
        if is_cast(x, HALF):
            new[x.name] = half(x.inputs[0])
        elif x.name in found:
            inputs = [half(i) if i.dtype == SINGLE else new.get(i.name, i) for i in x.inputs]
            new[x.name] = graph.emit(str(x.op), *inputs, shape=x.shape, dtype=HALF, **x.attributes)
        else:
            inputs = [new.get(i.name, i) for i in x.inputs]
            widened = x.op == "Cast" and x.inputs[0].op is None  # every use casts separately
            new[x.name] = graph.emit(str(x.op), *inputs, shape=x.shape, dtype=x.dtype, anew=widened, **x.attributes)
    return [new.get(x.name, x) if isinstance(x, Traced) else x for x in outputs]
