"""Parameters as a flat dict of dotted names, as in a file, or as a nested dict, as in the model."""

from collections.abc import Iterator
from typing import Any

import numpy as np

Array = Any  # a NumPy array, or the object in its place while autograd or the lowering traces a function
Flat = dict[str, np.ndarray]
Tree = dict[str, Any]


def nest(flat: Flat) -> Tree:
    """Turn `{"a.b": x}` into `{"a": {"b": x}}`.

    Raises:
        ValueError: A name is also a prefix of another name.
    """
    tree: Tree = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"parameter {name!r}: the shorter name {part!r} is also a parameter")
        if last in node:
            raise ValueError(f"parameter {name!r} is also a prefix of another name")
        node[last] = value
    return tree


def flatten(tree: Tree, prefix: str = "") -> Flat:
    """Turn `{"a": {"b": x}}` into `{"a.b": x}`: the inverse of `nest`."""
    flat: Flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def merge(tree: Tree, delta: Flat) -> Tree:
    """Return a tree with the arrays of `delta` added or replaced. `tree` itself does not change."""
    tree = dict(tree)
    for name, value in delta.items():
        head, _, rest = name.partition(".")
        tree[head] = merge(tree.get(head, {}), {rest: value}) if rest else value
    return tree


def freeze(array: np.ndarray) -> np.ndarray:
    """Return a permanently read-only view. Setting `array.flags.writeable = True` raises an error."""
    bits = array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array  # bfloat16 has no buffer
    buffer: Any = bits
    return np.asarray(memoryview(buffer).toreadonly()).view(array.dtype)


def count(flat: Flat) -> int:
    """Count the scalars of a flat dict."""
    return sum(int(np.size(value)) for value in flat.values())


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of nested dicts, lists, tuples and named tuples with its dotted name."""
    waiting = [(name, value)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            children = list(value.items())
        elif isinstance(value, list | tuple):
            children = list(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
        else:
            yield name, value
            continue
        waiting += [(f"{name}.{key}" if name else str(key), child) for key, child in reversed(children)]


def refill(value: Any, new: Iterator[Any]) -> Any:
    """Return the same nested containers with new leaves, in the order of `leaves`."""
    if isinstance(value, dict):
        return {key: refill(child, new) for key, child in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(refill(child, new) for child in value))
    if isinstance(value, list | tuple):
        return type(value)([refill(child, new) for child in value])
    return next(new)
