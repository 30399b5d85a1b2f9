"""Tuning and answering in one call, for tests that name every part."""

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
    """A small random model that reads bytes, and is sure enough of itself to be taught."""
    config = parse_config(raw_config(family, vocab_size=384))
    flat = random_weights(config, seed)
    if "lm_head.weight" in flat:
        flat["lm_head.weight"] *= 3
    return Model(config, tree.nest({k: v.astype(dtype) for k, v in flat.items()}), ByteTokenizer(), "tiny")


def right_answers(answers, rows):
    """Accuracy of answers to rows."""
    return accuracy(answers, [row.target for row in rows])


def tune(model, rows, dev, settings, labels, device=None, resume=None, init=(), each=None):
    """A whole run; `each` is given every Progress."""
    for progress in run_task(model, TaskData(rows, dev, labels, right_answers, init), settings, device, resume):
        if each:
            each(progress)
    return Result.of(progress, 0.0)


def saver(kept):
    """For `each`: keep the prompts that a run would save."""
    return lambda progress: kept.append(progress.prompt) if progress.prompt else None


def prompt_of(model, params, labels=None, settings=None):
    """A prompt as tuning leaves it."""
    return Prompt(dict(params), model.name, model.fingerprint, labels, asdict(settings or Settings()))


def answer(model, texts, labels, params=(), settings=None, device=None):
    """Answers with arrays of a method, or of the bare model."""
    if not params:
        return predict(model, Prompt(label_words=labels, settings=asdict(settings or Settings())), texts, device)
    settings = settings or Settings(prompt_length=len(next(iter(dict(params).values()))))
    return predict(model, prompt_of(model, params, labels, settings), texts, device)
