"""Answers of a frozen model with a prompt: label words by rank classification, or free text."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tinyprompt import generate, methods, ops, t5
from tinyprompt.config import Config
from tinyprompt.data import by_length, encode_inputs, pad
from tinyprompt.device import DEVICES, compile, default_device
from tinyprompt.errors import DataError
from tinyprompt.fit import check_fit
from tinyprompt.model import PROMPT, Model, Prompt
from tinyprompt.settings import Settings
from tinyprompt.tokenizer import EOS, PAD
from tinyprompt.tree import Flat, Tree

ROWS = 64  # of a batch that is written
RANKED = {"numpy": 16, "cpu": 16, "cuda": 64}  # rows of a batch of which labels are ranked: what a CPU's cache holds
SLOTS = 32  # of a cache, which double when they are full
LOGITS = 2**19  # of the labels of a row that go through the decoder together


def predict(model: Model, prompt: Prompt, texts: str | Sequence[str], device: str | None = None) -> Any:
    """Answer a text, or each of several: the likeliest label word of the prompt, or free text.

    `Prompt(label_words=("bad", "good"))` asks the bare frozen model. device: one word of `device.DEVICES`; None is the
    fastest that is installed. A string is answered with a string, a list with a list.
    Raises CheckpointError if the prompt belongs to another model.

    Example: `predict(model, prompt, "Two goals in the last minute.")`.
    """
    if not isinstance(model, Model) or not isinstance(prompt, Prompt):
        raise TypeError("predict(model, prompt, texts): the model comes first, as load opens it, then a Prompt")
    if isinstance(texts, str):
        return predict(model, prompt, [texts], device)[0]
    if prompt.label_words:
        best = label_scores(model, prompt, texts, device).argmax(1)
        return [prompt.label_words[i] for i in best]
    check_fit(prompt, model)
    settings, device = Settings.saved(prompt.settings), device or default_device()
    params, answers = methods.apply(model.params, prompt.params), [""] * len(texts)
    for chosen, batch in batches(model, settings, texts, ROWS):
        step = next_token(params, model.config, *batch, settings.num_beams, device)
        for i, ids in zip(chosen, write(step, len(chosen), settings), strict=True):
            answers[i] = model.tokenizer.decode(ids)
    model.check_files()
    return answers


def label_scores(model: Model, prompt: Prompt, texts: Sequence[str], device: str | None = None) -> np.ndarray:
    """The log probability of each label word for each text, (texts, labels), float32.

    It is divided by a power of the label's length if the settings have a length_penalty.
    Raises CheckpointError if the prompt belongs to another model.
    """
    check_fit(prompt, model)
    device, settings = device or default_device(), Settings.saved(prompt.settings)
    rank, rows = compile(ranked, device), RANKED[DEVICES[device][0]]
    params = methods.apply(model.params, prompt.params)
    words = list(target_ids(model, prompt.label_words, has_label_head(model, prompt)).values())
    scores = np.empty((len(texts), len(words)), np.float32)
    for chosen, batch in batches(model, settings, texts, rows):
        scores[chosen] = rank(params, model.config, *batch, *labels_of([words] * len(chosen)))
    model.check_files()
    return finite(scores / np.array([len(ids) for ids in words]) ** (settings.length_penalty or 0.0))


def finite(scores: np.ndarray) -> np.ndarray:
    """The scores, float32, if all of them are numbers. Raises FloatingPointError."""
    if not np.isfinite(scores).all():
        raise FloatingPointError(
            "the log probabilities of the labels are not finite: the prompt or the model is damaged"
        )
    return scores.astype(np.float32)


def probabilities(scores: np.ndarray) -> np.ndarray:
    """The probability of each label among them all, from their log probabilities (..., labels)."""
    return np.exp(scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True))


class Answer(NamedTuple):
    """What a model says to a text and, of label words, the probability of each among them all."""

    text: str
    probabilities: dict[str, float]  # empty for free text


def answer(
    model: Model, rows: Sequence[tuple[Prompt, str]], device: str | None = None, few_shapes: bool = False
) -> list[Answer]:
    """Answer texts, each with a prompt of its own, in shared batches: one frozen model, many tasks.

    Prompts may differ in length, in label words, and in free text or not. Row for row, the answer is that of
    `predict`: the vectors stand directly before the tokens, and all padding is behind them (Lester et al. 2021,
    section 1). few_shapes: round the sizes of batches up, for a server, where each new size opens a session.
    Raises CheckpointError for a prompt that belongs to another model or is of another method.

    Example: `answer(model, [(topic, "Two goals in the last minute."), (sentiment, "The soup was cold.")])`.
    """
    device = device or default_device()
    asked = {id(prompt): Asked.of(model, prompt) for prompt, _ in rows}
    mixed = [(asked[id(prompt)], asked[id(prompt)].encode(model, text)) for prompt, text in rows]
    answers: dict[int, Answer] = {}
    ranks = [i for i, (task, _) in enumerate(mixed) if task.words]
    width = max((len(task.words) for task in asked.values()), default=1)
    length = max((len(ids) for task in asked.values() for ids in task.words.values()), default=0)
    rank = compile(ranked, device)
    for chosen, batch in mixed_batches(model, mixed, ranks, RANKED[DEVICES[device][0]], few_shapes):
        labels = labels_of([[*mixed[i][0].words.values()] for i in chosen], width, length)
        found = rank(model.params, model.config, *batch, *labels)
        answers |= {i: mixed[i][0].choose(scores) for i, scores in zip(chosen, found, strict=True)}
    writers: dict[Any, list[int]] = {}
    for i, (task, _) in enumerate(mixed):
        if not task.words:
            writers.setdefault(task.writing, []).append(i)
    for places in writers.values():
        settings = mixed[places[0]][0].settings
        for chosen, batch in mixed_batches(model, mixed, places, ROWS, few_shapes):
            step = next_token(model.params, model.config, *batch, settings.num_beams, device)
            written = write(step, len(chosen), settings)
            answers |= {i: Answer(model.tokenizer.decode(ids), {}) for i, ids in zip(chosen, written, strict=True)}
    model.check_files()
    return [answers[i] for i in range(len(rows))]


class Asked(NamedTuple):
    """A prompt of `answer` with what each of its rows needs."""

    vectors: np.ndarray  # (P, d_model)
    words: dict[str, tuple[int, ...]]  # ids of each label word; empty for free text
    settings: Settings

    @classmethod
    def of(cls, model: Model, prompt: Prompt) -> "Asked":
        """Raises CheckpointError for a prompt that cannot share a batch."""
        check_fit(prompt, model)
        if prompt.params:
            prompt.vectors("this prompt")
        vectors = prompt.params.get(PROMPT, np.zeros((0, model.config.d_model), np.float32))
        return cls(vectors, target_ids(model, prompt.label_words, False), Settings.saved(prompt.settings))

    def encode(self, model: Model, text: str) -> list[int]:
        """Ids of a text behind places for the vectors."""
        (ids,) = encode_inputs([text], model.tokenizer, self.settings.max_input_tokens)
        return [PAD] * len(self.vectors) + ids

    @property
    def writing(self) -> tuple:
        """Rows that agree in this are written together."""
        return self.settings.num_beams, self.settings.max_new_tokens, self.settings.length_penalty

    def choose(self, scores: np.ndarray) -> Answer:
        """The likeliest label word, given the log probability of each and of some padding."""
        lengths = np.array([len(ids) for ids in self.words.values()])
        own = finite(scores[: len(lengths)] / lengths ** (self.settings.length_penalty or 0.0))
        words, shares = list(self.words), probabilities(own).tolist()
        return Answer(words[own.argmax()], dict(zip(words, shares, strict=True)))


def few(size: int, least: int = 1) -> int:
    """A size rounded up to a power of two of at least `least`, or to three quarters of a greater one."""
    power = max(least, 1 << (size - 1).bit_length())
    return power * 3 // 4 if max(size, least) <= power * 3 // 4 else power


def mixed_batches(
    model: Model, mixed: Sequence[tuple[Asked, list[int]]], places: Sequence[int], size: int, few_shapes: bool = False
) -> Iterator[tuple[list[int], tuple[np.ndarray, np.ndarray]]]:
    """Rows of similar length together: their places, and what the encoder reads, vectors (B, L, D) and mask (B, L).

    few_shapes: the last place is repeated, and L is rounded up further, since each shape is a graph of its own.
    """
    for part in by_length([len(mixed[i][1]) for i in places], size):
        chosen = [places[i] for i in part]
        length = None
        if few_shapes:
            chosen += chosen[-1:] * (few(len(chosen)) - len(chosen))
            length = few(max(len(mixed[i][1]) for i in chosen), 8)
        ids, mask = pad([mixed[i][1] for i in chosen], length)
        x = np.array(ops.embedding(model.params["shared"]["weight"], ids))
        for row, i in zip(x, chosen, strict=True):
            vectors = mixed[i][0].vectors
            row[: len(vectors)] = vectors
        yield chosen, (x, mask)


def labels_of(
    words: Sequence[Sequence[Sequence[int]]], width: int = 0, length: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Label words of each row as `generate.rank` reads them: ids (B, N, T) and weights, float32.

    N and T are those of the widest row and the longest word, or more.
    """
    width, length = max(width, *map(len, words)), max(length, *(len(ids) for row in words for ids in row))
    labels = np.full((len(words), width, length), PAD)
    weights = np.zeros(labels.shape, np.float32)
    for i, row in enumerate(words):
        for j, ids in enumerate(row):
            labels[i, j, : len(ids)] = ids
            weights[i, j, : len(ids)] = 1
    return labels, weights


def batches(model: Model, settings: Settings, texts: Sequence[str], size: int) -> Iterator[tuple[Any, tuple[Any, Any]]]:
    """Texts of similar length together: their places, and their ids and mask (B, L), B at most `size`."""
    sequences = encode_inputs(texts, model.tokenizer, settings.max_input_tokens)
    for chosen in by_length([len(ids) for ids in sequences], size):
        yield chosen, pad([sequences[i] for i in chosen])


def target_ids(model: Model, label_words: Sequence[str] | None, label_head: bool) -> dict[str, tuple[int, ...]]:
    """The ids that stand for each label word: its number if the head has a row for each, else its pieces and eos.

    Raises DataError for two words that become the same ids, TypeError for one word in place of several.
    """
    if isinstance(label_words, str):
        raise TypeError(f"label words: expected several, as ('bad', 'good'), found the text {label_words!r}")
    for word in (label_words := tuple(label_words or ())):
        if label_words.count(word) > 1:
            raise DataError(f"label word {word!r} is given twice; give each once")
    words = enumerate(label_words)
    found = {word: (i,) if label_head else tuple(model.tokenizer.encode(word)) for i, word in words}
    by_ids = {ids: word for word, ids in found.items()}
    for word, ids in found.items():
        if by_ids[ids] != word:
            told = f"label words {word!r} and {by_ids[ids]!r} are the same to the tokenizer (ids {list(ids)})"
            raise DataError(f"{told}, so no answer could tell them apart; choose others, or map them with --words")
    return found


def has_label_head(model: Model, prompt: Prompt) -> bool:
    """Whether a vector for each label word replaces the output head."""
    return len(prompt.params.get(methods.HEAD, ())) not in (0, model.config.vocab_size)


def ranked(params: Tree, config: Config, input_ids, attention_mask, labels, weights):
    """The log probability of each label of each row, (B, N), float32. Shapes of labels and weights: `generate.rank`.

    Some labels go through the decoder side by side, as many as have LOGITS a row.
    """
    encoded, logits_of = t5.encode(params, config, input_ids, attention_mask), partial(t5.logits, params, config)
    some = max(1, LOGITS // (config.vocab_size * labels.shape[2]))
    scores = []
    for i in range(0, labels.shape[1], some):
        ids, weight = labels[:, i : i + some], weights[:, i : i + some]
        states = t5.decoder_states(params, config, generate.shift_right(ids), *encoded)
        scores.append(generate.rank(logits_of, states, ids, weight))
    return np.concatenate(scores, axis=1)


def stream(model: Model, prompt: Prompt, text: str, device: str | None = None) -> Iterator[str]:
    """The free-text answer to one text, greedily, piece by piece while it is written; joined, what `predict` says."""
    check_fit(prompt, model)
    settings = Settings.saved(prompt.settings)
    batch = pad(encode_inputs([text], model.tokenizer, settings.max_input_tokens))
    params = methods.apply(model.params, prompt.params)
    step = next_token(params, model.config, *batch, 1, device or default_device())
    ids: list[int] = []
    said = ""
    for (token,) in generate.stream(step, 1, settings.max_new_tokens):
        ids += [] if token == EOS else [int(token)]
        answer = model.tokenizer.decode(ids)
        if answer.startswith(said):  # not if bytes have become a letter only now
            yield answer[len(said) :]
            said = answer


def intermediates(model: Model, prompt: Prompt, texts: str | Sequence[str], targets: str | Sequence[str] = "") -> Flat:
    """Look inside: every hidden state and attention weight of a forward pass by NumPy, by name.

    The names are those of the layers: `encoder.block.0.layer.0.attention_weights` (B, H, T, L), and `.hidden_states`
    (B, T, D) behind each layer. targets: what the decoder reads, one for each text or one for all.

    Example: `intermediates(model, prompt, "Two goals.", "sport")["encoder.block.0.layer.0.attention_weights"]`.
    """
    check_fit(prompt, model)
    texts, targets = ([x] if isinstance(x, str) else x for x in (texts, targets))
    sequences = encode_inputs(texts, model.tokenizer, Settings.saved(prompt.settings).max_input_tokens)
    inputs, mask = pad(sequences, max(map(len, sequences), default=0))
    wanted = [model.tokenizer.encode(target) for target in targets]
    labels, _ = pad(wanted, max(map(len, wanted)))
    labels = np.broadcast_to(labels, (len(texts), labels.shape[1]))
    values: Flat = {}
    params = methods.apply(model.params, prompt.params)
    values["logits"] = t5.forward(
        params, model.config, inputs, mask, generate.shift_right(labels), visit=t5.recorder(values)
    )
    return values


def write(step: generate.Step, rows: int, settings: Settings) -> list[list[int]]:
    """Free text, as the settings have it: ids of each row."""
    if settings.num_beams == 1:
        return generate.greedy(step, rows, settings.max_new_tokens)
    length_penalty = 1.0 if settings.length_penalty is None else settings.length_penalty
    return generate.beam_search(step, rows, settings.max_new_tokens, settings.num_beams, length_penalty)


def next_token(
    params: Tree, config: Config, input_ids, attention_mask, beams: int = 1, device: str = "numpy"
) -> generate.Step:
    """The `step` of `generate` for some inputs (B, L), each `beams` times: logits of the next token (B * beams, V).

    The cache has more slots than tokens, all that is new is written into it, and it doubles when it is full: so
    there are few shapes, each of which is a graph.
    """
    encode = compile(t5.encode, device)
    first_cache, decode_next = (compile(f, device, writes=True) for f in (t5.first_cache, t5.decode_next))
    states, mask = encode(params, config, input_ids, attention_mask)
    cache = {name: np.repeat(x, beams, 0) for name, x in first_cache(params, config, states).items()}
    for name, x in cache.items():
        x.flags.writeable = "SelfAttention" in name  # the rest stays as it is, so that a GPU is given it once
    mask, position, width = np.repeat(mask, beams, 0), 0, 0
    params = {name: part for name, part in params.items() if name != "encoder"}

    def step(tokens, rows):
        nonlocal position, width
        more = (width or SLOTS) if position == width else 0
        width += more
        for name in cache:
            if "SelfAttention" in name:  # all beams of an input attend to the same encoder states
                kept = cache[name] if rows is None else cache[name][rows]
                cache[name] = np.pad(kept, ((0, 0), (0, 0), (0, more), (0, 0))) if more else kept
        logits, new = decode_next(params, config, cache, tokens, np.array([position]), width, mask)
        for name, value in new.items():
            cache[name][:, :, [position - width]] = value
        position += 1
        return logits

    return step
