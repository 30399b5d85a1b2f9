"""Files of tuned prompts: one safetensors file each."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from tinyprompt import hub
from tinyprompt.checkpoint import CheckpointError, Model, map_safetensors
from tinyprompt.tree import Flat

PROMPT = "encoder.prompt.embedding"


class Prompt(NamedTuple):
    """A tuned prompt: what is trained, and all that is needed to use it again."""

    delta: Flat  # {"encoder.prompt.embedding": (P, d_model)}
    model: str | None  # name of the frozen model
    fingerprint: str | None  # sha256 of the frozen weights
    labels: tuple[str, ...] | None  # label words, None for free text
    settings: dict[str, Any]  # how it was trained: seed, task, optimiser ...

    def check(self, model: Model) -> None:
        """Raise CheckpointError where the prompt was tuned on another model than this."""
        found = model.fingerprint()
        if found != (self.fingerprint or found):
            raise CheckpointError(
                f"this prompt was tuned on {self.model!r} (sha256 {str(self.fingerprint)[:12]}...), "
                f"not on {model.name!r} (sha256 {found[:12]}...): "
                "a soft prompt works only on its own frozen model; name that model or tune again"
            )


def save_prompt(prompt: Prompt, path: str | Path) -> Path:
    """Write a prompt as one safetensors file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"model": prompt.model, "fingerprint": prompt.fingerprint, "settings": json.dumps(prompt.settings)}
    if prompt.labels is not None:
        about["labels"] = json.dumps(prompt.labels)
    # `save` writes the bytes as they lie in memory: of a transposed array, in the wrong order.
    delta = {name: np.ascontiguousarray(value) for name, value in prompt.delta.items()}
    data = save(delta, {"format": "tinyprompt", **about})  # type: ignore
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)
    return path


def load_prompt(path: str | Path) -> Prompt:
    """Read a prompt that `save_prompt` wrote. Raises CheckpointError."""
    path = hub.find(path)
    tensors = map_safetensors(path)
    with safe_open(path, "numpy") as file:
        about = file.metadata() or {}
    if about.get("format") != "tinyprompt":
        raise CheckpointError(f"{path}: not a prompt saved by tinyprompt (its metadata do not say so)")
    try:
        labels = tuple(json.loads(about["labels"])) if "labels" in about else None
        settings = dict(json.loads(about["settings"]))
        delta = {name: np.array(value) for name, value in tensors.items()}
        return Prompt(delta, about["model"], about["fingerprint"], labels, settings)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the prompt's metadata are damaged ({error!r})") from None


def load_prompts(path: str | Path) -> dict[str, Prompt]:
    """All prompts of a file by their names; one, by the name of its file, where it is no collection."""
    path = hub.find(path)
    if path.suffix not in (".npy", ".npz"):
        return {path.name: load_prompt(path)}
    arrays = np.load(path)
    found = dict(arrays) if path.suffix == ".npz" else {path.name: arrays}
    return {name: Prompt({PROMPT: array}, None, None, None, {}) for name, array in found.items()}
