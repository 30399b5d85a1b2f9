"""Answers of a frozen model with a prompt: label words by rank classification, or free text.

`answer` is the engine: rows of many prompts in, texts and probabilities out. `predict`, `label_scores` and `ensemble`
are views of it.

Dimensions: B batch   L encoder positions   D d_model   P prompt vectors   N labels   T tokens of a label
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from tinyprompt import decode, methods, ops, t5
from tinyprompt.config import EOS, PAD
from tinyprompt.data import by_length, check_texts, encode_inputs, pad, target_ids
from tinyprompt.device import DEVICES, compile, default_device
from tinyprompt.errors import DataError
from tinyprompt.fit import check_fit
from tinyprompt.model import PROMPT, Model, Prompt
from tinyprompt.settings import Settings
from tinyprompt.tree import Flat, Tree, flatten, freeze, nest

WRITING_BATCH = 64
RANKING_BATCH = 16  # rows; a CPU's cache holds about so many
GPU_RANKING_BATCH = 64


class Answer(NamedTuple):
    """The answer to one text."""

    text: str
    probabilities: dict[str, float]  # of each label word; they sum to 1. Empty for free text


@overload
def predict(  # type: ignore[overload-overlap]  # a string is a sequence of strings, too
    model: Model, prompt: Prompt, texts: str, device: str | None = None
) -> str: ...
@overload
def predict(model: Model, prompt: Prompt, texts: Sequence[str], device: str | None = None) -> list[str]: ...
def predict(model: Model, prompt: Prompt, texts: str | Sequence[str], device: str | None = None) -> str | list[str]:
    """Answer one text or several: the likeliest label word of the prompt, or free text.

    Args:
        model: the frozen model.
        prompt: a tuned prompt. `Prompt(label_words=("bad", "good"))` asks the bare model.
        texts: a string, or a sequence of strings.
        device: a name in `device.DEVICES`; None is the fastest that is installed.

    Returns:
        A string for a string, a list for a sequence.

    Raises:
        CheckpointError: The prompt belongs to another model.

    Example:
        >>> predict(model, prompt, "Two goals in the last minute.")
        'sport'
    """
    if not isinstance(model, Model) or not isinstance(prompt, Prompt):
        raise TypeError("predict(model, prompt, texts): the first argument is a Model from load, the second a Prompt")
    if isinstance(texts, str):
        return answer(model, [(prompt, texts)], device)[0].text
    return [one.text for one in answer(model, [(prompt, text) for text in texts], device)]


def answer(
    model: Model, rows: Sequence[tuple[Prompt, str]], device: str | None = None, few_shapes: bool = False
) -> list[Answer]:
    """Answer texts, each with its own prompt: one frozen model, many tasks (Lester et al. 2021, section 1).

    Soft prompts of all lengths and tasks share batches. Each other method has batches of its own, because it changes
    the weights.

    Args:
        rows: pairs of a prompt and a text.
        few_shapes: round batch sizes and lengths up, as a server needs: every new shape compiles a graph.

    Raises:
        CheckpointError: A prompt belongs to another model.
        FloatingPointError: The log probabilities of the labels are not finite.

    Example:
        >>> answer(model, [(topic, "Two goals in the last minute."), (sentiment, "The soup was cold.")])
    """
    device = device or default_device()
    tasks = bind(model, [prompt for prompt, _ in rows])
    questions = encode_rows(model, tasks, [text for _, text in rows])
    answers: list[Answer] = [Answer("", {})] * len(rows)
    for i, scores in rank_labels(model, questions, device, few_shapes):
        answers[i] = tasks[i].choose(scores)
    for i, text in write_texts(model, questions, device, few_shapes):
        answers[i] = Answer(text, {})
    model.check_files()
    return answers


def label_scores(model: Model, prompt: Prompt, texts: Sequence[str], device: str | None = None) -> np.ndarray:
    """Compute the log probability of each label word for each text: (texts, labels), float32.

    With the setting `length_penalty` it is divided by that power of the label's number of tokens.

    Raises:
        CheckpointError: The prompt belongs to another model.
        DataError: The prompt has no label words.
        FloatingPointError: The log probabilities are not finite.
    """
    if not prompt.label_words:
        raise DataError("label_scores: this prompt has no label words, so its answers are free text; use predict")
    tasks = bind(model, [prompt] * len(texts))
    scores = np.empty((len(texts), len(prompt.label_words)), np.float32)
    for i, row in rank_labels(model, encode_rows(model, tasks, texts), device or default_device()):
        scores[i] = tasks[i].scaled(row)
    model.check_files()
    return scores


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Normalise log probabilities of labels (..., N) over the last axis."""
    return np.exp(scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True))


# ---- prompts that are bound to a model ----


class Bound(NamedTuple):
    """A prompt that fits a model, ready to answer."""

    params: Tree  # the weights that the model computes with
    vectors: np.ndarray | None  # a soft prompt (P, D); None for another method, whose arrays are in `params`
    words: dict[str, tuple[int, ...]]  # the ids of each label word; empty for free text
    settings: Settings

    @classmethod
    def of(cls, model: Model, prompt: Prompt) -> "Bound":
        """Bind a prompt to a model. Raises CheckpointError if they do not belong together."""
        check_fit(prompt, model)
        settings, label_head = Settings.saved(prompt.settings), methods.has_label_head(model.config, prompt.params)
        words = target_ids(model.tokenizer, prompt.label_words, label_head, prompt.verbalizer)
        if prompt.params.keys() <= {PROMPT}:
            none = np.zeros((0, model.config.d_model), np.float32)
            return cls(model.params, prompt.params.get(PROMPT, none), words, settings)
        kept = flatten(model.params)
        applied = flatten(methods.apply(model.params, prompt.params)).items()
        params = nest({name: x if x is kept.get(name) else freeze(x) for name, x in applied})
        return cls(params, None, words, settings)

    @property
    def length(self) -> int:
        """The number of vectors in front of a text."""
        return 0 if self.vectors is None else len(self.vectors)

    @property
    def search(self) -> tuple:
        """The settings of decoding. Rows that agree in them are written together."""
        return self.settings.num_beams, self.settings.max_new_tokens, self.settings.length_penalty

    def scaled(self, scores: np.ndarray) -> np.ndarray:
        """Divide the log probabilities by a power of the labels' lengths; drop those of padding.

        Raises FloatingPointError if they are not finite.
        """
        lengths = np.array([len(ids) for ids in self.words.values()])
        scores = scores[: len(lengths)] / lengths ** (self.settings.length_penalty or 0.0)
        if not np.isfinite(scores).all():
            raise FloatingPointError("the log probabilities of the labels are not finite: prompt or model is damaged")
        return scores.astype(np.float32)

    def choose(self, scores: np.ndarray) -> Answer:
        """Return the likeliest label word and the probability of each."""
        scores, words = self.scaled(scores), list(self.words)
        return Answer(words[scores.argmax()], dict(zip(words, probabilities(scores).tolist(), strict=True)))


class Question(NamedTuple):
    """One row of `answer`."""

    task: Bound
    ids: list[int]  # of the text, behind one pad for each prompt vector


def bind(model: Model, prompts: Sequence[Prompt]) -> list[Bound]:
    """Bind each prompt to the model, equal ones once."""
    bound = {id(prompt): Bound.of(model, prompt) for prompt in {id(prompt): prompt for prompt in prompts}.values()}
    return [bound[id(prompt)] for prompt in prompts]


def encode_rows(model: Model, tasks: Sequence[Bound], texts: Sequence[str]) -> list[Question]:
    """Encode the text of each row. Raises TypeError or DataError for a value that is not a text."""
    check_texts(texts)
    return [
        Question(task, [PAD] * task.length + encode_inputs([text], model.tokenizer, task.settings.max_input_tokens)[0])
        for task, text in zip(tasks, texts, strict=True)
    ]


# ---- batches ----


def rank_labels(
    model: Model, rows: Sequence[Question], device: str, few_shapes: bool = False
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the index of each row with label words, and the log probability of each label, padding included."""
    rank = compile(decode.ranked, device, frozen="params")
    size = GPU_RANKING_BATCH if DEVICES[device].place == "cuda" else RANKING_BATCH
    for group in groups((i for i, row in enumerate(rows) if row.task.words), rows):
        words = [[*rows[i].task.words.values()] for i in group]
        shape = max(map(len, words)), max(len(ids) for row in words for ids in row)
        for chosen, params, batch in batches(model, rows, group, size, few_shapes):
            labels = pad_labels([[*rows[i].task.words.values()] for i in chosen], *shape)
            yield from zip(chosen, rank(params, model.config, *batch, *labels), strict=True)


def write_texts(
    model: Model, rows: Sequence[Question], device: str, few_shapes: bool = False
) -> Iterator[tuple[int, str]]:
    """Yield the index of each row without label words, and the text that answers it."""
    for group in groups((i for i, row in enumerate(rows) if not row.task.words), rows, by_search=True):
        settings = rows[group[0]].task.settings
        for chosen, params, batch in batches(model, rows, group, WRITING_BATCH, few_shapes):
            cache = decode.Cache(params, model.config, *batch, settings.num_beams, device)
            for i, ids in zip(chosen, search(cache, len(chosen), settings), strict=True):
                yield i, model.tokenizer.decode(ids)


def groups(indices: Iterable[int], rows: Sequence[Question], by_search: bool = False) -> list[list[int]]:
    """Group the rows that may share a batch: soft prompts with each other, another method with itself."""
    found: dict[Any, list[int]] = {}
    for i in indices:
        task = rows[i].task
        key = id(task) if task.vectors is None else None, task.search if by_search else None
        found.setdefault(key, []).append(i)
    return list(found.values())


def batches(
    model: Model, rows: Sequence[Question], group: Sequence[int], size: int, few_shapes: bool
) -> Iterator[tuple[list[int], Tree, tuple[np.ndarray, np.ndarray]]]:
    """Yield rows of similar length together: their indices, the weights, and the encoder's input and mask.

    The input is vectors (B, L, D) for soft prompts, else ids (B, L). A soft prompt is directly in front of the tokens;
    padding is behind them. With `few_shapes`, the last row is repeated, and sizes are rounded up.
    """
    params, vectors, *_ = rows[group[0]].task
    for part in by_length([len(rows[i].ids) for i in group], size):
        chosen = [group[i] for i in part]
        length = None
        if few_shapes:
            chosen += chosen[-1:] * (round_up(len(chosen)) - len(chosen))
            length = round_up(max(len(rows[i].ids) for i in chosen), 8)
        ids, mask = pad([rows[i].ids for i in chosen], length)
        if vectors is None:
            yield chosen, params, (ids, mask)
            continue
        x = np.array(ops.embedding(model.params["shared"]["weight"], ids))
        for row, i in zip(x, chosen, strict=True):
            row[: rows[i].task.length] = rows[i].task.vectors
        yield chosen, params, (x, mask)


def round_up(size: int, least: int = 1) -> int:
    """Round up to a power of two of at least `least`, or to three quarters of a larger power."""
    power = max(least, 1 << (size - 1).bit_length())
    return power * 3 // 4 if max(size, least) <= power * 3 // 4 else power


def pad_labels(
    words: Sequence[Sequence[Sequence[int]]], width: int = 0, length: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Pad the label ids of each row for `decode.rank`: ids (B, N, T) and weights, float32.

    N is the largest number of labels, or `width` if it is larger; T is the longest label, or `length`.
    """
    width, length = max(width, *map(len, words)), max(length, *(len(ids) for row in words for ids in row))
    labels = np.full((len(words), width, length), PAD)
    weights = np.zeros(labels.shape, np.float32)
    for b, row in enumerate(words):
        for n, ids in enumerate(row):
            labels[b, n, : len(ids)] = ids
            weights[b, n, : len(ids)] = 1
    return labels, weights


# ---- free text, and a look inside ----


def search(step: decode.Step, rows: int, settings: Settings) -> list[list[int]]:
    """Write free text as the settings say, and return the ids of each row."""
    if settings.num_beams == 1:
        return decode.greedy(step, rows, settings.max_new_tokens)
    length_penalty = 1.0 if settings.length_penalty is None else settings.length_penalty
    return decode.beam_search(step, rows, settings.max_new_tokens, settings.num_beams, length_penalty)


def stream(model: Model, prompt: Prompt, text: str, device: str | None = None) -> Iterator[str]:
    """Yield the greedy free-text answer to one text piece by piece, while it is written."""
    rows = encode_rows(model, bind(model, [prompt]), [text])
    ((_, params, batch),) = batches(model, rows, [0], 1, few_shapes=False)
    step = decode.Cache(params, model.config, *batch, 1, device or default_device())
    ids: list[int] = []
    shown = ""
    for (token,) in decode.stream(step, 1, rows[0].task.settings.max_new_tokens):
        ids += [] if token == EOS else [int(token)]
        text = model.tokenizer.decode(ids)
        if text.startswith(shown):  # else a multi-byte character is incomplete: wait
            yield text[len(shown) :]
            shown = text


def intermediates(model: Model, prompt: Prompt, texts: str | Sequence[str], targets: str | Sequence[str] = "") -> Flat:
    """Run a forward pass in NumPy and return every hidden state and attention weight by name.

    Names follow the layers: `encoder.block.0.layer.0.attention_weights` (B, H, T, L), `.hidden_states` (B, T, D), and
    `logits` (B, T, V).

    Args:
        texts: one text or several.
        targets: the decoder's text: one for each input, or one for all.

    Example:
        >>> values = intermediates(model, prompt, "Two goals.", "sport")
        >>> values["encoder.block.0.layer.0.attention_weights"].shape
    """
    check_fit(prompt, model)
    texts, targets = ([x] if isinstance(x, str) else x for x in (texts, targets))
    check_texts(texts)
    sequences = encode_inputs(texts, model.tokenizer, Settings.saved(prompt.settings).max_input_tokens)
    inputs, mask = pad(sequences, max(map(len, sequences), default=0))
    wanted = [model.tokenizer.encode(target) for target in targets]
    labels, _ = pad(wanted, max(map(len, wanted)))
    labels = np.broadcast_to(labels, (len(texts), labels.shape[1]))
    values: Flat = {}
    params, visit = methods.apply(model.params, prompt.params), t5.recorder(values)
    values["logits"] = t5.forward(params, model.config, inputs, mask, t5.shift_right(labels), visit=visit)
    return values
