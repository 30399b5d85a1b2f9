"""Decoding over tables instead of a network, and the scores of answers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from tinyprompt import generate, metrics

EOS = 1


def chain(*rows):
    """Logits that make row i write rows[i], then eos for ever. The token at position t depends on t only."""

    def logits_of(ids):
        assert (ids[:, 0] == 0).all()
        out = np.zeros((*ids.shape, 10))
        for i, row in enumerate(rows):
            for t in range(ids.shape[1]):
                out[i, t, row[t] if t < len(row) else EOS] = 1
        return out

    return logits_of


def table_logits(table):
    """Logits of the next token by the token before it, a table (rows, V, V)."""
    return lambda ids: np.stack([one[row] for one, row in zip(table, ids, strict=True)])


def test_shift_right_puts_pad_in_front():
    assert generate.shift_right(np.array([[5, 6, 1], [7, 1, 0]])).tolist() == [[0, 5, 6], [0, 7, 1]]


def test_greedy_stops_each_row_at_its_eos():
    rows = [[5, 6, 7], [], [8], [9, 9, 9, 9, 9, 9]]
    assert generate.greedy(chain(*rows), 4, 6) == rows


def test_greedy_keeps_a_finished_row_finished():
    # Row 0 would write 4 again after its eos; row 1 goes on meanwhile.
    assert generate.greedy(chain([4, EOS, 4, 4], [5, 6, 7, 8]), 2, 9) == [[4], [5, 6, 7, 8]]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_greedy_writes_at_most_max_tokens(most):
    calls = []
    endless = chain([5] * 9)

    def logits_of(ids):
        calls.append(ids.shape)
        return endless(ids)

    assert generate.greedy(logits_of, 1, most) == [[5] * most]
    assert calls == [(1, t // 8 * 8 + 8) for t in range(most)]


def test_greedy_computes_nothing_after_the_last_eos():
    calls = []
    logits = chain([5], [6, 7])
    generate.greedy(lambda ids: calls.append(1) or logits(ids), 2, 50)
    assert len(calls) == 3


def test_greedy_follows_what_it_wrote():
    table = np.zeros((1, 6, 6))
    for before, after in [(0, 3), (3, 5), (5, 4), (4, EOS)]:
        table[0, before, after] = 1
    assert generate.greedy(table_logits(table), 1, 10) == [[3, 5, 4]]


@examples(100)
@given(
    rows=st.integers(1, 4),
    seed=st.integers(0, 999),
    labels=st.lists(st.lists(st.integers(2, 6), max_size=4).map(lambda ids: [*ids, EOS]), min_size=1, max_size=4),
)
def test_rank_is_the_sum_of_the_log_probabilities(rows, seed, labels):
    table = np.random.default_rng(seed).normal(0, 3, (rows, 7, 7))
    log_p = table - np.log(np.exp(table).sum(-1, keepdims=True))
    wanted = [[sum(one[a, b] for a, b in zip([0, *label], label, strict=False)) for label in labels] for one in log_p]
    scores = generate.rank(table_logits(table), rows, labels)
    assert scores.shape == (rows, len(labels))
    assert np.allclose(scores, wanted)


def test_accuracy_forgives_case_and_white_space_only():
    assert metrics.normalize("  New\n York\t ") == "new york"
    assert metrics.accuracy(["Good ", "bad", "not  bad", "good!"], ["good", "good", "Not bad", "good"]) == 0.5


@pytest.mark.parametrize(("predicted", "wanted"), [([], []), (["a"], ["a", "b"]), (["a"], [])])
def test_accuracy_of_unequal_lengths_or_nothing_raises(predicted, wanted):
    with pytest.raises(ValueError, match=f"{len(predicted)} predictions against {len(wanted)} targets"):
        metrics.accuracy(predicted, wanted)


def test_majority_answers_what_is_commonest_in_training():
    assert metrics.majority(["a", "b", "b"], ["a", "a", "a", "b"]) == 0.25
    assert metrics.majority(["b", "a"], ["a", "b", "b", "b"]) == 0.75
