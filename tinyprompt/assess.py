"""Assess a prompt on few rows: baselines, standard errors and cross-validation."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tinyprompt.data import Row

MOST_ROWS, MOST_WORDS = 5_000, 10_000  # limits of the bag of words, a dense matrix; the most frequent words are kept


class Share(NamedTuple):
    """An accuracy on a number of rows."""

    value: float
    rows: int

    @property
    def error(self) -> float:
        """The standard error sqrt(p (1 - p) / n). If p is 0 or 1, half a row is added or subtracted."""
        half = 0.5 / self.rows
        p = min(max(self.value, half), 1 - half)
        return math.sqrt(p * (1 - p) / self.rows)

    def __str__(self) -> str:
        return f"{self.value:.3f} +- {self.error:.3f}"


def share(answers: Sequence[str], rows: Sequence[Row]) -> Share:
    """Return the accuracy of answers to rows."""
    return Share(statistics.fmean(a == row.target for a, row in zip(answers, rows, strict=True)), len(rows))


def table(shares: Mapping[str, Share]) -> list[str]:
    """Format shares, one per line."""
    return [f"  {name:<26}{one}" for name, one in shares.items()]


def majority(train: Sequence[Row], test: Sequence[Row]) -> Share:
    """Return the accuracy of the most frequent training target."""
    return share([statistics.mode(row.target for row in train)] * len(test), test)


def bag_of_words(train: Sequence[Row], test: Sequence[Row], steps: int = 300) -> list[str]:
    """Answer test rows by logistic regression on tf-idf features of the training words.

    The weights are trained by gradient descent with momentum on the mean cross entropy with a small L2 penalty.
    """
    documents = [Counter(re.findall(r"\w+", row.input.lower())) for row in (*train, *test)]
    seen = Counter(word for document in documents[: len(train)] for word in document)
    columns = {word: i for i, (word, _) in enumerate(seen.most_common(MOST_WORDS))}
    labels = sorted({row.target for row in train})
    x = np.zeros((len(documents), len(columns) + 1), np.float32)
    for row, document in zip(x, documents, strict=True):
        for word in document.keys() & columns.keys():
            idf = 1 + math.log((1 + len(train)) / (1 + seen[word]))
            row[columns[word]] = (1 + math.log(document[word])) * idf
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    x[:, -1] = 1  # bias
    inputs, wanted = x[: len(train)], np.array([[row.target == label for label in labels] for row in train], np.float32)
    weights = np.zeros((x.shape[1], len(labels)), np.float32)
    velocity = np.zeros_like(weights)
    for _ in range(steps):
        scores = inputs @ weights
        p = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
        velocity = 0.9 * velocity - 2.0 * (inputs.T @ (p - wanted) / len(train) + 1e-3 * weights)
        weights += velocity
    return [labels[i] for i in (x[len(train) :] @ weights).argmax(1)]


def folds(rows: Sequence[Row], number: int, seed: int) -> Iterator[tuple[list[Row], list[Row]]]:
    """Yield the training rows and the held-out rows of each fold.

    The rows of a target are spread over all folds. Rows with the same input stay together.
    """
    targets = {row.input: row.target for row in rows}
    names = [*targets]
    inputs = [names[i] for i in np.random.default_rng(seed).permutation(len(targets))]
    inputs.sort(key=targets.__getitem__)
    for k in range(number):
        held_out = set(inputs[k::number])
        yield [row for row in rows if row.input not in held_out], [row for row in rows if row.input in held_out]


def cross_validate(
    rows: Sequence[Row], number: int, seed: int, answer: Callable[[list[Row], list[Row]], Sequence[str]]
) -> Share:
    """Return the accuracy over all rows, each answered by a prompt that was tuned without it.

    Args:
        number: Number of folds.
        answer: A function that tunes on its first argument and answers its second.
    """
    answers: list[str] = []
    held_out: list[Row] = []
    for train, test in folds(rows, number, seed):
        answers += answer(train, test)
        held_out += test
    return share(answers, held_out)
