"""Flat and nested dicts of parameters."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyprompt.tree import count, flatten, merge, nest

NAMES = st.lists(st.sampled_from(["a", "b", "block", "0", "1"]), min_size=1, max_size=4).map(".".join)


def is_prefix(short, name):
    return name.startswith(short + ".")


@st.composite
def flat_dicts(draw):
    """Draw flat dicts in which no name is a prefix of another."""
    flat = {}
    for name in draw(st.lists(NAMES, max_size=12)):
        if not any(is_prefix(name, other) or is_prefix(other, name) for other in flat):
            flat[name] = len(flat)
    return flat


@given(flat_dicts())
def test_flatten_is_the_inverse_of_nest(flat):
    assert flatten(nest(flat)) == flat


def test_nest_makes_a_dict_for_every_dot():
    assert nest({"a.b.c": 1, "a.d": 2, "e": 3}) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}


@given(flat_dicts(), st.data())
def test_merge_adds_and_replaces_without_changing_its_argument(flat, data):
    delta = {name: -1 for name in data.draw(st.sets(st.sampled_from(sorted(flat)))) if flat} if flat else {}
    delta |= {f"new.{name}": -2 for name in data.draw(flat_dicts())}
    before = nest(flat)
    untouched = copy.deepcopy(before)
    assert flatten(merge(before, delta)) == flat | delta
    assert before == untouched


def test_merge_shares_unchanged_arrays():
    weight = np.ones(3)
    tree = {"a": {"b": weight}}
    assert merge(tree, {"a.c": np.zeros(2)})["a"]["b"] is weight
    assert list(tree["a"]) == ["b"]


@pytest.mark.parametrize("names", [["a.b", "a.b.c"], ["a.b.c", "a.b"], ["a", "a.b.c.d"], ["a.b.c.d", "a"]])
def test_a_name_that_is_a_prefix_of_another_is_refused(names):
    with pytest.raises(ValueError, match=f"parameter '{names[1]}'"):
        nest(dict.fromkeys(names, 0))


def test_count_adds_the_sizes():
    assert count({}) == 0
    assert count({"a": np.zeros((3, 4)), "b.c": np.zeros(5), "d": np.float32(1)}) == 18
