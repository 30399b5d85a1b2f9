"""Answers of several prompts for one task."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from test_predict import prompts_of, texts_of
from tuning import byte_model

from tinyprompt.cli.main import main
from tinyprompt.ensemble import ensemble, vote
from tinyprompt.errors import DataError
from tinyprompt.model import Prompt
from tinyprompt.predict import label_scores, predict, probabilities

WORDS = ("bad", "good", "so")


def several(model, count, seed=0, words=WORDS):
    return [Prompt(p.params, label_words=words, settings=p.settings) for p in prompts_of(model, [4] * count, seed)]


@examples(10)
@given(count=st.integers(1, 5), rows=st.integers(1, 6), seed=st.integers(0, 999))
def test_each_prompt_answers_as_alone_and_the_majority_wins(count, rows, seed):
    model = byte_model(seed=seed)
    prompts, texts = several(model, count, seed), texts_of(rows, seed)
    found = ensemble(model, prompts, texts, "numpy")
    assert found.each == [predict(model, prompt, texts, "numpy") for prompt in prompts]
    means = np.mean([probabilities(label_scores(model, prompt, texts, "numpy")) for prompt in prompts], axis=0)
    assert found.mean == [WORDS[i] for i in means.argmax(1)]
    for row, (answer, mean) in enumerate(zip(found.majority, means, strict=True)):
        votes = Counter(answers[row] for answers in found.each)
        assert votes[answer] == max(votes.values())
        assert mean[WORDS.index(answer)] == max(mean[WORDS.index(w)] for w in votes if votes[w] == votes[answer])


def test_a_tie_goes_to_the_higher_mean_score():
    assert vote(["b", "a"], {"a": 0.65, "b": 0.35}) == "a"
    assert vote(["b", "b", "a"], {"a": 0.65, "b": 0.35}) == "b"
    assert vote(["x", "y"], {}) == "x"
    assert vote(["x", "y", "y"], {}) == "y"


def test_free_text_has_no_mean_and_mixed_label_words_are_refused():
    model = byte_model()
    found = ensemble(model, several(model, 3, words=None), texts_of(2), "numpy")
    assert found.mean is None
    assert len(found.majority) == 2
    with pytest.raises(DataError, match="same label words, found a, b and bad, good, so"):
        ensemble(model, [*several(model, 1), *several(model, 1, words=("a", "b"))], ["x"], "numpy")
    with pytest.raises(DataError, match="found no prompt"):
        ensemble(model, [], ["x"], "numpy")
    first, second = several(model, 2)
    second = Prompt(second.params, label_words=WORDS[::-1], settings=second.settings)
    assert ensemble(model, [first, second], ["x"], "numpy").mean  # the order of the label words does not matter


def test_tune_with_seeds_and_ensemble_commands(tmp_path, folder, capsys):
    rows = tmp_path / "rows.tsv"
    rows.write_text("input\ttarget\n" + "".join(f"soup {i}\t{('bad', 'good')[i % 2]}\n" for i in range(20)))
    model = ["--model", str(folder)]
    tune = ["tune", str(rows), "--dev", str(rows), *model, "--steps", "2", "--prompt-length", "3", "--seed", "4"]
    assert main([*tune, "--out", str(tmp_path / "mine.safetensors"), "--seeds", "3", "--json"]) == 0
    paths = [str(tmp_path / f"mine-{seed}.safetensors") for seed in (4, 5, 6)]
    out = capsys.readouterr().out
    assert [entry["prompt"] for entry in json.loads(out)["prompts"]] == paths
    assert main(["ensemble", *paths, "--data", str(rows), *model]) == 0
    out, _ = capsys.readouterr()
    assert [line.split("  ")[1] for line in out.splitlines()[1:]] == [
        "average",
        "best alone",
        "majority vote",
        "mean score",
    ]
    for wrong, message in (
        (["--seeds", "0"], "expected 1 or more"),
        (["--seeds", "2", "--plot", "x.png"], "cannot be combined with --resume or --plot"),
        (["--seeds", "2", "--resume", paths[0]], "cannot be combined with --resume or --plot"),
    ):
        assert main([*tune, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["ensemble", paths[0], str(tmp_path / "none.safetensors"), "--data", str(rows), *model]) == 2
    assert "none.safetensors: no such file" in capsys.readouterr().err
    np.save(tmp_path / "bare.npy", np.ones((2, 4), np.float32))
    assert main(["ensemble", paths[0], str(tmp_path / "bare.npy"), "--data", str(rows), *model]) == 2
    assert "same label words" in capsys.readouterr().err
    lora = ["tune", str(rows), "--dev", str(rows), *model, "--steps", "1", "--method", "lora"]
    assert main([*lora, "--out", str(tmp_path / "lora.safetensors")]) == 0
    assert main(["ensemble", paths[0], str(tmp_path / "lora.safetensors"), "--data", str(rows), *model]) == 0
    assert "accuracy of 2 prompts on 20 rows" in capsys.readouterr().out
