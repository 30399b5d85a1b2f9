"""Settings: bounds, names, and changes."""

from dataclasses import asdict, fields

import pytest

from tinyprompt.errors import CheckpointError
from tinyprompt.settings import Settings


def test_every_setting_has_a_help_and_a_default_within_its_bounds():
    for field in fields(Settings):
        assert field.metadata["help"]
        assert Settings(**{field.name: field.default}) == Settings()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 1.5}, TypeError, "setting steps: expected int, found 1.5"),
        ({"steps": True}, TypeError, "setting steps: expected int, found True"),
        ({"dropout": 1.0}, ValueError, "setting dropout: expected 0 to below 1, found 1.0"),
        ({"method": "loar"}, ValueError, "setting method: expected one of prompt,"),
        ({"init_text": "a", "init": "vocab"}, ValueError, "setting init_text: needs init 'text', found 'vocab'"),
        ({"num_virtual_tokens": 3}, TypeError, "setting 'num_virtual_tokens' does not exist"),
        ({"prompt_lenght": 3}, TypeError, "did you mean 'prompt_length'"),
    ],
)
def test_a_wrong_setting_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        Settings.changed({}, changes)


def test_a_text_or_a_file_implies_its_init():
    assert Settings.changed({"steps": 3}, {"init_text": "a"}) == Settings(steps=3, init="text", init_text="a")
    assert Settings.changed({}, {"init_file": "a.npy"}).init == "file"


def test_saved_settings_are_read_back_or_refused():
    settings = Settings(steps=3, length_penalty=0.5)
    assert Settings.saved(asdict(settings)) == settings
    assert Settings.saved({"steps": 3}) == Settings(steps=3)
    with pytest.raises(CheckpointError, match=r"mine.npy: its settings cannot be used \(.*; tune it again"):
        Settings.saved({"steps": 0}, "mine.npy")


def test_whole_numbers_are_the_floats_they_equal():
    one, other = Settings(learning_rate=1, dropout=0), Settings(learning_rate=1.0, dropout=0.0)
    assert repr(one) == repr(other)
