"""Settings: bounds, names, and changes."""

from dataclasses import asdict, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyprompt.errors import CheckpointError
from tinyprompt.settings import Settings


def test_every_setting_has_a_help_text_and_a_valid_default():
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


def test_init_text_and_init_file_imply_init():
    assert Settings.changed({"steps": 3}, {"init_text": "a"}) == Settings(steps=3, init="text", init_text="a")
    assert Settings.changed({}, {"init_file": "a.npy"}).init == "file"


def test_saved_settings_are_read_back_or_refused():
    settings = Settings(steps=3, length_penalty=0.5)
    assert Settings.saved(asdict(settings)) == settings
    assert Settings.saved({"steps": 3}) == Settings(steps=3)
    with pytest.raises(CheckpointError, match=r"mine.npy: its settings cannot be used \(.*; tune it again"):
        Settings.saved({"steps": 0}, "mine.npy")


def test_whole_numbers_equal_to_floats_are_accepted():
    whole, floats = Settings(learning_rate=1, dropout=0), Settings(learning_rate=1.0, dropout=0.0)
    assert repr(whole) == repr(floats)


@given(st.integers(1, 1999), st.floats(2, 256))
def test_a_run_on_few_rows_is_short(rows, tokens):
    settings = Settings.for_rows(rows, tokens)
    read = settings.steps * settings.batch_size
    assert 60 <= settings.steps <= 400
    assert read <= max(24 * rows, 100 * settings.batch_size)
    assert read * (20 + tokens) <= max(200_000, 900 * rows, 60 * settings.batch_size * (20 + tokens))
    assert settings.eval_every <= settings.steps / 7


@pytest.mark.parametrize(
    ("rows", "tokens", "steps", "batch_size"),
    [(30, 15, 100, 8), (60, 15, 180, 8), (200, 15, 300, 16), (200, 250, 92, 8), (400, 20, 400, 16), (48, 250, 92, 8)],
)
def test_defaults_of_few_rows(rows, tokens, steps, batch_size):
    settings = Settings.for_rows(rows, tokens)
    assert (settings.steps, settings.batch_size) == (steps, batch_size)


def test_many_rows_have_the_defaults_of_the_paper():
    assert Settings.for_rows(2000, 250) == Settings()
    assert Settings.for_rows(2000, steps=3) == Settings(steps=3)


def test_a_given_setting_is_kept():
    settings = Settings.for_rows(60, 250, batch_size=32, steps=500)
    assert (settings.steps, settings.batch_size) == (500, 32)
    assert Settings.for_rows(60, method="lora").optimizer == Settings().optimizer


def test_longer_prompts_have_fewer_steps():
    assert Settings.for_rows(200, 250, prompt_length=100).steps < Settings.for_rows(200, 250).steps
