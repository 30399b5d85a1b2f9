"""The suite: a small random model of every family, batches, and all results of a correct T5 in float64.

Weights and batches are drawn from SHAKE-256 of their names. Their bytes are the same in every version of NumPy and on
every machine. NumPy computes the results in float64; their last bits may differ between machines.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyprompt import decode, optim, t5, train
from tinyprompt.config import EOS, PAD, Config, weight_shapes
from tinyprompt.data import Batch
from tinyprompt.device import compile
from tinyprompt.files import safetensors
from tinyprompt.files.config import parse_config
from tinyprompt.files.io import check_new, write_folder
from tinyprompt.model import PROMPT
from tinyprompt.tree import Flat, Tree, merge, nest

VERSION = 1
HERE = Path(__file__).parent
# All dimensions of all arrays differ, including the batches below, so that a wrong axis never fits.
SHAPE = dict(vocab_size=41, d_model=14, d_kv=5, num_heads=3, d_ff=22, num_layers=2, num_decoder_layers=2)
SHAPE |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=20)
COMMON = dict(dropout_rate=0.0, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD)
GATED: dict[str, Any] = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
FAMILIES: dict[str, dict[str, Any]] = {
    "t5-1.0": dict(model_type="t5", feed_forward_proj="relu", tie_word_embeddings=True),
    "t5-1.1": dict(model_type="t5", **GATED),
    "mt5": dict(model_type="mt5", **GATED),
    "umt5": dict(model_type="umt5", **GATED),
    "byt5": dict(model_type="t5", **GATED, num_layers=3, num_decoder_layers=1),  # a deep encoder, a shallow decoder
}
CLASSES = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
VECTORS, TARGETS = 7, 6
# The mask of each batch, one text per row. Masked ids are word ids as well, except in "plain".
MASKS = {
    "plain": ("111111111", "111111000", "111110000", "100000000"),  # no prompt
    "holes": ("111111111", "110010111", "000111111", "101010100"),
    "long": ("1" * 29, "1" * 5 + "0" * 17 + "1" * 4 + "000"),  # longer than the distances that have a bucket
}
STEPS, LEARNING_RATE = 10, 0.03
OPTIMIZERS = {"adam": "adam", "adafactor": "adafactor-t5x"}
MAX_NEW_TOKENS, NUM_BEAMS, LENGTH_PENALTY = 8, 3, 1.0


class Case(NamedTuple):
    """A model: its config.json, its weights (float32), and its batches by name."""

    name: str
    raw: dict[str, Any]
    weights: Flat
    batches: dict[str, Flat]

    @property
    def config(self) -> Config:
        return parse_config(self.raw)


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw numbers between -1 and 1 from a name."""
    bits = hashlib.shake_256(f"golden {VERSION} {name}".encode()).digest(2 * math.prod(shape))
    return ((np.frombuffer(bits, "<u2") + 0.5) / 2**15 - 1).reshape(shape)


def draw(name: str) -> Case:
    """Draw the case of a family."""
    raw = SHAPE | FAMILIES[name] | COMMON
    raw["architectures"] = [f"{CLASSES[raw['model_type']]}ForConditionalGeneration"]
    weights = {key: weight(f"{name} {key}", shape) for key, shape in weight_shapes(parse_config(raw)).items()}
    return Case(name, raw, weights, {kind: batch(f"{name} {kind}", kind) for kind in MASKS})


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw a float32 weight at a scale that keeps activations near 1."""
    if name.endswith("layer_norm.weight"):
        return (1 + drawn(name, shape) / 2).astype(np.float32)
    x = drawn(name, shape) * math.sqrt(3 if name.endswith(("shared.weight", "bias.weight")) else 3 / shape[-1])
    if name.endswith(("lm_head.weight", "shared.weight")):
        x[EOS] *= 2  # lets some texts end
    return x.astype(np.float32)


def batch(name: str, kind: str) -> Flat:
    """Draw the arrays of a batch. "plain" has no prompt, and padding at the end."""
    mask = np.array([[*map(int, row)] for row in MASKS[kind]])
    rows = len(mask)

    def ids(part: str, *shape: int) -> np.ndarray:
        first, count = EOS + 2, SHAPE["vocab_size"] - EOS - 2
        return first + ((drawn(f"{name} {part}", shape) + 1) / 2 * count).astype(np.int64)

    length = np.array([TARGETS, 4, 2, 5][:rows])[:, None]
    at = np.arange(TARGETS)
    labels = np.where(at < length - 1, ids("labels", rows, TARGETS), np.where(at == length - 1, EOS, PAD))
    inputs = ids("input_ids", *mask.shape)
    found = Batch(inputs * mask if kind == "plain" else inputs, mask, labels, (at < length).astype(np.float32))
    prompt = {"prompt": (drawn(f"{name} prompt", (VECTORS, SHAPE["d_model"])) * math.sqrt(3)).astype(np.float32)}
    return found._asdict() | ({} if kind == "plain" else prompt)


def results(case: Case, kind: str, device: str = "numpy", dtype: Any = np.float64) -> Flat:
    """Compute all results of a batch of a case, in the order of computation."""
    arrays, config = case.batches[kind], case.config
    weights = {name: x.astype(dtype) for name, x in case.weights.items()}
    params = nest(weights)
    prompt = {PROMPT: arrays["prompt"].astype(dtype)} if "prompt" in arrays else {}
    rows = Batch(*(arrays[name] for name in Batch._fields))
    rows = rows._replace(weights=rows.weights.astype(dtype))
    out = dict(compile(forward, device)(prompt, params, config, rows))
    step = compile(train.loss_and_grads, device)
    loss, grads = step(prompt | weights, params, config, rows)
    out |= {"loss": np.asarray(loss)} | {f"gradient.{name}": grads[name] for name in backward([*weights])}
    if prompt:
        out["gradient.prompt"] = grads[PROMPT]
        for name, optimizer in OPTIMIZERS.items():
            out |= descent(name, optimizer, prompt, lambda p: step(p, params, config, rows)[1])
    prompted = merge(params, prompt)

    def cache(beams: int) -> Any:
        return decode.Cache(prompted, config, rows.input_ids, rows.attention_mask, beams, device)

    count = len(rows.labels)
    out["greedy"] = padded(decode.greedy(cache(1), count, MAX_NEW_TOKENS))
    out["beam"] = padded(decode.beam_search(cache(NUM_BEAMS), count, MAX_NEW_TOKENS, NUM_BEAMS, LENGTH_PENALTY))
    return out


def forward(prompt: Flat, params: Tree, config: Config, rows: Batch) -> Flat:
    """Compute the logits (B, T, V) and every intermediate value by name."""
    values: Flat = {}
    start = t5.shift_right(rows.labels)
    params = merge(params, prompt)
    logits = t5.forward(params, config, rows.input_ids, rows.attention_mask, start, t5.recorder(values))
    kept = {name: x for name, x in values.items() if not name.endswith(".output")}  # a difference of two states
    return kept | {"logits": logits}


def backward(names: list[str]) -> list[str]:
    """Sort the names of weights by the order in which backpropagation computes their gradients."""
    stacks = ("lm_head", "decoder", "encoder")
    forward = sorted(names, key=lambda name: ([name.startswith(stack) for stack in stacks], "final" in name))
    return forward[::-1]


def descent(name: str, optimizer: str, prompt: Flat, grads: Callable[[Flat], Flat]) -> Flat:
    """Train a prompt for a few steps. Returns the prompt after each step."""
    rule, out = optim.OPTIMIZERS[optimizer](), {}
    state = rule.init(prompt)
    for step in range(1, STEPS + 1):
        prompt, state = rule.update(prompt, grads(prompt), state, LEARNING_RATE)
        out[f"{name}.{step}"] = prompt[PROMPT]
    return out


def padded(rows: list[list[int]]) -> np.ndarray:
    """Return ids as an array: each row with its end token, padded with 0."""
    return np.array([[*row, EOS, *[PAD] * MAX_NEW_TOKENS][:MAX_NEW_TOKENS] for row in rows])


def files() -> dict[str, bytes]:
    """Return the bytes of all files of the suite by path."""
    out = {path.name: path.read_bytes() for path in (HERE / "README.md", *sorted(HERE.glob("read.*")))}
    for case in map(draw, FAMILIES):
        found = {kind: results(case, kind) for kind in MASKS}
        index = {
            "golden": VERSION,
            "case": case.name,
            "steps": STEPS,
            "learning_rate": LEARNING_RATE,
            "max_new_tokens": MAX_NEW_TOKENS,
            "num_beams": NUM_BEAMS,
            "length_penalty": LENGTH_PENALTY,
            "order": {kind: [*values] for kind, values in found.items()},
        }
        texts = {"config.json": case.raw, "index.json": index}
        arrays = {"model": case.weights}
        for kind, values in found.items():
            arrays |= {input_of(kind): case.batches[kind], kind: values}
        out |= {f"{case.name}/{name}": (json.dumps(text, indent=1) + "\n").encode() for name, text in texts.items()}
        out |= {f"{case.name}/{name}.safetensors": saved(values) for name, values in arrays.items()}
    return out


def input_of(kind: str) -> str:
    """Return the file name, without its suffix, of the arrays of a batch."""
    return f"{kind}.input"


def saved(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Serialize arrays as a safetensors file."""
    return b"".join(safetensors.dump(arrays, {"format": "np", "golden": str(VERSION)}, safetensors.WITH_IDS))


def write(folder: Path) -> dict[str, int]:
    """Write the suite to a new folder atomically. Returns the size of each file in bytes.

    Raises:
        CheckpointError: The folder is not empty.
    """
    check_new(folder, "suite")
    found = files()
    write_folder(folder, found)
    return {name: len(content) for name, content in found.items()}
