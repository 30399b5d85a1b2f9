"""Tuning and answering in one call, for tests that pass every part by name."""

from dataclasses import asdict

import numpy as np
from random_models import random_weights, raw_config

from tinyprompt import tree
from tinyprompt.files.config import parse_config
from tinyprompt.model import Model, Prompt
from tinyprompt.predict import predict
from tinyprompt.settings import Settings
from tinyprompt.tasks.metrics import accuracy
from tinyprompt.tokenizer import ByteTokenizer
from tinyprompt.train import TaskData
from tinyprompt.tuning import Result, run_task


def byte_model(family="t5-1.1", dtype=np.float32, seed=0):
    """Return a small random byte-level model whose logits are large enough for training to work."""
    config = parse_config(raw_config(family, vocab_size=384))
    flat = random_weights(config, seed)
    if "lm_head.weight" in flat:
        flat["lm_head.weight"] *= 3
    return Model(config, tree.nest({k: v.astype(dtype) for k, v in flat.items()}), ByteTokenizer(), "tiny")


def right_answers(answers, rows):
    """Return the accuracy of answers to rows."""
    return accuracy(answers, [row.target for row in rows])


def tune(model, rows, dev, settings, labels, device=None, resume=None, init=(), each=None):
    """Run a whole tuning; call `each` with every Progress."""
    for progress in run_task(model, TaskData(rows, dev, labels, right_answers, init), settings, device, resume):
        if each:
            each(progress)
    return Result.of(progress, 0.0)


def saver(kept):
    """Return an `each` that keeps the prompts that a run would save."""
    return lambda progress: kept.append(progress.prompt) if progress.prompt else None


def prompt_of(model, params, labels=None, settings=None):
    """Return the prompt that tuning would return."""
    return Prompt(dict(params), model.name, model.fingerprint, labels, asdict(settings or Settings()))


def answer(model, texts, labels, params=(), settings=None, device=None):
    """Answer with a method's arrays, or with the bare model."""
    if not params:
        return predict(model, Prompt(label_words=labels, settings=asdict(settings or Settings())), texts, device)
    settings = settings or Settings(prompt_length=len(next(iter(dict(params).values()))))
    return predict(model, prompt_of(model, params, labels, settings), texts, device)
