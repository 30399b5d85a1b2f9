"""tune, run, evaluate and gradient from Python."""

import time
from dataclasses import replace

import numpy as np
import pytest
from tuning import byte_model

import tinyprompt
from tinyprompt import Row, Settings
from tinyprompt.errors import DataError
from tinyprompt.tuning import default_settings

LABELS = ("a", "b")
SHORT = Settings(steps=12, prompt_length=5, batch_size=4, eval_every=4)
ROWS = [Row("+-"[i % 2] * (1 + i % 5), LABELS[i % 2]) for i in range(50)]


@pytest.fixture(scope="module")
def model():
    return byte_model()


def test_the_python_api_from_tuning_to_gradients(tmp_path, capsys):
    """A file of 50 rows: file names, a progress bar, a curve, one-line texts, and a text for a text."""
    model = byte_model()
    path = tmp_path / "train.tsv"
    path.write_text("input\ttarget\n" + "".join(f"{row.input}\t{row.target}\n" for row in ROWS))
    begun = time.perf_counter()
    result = tinyprompt.tune(model, str(path), settings=replace(SHORT, steps=12))
    assert 0 < result.seconds < time.perf_counter() - begun
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {step} of 12" for step in (0, 4, 8, 12)]
    assert tinyprompt.tune(model, path, path, SHORT, progress=False).history[0]["loss"] is None
    assert capsys.readouterr().err == ""
    for shown in (model, result, result.prompt):
        assert "\n" not in repr(shown)
        assert len(repr(shown)) < 160
    assert len(result.history) == 13
    axes = result.plot()
    assert axes.get_xlabel() == "step"
    assert result.plot(tmp_path / "curve.png") is None
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    answer = tinyprompt.predict(model, result.prompt, "++")
    assert [answer] == tinyprompt.predict(model, result.prompt, ["++"])
    assert answer in LABELS
    assert str(tinyprompt.evaluate(model, result.prompt, path)).startswith("accuracy ")
    assert tinyprompt.gradient(model, result.prompt, path).array.shape == result.prompt.array.shape == (5, 20)
    seen = tinyprompt.intermediates(model, result.prompt, "++", "a")
    assert seen["encoder.block.0.layer.0.attention_weights"].shape == (1, 3, 8, 8)
    assert seen["logits"].shape == (1, 2, 384)  # without padding: "a" and eos; "+++" adds no column
    assert tinyprompt.intermediates(model, result.prompt, "+++", "ab")["logits"].shape == (1, 3, 384)
    assert tinyprompt.intermediates(model, result.prompt, "+++")["encoder.final"].shape == (1, 9, 20)
    with pytest.raises(TypeError, match="the first argument is a Model"):
        tinyprompt.predict(result.prompt, model, "++")
    with pytest.raises(TypeError, match="the second a Prompt"):
        tinyprompt.predict(model, "prompt.safetensors", "++")


@pytest.mark.parametrize(
    ("targets", "warning"),
    [
        (("one < two", "3 apples"), ""),
        (("select 好 1", "3 apples"), "correct answers would score 0.500, for example 'select 1' for 'select 好 1'"),
        (("CAF\u00c9", "caf\u00e9"), "correct answers would score 0.000"),  # the tokenizer drops accents
    ],
)
def test_unwritable_targets_cause_a_warning(caplog, targets, warning):
    rows = [Row(f"text {i}", target) for i, target in enumerate(targets)]
    settings = replace(SHORT, task="generate", max_new_tokens=2)
    tinyprompt.run(tinyprompt.load("tiny"), rows, rows, settings)  # before the first step
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == bool(warning)
    assert not warning or warning in messages[0]


def losses(result):
    return [row["loss"] for row in result.history]


def test_settings_may_be_an_object_or_names(model):
    tune = lambda *args, **more: tinyprompt.tune(model, ROWS, *args, device="numpy", progress=False, **more)
    wanted = losses(tune(settings=SHORT))
    assert losses(tune(SHORT)) == wanted
    assert losses(tune(None, SHORT)) == wanted
    same = dict(steps=12, prompt_length=5, batch_size=4, eval_every=4, schedule="constant", optimizer=SHORT.optimizer)
    assert losses(tune(**same)) == wanted
    assert losses(tune(replace(SHORT, steps=3), steps=12)) == wanted
    assert len(losses(tune(ROWS[:10], SHORT, steps=3))) == 4
    for wrong, error, message in (
        ({"step": 3}, TypeError, "setting 'step' does not exist; did you mean 'steps'"),
        ({"steps": 0}, ValueError, "setting steps: expected at least 1"),
        ({"settings": {"steps": 3}}, TypeError, "expected a Settings object"),
        ({"task": "bool"}, ValueError, "setting task: task 'bool': expected one of auto"),
    ):
        with pytest.raises(error, match=message):
            tune(**wrong)
    with pytest.raises(TypeError, match="two Settings objects"):
        tune(SHORT, SHORT)


def test_a_callback_gets_every_step(model):
    seen = []
    result = tinyprompt.tune(model, ROWS, SHORT, callback=seen.append, progress=False)
    assert [progress.step for progress in seen] == list(range(13))
    assert [progress.loss for progress in seen] == losses(result)
    assert [progress.dev for progress in seen] == [row["dev"] for row in result.history]
    assert [progress.step for progress in seen if progress.prompt] == [4, 8, 12]


def test_run_is_a_loop_that_can_stop_and_resume(model, tmp_path):
    whole = tinyprompt.tune(model, ROWS, SHORT, device="numpy", progress=False)
    for progress in tinyprompt.run(model, ROWS, SHORT, device="numpy"):
        if progress.step == 8:
            break
    path = tinyprompt.save_prompt(progress.prompt, tmp_path / "p.safetensors")
    for saved in (progress.prompt, path, str(path)):
        rest = tinyprompt.tune(model, ROWS, device="numpy", resume=saved, progress=False)
        assert losses(rest) == losses(whole)
        assert np.array_equal(rest.prompt.array, whole.prompt.array)


def test_the_first_prompt_may_be_a_file(model, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(5, model.config.d_model)).astype(np.float32)
    path = tinyprompt.save_prompt(tinyprompt.Prompt({tinyprompt.PROMPT: vectors}), tmp_path / "first.safetensors")
    first, *_ = tinyprompt.run(model, ROWS, SHORT, init_file=str(path))
    assert np.array_equal(first.state.trainable[tinyprompt.PROMPT], vectors)
    first, *_ = tinyprompt.run(model, ROWS, SHORT, init_text="read this")
    assert not np.array_equal(first.state.trainable[tinyprompt.PROMPT], vectors)


def test_columns_and_words_can_be_named(model, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{row.input},{LABELS.index(row.target)}\n" for row in ROWS))
    names = {"input": "text", "target": "label", "words": {"0": "a", "1": "b"}}
    found = tinyprompt.tune(model, path, path, SHORT, progress=False, device="numpy", **names)
    wanted = tinyprompt.tune(model, ROWS, ROWS, SHORT, progress=False, device="numpy")
    assert found.prompt.label_words == LABELS
    assert losses(found) == losses(wanted)
    scores = tinyprompt.evaluate(model, found.prompt, path, **names)
    assert scores.mean == tinyprompt.evaluate(model, found.prompt, ROWS).mean
    gradient = tinyprompt.gradient(model, found.prompt, path, "numpy", **names)
    assert gradient.loss == tinyprompt.gradient(model, found.prompt, ROWS, "numpy").loss
    assert tinyprompt.evaluate(model, found.prompt, path).mean == scores.mean  # the prompt keeps its columns
    with pytest.raises(DataError, match="no column 'input'; found 'text', 'label'"):
        tinyprompt.evaluate(model, wanted.prompt, path)


def test_a_built_in_task_can_be_named(model, tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"{row.input}\t{i % 2}\n" for i, row in enumerate(ROWS)))
    result = tinyprompt.tune(model, path, path, SHORT, task="sst2", progress=False)
    assert result.prompt.label_words == ("negative", "positive")
    assert str(tinyprompt.evaluate(model, result.prompt, path)).startswith("accuracy ")


def test_check_gradient_judges_the_result_of_gradient(model):
    prompt = tinyprompt.tune(model, ROWS, SHORT, progress=False).prompt
    found = tinyprompt.gradient(model, prompt, ROWS[:6], "numpy")
    assert tinyprompt.check_gradient(found, model).ok
    loss, grads = found
    assert (loss, grads) == (found.loss, found.grads)
    wrong = replace(found, grads={tinyprompt.PROMPT: -found.array})
    assert not tinyprompt.check_gradient(wrong, model).ok
    assert tinyprompt.check_gradient(found.array, model, prompt.array, found.batch).ok


def test_default_settings_depend_on_the_length_of_few_rows(model):
    short, long = [Row("+", "a")] * 60, [Row("+" * 250, "a")] * 60
    assert default_settings(model, short, {}) == Settings.for_rows(60, 2)
    assert default_settings(model, long, {}) == Settings.for_rows(60, 251)
    assert default_settings(model, long, {"max_input_tokens": 20}).steps == 180
    assert default_settings(model, long * 100, {}) == Settings()
