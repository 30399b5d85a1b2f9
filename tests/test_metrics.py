"""Metrics against their definitions; test_tasks.py compares them with t5.evaluation.metrics on real files."""

import math
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from profiles import examples

from tinyprompt.tasks import metrics

LABELS = ("no", "yes", "maybe")
BINARY = st.lists(st.tuples(st.sampled_from([*LABELS[:2], "junk"]), st.sampled_from(LABELS[:2])), min_size=1)
CLASSES = st.lists(st.tuples(st.sampled_from([*LABELS, "junk"]), st.sampled_from(LABELS)), min_size=1)


def f1(precision_of, recall_of, hits):
    """Return the harmonic mean of precision and recall, from counts."""
    if not hits:
        return 0.0
    precision, recall = hits / precision_of, hits / recall_of
    return 2 * precision * recall / (precision + recall)


@examples(100)
@given(BINARY)
def test_f1_counts_an_unknown_answer_as_the_wrong_label(rows):
    mended = [p if p in LABELS[:2] else {"no": "yes", "yes": "no"}[w] for p, w in rows]
    wanted = [w for _, w in rows]
    hits = sum(p == w == "yes" for p, w in zip(mended, wanted, strict=True))
    expected = f1(mended.count("yes"), wanted.count("yes"), hits)
    assert metrics.f1([p for p, _ in rows], wanted, "yes") == pytest.approx(expected)


@examples(100)
@given(CLASSES)
def test_macro_f1_averages_the_labels(rows):
    predicted, wanted = map(list, zip(*rows, strict=True))
    each = [f1(predicted.count(label), wanted.count(label), sum(p == w == label for p, w in rows)) for label in LABELS]
    assert list(metrics.label_f1(predicted, wanted, LABELS).values()) == pytest.approx(each)
    assert metrics.macro_f1(predicted, wanted, LABELS) == pytest.approx(sum(each) / 3)


@examples(100)
@given(CLASSES)
def test_matthews_equals_the_covariance_formula(rows):
    classes = [*LABELS, "junk"]
    table = {(a, b): sum((p, w) == (a, b) for p, w in rows) for a in classes for b in classes}
    k, n = range(4), [[table[a, b] for b in classes] for a in classes]
    # Gorodkin 2004, as a covariance of one-hot vectors
    triples = [(a, b, c) for a in k for b in k for c in k]
    numerator = sum(n[a][a] * n[b][c] - n[a][b] * n[c][a] for a, b, c in triples)
    rows_of, columns_of = [sum(n[a]) for a in k], [sum(n[b][a] for b in k) for a in k]
    spread = math.sqrt(sum(x * (len(rows) - x) for x in rows_of) * sum(x * (len(rows) - x) for x in columns_of))
    predicted, wanted = map(list, zip(*rows, strict=True))
    found = metrics.matthews(predicted, wanted, LABELS)
    assert found == pytest.approx(numerator / spread if spread else 0.0)
    assert -1 - 1e-12 <= found <= 1 + 1e-12


def test_matthews_of_two_classes():
    predicted, wanted = ["yes"] * 6 + ["no"] * 4, ["yes"] * 5 + ["no"] * 4 + ["yes"]
    assert metrics.matthews(predicted, wanted, LABELS[:2]) == pytest.approx((5 * 3 - 1 * 1) / math.sqrt(6 * 6 * 4 * 4))
    assert metrics.matthews(["yes", "no"], ["no", "yes"], LABELS[:2]) == -1
    assert metrics.matthews(["yes", "yes"], ["no", "yes"], LABELS[:2]) == 0
    assert metrics.matthews(["a", "b"], ["no", "yes"], LABELS[:2]) == 0  # unknown answers are one class


def test_a_group_is_right_if_all_its_rows_are():
    right = ["a", "b", "c", "d"]
    assert metrics.group_exact_match(["a", "x", "c", "d"], right, ["1", "2", "1", "2"]) == 0.5
    assert metrics.group_exact_match(right, right, ["1", "1", "1", "2"]) == 1
    with pytest.raises(ValueError, match="4 predictions against 3 targets"):
        metrics.group_exact_match(right, right, ["1", "1", "1"])


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat, an animal!", "cat animal"),
        ("U.S. o'clock", "us oclock"),
        ("a-the", "athe"),
        ("«the» é", "« » é"),
        ("The", ""),
        ("bathe an", "bathe"),
    ],
)
def test_squad_normalisation(text, normal):
    assert metrics.normalize_answer(text) == normal


WORDS = st.lists(st.sampled_from(["cat", "sat", "the", "Cat!", "on"]), max_size=5).map(" ".join)


@examples(100)
@given(st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=5))
def test_squad_scores_take_the_best_answer(rows):
    def overlap(predicted, answer):
        p, w = (metrics.normalize_answer(text).split() for text in (predicted, answer))
        return f1(len(p), len(w), (Counter(p) & Counter(w)).total())

    predicted, answers = map(list, zip(*rows, strict=True))
    expected = sum(max(overlap(p, answer) for answer in right) for p, right in rows) / len(rows)
    assert metrics.answer_f1(predicted, answers) == pytest.approx(expected)
    exact = metrics.answer_exact_match(predicted, answers)
    assert exact == pytest.approx(
        sum(metrics.normalize_answer(p) in map(metrics.normalize_answer, right) for p, right in rows) / len(rows)
    )
    assume(all(map(metrics.normalize_answer, predicted)))  # for two empty texts, as in SQuAD, only the exact match is 1
    assert exact <= metrics.answer_f1(predicted, answers) + 1e-12


SCORES = [
    metrics.accuracy,
    lambda p, w: metrics.f1(p, w, "yes"),
    lambda p, w: metrics.macro_f1(p, w, LABELS),
    lambda p, w: metrics.matthews(p, w, LABELS),
    lambda p, w: metrics.group_exact_match(p, w, w),
    lambda p, w: metrics.answer_exact_match(p, [[x] for x in w]),
    lambda p, w: metrics.answer_f1(p, [[x] for x in w]),
]


@pytest.mark.parametrize("score", SCORES)
def test_perfect_predictions_score_1_and_unequal_lengths_are_refused(score):
    assert score([" YES", "no", "Maybe\n"], ["yes", "no", "maybe"]) == pytest.approx(1)
    for predicted, wanted in (([], []), (["yes"], ["yes", "no"]), (["yes"], [])):
        with pytest.raises(ValueError, match=f"{len(predicted)} predictions against {len(wanted)} targets"):
            score(predicted, wanted)


@pytest.mark.parametrize("score", SCORES[:2])
def test_trailing_null_characters_are_compared(score):
    assert score(["yes\0"], ["yes"]) == 0
