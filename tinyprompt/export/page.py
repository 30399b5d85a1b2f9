"""Write a page that trains a prompt in a browser: the graphs of `export`, ONNX Runtime's build for browsers, demo rows.

The page is the files of this package in `web/`, as they are. Beside them lie files of an npm package, so that it asks
no server but its own.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from tinyprompt import ops, t5
from tinyprompt.config import Config
from tinyprompt.data import Batch
from tinyprompt.decode import ranked
from tinyprompt.errors import CheckpointError
from tinyprompt.export import npm
from tinyprompt.export.graphs import Export, Exported, Shape, step
from tinyprompt.export.npm import Package
from tinyprompt.export.wordpiece import bert, between_letters
from tinyprompt.files import hub
from tinyprompt.files.io import Content
from tinyprompt.model import PROMPT, Model
from tinyprompt.tasks.registry import DEMO, DEMO_TASKS
from tinyprompt.tree import Array, Flat, Tree, merge

WEB = Path(__file__).parent / "web"
STYLE = Path(__file__).parents[1] / "style.css"  # of all pages
SCRIPT = ("app.js", "rows.js", "show.js", "inside.js", "draw.js", "tune.js", "tokenizer.js")
PAGE = ("index.html", *SCRIPT, "LICENSES.txt")
# WebAssembly, and WebGPU with it; each is a script and what it loads.
SCRIPTS = {
    Package(
        "onnxruntime-web",
        "1.30.0",
        "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    ): (
        "dist/ort.wasm.bundle.min.mjs",
        "dist/ort-wasm-simd-threaded.wasm",
        "dist/ort.webgpu.bundle.min.mjs",
        "dist/ort-wasm-simd-threaded.asyncify.wasm",
    )
}
SHAPE = Shape(batch_size=8, input_tokens=48, target_tokens=4, prompt_length=20)
SETTINGS = {"steps": 100, "learning_rate": 0.3}  # that the page begins with
LABELS = 8  # label words that a task may have
# Texts by which the page checks that its tokenizer says what ours does.
PROBES = (
    "Two goals in the last minute.",
    "  Crème  brûlée, 3½ € — naïve?  ",
    "don't_stop\t東京 it's 1,000",
    "x" * 120,
    "",
)


def rank(
    prompt: Array, input_ids: Array, attention_mask: Array, labels: Array, weights: Array, params: Tree, config: Config
) -> Flat:
    """Compute the log probability of each label word: (B, N). The seven parameters name the inputs of the graph."""
    found = ranked(merge(params, {PROMPT: prompt}), config, input_ids, attention_mask, labels, weights)
    return {"log_probability": found.astype(np.float32)}


def look(prompt: Array, input_ids: Array, attention_mask: Array, params: Tree, config: Config) -> Flat:
    """Compute what the page shows of a prompt: (P, V), (B, L, P), (B, L, D). The parameters name the inputs.

    cosine: of each vector and each row of the embedding table. attention: the weight of each vector at each token of
    the text, the mean over the layers and heads of the encoder. embedding: the rows of the table that the text reads.
    """
    seen: Flat = {}
    t5.encode(merge(params, {PROMPT: prompt}), config, input_ids, attention_mask, t5.recorder(seen))
    weights = [x for name, x in seen.items() if name.endswith("attention_weights")]
    table = params["shared"]["weight"]
    cosine = ops.linear(prompt / length(prompt), table) / length(ops.widen(table))[:, 0]
    text = slice(len(prompt), None)
    attention = sum(weights[1:], weights[0]).mean(1)[:, text, : len(prompt)] / np.float32(len(weights))
    return {"cosine": cosine, "attention": attention, "embedding": seen["encoder.embedding"][:, text]}


def length(x: Array) -> Array:
    """Return the Euclidean norm of each vector, and 1e-15 for a zero vector: (..., D) -> (..., 1)."""
    return np.sqrt((x * x).sum(-1, keepdims=True) + np.float32(1e-30))


def export_page(
    folder: str | Path | None, out: str | Path, shape: Shape = SHAPE, prompt: str | Path | None = None
) -> Exported:
    """Write a folder for any web server: a page that trains a prompt. All files are written, or none.

    folder, shape, prompt: as for `export`; the rows of a step, and of a text that is answered, have these shapes.
    Raises as `export`; CheckpointError also for a tokenizer that the page cannot read, or scripts that it cannot fetch.
    """
    exported = Export(folder, Path(out), shape, prompt)
    model, tasks = exported.model, [f"{task}.{part}.tsv" for task in DEMO_TASKS for part in ("train", "test")]
    files: dict[str, Content] = {name: (WEB / name).read_bytes() for name in PAGE}
    files |= {STYLE.name: STYLE.read_bytes()} | {name: (DEMO / name).read_bytes() for name in tasks}
    vendor = scripts()
    large = {name: path.stat().st_size for path, name in exported.sources.items()}
    large |= {name: len(content) for name, content in vendor.items() if name.endswith(".wasm")}
    about = described(model, shape, exported.sources.values())
    about |= {"bytes": large, "init": "prompt" if prompt else "labels"}
    files |= tokenizer_files(model) | vendor | {"page.json": json.dumps(about).encode()}
    ids, labels = np.zeros((1, shape.input_tokens), np.int64), np.zeros((1, LABELS, shape.target_tokens), np.int64)
    one = exported.inputs | Batch(ids, ids, labels, labels.astype(np.float32))._asdict()
    text = {name: one[name] for name in ("prompt", "input_ids", "attention_mask")}
    return exported.write({step: exported.inputs, rank: one, look: text}, files)


def described(model: Model, shape: Shape, weights: Iterable[str]) -> dict[str, Any]:
    """Return the settings of the page: the shapes of the graphs, the first settings, and probes of the tokenizer."""
    probes = [{"text": text, "ids": model.tokenizer.encode(text)} for text in PROBES]
    shapes = {**shape._asdict(), "labels": LABELS}
    size = {folder: size for size, folder in hub.BUILT_IN.items()}.get(model.name, model.name)
    about: dict[str, Any] = {"model": model.name, "model_name": size, **shapes, **SETTINGS}
    about["weights_dtype"] = str(model.params["shared"]["weight"].dtype)
    return about | {"tasks": DEMO_TASKS, "weights": [*weights], "probes": probes}


def tokenizer_files(model: Model) -> dict[str, Content]:
    """Return the tokenizer for tokenizer.js. Raises CheckpointError for a tokenizer whose ids the page might not give.

    The page can have WordPiece after BERT's normaliser and splitter, which look at one character at a time.
    """
    try:
        words, settings = bert(model.tokenizer)
    except ValueError as error:
        raise CheckpointError(f"{model.name}: the page reads {error}; take a built-in model") from None
    about = settings["model"]
    rules = {
        "unk": about["vocab"][about["unk_token"]],
        "prefix": about["continuing_subword_prefix"],
        "longest": about["max_input_chars_per_word"],
        "vocabulary": about["vocab"],
        "special": {t.content: id for id, t in words.added.items()},
        "table": character_table(words.pipeline),
    }
    return {"tokenizer.json": json.dumps(rules).encode()}


def character_table(pipeline: tokenizers.Tokenizer) -> list[tuple[int, int, str]]:
    """Return what characters become, [first, last, text]: a browser's Unicode may be another version.

    Breaks between words are spaces. A letter that no piece has is U+FFFD. The letters that stay are left out.
    """
    known = {*"".join(pipeline.get_vocab()), " "}
    rows: list[tuple[int, int, str]] = []
    for code, words in between_letters(pipeline):
        text = "".join(letter if letter in known else "\ufffd" for letter in " ".join(words)[1:-1])
        if text == chr(code) or (chr(code) not in known and text and not text.strip("\ufffd")):
            continue
        first = rows.pop()[0] if rows and rows[-1][1:] == (code - 1, text) else code
        rows.append((first, code, text))
    return rows


def scripts() -> dict[str, bytes]:
    """Return the files of the packages, in the folder `vendor`. Raises CheckpointError if they cannot be fetched."""
    found: dict[str, bytes] = {}
    for package, names in SCRIPTS.items():
        found |= {f"vendor/{Path(name).name}": content for name, content in npm.read(package, names).items()}
    return found
