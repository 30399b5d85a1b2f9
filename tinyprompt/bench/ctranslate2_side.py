"""CTranslate2's side of `tinyprompt bench`. It only generates text. A prompt of tokens stands in for the soft prompt.

It runs in its own process, and no other module imports this one.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import ctranslate2
from ctranslate2.converters import TransformersConverter
from transformers import AutoTokenizer

from tinyprompt.bench.steps import Problem
from tinyprompt.check.process import serve

PRECISIONS = {"ct2-fp32": "float32", "ct2-int8": "int8"}


def run(engine: str, folder: Path, problem: Problem) -> None:
    """Answer the call "generate" in float32, or with linear layers in int8."""
    precision = PRECISIONS[engine]
    TransformersConverter(str(folder)).convert(str(folder / engine), quantization=precision)
    model = ctranslate2.Translator(
        str(folder / engine), compute_type=precision, inter_threads=1, intra_threads=os.cpu_count()
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = problem.prompt_length + problem.input_tokens
    batch = replace(problem, input_tokens=tokens).draw(len(tokenizer))
    rows = [
        tokenizer.convert_ids_to_tokens(ids[mask > 0])
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    exactly = {"min_decoding_length": problem.new_tokens, "max_decoding_length": problem.new_tokens}

    def write():
        found = model.translate_batch(rows, beam_size=1, max_input_length=0, **exactly)
        assert all(len(one.hypotheses[0]) == problem.new_tokens for one in found)

    serve({"generate": write})


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    run(what, Path(where), Problem(**json.loads(rest[0])))
