"""The training loop, initial prompts and prediction, on a small random model in float32."""

from dataclasses import replace

import numpy as np
import pytest
from reference import hugging_face, random_weights, raw_config, torch
from tuning import answer, prompt_of, right_answers, saver, tune

import tinyprompt
from tinyprompt import data, decode, methods, t5, train, tree
from tinyprompt.data import Row
from tinyprompt.errors import CheckpointError, DataError
from tinyprompt.files import prompts
from tinyprompt.files.config import parse_config
from tinyprompt.fit import check_fit
from tinyprompt.methods import PROMPT
from tinyprompt.model import Model, Prompt
from tinyprompt.predict import label_scores, stream
from tinyprompt.settings import Settings
from tinyprompt.tasks import metrics
from tinyprompt.tokenizer import ByteTokenizer
from tinyprompt.train import TaskData, first_state
from tinyprompt.tuning import gradient

RAW = raw_config("t5-1.1", vocab_size=384)
CONFIG = parse_config(RAW)
LABELS = ("a", "b")
SHORT = Settings(steps=6, batch_size=4, prompt_length=5, optimizer="adam", learning_rate=0.1, eval_every=2)


def model_of(flat, dtype=np.float32):
    return Model(CONFIG, tree.nest({k: v.astype(dtype) for k, v in flat.items()}), ByteTokenizer(), "tiny")


@pytest.fixture(scope="module")
def model():
    flat = random_weights(CONFIG, 0)
    return model_of(flat | {"lm_head.weight": 3 * flat["lm_head.weight"]})  # large enough logits for training to work


def rows_of(count, seed=0):
    """Return rows whose single repeated character determines the label, half of them each."""
    rng = np.random.default_rng(seed)
    return [Row("-+"[i] * int(rng.integers(1, 9)), LABELS[i]) for i in rng.permutation(np.arange(count) % 2)]


def changed(**changes):
    return Settings(**{**vars(SHORT), **changes})


def test_the_frozen_weights_stay_frozen(model):
    before = model.fingerprint
    result = tune(model, rows_of(20), rows_of(6, 1), SHORT, LABELS)
    assert model.fingerprint == before == result.prompt.fingerprint
    assert PROMPT not in tree.flatten(model.params)
    check_fit(result.prompt, model)


def test_a_fingerprint_changes_with_every_change(model):
    flat = tree.flatten(model.params)
    last = sorted(flat)[-1]
    changed = flat[last].copy()
    changed.flat[-1] = np.nextafter(changed.flat[-1], np.float32(9))
    renamed = {("z" if k == last else k): v for k, v in flat.items()}
    reshaped = flat | {last: flat[last].T}
    fingerprints = [model_of(f).fingerprint for f in (flat | {last: changed}, renamed, reshaped)]
    assert len({model.fingerprint, *fingerprints}) == 4


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_runs_are_reproducible_by_seed(model, dropout):
    a, b, c = (
        tune(model, rows_of(20), rows_of(6, 1), changed(seed=s, dropout=dropout, init="vocab"), LABELS)
        for s in (3, 3, 4)
    )
    assert (a.prompt.params[PROMPT] == b.prompt.params[PROMPT]).all()
    assert a.history == b.history
    assert a.history != c.history
    assert not (a.prompt.params[PROMPT] == c.prompt.params[PROMPT]).all()


def test_dropout_affects_training_only(model):
    plain, dropped = (tune(model, rows_of(20), rows_of(6, 1), changed(dropout=d), LABELS) for d in (0.0, 0.2))
    assert plain.history[0] == dropped.history[0]
    assert plain.history[1]["loss"] != dropped.history[1]["loss"]


@pytest.mark.parametrize("optimizer", ["adam", "adafactor-t5x", "adafactor-huggingface"])
def test_the_loss_falls_on_a_learnable_task(model, optimizer):
    settings = changed(steps=60, batch_size=8, prompt_length=10, learning_rate=0.3, eval_every=15, optimizer=optimizer)
    result = tune(model, rows_of(40), rows_of(20, 1), settings, LABELS)
    losses = [row["loss"] for row in result.history[1:]]
    assert np.mean(losses[-15:]) < 0.4 * np.mean(losses[:15])
    assert result.best_dev >= 0.9 > result.history[0]["dev"]
    assert result.prompt.params[PROMPT].dtype == np.float32


def dev_scores(result):
    return {row["step"]: row["dev"] for row in result.history if row["dev"] is not None}


def test_the_best_prompt_on_dev_is_returned(model):
    dev, steps = rows_of(30, 1), []
    settings = changed(steps=40, eval_every=4, learning_rate=0.3, batch_size=8)
    result = tune(model, rows_of(40), dev, settings, LABELS, each=steps.append)
    scores = dev_scores(result)
    answers = answer(model, [r.input for r in dev], LABELS, result.prompt.params, settings)
    assert metrics.accuracy(answers, [r.target for r in dev]) == result.best_dev == max(scores.values())
    assert scores[result.best_step] == result.best_dev
    assert len(set(scores.values())) > 1
    assert list(scores) == list(range(0, 41, 4))
    assert [p.state.step for p in steps] == [row["step"] for row in result.history] == list(range(41))
    assert [row["loss"] for row in result.history] == [None, *steps[-1].state.losses]
    assert [p.state.step for p in steps if p.prompt] == list(range(4, 41, 4))
    assert f"best {result.best_dev:.3f}" in str(steps[-1])


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.5, 2.0), (0.5, 1.5), (0.5, 1.7)], 1),  # equal scores: the lower loss wins
        ([(0.5, 2.0), (0.5, 2.0), (0.5, 2.0)], 2),  # equal losses: the later step wins
        ([(0.5, 2.0), (0.4, 1.0), (0.3, 0.5)], 0),
        ([(0.1, 1.0), (0.6, 3.0), (0.6, 4.0)], 1),
    ],
)
def test_ties_go_to_the_lower_loss_and_then_to_the_later_step(model, scores, best):
    task = TaskData(rows_of(8), rows_of(6, 1), LABELS, right_answers)
    state = first_state(model, task, SHORT)
    for step, score in enumerate(scores):
        state = state._replace(step=step, trainable={PROMPT: np.full((5, 20), step)}).with_score(*score)
    assert state.best_step == best
    assert (state.best[PROMPT] == best).all()


def test_a_run_that_never_beats_its_start_reports_it(model):
    flat = {name: x if name != "lm_head.weight" else x * 0 for name, x in tree.flatten(model.params).items()}
    result = tune(model_of(flat), rows_of(8), rows_of(6, 1), changed(learning_rate=0.3), LABELS)
    assert "no step beat the start" not in str(result)  # all scores are equal, so the last step is the best
    assert f"at step 6 of {SHORT.steps}; " in str(result)
    worse = replace(result, best_step=0)
    assert "no step beat the start" in str(worse)


def test_the_dev_loss_is_the_loss_of_the_right_answers(model):
    dev, settings = rows_of(10, 1), SHORT
    result = tune(model, rows_of(8), dev, settings, LABELS)
    found = result.prompt.train_state["scores"].reshape(-1, 3)[-1, 2]
    state = {
        name.removeprefix("trainable."): x for name, x in result.prompt.train_state.items() if "trainable." in name
    }
    last = prompt_of(model, {PROMPT: state[PROMPT].astype(np.float32).reshape(5, 20)}, LABELS, settings)
    assert np.isclose(found, 2 * gradient(model, last, dev).loss, rtol=1e-5)  # a label has two tokens: a piece and eos
    free = tune(model, rows_of(8), dev, settings, None)
    state = {name.removeprefix("trainable."): x for name, x in free.prompt.train_state.items() if "trainable." in name}
    last = prompt_of(model, {PROMPT: state[PROMPT].astype(np.float32).reshape(5, 20)}, None, settings)
    assert np.isclose(
        free.prompt.train_state["scores"].reshape(-1, 3)[-1, 2], gradient(model, last, dev).loss, rtol=1e-5
    )


def test_saved_settings_equal_those_of_the_run(model, tmp_path):
    result = tune(model, rows_of(20), rows_of(6, 1), SHORT, LABELS)
    saved = prompts.load_prompt(prompts.save_prompt(result.prompt, tmp_path / "new" / "p.safetensors"))
    assert Settings(**saved.settings) == SHORT
    assert (saved.label_words, saved.model, saved.fingerprint) == (LABELS, "tiny", model.fingerprint)
    assert (saved.params[PROMPT] == result.prompt.params[PROMPT]).all()


@pytest.mark.parametrize("patience", [1, 3])
def test_early_stopping(model, patience):
    # The train targets contradict the dev targets, so step 0 stays the best.
    wrong = [row._replace(target="ab"["ba".index(row.target)]) for row in rows_of(20)]
    settings = changed(steps=100, learning_rate=0.3, patience=patience, eval_every=2)
    result = tune(model, wrong, rows_of(6, 1), settings, LABELS)
    best = result.best_step
    assert len(result.history) - 1 == best + 2 * patience < 100
    if best == 0:
        begun = initial_prompt(model, SHORT.prompt_length, SHORT.init, labels=LABELS, seed=SHORT.seed)
        assert (result.prompt.params[PROMPT] == begun[PROMPT]).all()


def test_the_last_step_is_scored(model):
    result = tune(model, rows_of(8), rows_of(6, 1), changed(steps=5, eval_every=3), LABELS)
    assert list(dev_scores(result)) == [0, 3, 5]


def same_run(found, wanted):
    assert found.history == wanted.history
    assert (found.best_step, found.best_dev) == (wanted.best_step, wanted.best_dev)
    for name in ("model", "fingerprint", "label_words", "settings"):
        assert getattr(found.prompt, name) == getattr(wanted.prompt, name)
    for a, b in ((found.prompt.params, wanted.prompt.params), (found.prompt.train_state, wanted.prompt.train_state)):
        assert a.keys() == b.keys()
        assert [k for k in a if a[k].dtype != b[k].dtype or a[k].tobytes() != b[k].tobytes()] == []


@pytest.mark.parametrize("name", ["p.safetensors", "adapter", None])
@pytest.mark.parametrize(
    ("steps", "every", "length", "optimizer"),
    [
        (6, 3, 5, "adam"),
        (5, 2, 5, "adam"),  # the last step is scored off schedule
        (4, 6, 5, "adafactor-t5x"),
        (6, 3, 130, "adafactor-t5x"),  # with factored moments
        (6, 3, 5, "adafactor-huggingface"),
        (1, 1, 5, "adam"),
    ],
)
def test_a_resumed_run_equals_the_unbroken_run(model, tmp_path, steps, every, length, optimizer, name):
    settings = dict(optimizer=optimizer, eval_every=every, prompt_length=length, learning_rate=0.3)
    rows, dev = rows_of(10), rows_of(30, 1)
    run = lambda steps, **more: tune(model, rows, dev, changed(**settings, steps=steps), LABELS, "numpy", **more)
    kept = []
    whole = run(2 * steps, each=saver(kept))
    prompt = run(steps).prompt
    if name:
        prompt = prompts.load_prompt(prompts.save_prompt(prompt, tmp_path / name))
    same_run(run(2 * steps, resume=prompt), whole)
    scores = dev_scores(whole)
    assert [int(p.train_state["step"].item()) for p in kept] == list(scores)[1:]
    for at, prompt in zip(list(scores)[1:-1], kept, strict=False):  # as if stopped at this step
        assert prompt.settings["steps"] == 2 * steps
        same_run(run(2 * steps, resume=prompt), whole)
        best = max(dev for step, dev in scores.items() if step <= at)
        answers = answer(model, [r.input for r in dev], LABELS, prompt.params, changed(**settings), "numpy")
        assert metrics.accuracy(answers, [r.target for r in dev]) == best


@pytest.mark.parametrize("device", ["numpy", "cpu"])
def test_a_resumed_run_with_dropout_equals_the_unbroken_run(model, device):
    run = lambda steps, **more: tune(
        model, rows_of(10), rows_of(6, 1), changed(dropout=0.2, eval_every=2, steps=steps), LABELS, device, **more
    )
    same_run(run(6, resume=run(4).prompt), run(6))


def test_a_resumed_run_continues_early_stopping(model):
    wrong = [row._replace(target="ab"["ba".index(row.target)]) for row in rows_of(20)]
    settings = changed(steps=100, learning_rate=0.3, patience=3, eval_every=2)
    kept = []
    whole = tune(model, wrong, rows_of(6, 1), settings, LABELS, each=saver(kept))
    assert len(whole.history) < 100
    same_run(tune(model, wrong, rows_of(6, 1), settings, LABELS, resume=kept[0]), whole)
    with pytest.raises(ValueError, match=f"stopped early at step {len(whole.history) - 1}; increase it"):
        tune(model, wrong, rows_of(6, 1), settings, LABELS, resume=kept[-1])
    longer = replace(settings, patience=4)
    more = tune(model, wrong, rows_of(6, 1), longer, LABELS, resume=kept[-1])
    assert more.history == tune(model, wrong, rows_of(6, 1), longer, LABELS).history


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("batch_size", 5), ("prompt_length", 6), ("init", "vocab"), ("optimizer", "adafactor-t5x"), ("z_loss", 0.0)],
        *[("learning_rate", 0.2), ("schedule", "linear"), ("warmup_steps", 1), ("dropout", 0.1), ("eval_every", 3)],
        *[("max_input_tokens", 9), ("max_new_tokens", 9), ("seed", 1), ("num_beams", 2), ("length_penalty", 0.5)],
    ],
)
def test_a_resumed_run_refuses_other_settings(model, name, value):
    prompt = tune(model, rows_of(8), rows_of(6, 1), SHORT, LABELS).prompt
    with pytest.raises(ValueError, match=f"setting {name}: expected .*, found {value!r}"):
        tune(model, rows_of(8), rows_of(6, 1), changed(**{"steps": 9, name: value}), LABELS, resume=prompt)


def test_an_unsuitable_prompt_cannot_be_resumed(model):
    rows, dev, more = rows_of(8), rows_of(6, 1), changed(steps=9)
    prompt = tune(model, rows, dev, SHORT, LABELS).prompt
    flat = random_weights(CONFIG, 1)
    fail = lambda message, *args, kind=ValueError: pytest.raises(kind, match=message)
    with fail("setting labels"):
        tune(model, rows, dev, more, ("a", "b", "c"), resume=prompt)
    with fail("no training state"):
        tune(model, rows, dev, more, LABELS, resume=replace(prompt, train_state=None))
    with fail("more than the 6 completed steps"):
        tune(model, rows, dev, SHORT, LABELS, resume=prompt)
    for wrong_rows in ((rows_of(9), dev), (rows, rows_of(6, 2)), (rows[::-1], dev)):
        with fail("the train or dev rows differ", kind=DataError):
            tune(model, *wrong_rows, more, LABELS, resume=prompt)
    with fail("tuned on 'tiny'", kind=CheckpointError):
        tune(model_of(flat), rows, dev, more, LABELS, resume=prompt)
    for name in prompt.train_state:
        for state in (
            {k: v for k, v in prompt.train_state.items() if k != name},
            prompt.train_state | {name: np.ones(7)},
        ):
            with fail("training state is damaged", kind=CheckpointError):
                tune(model, rows, dev, more, LABELS, resume=replace(prompt, train_state=state))


def test_a_text_or_list_of_a_wrong_type_is_refused(model):
    prompt = Prompt(label_words=LABELS)
    for wrong, description in ((None, "None"), (b"++", "b'\\+\\+'"), (Row("++", "a"), "Row")):
        with pytest.raises(TypeError, match=f"text 2: expected a text, found {description}"):
            tinyprompt.predict(model, prompt, ["++", wrong], "numpy")
    with pytest.raises(DataError, match=r"text 1: contains \\ud800, an unpaired surrogate"):
        tinyprompt.predict(model, prompt, "a\ud800", "numpy")
    for function in (tinyprompt.ensemble, label_scores):
        with pytest.raises(TypeError, match=r"expected a list of texts, found the text '\+\+'"):
            function(model, [prompt] if function is tinyprompt.ensemble else prompt, "++", "numpy")
    with pytest.raises(TypeError, match=r"label words: expected several, .* found the text 'ab'"):
        tinyprompt.predict(model, Prompt(label_words="ab"), "++", "numpy")
    for nothing in (
        lambda: tinyprompt.gradient(model, prompt, []),
        lambda: tinyprompt.intermediates(model, prompt, []),
    ):
        with pytest.raises(DataError, match="no rows"):
            nothing()


@pytest.mark.parametrize("part", ["train", "dev"])
def test_an_unknown_target_is_named(model, part):
    parts = {"train": rows_of(8), "dev": rows_of(4)}
    parts[part] = [*parts[part], Row("so so", "fair")]
    more = ", or add train rows with it" if part == "dev" else ""
    with pytest.raises(
        DataError, match=rf"^{part} row 'so so': target 'fair' is not a label word \(a, b\); correct it{more}$"
    ):
        tune(model, parts["train"], parts["dev"], SHORT, LABELS)


@pytest.mark.parametrize(("rows", "dev"), [([], rows_of(2)), (rows_of(2), [])])
def test_missing_rows_are_refused(model, rows, dev):
    with pytest.raises(DataError, match=f"{len(rows)} train rows and {len(dev)} dev rows"):
        tune(model, rows, dev, SHORT, LABELS)


def test_a_non_finite_loss_stops_the_run(model):
    kept = []
    with pytest.raises(FloatingPointError, match=r"not finite at step 2|loss is (nan|inf) at step 2"):
        tune(model, rows_of(8), rows_of(2), changed(learning_rate=1e39), LABELS, each=saver(kept))
    assert kept == []
    broken = tree.merge(model.params, {"encoder.final_layer_norm.weight": np.full(20, np.nan, np.float32)})
    with pytest.raises(CheckpointError, match=r"key 'encoder\.final_layer_norm\.weight' contains NaN"):
        tune(replace(model, params=broken), rows_of(8), rows_of(2), SHORT, LABELS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, 0)
        for name in (
            "steps",
            "batch_size",
            "prompt_length",
            "eval_every",
            "max_input_tokens",
            "max_new_tokens",
            "num_beams",
        )
    ]
    + [(name, -1) for name in ("warmup_steps", "z_loss", "patience", "seed")]
    + [
        ("learning_rate", 0.0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("dropout", 1.0),
        ("dropout", -0.1),
    ]
    + [("length_penalty", float("nan"))]
    + [("optimizer", "sgd"), ("init", "zeros"), ("schedule", "cosine")],
)
def test_a_bad_setting_is_named(name, value):
    with pytest.raises(ValueError, match=f"setting {name}: expected"):
        Settings(**{name: value})


def initial_prompt(model, length, init, labels=None, text=None, seed=0, prompt=()):
    file = "p.safetensors" if init == "file" else None
    settings = Settings(prompt_length=length, init=init, init_text=text, seed=seed, init_file=file)
    return methods.init_params(model, settings, labels, prompt)


def vectors(model, length, init, **more):
    delta = initial_prompt(model, length, init, **more)
    assert list(delta) == [PROMPT]
    assert delta[PROMPT].shape == (length, 20)
    assert delta[PROMPT].dtype == np.float32
    assert (initial_prompt(model, length, init, **more)[PROMPT] == delta[PROMPT]).all()
    return delta[PROMPT]


def ids_of(model, prompt):
    """Return the row of the embedding table that each prompt vector equals."""
    table = model.params["shared"]["weight"]
    found = (prompt[:, None] == table).all(-1)
    assert (found.sum(1) == 1).all()
    return found.argmax(1)


@pytest.mark.parametrize(("init", "low"), [("uniform", -0.5), ("uniform-t5x", 0.0)])
def test_init_uniform(model, init, low):
    prompt = vectors(model, 200, init, seed=1)
    assert low <= prompt.min() < low + 0.01
    assert 0.49 < prompt.max() < 0.5
    assert not (prompt == vectors(model, 200, init, seed=2)).all()


@pytest.mark.parametrize(("init", "length"), [("vocab", 100), ("vocab", 381), ("vocab", 500), ("labels", 100)])
def test_init_vocab(model, init, length):
    ids = ids_of(model, vectors(model, length, init, seed=1))
    assert ids.min() >= 3
    assert length > 381 or len(set(ids)) == length  # pieces are distinct if there are enough
    assert list(ids) != list(ids_of(model, vectors(model, length, init, seed=2)))


def test_init_vocab_uses_frequent_pieces(model, monkeypatch):
    monkeypatch.setattr(methods, "FREQUENT", 10)
    assert set(ids_of(model, vectors(model, 10, "vocab"))) == set(range(3, 13))


def test_init_labels(model):
    table = model.params["shared"]["weight"]
    prompt = vectors(model, 7, "labels", labels=("ab", "c"))
    assert np.allclose(prompt[0], (table[ord("a") + 3] + table[ord("b") + 3]) / 2)
    assert (prompt[1] == table[ord("c") + 3]).all()
    assert (ids_of(model, prompt[1:]) >= 3).all()
    assert (vectors(model, 1, "labels", labels=("ab", "c")) == prompt[:1]).all()


def test_init_text(model):
    ids = ids_of(model, vectors(model, 8, "text", text="abc"))
    assert list(ids) == [ord(c) + 3 for c in "abcabcab"]
    assert (vectors(model, 2, "text", text="abc") == vectors(model, 8, "text", text="abc")[:2]).all()


def test_init_file(model, tmp_path):
    result = tune(model, rows_of(8), rows_of(6, 1), SHORT, LABELS)
    path = prompts.save_prompt(result.prompt, tmp_path / "p.safetensors")
    assert (vectors(model, 5, "file", prompt=prompts.load_prompt(path)) == result.prompt.params[PROMPT]).all()
    with pytest.raises(CheckpointError, match=r"p.safetensors: .*\[5, 20\], expected \[6, 20\]"):
        initial_prompt(model, 6, "file", prompt=prompts.load_prompt(path))


@pytest.mark.parametrize(
    ("length", "init", "message"),
    [
        (5, "zeros", "'zeros'"),
        (5, "text", "'text'"),
        (5, "file", "'file'"),
        (0, "vocab", "setting prompt_length: expected at least 1, found 0"),
    ],
)
def test_a_bad_init_is_named(model, length, init, message):
    with pytest.raises(ValueError, match=message):
        initial_prompt(model, length, init)


def texts_of(count, most=60):
    rng = np.random.default_rng(5)
    return ["".join(map(chr, rng.integers(33, 127, rng.integers(1, most)))) for _ in range(count)]


def log_p_of(params, label, states, mask):
    """Return the log probability of one label's ids, computed alone."""
    logits = t5.decode(params, CONFIG, t5.shift_right(np.array([label])), states, mask)
    return decode.log_probability(logits, np.array([label])).sum()


def test_padding_and_batches_do_not_change_a_prediction(model):
    texts, labels = texts_of(150), ("bad", "fun", "sad", "odd")
    delta = initial_prompt(model, 5, "uniform")
    params = tree.merge(model.params, delta)
    wanted = []
    for text in texts:
        ids = np.array([model.tokenizer.encode(text)])
        context, mask = t5.encode(params, CONFIG, ids, np.ones_like(ids))
        ids = [model.tokenizer.encode(label) for label in labels]
        scores = [log_p_of(params, label, context, mask) for label in ids]
        wanted.append(labels[int(np.argmax(scores))])
    assert answer(model, texts, labels, delta) == wanted
    assert len(set(wanted)) > 1


def test_a_prediction_reads_max_input_tokens(model):
    text = texts_of(1)[0] * 9
    cut = data.encode_inputs([text], model.tokenizer, 10)[0]
    assert len(cut) == 10
    assert answer(model, [text], None, settings=changed(max_input_tokens=10)) == answer(
        model, [model.tokenizer.decode(cut)], None, settings=SHORT
    )


@pytest.mark.parametrize("prompted", [False, True])
def test_free_text_equals_transformers(prompted):
    flat = random_weights(CONFIG, 3)
    flat["shared.weight"] = flat["shared.weight"] * 2
    flat["lm_head.weight"][131:] *= 0.1  # write mostly ASCII
    flat["lm_head.weight"][1] *= 1.2  # and sometimes stop
    model, reference = model_of(flat, np.float64), hugging_face(RAW, flat)
    texts, settings = texts_of(70), changed(max_new_tokens=12)
    delta = {k: v.astype(float) for k, v in initial_prompt(model, 5, "vocab").items()} if prompted else {}
    ids, mask = map(torch.from_numpy, data.pad([model.tokenizer.encode(text) for text in texts]))
    x = reference.get_input_embeddings()(ids)
    for prompt in delta.values():
        x = torch.cat([torch.from_numpy(prompt).expand(len(texts), -1, -1), x], 1)
        mask = torch.cat([torch.ones(len(texts), len(prompt), dtype=mask.dtype), mask], 1)
    special = dict(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, do_sample=False, use_cache=False)
    with torch.no_grad():
        written = reference.generate(inputs_embeds=x, attention_mask=mask, max_new_tokens=12, **special)
    answers = answer(model, texts, None, delta, settings)
    assert answers == [model.tokenizer.decode(row) for row in written.tolist()]
    assert len(set(answers)) > 10
    assert len(set(map(len, answers))) > 3


def test_a_stream_equals_predict():
    flat = random_weights(CONFIG, 3)
    flat["shared.weight"] = flat["shared.weight"] * 2
    model, settings = model_of(flat), changed(max_new_tokens=12)  # the bytes include invalid characters
    texts = texts_of(12)
    streams = [list(stream(model, Prompt(settings=vars(settings)), text)) for text in texts]
    assert ["".join(pieces) for pieces in streams] == answer(model, texts, None, (), settings)
    assert max(map(len, streams)) > 3


def test_beams_find_likelier_texts():
    flat = random_weights(CONFIG, 3)
    flat["lm_head.weight"][131:] *= 0.1
    flat["lm_head.weight"][1] *= 2
    model, texts = model_of(flat), texts_of(70)
    greedy, beams = (answer(model, texts, None, (), changed(max_new_tokens=8, num_beams=n)) for n in (1, 4))
    assert greedy != beams
    assert answer(model, texts[:1], None, (), changed(max_new_tokens=8, num_beams=4)) == beams[:1]
    shorter = answer(model, texts, None, (), changed(max_new_tokens=8, num_beams=4, length_penalty=0.0))
    assert sum(map(len, shorter)) < sum(map(len, beams))
    other = lambda penalty: answer(
        model, texts, None, (), changed(max_new_tokens=8, num_beams=4, length_penalty=penalty)
    )
    assert other(1.0) == beams != other(2.0)  # the default of transformers is 1


def test_free_text_can_be_tuned(model):
    result = tune(model, rows_of(20), rows_of(6, 1), SHORT, None)
    assert result.prompt.label_words is None
    assert len(answer(model, ["+", "--"], None, result.prompt.params, SHORT)) == 2


def test_loss_is_teacher_forced_cross_entropy(model):
    batch = next(data.training_batches(rows_of(8), model.tokenizer, Settings(batch_size=4)))
    delta = initial_prompt(model, 5, "vocab")
    scores = []
    for i, row in enumerate(batch.labels):
        ids = batch.input_ids[i : i + 1], batch.attention_mask[i : i + 1]
        context, mask = t5.encode(tree.merge(model.params, delta), CONFIG, *ids)
        label = row[: int(batch.weights[i].sum())].tolist()
        scores.append(log_p_of(model.params, label, context, mask))
    assert np.isclose(
        train.loss(delta, model.params, model.config, batch), -sum(scores) / batch.weights.sum(), rtol=1e-5
    )


def test_the_gradient_equals_finite_differences(model):
    rows = rows_of(5)
    prompt = prompt_of(model, initial_prompt(model, 4, "vocab"), LABELS, replace(SHORT, prompt_length=4))
    found = gradient(model, prompt, rows, "numpy")
    way = np.random.default_rng(0).normal(size=prompt.array.shape).astype(np.float32)
    ends = [
        gradient(model, replace(prompt, params={PROMPT: prompt.array + h * way}), rows, "numpy").loss
        for h in (1e-2, -1e-2)
    ]
    assert np.isclose((ends[0] - ends[1]) / 2e-2, np.sum(found.array * way), rtol=2e-2, atol=1e-3)
