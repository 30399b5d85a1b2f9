"""Scores of predicted against wanted texts."""

from collections import Counter
from collections.abc import Sequence


def normalize(text: str) -> str:
    """Lower case, white space folded: what an answer must equal after."""
    return " ".join(text.lower().split())


def accuracy(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of predictions that equal the wanted text once both are normalised, 0 to 1.

    For label words it is accuracy, for free text exact match. Raises ValueError on unequal lengths or none.
    """
    if len(predicted) != len(wanted) or not wanted:
        raise ValueError(f"accuracy of {len(predicted)} predictions against {len(wanted)} targets")
    return sum(normalize(p) == normalize(w) for p, w in zip(predicted, wanted, strict=True)) / len(wanted)


def majority(train: Sequence[str], test: Sequence[str]) -> float:
    """Accuracy of always answering the commonest target of the training rows (ties: the first seen)."""
    return accuracy([Counter(train).most_common(1)[0][0]] * len(test), test)
