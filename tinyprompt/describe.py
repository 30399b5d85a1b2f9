"""Describe a prompt, a frozen model or an ONNX file, as numbers and as text.

A prompt is interpreted by the nearest vocabulary pieces of its vectors (Lester et al. 2021, arXiv:2104.08691,
section 7). Two prompts are compared by the cosine of their mean vectors (Vu et al. 2022, arXiv:2110.07904).
Dimensions: P prompt vectors, D d_model, V vocabulary size, N prompts.
"""

import math
import re
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tinyprompt import display, ops
from tinyprompt.device import version
from tinyprompt.errors import CheckpointError, DeviceError
from tinyprompt.lowering.graph import SHORT, array_kind, listing
from tinyprompt.model import PROMPT, Model, Prompt
from tinyprompt.settings import Settings
from tinyprompt.tree import count, flatten

ROWS = 4096  # vocabulary rows that are widened and compared per step
EQUAL = 0.99  # cosine above which two vectors count as equal
WIDTH = 100  # columns of printed text


def unit(x: np.ndarray) -> np.ndarray:
    """Scale every vector (..., D) to length 1, in float32. Zero vectors stay zero."""
    x = np.asarray(x, np.float32)
    x = x / np.maximum(np.abs(x).max(-1, keepdims=True), np.finfo(np.float32).tiny)  # keeps squares from overflowing
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def nearest_pieces(prompt: np.ndarray, table: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the k rows of an embedding table with the largest cosine to each vector of a prompt.

    Args:
        prompt: Vectors (P, D) of any float dtype.
        table: Embedding table (V, D) of any float dtype.
        k: Number of rows to return.

    Returns:
        The ids (P, k) int64 and the cosines (P, k) float32, in descending order of the cosine.

    Raises:
        ValueError: The widths differ.

    Example:
        >>> ids, cosines = nearest_pieces(prompt.array, model.params["shared"]["weight"], 5)
    """
    prompt = unit(prompt)
    if prompt.shape[-1] != table.shape[-1]:
        raise ValueError(f"prompt vectors of {prompt.shape[-1]} numbers, but d_model of the model is {table.shape[-1]}")
    ids, best = np.empty((len(prompt), 0), np.int64), np.empty((len(prompt), 0), np.float32)
    for start in range(0, len(table), ROWS):
        cosines = prompt @ unit(ops.widen(table[start : start + ROWS])).T
        here = np.broadcast_to(np.arange(start, start + cosines.shape[1]), cosines.shape)
        ids, best = np.concatenate([ids, here], 1), np.concatenate([best, cosines], 1)
        order = np.argsort(-best, 1, kind="stable")[:, :k]
        ids, best = np.take_along_axis(ids, order, 1), np.take_along_axis(best, order, 1)
    return ids, best


def similarity(prompts: Mapping[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    """Return the names and the cosines of the mean vectors (N, N) float32. Unequal widths give NaN."""
    means = [unit(np.mean(prompt, 0)) for prompt in prompts.values()]
    cosines = [[a @ b if a.shape == b.shape else np.nan for b in means] for a in means]
    return list(prompts), np.array(cosines, np.float32)


def near_equal(prompt: np.ndarray) -> int:
    """Count the vectors of a prompt (P, D) that have a cosine above 0.99 with another vector."""
    cosines = unit(prompt) @ unit(prompt).T
    np.fill_diagonal(cosines, 0)
    return int((cosines.max(1) > EQUAL).sum())


def describe_prompt(prompt: Prompt) -> dict[str, Any]:
    """Describe a prompt without its model: arrays, settings, history, and the norms of a soft prompt."""
    out: dict[str, Any] = {
        "arrays": {key: {"shape": list(x.shape), "dtype": str(x.dtype)} for key, x in prompt.params.items()},
        "model": prompt.model,
        "fingerprint": prompt.fingerprint,
        "label_words": prompt.label_words,
        "settings": prompt.settings,
        "history": history(prompt),
    }
    if prompt.params.keys() == {PROMPT}:
        norms = np.linalg.norm(prompt.array.astype(np.float64), axis=-1)
        out["norm"] = {"min": float(norms.min()), "mean": float(norms.mean()), "max": float(norms.max())}
        out["near_equal"] = near_equal(prompt.array)
    return out


def history(prompt: Prompt) -> list[dict[str, float]]:
    """Return the dev scores in the training state of a prompt: step, score and dev loss."""
    rows = (prompt.train_state or {}).get("scores", np.zeros((0, 3)))
    return [dict(zip(("step", "dev", "dev_loss"), map(float, row), strict=True)) for row in rows.reshape(-1, 3)]


def read_prompt(prompt: Prompt, name: str, model: Model, k: int) -> dict[str, Any]:
    """Return the k nearest pieces of every vector, and measures of their reliability.

    `cosine` is the mean cosine to the nearest piece, and `random` the same for random normal vectors. `shared` counts
    the vectors that have the same nearest piece as another vector.
    """
    found, table = prompt.vectors(name), model.params["shared"]["weight"][: len(model.tokenizer)]
    ids, cosines = nearest_pieces(found, table, k)
    random = np.random.default_rng(210408691).normal(size=found.shape)  # a fixed seed, used nowhere else
    times = Counter(ids[:, 0].tolist())
    return {
        "cosine": float(cosines[:, 0].mean()),
        "random": float(nearest_pieces(random, table, 1)[1].mean()),
        "shared": sum(n for n in times.values() if n > 1),
        "nearest": [
            [{"piece": model.tokenizer.piece(i), "cosine": round(float(c), 4)} for i, c in zip(*row, strict=True)]
            for row in zip(ids.tolist(), cosines, strict=True)
        ],
    }


def describe_vocabulary(model: Model) -> dict[str, Any]:
    """Return the name of a model, the number of its pieces, and the mean norm of their embeddings."""
    table = model.params["shared"]["weight"][: len(model.tokenizer)]
    parts = [ops.widen(table[start : start + ROWS]) for start in range(0, len(table), ROWS)]
    norm = sum(float(np.linalg.norm(part, axis=-1).sum(dtype=np.float64)) for part in parts) / len(table)
    return {"model": model.name, "pieces": len(table), "norm": norm}


def describe_model(model: Model) -> dict[str, Any]:
    """Return the configuration of a model, the shape and dtype of every weight, and their total size."""
    flat = flatten(model.params)
    return {
        "name": model.name,
        "config": asdict(model.config),
        "weights": {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in flat.items()},
        "parameters": count(flat),
        "bytes": sum(x.nbytes for x in flat.values()),
        "pieces": len(model.tokenizer),
    }


def cut(text: str, width: int) -> str:
    """Truncate the beginning of a text to fit the width of a column."""
    return text if len(text) <= width else "…" + text[1 - width :]


def prompt_text(out: Mapping[str, Any]) -> str:
    """Format one or several prompts as tables. For a single prompt, add its origin and its nearest pieces."""
    soft = {name: p for name, p in out["prompts"].items() if "norm" in p}
    lines = [*soft_lines(soft, out["vocabulary"])] if soft else []
    for name, p in out["prompts"].items():
        if name not in soft:
            arrays = [f"  {key}: {array_kind(x['dtype'], x['shape'])}" for key, x in p["arrays"].items()]
            lines += [f"{name}: {p['settings'].get('method', 'a prefix')}, {len(arrays)} arrays", *arrays]
    if len(soft) > 1:
        lines += ["", *similarity_lines(out["similarity"]["names"], out["similarity"]["cosine"])]
    if len(out["prompts"]) == 1:
        (prompt,) = out["prompts"].values()
        lines += [*origin_lines(prompt), *nearest_lines(prompt)]
    return "\n".join(lines)


def soft_lines(prompts: Mapping[str, Any], vocabulary: Mapping[str, Any] | None) -> list[str]:
    """Format a line for each soft prompt with its shape, norms and similarity, and explain the columns."""
    arrays = {
        name: array_kind(*(p["arrays"][PROMPT][key] for key in ("dtype", "shape"))) for name, p in prompts.items()
    }
    shape = max(map(len, arrays.values()))
    wide = min(WIDTH - 60 - shape, max(len(name) for name in ("prompt", *prompts)))
    start = f"{'prompt':{wide}}  {'':{shape}}  "
    lines = [
        f"{'':{len(start)}}{'norm of a vector':^24}   near-     nearest piece",
        f"{start}{'min':>8}{'mean':>8}{'max':>8}   equal{'cosine':>8}{'random':>8}{'shared':>8}",
    ]
    for name, p in prompts.items():
        norms = "".join(f"{short(p['norm'][key]):>8}" for key in ("min", "mean", "max"))
        nearest = f"{'-':>8}" * 3
        if "nearest" in p:
            nearest = "".join(f"{x:>8}" for x in (decimals(p["cosine"]), decimals(p["random"]), p["shared"]))
        lines.append(f"{cut(name, wide):{wide}}  {arrays[name]:{shape}}  {norms}{p['near_equal']:8}{nearest}")
    lines += ["", f"near-equal: vectors with a cosine above {EQUAL} to another"]
    if vocabulary:
        lines += [
            "cosine: mean, to the nearest piece; random: the same for random normal vectors",
            "shared: vectors whose nearest piece is that of another vector too",
            f"vocabulary of {vocabulary['model']}: {vocabulary['pieces']:,} pieces, mean norm {vocabulary['norm']:.4g}",
        ]
    if any("nearest" not in p for p in prompts.values()):
        lines.append("nearest pieces need the model of the prompt: name it with --model")
    return lines


def origin_lines(prompt: Mapping[str, Any]) -> list[str]:
    """Format the model, the label words, the changed settings, and the dev scores of a prompt."""
    if not prompt["model"]:
        return []
    words = f"; labels: {display.listing(prompt['label_words'])}" if prompt["label_words"] else ""
    digest = f" (sha256 {prompt['fingerprint'][:12]}...)" if prompt["fingerprint"] else ""
    lines = [f"tuned on {prompt['model']}{digest}{words}"]
    changed = [f"{k} {v}" for k, v in prompt["settings"].items() if v != asdict(Settings()).get(k)]
    lines += [textwrap.fill(f"settings: {', '.join(changed)}", WIDTH, subsequent_indent="  ")] if changed else []
    scores = [f"{row['step']:.0f}: {row['dev']:.3f}" for row in prompt["history"]]
    return lines + ([textwrap.fill(f"dev scores by step: {', '.join(scores)}", WIDTH)] if scores else [])


def short(x: float) -> str:
    """Format a number with four digits, or two if the column of eight is too narrow."""
    text = f"{x:.4g}"
    return text if len(text) < 8 else f"{x:.1e}"


def decimals(x: float | None) -> str:
    """Format a number with two decimals: `.66`."""
    return "-" if x is None else f"{x:.2f}".replace("0.", ".")


def similarity_lines(names: list[str], cosines: np.ndarray) -> list[str]:
    """Format the lower triangle of a cosine matrix, in blocks that fit the line."""
    labels = [f"{cut(name, 17)} {i:2}" for i, name in enumerate(names, 1)]
    wide = max(map(len, labels))
    columns = (WIDTH - wide) // 5
    lines = ["similarity: cosine of the mean vectors"]
    for start in range(0, len(names) - 1, columns):
        stop = min(start + columns, len(names) - 1)
        lines.append(" " * wide + "".join(f"{i:5}" for i in range(start + 1, stop + 1)))
        for i in range(start + 1, len(names)):
            row = (cosines[i][j] for j in range(start, min(stop, i)))
            lines.append(f"{labels[i]:>{wide}}" + "".join(f"{decimals(c):>5}" for c in row))
        if not start:
            lines.insert(2, f"{labels[0]:>{wide}}")
    return lines


def nearest_lines(prompt: Mapping[str, Any]) -> list[str]:
    """Format a line for each vector of a prompt, with its nearest pieces."""
    rows = prompt.get("nearest", [])
    if not rows:
        return []
    wide = max(4, min((WIDTH - 6) // len(rows[0]) - 7, max(len(near["piece"]) for row in rows for near in row)))
    cells = [[f"{near['piece'][:wide]:{wide}} {decimals(near['cosine']):>4}" for near in row] for row in rows]
    return ["", "vector  nearest pieces, cosine", *(f"{i:6}  " + "  ".join(row) for i, row in enumerate(cells))]


def model_text(out: Mapping[str, Any]) -> str:
    """Format the configuration and the weights of a model. Equal blocks of a stack share a line."""
    blocks: dict[tuple[str, str, str], list[int]] = {}
    sizes: Counter[tuple[str, str, str]] = Counter()
    for name, x in out["weights"].items():
        head, number, tail = re.fullmatch(r"(?:(.*\.block\.)(\d+))?(.*)", name).groups("")  # type: ignore[union-attr]
        key = head, tail, array_kind(x["dtype"], x["shape"])
        blocks.setdefault(key, []).append(int(number or 0))
        sizes[key] += math.prod(x["shape"])
    lines = []
    for key, numbers in blocks.items():
        head, tail, kind = key
        span = f"{numbers[0]}..{numbers[-1]}" if numbers == list(range(numbers[0], numbers[-1] + 1)) else str(numbers)
        number = ("" if not head else str(numbers[0])) if len(numbers) == 1 else span
        lines.append((f"  {head}{number}{tail}: {kind}", f"{sizes[key]:,}"))
    config = ", ".join(f"{key}\xa0{value}" for key, value in out["config"].items())
    wide, digits = (max(len(line[i]) for line in lines) for i in (0, 1))
    return "\n".join(
        [
            f"{out['name']}: T5, {out['parameters']:,} parameters in {out['bytes']:,} bytes; {out['pieces']:,} pieces",
            textwrap.fill(config, WIDTH, initial_indent="  ", subsequent_indent="  ").replace("\xa0", " "),
            *(f"{left:{wide}}  {right:>{digits}}" for left, right in lines),
        ]
    )


def describe_graph(path: Path) -> dict[str, Any]:
    """Describe an ONNX file in the form of a printed `Graph`: a line for each input, constant and node.

    External data are not read.

    Raises:
        CheckpointError: The file is not an ONNX model.
        DeviceError: onnx is not installed.
    """
    if not version("onnx"):
        raise DeviceError(f"{path}: onnx is not installed; pip install 'tinyprompt-t5[ort]'")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except DecodeError:
        raise CheckpointError(f"{path}: not an ONNX model, or truncated; export or download it again") from None
    if not model.graph.output:
        raise CheckpointError(f"{path}: not an ONNX model: it has no outputs")
    try:
        return _graph(model)
    except (KeyError, TypeError, ValueError) as error:  # unknown types and names
        raise CheckpointError(f"{path}: damaged: {error!r}; export or download it again") from None


def _graph(model: Any) -> dict[str, Any]:
    """Describe an onnx.ModelProto."""
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # an invalid graph, or one above 2 GiB: missing shapes stay unknown
        graph = model.graph
    kinds = {x.name: value_kind(x.type) for x in (*graph.value_info, *graph.input, *graph.output)}
    kinds |= {x.name: tensor_kind(x) for x in graph.initializer}
    texts = {x.name: tensor_value(x) for x in graph.initializer}

    def named(name: str) -> str:
        return f"{name}: {kinds.get(name, '?')}"

    inputs = [x.name for x in graph.input if x.name not in texts]
    given = [(named(name), "input") for name in inputs]
    given += [(named(x.name), f"constant{place(x)}") for x in graph.initializer if texts[x.name] is None]
    nodes = [
        (map(named, filter(None, x.output)), x.op_type, x.input, {a.name: attribute(a) for a in x.attribute})
        for x in graph.node
    ]
    outputs = [x.name for x in graph.output]
    return {
        "inputs": {name: kinds[name] for name in inputs},
        "outputs": {name: kinds[name] for name in outputs},
        "operators": dict(Counter(node.op_type for node in graph.node).most_common()),
        "lines": listing(given, texts, nodes, outputs),
    }


def dtype_name(kind: int) -> str:
    """Return NumPy's name for an ONNX element type."""
    from onnx import TensorProto, helper

    return "string" if kind == TensorProto.STRING else str(helper.tensor_dtype_to_np_dtype(kind))


def value_kind(kind: Any) -> str:
    """Format dtype and shape of an onnx.TypeProto: `?` for unknown sizes, names for symbolic ones."""
    tensor = kind.tensor_type
    if not tensor.elem_type:
        return "?"
    if not tensor.HasField("shape"):
        return f"{dtype_name(tensor.elem_type)}[...]"
    sizes = [d.dim_param or (d.dim_value if d.HasField("dim_value") else "?") for d in tensor.shape.dim]
    return array_kind(dtype_name(tensor.elem_type), sizes)


def tensor_kind(tensor: Any) -> str:
    """Format dtype and shape of an onnx.TensorProto."""
    return array_kind(dtype_name(tensor.data_type), tensor.dims)


def tensor_value(tensor: Any) -> str | None:
    """Format the values of a short onnx.TensorProto, if the file itself contains them."""
    from onnx import numpy_helper

    short = np.prod(tensor.dims, dtype=float) <= SHORT and not tensor.external_data
    return str(numpy_helper.to_array(tensor).tolist()) if short else None


def place(tensor: Any) -> str:
    """Return the name of the external file with the values of an onnx.TensorProto, or ""."""
    return "".join(f" in {entry.value}" for entry in tensor.external_data if entry.key == "location")


def attribute(given: Any) -> str:
    """Format the value of an onnx.AttributeProto."""
    from onnx import AttributeProto, helper

    value = helper.get_attribute_value(given)
    if given.name in ("to", "dtype") and given.type == AttributeProto.INT:
        return dtype_name(value)
    if given.type == AttributeProto.TENSOR:
        return tensor_value(value) or tensor_kind(value)
    if given.type == AttributeProto.GRAPH:
        return f"<{len(value.node)} nodes>"
    return str(plain(value))


def plain(value: Any) -> Any:
    """Convert bytes to text, and float32 numbers to their shortest form. Lists are converted element by element."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, float):
        return float(str(np.float32(value)))
    if isinstance(value, list):
        return [plain(x) for x in value]
    return value if isinstance(value, int) else "..."
