"""Files of tuned prompts: our own safetensors, NumPy's .npy and .npz (Google), and PEFT's adapter directories."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16
from safetensors import safe_open
from safetensors.numpy import save

from tinyprompt import hub, t5
from tinyprompt.checkpoint import CheckpointError, Model, map_safetensors, read_json, write
from tinyprompt.pickles import map_pickle
from tinyprompt.tree import Flat

PROMPT = "encoder.prompt.embedding"
STATE = "state."  # how the names of the training state begin in our own file;
TRAINING_STATE = "training_state.safetensors"  # and its own file in a PEFT directory
# What PEFT 0.21 writes beside the numbers that a prompt has; it fills in num_layers and num_attention_heads itself.
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


class Prompt(NamedTuple):
    """A tuned prompt: what is trained, and all that is needed to use it again."""

    delta: Flat  # {"encoder.prompt.embedding": (P, d_model)}
    model: str | None  # name of the frozen model; None: the file does not say
    fingerprint: str | None  # sha256 of the frozen weights; None: the file does not say
    labels: tuple[str, ...] | None  # label words, None for free text
    settings: dict[str, Any]  # how it was trained: seed, task, optimiser ...
    state: Flat | None = None  # what training needs to go on (see train.py)

    def check(self, model: Model) -> None:
        """Raise CheckpointError where the prompt was tuned on another model than this, or cannot have been on it."""
        if self.fingerprint is not None:
            found = model.fingerprint()
            if found != self.fingerprint:
                raise CheckpointError(
                    f"this prompt was tuned on {self.model!r} (sha256 {self.fingerprint[:12]}...), "
                    f"not on {model.name!r} (sha256 {found[:12]}...): "
                    "a soft prompt works only on its own frozen model; name that model or tune again"
                )
        c, shapes = model.config, t5.shapes(model.config)
        depth = sum(name.startswith("decoder.") and name.endswith(".SelfAttention.prefix.key") for name in self.delta)
        if depth not in (0, c.num_decoder_layers):
            raise CheckpointError(
                f"this prefix is for {depth} decoder layers, {model.name!r} has {c.num_decoder_layers}: PEFT makes one "
                "for each encoder layer, so it is read for models with as many of both"
            )
        for name, value in self.delta.items():
            attention, prefix, kind = name.partition(".prefix.")
            known = f"{attention}.q.weight" in shapes and kind in ("key", "value") if prefix else name == PROMPT
            width = c.num_heads * c.d_kv if prefix else c.d_model
            if not known or value.shape[1:] != (width,):
                expected = f"(P, {width}) at an attention" if prefix else f"{PROMPT!r} of (P, {width})"
                raise CheckpointError(
                    f"this prompt does not fit {model.name!r}: key {name!r} has shape {list(value.shape)}, "
                    f"expected {expected}; name the model that it was tuned on"
                )
            both = [self.delta.get(f"{attention}.prefix.{kind}") for kind in ("key", "value")]
            if prefix and (both[0] is None or both[1] is None or both[0].shape != both[1].shape):
                raise CheckpointError(f"this prompt is damaged: expected as many keys as values at {attention!r}")

    def vectors(self, path: str | Path) -> np.ndarray:
        """The soft prompt, float32 (P, d_model). Raises CheckpointError, naming the file, for another method."""
        if self.delta.keys() != {PROMPT}:
            found = next((name for name in self.delta if name != PROMPT), "nothing")
            raise CheckpointError(f"{path}: expected a soft prompt, {PROMPT!r} and nothing else; found {found!r}")
        return _vectors(self.delta[PROMPT], f"{path}: key {PROMPT!r}")


def load_prompt(path: str | Path) -> Prompt:
    """Read a prompt of any format (see `load_prompts`); `collection.npz:NAME` picks one of many.

    Raises CheckpointError for a file that holds none or several.
    """
    found = load_prompts(path)
    if len(found) > 1:
        raise CheckpointError(f"{path}: holds {len(found)} prompts; pick one as {path}:NAME of {', '.join(found)}")
    return next(iter(found.values()))


def load_prompts(path: str | Path) -> dict[str, Prompt]:
    """Every prompt of a file, by name: several from an .npz, one from anything else.

    A safetensors file of `save_prompt`; an array (P, d_model) in an .npy file, also without the suffix, as T5X writes
    it (Lester et al. 2021); an .npz of such arrays; a PEFT directory with a soft prompt (PROMPT_TUNING, P_TUNING:
    the encoder's part, which is all that PEFT uses with T5) or a prefix (PREFIX_TUNING).
    What others wrote names no weights (fingerprint None), no label words and no settings.
    Raises CheckpointError that names the file and the key.
    """
    file, colon, name = os.fspath(path).rpartition(".npz:")
    if colon:
        return _read_numpy(Path(file + ".npz"), name)
    path = hub.find(path)
    if path.is_dir():
        return {hub.name_of(path): _read_peft(path)}
    try:
        with open(path, "rb") as opened:
            start = opened.read(6)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    if path.name in ("adapter_model.safetensors", "adapter_model.bin"):
        raise CheckpointError(f"{path}: a part of a PEFT adapter; name its directory, {path.parent}")
    if start == b"\x93NUMPY" or start.startswith(b"PK") or path.suffix in (".npy", ".npz"):
        return _read_numpy(path)
    return {path.stem: _read_safetensors(path)}


def save_prompt(prompt: Prompt, path: str | Path) -> Path:
    """Write a prompt, whole or not at all; the name tells the format.

    `.safetensors`: ours, with everything; no suffix: a directory for PEFT, with everything; `.npy`: the vectors only.
    Raises CheckpointError for another name, for what `check_target` refuses, and, save for ours, for another method.
    """
    path = Path(path)
    check_target(path)
    # `save` writes the bytes as they lie in memory: of a transposed array, in the wrong order.
    parts = prompt.delta, prompt.state or {}
    delta, state = ({name: np.ascontiguousarray(x) for name, x in part.items()} for part in parts)
    labels = None if prompt.labels is None else json.dumps(prompt.labels)
    known = dict(model=prompt.model, fingerprint=prompt.fingerprint, labels=labels)
    about = {"settings": json.dumps(prompt.settings)} | {k: v for k, v in known.items() if v is not None}
    if path.suffix == ".safetensors":
        tensors = delta | {STATE + name: value for name, value in state.items()}
        write({path: save(tensors, {"format": "tinyprompt", **about})})
        return path
    vectors = prompt.vectors(path)
    if path.suffix == ".npy":
        file = io.BytesIO()
        np.save(file, vectors)
        write({path: file.getvalue()})
        return path
    size = {"num_virtual_tokens": len(vectors), "token_dim": vectors.shape[1]}
    config = PEFT_CONFIG | size | {"base_model_name_or_path": prompt.model}
    files = {
        path / "adapter_config.json": json.dumps(config, indent=2, sort_keys=True).encode(),
        path / "adapter_model.safetensors": save({"prompt_embeddings": vectors}, {"format": "pt", **about}),
    }
    if state:
        files[path / TRAINING_STATE] = save(state, {"format": "tinyprompt"})
    write(files)
    if not state:
        (path / TRAINING_STATE).unlink(missing_ok=True)  # of another prompt
    return path


def check_target(path: str | Path) -> None:
    """Raise CheckpointError where `save_prompt` could not write, or would write among files that are no adapter's."""
    path = Path(path)
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"{path}: {parent} is no directory that can be written to; name another target")
    if path.suffix in (".safetensors", ".npy"):
        if path.is_dir():
            raise CheckpointError(f"{path}: is a directory; name a file for the prompt")
    elif path.is_dir():
        for name in ("adapter_config.json", "adapter_model.safetensors", TRAINING_STATE):
            if (path / name).is_dir():
                raise CheckpointError(f"{path / name}: is a directory where a file is to be written; remove it")
        if any(path.iterdir()) and not (path / "adapter_config.json").exists():
            raise CheckpointError(
                f"{path}: is a directory with other files than a PEFT adapter's; name an empty or new one, "
                "or a file that ends in .safetensors or .npy"
            )
    elif path.suffix:
        raise CheckpointError(
            f"{path}: a prompt is written to a name that ends in .safetensors or .npy, "
            f"or without suffix, which makes a PEFT directory; found {path.suffix!r}"
        )
    elif path.exists():
        raise CheckpointError(f"{path}: is a file, but a name without suffix makes a PEFT directory; add .safetensors")


def _vectors(array: np.ndarray, where: str, dims: int | None = 2) -> np.ndarray:
    """Float32 vectors (P, d_model) of any floating type, checked; dims None: an array of any shape."""
    if array.dtype == "V2":  # what NumPy makes of bfloat16 in a file
        array = array.view(bfloat16)
    if dims not in (None, array.ndim) or not array.size or not (array.dtype.kind == "f" or array.dtype == bfloat16):
        found = f"{array.dtype} of shape {list(array.shape)}"
        raise CheckpointError(f"{where}: expected the float32 vectors of a prompt, (P, d_model); found {found}")
    with np.errstate(over="ignore"):
        array = np.array(array, np.float32, order="C")
    if not np.isfinite(array).all():
        raise CheckpointError(f"{where}: holds NaN or numbers beyond float32; get or tune the prompt again")
    return array


def _read_numpy(path: Path, name: str | None = None) -> dict[str, Prompt]:
    """The prompts of an .npy or .npz file; of the latter only one where a name is given."""
    try:
        stored = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        alone = isinstance(stored, np.ndarray)
        names = [path.stem if path.suffix == ".npy" else path.name] if alone else list(stored)
        arrays = {n: stored if alone else np.asarray(stored[n]) for n in names if name in (None, n)}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # NumPy and zipfile raise ten kinds for damaged files
        reason = "is no file of NumPy arrays, or damaged; download it again"
        if "allow_pickle" in str(error):
            reason = "holds pickled Python objects, which could run code and are never loaded; np.save float32 vectors"
        raise CheckpointError(f"{path}: {reason}") from None
    if not arrays:
        expected = "a prompt" if name is None else f"the prompt {name!r}"
        raise CheckpointError(f"{path}: expected {expected}, found {', '.join(names) or 'nothing'}")
    vectors = {n: _vectors(x, str(path) if alone else f"{path}:{n}") for n, x in arrays.items()}
    return {n: _foreign({PROMPT: x}) for n, x in vectors.items()}


def _foreign(delta: Flat, model: str | None = None) -> Prompt:
    """A prompt of which no more is known."""
    return Prompt(delta, model, None, None, {})


def _read_safetensors(path: Path) -> Prompt:
    """A prompt in our own format."""
    tensors, about = _read_tensors(path)
    if about.get("format") != "tinyprompt" or "settings" not in about:
        raise CheckpointError(
            f"{path}: not a prompt saved by tinyprompt (its metadata do not say so); "
            "of a PEFT adapter name the directory"
        )
    state = {name.removeprefix(STATE): x for name, x in tensors.items() if name.startswith(STATE)}
    delta = {
        name: _vectors(x, f"{path}: key {name!r}", 2 if name == PROMPT or ".prefix." in name else None)
        for name, x in tensors.items()
        if not name.startswith(STATE)
    }
    if not delta:
        raise CheckpointError(f"{path}: holds no prompt, only a training state; tune again")
    return _described(delta, about, state or None, path)


def _read_tensors(path: Path) -> tuple[Flat, dict[str, str]]:
    """Copies of the tensors of a safetensors file, and its metadata."""
    tensors = {name: np.array(x) for name, x in map_safetensors(path).items()}
    with safe_open(path, "numpy") as file:
        return tensors, file.metadata() or {}


def _described(delta: Flat, about: Mapping[str, str], state: Flat | None, path: Path) -> Prompt:
    """A prompt with what the metadata of its file say about it."""
    try:
        labels, settings = json.loads(about.get("labels", "null")), json.loads(about["settings"])
        if not isinstance(settings, dict) or not isinstance(labels, list | None):
            raise ValueError("expected a list of labels and a dict of settings")
        if not all(isinstance(label, str) for label in labels or ()):
            raise ValueError("expected labels that are words")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the prompt's metadata are damaged ({error})") from None
    labels = None if labels is None else tuple(labels)
    return Prompt(delta, about.get("model"), about.get("fingerprint"), labels, settings, state)


def _read_peft(folder: Path) -> Prompt:
    """The soft prompt or the prefix of a PEFT adapter directory; with all that we know, if we wrote it."""
    path = folder / "adapter_config.json"
    if not path.exists():
        raise CheckpointError(f"{folder}: no adapter_config.json; expected a file with a prompt, or a PEFT directory")
    config = read_json(path)

    def expect(key: str, ok: bool, what: str) -> Any:
        if not ok:
            raise CheckpointError(f"{path}: key {key!r}: expected {what}, found {config.get(key)!r}")
        return config.get(key)

    def number(key: str) -> int:
        value = config.get(key)
        return expect(key, isinstance(value, int) and value is not True and value > 0, "a positive number")

    kinds = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
    kind = expect("peft_type", config.get("peft_type") in kinds, "one of " + ", ".join(kinds))
    if config.get("task_type") is not None:
        expect("task_type", config["task_type"] == "SEQ_2_SEQ_LM", "'SEQ_2_SEQ_LM', as for T5")
    weights = folder / "adapter_model.safetensors"
    about: dict[str, str] = {}
    if not weights.exists() and (folder / "adapter_model.bin").exists():
        weights = folder / "adapter_model.bin"
        tensors = map_pickle(weights)
    else:
        tensors, about = _read_tensors(weights)
    if tensors.keys() != {"prompt_embeddings"}:
        names = ", ".join(map(repr, sorted(tensors))) or "none"
        raise CheckpointError(f"{weights}: expected one tensor, 'prompt_embeddings'; found {names}")
    found = _vectors(tensors["prompt_embeddings"], f"{weights}: key 'prompt_embeddings'")
    rows, parts, width = number("num_virtual_tokens"), config.get("num_transformer_submodules"), found.shape[1]
    prefix = kind == "PREFIX_TUNING"
    if prefix:
        expect("num_transformer_submodules", parts in (None, 2), "2, as for T5")
        shape = (rows, 2 * number("num_layers") * number("token_dim"))
    else:
        parts = number("num_transformer_submodules") if parts is not None else 2 if len(found) == 2 * rows else 1
        shape = (rows * parts, number("token_dim") if config.get("token_dim") is not None else width)
    if found.shape != shape:
        raise CheckpointError(
            f"{weights}: key 'prompt_embeddings' has shape {list(found.shape)}; {path.name} implies {list(shape)}"
        )
    delta = _prefix(found.reshape(rows, -1, config["token_dim"])) if prefix else {PROMPT: found[:rows]}
    if "settings" in about:  # we wrote it
        state = folder / TRAINING_STATE
        return _described(delta, about, _read_tensors(state)[0] if state.exists() else None, weights)
    name = config.get("base_model_name_or_path")
    return _foreign(delta, name if isinstance(name, str) else None)


def _prefix(rows: np.ndarray) -> Flat:
    """A prefix in the decoder's self-attentions, from PEFT's (P, 2 L, H * K), L layers.

    PEFT repeats the rows to 4 L and cuts them in fours: key, value, and two for the cross-attention that it drops.
    So where L is even, half of the rows go unused, and layers l and l + L / 2 share theirs.
    """
    return {
        f"decoder.block.{layer}.layer.0.SelfAttention.prefix.{name}": rows[:, (4 * layer + i) % rows.shape[1]].copy()
        for layer in range(rows.shape[1] // 2)
        for i, name in enumerate(("key", "value"))
    }
