"""Find models by name: built-in sizes, and models in the cache of the Hugging Face hub."""

import errno
import json
import os
import re
from collections.abc import Collection
from pathlib import Path

from tinyprompt.errors import CheckpointError
from tinyprompt.files.config import parse_config

NAME = re.compile(r"(?P<repository>\w[\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
FILES = {".safetensors", ".bin", ".pt", ".npy", ".npz", ".onnx", ".json"}  # suffixes of paths, not of names
# Configuration files, and the possible names of their weights in order of preference.
KINDS = {
    "config.json": ("model.safetensors", "pytorch_model.bin"),
    "adapter_config.json": ("adapter_model.safetensors", "adapter_model.bin"),
}
TEXT = ("tokenizer.json", "spiece.model", "tokenizer_config.json")
# Built-in sizes and their folders in weights/. weights/pretrain.py creates a size that is not included.
BUILT_IN = {
    "tiny": "tinyprompt-t5-tiny",
    "small": "tinyprompt-t5-small",
    "base": "tinyprompt-t5",
    "large": "tinyprompt-t5-large",
}


def built_in(size: str) -> Path:
    """Return the folder of a built-in size, in a checkout or in an installed wheel.

    Raises:
        CheckpointError: The size is not included in this installation.
    """
    here = Path(__file__).parents[1]
    for folder in (here.parent / "weights" / BUILT_IN[size], here / "weights" / BUILT_IN[size]):
        if folder.is_dir():
            return folder
    if size == "large":
        raise CheckpointError(
            f"the built-in size {size!r} is not included; weights/README.md shows the command that creates it"
        )
    raise CheckpointError(f"{here}: the built-in model is missing; reinstall tinyprompt or name a model directory")


def find(name: str | Path) -> Path:
    """Return the folder of a model: a built-in size, a pulled model `org/name` or `org/name@revision`, or a path.

    The folder name of a built-in model is accepted as well, because prompts store it. An existing path takes
    precedence over a name. Nothing is downloaded.

    Raises:
        CheckpointError: The model is not included, was not pulled, or was pulled only partly.
    """
    path, match = Path(name), NAME.fullmatch(str(name))
    for size, folder in BUILT_IN.items():
        if str(name) in (size, folder) and not path.exists():
            return built_in(size)
    if match is None or path.suffix in FILES or path.exists():
        return path
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        missing = "finding a pulled model needs huggingface_hub; pip install 'tinyprompt-t5[hub]'"
        raise CheckpointError(f"{name}: no such file or directory, and {missing}") from None
    repository, revision = match["repository"], match["revision"]
    fetch = f"tinyprompt pull {repository}" + (f" --revision {revision}" if revision else "")
    for config in KINDS:
        try:
            file = try_to_load_from_cache(repository, config, revision=revision)
        except ValueError:  # a path, not a name
            raise CheckpointError(f"{name}: no such file or directory") from None
        if isinstance(file, str):
            if not complete(Path(file).parent):
                raise CheckpointError(f"{name}: this model was pulled only partly; continue with: {fetch}")
            return Path(file).parent
    raise CheckpointError(
        f"{name}: no such file or directory, and no model of this name was pulled; pull it with: {fetch}"
    )


def name_of(folder: Path) -> str:
    """Return `org/name` for the folder of a pulled model, or the last component of another path."""
    folder = folder.resolve()
    kind, *parts = folder.parents[1].name.split("--") if folder.parent.name == "snapshots" else ("",)
    return "/".join(parts) if kind == "models" else folder.name


def wanted(names: Collection[str]) -> list[str]:
    """Select the files of a repository that tinyprompt reads: configuration, tokenizer, weights in one format.

    Raises:
        CheckpointError: A required file is missing. The message names it.
    """
    for config, forms in KINDS.items():
        weights: list[str] = []
        for whole in forms if config in names else ():
            stem, suffix = whole.split(".")
            index = f"{whole}.index.json"
            shards = sorted(name for name in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", name))
            weights = weights or ([index, *shards] if shards and index in names else [whole] if whole in names else [])
        if weights and config == "config.json" and not any(name in names for name in TEXT):
            raise CheckpointError(f"no tokenizer; expected one of {', '.join(TEXT)}; found {listed(names)}")
        if weights:
            others = [name for name in (*TEXT, "generation_config.json") if name in names]
            return [config, *others, *weights]
    expected = "; or ".join(f"{config} and {' or '.join(forms)}" for config, forms in KINDS.items())
    raise CheckpointError(f"not a T5 and not an adapter; expected {expected} (or their shards); found {listed(names)}")


def listed(names: Collection[str]) -> str:
    """Join the first names of a collection, with the number of the rest."""
    first, more = sorted(names)[:8], len(names) - 8
    return (", ".join(first) or "no files") + (f" and {more} more" if more > 0 else "")


def complete(folder: Path) -> bool:
    """Return whether all files that `pull` downloads exist. A pull may have been interrupted."""
    names = os.listdir(folder)
    try:
        files = wanted(names)
        indices = [json.loads((folder / name).read_text()) for name in files if name.endswith(".index.json")]
        return all(shard in names for index in indices for shard in index["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return False


def pull(name: str, revision: str | None = None) -> Path:
    """Download a T5 or a PEFT adapter into the cache of the Hugging Face hub. Returns its folder.

    Only the required files are downloaded: safetensors if available, else torch's files. Existing files are kept.
    The variables HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE apply as in huggingface_hub.

    Args:
        name: `org/name` on the hub.
        revision: A branch, tag or commit.

    Raises:
        CheckpointError: The model cannot be downloaded, or is not a T5 or an adapter.
    """
    try:
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    except ImportError:
        raise CheckpointError(f"{name}: pull needs huggingface_hub; pip install 'tinyprompt-t5[hub]'") from None
    match = NAME.fullmatch(name)
    if match is None or match["revision"]:
        raise CheckpointError(f"{name}: expected org/name, as in google/t5-v1_1-small; give a revision with --revision")
    try:
        info = HfApi().model_info(name, revision=revision)
        files = wanted([file.rfilename for file in info.siblings or ()])
        if files[0] == "config.json":  # checked before gigabytes are downloaded
            check(Path(hf_hub_download(name, files[0], revision=info.sha)))
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except Exception as error:  # the library also raises exceptions of its HTTP client and its threads
        raise CheckpointError(f"{name}: {reason(error, revision)}") from None


def check(path: Path) -> None:
    """Raise CheckpointError if a config.json does not describe a T5."""
    try:
        parse_config(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path.name}: {error}") from None


def reason(error: Exception, revision: str | None) -> str:
    """Explain a failed download in one line, with advice."""
    from huggingface_hub import constants, errors, get_token

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full; make room in {constants.HF_HUB_CACHE}, or set HF_HOME to a folder on another disk"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; is HF_HOME a folder that you may write to?"
    token = "the token was refused" if get_token() else "set HF_TOKEN to a token of your account"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE prevents downloads; unset it to pull"
    if isinstance(error, errors.GatedRepoError):
        return f"the model is gated: accept its terms on its page at {constants.ENDPOINT}; {token}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such model at {constants.ENDPOINT}; check the name; if it is private, {token}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {revision!r}; expected a branch, a tag or a commit"
    if isinstance(error, errors.HfHubHTTPError):
        return f"{constants.ENDPOINT} answered {error.response.status_code}; try again later"
    if isinstance(error, ValueError):
        return str(error).partition("\n")[0]
    told = f"{type(error).__name__}: {error}".partition("\n")[0]
    return f"cannot be downloaded from {constants.ENDPOINT} ({told}); check the network, or HF_ENDPOINT"
