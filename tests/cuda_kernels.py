"""The operators that our graphs need on CUDA, with their dtypes. `cuda_kernels.json` lists the supported ones.

    python tests/cuda_kernels.py      # run every graph on a machine with onnxruntime-gpu, and write the list

`test_cuda_kernels.py` fails if a graph needs an operator that is not in the list. The graphs are training steps,
ranking and decoding of every family and method, with weights of every dtype, and products in float32 and bfloat16.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from random_models import batch, random_weights, raw_config

from tinyprompt import decode, methods, t5, train
from tinyprompt.data import Batch
from tinyprompt.files.config import parse_config
from tinyprompt.predict import pad_labels
from tinyprompt.settings import Settings
from tinyprompt.tree import flatten, nest

LIST = Path(__file__).with_suffix(".json")
SETTINGS = Settings(prompt_length=5, rank=2, hidden=8)
KERNEL_ATTRIBUTES = ("reduction", "approximate")


def model(family, dtype):
    config = parse_config(raw_config(family))
    params = nest({name: value.astype(dtype) for name, value in random_weights(config, 0).items()})
    for value in flatten(params).values():
        value.flags.writeable = False
    return config, params


def rows(length):
    ids, mask, labels, weights = batch(0, 61, 3, length, 4)
    return Batch(ids, mask, labels, weights.astype(np.float32))


def problems() -> Iterator[tuple[str, Any, tuple]]:
    """Yield a name, a function and its arguments for each computation that runs on a device."""
    kinds = [("t5-1.0", np.float32), ("umt5", np.float32), *(("t5-1.1", x) for x in (np.float32, np.float16, bfloat16))]
    for family, dtype in kinds:
        config, params = model(family, dtype)
        for method in methods.METHODS if dtype == np.float32 else ("prompt",):
            name = f"{family} {np.dtype(dtype)} {method}"
            for length in (7, 40) if method in ("prompt", "prefix") else (40,):
                yield from method_problems(f"{name} {length}", config, params, method, rows(length))
        embeds = np.zeros((3, 40, config.d_model), np.float32)
        yield f"mixed {family} {np.dtype(dtype)}", t5.encode, (params, config, embeds, rows(40).attention_mask)


def method_problems(name, config, params, method, given) -> Iterator[tuple[str, Any, tuple]]:
    """Yield a training step with and without dropout, ranking, and the three parts of decoding."""
    shapes = methods.trained_shapes(config, replace(SETTINGS, method=method), 3)
    trained = {name: np.full(shape, 0.1, np.float32) for name, shape in shapes.items()}
    if method == "warp":
        given = given._replace(labels=np.clip(given.labels, 0, 2)[:, :1], weights=given.weights[:, :1])
    step = trained, params, config, given
    yield f"step {name}", train.loss_and_grads, (*step, t5.unchanged, 1e-4)
    applied = methods.apply(params, methods.stored(trained, config))
    inputs = applied, config, given.input_ids, given.attention_mask
    labels = pad_labels([[(0,), (1,), (2,)] if method == "warp" else [(5, 1), (6, 7, 1)]] * 3)
    yield f"ranking {name}", decode.ranked, (*inputs, *labels)
    if method not in ("prompt", "prefix"):
        return
    yield f"dropout {name}", train.loss_and_grads, (*step, t5.dropout(0.1, 0))
    yield f"loss {name}", train.loss, step
    yield f"encoder {name}", t5.encode, inputs
    states, mask = t5.encode(*inputs)
    states = states.astype(np.float32)
    yield f"cache {name}", decode.first_cache, (applied, config, states, 2, 8)
    cache = {name: x.astype(np.float32) for name, x in decode.first_cache(applied, config, states, 1, 8)[1].items()}
    yield f"wider cache {name}", decode.wider, ({name: x for name, x in cache.items() if "SelfAttention" in name}, 8)
    decoder = {name: part for name, part in applied.items() if name != "encoder"}
    state = decoder, config, cache, given.labels[:, 0], np.array([2]), 8, mask
    yield f"next {name}", decode.decode_next, (*state, None, decode.likeliest)
    yield f"next of beams {name}", decode.decode_next, (*state, np.arange(len(mask)), decode.Candidates(4))


def kernels(graph) -> set[str]:
    """Return each operator of a graph with the dtypes of its inputs and its output."""

    def signature(x):
        attributes = [f"{k}={v}" for k, v in sorted(x.attributes.items()) if k in KERNEL_ATTRIBUTES]
        return f"{x.op}({', '.join([*(str(i.dtype) for i in x.inputs), *attributes])}) -> {x.dtype}"

    return {signature(x) for x in graph.nodes}


def main():
    """Run every graph on the GPU, and write the list."""
    from tinyprompt.device import sessions

    found, opened = set(), sessions.open_session

    def open_session(graph, place, capture=False):
        session = opened(graph, place, capture)
        found.update(kernels(graph))
        return session

    sessions.open_session = open_session
    for name, function, arguments in problems():
        for where in ("cuda", "cuda-bf16"):
            sessions.compile.cache_clear()  # free the memory of the session
            sessions.compile(function, where)(*arguments)
        print(f"{len(found):4} {name}", flush=True)
    LIST.write_text(json.dumps(sorted(found), indent=0) + "\n")


if __name__ == "__main__":
    main()
