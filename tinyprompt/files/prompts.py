"""Read and write prompts: our own safetensors, NumPy's .npy and .npz (Google), and PEFT's adapter directories."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16

from tinyprompt.errors import CheckpointError
from tinyprompt.files import adapters, hub
from tinyprompt.files.io import LARGEST, TORCH, TRIES, load_numpy, npy, read, read_json, state, write
from tinyprompt.files.safetensors import dump, read_tensors
from tinyprompt.files.torch_bin import read_pickle
from tinyprompt.fit import check_fit
from tinyprompt.model import PROMPT, Model, Prompt
from tinyprompt.tree import Flat

MAX_LABELS = 1000
TICK = 0.02  # seconds within which two writes may leave the same time stamp
STATE = "state."  # prefix of the training state's names in our own file
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TRAINING_STATE = "training_state.safetensors"  # the separate file of the training state in a PEFT directory
# Keys that PEFT 0.21 writes beside the sizes of a prompt. PEFT sets num_layers and num_attention_heads when it loads.
PEFT_CONFIG = dict(
    auto_mapping=None,
    inference_mode=True,
    modules_to_save=None,
    num_attention_heads=None,
    num_layers=None,
    num_transformer_submodules=1,
    peft_type="PROMPT_TUNING",
    peft_version="0.21.2",
    prompt_tuning_init="RANDOM",
    prompt_tuning_init_text=None,
    revision=None,
    task_type="SEQ_2_SEQ_LM",
    tokenizer_kwargs=None,
    tokenizer_name_or_path=None,
)

COMMON = ("auto_mapping", "inference_mode", "modules_to_save", "peft_version", "revision", "task_type")  # of all kinds


def load_prompt(path: str | Path) -> Prompt:
    """Read a prompt of any format (see `load_prompts`).

    Args:
        path: The path of a prompt. `collection.npz:NAME` selects one of several prompts.

    Returns:
        The prompt, with the metadata that its format stores.

    Raises:
        CheckpointError: The file does not contain exactly one prompt, or is invalid.

    Example:
        >>> prompt = load_prompt("mine.safetensors")
    """
    found = load_prompts(path)
    if len(found) > 1:
        raise CheckpointError(f"{path}: contains {len(found)} prompts; name one as {path}:NAME of {', '.join(found)}")
    return next(iter(found.values()))


def load_prompts(path: str | Path) -> dict[str, Prompt]:
    """Read every prompt of a file by name: several from a .npz file, one from any other file.

    Formats: a safetensors file of `save_prompt`; a .npy file with an array (P, d_model), also without the suffix, as
    T5X writes it (Lester et al. 2021); a .npz file of such arrays; a PEFT directory with a soft prompt (PROMPT_TUNING,
    or P_TUNING, of which PEFT uses only the encoder's part with T5), a prefix (PREFIX_TUNING), LoRA or IA3.
    Prompts of other programs have neither a fingerprint nor label words and settings.

    Raises:
        CheckpointError: A prompt is invalid. The message names the file and the key.
    """
    file, colon, name = os.fspath(path).rpartition(".npz:")
    if colon:
        return _read_numpy(Path(file + ".npz"), name)
    path = hub.find(path)
    if path.is_dir():
        return {hub.name_of(path): _read_folder(path)}
    content = read(path, LARGEST if path.suffix in (".npy", ".npz") else None)
    if path.suffix in (".tsv", ".csv", ".jsonl", ".txt"):
        raise CheckpointError(f"{path}: is a file of rows, not a prompt; give the prompt first, then the rows or texts")
    if path.name in ADAPTER_WEIGHTS and (path.parent / "adapter_config.json").exists():
        raise CheckpointError(f"{path}: is part of a PEFT adapter; name the directory")
    if content.startswith(b"\x80\x02\x8a\nl\xfc"):  # magic number of torch.save before version 1.6
        raise CheckpointError(f"{path}: {TORCH}")
    if content.startswith((b"\x93NUMPY", b"PK")) or path.suffix in (".npy", ".npz"):
        return _read_numpy(path, content=content)
    return {path.stem: _read_safetensors(path, content)}


class Entry(NamedTuple):
    """The prompts of a file or folder when it was last read."""

    state: Any = None  # None forces a new read
    prompts: Mapping[str, Prompt] = {}
    error: str | None = None


class Prompts(Mapping[str, Prompt]):
    """The prompts of a folder that fit one model, by name: prompt files, and PEFT directories.

    `refresh` reads new and changed files. `errors` maps the name of an unusable file to the reason; prompts read from
    it earlier remain.

    Args:
        folder: The folder of the prompts.
        model: The model that the prompts must fit.

    Raises:
        CheckpointError: The folder does not exist.

    Example:
        >>> prompt = Prompts("prompts", model)["topic"]
    """

    def __init__(self, folder: str | Path, model: Model) -> None:
        self.folder, self.model = Path(folder), model
        self.errors: dict[str, str] = {}
        self._read: dict[str, Entry] = {}
        self._prompts: dict[str, Prompt] = {}
        self.refresh()

    def refresh(self) -> list[str]:
        """Read new and changed prompts, and drop deleted prompts. Returns the names that changed."""
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: expected a folder of prompts")
        prompts: dict[str, Prompt] = {}
        source: dict[str, Path] = {}
        entries = [path for path in sorted(self.folder.iterdir()) if _is_entry(path)]
        self._read = {path.name: self._one(path) for path in entries}
        self.errors = {name: entry.error for name, entry in self._read.items() if entry.error}
        for path in entries:
            for name, prompt in self._read[path.name].prompts.items():
                if name in prompts:
                    self.errors[path.name] = f"{path}: {source[name]} already defines the prompt {name!r}; rename one"
                else:
                    prompts[name], source[name] = prompt, path
        before, self._prompts = self._prompts, prompts
        return sorted(name for name in before.keys() | prompts.keys() if before.get(name) is not prompts.get(name))

    def _one(self, path: Path) -> Entry:
        """Read an entry if it has changed. If it cannot be used, its earlier prompts remain. Never raises."""
        known, now = self._read.get(path.name, Entry()), None
        try:
            now = _settled(path)
            if now and now == known.state:
                return known
            found = {name: replace(prompt, train_state=None) for name, prompt in load_prompts(path).items()}
            for prompt in found.values():
                check_fit(prompt, self.model, path)
            return Entry(now, found)
        except Exception as error:  # any error of one file must not stop the others
            told = str(error) if isinstance(error, CheckpointError) else f"{path}: {type(error).__name__}: {error}"
            return Entry(now, known.prompts, told)

    def __getitem__(self, name: str) -> Prompt:
        return self._prompts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def __repr__(self) -> str:
        return f"Prompts({self.folder}: {', '.join(self) or 'none'}; of {self.model.name})"


def _is_entry(path: Path) -> bool:
    """Return whether a path has the name of a prompt file, or is a folder that PEFT may have written."""
    if path.suffix in (".safetensors", ".npy", ".npz"):
        return True
    try:
        return bool((path / "adapter_config.json").stat())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # unreadable folder; the reader reports it
        return True


def _settled(path: Path) -> Any:
    """Return the state of an entry, or None if it was written so recently that the next write might not change it."""
    for pause in (TICK, 0):
        found = state(path)
        if all(abs(time.time_ns() - changed) > TICK * 1e9 for *_, changed in found):
            return found
        time.sleep(pause)
    return None


def save_prompt(prompt: Prompt, path: str | Path) -> Path:
    """Write a prompt atomically. The suffix of the path selects the format.

    `.safetensors` is our own format and stores everything. A path without suffix becomes a PEFT directory and stores
    everything as well. `.npy` stores the vectors only.

    Args:
        prompt: The prompt to write.
        path: The path to write to.

    Returns:
        The path.

    Raises:
        CheckpointError: The suffix is unknown, the format does not support the method, or the path is not writable.

    Example:
        >>> save_prompt(result.prompt, "mine.safetensors")
    """
    path = Path(path)
    check_target(path)
    state = prompt.train_state or {}
    words = None if prompt.label_words is None else json.dumps(prompt.label_words)
    known = dict(model=prompt.model, fingerprint=prompt.fingerprint, label_words=words)
    about = {"settings": json.dumps(prompt.settings)} | {k: v for k, v in known.items() if v is not None}
    about |= {k: json.dumps(v) for k in ("verbalizer", "columns") if (v := getattr(prompt, k))}
    if path.suffix == ".safetensors":
        tensors = prompt.params | {STATE + name: value for name, value in state.items()}
        write({path: dump(tensors, {"format": "tinyprompt", **about})})
        return path
    method = str(prompt.settings.get("method"))
    if not path.suffix and method in adapters.KINDS.values():
        described, tensors = adapters.to_peft(prompt.params, method)
        config = {key: PEFT_CONFIG[key] for key in COMMON} | described
    else:
        vectors = prompt.vectors(path)
        if path.suffix == ".npy":
            write({path: npy(vectors)})
            return path
        tensors = {"prompt_embeddings": vectors}
        config = PEFT_CONFIG | {"num_virtual_tokens": len(vectors), "token_dim": vectors.shape[1]}
    config["base_model_name_or_path"] = prompt.model
    files: dict[Path, Any] = {
        path / "adapter_config.json": json.dumps(config, indent=2, sort_keys=True).encode(),
        path / "adapter_model.safetensors": dump(tensors, {"format": "pt", **about}),
    }
    if state:
        files[path / TRAINING_STATE] = dump(state, {"format": "tinyprompt"})
    write(files)
    if not state:
        (path / TRAINING_STATE).unlink(missing_ok=True)  # remains of another prompt
    return path


def check_target(path: str | Path, method: str = "prompt") -> None:
    """Raise CheckpointError if `save_prompt` cannot write to a path, or if a folder contains unrelated files."""
    path = Path(path)
    storable = ("prompt", "p-tuning", *(() if path.suffix else adapters.KINDS.values()))
    if path.suffix != ".safetensors" and method not in storable:
        raise CheckpointError(f"{path}: method {method!r} needs a name that ends in .safetensors")
    if path.suffix in (".safetensors", ".npy"):
        if path.is_dir():
            raise CheckpointError(f"{path}: is a directory; name a file for the prompt")
    elif path.is_dir():
        for name in ("adapter_config.json", ADAPTER_WEIGHTS[0], TRAINING_STATE):
            if (path / name).is_dir():
                raise CheckpointError(f"{path / name}: is a directory; expected a file of the adapter; remove it")
        if any(path.iterdir()) and not (path / "adapter_config.json").exists():
            raise CheckpointError(
                f"{path}: is a directory with other files than a PEFT adapter's; name an empty or new one, "
                "or a file that ends in .safetensors or .npy"
            )
    elif path.suffix:
        raise CheckpointError(
            f"{path}: expected a name that ends in .safetensors or .npy, "
            f"or a name without suffix for a PEFT directory; found {path.suffix!r}"
        )
    elif path.exists():
        raise CheckpointError(f"{path}: is a file, but a name without suffix makes a PEFT directory; add .safetensors")
    there = path if path.is_dir() else next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({there}: {error.strerror}); name another target") from None


def _checked(array: np.ndarray, where: str, vectors: bool = True) -> np.ndarray:
    """Return a float32 copy of finite floats. With `vectors`, the shape must be (P, d_model)."""
    if array.dtype == "V2":  # NumPy's dtype for bfloat16 in a file
        array = array.view(bfloat16)
    if (vectors and array.ndim != 2) or not array.size or not (array.dtype.kind == "f" or array.dtype == bfloat16):
        found = f"{array.dtype} of shape {list(array.shape)}"
        expected = "the float32 vectors of a prompt, (P, d_model)" if vectors else "floating point numbers"
        raise CheckpointError(f"{where}: expected {expected}; found {found}")
    with np.errstate(over="ignore"):
        array = np.array(array, np.float32, order="C")
    if not np.isfinite(array).all():
        raise CheckpointError(f"{where}: holds NaN or numbers beyond float32; download or tune the prompt again")
    return array


def _read_numpy(path: Path, name: str | None = None, content: bytes | None = None) -> dict[str, Prompt]:
    """Read all prompts of a .npy or .npz file, or the named prompt."""
    stored = load_numpy(path, content)
    alone = isinstance(stored, np.ndarray)
    names = [path.stem if path.suffix == ".npy" else path.name] if alone else list(stored)
    arrays = {n: stored if alone else stored[n] for n in names if name in (None, n)}
    if not arrays:
        expected = "a prompt" if name is None else f"the prompt {name!r}"
        raise CheckpointError(f"{path}: expected {expected}, found {', '.join(names) or 'nothing'}")
    vectors = {n: _checked(x, str(path) if alone else f"{path}:{n}") for n, x in arrays.items()}
    return {n: Prompt({PROMPT: x}) for n, x in vectors.items()}


def _read_safetensors(path: Path, content: bytes) -> Prompt:
    """Read a prompt in our own format."""
    tensors, about = read_tensors(path, content)
    if about.get("format") != "tinyprompt" or "settings" not in about:
        raise CheckpointError(
            f"{path}: not a prompt saved by tinyprompt (its metadata are missing); "
            "for a PEFT adapter, name the directory"
        )
    state = {name.removeprefix(STATE): x for name, x in tensors.items() if name.startswith(STATE)}
    params = {
        name: _checked(x, f"{path}: key {name!r}", name == PROMPT or ".prefix." in name)
        for name, x in tensors.items()
        if not name.startswith(STATE)
    }
    if not params:
        raise CheckpointError(f"{path}: contains no prompt, expected {PROMPT!r}; tune it again")
    return _described(params, about, state or None, path)


def _described(params: Flat, about: Mapping[str, str], state: Flat | None, path: Path) -> Prompt:
    """Build a prompt from the metadata of its file."""
    try:
        words, settings = json.loads(about.get("label_words", "null")), json.loads(about["settings"])
        if not isinstance(settings, dict) or not isinstance(words, list | None):
            raise ValueError("expected a list of labels and a dict of settings")
        verbalizer, columns = (json.loads(about.get(key, "{}")) for key in ("verbalizer", "columns"))
        if not all(isinstance(x, dict) for x in (verbalizer, columns)) or not verbalizer.keys() <= {*(words or ())}:
            raise ValueError("expected a text for each label word, and the names of columns")
        "".join(
            [*(words or ()), *verbalizer.values()]
        ).encode()  # raises UnicodeEncodeError, a ValueError, for an unpaired surrogate
        if len(words or ()) > MAX_LABELS:
            raise ValueError(f"expected at most {MAX_LABELS} label words")
        if about.get("fingerprint") and not isinstance(settings.get("method", "prompt"), str):
            raise ValueError("expected the name of a method")
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the prompt's metadata are damaged ({error})") from None
    words = None if words is None else tuple(words)
    known = about.get("model"), about.get("fingerprint"), words, settings, state
    return Prompt(params, *known, verbalizer, columns)


def _read_folder(folder: Path) -> Prompt:
    """Read a PEFT directory, and retry if one of its files changes meanwhile, because they belong together."""
    for _ in range(TRIES):
        before, found = state(folder), None
        try:
            found = _read_peft(folder)
        except CheckpointError:
            time.sleep(TICK)  # a writer may have replaced only one of two files
            if state(folder) == before:
                raise
        if found and state(folder) == before:
            return found
    raise CheckpointError(f"{folder}: keeps changing; write to another name, then rename that folder")


def _read_peft(folder: Path) -> Prompt:
    """Read the soft prompt or the prefix of a PEFT directory. Our own metadata are used if present."""
    path = folder / "adapter_config.json"
    if not path.exists():
        inner = [str(found.parent) for found in sorted(folder.glob("*/adapter_config.json"))]
        advice = f"name an adapter in it: {', '.join(inner[:3])}" if inner else "expected a prompt or a PEFT directory"
        raise CheckpointError(f"{folder}: no adapter_config.json; {advice}")
    config = read_json(path)

    def expect(key: str, ok: bool, what: str) -> Any:
        if not ok:
            raise CheckpointError(f"{path}: key {key!r}: expected {what}, found {config.get(key)!r}")
        return config.get(key)

    kinds = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", *adapters.KINDS)
    kind = expect("peft_type", config.get("peft_type") in kinds, "one of " + ", ".join(kinds))
    if config.get("task_type") is not None:
        expect("task_type", config["task_type"] == "SEQ_2_SEQ_LM", "'SEQ_2_SEQ_LM', as for T5")
    weights, pickled = (folder / name for name in ADAPTER_WEIGHTS)
    about: dict[str, str] = {}
    if not weights.exists() and pickled.exists():
        weights = pickled
        tensors = read_pickle(weights)
    else:
        tensors, about = read_tensors(weights)
    settings: dict[str, Any] = {}
    if kind in adapters.KINDS:
        checked = {key: _checked(x, f"{weights}: key {key!r}", vectors=False) for key, x in tensors.items()}
        params, settings = adapters.from_peft(config, checked, path)
    else:
        params = _soft_or_prefix(config, tensors, weights, expect)
    if "settings" in about:  # written by tinyprompt
        beside = folder / TRAINING_STATE
        return _described(params, about, read_tensors(beside)[0] if beside.exists() else None, weights)
    name = config.get("base_model_name_or_path")
    return Prompt(params, name if isinstance(name, str) else None, settings=settings)


def _soft_or_prefix(config: Mapping[str, Any], tensors: Flat, weights: Path, expect: Callable[..., Any]) -> Flat:
    """Convert the tensor of PEFT's soft prompt or prefix. `expect(key, ok, what)` checks and returns a key."""

    def number(key: str) -> int:
        value = config.get(key)
        return expect(key, isinstance(value, int) and value is not True and value > 0, "a positive number")

    if tensors.keys() != {"prompt_embeddings"}:
        names = ", ".join(map(repr, sorted(tensors))) or "none"
        raise CheckpointError(f"{weights}: expected one tensor, 'prompt_embeddings'; found {names}")
    found = _checked(tensors["prompt_embeddings"], f"{weights}: key 'prompt_embeddings'")
    rows, parts, width = number("num_virtual_tokens"), config.get("num_transformer_submodules"), found.shape[1]
    prefix = config["peft_type"] == "PREFIX_TUNING"
    if prefix:
        expect("num_transformer_submodules", parts in (None, 2), "2, as for T5")
        shape = (rows, 2 * number("num_layers") * number("token_dim"))
    else:
        parts = number("num_transformer_submodules") if parts is not None else 1 + (len(found) == 2 * rows)
        shape = (rows * parts, number("token_dim") if config.get("token_dim") is not None else width)
    if found.shape != shape:
        told = f"has shape {list(found.shape)}; adapter_config.json implies {list(shape)}"
        raise CheckpointError(f"{weights}: key 'prompt_embeddings' {told}")
    return _prefix(found.reshape(rows, -1, config["token_dim"])) if prefix else {PROMPT: found[:rows]}


def _prefix(rows: np.ndarray) -> Flat:
    """Convert PEFT's prefix (P, 2 L, H * K) for L layers to prefixes of the decoder's self-attentions.

    PEFT repeats the rows to 4 L and splits them into groups of four: key, value, and two for the cross-attention, which
    it drops. For even L, half of the rows are therefore unused, and layers l and l + L / 2 share their rows.
    """
    return {
        f"decoder.block.{layer}.layer.0.SelfAttention.prefix.{name}": rows[:, (4 * layer + i) % rows.shape[1]].copy()
        for layer in range(rows.shape[1] // 2)
        for i, name in enumerate(("key", "value"))
    }
