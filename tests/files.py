"""Small files for the tests: a model directory, and safetensors files built by hand."""

import json

import numpy as np
from random_models import random_weights, raw_config
from safetensors.numpy import save_file

from tinyprompt.files.config import parse_config

VOCAB = 384  # the vocabulary of ByT5; its tokenizer needs only this file:
WORDS = json.dumps({"tokenizer_class": "ByT5Tokenizer"})
SMALL = raw_config("t5-1.1", vocab_size=VOCAB, d_model=4, d_kv=2, d_ff=6, num_layers=1, num_decoder_layers=1)


def write(folder, raw, flat):
    """Write a model directory with the given weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(WORDS)
    save_file(flat, folder / "model.safetensors")
    return folder


def weights(raw=SMALL, seed=0):
    return {k: v.astype(np.float32) for k, v in random_weights(parse_config(raw), seed).items()}


def by_hand(path, header, data=bytes(32)):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


A = dict(dtype="F32", shape=[2, 2], data_offsets=[0, 16])
B = dict(dtype="F16", shape=[8], data_offsets=[16, 32])
