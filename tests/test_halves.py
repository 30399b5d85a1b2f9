"""The pass that keeps bfloat16 between two products.

ONNX Runtime's CPU kernels do not support bfloat16. The tests therefore run a float32 copy of the graph that rounds
every 16-bit array after the node that computes it.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from profiles import examples
from random_models import FAMILIES, batch, random_weights, raw_config

from tinyprompt import t5, train
from tinyprompt.data import Batch
from tinyprompt.files.config import parse_config
from tinyprompt.lowering import lower
from tinyprompt.tree import flatten, nest

ort = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install '.[ort]'")
onnx = pytest.importorskip("onnx")
PROMPT, HALF, FLOAT = "encoder.prompt.embedding", onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT


def rounded_model(graph):
    """Convert a bf16 graph to a float32 model that rounds each 16-bit array to bfloat16 and widens it again."""
    proto, halves = graph.to_onnx(), {x.name for x in (*graph.nodes, *graph.all_inputs()) if x.dtype == bfloat16}
    for x in proto.graph.input:
        x.type.tensor_type.elem_type = FLOAT if x.name in halves else x.type.tensor_type.elem_type
    for x in proto.graph.initializer:
        if x.data_type == HALF:
            x.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(x).astype(np.float32), x.name))
    del proto.graph.value_info[:]
    old = list(proto.graph.node)
    del proto.graph.node[:]
    for node in old:
        (name,) = node.output
        if name in halves:
            for attribute in node.attribute:
                if node.op_type == "Cast":
                    attribute.i = FLOAT
            node.output[0] = f"{name}.exact"
        proto.graph.node.append(node)
        if name in halves:
            proto.graph.node.append(onnx.helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], to=HALF))
            proto.graph.node.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=FLOAT))
    return proto


def run_rounded(graph, arrays):
    """Run a bf16 graph; return its outputs, given all arrays by name."""
    given = {x.name: arrays[x.name] for x in graph.inputs}
    for (source, recipe), parts in graph.derived.items():
        given |= {x.name: y for x, y in zip(parts, recipe(arrays[source]), strict=True)}
    given = {name: x.astype(np.float32) if x.dtype == bfloat16 else x for name, x in given.items()}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # keep the rounding
    model = rounded_model(graph).SerializeToString()
    return ort.InferenceSession(model, options, ["CPUExecutionProvider"]).run(None, given)


def problem(family, seed=0, **changes):
    config = parse_config(raw_config(family, **changes))
    params = nest({name: value.astype(np.float32) for name, value in random_weights(config, seed).items()})
    for value in flatten(params).values():
        value.flags.writeable = False
    ids, mask, labels, weights = batch(seed, config.vocab_size, 3, 40, 4)
    prompt = np.random.default_rng(seed).normal(size=(5, config.d_model)).astype(np.float32)
    return prompt, params, config, Batch(ids, mask, labels, weights.astype(np.float32))


@examples(5)
@given(family=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 999))
def test_loss_and_gradient_are_close_to_float32(family, seed):
    prompt, params, config, rows = problem(family, seed)
    wanted, exact = train.loss_and_grads({PROMPT: prompt}, params, config, rows)
    graph, _ = lower(train.loss_and_grads, {PROMPT: prompt}, params, config, rows, bf16=True)
    inputs = dict(zip((f"batch.{name}" for name in rows._fields), rows, strict=True))
    loss, found = run_rounded(graph, flatten(params) | inputs | {PROMPT: prompt})
    exact = exact[PROMPT]
    assert abs(loss - wanted) < 0.02 * abs(wanted)
    cosine = (found * exact).sum() / np.linalg.norm(found) / np.linalg.norm(exact)
    assert cosine > 0.99
    assert np.linalg.norm(found - exact) < 0.15 * np.linalg.norm(exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_arrays_are_in_16_bits_and_the_loss_is_not(family):
    prompt, params, config, rows = problem(family, d_ff=48)
    graph, _ = lower(train.loss_and_grads, {PROMPT: prompt}, params, config, rows, bf16=True)
    hidden = [x for x in graph.nodes if x.shape[-1:] == (48,)]
    scores = [x for x in graph.nodes if x.shape == (3, 3, 45, 45) and x.op != "Cast"]
    logits = [x for x in graph.nodes if x.shape[-1:] == (61,) and x.op in ("Sub", "Exp", "ReduceMax")]
    assert {str(x.dtype) for x in hidden if x.op in ("Mul", "Gelu")} <= {"bfloat16"}
    assert "bfloat16" in {str(x.dtype) for x in scores if x.op == "Softmax"}
    assert {str(x.dtype) for x in logits} == {"float32"}
    assert {str(x.dtype) for x in graph.outputs} == {"float32"}
    for x in graph.nodes:  # the pass adds no cast that another cast undoes
        assert not (x.op == "Cast" and x.inputs[0].op == "Cast" and x.inputs[0].inputs[0].dtype == x.dtype == bfloat16)


def test_arrays_read_in_float32_stay_in_float32():
    x, w = np.ones((6, 6), np.float32), np.ones((6, 6), np.float32)
    kinds = lambda f: [(node.op, str(node.dtype)) for node in lower(f, x, w, bf16=True)[0].nodes]
    assert ("Mul", "bfloat16") in kinds(lambda x, w: ((x @ w) * 2) @ w)
    assert ("Mul", "float32") in kinds(lambda x, w: (x @ w) * 2)  # an output
    assert ("Mul", "float32") in kinds(lambda x, w: np.exp((x @ w) * 2) @ w)
    assert ("Mul", "float32") in kinds(lambda x, w: (x * 2) @ w)  # its operand is not a product
    both = kinds(lambda x, w: (y := (x @ w) * 2) @ w + np.exp(y))
    assert ("Mul", "float32") in both
    assert lower(lambda x, w: ((x @ w) * 2) @ w, x, w)[0].nodes[0].dtype == np.float32  # without bf16


def test_outputs_may_be_arguments_or_constants():
    x = np.ones((2, 2), np.float32)
    graph, result = lower(lambda x: (x, np.ones(2, np.float32), x @ x, 3), x, bf16=True)
    assert [str(y.dtype) for y in graph.outputs] == ["float32"] * 3
    assert result[3] == 3


def test_encoder_states_are_close_to_float32():
    prompt, params, config, rows = problem("t5-1.1")
    params = nest(flatten(params) | {PROMPT: prompt})
    for value in flatten(params).values():
        value.flags.writeable = False
    wanted, _ = t5.encode(params, config, rows.input_ids, rows.attention_mask)
    graph, _ = lower(t5.encode, params, config, rows.input_ids, rows.attention_mask, bf16=True)
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
    found, _ = run_rounded(graph, flatten(params) | inputs)
    assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)
