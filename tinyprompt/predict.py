"""Answers of a frozen model with a prompt: label words by rank classification, or free text.

`answer` is the engine. It takes rows of many prompts, and returns texts and probabilities. `predict`, `label_scores`
and `ensemble` are views of it.

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
RANKING_BATCH = 16  # rows that fit into the cache of a CPU
GPU_RANKING_BATCH = 64


class Answer(NamedTuple):
    """The answer to a text."""

    text: str
    probabilities: dict[str, float]  # probability of each label word, with sum 1; empty for free text


@overload
def predict(  # type: ignore[overload-overlap]  # a string is a sequence of strings, too
    model: Model, prompt: Prompt, texts: str, device: str | None = None
) -> str: ...
@overload
def predict(model: Model, prompt: Prompt, texts: Sequence[str], device: str | None = None) -> list[str]: ...
def predict(model: Model, prompt: Prompt, texts: str | Sequence[str], device: str | None = None) -> str | list[str]:
    """Answer one text or several with the most likely label word of the prompt, or with free text.

    Args:
        model: The frozen model.
        prompt: A tuned prompt. `Prompt(label_words=("bad", "good"))` uses the frozen model alone.
        texts: A string, or a sequence of strings.
        device: A device of `device.DEVICES`. The default is "cpu" with ONNX Runtime, else "numpy".

    Returns:
        A string for a string, and a list for a sequence.

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

    Soft prompts of all lengths and tasks share batches. Prompts of other methods need separate batches, because they
    change the weights.

    Args:
        model: The frozen model.
        rows: Pairs of a prompt and a text.
        device: A device of `device.DEVICES`. The default is "cpu" with ONNX Runtime, else "numpy".
        few_shapes: Round batch sizes and lengths up, so that a server compiles few graphs.

    Returns:
        An Answer for each row, in order.

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
    """Compute the log probability of each label word for each text.

    Args:
        model: The frozen model.
        prompt: A prompt with label words.
        texts: The texts.
        device: A device of `device.DEVICES`. The default is "cpu" with ONNX Runtime, else "numpy".

    Returns:
        The log probabilities (texts, labels), float32. With the setting `length_penalty`, each is divided by the number
        of tokens of its label to that power.

    Raises:
        CheckpointError: The prompt belongs to another model.
        DataError: The prompt has no label words.
        FloatingPointError: The log probabilities are not finite.

    Example:
        >>> label_scores(model, prompt, ["Two goals."]).argmax(-1)
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
    """Normalise the log probabilities of labels (..., N) over the last axis."""
    return np.exp(scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True))


# ---- prompts bound to a model ----


class Bound(NamedTuple):
    """A prompt that fits a model, ready to answer."""

    params: Tree  # weights of the forward pass
    vectors: np.ndarray | None  # a soft prompt (P, D), or None for another method, whose arrays are in `params`
    words: dict[str, tuple[int, ...]]  # ids of each label word; empty for free text
    settings: Settings

    @classmethod
    def of(cls, model: Model, prompt: Prompt) -> "Bound":
        """Bind a prompt to a model. Raises CheckpointError if the prompt does not belong to the model."""
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
        """The number of vectors before a text."""
        return 0 if self.vectors is None else len(self.vectors)

    @property
    def search(self) -> tuple:
        """The settings of decoding. Rows with equal settings are decoded together."""
        return self.settings.num_beams, self.settings.max_new_tokens, self.settings.length_penalty

    def scaled(self, scores: np.ndarray) -> np.ndarray:
        """Divide log probabilities by a power of the label lengths, and drop those of padding.

        Raises FloatingPointError if they are not finite.
        """
        lengths = np.array([len(ids) for ids in self.words.values()])
        scores = scores[: len(lengths)] / lengths ** (self.settings.length_penalty or 0.0)
        if not np.isfinite(scores).all():
            raise FloatingPointError("the log probabilities of the labels are not finite: prompt or model is damaged")
        return scores.astype(np.float32)

    def choose(self, scores: np.ndarray) -> Answer:
        """Return the most likely label word, and the probability of each label word."""
        scores, words = self.scaled(scores), list(self.words)
        return Answer(words[scores.argmax()], dict(zip(words, probabilities(scores).tolist(), strict=True)))


class Question(NamedTuple):
    """A row of `answer`."""

    task: Bound
    ids: list[int]  # ids of the text after one pad for each prompt vector


def bind(model: Model, prompts: Sequence[Prompt]) -> list[Bound]:
    """Bind each prompt to the model. Equal prompts are bound once."""
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
    """Yield the index of each row with label words, and the log probabilities of its labels, including padding."""
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
    """Yield the index of each row without label words, and the text of its answer."""
    for group in groups((i for i, row in enumerate(rows) if not row.task.words), rows, by_search=True):
        settings = rows[group[0]].task.settings
        for chosen, params, batch in batches(model, rows, group, WRITING_BATCH, few_shapes):
            cache = decode.Cache(params, model.config, *batch, settings.num_beams, device)
            for i, ids in zip(chosen, search(cache, len(chosen), settings), strict=True):
                yield i, model.tokenizer.decode(ids)


def groups(indices: Iterable[int], rows: Sequence[Question], by_search: bool = False) -> list[list[int]]:
    """Group the rows that may share a batch: all soft prompts, and rows with the same prompt of another method."""
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

    The input is vectors (B, L, D) for soft prompts, else ids (B, L). A soft prompt directly precedes the tokens, and
    padding follows them. With `few_shapes`, the last row is repeated, and sizes are rounded up.
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
    """Round up to a power of two of at least `least`, or to three quarters of a larger power of two."""
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


# ---- free text, and intermediate values ----


def search(step: decode.Step, rows: int, settings: Settings) -> list[list[int]]:
    """Generate free text according to the settings. Returns the ids of each row."""
    if settings.num_beams == 1:
        return decode.greedy(step, rows, settings.max_new_tokens)
    length_penalty = 1.0 if settings.length_penalty is None else settings.length_penalty
    return decode.beam_search(step, rows, settings.max_new_tokens, settings.num_beams, length_penalty)


def stream(model: Model, prompt: Prompt, text: str, device: str | None = None) -> Iterator[str]:
    """Yield the greedy free-text answer to a text in pieces, as they are generated.

    Args:
        model: The frozen model.
        prompt: A tuned prompt.
        text: The text to answer.
        device: A device of `device.DEVICES`. The default is "cpu" with ONNX Runtime, else "numpy".

    Raises:
        CheckpointError: The prompt belongs to another model.

    Example:
        >>> for piece in stream(model, prompt, "Two goals in the last minute."):
        ...     print(piece, end="", flush=True)
    """
    rows = encode_rows(model, bind(model, [prompt]), [text])
    ((_, params, batch),) = batches(model, rows, [0], 1, few_shapes=False)
    step = decode.Cache(params, model.config, *batch, 1, device or default_device())
    ids: list[int] = []
    shown = ""
    for (token,) in decode.stream(step, 1, rows[0].task.settings.max_new_tokens):
        ids += [] if token == EOS else [int(token)]
        text = model.tokenizer.decode(ids)
        if text.startswith(shown):  # otherwise a multi-byte character is incomplete
            yield text[len(shown) :]
            shown = text


def intermediates(model: Model, prompt: Prompt, texts: str | Sequence[str], targets: str | Sequence[str] = "") -> Flat:
    """Run a forward pass in NumPy and return every hidden state and attention weight by name.

    Args:
        model: The frozen model.
        prompt: A tuned prompt.
        texts: One text or several.
        targets: The text of the decoder, for each input or for all.

    Returns:
        The values by the name of their layer: `encoder.block.0.layer.0.attention_weights` (B, H, T, L),
        `.hidden_states` (B, T, D), and `logits` (B, T, V).

    Raises:
        CheckpointError: The prompt belongs to another model.

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
