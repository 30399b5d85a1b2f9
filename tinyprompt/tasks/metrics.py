"""Scores of predicted against wanted texts, as t5.evaluation.metrics computes them, but from 0 to 1."""

import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np


def normalize(text: str) -> str:
    """Lower the case and fold white space, before texts are compared."""
    return " ".join(text.lower().split())


def _pairs(predicted: Sequence, wanted: Sequence) -> zip:
    """Zip both sequences. Raises ValueError if their lengths differ or are 0."""
    if len(predicted) != len(wanted) or not wanted:
        raise ValueError(f"score of {len(predicted)} predictions against {len(wanted)} targets")
    return zip(predicted, wanted, strict=True)


def _classes(predicted: Sequence[str], wanted: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return both as arrays of normalised texts. Raises ValueError if their lengths differ or are 0."""
    p, w = zip(*((normalize(p), normalize(w)) for p, w in _pairs(predicted, wanted)), strict=True)
    return np.array(p, object), np.array(w, object)  # a numpy string would lose NULs at its end


def accuracy(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """Compute the share of predictions that equal the wanted text after normalisation, 0 to 1.

    For label words it is accuracy, for free text exact match. Raises ValueError on unequal lengths or none.
    """
    p, w = _classes(predicted, wanted)
    return float(np.mean(p == w))


def majority(train: Sequence[str], test: Sequence[str]) -> float:
    """Compute the accuracy of the most frequent training target (ties: the first)."""
    return accuracy([statistics.mode(train)] * len(test), test)


def confusion(predicted: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """Count the answers (columns) for each wanted label (rows). Raises ValueError if lengths differ or are 0."""
    counts = Counter((w, p) for p, w in _pairs(predicted, wanted))
    return [[counts[w, p] for p in labels] for w in labels]


def f1(predicted: Sequence[str], wanted: Sequence[str], positive: str) -> float:
    """Compute F1 for one of two labels. Other predictions count as the wrong label. Without true positives it is 0.

    T5's f1_score_with_invalid. Raises ValueError on unequal lengths or none.
    """
    p, w = _classes(predicted, wanted)
    right = w == normalize(positive)
    hits = np.sum(right & (p == w))
    return float(2 * hits / (2 * hits + np.sum(p != w))) if hits else 0.0


def label_f1(predicted: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Compute F1 for each label against the rest. It is 0 for a label that never occurs.

    Raises ValueError on unequal lengths or none.
    """
    p, w = _classes(predicted, wanted)
    each = {}
    for label in labels:
        given, right = p == normalize(label), w == normalize(label)
        each[label] = float(2 * np.sum(given & right) / max(1, np.sum(given) + np.sum(right)))
    return each


def macro_f1(predicted: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> float:
    """Compute the mean of `label_f1`, T5's mean_multiclass_f1. Raises ValueError on unequal lengths or none."""
    return statistics.fmean(label_f1(predicted, wanted, labels).values())


def matthews(predicted: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> float:
    """Compute the Matthews correlation coefficient, -1 to 1. Other answers are one more class. Undefined is 0.

    For more than two classes: Gorodkin's R_K. Raises ValueError on unequal lengths or none.
    """
    p, w = _classes(predicted, wanted)
    known = [normalize(label) for label in labels]
    one_hot_p, one_hot_w = (
        np.stack([*(x == label for label in known), ~np.isin(x, known)]).astype(float) for x in (p, w)
    )
    n = len(w)
    guesses, classes = one_hot_p.sum(1), one_hot_w.sum(1)
    both = n * np.sum(one_hot_p * one_hot_w) - guesses @ classes
    scale = (n * n - guesses @ guesses) * (n * n - classes @ classes)
    return float(both / np.sqrt(scale)) if scale else 0.0


def group_exact_match(predicted: Sequence[str], wanted: Sequence[str], groups: Sequence[str]) -> float:
    """Compute the share of groups whose predictions are all right. Raises ValueError if lengths differ or are 0."""
    right: dict[str, bool] = {}
    p, w = _classes(predicted, wanted)
    for hit, group in _pairs((p == w).tolist(), groups):
        right[group] = right.get(group, True) and hit
    return float(np.mean(list(right.values())))


def normalize_answer(text: str) -> str:
    """Lower the case and remove ASCII punctuation, articles and extra white space, as SQuAD does."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _token_f1(predicted: str, wanted: str) -> float:
    """Compute F1 of the shared words of two normalised texts."""
    p, w = predicted.split(), wanted.split()
    shared = sum((Counter(p) & Counter(w)).values())
    return 2 * shared / (len(p) + len(w)) if shared else 0.0


def _best(score: Callable[[str, str], float], predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Average the best score of each prediction against its answers, both normalised."""
    return float(
        np.mean(
            [
                max(score(normalize_answer(one), normalize_answer(answer)) for answer in right)
                for one, right in _pairs(predicted, answers)
            ]
        )
    )


def answer_exact_match(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Compute SQuAD's exact match: the share of predictions that equal an answer after `normalize_answer`.

    Raises ValueError on unequal lengths, none, or no answer to a question.
    """
    return _best(lambda p, w: float(p == w), predicted, answers)


def answer_f1(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Compute SQuAD's F1: shared words with the most similar answer, 0 to 1.

    Raises ValueError on unequal lengths, none, or no answer to a question.
    """
    return _best(_token_f1, predicted, answers)
