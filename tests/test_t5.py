"""The model against transformers, in float64: logits, loss and the gradient of the prompt."""

import numpy as np
import pytest
from autograd import value_and_grad
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import FAMILIES, batch, pair, raw_config, torch, transformers

from tinyprompt import generate, ops, t5, tree

KEY = "encoder.prompt.embedding"


def torch_loss(model, prompt, ids, mask, labels, z_loss=0.0):
    embedded = model.get_input_embeddings()(torch.from_numpy(ids))
    rows = len(ids)
    x = torch.cat([prompt.expand(rows, *prompt.shape[-2:]), embedded], 1)
    full = torch.cat([torch.ones(rows, prompt.shape[-2], dtype=torch.int64), torch.from_numpy(mask)], 1)
    start = torch.from_numpy(generate.shift_right(labels))
    logits = model(inputs_embeds=x, attention_mask=full, decoder_input_ids=start, use_cache=False).logits
    wanted = torch.from_numpy(np.where(labels == 0, -100, labels))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    log_z = torch.logsumexp(logits, -1)
    return loss + z_loss * (log_z**2)[wanted != -100].mean()


def our_loss(delta, params, config, ids, mask, labels, weights, z_loss=0.0):
    logits = t5.forward(tree.merge(params, delta), config, ids, mask, generate.shift_right(labels))
    return ops.cross_entropy(logits, labels, weights, z_loss)


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


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    seed=st.integers(0, 999),
    length=st.integers(1, 9),
    rows=st.integers(1, 3),
    words=st.integers(1, 40),
    out=st.integers(1, 4),
    heads=st.integers(1, 3),
    d_kv=st.sampled_from([2, 5, 8]),
    z_loss=st.sampled_from([0.0, 0.01]),
)
def test_prompt_gradient_equals_torch(family, seed, length, rows, words, out, heads, d_kv, z_loss):
    config, params, reference = pair(family, seed, num_heads=heads, d_kv=d_kv, num_layers=1)
    ids, mask, labels, weights = batch(seed, 61, rows, words, out)
    prompt = np.random.default_rng(seed).normal(0, 1, (length, 20))
    value, gradient = value_and_grad(our_loss)({KEY: prompt}, params, config, ids, mask, labels, weights, z_loss)
    theirs = torch.from_numpy(prompt).requires_grad_()
    loss = torch_loss(reference, theirs, ids, mask, labels, z_loss)
    loss.backward()
    assert abs(value - loss.item()) < 1e-10
    assert np.abs(gradient[KEY] - theirs.grad.numpy()).max() < 1e-9


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
    args = (config, ids, mask, labels, weights.astype(np.float32), 1e-4)
    value, gradient = value_and_grad(our_loss)({KEY: prompt}, single, *args)
    assert gradient[KEY].dtype == np.float32
    assert np.asarray(value).dtype == np.float32
    exact = value_and_grad(our_loss)({KEY: prompt.astype(float)}, params, *args)[1][KEY]
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
