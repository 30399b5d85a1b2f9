"""The whole model against torch, transformers and PEFT, on random configurations, shapes, masks and prompts."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from profiles import examples
from reference import FAMILIES, batch, check_torch, hugging_face, random_weights, raw_config, torch

from tinyprompt import t5, train, tree
from tinyprompt.check import ledger
from tinyprompt.check.ledger import distance, finite_differences, typical
from tinyprompt.data import Batch
from tinyprompt.device import compile, default_device
from tinyprompt.files.config import parse_config
from tinyprompt.methods import PROMPT

peft = pytest.importorskip("peft", reason="the reference needs PEFT")
EXACT = 1e-9  # relative, in float64
TIMES = 1.5  # a float32 error may be 1.5 times torch's, plus one unit
UNIT = 2.0**-23
DEVICES = ["numpy", pytest.param("cpu", marks=pytest.mark.skipif(default_device() == "numpy", reason="needs onnx"))]


class Problem(NamedTuple):
    """The parameters of a comparison. The printed form can be pasted into `@example`."""

    family: str
    gated: bool
    tied: bool
    d_model: int
    d_kv: int
    num_heads: int
    d_ff: int
    layers: tuple[int, int]
    buckets: tuple[int, int]
    rows: int
    words: int
    out: int
    length: int
    left: bool
    own_prompts: bool
    fractions: bool  # weights of the labels
    z_loss: float
    epsilon: float
    seed: int

    def draw(self):
        """Return config.json, configuration, flat weights, batch and prompt, in float64."""
        raw = raw_config(
            self.family,
            feed_forward_proj="gated-gelu" if self.gated else "relu",
            tie_word_embeddings=self.tied,
            **{name: getattr(self, name) for name in ("d_model", "d_kv", "num_heads", "d_ff")},
            num_layers=self.layers[0],
            num_decoder_layers=self.layers[1],
            relative_attention_num_buckets=self.buckets[0],
            relative_attention_max_distance=self.buckets[1],
            layer_norm_epsilon=self.epsilon,
        )
        config = parse_config(raw)
        rng = np.random.default_rng(self.seed)
        shape = (self.length, self.d_model)
        prompt = rng.normal(size=(self.rows, *shape) if self.own_prompts else shape)
        data = Batch(*batch(self.seed, config.vocab_size, self.rows, self.words, self.out, self.left))
        if self.fractions:
            data = data._replace(weights=data.weights * rng.integers(1, 5, data.weights.shape) / 4)
        # The numbers are exact in float32, so that float32 and float64 start from equal values.
        flat = {k: v.astype(np.float32).astype(float) for k, v in random_weights(config, self.seed).items()}
        return raw, config, flat, data, prompt.astype(np.float32).astype(float)


problems = st.builds(
    Problem,
    family=st.sampled_from(sorted(FAMILIES)),
    gated=st.booleans(),
    tied=st.booleans(),
    d_model=st.sampled_from([8, 16, 22, 26]),  # never num_heads * d_kv
    d_kv=st.sampled_from([3, 5, 7]),
    num_heads=st.integers(1, 4),
    d_ff=st.sampled_from([11, 24, 33]),
    layers=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    buckets=st.sampled_from([(32, 128), (8, 20), (16, 1000)]),
    rows=st.integers(1, 8),
    words=st.integers(1, 40),
    out=st.integers(1, 30),
    length=st.integers(1, 150),
    left=st.booleans(),
    own_prompts=st.booleans(),
    fractions=st.booleans(),
    z_loss=st.sampled_from([0.0, 0.01]),
    epsilon=st.sampled_from([1e-6, 0.1]),
    seed=st.integers(0, 999),
)
LARGE = Problem("umt5", True, False, 26, 7, 4, 33, (3, 2), (32, 128), 3, 200, 6, 150, True, False, True, 0.01, 0.1, 1)


def in_torch(model, prompt, data, z_loss=0.0, dtype=torch.float64):
    """Return loss, logits and prompt gradient, computed by transformers."""
    prompt = torch.from_numpy(prompt).to(dtype).requires_grad_()
    tensors = {name: torch.from_numpy(x.copy()) for name, x in data._asdict().items()}
    tensors["weights"] = tensors["weights"].to(dtype)
    loss, logits = check_torch.loss_and_logits(model.to(dtype), prompt, **tensors)
    square, weights = torch.logsumexp(logits, -1) ** 2, tensors["weights"]
    loss = loss + z_loss * (square * weights).sum() / weights.sum()
    loss.backward()
    return loss.item(), logits.detach().numpy(), prompt.grad.numpy()


def to_float32(arguments):
    """Convert the float64 arrays of some arguments to float32."""
    return tree.refill(
        arguments,
        (x.astype(np.float32) if getattr(x, "dtype", None) == np.float64 else x for _, x in tree.leaves(arguments)),
    )


@examples(200)
@given(problem=problems)
@example(problem=LARGE)
def test_logits_loss_and_prompt_gradient_equal_transformers(problem):
    raw, config, flat, data, prompt = problem.draw()
    arguments = {PROMPT: prompt}, tree.nest(flat), config, data
    wanted_loss, wanted_logits, wanted = in_torch(hugging_face(raw, flat), prompt, data, problem.z_loss)
    loss, gradient = train.loss_and_grads(*arguments, z_loss=problem.z_loss)
    assert distance(ledger.logits(*arguments), wanted_logits) < EXACT
    assert distance(loss, wanted_loss) < EXACT
    assert distance(gradient[PROMPT], wanted) < EXACT


@examples(60)
@given(problem=problems.map(lambda p: p._replace(own_prompts=False, fractions=False)))
def test_prompt_tuning_equals_peft(problem):
    raw, config, flat, data, prompt = problem.draw()
    settings = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=problem.length, num_transformer_submodules=1
    )
    model = peft.get_peft_model(hugging_face(raw, flat), settings).double()
    learned = model.prompt_encoder["default"].embedding.weight
    learned.data.copy_(torch.from_numpy(prompt))
    labels = np.where(data.weights > 0, data.labels, -100)
    ids, mask, labels = (torch.from_numpy(x.copy()) for x in (data.input_ids, data.attention_mask, labels))
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    arguments = {PROMPT: prompt}, tree.nest(flat), config, data
    loss, gradient = train.loss_and_grads(*arguments)
    assert distance(loss, out.loss.item()) < EXACT
    assert distance(ledger.logits(*arguments), out.logits.detach().numpy()) < EXACT
    assert distance(gradient[PROMPT], learned.grad.numpy()) < EXACT


@examples(200)
@given(problem=problems)
def test_gradients_of_all_weights_equal_torch(problem):
    raw, config, flat, data, prompt = problem.draw()
    model = hugging_face(raw, flat)
    in_torch(model, prompt, data, problem.z_loss)
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    _, gradient = train.loss_and_grads(flat | {PROMPT: prompt}, {}, config, data, z_loss=problem.z_loss)
    for name in flat:
        assert (name, distance(gradient[name], theirs[name].numpy()) < EXACT) == (name, True)


@examples(50)
@given(problem=problems.map(lambda p: p._replace(gated=True)))  # a relu has no slope at 0
def test_gradients_equal_finite_differences(problem):
    _, config, flat, data, prompt = problem.draw()
    delta = flat | {PROMPT: prompt}
    _, gradient = train.loss_and_grads(delta, {}, config, data)
    for name in (PROMPT, sorted(flat)[problem.seed % len(flat)]):

        def loss(x, name=name):
            return float(train.loss(delta | {name: x}, {}, config, data))

        # A tiny gradient is dominated by rounding: allow 1e-6 of it, or 1e-10 of the largest gradient.
        floor = 1e-4 * max(np.linalg.norm(g) for g in gradient.values()) / (np.linalg.norm(gradient[name]) or 1.0)
        error = finite_differences(loss, delta[name], gradient[name], problem.seed)
        assert (name, error <= 1e-6 * max(1, floor)) == (name, True)


@pytest.mark.skipif(default_device() == "numpy", reason="needs ONNX Runtime: pip install '.[ort]'")
@examples(50)
@given(problem=problems)
def test_lowered_graphs_equal_numpy(problem):
    _, config, flat, data, prompt = problem.draw()
    arguments = {PROMPT: prompt}, tree.nest(flat), config, data
    arguments = *arguments, t5.unchanged, problem.z_loss
    loss, gradient = train.loss_and_grads(*arguments)
    found, found_gradient = compile(train.loss_and_grads, "cpu")(*arguments)
    assert distance(found, loss) < EXACT
    assert distance(found_gradient[PROMPT], gradient[PROMPT]) < EXACT
    assert distance(compile(ledger.logits, "cpu")(*arguments[:4]), ledger.logits(*arguments[:4])) < EXACT


@pytest.mark.parametrize("device", DEVICES)
@examples(8)
@given(problem=problems)
def test_float32_is_as_accurate_as_torch(problem, device):
    """Compare means of twelve batches: rounding errors vary by factors from batch to batch, also in torch."""
    compute = compile(train.loss_and_grads, device)
    raw, config, flat, *_ = problem.draw()
    model, params, narrow = hugging_face(raw, flat), tree.nest(flat), to_float32(tree.nest(flat))
    ours, theirs = [], []
    for seed in range(problem.seed, problem.seed + 12):
        *_, data, prompt = problem._replace(seed=seed).draw()
        loss, gradient = train.loss_and_grads({PROMPT: prompt}, params, config, data)
        delta, small = to_float32(({PROMPT: prompt}, data))
        found, found_gradient = compute(delta, narrow, config, small)
        assert found_gradient[PROMPT].dtype == np.float32
        ours.append((distance(found, loss), distance(found_gradient[PROMPT], gradient[PROMPT])))
        found, _, found_gradient = in_torch(model, prompt, data, dtype=torch.float32)
        theirs.append((distance(found, loss), distance(found_gradient, gradient[PROMPT])))
    for mine, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        assert typical(mine) <= TIMES * typical(other) + UNIT


@pytest.mark.parametrize("row", [0, 2])
def test_a_row_without_a_token_is_refused(row):
    _, config, flat, data, prompt = LARGE.draw()
    data.attention_mask[row] = 0
    with pytest.raises(ValueError, match=f"row {row}.*attention_mask"):
        train.loss({PROMPT: prompt}, tree.nest(flat), config, data)
