"""Write graphs that ONNX Runtime runs without tinyprompt: a training step and the score of given targets.

The weights are no part of a graph: it reads them as external data, each at its place in the model's own file
(safetensors, or what torch.save wrote), 16-bit ones as they lie there. The soft prompt is an input. ONNX Runtime opens
no external data outside the folder of a graph, not even through a link, so that file is copied beside the graphs.

A plain graph is for all other runtimes: it has operators of ONNX only. Its weights may also be inside, in float32.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from tinyprompt import decode, t5, train
from tinyprompt.config import Config
from tinyprompt.data import Batch
from tinyprompt.device import version
from tinyprompt.errors import CheckpointError, DeviceError
from tinyprompt.files import hub, io, models, prompts
from tinyprompt.fit import check_fit
from tinyprompt.lowering import lower
from tinyprompt.methods import init_params
from tinyprompt.model import PROMPT, Model
from tinyprompt.settings import Settings
from tinyprompt.tree import Array, Flat, Tree, count, flatten, leaves, merge, nest


def step(
    prompt: Array, input_ids: Array, attention_mask: Array, labels: Array, weights: Array, params: Tree, config: Config
) -> Flat:
    """Compute the mean cross entropy of the labels, and its gradient with respect to the prompt: (), (P, D).

    Seven parameters, as in `score`: the inputs of the graph have their names.
    """
    batch = Batch(input_ids, attention_mask, labels, weights)
    loss, gradient = train.loss_and_grads({PROMPT: prompt}, params, config, batch)
    return {"loss": loss.astype(np.float32), "gradient": gradient[PROMPT]}


def score(
    prompt: Array, input_ids: Array, attention_mask: Array, labels: Array, weights: Array, params: Tree, config: Config
) -> Flat:
    """Sum the log probability of each row's labels: (B,). The seven parameters name the inputs of the graph."""
    prompted = merge(params, {PROMPT: prompt})
    logits = t5.forward(prompted, config, input_ids, attention_mask, t5.shift_right(labels))
    found = decode.log_probability(logits, labels)
    return {"log_probability": (found * weights).sum(-1).astype(np.float32)}


class Shape(NamedTuple):
    """The fixed shapes of a graph's inputs."""

    batch_size: int = 8
    input_tokens: int = 64
    target_tokens: int = 4
    prompt_length: int = 100  # if no saved prompt brings its own


SHAPE = Shape()
PLAIN = ("inside", "beside")  # where a plain graph has its weights
LARGEST = 2**31 - 2**24  # bytes of the weights inside a graph; Protocol Buffers hold 2 GiB
NOTHING: Mapping[str, io.Content] = MappingProxyType({})


class Exported(NamedTuple):
    """The written files with their sizes in bytes, and the shapes of the inputs by name."""

    files: dict[str, int]
    inputs: dict[str, list[int]]

    def __str__(self) -> str:
        lines = [f"{path}: {size:,} bytes" for path, size in self.files.items()]
        return "\n".join([*lines, "inputs: " + ", ".join(f"{name} {shape}" for name, shape in self.inputs.items())])


def export(
    folder: str | Path | None,
    out: str | Path,
    shape: Shape = SHAPE,
    prompt: str | Path | None = None,
    plain: str | None = None,
) -> Exported:
    """Write step.onnx, score.onnx, prompt.npy and the model's weights to a folder, completely or not at all.

    folder: a model directory or name as for `models.load`; None: the model that the package carries.
    Both graphs take prompt (P, D) and weights (B, T) in float32, and input_ids (B, L), attention_mask (B, L) and
    labels (B, T) in int64. The shapes are fixed: B is batch_size, L input_tokens, T target_tokens; P is the length of
    the saved prompt. Without one, prompt.npy gets a first prompt of prompt_length vectors.
    plain: operators of ONNX only, with the weights "inside" each graph in float32, or "beside" them as they are stored.
    Raises CheckpointError for an unusable model, prompt or folder, ValueError for a shape, DeviceError without onnx.

    Example: `export("t5-v1_1-small", "out", Shape(batch_size=4))`.
    """
    exported = Export(folder, Path(out), shape, prompt, plain)
    return exported.write({step: exported.inputs, score: exported.inputs})


class Export:
    """A model and its graphs. It is checked first and written at the end, completely or not at all."""

    def __init__(
        self, folder: str | Path | None, out: Path, shape: Shape, prompt: str | Path | None, plain: str | None = None
    ) -> None:
        if plain not in (None, *PLAIN):
            raise ValueError(f"export: plain: expected one of {', '.join(PLAIN)}, or None, found {plain!r}")
        for name, size in shape._asdict().items():
            if size < 1:
                raise ValueError(f"export: {name}: expected at least 1, found {size}")
        if not version("onnx"):
            raise DeviceError("export: onnx is not installed; pip install 'tinyprompt-t5[ort]'")
        folder = hub.find(folder) if folder is not None else models.default_model()
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"{out}: is no folder; name one for the graphs and the weights")
        self.model, self.out, self.plain = models.load(folder, stored=True), out, plain
        size = 4 * count(flatten(self.model.params))
        if plain == "inside" and size > LARGEST:
            told = f"the weights have {size:,} bytes in float32, and a graph holds at most {LARGEST:,}"
            raise CheckpointError(f"{folder}: {told}; leave them beside it: --plain beside")
        for name, value in flatten(self.model.params).items():
            if not isinstance(value, np.memmap) and plain != "inside":
                raise CheckpointError(
                    f"{folder}: key {name!r} does not lie in its file as a graph reads it; write a folder where it "
                    f"does: tinyprompt convert {folder} TARGET"
                )
        if prompt is None:
            first = init_params(self.model, Settings(prompt_length=shape.prompt_length, init="vocab"), None)[PROMPT]
        else:
            given = prompts.load_prompt(prompt)
            check_fit(given, self.model, prompt)
            first = given.vectors(prompt)
        ids, labels = (np.zeros((shape.batch_size, n), np.int64) for n in (shape.input_tokens, shape.target_tokens))
        self.inputs = {"prompt": first, **Batch(ids, ids, labels, labels.astype(np.float32))._asdict()}
        inside = plain == "inside"
        self.sources = {} if inside else {path.resolve(): path.name for path in models.weight_files(folder)}

    def write(self, graphs: Mapping[Callable, Flat], more: Mapping[str, io.Content] = NOTHING) -> Exported:
        """Write a graph for each function, the weights, prompt.npy, and further files."""
        files: dict[Path, io.Content] = {self.out / name: source for source, name in self.sources.items()}
        files[self.out / "prompt.npy"] = io.npy(self.inputs["prompt"])
        for function, inputs in graphs.items():
            graph = onnx_file(function, inputs, self.model, self.sources, plain=bool(self.plain))
            files[self.out / f"{function.__name__}.onnx"] = graph
        files |= {self.out / name: content for name, content in more.items()}
        for path in files:
            if path.is_dir():
                raise CheckpointError(f"{path}: is a folder; a file of this name is to be written, so remove it")
        io.write(files)
        sizes = {str(path): path.stat().st_size for path in files}
        return Exported(sizes, {name: list(x.shape) for name, x in self.inputs.items()})


def onnx_file(
    function: Callable, inputs: Flat, model: Model, sources: Mapping[Path, str], plain: bool = False
) -> bytes:
    """Write a lowered function as a model file.

    sources: the files of the weights, which are then external data. Without them, the weights are inside in float32.
    """
    from onnx import TensorProto
    from onnx.helper import np_dtype_to_tensor_dtype
    from onnx.numpy_helper import from_array

    stored = flatten(model.params)
    if not sources:
        stored = {name: x.astype(np.float32, copy=False) for name, x in stored.items()}
    graph, result = lower(function, *inputs.values(), nest(stored), model.config, plain=plain)
    proto = graph.to_onnx([name for name, _ in leaves(result)])
    # Only now: the checker, which `to_onnx` asks, opens external data, and refuses links.
    given = [x for x in proto.graph.input if x.name not in stored]
    del proto.graph.input[:]
    proto.graph.input.extend(given)
    read = graph.reads()
    for name, value in stored.items():
        if name not in read:  # ONNX Runtime warns of such a weight
            continue
        if not sources:
            proto.graph.initializer.append(from_array(np.asarray(value), name))
            continue
        assert isinstance(value, np.memmap)
        location = sources[Path(str(value.filename)).resolve()]
        tensor = proto.graph.initializer.add(name=name, dims=value.shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = np_dtype_to_tensor_dtype(value.dtype)
        for key, at in (("location", location), ("offset", value.offset), ("length", value.nbytes)):
            tensor.external_data.add(key=key, value=str(at))
    return proto.SerializeToString()
