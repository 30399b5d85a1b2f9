"""The model: logits of every family, shapes, masks, dtypes. Its gradients are in test_parity.py."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from reference import FAMILIES, batch, pair, raw_config, torch, transformers

from tinyprompt import ops, t5, train, tree
from tinyprompt.data import Batch
from tinyprompt.files.config import parse_config

KEY = "encoder.prompt.embedding"


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family):
    config, params, reference = pair(family)
    ids, mask, labels, _ = batch(1, 61, rows=4, length=37, out=5)
    start = t5.shift_right(labels)
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
    start = t5.shift_right(labels)
    with torch.no_grad():
        theirs = reference(*map(torch.from_numpy, (ids, mask, start)), use_cache=False).logits.numpy()
    assert np.abs(t5.forward(params, config, ids, mask, start) - theirs).max() < 1e-10


def test_each_row_of_a_batch_may_have_its_own_prompt():
    config, params, _ = pair("t5-1.1")
    ids, mask, labels, _ = batch(3, 61, rows=2, length=8, out=2)
    prompts = np.random.default_rng(0).normal(0, 1, (2, 4, 20))
    args = (config, ids, mask, t5.shift_right(labels))
    both = t5.forward(tree.merge(params, {KEY: prompts}), *args)
    for row in range(2):
        alone = t5.forward(tree.merge(params, {KEY: prompts[row]}), *args)
        assert np.abs(both[row] - alone[row]).max() < 1e-12


@examples(25)
@given(
    seed=st.integers(0, 999),
    length=st.integers(1, 6),
    more=st.integers(1, 40),
    queries=st.integers(1, 5),
    rows=st.integers(1, 4),
    own=st.booleans(),
)
def test_a_prefix_equals_additional_context(seed, length, more, queries, rows, own):
    config, params, _ = pair("t5-1.1")
    weights = params["decoder"]["block"]["0"]["layer"]["1"]["EncDecAttention"]
    rng = np.random.default_rng(seed)
    x, context = rng.normal(size=(rows, queries, 20)), rng.normal(size=(rows, length, 20))
    first = rng.normal(size=(rows if own else 1, more, 20))  # one per row, or shared by all rows
    bias = t5.additive(np.arange(length) < rng.integers(1, length + 1, (rows, 1)), float)
    wide = np.concatenate([np.broadcast_to(first, (rows, more, 20)), context], 1)
    mask = np.concatenate([np.zeros((rows, 1, 1, more)), bias], -1)
    wanted = t5.attention(x, wide, mask, t5.unchanged, config, **weights)
    prefix = {name: ops.linear(first if own else first[0], weights[name[0]]["weight"]) for name in ("key", "value")}
    found = t5.attention(x, context, t5.behind_prefix(bias, prefix), t5.unchanged, config, **weights, prefix=prefix)
    assert np.abs(found - wanted).max() < 1e-12


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_has_the_positions_before_the_first(family, stack):
    config, params, _ = pair(family, num_decoder_layers=2)
    length, more, block = 5, 150, params[stack]["block"]  # long enough to reach far buckets
    prefixed = tree.merge(block, {f"{i}.layer.0.SelfAttention.prefix.key": np.ones((more, 18)) for i in "01"})
    zeros = lambda n: np.zeros((1, 1, n, n))
    found = t5.position_biases(prefixed, zeros(length), np.arange(length), stack == "encoder", config)
    whole = t5.position_biases(block, zeros(more + length), np.arange(more + length), stack == "encoder", config)
    assert [
        (prefixed_bias == whole_bias[:, :, more:]).all() for prefixed_bias, whole_bias in zip(found, whole, strict=True)
    ] == [True, True]


ATTENTIONS = [
    "encoder.block.1.layer.0.SelfAttention",
    "decoder.block.0.layer.0.SelfAttention",
    "decoder.block.2.layer.1.EncDecAttention",
]


def prefixes(dtype=np.float64, places=ATTENTIONS):
    """Return prefixes of different lengths for several attentions."""
    rng = np.random.default_rng(0)
    shape = lambda i: (i + 2, 18)
    return {
        f"{at}.prefix.{name}": rng.normal(size=shape(i)).astype(dtype)
        for i, at in enumerate(places)
        for name in ("key", "value")
    }


@pytest.mark.parametrize("family", ["t5-1.0", "umt5"])
def test_the_gradient_of_a_prefix_equals_finite_differences(family):
    config, params, _ = pair(family)
    ids, mask, labels, weights = batch(7, 61, rows=2, length=6, out=3)
    delta = prefixes() | {KEY: np.random.default_rng(1).normal(size=(2, 20))}
    data = Batch(ids, mask, labels, weights)
    loss = lambda delta: train.loss(delta, params, config, data)
    _, gradient = train.loss_and_grads(delta, params, config, data)
    assert gradient.keys() == delta.keys()
    rng, step = np.random.default_rng(2), 1e-5
    for name, value in delta.items():
        way = rng.normal(size=value.shape)
        ahead, behind = (loss(delta | {name: value + sign * step * way}) for sign in (1, -1))
        slope = (gradient[name] * way).sum()
        assert abs((ahead - behind) / (2 * step) - slope) < 1e-7 * max(1, abs(slope))
        assert abs(slope) > 1e-6


@pytest.mark.parametrize("scale", [1, 1e4])  # of the scores
def test_padding_changes_nothing(scale):
    config, params, _ = pair("t5-1.1")
    queries = {name: x * scale for name, x in tree.flatten(params).items() if name.endswith(".q.weight")}
    params = tree.merge(params, queries)
    ids, mask, labels, _ = batch(4, 61, rows=1, length=6, out=2)
    start = t5.shift_right(labels)
    wide = np.pad(ids, ((0, 0), (0, 5)), constant_values=7), np.pad(mask, ((0, 0), (0, 5)))
    assert np.abs(t5.forward(params, config, ids, mask, start) - t5.forward(params, config, *wide, start)).max() < 1e-12


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (16, 1000), (4, 20)])
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
    prefix = prefixes(np.float32, ATTENTIONS[:2])
    _, gradients = train.loss_and_grads(prefix, single, config, data)
    assert {g.dtype for g in gradients.values()} == {np.dtype(np.float32)}
    value, gradient = train.loss_and_grads({KEY: prompt}, single, config, data)
    assert gradient[KEY].dtype == np.float32
    assert np.asarray(value).dtype == np.float32
    exact = train.loss_and_grads({KEY: prompt.astype(float)}, params, config, data)[1][KEY]
    assert np.linalg.norm(gradient[KEY] - exact) < 1e-4 * np.linalg.norm(exact)


def test_dropout_is_applied_where_transformers_applies_it():
    config, params, reference = pair("t5-1.1")
    ids, mask, labels, _ = batch(8, 61, rows=2, length=6, out=3)
    ours, theirs = [], []

    def seen(name, x):
        if not name.endswith("hidden_states"):
            ours.append(x.shape)
        return x

    for module in reference.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, inputs, output: theirs.append(tuple(output.shape)))
    start = t5.shift_right(labels)
    reference(*map(torch.from_numpy, (ids, mask, start)), use_cache=False)
    t5.forward(params, config, ids, mask, start, seen)
    scores = [shape for shape in ours if len(shape) == 4 or shape[1] in (3 * 3, 3 * 6) or shape[-1] not in (20, 28)]
    assert sorted(shape for shape in ours if shape not in scores) == sorted(theirs)
    assert len(scores) == 2 + 2 * 3  # one per attention, where transformers uses the functional dropout


def test_dropout_keeps_the_mean_and_follows_its_seed():
    x = np.ones((200, 50), np.float32)
    a, b, other_step, other_name = (
        t5.dropout(0.25, *key)(name, x) for *key, name in ((3, 1, "a"), (3, 1, "a"), (3, 2, "a"), (3, 1, "b"))
    )
    assert (a == b).all()
    assert not (a == other_step).all()
    assert not (a == other_name).all()
    assert a.dtype == np.float32
    assert set(np.unique(a)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(a.mean() - 1) < 0.03
    assert t5.dropout(0.0, 3) is t5.unchanged


@examples(30)
@given(
    seed=st.integers(0, 99),
    rows=st.integers(1, 3),
    queries=st.integers(1, 5),
    length=st.integers(1, 9),
    masked=st.booleans(),
)
def test_attend_short_equals_attend(seed, rows, queries, length, masked):
    config, params, _ = pair("t5-1.1")
    H, K = config.num_heads, config.d_kv
    weights = params["decoder"]["block"]["0"]["layer"]["1"]["EncDecAttention"]
    rng = np.random.default_rng(seed)
    states, q = rng.normal(size=(rows, length, 20)), rng.normal(size=(rows, H, queries, K))
    bias = rng.normal(size=(rows, H, queries, length))
    bias[..., 1:] += t5.MASKED * masked * (rng.random((rows, 1, 1, length - 1)) < 0.5)
    kv = t5.keys_and_values(states, config, weights["k"], weights["v"])
    wanted = t5.attend(q, kv["key"], kv["value"], bias)
    short = t5.attend_short(q, states, weights["k"]["weight"], weights["v"]["weight"], bias)
    assert np.abs(short - wanted).max() < 1e-12


def test_attention_uses_attend_short_when_it_is_cheaper(monkeypatch):
    config, params, _ = pair("t5-1.1")
    ids, mask, labels, _ = batch(3, 61, rows=2, length=40, out=1)
    taken = []
    original = t5.attend_short
    monkeypatch.setattr(t5, "attend_short", lambda *args: taken.append(args[0].shape) or original(*args))
    t5.forward(params, config, ids, mask, labels)
    assert taken == [(2, 3, 1, 6)] * config.num_decoder_layers


def test_intermediate_values_equal_transformers():
    config, params, reference = pair("t5-1.1")
    ids, mask, labels, _ = batch(8, 61, rows=2, length=6, out=3)
    seen, start = {}, t5.shift_right(labels)
    t5.forward(params, config, ids, mask, start, t5.recorder(seen))
    reference.set_attn_implementation("eager")
    out = reference(
        *map(torch.from_numpy, (ids, mask, start)), use_cache=False, output_hidden_states=True, output_attentions=True
    )
    for part, layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        states = getattr(out, f"{part}_hidden_states")
        names = [f"block.{i}.layer.{1 if part == 'encoder' else 2}.hidden_states" for i in range(layers - 1)]
        for name, wanted in zip(["embedding", *names, "final"], states, strict=True):
            assert np.abs(seen[f"{part}.{name}"] - wanted.detach().numpy()).max() < 1e-10
        for i, wanted in enumerate(getattr(out, f"{part}_attentions")):
            found = seen[f"{part}.block.{i}.layer.0.attention_weights"]
            assert np.abs(found - wanted.detach().numpy()).max() < 1e-10
    for i, wanted in enumerate(out.cross_attentions):
        assert np.abs(seen[f"decoder.block.{i}.layer.1.attention_weights"] - wanted.detach().numpy()).max() < 1e-10


def test_a_surplus_weight_is_named():
    config, params, _ = pair("t5-1.1")
    params = tree.merge(params, {"encoder.block.0.layer.0.SelfAttention.surprise.weight": np.ones(2)})
    ids, mask, labels, _ = batch(6, 61, rows=1, length=3, out=1)
    with pytest.raises(TypeError, match="surprise"):
        t5.forward(params, config, ids, mask, labels)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("d_model", 0),
        ("num_heads", "8"),
        ("feed_forward_proj", "silu"),
        ("model_type", "bert"),
        ("num_layers", 10**9),
        ("relative_attention_num_buckets", 2),
        ("relative_attention_num_buckets", 7),
        ("relative_attention_max_distance", 16),
        ("layer_norm_epsilon", float("nan")),
        ("layer_norm_epsilon", float("inf")),
    ],
)
def test_a_bad_configuration_names_its_key(key, value):
    with pytest.raises(ValueError, match=key):
        parse_config(raw_config("t5-1.1", **{key: value}))
