"""Ensembles of prompts for one task: the majority vote, and the mean of their probabilities."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tinyprompt.errors import DataError
from tinyprompt.model import Model, Prompt
from tinyprompt.predict import Answer, answer


class Ensemble(NamedTuple):
    """The answers of several prompts to each text, and their combined answers."""

    each: list[list[str]]  # the answers of each prompt to all texts
    majority: list[str]
    mean: list[str] | None  # None for free text, which has no probabilities


def ensemble(model: Model, prompts: Sequence[Prompt], texts: Sequence[str], device: str | None = None) -> Ensemble:
    """Answer every text with every prompt in one pass (Lester et al. 2021, section 6).

    The majority answer is the most frequent answer. The higher mean probability breaks a tie, or, for free text, the
    order of the prompts. The mean answer is the label word with the highest mean probability.

    Args:
        model: The frozen model.
        prompts: Prompts with the same label words.
        texts: The texts to answer.
        device: A device of `device.DEVICES`. The default is "cpu" with ONNX Runtime, else "numpy".

    Returns:
        The answers of each prompt, the majority answers, and the mean answers.

    Raises:
        DataError: The label words of the prompts differ.
        CheckpointError: A prompt belongs to another model.

    Example:
        >>> ensemble(model, [load_prompt(f"mine-{i}.safetensors") for i in range(5)], texts).majority
    """
    if isinstance(texts, str):
        raise TypeError(f"expected a list of texts, found the text {texts!r:.60}")
    words = {frozenset(prompt.label_words or ()) for prompt in prompts}
    if len(words) != 1:
        some = " and ".join(", ".join(sorted(one)) or "free text" for one in sorted(words, key=sorted)) or "no prompt"
        raise DataError(f"an ensemble needs prompts with the same label words, found {some}; tune them on one task")
    found = answer(model, [(prompt, text) for text in texts for prompt in prompts], device)
    rows = [found[i : i + len(prompts)] for i in range(0, len(found), len(prompts))]
    each = [[row[i].text for row in rows] for i in range(len(prompts))]
    means = [_means(row) for row in rows]
    mean = [max(shares, key=shares.__getitem__) for shares in means] if any(words) else None
    majority = [vote([one.text for one in row], shares) for row, shares in zip(rows, means, strict=True)]
    return Ensemble(each, majority, mean)


def _means(row: Sequence[Answer]) -> dict[str, float]:
    """Average the probability of each label word."""
    return {word: float(np.mean([one.probabilities[word] for one in row])) for word in row[0].probabilities}


def vote(texts: Sequence[str], means: Mapping[str, float]) -> str:
    """Return the most frequent answer. The higher mean probability breaks a tie, then the order."""
    votes = Counter(texts)
    return max(votes, key=lambda text: (votes[text], means.get(text, 0.0)))
