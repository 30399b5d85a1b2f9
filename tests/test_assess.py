"""Baselines, standard errors and folds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from tinyprompt import assess
from tinyprompt.data import Row, verbalizer
from tinyprompt.tokenizer import ByteTokenizer

WORDS = {"food": ["soup", "bread", "salt", "kitchen"], "sport": ["goal", "match", "team", "race"]}


def rows_of(number, seed):
    """Return rows of five words, three of which belong to the target."""
    rng = np.random.default_rng(seed)
    both = [word for words in WORDS.values() for word in words] + ["the", "a", "of"]
    targets = rng.choice([*WORDS], number)
    return [Row(" ".join([*rng.choice(WORDS[t], 3), *rng.choice(both, 2)]), str(t)) for t in targets]


def test_bag_of_words_equals_scikit_learn():
    train, test = rows_of(60, 0), rows_of(200, 1)
    x = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True).fit([row.input for row in train])
    theirs = LogisticRegression(C=10).fit(x.transform([r.input for r in train]), [r.target for r in train])
    wanted = theirs.predict(x.transform([row.input for row in test]))
    found = assess.bag_of_words(train, test)
    assert np.mean([a == b for a, b in zip(found, wanted, strict=True)]) > 0.97
    assert assess.share(found, test).value > 0.95


@pytest.mark.parametrize(("value", "rows", "shown"), [(8 / 9, 9, "0.889 +- 0.105"), (1.0, 9, "1.000 +- 0.076")])
def test_an_accuracy_is_printed_with_its_standard_error(value, rows, shown):
    assert str(assess.Share(value, rows)) == shown


@examples(20)
@given(number=st.integers(2, 9), rows=st.integers(9, 40), seed=st.integers(0, 99))
def test_folds_hold_out_every_row_once(number, rows, seed):
    rows = [row._replace(input=f"{i} {row.input}") for i, row in enumerate(rows_of(rows, seed))]
    held_out = []
    for train, test in assess.folds(rows, number, seed):
        assert sorted(train + test) == sorted(rows)
        held_out += test
        for label in WORDS:
            every = sum(row.target == label for row in rows)
            assert abs(sum(row.target == label for row in test) - every / number) <= 1
    assert sorted(held_out) == sorted(rows)


def test_cross_validation_answers_held_out_rows_only():
    rows = rows_of(12, 0)

    def answer(train, test):
        assert not {id(row) for row in train} & {id(row) for row in test}
        return [row.target for row in test]

    assert assess.cross_validate(rows, 3, 0, answer) == assess.Share(1.0, 12)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("TECH ISSUE", "Lost or damaged parcel"), {"TECH ISSUE": "tech", "Lost or damaged parcel": "lost"}),
        (("good", "bad"), {}),
        (
            ("Lost card", "Lost or damaged parcel", "Not lost"),
            {"Lost card": "card", "Lost or damaged parcel": "damaged", "Not lost": "not"},
        ),
        (
            ("Customer was satisfied", "Customer was dissatisfied"),
            {"Customer was satisfied": "satisfied", "Customer was dissatisfied": "dissatisfied"},
        ),
        (("very good", "good"), {"very good": "very"}),
        (("a b", "b a"), {}),  # neither target has a distinctive word
        (("class_1", "class_2"), {"class_1": "1", "class_2": "2"}),
    ],
)
def test_a_long_label_is_learned_as_its_first_distinctive_word(labels, words):
    assert verbalizer(labels, ByteTokenizer()) == words


def test_copies_of_an_input_are_in_one_fold():
    rows = [Row(f"text {i // 3}", "ab"[i % 2]) for i in range(30)]
    for train, test in assess.folds(rows, 4, 0):
        assert not {row.input for row in train} & {row.input for row in test}
        assert len(train) + len(test) == 30
