"""Planted faults, each of which the test beside it must catch.

    python tests/mutants.py            # all faults, two at a time: "89 of 89 caught"
    python tests/mutants.py softmax    # faults whose description contains the word
    python tests/mutants.py --random 40 7   # 40 small mutations of the core, drawn with seed 7: how many are caught?

A fault replaces a piece of text that occurs once in a module, in a copy of the package. The exit status is 1 if a fault
is not caught, or if a drawn mutation is neither caught nor listed in EQUIVALENT.
"""

import ast
import copy
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PARITY = "test_parity.py::test_logits_loss_and_prompt_gradient_equal_transformers"
WEIGHTS = "test_parity.py::test_gradients_of_all_weights_equal_torch"
FLOAT32 = "test_t5.py::test_float32_stays_float32"
OPS = "test_ops.py::test_value_and_vjp_equal_torch"
METHODS = "test_methods.py::test_gradient_equals_torch"
CACHE = "test_decode.py::test_logits_with_a_cache_equal_those_without"
LOWERED = "test_parity.py::test_lowered_graphs_equal_numpy"


class Mutant(NamedTuple):
    """A fault, and the test that must fail on it."""

    fault: str
    module: str
    right: str
    wrong: str
    test: str


MUTANTS = [
    Mutant(
        "the page shows the attention to the end of the text in place of the prompt",
        "export/page",
        "[:, text, : len(prompt)]",
        "[:, text, -len(prompt) :]",
        "test_web.py::test_the_graph_of_the_views_equals_numpy",
    ),
    Mutant(
        "the page shows products in place of cosines",
        "export/page",
        "ops.linear(prompt / length(prompt), table)",
        "ops.linear(prompt, table)",
        "test_web.py::test_the_graph_of_the_views_equals_numpy",
    ),
    Mutant(
        "the weights of another model stay in a session of 8 bits",
        "device/sessions",
        "key = tuple(map(id, sources))",
        "key = ()",
        "test_device.py::test_int8_decoding_uses_the_given_weights",
    ),
    Mutant(
        "a boxed constant beside a traced array is unboxed",
        "lowering/calls",
        "return TracedBox(graph.array(value._value), value._trace, value._node)",
        "return graph.array(value._value)",
        "test_gradients.py::test_boxes_around_constants_meet_traced_arrays",
    ),
    Mutant(
        "an array of Python objects becomes a constant",
        "lowering/calls",
        "if value.dtype == object:",
        "if False:",
        "test_gradients.py::test_an_array_of_python_objects_never_becomes_a_constant",
    ),
    Mutant(
        "a subclass of arrays is taken for an array",
        "lowering/calls",
        "if type(value) not in (np.ndarray, np.memmap):",
        "if False:",
        "test_frozen.py::test_subclasses_of_arrays_are_refused_as_arguments",
    ),
    Mutant(
        "a gradient by steps keeps the first part of a list alone",
        "lowering/calls",
        "[vjp(g[i]) for i, vjp in enumerate(vjps)]",
        "[vjp(g[i]) for i, vjp in enumerate(vjps)][:1]",
        "test_gradients.py::test_a_listed_function_is_right_or_refused[split]",
    ),
    Mutant(
        "the gradient of where is not summed over broadcasting",
        "lowering/gradients",
        "return lambda g: summed_to(np.where(condition, *choose(g)), (x, y)[argnum - 1])",
        "return lambda g: np.where(condition, *choose(g))",
        "test_gradients.py::test_a_listed_function_is_right_or_refused[where]",
    ),
    Mutant(
        "autograd stays patched after a trace",
        "lowering/gradients",
        "numpy_wrapper._np = own\n",
        "pass\n",
        "test_gradients.py::test_importing_and_lowering_do_not_change_autograd",
    ),
    Mutant(
        "a thawed weight keeps its checksum",
        "lowering/trace",
        "if is_sealed(array):\n        return None",
        "if True:\n        return None",
        "test_frozen.py::test_a_changed_weight_is_quantised_again",
    ),
    Mutant(
        "equal arguments share a graph",
        "lowering/trace",
        "return type(value), repr(value), value if value == value else None",
        "return value if value == value else None",
        "test_frozen.py::test_equal_arguments_of_different_types_have_two_graphs",
    ),
    Mutant(
        "a session is read again after another thread may have closed it",
        "device/sessions",
        "session, names, result = entry\n        found",
        "session, names, result = sessions[key]\n        found",
        "test_frozen.py::test_a_session_that_another_thread_closes_is_still_used",
    ),
    Mutant(
        "a large constant stays in a graph for a provider that computes wrongly with it",
        "lowering/graph",
        'if c.size > 3 and c.dtype.kind == "f"]',
        'if c.size > 3 and c.dtype.kind == "c"]',
        "test_device.py::test_large_constants_are_inputs_if_a_provider_needs_it",
    ),
    Mutant(
        "an array that stays on a device is overwritten while something else reads it",
        "lowering/graph",
        "read[place] == 1",
        "read[place] >= 1",
        "test_device.py::test_a_kept_array_is_overwritten_only_if_nothing_else_reads_it",
    ),
    Mutant(
        "an input that nothing reads is given to a session",
        "lowering/graph",
        "self.inputs = [x for x in self.inputs if x.name in read]",
        "self.inputs = [x for x in self.inputs if x.name]",
        "test_device.py::test_an_unused_input_is_not_passed",
    ),
    Mutant(
        "integers of 64 bits are computed in 32",
        "device/sessions",
        "> LARGEST",
        "> 2 * LARGEST",
        "test_device.py::test_64_bit_numbers_are_refused_on_a_32_bit_provider",
    ),
    Mutant(
        "check accepts a function without a gradient",
        "check/ledger",
        'if all(f.engine == "value" for f in findings):',
        "if False:",
        "test_check.py::test_a_primitive_without_a_rule_fails",
    ),
    Mutant(
        "check accepts finite differences of NaN",
        "check/ledger",
        'default=float("nan")',
        "default=0.0",
        "test_check.py::test_a_value_that_is_not_finite_fails",
    ),
    Mutant(
        "padding is attended to",
        "t5",
        "return ((1 - mask.astype(dtype)) * onp.asarray(MASKED, dtype))",
        "return ((1 - mask.astype(dtype)) * onp.asarray(0, dtype))",
        PARITY,
    ),
    Mutant(
        "the decoder sees the tokens after",
        "t5",
        "onp.kron(onp.eye(sequences), onp.tri(length))",
        "onp.kron(onp.eye(sequences), onp.tri(length, k=1))",
        PARITY,
    ),
    Mutant(
        "the prompt is masked like padding",
        "t5",
        "onp.ones(rows[:2], mask.dtype)",
        "onp.zeros(rows[:2], mask.dtype)",
        PARITY,
    ),
    Mutant(
        "a wrong bucket for keys on the right",
        "t5",
        "bucket += (distance > 0) * num_buckets",
        "bucket += (distance >= 0) * num_buckets",
        "test_t5.py::test_buckets_equal_transformers_at_every_distance",
    ),
    Mutant(
        "the logarithm of a bucket is computed in float64",
        "t5",
        "onp.maximum(distance, 1).astype(onp.float32) / onp.float32(exact)",
        "onp.maximum(distance, 1).astype(onp.float64) / onp.float64(exact)",
        "test_t5.py::test_buckets_equal_transformers_at_every_distance",
    ),
    Mutant(
        "the decoder's bias looks both ways",
        "t5",
        "bidirectional,\n                config.relative_attention_num_buckets",
        "True,\n                config.relative_attention_num_buckets",
        PARITY,
    ),
    Mutant(
        "the tied head's logits are not scaled",
        "t5",
        "x = x * onp.asarray(config.d_model**-0.5, x.dtype)",
        "x = x * onp.asarray(1, x.dtype)",
        PARITY,
    ),
    Mutant(
        "scores are divided by sqrt(d_kv), as in other transformers",
        "t5",
        'queries_BHTK = heads(ops.linear(x, q["weight"]), config)',
        'queries_BHTK = heads(ops.linear(x, q["weight"]), config) / config.d_kv**0.5',
        PARITY,
    ),
    Mutant(
        "gate and value of the feed-forward swapped",
        "t5",
        'ops.geglu(ops.linear(x, wi_0["weight"]), ops.linear(x, wi_1["weight"]))',
        'ops.geglu(ops.linear(x, wi_1["weight"]), ops.linear(x, wi_0["weight"]))',
        PARITY,
    ),
    Mutant(
        "a residual connection left out",
        "t5",
        '            x = see("hidden_states", x + see("output", y))\n',
        '            x = see("hidden_states", (x if "EncDecAttention" not in layer else 0) + see("output", y))\n',
        PARITY,
    ),
    Mutant(
        "the prompt follows the input",
        "t5",
        "np.concatenate([ops.broadcast_to(prompt, rows), x], axis=1)",
        "np.concatenate([x, ops.broadcast_to(prompt, rows)], axis=1)",
        PARITY,
    ),
    Mutant(
        "every row gets the prompt of the first row",
        "t5",
        'prompt = weights["prompt"]["embedding"]',
        'prompt = weights["prompt"]["embedding"]\n        prompt = prompt[0] if prompt.ndim == 3 else prompt',
        "test_t5.py::test_each_row_of_a_batch_may_have_its_own_prompt",
    ),
    Mutant(
        "the cross-attention's gradient forgotten",
        "t5",
        "    states, mask = encode(params, config, input_ids, attention_mask, visit)\n    return decode",
        "    states, mask = encode(params, config, input_ids, attention_mask, visit)\n"
        '    states = getattr(states, "_value", states)\n    return decode',
        PARITY,
    ),
    Mutant(
        "a wrong transpose in linear's gradient by its weight",
        "ops",
        "lambda ans, x, weight: lambda g: g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1]),",
        "lambda ans, x, weight: lambda g: (x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1]))"
        ".reshape(weight.shape),",
        WEIGHTS,
    ),
    Mutant(
        "headwise's gradient without its transpose",
        "ops",
        "lambda ans, x, weight: lambda g: np.transpose(x, (0, 2, 1)) @ g,",
        "lambda ans, x, weight: lambda g: (np.transpose(g, (0, 2, 1)) @ x).reshape(weight.shape),",
        OPS,
    ),
    Mutant(
        "softmax's gradient without the sum along it",
        "ops",
        'lambda g: y * (g - np.einsum("...i,...i->...", g, y)[..., None]))',
        "lambda g: y * g)",
        OPS,
    ),
    Mutant(
        "rms_norm's gradient as if the rms were fixed",
        "ops",
        "return r * (g - x * (r * r * along))",
        "return r * g",
        OPS,
    ),
    Mutant(
        "rms_norm without its epsilon in the gradient",
        "ops",
        "    r = _inverse_rms(x, eps)\n",
        "    r = _inverse_rms(x, 0 * eps)\n",
        OPS,
    ),
    Mutant("relu's slope at negative inputs", "ops", "lambda g: g * (x > 0))", "lambda g: g * (x > -1))", OPS),
    Mutant("a constant of gelu", "ops", "_K = _C * 0.044715", "_K = _C * 0.0447", OPS),
    Mutant(
        "geglu's two gradients swapped",
        "ops",
        "(g * args[1] * slope, g * value)[i]",
        "(g * value, g * args[1] * slope)[i]",
        OPS,
    ),
    Mutant(
        "the gradient of a repeated id is written over",
        "ops",
        "np.add.at(out, ids, g)",
        "out[ids] = g",
        "test_ops.py::test_embedding_adds_the_gradients_of_repeated_ids",
    ),
    Mutant(
        "the broadcast prompt's gradient is that of one row",
        "ops",
        "g.sum(axis=(*range(new), *repeated)).reshape(x.shape)",
        "(g[0] if new else g.sum(axis=repeated)).reshape(x.shape)",
        PARITY,
    ),
    Mutant(
        "the loss is a sum, not a mean",
        "ops",
        "return ((nll + z_loss * log_z * log_z) * weights).sum() / weights.sum()",
        "return ((nll + z_loss * log_z * log_z) * weights).sum()",
        "test_ops.py::test_cross_entropy_with_z_loss_equals_torch",
    ),
    Mutant(
        "the z-loss is not differentiated",
        "ops",
        "(scale * (1 + 2 * z_loss * log_z))[..., None]",
        "(scale * (1 + 0 * z_loss * log_z))[..., None]",
        "test_ops.py::test_cross_entropy_with_z_loss_equals_torch",
    ),
    Mutant(
        "padding of the labels counts",
        "ops",
        "scale = (g * weights / weights.sum()).astype",
        "scale = (g * np.ones_like(weights) / weights.sum()).astype",
        "test_ops.py::test_cross_entropy_with_z_loss_equals_torch",
    ),
    Mutant(
        "float64 leaks from rms_norm",
        "ops",
        "return (1 / np.sqrt(mean_square + eps)).astype(x.dtype, copy=False)",
        "return 1 / np.sqrt(mean_square.astype(np.float64) + eps)",
        OPS,
    ),
    Mutant(
        "float64 leaks from the mask",
        "t5",
        "(1 - mask.astype(dtype)) * onp.asarray(MASKED, dtype)",
        "(1 - mask.astype(onp.float64)) * onp.float64(MASKED)",
        FLOAT32,
    ),
    Mutant(
        "labels are not shifted",
        "t5",
        "onp.concatenate([onp.full_like(labels[..., :1], PAD), labels[..., :-1]], axis=-1)",
        "labels + 0",
        PARITY,
    ),
    Mutant(
        "the lowered softmax along another axis",
        "lowering/primitives",
        'ops.softmax: same_shape("Softmax", axis=-1)',
        'ops.softmax: same_shape("Softmax", axis=-2)',
        LOWERED,
    ),
    Mutant(
        "the low-rank product is subtracted",
        "methods",
        'ops.widen(frozen[weight]) + added[name[:-1] + "b"] @ value',
        'ops.widen(frozen[weight]) - added[name[:-1] + "b"] @ value',
        f"{METHODS}[lora]",
    ),
    Mutant(
        "an adapter without its residual",
        "t5",
        'return y + ops.linear(hidden, up["weight"])',
        'return ops.linear(hidden, up["weight"])',
        f"{METHODS}[adapter]",
    ),
    Mutant(
        "p-tuning's network with tanh",
        "methods",
        '"prompt_network.": (prompt, ops.relu)',
        '"prompt_network.": (prompt, np.tanh)',
        f"{METHODS}[p-tuning]",
    ),
    Mutant(
        "a prefix at the positions of the first tokens",
        "t5",
        "onp.concatenate([onp.arange(first, 0), positions])",
        "onp.concatenate([onp.arange(-first), positions])",
        f"{METHODS}[prefix]",
    ),
    Mutant(
        "the newest token does not see itself",
        "t5",
        "ops.put(kv_cache[name], at, y)",
        "ops.put(kv_cache[name], at, 0 * y)",
        CACHE,
    ),
    Mutant(
        "beams keep the cache of other beams",
        "decode",
        "keys if origin is None else np.take(keys, origin, 0)",
        "keys",
        CACHE,
    ),
    Mutant(
        "the end of a text is not counted in its length",
        "decode",
        "candidate_scores / length**length_penalty",
        "candidate_scores / max(1, length - 1) ** length_penalty",
        "test_decode.py::test_numpy_writes_the_texts_of_transformers",
    ),
    Mutant(
        "a search ignores the length penalty when it stops",
        "decode",
        "unfinished &= scores[:, 0] / length**length_penalty > best[:, -1]",
        "unfinished &= scores[:, 0] > best[:, -1]",
        "test_decode.py::test_beam_search_ends_where_transformers_ends",
    ),
    Mutant(
        "a search stops by the length penalty's inverse",
        "decode",
        "unfinished &= scores[:, 0] / length**length_penalty > best[:, -1]",
        "unfinished &= scores[:, 0] * length**length_penalty > best[:, -1]",
        "test_decode.py::test_beam_search_ends_where_transformers_ends",
    ),
    Mutant(
        "a search stops by the length of the next step",
        "decode",
        "unfinished &= scores[:, 0] / length**length_penalty > best[:, -1]",
        "unfinished &= scores[:, 0] / (length + 1) ** length_penalty > best[:, -1]",
        "test_decode.py::test_beam_search_ends_where_transformers_ends",
    ),
    Mutant(
        "a search stops by the largest possible length",
        "decode",
        "unfinished &= scores[:, 0] / length**length_penalty > best[:, -1]",
        "unfinished &= scores[:, 0] / max_tokens**length_penalty > best[:, -1]",
        "test_decode.py::test_beam_search_ends_where_transformers_ends",
    ),
    Mutant(
        "a search stops at its best finished text",
        "decode",
        "unfinished &= scores[:, 0] / length**length_penalty > best[:, -1]",
        "unfinished &= scores[:, 0] / length**length_penalty > best[:, 0]",
        "test_decode.py::test_beam_search_ends_where_transformers_ends",
    ),
    Mutant(
        "a search continues from the worst running text",
        "decode",
        "unfinished &= scores[:, 0] / length**length_penalty > best[:, -1]",
        "unfinished &= scores[:, -1] / length**length_penalty > best[:, -1]",
        "test_decode.py::test_beam_search_ends_where_transformers_ends",
    ),
    Mutant(
        "a search takes more after its end",
        "decode",
        "unfinished &= scores[:, 0] / length**length_penalty > best[:, -1]",
        "unfinished |= False",
        "test_decode.py::test_beam_search_ends_where_transformers_ends",
    ),
    Mutant(
        "the length penalty is ignored in rank classification",
        "predict",
        "/ lengths ** (self.settings.length_penalty or 0.0)",
        "/ lengths ** 0.0",
        "test_details.py::test_rank_classification_divides_by_a_power_of_the_length",
    ),
    Mutant(
        "patience starts a dev score early",
        "train",
        "state.step - state.best_step >= settings.patience",
        "state.step + 1 - state.best_step >= settings.patience",
        "test_details.py::test_patience_counts_dev_scores_since_the_best",
    ),
    Mutant(
        "F1 of a label counts the errors of all labels",
        "tasks/metrics",
        "np.sum(given) + np.sum(right))",
        "2 * np.sum(given & right) + np.sum(p != w))",
        "test_metrics.py::test_macro_f1_averages_the_labels",
    ),
    Mutant(
        "the mean over tasks is a mean over metrics",
        "tasks/registry",
        "float(np.mean([one.mean for one in parts.values()]))",
        "float(np.mean(list(found.values())))",
        "test_tasks.py::test_a_mixture_is_scored_task_by_task",
    ),
    Mutant(
        "lora on queries and keys",
        "methods",
        'for part in ("q", "v"):',
        'for part in ("q", "k"):',
        "test_details.py::test_lora_is_on_queries_and_values",
    ),
    Mutant(
        "BitFit without the position biases",
        "methods",
        'if "layer_norm." in name or "relative_attention_bias" in name:',
        'if "layer_norm." in name:',
        "test_details.py::test_bitfit_trains_every_vector_and_every_position_bias",
    ),
    Mutant(
        "the z-loss is ignored in training",
        "train",
        "next(batches), drop, settings.z_loss)",
        "next(batches), drop, 0.0)",
        "test_details.py::test_the_z_loss_is_part_of_the_training_loss",
    ),
    Mutant(
        "the seed of dropout is ignored",
        "train",
        "t5.dropout(settings.dropout, settings.seed, step)",
        "t5.dropout(settings.dropout, 0, step)",
        "test_details.py::test_dropout_follows_the_seed",
    ),
    Mutant(
        "the schedule is a step ahead",
        "train",
        "learning_rate(step - 1)",
        "learning_rate(step)",
        "test_details.py::test_the_learning_rate_follows_the_step",
    ),
    Mutant(
        "rows are not shuffled",
        "data",
        "waiting += rng.permutation(len(rows)).tolist()",
        "waiting += list(range(len(rows)))",
        "test_details.py::test_rows_are_shuffled_differently_in_each_epoch",
    ),
    Mutant(
        "parallel sequences see each other",
        "t5",
        "onp.kron(onp.eye(sequences), onp.tri(length))",
        "onp.kron(onp.tri(sequences), onp.tri(length))",
        "test_predict.py::test_parallel_sequences_do_not_see_each_other",
    ),
    Mutant(
        "parallel sequences get consecutive positions",
        "t5",
        "positions = onp.arange(x.shape[1]) % shape[-1]",
        "positions = onp.arange(x.shape[1])",
        "test_predict.py::test_parallel_sequences_do_not_see_each_other",
    ),
    Mutant(
        "a row of a mixed batch has the vectors of the first row",
        "predict",
        "= rows[i].task.vectors",
        "= rows[chosen[0]].task.vectors[: rows[i].task.length]",
        "test_predict.py::test_rows_with_five_prompts_equal_single_rows_in_float64",
    ),
    Mutant(
        "the padding of a label is scored",
        "decode",
        "(later * weights[..., 1:]).sum(-1)",
        "later.sum(-1)",
        "test_predict.py::test_rank_ignores_padding_of_a_label",
    ),
    Mutant(
        "the first token of a label is scored after a wrong token",
        "decode",
        "logits_of(states[:, 0, 0])",
        "logits_of(states[:, 0, -1])",
        "test_decode.py::test_rank_sums_the_log_probabilities",
    ),
    Mutant(
        "a tie of an ensemble goes to the first prompt",
        "ensemble",
        "(votes[text], means.get(text, 0.0))",
        "votes[text]",
        "test_ensemble.py::test_a_tie_goes_to_the_higher_mean_score",
    ),
    Mutant(
        "a CUDA graph reads the inputs that it was recorded with",
        "device/sessions",
        "                fill(value, x)\n",
        "                pass\n",
        "test_device.py::test_a_recorded_run_reads_its_current_inputs",
    ),
    Mutant(
        "bf16 rounds arrays that are also read in float32",
        "lowering/halves",
        "and not all(u.name in found",
        "and not any(u.name in found",
        "test_halves.py::test_arrays_read_in_float32_stay_in_float32",
    ),
    Mutant(
        "decoding with a cache sees padding",
        "decode",
        "states_bias=t5.additive(mask, x.dtype), **weights)\n    new",
        "states_bias=t5.additive(mask * 0 + 1, x.dtype), **weights)\n    new",
        "test_details.py::test_the_next_token_ignores_padding_of_the_input",
    ),
    Mutant(
        "Adafactor without its epsilon",
        "optim",
        "square = g * g + epsilon",
        "square = g * g",
        "test_details.py::test_adafactor_clips_at_a_root_mean_square_of_1_and_has_an_epsilon",
    ),
    Mutant(
        "Adafactor clips at 2",
        "optim",
        "clipping_threshold: float = 1.0",
        "clipping_threshold: float = 2.0",
        "test_details.py::test_adafactor_clips_at_a_root_mean_square_of_1_and_has_an_epsilon",
    ),
    Mutant(
        "SQuAD keeps the article a",
        "tasks/metrics",
        'r"\\b(a|an|the)\\b"',
        'r"\\b(an|the)\\b"',
        "test_details.py::test_squad_ignores_all_three_articles",
    ),
    Mutant(
        "a fingerprint is compared in part",
        "fit",
        "weights != own_weights:",
        "weights[:12] != own_weights[:12]:",
        "test_details.py::test_every_digit_of_a_fingerprint_is_compared",
    ),
    Mutant(
        "bfloat16 is not widened",
        "ops",
        "if weight.dtype in (np.float16, bfloat16) else weight",
        "if weight.dtype == np.float16 else weight",
        "test_details.py::test_16_bit_arrays_are_widened",
    ),
    Mutant(
        "mT5's head may be tied",
        "files/config",
        'is not False and family != "mt5"',
        "is not False",
        "test_details.py::test_mt5_is_never_tied",
    ),
    Mutant(
        "attention for few queries has no dropout on its weights",
        "t5",
        'weights_BNL = visit("attention_weights", ops.softmax(scores_BHTL))',
        "weights_BNL = ops.softmax(scores_BHTL)",
        "test_details.py::test_dropout_applies_to_attention_weights_of_few_queries",
    ),
    Mutant(
        "ties go to the earlier step",
        "train",
        "(score, -dev_loss) >= self.best_score",
        "(score, -dev_loss) > self.best_score",
        "test_train.py::test_ties_go_to_the_lower_loss_and_then_to_the_later_step",
    ),
    Mutant(
        "ties ignore the loss",
        "train",
        "(score, -dev_loss) >= self.best_score",
        "score >= self.best_score[0]",
        "test_train.py::test_ties_go_to_the_lower_loss_and_then_to_the_later_step",
    ),
    Mutant(
        "patience ends a dev score late",
        "train",
        "state.step - state.best_step >= settings.patience",
        "state.step - state.best_step > settings.patience",
        "test_details.py::test_patience_counts_dev_scores_since_the_best",
    ),
    Mutant(
        "a study computes what another run has claimed",
        "study/cells",
        "stack.enter_context(io.claimed(path, wait))",
        "pass",
        "test_study.py::test_two_simultaneous_commands_share_the_cells",
    ),
    Mutant(
        "the key of a cell does not cover the rows",
        "study/grid",
        "self.shots, self.task.digest, self.fingerprint",
        "self.shots, self.fingerprint",
        "test_study.py::test_the_key_of_a_cell_covers_everything_that_affects_its_result",
    ),
    Mutant(
        "the spread is computed over all existing seeds",
        "study/summary",
        "statistics.stdev(",
        "statistics.pstdev(",
        "test_study.py::test_a_study_gives_the_results_of_single_runs",
    ),
    Mutant(
        "a short check misses far buckets",
        "check/ledger",
        "model.config.relative_attention_max_distance + 22",
        "model.config.relative_attention_max_distance - 22",
        "test_details.py::test_the_cases_of_a_check_reach_the_last_bucket",
    ),
    Mutant(
        "a batch does not wait for more rows",
        "serve/batcher",
        "max(left, 0))",
        "0)",
        "test_serve.py::test_a_row_waits_briefly_for_more_rows",
    ),
    Mutant(
        "a full batch keeps waiting",
        "serve/batcher",
        "len(self._queue) >= size or",
        "len(self._queue) > size or",
        "test_serve.py::test_a_row_waits_briefly_for_more_rows",
    ),
    Mutant(
        "the queue has no bound",
        "serve/batcher",
        "                    raise Full\n",
        "                    pass\n",
        "test_serve.py::test_the_queue_is_bounded_and_urgent_rows_come_first",
    ),
    Mutant(
        "urgent rows are answered in the wrong order",
        "serve/batcher",
        "extendleft(reversed(places))",
        "extendleft(places)",
        "test_serve.py::test_the_queue_is_bounded_and_urgent_rows_come_first",
    ),
    Mutant(
        "cancelled rows are computed",
        "serve/batcher",
        "batch += [] if place.future.done() else [place]",
        "batch += [place]",
        "test_serve.py::test_cancelled_rows_are_not_computed_and_take_no_room",
    ),
    Mutant(
        "a bad row fails the whole batch",
        "serve/batcher",
        "for place in batch if len(batch) > 1 else ():",
        "for place in ():",
        "test_serve.py::test_every_request_gets_its_own_results_in_order",
    ),
    Mutant(
        "a key may occur twice",
        "serve/app",
        "len(found) < len(pairs)",
        "len(found) < 0",
        "test_serve.py::test_invalid_requests_are_refused_with_a_reason",
    ),
    Mutant(
        "an unpaired surrogate is accepted",
        "serve/app",
        "check_text(text, f\"row {number}: 'input'\")",
        "pass",
        "test_serve.py::test_invalid_requests_are_refused_with_a_reason",
    ),
    Mutant(
        "prompts are not checked by a row",
        "serve/app",
        'self.batcher.submit([(self.prompts[name], "")], urgent=True).result()',
        "pass",
        "test_serve.py::test_a_prompt_that_cannot_answer_is_not_used",
    ),
    Mutant(
        "deleted prompts stay in use",
        "serve/app",
        "self.tasks.items() if name in self.prompts}",
        "self.tasks.items()}",
        "test_serve.py::test_prompts_are_reloaded_and_never_partially",
    ),
    Mutant(
        "health does not look at the weights",
        "serve/app",
        "self.model.check_files()",
        "pass",
        "test_serve.py::test_health_reports_changed_weights",
    ),
    Mutant(
        "a body in chunks is read",
        "serve/app",
        '"transfer-encoding" in headers',
        '"none" in headers',
        "test_serve.py::test_a_body_without_a_length_is_not_read",
    ),
    Mutant(
        "every host name is accepted",
        "serve/app",
        "if self.hosts and re.sub",
        "if not self.hosts and re.sub",
        "test_serve.py::test_only_this_machine_and_allowed_sites_may_ask",
    ),
    Mutant(
        "pages of other sites may ask",
        "serve/app",
        "foreign or host_of(origin) != host",
        "False",
        "test_serve.py::test_only_this_machine_and_allowed_sites_may_ask",
    ),
    Mutant(
        "the header Sec-Fetch-Site is ignored",
        "serve/app",
        '== "cross-site"',
        '== "none at all"',
        "test_serve.py::test_only_this_machine_and_allowed_sites_may_ask",
    ),
    Mutant(
        "paths are redirected",
        "serve/app",
        "redirect_slashes = False",
        "redirect_slashes = True",
        "test_serve.py::test_the_server_never_redirects",
    ),
    Mutant(
        "a compressed body is parsed",
        "serve/app",
        'if coding not in ("", "identity"):',
        "if False:",
        "test_serve.py::test_a_compressed_body_is_refused_and_any_content_type_is_accepted",
    ),
    Mutant(
        "NaN is JSON",
        "serve/app",
        ", parse_constant=no_json)",
        ")",
        "test_serve.py::test_invalid_requests_are_refused_with_a_reason",
    ),
    Mutant(
        "errors have unlimited length",
        "serve/app",
        "told if len(told) <= LONGEST",
        "told if told",
        "test_serve.py::test_an_error_of_the_model_is_one_sentence",
    ),
    Mutant(
        "all keys are listed",
        "serve/app",
        "itertools.islice(names, LISTED)",
        "names",
        "test_serve.py::test_invalid_requests_are_refused_with_a_reason",
    ),
    Mutant(
        "an empty text is answered",
        "serve/app",
        "if not text.strip():",
        "if not text and text:",
        "test_serve.py::test_invalid_requests_are_refused_with_a_reason",
    ),
    Mutant(
        "silent connections stay open",
        "serve/app",
        "self.loop.call_later(self.timeout_keep_alive, transport.abort)",
        "self.loop.call_later(99, transport.abort)",
        "test_serve.py::test_silent_connections_are_cut_off_soon",
    ),
    Mutant(
        "a client that closes its sending side is not answered",
        "serve/app",
        "return self.under_way and not self.cycle.more_body",
        "return False",
        "test_serve.py::test_a_client_that_closes_its_sending_side_is_answered",
    ),
    Mutant(
        "bad requests are logged",
        "serve/app",
        'log_level="error"',
        'log_level="warning"',
        "test_serve.py::test_bad_requests_are_not_logged",
    ),
    Mutant(
        "a deleted prompt keeps its counter",
        "serve/app",
        "self.metrics.forget(name)",
        "pass",
        "test_serve.py::test_a_deleted_prompt_leaves_no_counter",
    ),
    Mutant(
        "a late answer restores a counter",
        "serve/metrics",
        "if name in known:",
        "if name:",
        "test_serve.py::test_a_deleted_prompt_leaves_no_counter",
    ),
    Mutant(
        "the limit on open files is not raised",
        "serve/app",
        "soft != resource.RLIM_INFINITY and soft < needed",
        "False",
        "test_serve.py::test_the_limit_on_open_files_is_raised_or_refused",
    ),
    Mutant(
        "a prompt is read twice",
        "files/prompts",
        "tensors, about = read_tensors(path, content)",
        "(tensors, _), (_, about) = read_tensors(path), read_tensors(path)",
        "test_prompts.py::test_two_writers_never_produce_a_mixture",
    ),
    Mutant(
        "files of an adapter may have different versions",
        "files/prompts",
        "if found and state(folder) == before:",
        "if found:",
        "test_prompts.py::test_an_adapter_that_changes_during_reading_is_read_again",
    ),
    Mutant(
        "an unexpected error of an entry is not named",
        "files/prompts",
        'f"{path}: {type(error).__name__}: {error}"',
        "str(error)",
        "test_prompts.py::test_any_error_of_an_entry_is_limited_to_it",
    ),
    Mutant(
        "the time of the last change is not read",
        "files/io",
        ", about.st_mtime_ns, about.st_ctime_ns",
        ", about.st_mtime_ns, 0",
        "test_prompts.py::test_a_prompt_replaced_with_equal_size_and_time_is_read_again",
    ),
    Mutant(
        "a file that was just written is not read again",
        "files/prompts",
        "        time.sleep(pause)\n    return None",
        "        time.sleep(0)\n    return found",
        "test_prompts.py::test_a_recently_written_prompt_is_read_again",
    ),
    Mutant(
        "a late answer is not reported",
        "serve/app",
        "stage = HTTPException(504",
        "stage = HTTPException(408",
        "test_serve.py::test_a_full_queue_and_a_late_answer_are_reported",
    ),
    Mutant(
        "golden: the judge masks keys in place of queries",
        "golden/judge",
        "mask[:, None, :, None]",
        "mask[:, None, None, :]",
        "test_golden.py::test_padding_of_the_encoder_is_not_compared",
    ),
    Mutant(
        "golden: the judge sorts faults alphabetically",
        "golden/judge",
        'order = [one for one in index["order"][kind] if one in found]',
        'order = sorted(one for one in index["order"][kind] if one in found)',
        "test_golden.py::test_the_first_fault_in_the_order_of_computation_is_named",
    ),
    Mutant(
        "golden: ids after the end are compared",
        "golden/judge",
        "((exact != right) & (ended == 0)).mean()",
        "(exact != right).mean()",
        "test_golden.py::test_ids_after_the_end_of_a_text_are_not_compared",
    ),
    Mutant(
        "plain: a square weight is the right operand in both directions",
        "lowering/primitives",
        "(x.graph.plain and n_in == n_out)",
        "(x.graph.plain and n_in == n_out == 0)",
        "test_lowering.py::test_a_square_weight_of_a_plain_graph_is_never_transposed",
    ),
    Mutant(
        "plain: indices from the end are taken from the row before",
        "lowering/rules",
        "np.where(indices < 0, indices + n, indices) + begin",
        "indices + begin",
        "test_lowering.py::test_negative_indices_in_a_plain_graph",
    ),
    Mutant(
        "plain: the weights inside a graph stay in 16 bits",
        "export/graphs",
        "stored = {name: x.astype(np.float32, copy=False) for name, x in stored.items()}",
        "stored = dict(stored)",
        "test_export.py::test_plain_graphs_equal_numpy_in_other_runtimes",
    ),
    Mutant(
        "C: the length of an input is that of its padding",
        "export/embedded",
        "return [len(ids), *ids,",
        "return [length, *ids,",
        "test_embedded.py::test_rows_are_packed_in_the_documented_format",
    ),
]


# The libraries that the tests import load slowly. A server process imports them once, and each run is a fork of it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["pytest", "hypothesis.extra.numpy", "autograd", "onnx", "torch", "transformers.models.t5.modeling_t5", "peft"]
)
LIMIT = 600  # time limit of a run in seconds


def run_tests(folder: str, words: list[str]) -> None:
    """Run pytest in a folder, and end this process with its exit status. The output goes to the file `printed`."""
    os.setsid()
    os.chdir(folder)
    printed = os.open("printed", os.O_WRONLY | os.O_CREAT)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.environ["PYTHONPATH"] = folder
    sys.path.insert(0, folder)
    import pytest

    status = pytest.main(words)
    sys.stdout.flush()
    os._exit(status)


def fails(module: str, text: str, words: list[str]) -> tuple[int, str]:
    """Run tests on a copy of the package with a changed module; return pytest's exit status and output."""
    with tempfile.TemporaryDirectory() as made:
        copied, unused = Path(made), shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tinyprompt", copied / "tinyprompt", ignore=unused)
        shutil.copytree(ROOT / "tests", copied / "tests", ignore=unused)
        for name in ("weights", "docs", "lessons"):
            (copied / name).symlink_to(ROOT / name)
        for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
            shutil.copy(ROOT / name, copied)
        (copied / "tinyprompt" / f"{module}.py").write_text(text, encoding="utf-8")
        process = FORKS.Process(target=run_tests, args=(made, words))
        process.start()
        process.join(LIMIT)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return 1, "Failed: DID NOT end"
        return process.exitcode, (copied / "printed").read_text(encoding="utf-8", errors="replace")


def verdict(mutant: Mutant) -> str:
    """Plant a fault in a copy of the package and run its test; return "" if the test fails by an assertion."""
    path = ROOT / "tinyprompt" / f"{mutant.module}.py"
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.right) != 1:
        return f"{text.count(mutant.right)} times in {path.name}: {mutant.right!r}"
    words = ["-x", "--hypothesis-profile", "first", f"tests/{mutant.test}"]
    for _ in range(2):  # a busy machine can break a run
        status, printed = fails(mutant.module, text.replace(mutant.right, mutant.wrong), words)
        if status == 0:
            return "the test passes"
        # A fault must give wrong numbers; a crash proves nothing.
        if status == 1 and re.search("AssertionError|Failed: DID NOT", printed):
            return ""
    errors = "\n".join(re.findall("^E .*", printed, re.MULTILINE)[:20])
    return f"the test did not fail by an assertion:\n{errors or printed[-2000:]}"


# The tests that are run for a mutation of each module.
TESTS = {
    "ops": "test_ops test_parity",
    "t5": "test_t5 test_parity test_details test_decode test_predict test_methods",
    "methods": "test_methods test_details test_train",
    "optim": "test_optim test_details",
    "decode": "test_decode test_predict test_details test_train",
    "predict": "test_predict test_train test_details test_cli",
    "resume": "test_train test_cli",
    "tuning": "test_tuning test_train test_tasks",
    "ensemble": "test_ensemble",
    "device/providers": "test_device",
    "device/sessions": "test_device test_frozen",
    "device/values": "test_device test_frozen",
    "lowering/halves": "test_halves test_cuda_kernels",
    "train": "test_train test_details test_methods test_cli",
    "data": "test_data test_details test_tasks test_train",
    "fit": "test_methods test_prompts test_details",
    "files/config": "test_config test_models",
    "tasks/metrics": "test_metrics test_decode test_tasks test_details",
    "lowering/rules": "test_lowering test_parity test_device",
    "lowering/primitives": "test_lowering test_parity test_device",
}
# Drawn mutations that cannot be detected: module, line, old text, new text; and the reason.
EQUIVALENT: dict[tuple[str, str, str, str], str] = {
    (
        "t5",
        "return bucket + onp.where(distance < exact, distance, onp.minimum(far, num_buckets - 1))",
        "distance < exact",
        "distance <= exact",
    ): "the first far bucket is that of the distance",
    (
        "t5",
        "return T * (K + L) < K * L",
        "T * (K + L) < K * L",
        "T * (K + L) <= K * L",
    ): "two methods of equal cost are interchangeable",
    (
        "lowering/rules",
        "np.squeeze: lambda a, axis=None: reshape(a, np.squeeze(np.broadcast_to(False, a.shape), axis).shape),",
        "False",
        "True",
    ): "only its shape is asked for",
    (
        "lowering/rules",
        "np.expand_dims: lambda a, axis: reshape(a, np.expand_dims(np.broadcast_to(False, a.shape), axis).shape),",
        "False",
        "True",
    ): "only its shape is asked for",
    (
        "lowering/rules",
        "shape = np.broadcast_to(False, x.shape)[index].shape  # NumPy checks the bounds",
        "False",
        "True",
    ): "only its shape is asked for",
    (
        "lowering/rules",
        "kind = np.matmul.resolve_dtypes((a.dtype, b.dtype, None))[-1]",
        "-1",
        "0",
    ): "a product has the dtype in which its operands are multiplied",
    (
        "decode",
        "for length in range(1, max_tokens + 1):",
        "1",
        "2",
    ): "all texts end with max_tokens, so the search ends too",
    ("lowering/rules", "limits.append((0, 0, axis, 1))", "0", "1"): "the range from 1 to 0 is empty too",
    ("lowering/rules", "limits.append((0, 0, axis, 1))", "1", "2"): "an empty range is empty with any step",
    (
        "lowering/rules",
        "limits.append((start, stop if stop >= 0 else -n - 1, axis, step))",
        "1",
        "2",
    ): "both are before the first element",
    ("device/sessions", "self.recorded, self.refused = 0, False", "0", "1"): "the first number is arbitrary",
    ("device/sessions", "self.recorded += 1", "1", "2"): "each recorded graph needs only a unique number",
    (
        "ensemble",
        "return max(votes, key=lambda text: (votes[text], means.get(text, 0.0)))",
        "0.0",
        "1.0",
    ): "free text has no means, so all answers get this value",
}
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


# Code that is not mutated, since a test could hardly see the change: messages, the look of pictures and bars, numbers
# that only affect speed, whether `zip` checks lengths, and whether `astype` copies.
UNSEEN = {
    *("plot", "SMOOTHING", "dynamic_ncols", "mininterval", "refresh"),
    *("WRITING_BATCH", "RANKING_BATCH", "SLOTS", "LOGITS", "SESSIONS", "WARM_UP", "FEW", "lru_cache"),
    *("log_severity_level", "enable_mem_pattern"),
    *("strict", "copy"),
}


class Mutation(NamedTuple):
    """A small change of a module."""

    module: str
    line: str  # stripped
    right: str
    wrong: str
    column: int
    place: tuple[int, int, int]  # line number; begin and end in the module's bytes

    def __str__(self) -> str:
        return f"{self.module}.py, line {self.place[0]}: {' '.join(self.right.split())} -> {self.wrong}"


def is_unseen(node: ast.AST) -> bool:
    """Return whether a node is excluded from mutation with all its children."""
    parts = [node, getattr(node, "func", None), *getattr(node, "targets", ())]
    names = {getattr(part, kind, None) for part in parts for kind in ("name", "arg", "id", "attr")}
    return isinstance(node, ast.Raise | ast.JoinedStr) or not UNSEEN.isdisjoint(names)


def mutations(module: str) -> Iterator[Mutation]:
    """Yield every small mutation: another operator, a removed sign, a constant plus one, or a negated bool."""
    text = (ROOT / "tinyprompt" / f"{module}.py").read_bytes()
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    unseen = {id(n) for node in ast.walk(tree) if is_unseen(node) for n in ast.walk(node)}
    signed = [node.operand for node in ast.walk(tree) if isinstance(node, ast.UnaryOp)]
    unseen |= {id(node) for node in signed if isinstance(node, ast.Constant)}
    at = lambda line, column: sum(map(len, lines[: line - 1])) + column
    for node in ast.walk(tree):
        if id(node) in unseen or not isinstance(node, ast.expr):
            continue
        other = copy.deepcopy(node)
        if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
            other.op = OPERATORS[type(node.op)]()
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
            other.ops[0] = OPERATORS[type(node.ops[0])]()
        elif isinstance(node, ast.UnaryOp):  # -1 becomes 0: NumPy treats the lengths -1 and -2 alike
            number = isinstance(node.operand, ast.Constant) and isinstance(node.operand.value, int)
            other = ast.Constant(1 - node.operand.value) if number else node.operand
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            other.value = not node.value if isinstance(node.value, bool) else node.value + 1
        else:
            continue
        place = node.lineno, at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)
        line = lines[node.lineno - 1].decode().strip()
        yield Mutation(module, line, text[place[1] : place[2]].decode(), ast.unparse(other), node.col_offset, place)


def planted(mutation: Mutation) -> str:
    """Return the text of the module with the mutation applied."""
    text, (_, begins, ends) = (ROOT / "tinyprompt" / f"{mutation.module}.py").read_bytes(), mutation.place
    return (text[:begins] + f"({mutation.wrong})".encode() + text[ends:]).decode()


def fate(mutation: Mutation) -> str:
    """Run the related tests; return "caught", "equal" if the mutation is in EQUIVALENT, or "ALIVE"."""
    tests = [f"tests/{name}.py" for name in TESTS[mutation.module].split()]
    status, printed = fails(mutation.module, planted(mutation), ["-x", "--hypothesis-profile", "first", *tests])
    by = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", printed, re.MULTILINE)
    why = EQUIVALENT.get(mutation[:4], "")
    found = "caught" if status else "equal" if why else "ALIVE"
    print(f"{found:6}  {mutation}  ({by[1] if by else why})", flush=True)
    return found


def every_mutation() -> list[Mutation]:
    """Return all mutations of the core."""
    return [mutation for module in TESTS for mutation in mutations(module)]


def draw(number: int, seed: int) -> int:
    """Draw mutations; print the fate of each and the share that is caught. Return exit status 1 if a mutation is alive.

    Each mutation gets a random number from the seed and its own text, and the lowest numbers are drawn. The draw
    therefore does not depend on other lines.
    """
    every = sorted(every_mutation(), key=lambda mutation: random.Random(f"{seed} {mutation[:5]}").random())
    with ThreadPoolExecutor(2) as pool:
        fates = Counter(pool.map(fate, every[:number]))
    print(
        f"{fates['caught']} of {fates.total()} caught, {fates['equal']} equal; seed {seed}, of {len(every)} mutations"
    )
    return int(fates["ALIVE"] > 0)


def main(word: str = "") -> int:
    """Run all faults whose description contains the word. Return exit status 1 if a fault is not caught."""
    chosen = [mutant for mutant in MUTANTS if word in mutant.fault]
    if not chosen:
        raise SystemExit(f"no fault with {word!r} in its description")
    missed = 0
    with ThreadPoolExecutor(2) as pool:
        for mutant, why in zip(chosen, pool.map(verdict, chosen), strict=True):
            missed += bool(why)
            line = f"{'MISSED' if why else 'caught'}  {mutant.fault}  ({mutant.module}.py; {mutant.test})"
            print(line + (f": {why}" if why else ""), flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return int(missed > 0)


if __name__ == "__main__":
    words = sys.argv[1:]
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:resource_tracker"}
    sys.exit(draw(int(words[1]), int(words[2]) if words[2:] else 0) if words[:1] == ["--random"] else main(*words))
