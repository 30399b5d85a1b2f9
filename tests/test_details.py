"""Exact values of details that larger tests would miss. Each detail was once a mutant that no test caught."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from ml_dtypes import bfloat16
from reference import batch, pair, raw_config
from tuning import byte_model, prompt_of, saver, tune

from tinyprompt import data, decode, methods, ops, optim, t5, train
from tinyprompt.check import ledger
from tinyprompt.config import weight_shapes
from tinyprompt.data import Row
from tinyprompt.errors import CheckpointError
from tinyprompt.files import models
from tinyprompt.files.config import parse_config
from tinyprompt.fit import check_fit
from tinyprompt.methods import PROMPT
from tinyprompt.model import Prompt
from tinyprompt.predict import label_scores
from tinyprompt.settings import Settings
from tinyprompt.tasks.metrics import normalize_answer
from tinyprompt.tokenizer import ByteTokenizer

ROWS = [Row(f"film {i}", "bad" if i % 2 else "good") for i in range(12)]
CONFIG = parse_config(raw_config("t5-1.1", num_layers=2, num_decoder_layers=2))


def names(method):
    return set(methods.trained_shapes(CONFIG, Settings(method=method, rank=2)))


def test_lora_is_on_queries_and_values():
    assert {name.rsplit(".lora.")[0].rpartition(".")[2] for name in names("lora")} == {"q", "v"}
    assert len(names("lora")) == 2 * 2 * (2 + 2 + 2)  # a and b of q and v in each attention


def test_bitfit_trains_every_vector_and_every_position_bias():
    vectors = {name for name, shape in weight_shapes(CONFIG).items() if len(shape) == 1}
    biases = {f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for part in ("encoder", "decoder")}
    assert names("bitfit") == vectors | biases


def test_each_method_has_all_its_arrays():
    attentions, layers = 2 + 2 * 2, 2 * 2 + 2 * 3  # two layers per stack
    counted = {method: len(names(method)) for method in set(methods.METHODS) - {"warp"}}
    assert counted == {
        **{"prompt": 1, "layer-prompts": 2, "prefix": 2 * attentions, "prefix-mlp": 1 + 2 * 2, "p-tuning": 1 + 2 * 3},
        **{"adapter": 4 * layers, "lora": 2 * 2 * attentions, "ia3": 2 * attentions + 4},
        **{"bitfit": layers + 2 + 2, "full": len(weight_shapes(CONFIG))},
    }
    for count in (methods.trained_shapes, methods.stored_shapes, methods.count):
        with pytest.raises(ValueError, match=r"method 'warp' .* needs a classification task"):
            count(CONFIG, Settings(method="warp"))


@pytest.fixture
def model(folder):
    return models.load(folder)


QUICK = Settings(steps=4, batch_size=4, prompt_length=3, eval_every=4, optimizer="adam")


def losses(model, **changes):
    return [
        row["loss"] for row in tune(model, ROWS, ROWS, replace(QUICK, **changes), ("bad", "good"), "numpy").history[1:]
    ]


def test_the_z_loss_is_part_of_the_training_loss(model):
    plain, with_z = losses(model, z_loss=0.0), losses(model, z_loss=0.5)
    first = next(data.training_batches(ROWS, model.tokenizer, QUICK, {}))
    begun = methods.init_params(model, QUICK, ("bad", "good"))
    for found, z_loss in ((plain, 0.0), (with_z, 0.5)):
        wanted = train.loss(begun, model.params, model.config, first, z_loss=z_loss)
        assert np.isclose(found[0], wanted, rtol=1e-6)
    assert with_z[0] > plain[0] * 1.5


def test_dropout_follows_the_seed(model, monkeypatch):
    drawn, original = [], t5.dropout
    monkeypatch.setattr(t5, "dropout", lambda rate, *key: drawn.append((rate, *key)) or original(rate, *key))
    for seed in (3, 4):
        losses(model, dropout=0.25, seed=seed, steps=2)
    assert drawn == [(0.25, seed, step) for seed in (3, 4) for step in (1, 2)]


def test_the_learning_rate_follows_the_step(model, monkeypatch):
    rates, plain = [], optim.adam()
    update = lambda params, grads, state, rate: rates.append(rate) or plain.update(params, grads, state, rate)
    monkeypatch.setitem(optim.OPTIMIZERS, "adam", lambda: optim.Optimizer(plain.init, update))
    losses(model, schedule="linear", learning_rate=0.4)
    losses(model, warmup_steps=2, learning_rate=0.4)
    assert np.allclose(rates, [0.4, 0.3, 0.2, 0.1, 0.2, 0.4, 0.4, 0.4])


def test_rows_are_shuffled_differently_in_each_epoch(model):
    rows = [Row(f"{i:02}", "x") for i in range(64)]
    batches = data.training_batches(rows, model.tokenizer, Settings(batch_size=8))
    epochs = [
        [bytes(row[:2] - 3).decode() for _ in range(8) for row in next(batches).input_ids.astype("u1")] for _ in "ab"
    ]
    assert [sorted(epoch) for epoch in epochs] == [[row.input for row in rows]] * 2
    assert epochs[0] != epochs[1]
    parts = [epoch[i : i + 8] for epoch in epochs for i in range(0, 64, 8)]
    assert not any(part == [row.input for row in rows[i : i + 8]] for part in parts for i in range(57))


@pytest.mark.parametrize("penalty", [0.5, 1.0, -1.0])
def test_rank_classification_divides_by_a_power_of_the_length(penalty):
    model, words = byte_model(), ("no", "maybe")
    plain, found = (
        label_scores(model, Prompt(label_words=words, settings={"length_penalty": p}), ["a", "bc"], "numpy")
        for p in (None, penalty)
    )
    assert np.allclose(found, plain / np.array([3, 6]) ** penalty, rtol=1e-6)  # bytes and eos


def test_the_next_token_ignores_padding_of_the_input():
    config, params, _ = pair("t5-1.1")
    ids, _, labels, _ = batch(2, 61, rows=2, length=9, out=4)
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    states, mask = t5.encode(params, config, ids, mask)
    wanted = t5.decode(params, config, labels[:, :1], states, mask)[:, 0]
    cache = decode.first_cache(params, config, states, 1, 4)[1]
    state = params, config, cache, labels[:, 0], np.array([0]), 4
    found = [decode.decode_next(*state, m, None, decode.all_logits)[0] for m in (mask, mask * 0 + 1)]
    assert np.abs(found[0] - wanted).max() < 1e-12
    assert np.abs(found[1] - wanted)[1].max() > 1e-3


def test_adafactor_clips_at_a_root_mean_square_of_1_and_has_an_epsilon():
    step = lambda gradient: optim.adafactor(weight_decay=0.0).update(
        {"p": np.zeros(4)}, {"p": np.array(gradient)}, optim.adafactor().init({"p": np.zeros(4)}), 1.0
    )[0]["p"]
    assert np.allclose(step([1e3, -1e3, 1e3, 1e3]), [-1, 1, -1, -1])  # the first step is the sign, whose RMS is 1
    tiny = 1e-16  # its square is below epsilon, 1e-30, so the step is small
    assert np.allclose(step([tiny] * 4), -tiny / np.sqrt(tiny**2 + 1e-30), rtol=1e-9)
    state = {"p": {"step": np.array(9), "v": np.full(4, 1e-6)}}
    moved = optim.adafactor(weight_decay=0.0).update({"p": np.zeros(4)}, {"p": np.ones(4)}, state, 1.0)[0]["p"]
    beta = 1 - 10**-0.8
    raw = 1 / np.sqrt(beta * 1e-6 + (1 - beta))
    assert raw > 1
    assert np.allclose(moved, -1.0)  # clipped


def test_squad_ignores_all_three_articles():
    assert normalize_answer("A cat, an owl and the dog's a") == "cat owl and dogs"


def test_every_digit_of_a_fingerprint_is_compared(model):
    prompt = prompt_of(model, {PROMPT: np.ones((3, 4), np.float32)}, ("a", "b"), replace(QUICK, prompt_length=3))
    check_fit(prompt, model)
    for i in (0, 12, 32, 63):
        digits = list(model.fingerprint)
        digits[i] = "0" if digits[i] != "0" else "1"
        with pytest.raises(CheckpointError, match=r"was tuned on"):
            check_fit(replace(prompt, fingerprint="".join(digits)), model)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_16_bit_arrays_are_widened(dtype):
    wide = ops.widen(np.array([1.5, -2], dtype))
    assert wide.dtype == np.float32
    assert wide.tolist() == [1.5, -2]


def test_mt5_is_never_tied():
    for tied in (True, False):
        config = parse_config(raw_config("mt5", tie_word_embeddings=tied))
        assert (config.tied_head, config.scaled_logits) == (False, False)


def test_dropout_applies_to_attention_weights_of_few_queries():
    rng, seen = np.random.default_rng(0), []
    q, states, w = rng.normal(size=(2, 3, 1, 6)), rng.normal(size=(2, 9, 20)), rng.normal(size=(18, 20))
    nothing = lambda name, x: seen.append(name) or 0 * x
    assert not t5.attend_short(q, states, w, w, np.zeros((2, 1, 1, 9)), nothing).any()
    assert seen == ["attention_weights"]


def test_the_cases_of_a_check_reach_the_last_bucket(model):
    longest = max(ledger.draw(model, seed).batch.input_ids.shape[1] for seed in range(3))
    assert longest > model.config.relative_attention_max_distance


def test_init_from_vocabulary_uses_the_5000_most_frequent_pieces():
    table = {"shared": {"weight": np.arange(6000.0)[:, None]}}
    start = lambda words: SimpleNamespace(
        model=SimpleNamespace(params=table, tokenizer=range(words)), rng=np.random.default_rng(0)
    )
    for words, top in ((6000, 5000), (4000, 3997)):
        drawn = methods.from_vocabulary(start(words), (top, 1))[:, 0]
        assert sorted(drawn) == list(range(3, 3 + top))


def test_random_matrices_have_a_variance_of_one_over_their_inputs():
    drawn = methods.normal(SimpleNamespace(rng=np.random.default_rng(0)), (300, 400))
    assert abs(drawn.mean()) < 5 * 400**-0.5 / drawn.size**0.5
    assert np.isclose(drawn.std(), 400**-0.5, rtol=0.02)


SHAPES = [((3, 5), "belongs to another model"), ((2, 4), "use a prompt_length of 2")]


@pytest.mark.parametrize(("shape", "advice"), SHAPES)
def test_a_saved_prompt_of_another_shape_gets_advice(model, shape, advice):
    saved = Prompt({PROMPT: np.ones(shape, np.float32)})
    with pytest.raises(CheckpointError, match=advice):
        methods.init_params(model, replace(QUICK, init="file", init_file="p.npy"), None, saved)


def test_patience_counts_dev_scores_since_the_best(model):
    wrong = [row._replace(target="bad" if row.target == "good" else "good") for row in ROWS]
    settings, kept = replace(QUICK, steps=200, eval_every=1, patience=3, learning_rate=0.3), []
    result = tune(model, wrong, ROWS, settings, ("bad", "good"), "numpy", each=saver(kept))
    assert len(result.history) - 1 == result.best_step + 3
    assert len(kept) == len(result.history) - 1


def test_a_prompt_of_another_tokenizer_is_refused(model):
    prompt = prompt_of(model, {PROMPT: np.ones((3, 4), np.float32)}, ("a", "b"), replace(QUICK, prompt_length=3))
    for words in (ByteTokenizer(3), ByteTokenizer(124)):
        other = replace(model, tokenizer=words)
        with pytest.raises(CheckpointError, match="with another tokenizer than 'small'"):
            check_fit(prompt, other)
        check_fit(prompt, replace(model, tokenizer=None))
