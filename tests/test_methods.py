"""Every method: its gradient against torch, its lowered form, its stored arrays and its first values."""

import contextlib
import json
import sys
from dataclasses import replace
from functools import partial

import files
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from reference import check_torch, hugging_face, raw_config, torch
from test_parity import problems
from tuning import answer, tune

from tinyprompt import decode, methods, t5, train, tree
from tinyprompt.bench import steps as bench
from tinyprompt.check import ledger
from tinyprompt.check.ledger import EXACT, distance
from tinyprompt.cli.main import main
from tinyprompt.data import Row
from tinyprompt.device import compile, default_device
from tinyprompt.errors import CheckpointError
from tinyprompt.files import models, prompts
from tinyprompt.fit import check_fit
from tinyprompt.methods import HEAD, METHODS, PROMPT
from tinyprompt.predict import predict
from tinyprompt.settings import Settings

F = torch.nn.functional
LABELS = 3


def sizes(method):
    return Settings(method=method, prompt_length=5, rank=2, hidden=9)


def draw(problem, method):
    """Draw a model and a batch of a problem, and random values of a method's trained arrays."""
    raw, config, flat, data, _ = problem.draw()
    rng = np.random.default_rng(problem.seed)
    shapes = methods.trained_shapes(config, sizes(method), LABELS)
    trained = {name: rng.normal(0, shape[-1] ** -0.5, shape) for name, shape in shapes.items()}
    for name in trained.keys() & flat.keys():
        if name != HEAD or method != "warp":
            trained[name] = flat[name] + 0.1 * trained[name]
    if method == "warp":
        data = data._replace(labels=data.labels % LABELS)
    return raw, config, flat, data, trained


def computed_prompt(trained, raw, config):
    """Return the prompt or prefix that a network computes, in torch, or else the trained arrays themselves."""
    kind, network, _ = next(iter(trained)).partition("_network.")
    if not network:
        return trained
    x, last = trained[f"{kind}_network.embedding"], {"prompt": 2, "prefix": 1}[kind]
    for i in range(last + 1):
        x = F.linear(x, trained[f"{kind}_network.{i}.weight"], trained[f"{kind}_network.{i}.bias"])
        x = x if i == last else x.relu() if kind == "prompt" else x.tanh()
    if kind == "prompt":
        return {PROMPT: x}
    return dict(
        zip(methods.stored_shapes(config, sizes("prefix")), x.split(raw["num_heads"] * raw["d_kv"], 1), strict=True)
    )


def changed_weights(trained, flat):
    """Return the weights in torch with the changes of lora and ia3, and with the weights that are trained directly."""
    out = {name: torch.from_numpy(value) for name, value in flat.items()}
    for name, value in trained.items():
        base, _, kind = name.rpartition(".")
        if kind == "a":
            weight = base.removesuffix(".lora") + ".weight"
            out[weight] = out[weight] + trained[base + ".b"] @ value
        elif kind in ("rows", "columns"):
            weight = base.removesuffix(".ia3") + ".weight"
            out[weight] = (out[weight].T * value).T if kind == "rows" else out[weight] * value
        elif name in flat or name == HEAD:
            out[name] = value
    return out


def prefixed_attention(module, query, key, value, mask, position_bias=None, eager=None, **more):
    """Attention of transformers with prepended visible keys and values; in self-attention at positions before 0."""
    if hasattr(module, "prefix"):
        rows, length = len(module.prefix["key"]), query.shape[2]
        own = {
            kind: x.view(1, rows, module.n_heads, -1).transpose(1, 2).expand(len(key), -1, -1, -1)
            for kind, x in module.prefix.items()
        }
        key, value = torch.cat([own["key"], key], 2), torch.cat([own["value"], value], 2)
        mask = mask if mask is None else F.pad(mask, (rows, 0))
        position_bias = F.pad(position_bias, (rows, 0))
        if module.positions is not None:
            position_bias = module.positions.compute_bias(length, rows + length, past_seen_tokens=rows)
    return eager(module, query, key, value, mask, position_bias=position_bias, **more)


def add_hooks(model, trained, stack):
    """Add adapters, prefixes and prompts of deeper layers to the model."""
    code = sys.modules[type(model).__module__]
    model.set_attn_implementation("eager")
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setattr(code, "eager_attention_forward", partial(prefixed_attention, eager=code.eager_attention_forward))
    for name, value in trained.items():
        attention, prefix, kind = name.partition(".prefix.")
        if prefix:
            first = model.get_submodule(f"{attention.partition('.')[0]}.block.0.layer.0.SelfAttention")
            own = "SelfAttention" in attention
            attention = model.get_submodule(attention)
            attention.prefix = getattr(attention, "prefix", {}) | {kind: value}
            attention.positions = (attention if attention.has_relative_attention_bias else first) if own else None
        module, _, _ = name.partition(".adapter.down.weight")
        if module != name:
            down, up = (
                [trained[f"{module}.adapter.{part}.{kind}"] for kind in ("weight", "bias")] for part in ("down", "up")
            )
            layer = model.get_submodule(module)
            inner = next(
                getattr(layer, k) for k in ("SelfAttention", "EncDecAttention", "DenseReluDense") if hasattr(layer, k)
            )

            def adapt(module, inputs, output, down=down, up=up):
                y = output[0] if isinstance(output, tuple) else output
                y = y + F.linear(F.linear(y, *down).relu(), *up)
                return (y, *output[1:]) if isinstance(output, tuple) else y

            stack.callback(inner.register_forward_hook(adapt).remove)
        elif name.endswith(".prompt.embedding") and name != PROMPT:

            def prompt(module, args, kwargs, own=value):
                x = args[0] if args else kwargs["hidden_states"]
                x = torch.cat([own.expand(len(x), *own.shape), x[:, len(own) :]], 1)
                return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

            block = model.get_submodule(name.removesuffix(".prompt.embedding"))
            stack.callback(block.register_forward_pre_hook(prompt, with_kwargs=True).remove)


def by_torch(raw, config, flat, data, trained):
    """Return loss and gradients of a method, computed by transformers."""
    model = hugging_face(raw, flat)
    tensors = {name: torch.from_numpy(value).requires_grad_() for name, value in trained.items()}
    arrays = computed_prompt(tensors, raw, config)
    prompt = arrays.get(PROMPT, torch.zeros((0, raw["d_model"]), dtype=torch.float64))
    batch = {name: torch.from_numpy(x.copy()) for name, x in data._asdict().items()}
    weights = changed_weights(arrays, flat)
    if "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights["shared.weight"]
    for part in ("encoder", "decoder"):
        weights[f"{part}.embed_tokens.weight"] = weights["shared.weight"]

    class Called(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return check_torch.loss_and_logits(self.model, prompt, **batch)[0]

    with contextlib.ExitStack() as stack:
        add_hooks(model, arrays, stack)
        weights = {f"model.{name}": value for name, value in weights.items()}
        loss = torch.func.functional_call(Called(), weights, (), tie_weights=False)
        loss.backward()
    return loss.item(), {name: tensor.grad.numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("method", METHODS)
@examples(12)
@given(problem=problems)
def test_gradient_equals_torch(method, problem):
    raw, config, flat, data, trained = draw(problem, method)
    loss, gradient = train.loss_and_grads(trained, tree.nest(flat), config, data)
    wanted, theirs = by_torch(raw, config, flat, data, trained)
    assert distance(loss, wanted) < EXACT
    largest = max(np.linalg.norm(g) for g in theirs.values())
    for name, found in gradient.items():  # the gradient of a single key is only rounding error
        allowed = EXACT * np.linalg.norm(theirs[name]) + 1e-14 * largest
        assert (name, np.linalg.norm(found - theirs[name]) <= allowed) == (name, True)


@pytest.mark.skipif(default_device() == "numpy", reason="needs ONNX Runtime: pip install '.[ort]'")
@pytest.mark.parametrize("method", METHODS)
@examples(4)
@given(problem=problems)
def test_lowered_gradient_equals_numpy(method, problem):
    _, config, flat, data, trained = draw(problem, method)
    arguments = trained, tree.nest(flat), config, data
    loss, gradient = train.loss_and_grads(*arguments)
    found, found_gradient = compile(train.loss_and_grads, "cpu")(*arguments)
    assert distance(found, loss) < EXACT
    assert {name: distance(found_gradient[name], gradient[name]) < EXACT for name in gradient} == dict.fromkeys(
        gradient, True
    )


@pytest.mark.parametrize("method", METHODS)
@examples(4)
@given(problem=problems)
def test_float32_stays_float32(method, problem):
    _, config, flat, data, trained = draw(problem, method)
    trained, params, data = tree.refill(
        (trained, tree.nest(flat), data),
        (x.astype(np.float32) if x.dtype == float else x for _, x in tree.leaves((trained, tree.nest(flat), data))),
    )
    loss, gradient = train.loss_and_grads(trained, params, config, data)
    assert {np.asarray(loss).dtype, *(g.dtype for g in gradient.values())} == {np.dtype(np.float32)}


@pytest.mark.parametrize("method", METHODS)
@examples(4)
@given(problem=problems)
def test_stored_arrays_give_the_same_logits(method, problem):
    _, config, flat, data, trained = draw(problem, method)
    params = tree.nest(flat)
    kept = methods.stored(trained, config)
    assert {name: value.shape for name, value in kept.items()} == methods.stored_shapes(config, sizes(method), LABELS)
    logits = [ledger.logits(delta, params, config, data) for delta in (trained, kept)]
    assert distance(*logits) < 1e-12


@pytest.mark.parametrize("method", METHODS)
@examples(3)
@given(problem=problems.map(lambda p: p._replace(own_prompts=False)))
def test_logits_with_a_cache_equal_those_without(method, problem):
    _, config, flat, data, trained = draw(problem, method)
    params = methods.apply(tree.nest(flat), methods.stored(trained, config))
    step = decode.Cache(params, config, data.input_ids, data.attention_mask)
    found = np.stack([step(tokens, None) for tokens in t5.shift_right(data.labels).T], axis=1)
    assert distance(found, ledger.logits(trained, tree.nest(flat), config, data)) < EXACT


def test_learning_rates_are_those_of_the_published_tables():
    assert {name: method.learning_rate for name, method in METHODS.items()} == {
        **dict.fromkeys(("prompt", "layer-prompts", "warp"), 0.3),
        **dict.fromkeys(("prefix", "bitfit"), 0.03),
        **dict.fromkeys(("prefix-mlp", "p-tuning", "full"), 1e-3),
        **{"adapter": 3e-3, "lora": 0.01, "ia3": 0.1},
    }


UNCHANGED = ("adapter", "lora", "ia3", "bitfit", "full")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["t5-1.0", "umt5"])
def test_training_starts_near_the_frozen_model(method, family, tmp_path):
    raw = raw_config(family, vocab_size=files.VOCAB)
    model = models.load(files.write(tmp_path / family, raw, files.weights(raw)))
    settings = Settings(method=method, prompt_length=4, rank=2, hidden=6, seed=1)
    trained = methods.init_params(model, settings, ("good", "bad"))
    assert {name: value.shape for name, value in trained.items()} == methods.trained_shapes(model.config, settings, 2)
    assert {value.dtype for value in trained.values()} == {np.dtype(np.float32)}
    assert all(np.isfinite(value).all() and value.flags.writeable for value in trained.values())
    again = methods.init_params(model, settings, ("good", "bad"))
    assert all((trained[name] == again[name]).all() for name in trained)
    case = ledger.draw(model)
    arguments = model.params, model.config, case.batch
    same = distance(ledger.logits(trained, *arguments), ledger.logits({}, *arguments)) if method != "warp" else 1.0
    assert (same < 1e-6) == (method in UNCHANGED)
    if method == "warp":
        ids = [model.tokenizer.encode(word)[:-1] for word in ("good", "bad")]
        head = model.params["lm_head" if "lm_head" in model.params else "shared"]["weight"]
        assert np.allclose(trained[HEAD], [head[row].mean(0) for row in ids])


def test_unknown_methods_and_sizes_are_refused(folder):
    with pytest.raises(ValueError, match=r"setting method: expected one of prompt, .*, found 'soft'"):
        Settings(method="soft")
    with pytest.raises(ValueError, match="prompt init 'file': method 'lora' does not train a prompt"):
        methods.init_params(models.load(folder), Settings(method="lora", init="file", init_file="nowhere"), None)
    with pytest.raises(ValueError, match="setting rank: expected at least 1, found 0"):
        Settings(rank=0)


# Lester et al. 2021, table 4: parameters of the prompt, of prompt and model, and the share in percent. Four misprints
# are corrected (small with 20: "10,420"; large with 100: "0.01907"; xl with 100: "0.00718"; xxl with 50:
# "11,137,380,352").
TABLE_4 = {
    ("small", 1): (512, 76_961_664, 0.00067),
    ("small", 20): (10_240, 76_971_392, 0.01330),
    ("small", 100): (51_200, 77_012_352, 0.06648),
    ("base", 100): (76_800, 247_654_656, 0.03101),
    ("large", 100): (102_400, 783_252_480, 0.01307),
    ("xl", 100): (204_800, 2_849_961_984, 0.00719),
    ("xxl", 50): (204_800, 11_135_537_152, 0.00184),
    ("xxl", 100): (409_600, 11_135_741_952, 0.00368),
}


@pytest.mark.parametrize("case", TABLE_4)
def test_table_4_of_the_paper(case, capsys):
    size, length = case
    prompt, total, percent = TABLE_4[case]
    config = bench.SIZES[size]
    found = methods.count(config, Settings(prompt_length=length))
    assert found == (prompt, prompt, total)
    assert round(found.percent, 5) == percent
    assert main(["count", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["table"]
    row = {
        "size": size,
        "length": length,
        "trained": prompt,
        "stored": prompt,
        "model": total,
        "percent": found.percent,
    }
    assert row in table


@examples(10)
@given(problem=problems)
def test_counted_parameters_equal_the_arrays(problem):
    for method in METHODS:
        _, config, flat, _, trained = draw(problem, method)
        kept = methods.stored(trained, config)
        model = tree.count(kept | flat)
        assert methods.count(config, sizes(method), LABELS) == (tree.count(trained), tree.count(kept), model)


def test_the_figure_is_drawn(tmp_path, capsys):
    assert main(["count", "--plot", str(tmp_path / "4.png"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 5 * len(METHODS)
    assert (tmp_path / "4.png").read_bytes()[:4] == b"\x89PNG"


def test_parameters_of_a_model_are_counted_from_its_config(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert main(["count", "--model", str(tmp_path), "--prompt-length", "7", "--labels", "3", "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    model = models.load(folder)
    weights = tree.count(tree.flatten(model.params))
    assert rows["full"]["stored"] == rows["prompt"]["model"] - rows["prompt"]["stored"] == weights
    assert rows["warp"]["stored"] == 10 * model.config.d_model
    assert main(["count", "--prompt-length", "0"]) == 2
    assert capsys.readouterr().err == "tinyprompt: setting prompt_length: expected at least 1, found 0\n"


ROWS = [Row("a bad day", "bad"), Row("fine weather", "good"), Row("so sad", "bad"), Row("hurrah", "good")]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_tunes_is_saved_and_resumes(method, folder, tmp_path):
    model, labels = models.load(folder), ("bad", "good")
    settings = Settings(
        method=method, steps=4, eval_every=2, batch_size=2, prompt_length=3, rank=2, hidden=5, learning_rate=1e-3
    )
    whole = tune(model, ROWS, ROWS, settings, labels, device="numpy")
    half = tune(model, ROWS, ROWS, replace(settings, steps=2), labels, device="numpy")
    path = prompts.save_prompt(half.prompt, tmp_path / "half.safetensors")
    on = tune(model, ROWS, ROWS, settings, labels, device="numpy", resume=prompts.load_prompt(path))
    assert on.prompt.params.keys() == whole.prompt.params.keys()
    for name, value in whole.prompt.params.items():
        assert (on.prompt.params[name] == value).all()
    saved = prompts.load_prompt(prompts.save_prompt(whole.prompt, tmp_path / "whole.safetensors"))
    texts = [row.input for row in ROWS]
    answers = [answer(model, texts, labels, delta, settings, "numpy") for delta in (whole.prompt.params, saved.params)]
    assert answers[0] == answers[1]


def test_label_vectors_need_labels(folder):
    with pytest.raises(ValueError, match=r"method 'warp'.*label"):
        tune(models.load(folder), ROWS, ROWS, Settings(method="warp", steps=1), None)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Return a model, and a prompt for each of several methods."""
    folder = files.write(tmp_path_factory.mktemp("tuned"), files.SMALL, files.weights())
    model, made = models.load(folder), {}
    for method in ("prompt", "lora", "warp", "full", "prefix-mlp"):
        settings = Settings(method=method, steps=1, batch_size=2, prompt_length=3, rank=2, hidden=5)
        made[method] = tune(model, ROWS, ROWS, settings, ("bad", "good"), device="numpy").prompt
    return model, made


@pytest.mark.parametrize("method", ["prompt", "lora", "warp", "full", "prefix-mlp"])
@examples(20)
@given(data=st.data())
def test_a_damaged_file_is_refused(method, tuned, tmp_path_factory, data):
    model, made = tuned
    whole = made[method]
    name = data.draw(st.sampled_from(sorted(whole.params)))
    value = whole.params[name]
    wrong = {
        "missing": {k: v for k, v in whole.params.items() if k != name},
        "surplus": whole.params | {"encoder.more": value},
        "longer": whole.params | {name: np.concatenate([value, value])},
        "wider": whole.params | {name: np.repeat(value, 2, -1)},
    }[data.draw(st.sampled_from(["missing", "surplus", "longer", "wider"]))]
    path = tmp_path_factory.mktemp("damaged") / "p.safetensors"
    prompts.save_prompt(replace(whole, params=wrong or {"other": value}), path)
    with pytest.raises(CheckpointError, match=r"p\.safetensors: is damaged: key '.*': expected .*, found "):
        check_fit(prompts.load_prompt(path), model, path)


def test_damaged_settings_are_refused(tuned):
    model, prompt = tuned[0], tuned[1]["lora"]
    for name, value in (("method", "soft"), ("rank", "x"), ("prompt_length", 0)):
        damaged = replace(prompt, settings=prompt.settings | {name: value})
        with pytest.raises(CheckpointError, match="p: its settings cannot be used"):
            check_fit(damaged, model, "p")


def test_label_vectors_need_the_same_number_of_labels(tuned, tmp_path, capsys):
    model, prompt = tuned[0], tuned[1]["warp"]
    for labels in (None, ("a", "b", "c")):
        with pytest.raises(
            CheckpointError, match=r"is damaged: (key 'lm_head.weight': expected \(3, 4\), found|.*warp)"
        ):
            predict(model, replace(prompt, label_words=labels), ["a day"], "numpy")
    path = prompts.save_prompt(prompt, tmp_path / "p.safetensors")
    assert main(["convert", str(path), str(tmp_path / "q.safetensors"), "--label-words", "a", "b", "c"]) == 2
    assert "--label-words: expected 2, one for each of its vectors, found 3" in capsys.readouterr().err


def test_int8_refuses_a_method_without_frozen_weights(folder):
    with pytest.raises(ValueError, match="device 'cpu-int8' quantises frozen weights, and method 'full' leaves none"):
        tune(models.load(folder), ROWS, ROWS, Settings(method="full"), ("bad", "good"), "cpu-int8")
