"""Answers of a frozen model with a prompt: label words by rank classification, or free text."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tinyprompt import generate, methods, t5
from tinyprompt.config import Config
from tinyprompt.data import by_length, encode_inputs, pad
from tinyprompt.device import compile, default_device
from tinyprompt.errors import DataError
from tinyprompt.fit import check_fit
from tinyprompt.model import Model, Prompt
from tinyprompt.settings import Settings
from tinyprompt.tokenizer import EOS
from tinyprompt.tree import Flat, Tree

ROWS = 64  # of a batch
SLOTS = 32  # of a cache, which double when they are full


def predict(model: Model, prompt: Prompt, texts: str | Sequence[str], device: str | None = None) -> Any:
    """Answer a text, or each of several: the likeliest label word of the prompt, or free text.

    `Prompt(label_words=("bad", "good"))` asks the bare frozen model. device: one word of `device.DEVICES`; None is the
    fastest that is installed. A string is answered with a string, a list with a list.
    Raises CheckpointError if the prompt belongs to another model.

    Example: `predict(model, prompt, "Two goals in the last minute.")`.
    """
    if isinstance(model, Prompt):
        raise TypeError("predict(model, prompt, texts): the model comes first, then the prompt")
    if isinstance(texts, str):
        return predict(model, prompt, [texts], device)[0]
    if prompt.label_words:
        best = label_scores(model, prompt, texts, device).argmax(1)
        return [prompt.label_words[i] for i in best]
    check_fit(prompt, model)
    settings, device = Settings.saved(prompt.settings), device or default_device()
    params, answers = methods.apply(model.params, prompt.params), [""] * len(texts)
    for chosen, batch in batches(model, settings, texts):
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
    settings, rank = Settings.saved(prompt.settings), compile(ranked, device or default_device())
    params = methods.apply(model.params, prompt.params)
    words = tuple(target_ids(model, prompt.label_words, has_label_head(model, prompt)).values())
    scores = np.empty((len(texts), len(words)), np.float32)
    for chosen, batch in batches(model, settings, texts):
        scores[chosen] = rank(params, model.config, *batch, words, settings.length_penalty or 0.0)
    if not np.isfinite(scores).all():
        raise FloatingPointError(
            "the log probabilities of the labels are not finite: the prompt or the model is damaged"
        )
    model.check_files()
    return scores


def batches(model: Model, settings: Settings, texts: Sequence[str]) -> Iterator[tuple[Any, tuple[Any, Any]]]:
    """Texts of similar length together: their places, and their ids and mask (B, L)."""
    sequences = encode_inputs(texts, model.tokenizer, settings.max_input_tokens)
    for chosen in by_length([len(ids) for ids in sequences], ROWS):
        yield chosen, pad([sequences[i] for i in chosen])


def target_ids(model: Model, label_words: Sequence[str] | None, label_head: bool) -> dict[str, tuple[int, ...]]:
    """The ids that stand for each label word: its number if the head has a row for each, else its pieces and eos.

    Raises DataError for two words that become the same ids.
    """
    words = enumerate(label_words or ())
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


def ranked(params: Tree, config: Config, input_ids, attention_mask, words, length_penalty: float = 0.0):
    """The score of `generate.rank` for each row and each label, given as ids with eos: (B, labels)."""
    states, mask = t5.encode(params, config, input_ids, attention_mask)
    logits_of = lambda ids: t5.decode(params, config, ids, states, mask)
    return generate.rank(logits_of, len(input_ids), words, length_penalty)


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
    inputs, mask = pad(encode_inputs(texts, model.tokenizer, Settings.saved(prompt.settings).max_input_tokens), 1)
    labels, _ = pad([model.tokenizer.encode(target) for target in targets], 1)
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
    encode, first_cache, decode_next = (compile(f, device) for f in (t5.encode, t5.first_cache, t5.decode_next))
    states, mask = encode(params, config, input_ids, attention_mask)
    cache = {name: np.repeat(x, beams, 0) for name, x in first_cache(params, config, states).items()}
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
