"""The model: logits of every family, shapes, masks, dtypes. Its gradients are in test_parity.py."""

import numpy as np
import pytest
from reference import FAMILIES, batch, pair, raw_config, torch, transformers

from tinyprompt import generate, t5, train, tree
from tinyprompt.data import Batch

KEY = "encoder.prompt.embedding"


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family):
    config, params, reference = pair(family)
    ids, mask, labels, _ = batch(1, 61, rows=4, length=37, out=5)
    start = generate.shift_right(labels)
    ours = t5.forward(params, config, ids, mask, start)
    with torch.no_grad():
        theirs = reference(*map(torch.from_numpy, (ids, mask, start)), use_cache=False).logits.numpy()
    assert np.abs(ours - theirs).max() < 1e-10
    assert np.abs(ours).max() > 0.1


def test_logits_equal_transformers_at_the_shape_of_t5_1_1_small():
    config, params, reference = pair(
        "t5-1.1", vocab_size=97, d_model=512, d_kv=64, num_heads=6, d_ff=1024, num_layers=8, num_decoder_layers=8
    )
    ids, mask, labels, _ = batch(2, 97, rows=2, length=140, out=3)
    start = generate.shift_right(labels)
    with torch.no_grad():
        theirs = reference(*map(torch.from_numpy, (ids, mask, start)), use_cache=False).logits.numpy()
    assert np.abs(t5.forward(params, config, ids, mask, start) - theirs).max() < 1e-10


def test_prompts_of_their_own_for_the_rows_of_a_batch():
    config, params, _ = pair("t5-1.1")
    ids, mask, labels, _ = batch(3, 61, rows=2, length=8, out=2)
    prompts = np.random.default_rng(0).normal(0, 1, (2, 4, 20))
    args = (config, ids, mask, generate.shift_right(labels))
    both = t5.forward(tree.merge(params, {KEY: prompts}), *args)
    for row in range(2):
        alone = t5.forward(tree.merge(params, {KEY: prompts[row]}), *args)
        assert np.abs(both[row] - alone[row]).max() < 1e-12


def test_padding_changes_nothing():
    config, params, _ = pair("t5-1.1")
    ids, mask, labels, _ = batch(4, 61, rows=1, length=6, out=2)
    start = generate.shift_right(labels)
    wide = np.pad(ids, ((0, 0), (0, 5)), constant_values=7), np.pad(mask, ((0, 0), (0, 5)))
    assert np.abs(t5.forward(params, config, ids, mask, start) - t5.forward(params, config, *wide, start)).max() < 1e-12


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (16, 1000)])
def test_buckets_equal_transformers_at_every_distance(bidirectional, buckets, furthest):
    distance = np.arange(-3000, 3001)
    ours = t5.relative_position_bucket(distance, bidirectional, buckets, furthest)
    attention = transformers.models.t5.modeling_t5.T5Attention
    theirs = attention._relative_position_bucket(torch.from_numpy(distance), bidirectional, buckets, furthest)
    assert (ours == theirs.numpy()).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_stays_float32(family):
    config, params, _ = pair(family)
    single = tree.nest({k: v.astype(np.float32) for k, v in tree.flatten(params).items()})
    ids, mask, labels, weights = batch(5, 61, rows=2, length=7, out=3)
    prompt = np.ones((3, 20), np.float32)
    data = Batch(ids, mask, labels, weights.astype(np.float32))
    value, gradient = train.loss_and_gradient({KEY: prompt}, single, config, data)
    assert gradient[KEY].dtype == np.float32
    assert np.asarray(value).dtype == np.float32
    exact = train.loss_and_gradient({KEY: prompt.astype(float)}, params, config, data)[1][KEY]
    assert np.linalg.norm(gradient[KEY] - exact) < 1e-4 * np.linalg.norm(exact)


def test_dropout_keeps_the_mean_and_follows_its_seed():
    x = np.ones((200, 50), np.float32)
    a, b = (t5.dropout(0.25, np.random.default_rng(3))(x) for _ in range(2))
    assert (a == b).all()
    assert a.dtype == np.float32
    assert set(np.unique(a)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(a.mean() - 1) < 0.03
    assert t5.dropout(0.0, np.random.default_rng(3)) is t5.identity


def test_a_surplus_weight_is_named():
    config, params, _ = pair("t5-1.1")
    params = tree.merge(params, {"encoder.block.0.layer.0.SelfAttention.surprise.weight": np.ones(2)})
    ids, mask, labels, _ = batch(6, 61, rows=1, length=3, out=1)
    with pytest.raises(TypeError, match="surprise"):
        t5.forward(params, config, ids, mask, labels)


@pytest.mark.parametrize(
    ("key", "value"), [("d_model", 0), ("num_heads", "8"), ("feed_forward_proj", "silu"), ("model_type", "bert")]
)
def test_a_bad_configuration_names_its_key(key, value):
    with pytest.raises(ValueError, match=key):
        t5.Config.from_dict(raw_config("t5-1.1", **{key: value}))
