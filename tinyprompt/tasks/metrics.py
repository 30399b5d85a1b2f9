"""Metrics between predicted and target texts, as in t5.evaluation.metrics, but from 0 to 1."""

import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np


def normalize(text: str) -> str:
    """Convert a text to lower case and collapse white space, for comparisons."""
    return " ".join(text.lower().split())


def _pairs(predicted: Sequence, wanted: Sequence) -> zip:
    """Zip predictions and targets. Raises ValueError if their lengths differ or are 0."""
    if len(predicted) != len(wanted) or not wanted:
        raise ValueError(f"score of {len(predicted)} predictions against {len(wanted)} targets")
    return zip(predicted, wanted, strict=True)


def _classes(predicted: Sequence[str], wanted: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return both sequences as arrays of normalised texts. Raises ValueError if their lengths differ or are 0."""
    p, w = zip(*((normalize(p), normalize(w)) for p, w in _pairs(predicted, wanted)), strict=True)
    return np.array(p, object), np.array(w, object)  # a NumPy string would drop trailing NULs


def accuracy(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """Compute the share of predictions that equal the target after normalisation, from 0 to 1.

    This is the accuracy of label words, and the exact match of free text. Raises ValueError if lengths differ or are 0.
    """
    p, w = _classes(predicted, wanted)
    return float(np.mean(p == w))


def majority(train: Sequence[str], test: Sequence[str]) -> float:
    """Compute the accuracy of the most frequent training target. Of equally frequent targets, the first counts."""
    return accuracy([statistics.mode(train)] * len(test), test)


def confusion(predicted: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """Count the answers (columns) for each target label (rows). Raises ValueError if lengths differ or are 0."""
    counts = Counter((w, p) for p, w in _pairs(predicted, wanted))
    return [[counts[w, p] for p in labels] for w in labels]


def f1(predicted: Sequence[str], wanted: Sequence[str], positive: str) -> float:
    """Compute the F1 score of one of two labels. Invalid predictions count as wrong. Without true positives it is 0.

    It equals T5's f1_score_with_invalid. Raises ValueError if lengths differ or are 0.
    """
    p, w = _classes(predicted, wanted)
    right = w == normalize(positive)
    hits = np.sum(right & (p == w))
    return float(2 * hits / (2 * hits + np.sum(p != w))) if hits else 0.0


def label_f1(predicted: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Compute the F1 score of each label against the rest. The F1 score of a label that never occurs is 0.

    Raises ValueError if lengths differ or are 0.
    """
    p, w = _classes(predicted, wanted)
    each = {}
    for label in labels:
        given, right = p == normalize(label), w == normalize(label)
        each[label] = float(2 * np.sum(given & right) / max(1, np.sum(given) + np.sum(right)))
    return each


def macro_f1(predicted: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> float:
    """Compute the mean of `label_f1`, as T5's mean_multiclass_f1. Raises ValueError if lengths differ or are 0."""
    return statistics.fmean(label_f1(predicted, wanted, labels).values())


def matthews(predicted: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> float:
    """Compute the Matthews correlation coefficient, from -1 to 1. Other answers form one more class. Undefined is 0.

    For more than two classes, it is Gorodkin's R_K. Raises ValueError if lengths differ or are 0.
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
    """Compute the share of groups with only correct predictions. Raises ValueError if lengths differ or are 0."""
    right: dict[str, bool] = {}
    p, w = _classes(predicted, wanted)
    for hit, group in _pairs((p == w).tolist(), groups):
        right[group] = right.get(group, True) and hit
    return float(np.mean(list(right.values())))


def normalize_answer(text: str) -> str:
    """Convert to lower case and remove ASCII punctuation, articles and extra white space, as SQuAD does."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _token_f1(predicted: str, wanted: str) -> float:
    """Compute the F1 score of the words of two normalised texts."""
    p, w = predicted.split(), wanted.split()
    shared = sum((Counter(p) & Counter(w)).values())
    return 2 * shared / (len(p) + len(w)) if shared else 0.0


def _best(score: Callable[[str, str], float], predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Return the mean over predictions of the best score with any of their answers. All texts are normalised."""
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

    Raises ValueError if lengths differ or are 0, or if a question has no answer.
    """
    return _best(lambda p, w: float(p == w), predicted, answers)


def answer_f1(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Compute SQuAD's F1 score: the overlap of words with the most similar answer, from 0 to 1.

    Raises ValueError if lengths differ or are 0, or if a question has no answer.
    """
    return _best(_token_f1, predicted, answers)
