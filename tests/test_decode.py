"""Decoding over tables and networks, compared with transformers; metrics of answers."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from profiles import examples
from reference import FAMILIES, batch, hugging_face, pair, random_weights, raw_config, torch, transformers

from tinyprompt import decode, ops, t5, tree
from tinyprompt.device import default_device
from tinyprompt.files.config import parse_config
from tinyprompt.predict import pad_labels
from tinyprompt.tasks import metrics

EOS = 1
needs_onnx = pytest.mark.skipif(default_device() == "numpy", reason="needs onnx")


def chain(*rows):
    """Return logits that make row i write rows[i], then eos. The token at position t depends on t only."""

    def logits_of(ids):
        assert (ids[:, 0] == 0).all()
        out = np.zeros((*ids.shape, 10))
        for i, row in enumerate(rows):
            for t in range(ids.shape[1]):
                out[i, t, row[t] if t < len(row) else EOS] = 1
        return out

    return logits_of


def table_logits(table):
    """Return logits that depend on the previous token, from a table (rows, V, V)."""
    return lambda ids: np.stack([logits[row] for logits, row in zip(table, ids, strict=True)])


def stepper(logits_of, calls=None):
    """Turn a function of whole sequences into a decoding `step`."""
    ids = None

    def step(tokens, rows, pick):
        nonlocal ids
        before = np.zeros((len(tokens), 0), int) if ids is None else ids if rows is None else ids[rows]
        ids = np.concatenate([before, tokens[:, None]], axis=1)
        if calls is not None:
            calls.append(tokens)
        return pick(logits_of(ids)[:, -1])

    return step


def test_shift_right_starts_with_pad():
    assert t5.shift_right(np.array([[5, 6, 1], [7, 1, 0]])).tolist() == [[0, 5, 6], [0, 7, 1]]


def test_greedy_stops_each_row_at_its_eos():
    rows = [[5, 6, 7], [], [8], [9, 9, 9, 9, 9, 9]]
    assert decode.greedy(stepper(chain(*rows)), 4, 6) == rows


def test_greedy_ignores_tokens_after_eos():
    # Row 0 would write 4 again after its eos, while row 1 is still running.
    assert decode.greedy(stepper(chain([4, EOS, 4, 4], [5, 6, 7, 8])), 2, 9) == [[4], [5, 6, 7, 8]]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_greedy_writes_at_most_max_tokens(most):
    calls = []
    assert decode.greedy(stepper(chain([5] * 9), calls), 1, most) == [[5] * most]
    assert len(calls) == most


def test_greedy_takes_no_step_after_the_last_eos():
    calls = []
    decode.greedy(stepper(chain([5], [6, 7]), calls), 2, 50)
    assert len(calls) == 3


def test_greedy_keeps_a_generated_pad():
    assert decode.greedy(stepper(chain([5, 0, 6])), 1, 9) == [[5, 0, 6]]


def test_the_stream_equals_greedy():
    rows = [[5, 6, 7], [8]]
    tokens = np.stack(list(decode.stream(stepper(chain(*rows)), 2, 9)), axis=1)
    assert tokens.tolist() == [[5, 6, 7, EOS], [8, EOS, 0, 0]]


def test_greedy_feeds_back_its_tokens():
    table = np.zeros((1, 6, 6))
    for before, after in [(0, 3), (3, 5), (5, 4), (4, EOS)]:
        table[0, before, after] = 1
    assert decode.greedy(stepper(table_logits(table)), 1, 10) == [[3, 5, 4]]


@examples(100)
@given(
    rows=st.integers(1, 4),
    seed=st.integers(0, 999),
    labels=st.lists(st.lists(st.integers(2, 6), max_size=4).map(lambda ids: [*ids, EOS]), min_size=1, max_size=4),
)
def test_rank_sums_the_log_probabilities(rows, seed, labels):
    table = np.random.default_rng(seed).normal(0, 3, (rows, 7, 7))
    log_p = table - np.log(np.exp(table).sum(-1, keepdims=True))
    wanted = [
        [sum(row_log_p[a, b] for a, b in zip([0, *label], label, strict=False)) for label in labels]
        for row_log_p in log_p
    ]
    ids, weights = pad_labels([labels] * rows)
    scores = decode.rank(lambda x: x, table_logits(table)(t5.shift_right(ids)), ids, weights)
    assert scores.shape == (rows, len(labels))
    assert np.allclose(scores, wanted)


class Problem(NamedTuple):
    """The parameters of a comparison with transformers."""

    family: str
    seed: int
    eos: float  # factor of the head's eos row: a large factor gives frequent ends
    rows: int
    words: int
    left: bool
    most: int
    width: int
    beams: int
    length_penalty: float

    def draw(self):
        """Return config.json, configuration, flat weights, input ids and mask, in float64."""
        raw = raw_config(self.family)
        config = parse_config(raw)
        flat = random_weights(config, self.seed)
        flat["shared.weight" if config.tied_head else "lm_head.weight"][EOS] *= self.eos
        return raw, config, flat, *batch(self.seed, config.vocab_size, self.rows, self.words, 1, self.left)[:2]

    def write(self, device):
        """Return our texts."""
        _, config, flat, *inputs = self.draw()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, "SLOTS", self.width)
            step = decode.Cache(tree.nest(flat), config, *inputs, self.beams, device)
            if self.beams == 1:
                return decode.greedy(step, self.rows, self.most)
            return decode.beam_search(step, self.rows, self.most, self.beams, self.length_penalty)

    def expected(self):
        """Return the texts of transformers."""
        raw, _, flat, *inputs = self.draw()
        ids, mask = (torch.from_numpy(x.copy()) for x in inputs)
        options = dict(length_penalty=self.length_penalty) if self.beams > 1 else {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformers.generation.utils, "torch", Double())
            written = hugging_face(raw, flat).generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.most,
                num_beams=self.beams,
                use_cache=False,  # its cache needs as many decoder layers as encoder layers
                do_sample=False,
                decoder_start_token_id=0,
                pad_token_id=0,
                eos_token_id=EOS,
                **options,
            )
        return decode.to_eos(written[:, 1:].numpy())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: threads only slow down products as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Double:
    """torch with float64 under the name float32: transformers rounds logits, which could swap two close candidates."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


problems = st.builds(
    Problem,
    family=st.sampled_from(sorted(FAMILIES)),
    seed=st.integers(0, 999),
    eos=st.sampled_from([1, 2, 3]),
    rows=st.integers(1, 4),
    words=st.integers(1, 9),
    left=st.booleans(),
    most=st.integers(1, 12),
    width=st.sampled_from([1, 4, 32]),
    beams=st.integers(1, 4),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
)
LARGE = Problem("umt5", 1, 2, 4, 9, False, 12, 4, 4, 0.5)


@examples(40)
@given(problem=problems)
@example(problem=LARGE)
def test_numpy_writes_the_texts_of_transformers(problem):
    assert problem.write("numpy") == problem.expected()


@needs_onnx
@pytest.mark.parametrize("family", FAMILIES)
@examples(2)
@given(problem=problems)
def test_onnx_runtime_writes_the_texts_of_transformers(family, problem):
    problem = problem._replace(family=family, width=4)
    assert problem.write("cpu") == problem.expected()


class Search(NamedTuple):
    """A beam search over random tables, which are often confident and soon end a text."""

    seed: int
    rows: int
    most: int
    beams: int
    length_penalty: float
    scale: float
    eos: float  # added to the logit of eos at early positions, subtracted at later positions
    early: int  # number of early positions

    def table(self):
        """Return logits by position and previous token, (rows, most, 6, 6)."""
        table = np.random.default_rng(self.seed).normal(0, self.scale, (self.rows, self.most, 6, 6))
        table[..., EOS] += np.where(np.arange(self.most) < self.early, self.eos, -self.eos)[:, None]
        return np.repeat(table, self.beams, 0)

    def logits_of(self, ids):
        """Map (rows * beams, T) to (rows * beams, T, 6)."""
        return self.table()[np.arange(len(ids))[:, None], np.arange(ids.shape[1]), ids]

    def write(self):
        """Return our texts."""
        step = stepper(self.logits_of)
        return decode.beam_search(step, self.rows, self.most, self.beams, self.length_penalty)

    def expected(self, model):
        """Return the texts of transformers."""

        def forward(decoder_input_ids, **_):
            logits = torch.from_numpy(self.logits_of(decoder_input_ids.numpy()))
            return transformers.modeling_outputs.Seq2SeqLMOutput(logits=logits)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformers.generation.utils, "torch", Double())
            patch.setattr(model, "forward", forward)
            written = model.generate(
                input_ids=torch.full((self.rows, 1), 5),
                max_new_tokens=self.most,
                num_beams=self.beams,
                length_penalty=self.length_penalty,
                use_cache=False,
                do_sample=False,
                decoder_start_token_id=0,
                pad_token_id=0,
                eos_token_id=EOS,
            )
        return decode.to_eos(written[:, 1:].numpy())


@pytest.fixture(scope="module")
def six_words():
    raw = raw_config("t5-1.1", vocab_size=6)
    return hugging_face(raw, random_weights(parse_config(raw), 0))


@given(
    search=st.builds(
        Search,
        seed=st.integers(0, 999),
        rows=st.integers(1, 3),
        most=st.integers(1, 9),
        beams=st.integers(2, 4),
        length_penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
        scale=st.sampled_from([0.5, 2.0, 6.0]),
        eos=st.sampled_from([0.0, 2.0, 6.0]),
        early=st.integers(1, 4),
    )
)
def test_beam_search_ends_where_transformers_ends(six_words, search):
    assert search.write() == search.expected(six_words)


@given(width=st.sampled_from([1, 7, 4000]), count=st.integers(1, 12), seed=st.integers(0, 99), ties=st.booleans())
def test_largest_returns_sorted_values_of_distinct_indices(width, count, seed, ties):
    x = np.random.default_rng(seed).normal(size=(2, width)).round(0 if ties else 9)
    values, at = ops.largest(x, count)
    assert (values == -np.sort(-x)[:, :count]).all()
    assert (np.take_along_axis(x, at, 1) == values).all()
    assert all(len(set(row)) == len(row) == min(count, width) for row in at.tolist())


def test_every_search_setting_changes_the_result():
    base = Problem("t5-1.1", 0, 3, 4, 9, False, 12, 32, 4, 2.0)
    changes = [{}, dict(beams=1), dict(beams=2), dict(length_penalty=0.0), dict(most=6)]
    written = [[base._replace(seed=seed, **change).write("numpy") for seed in range(2)] for change in changes]
    assert all(one != other for i, one in enumerate(written) for other in written[:i])


@pytest.mark.parametrize("device", ["numpy", pytest.param("cpu", marks=needs_onnx)])
@pytest.mark.parametrize("family", ["t5-1.0", "umt5"])
def test_logits_with_a_cache_equal_those_without(monkeypatch, family, device):
    """Use a soft prompt, prefixes of different lengths, distant positions, and reordered rows."""
    config, params, _ = pair(family, relative_attention_num_buckets=8, relative_attention_max_distance=20)
    rng, beams = np.random.default_rng(0), 2
    delta = {"encoder.prompt.embedding": rng.normal(size=(3, 20))}
    for more, at in enumerate(["0.layer.0.Self", "1.layer.0.Self", "0.layer.1.EncDec", "2.layer.1.EncDec"]):
        names = [f"decoder.block.{at}Attention.prefix.{name}" for name in ("key", "value")]
        delta |= {name: rng.normal(size=(more + 1, 18)) for name in names}
    params = tree.merge(params, delta)
    input_ids, attention_mask, *_ = batch(0, 61, rows=2, length=30, out=1)
    context, mask = (np.repeat(x, beams, 0) for x in t5.encode(params, config, input_ids, attention_mask))
    monkeypatch.setattr(decode, "SLOTS", 8)
    step = decode.Cache(params, config, input_ids, attention_mask, beams, device)
    ids, rows = np.zeros((4, 0), int), None
    for at in range(30):
        ids = np.concatenate([ids if rows is None else ids[rows], rng.integers(0, 61, (4, 1))], axis=1)
        found = step(ids[:, at], rows)
        assert np.abs(found - t5.decode(params, config, ids, context, mask)[:, -1]).max() < 1e-10
        rows = None if at % 3 else np.array([0, 0, 2, 2]) + rng.integers(0, 2, 4)


def test_the_cache_opens_a_graph_only_when_it_grows(monkeypatch):
    config, params, _ = pair("t5-1.1")
    widths = []
    original = decode.decode_next
    monkeypatch.setattr(decode, "decode_next", lambda *args: widths.append(args[5]) or original(*args))
    step = decode.Cache(params, config, *batch(0, 61, rows=1, length=3, out=1)[:2])
    decode.greedy(lambda tokens, rows, pick: pick(step(tokens, rows) * (np.arange(61) != EOS)), 1, 70)
    assert widths == [32] * 32 + [64] * 32 + [128] * 6


@examples(50)
@given(
    seed=st.integers(0, 999), rows=st.integers(1, 3), beams=st.integers(1, 3), penalty=st.sampled_from([0.0, 1.0, 2.0])
)
def test_many_beams_find_the_best_text(seed, rows, beams, penalty):
    """With more beams than texts, the search finds the best text; a few beams find none that scores higher."""
    table = np.random.default_rng(seed).normal(0, 2, (rows, 4, 4))
    log_p = table - np.log(np.exp(table).sum(-1, keepdims=True))
    most = 3

    def texts(*ids):
        whole = ids and (ids[-1] == EOS or len(ids) == most)
        return [list(ids)] if whole else [text for token in range(4) for text in texts(*ids, token)]

    def search(beams):
        wide = np.repeat(table, beams, 0)
        return decode.beam_search(stepper(table_logits(wide)), rows, most, beams, penalty)

    for row, (found, best) in enumerate(zip(search(beams), search(64), strict=True)):
        score = {
            tuple(ids): sum(log_p[row, a, b] for a, b in zip([0, *ids], ids, strict=False)) / len(ids) ** penalty
            for ids in texts()
        }
        of = lambda ids, score=score: score[tuple(ids) if len(ids) == most else (*ids, EOS)]
        assert np.isclose(of(best), max(score.values()))
        assert of(found) <= of(best) + 1e-12


def test_accuracy_ignores_case_and_white_space_only():
    assert metrics.normalize("  New\n York\t ") == "new york"
    assert metrics.accuracy(["Good ", "bad", "not  bad", "good!"], ["good", "good", "Not bad", "good"]) == 0.5


@pytest.mark.parametrize(("predicted", "wanted"), [([], []), (["a"], ["a", "b"]), (["a"], [])])
def test_accuracy_refuses_unequal_lengths_and_empty_lists(predicted, wanted):
    with pytest.raises(ValueError, match=f"{len(predicted)} predictions against {len(wanted)} targets"):
        metrics.accuracy(predicted, wanted)


def test_majority_predicts_the_most_common_target():
    assert metrics.majority(["a", "b", "b"], ["a", "a", "a", "b"]) == 0.25
    assert metrics.majority(["b", "a"], ["a", "b", "b", "b"]) == 0.75
