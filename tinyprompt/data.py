"""Rows of text, and batches of ids."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from tinyprompt.config import PAD
from tinyprompt.errors import DataError
from tinyprompt.model import Tokenizer
from tinyprompt.settings import Settings

MAX_LABELS = 50
TEMPLATE = "{input} answer: {target}"  # a solved example before an input
FUNCTION_WORDS = ("a", "an", "and", "as", "at", "by", "for", "from", "in", "is", "it", "of", "on", "or", "the", "to")
TASKS = ("auto", "classify", "generate")  # for files with columns: whether targets are label words
NO_IDS: Mapping[str, Sequence[int]] = MappingProxyType({})


class Row(NamedTuple):
    """One example: an input text and a target text."""

    input: str
    target: str
    answers: tuple[str, ...] = ()  # all correct answers to a question
    group: str = ""  # rows of a group are scored and split together
    task: str = ""  # name of the row's task, in a mixture


class Batch(NamedTuple):
    """Padded ids of rows. Shapes: input_ids and attention_mask (B, L), labels and weights (B, T)."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray
    weights: np.ndarray  # float32: 1 at label tokens, 0 at padding


def check_text(text: str, where: str) -> None:
    """Raise DataError for a text with a lone surrogate, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = text[error.start : error.end].encode("unicode_escape").decode()
        raise DataError(f"{where}: contains {broken}, an unpaired surrogate; write the text in UTF-8") from None


def label_words(rows: Sequence[Row], task: str = "auto") -> tuple[str, ...] | None:
    """Return the distinct targets in sorted order if they are labels, or None for free text.

    Args:
        rows: Rows with targets.
        task: "classify": targets are labels. "generate": targets are free text. "auto": targets are labels if there are
            at most 50, and each occurs twice on average.

    Raises:
        DataError: Two labels are the same number, such as 1 and 1.0.
    """
    found = sorted({row.target for row in rows})
    labels = task == "classify" or (task == "auto" and 2 <= len(found) <= min(MAX_LABELS, len(rows) / 2))
    same = [word for word in found if re.fullmatch(r"-?\d+\.0+", word) and word.partition(".")[0] in found]
    if labels and same:
        told = f"the targets {same[0].partition('.')[0]!r} and {same[0]!r} are the same number"
        raise DataError(f"{told}; write it the same way everywhere, or map both with words")
    return tuple(found) if labels else None


def verbalizer(labels: Sequence[str], tokenizer: Tokenizer) -> dict[str, str]:
    """Choose a shorter text for each label that consists of several pieces, because such labels train more slowly.

    The text is the first word of the label, in lower case, that no other label contains, function words such as "or"
    apart. If there is no such word, or if it has as many pieces, the label keeps its own text and is omitted from the
    result.

    Example:
        >>> verbalizer(["TECH ISSUE", "Lost or damaged parcel"], model.tokenizer)
        {'TECH ISSUE': 'tech', 'Lost or damaged parcel': 'lost'}
    """
    pieces = {label: len(tokenizer.encode(label)) for label in labels}
    words = {label: re.findall(r"[^\W_]+", label.lower()) for label in labels}
    times = Counter(word for label in labels for word in {*words[label], label})
    chosen = {}
    for label in labels:
        word = next((word for word in words[label] if times[word] == 1 and word not in FUNCTION_WORDS), label)
        if len(tokenizer.encode(word)) < pieces[label]:
            chosen[label] = word
    return chosen


def split(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows at random. The second part gets a `share` of all rows (at least one) and of every frequent target.

    Rows with the same input stay together. Raises DataError if the first part would be empty.
    """
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    of: dict[str, list[int]] = {}
    for i in order:
        of.setdefault(rows[i].target, []).append(i)
    # The rows of each target are spread evenly over 0 to 1. Rows below the share go to the second part.
    place = {i: (k + 0.5) / len(places) for places in of.values() for k, i in enumerate(places)}
    order = sorted(order, key=place.__getitem__)
    copies: dict[str, list[int]] = {}
    for i in order:
        copies.setdefault(rows[i].input, []).append(i)
    wanted, second = max(1, round(len(rows) * share)), list[int]()
    for same in copies.values():
        if len(second) >= wanted or len(second) + len(same) == len(rows) > wanted:
            break
        second += same
    if not second:
        raise DataError(f"all {len(rows)} rows have the same input, which cannot be split; give dev rows")
    chosen = set(second)
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(second)]


def width(longest: int) -> int:
    """Round a length up to one of few widths, because a new width compiles a graph. Lengths up to 4 stay exact."""
    multiple = 1 if longest <= 4 else 4 if longest <= 32 else 8
    return -(-longest // multiple) * multiple


def pad(sequences: Sequence[Sequence[int]], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pad ids on the right with 0: ids (B, L) and their 0/1 mask. L is the `width` of the longest row, or `length`."""
    if not len(sequences):
        raise DataError("no rows: expected at least one")
    out = np.full((len(sequences), length or width(max(map(len, sequences)))), PAD)
    mask = np.zeros(out.shape, np.int64)
    for row, ids in enumerate(sequences):
        out[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    return out, mask


def check_texts(texts: Sequence[str]) -> None:
    """Raise TypeError or DataError for a value that is not a text. The message has its index."""
    if isinstance(texts, str):
        raise TypeError(f"expected a list of texts, found the text {texts!r:.60}")
    for i, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise TypeError(f"text {i}: expected a text, found {text!r:.60}")
        check_text(text, f"text {i}")


def encode_inputs(texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int) -> list[list[int]]:
    """Return the ids of each text. A text with more than `max_tokens` ids is truncated, but keeps eos."""
    return [
        ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]] for ids in map(tokenizer.encode, texts)
    ]


def target_ids(
    tokenizer: Tokenizer,
    label_words: Sequence[str] | None,
    label_head: bool = False,
    verbalizer: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, tuple[int, ...]]:
    """Return the ids of each label word: its tokens and eos, or its index if the output head has a row per label.

    Args:
        verbalizer: Texts to encode in place of label words.

    Raises:
        DataError: Two words have the same ids, or a word is repeated.
        TypeError: A string was given instead of several words.
    """
    if isinstance(label_words, str):
        raise TypeError(f"label words: expected several, as ('bad', 'good'), found the text {label_words!r}")
    for word in (label_words := tuple(label_words or ())):
        if label_words.count(word) > 1:
            raise DataError(f"label word {word!r} is repeated; give each word once")
    words = enumerate(label_words)
    found = {word: (i,) if label_head else tuple(tokenizer.encode(verbalizer.get(word, word))) for i, word in words}
    by_ids = {ids: word for word, ids in found.items()}
    for word, ids in found.items():
        if by_ids[ids] != word:
            told = f"label words {word!r} and {by_ids[ids]!r} are the same to the tokenizer (ids {list(ids)})"
            raise DataError(f"{told}, so answers could not distinguish them; choose others, or map them with --words")
    return found


def in_context(
    texts: Sequence[str], shots: Sequence[Row], template: str, tokenizer: Tokenizer, max_tokens: int
) -> list[str]:
    """Prepend solved examples to each text, like prompts for GPT-3 (Brown et al. 2020, arXiv:2005.14165, section 2).

    Args:
        template: The format of an example, with {input} and then {target}. The text itself ends before its target.

    Raises:
        DataError: The template lacks a field, or a text with its examples exceeds max_tokens.
    """
    field = re.compile(r"\{(input|target)\}")
    if field.findall(template) != ["input", "target"]:
        raise DataError(f"template {template!r}: expected {{input}} once, and {{target}} once after it")

    def filled(template: str, row: Row) -> str:
        return field.sub(lambda found: getattr(row, found[1]), template)

    solved = [filled(template, row) for row in shots]
    question = template.partition("{target}")[0].rstrip()
    out = ["\n".join([*solved, filled(question, Row(text, ""))]) for text in texts]
    longest = max(out, key=lambda text: len(tokenizer.encode(text)), default="")
    tokens = len(tokenizer.encode(longest))
    if tokens > max_tokens:
        raise DataError(
            f"the input that ends in {longest[-40:]!r} has {tokens} tokens with its {len(shots)} examples, but only "
            f"{max_tokens} are read; use fewer or shorter examples, or increase --max-input-tokens"
        )
    return out


def by_length(lengths: Sequence[int], size: int) -> list[np.ndarray]:
    """Return batches of at most `size` indices in order of length, to minimise padding."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


def batch_of(
    rows: Sequence[Row], tokenizer: Tokenizer, max_tokens: int, target_ids: Mapping[str, Sequence[int]] = NO_IDS
) -> Batch:
    """Encode rows as a batch.

    Args:
        rows: Rows with an input and a target.
        tokenizer: The tokenizer of the model.
        max_tokens: Longer inputs are truncated to this number of ids.
        target_ids: Ids for targets that are not tokenized, such as the indices of labels.

    Returns:
        The padded ids: input_ids and attention_mask (B, L), labels and weights (B, T).

    Example:
        >>> batch = batch_of([Row("Two goals.", "sport")], model.tokenizer, 256)
    """
    return padded(encoded(rows, tokenizer, max_tokens, target_ids))


def encoded(
    rows: Sequence[Row], tokenizer: Tokenizer, max_tokens: int, target_ids: Mapping[str, Sequence[int]] = NO_IDS
) -> list[tuple[list[int], Sequence[int]]]:
    """Return the ids of the input and of the target of each row. The arguments are those of `batch_of`."""
    texts = [row.input for row in rows]
    check_texts(texts)
    targets = [target_ids.get(row.target) or tokenizer.encode(row.target) for row in rows]
    return list(zip(encode_inputs(texts, tokenizer, max_tokens), targets, strict=True))


def padded(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """Pad the ids of inputs and targets to a batch."""
    input_ids, mask = pad([ids for ids, _ in pairs])
    labels, weights = pad([ids for _, ids in pairs])
    return Batch(input_ids, mask, labels, weights.astype(np.float32))


def batches_in_order_of_length(rows: Sequence[Row], tokenizer: Tokenizer, max_tokens: int) -> Iterator[Batch]:
    """Yield all rows once, in batches of 64 with little padding."""
    pairs = encoded(rows, tokenizer, max_tokens)
    return (padded([pairs[i] for i in chosen]) for chosen in by_length([len(ids) for ids, _ in pairs], 64))


def training_batches(
    rows: Sequence[Row], tokenizer: Tokenizer, settings: Settings, target_ids: Mapping[str, Sequence[int]] = NO_IDS
) -> Iterator[Batch]:
    """Yield full batches without end. Rows are shuffled in every epoch, and rows of similar length share a batch.

    Eight batches at a time are taken from the shuffled rows and sorted by length, so batches are random and have little
    padding. The remaining rows of an epoch are used in the next epoch.
    """
    size, pairs = settings.batch_size, encoded(rows, tokenizer, settings.max_input_tokens, target_ids)
    rng = np.random.default_rng(settings.seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < 8 * size:
            waiting += rng.permutation(len(rows)).tolist()
        pool, waiting = np.array(waiting[: 8 * size]), waiting[8 * size :]
        batches = by_length([len(pairs[i][0]) for i in pool], size)
        for i in rng.permutation(len(batches)):
            yield padded([pairs[k] for k in pool[batches[i]]])


def random_batch(vocab_size: int, rows: int, tokens: int, targets: int, seed: int = 0) -> Batch:
    """Draw a random batch. The first row is full, the last row is padded on the left, and the others on the right.

    Shapes: input_ids (rows, tokens), labels (rows, targets).
    """
    rng = np.random.default_rng(seed)

    def mask_of(width: int) -> np.ndarray:
        lengths = np.r_[width, rng.integers(1, width + 1, rows - 1)]
        return (np.arange(width) < lengths[:, None]).astype(np.int64)

    mask, weights = mask_of(tokens), mask_of(targets)
    mask[1:][-1:] = mask[1:][-1:, ::-1]
    ids = rng.integers(3, vocab_size, mask.shape) * mask
    labels = rng.integers(3, vocab_size, weights.shape) * weights
    return Batch(ids, mask, labels, weights.astype(np.float32))
