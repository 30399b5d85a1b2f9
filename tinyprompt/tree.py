"""Parameters: a flat dict of dotted names, as in a file, or the nested dict that a model reads."""

from collections.abc import Iterator
from typing import Any

import numpy as np

Flat = dict[str, np.ndarray]
Tree = dict[str, Any]


class CheckpointError(ValueError):
    """A file that cannot be used; the message names the file, the key, and what was expected."""


def nest(flat: Flat) -> Tree:
    """`{"a.b": x}` to `{"a": {"b": x}}`. Raises ValueError where a name is also a prefix of another."""
    tree: Tree = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"parameter {name!r}: a shorter name {part!r} already holds an array")
        if last in node:
            raise ValueError(f"parameter {name!r} is also the beginning of another name")
        node[last] = value
    return tree


def flatten(tree: Tree, prefix: str = "") -> Flat:
    """The inverse of `nest`."""
    flat: Flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def merge(tree: Tree, delta: Flat) -> Tree:
    """A tree with the arrays of `delta` added or replaced; `tree` itself is not changed."""
    tree = dict(tree)
    for name, value in delta.items():
        head, _, rest = name.partition(".")
        tree[head] = merge(tree.get(head, {}), {rest: value}) if rest else value
    return tree


def count(flat: Flat) -> int:
    """Number of scalars in a flat dict."""
    return sum(int(np.size(value)) for value in flat.values())


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in dicts, lists, tuples and named tuples, each with its dotted name."""
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list | tuple):
        children = list(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    else:
        yield name, value
        return
    for key, child in children:
        yield from leaves(child, f"{name}.{key}" if name else str(key))


def refill(value: Any, new: Iterator[Any]) -> Any:
    """The same dicts, lists and tuples with the leaves that come next in `new`."""
    if isinstance(value, dict):
        return {key: refill(child, new) for key, child in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(refill(child, new) for child in value))
    if isinstance(value, list | tuple):
        return type(value)([refill(child, new) for child in value])
    return next(new)
