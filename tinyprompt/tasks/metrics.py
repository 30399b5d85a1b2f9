"""Scores of predicted against wanted texts, as T5 computes them (t5.evaluation.metrics), but from 0 to 1."""

import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np


def normalize(text: str) -> str:
    """Lower case, white space folded: what an answer must equal after."""
    return " ".join(text.lower().split())


def _pairs(predicted: Sequence, wanted: Sequence) -> zip:
    """Both together. Raises ValueError on unequal lengths or none."""
    if len(predicted) != len(wanted) or not wanted:
        raise ValueError(f"score of {len(predicted)} predictions against {len(wanted)} targets")
    return zip(predicted, wanted, strict=True)


def _classes(predicted: Sequence[str], wanted: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays of normalised texts. Raises ValueError on unequal lengths or none."""
    p, w = zip(*((normalize(p), normalize(w)) for p, w in _pairs(predicted, wanted)), strict=True)
    return np.array(p, object), np.array(w, object)  # a numpy string would lose NULs at its end


def accuracy(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of predictions that equal the wanted text once both are normalised, 0 to 1.

    For label words it is accuracy, for free text exact match. Raises ValueError on unequal lengths or none.
    """
    p, w = _classes(predicted, wanted)
    return float(np.mean(p == w))


def majority(train: Sequence[str], test: Sequence[str]) -> float:
    """Accuracy of always answering the commonest target of the training rows (ties: the first seen)."""
    return accuracy([statistics.mode(train)] * len(test), test)


def confusion(predicted: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """Count the answers (columns) to each wanted label (a row). Raises ValueError on unequal lengths or none."""
    counts = Counter((w, p) for p, w in _pairs(predicted, wanted))
    return [[counts[w, p] for p in labels] for w in labels]


def f1(predicted: Sequence[str], wanted: Sequence[str], positive: str) -> float:
    """F1 of one of two labels; a prediction that is neither label counts as the wrong one. 0 without a true positive.

    T5's f1_score_with_invalid. Raises ValueError on unequal lengths or none.
    """
    p, w = _classes(predicted, wanted)
    right = w == normalize(positive)
    hits = np.sum(right & (p == w))
    return float(2 * hits / (2 * hits + np.sum(p != w))) if hits else 0.0


def macro_f1(predicted: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> float:
    """Mean over the labels of the F1 of each; that of a label never met is 0.

    T5's mean_multiclass_f1. Raises ValueError on unequal lengths or none.
    """
    p, w = _classes(predicted, wanted)
    each = []
    for label in map(normalize, labels):
        met = np.sum(p == label) + np.sum(w == label)
        each.append(2 * np.sum((p == label) & (w == label)) / met if met else 0.0)
    return float(np.mean(each))


def matthews(predicted: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> float:
    """Matthews correlation coefficient, -1 to 1; all that is no label is one more class. 0 where it is undefined.

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
    """Share of groups whose every prediction is right, 0 to 1. Raises ValueError on unequal lengths or none."""
    right: dict[str, bool] = {}
    p, w = _classes(predicted, wanted)
    for hit, group in _pairs((p == w).tolist(), groups):
        right[group] = right.get(group, True) and hit
    return float(np.mean(list(right.values())))


def normalize_answer(text: str) -> str:
    """Lower case without ASCII punctuation, articles and extra white space, as SQuAD's own evaluation does it."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _token_f1(predicted: str, wanted: str) -> float:
    """F1 of the words that two normalised texts share; 0 where they share none."""
    p, w = predicted.split(), wanted.split()
    shared = sum((Counter(p) & Counter(w)).values())
    return 2 * shared / (len(p) + len(w)) if shared else 0.0


def _best(score: Callable[[str, str], float], predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Mean over the predictions of the best score against one of its answers, both normalised."""
    return float(
        np.mean(
            [
                max(score(normalize_answer(one), normalize_answer(answer)) for answer in right)
                for one, right in _pairs(predicted, answers)
            ]
        )
    )


def answer_exact_match(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """SQuAD's exact match: share of predictions that equal one of their answers after `normalize_answer`, 0 to 1.

    Raises ValueError on unequal lengths, none, or no answer to a question.
    """
    return _best(lambda p, w: float(p == w), predicted, answers)


def answer_f1(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """SQuAD's F1: words shared with the likest of the answers, 0 to 1.

    Raises ValueError on unequal lengths, none, or no answer to a question.
    """
    return _best(_token_f1, predicted, answers)
