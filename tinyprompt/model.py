"""A frozen model, and a prompt tuned on it."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tinyprompt import ops
from tinyprompt.config import Config
from tinyprompt.errors import CheckpointError
from tinyprompt.tree import Flat, Tree, count, flatten

PROMPT = "encoder.prompt.embedding"  # the key of a soft prompt
PROBE = (  # white space, special pieces, and Unicode that normalisers treat differently
    "  A\tb\n c <extra_id_0>x</s> y  \ufb01 \u212b e\u0301 \uff76\uff9e \u1112\u1161\u11ab \u0130 \u00bd "
    "\U0001f469\u200d\U0001f467"
)


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with eos at the end."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without pad, eos and other special tokens."""
        ...

    def piece(self, id: int) -> str:
        """Return the piece of an id as the vocabulary spells it."""
        ...

    def __len__(self) -> int: ...


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return 16 hexadecimal digits of the sha256 of all pieces, and of the ids and texts of PROBE."""
    pieces = [tokenizer.piece(i) for i in range(len(tokenizer))]
    texts = [PROBE, *(" ".join(pieces[i : i + 1000]) for i in range(0, len(pieces), 1000))]
    found = [(ids := tokenizer.encode(text), tokenizer.decode(ids)) for text in texts]
    return hashlib.sha256(repr((pieces, found)).encode()).hexdigest()[:16]


@dataclass(frozen=True, repr=False, eq=False)
class Model:
    """A frozen T5: its configuration, its weights under their checkpoint names, and its tokenizer."""

    config: Config
    params: Tree
    tokenizer: Tokenizer
    name: str
    check_files: Callable[[], None] = lambda: None  # raises CheckpointError if the weight files have changed

    @functools.cached_property
    def fingerprint(self) -> str:
        """Two sha256 digests in hexadecimal, joined by a hyphen: of all weights, and (16 digits) of the tokenizer.

        The first covers names, shapes, dtypes and values, with 16-bit weights widened. A model without a tokenizer
        lacks the second.

        Raises:
            CheckpointError: A weight is not finite.
        """
        digest = hashlib.sha256()
        for name, value in sorted(flatten(self.params).items()):
            value = ops.widen(value)
            if not np.isfinite(value).all():
                raise CheckpointError(f"{self.name}: key {name!r} contains NaN or infinity; download it again")
            digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
            digest.update(np.ascontiguousarray(value).data)
        return digest.hexdigest() + (f"-{_tokenizer_digest(self.tokenizer)}" if self.tokenizer else "")

    def __repr__(self) -> str:
        c, size = self.config, count(flatten(self.params))
        layers = f"{c.num_layers} + {c.num_decoder_layers} layers"
        return f"Model({self.name}: {size:,} parameters, d_model {c.d_model}, {layers})"


@dataclass(frozen=True, repr=False, eq=False)
class Prompt:
    """A tuned prompt, or the arrays of another method, with all data required to use it.

    `Prompt(label_words=("bad", "good"))` is empty and represents the frozen model alone.
    """

    params: Flat = field(default_factory=dict)  # {PROMPT: (P, d_model)}, or the keys of another method (methods.py)
    model: str | None = None  # name of the frozen model, if known
    fingerprint: str | None = None  # fingerprint of the frozen model, if known
    label_words: tuple[str, ...] | None = None  # None: the answer is free text
    settings: dict[str, Any] = field(default_factory=dict)  # settings of its tuning run (settings.py)
    train_state: Flat | None = None  # needed to resume training (resume.py)
    verbalizer: dict[str, str] = field(default_factory=dict)  # label -> text that the model learns instead
    columns: dict[str, Any] = field(default_factory=dict)  # options of `Reader` for its rows

    @property
    def array(self) -> np.ndarray:
        """The vectors of a soft prompt, float32 (P, d_model). Raises CheckpointError for another method."""
        return self.vectors("this prompt")

    def vectors(self, path: Any) -> np.ndarray:
        """Return `array`. An error names the file."""
        if self.params.keys() != {PROMPT}:
            found = next((name for name in self.params if name != PROMPT), "nothing")
            raise CheckpointError(f"{path}: expected a soft prompt, {PROMPT!r} only; found {found!r}")
        return np.asarray(self.params[PROMPT], np.float32, order="C")

    def __repr__(self) -> str:
        arrays = [f"{name} {list(np.shape(x))}" for name, x in self.params.items()]
        shown = ", ".join(arrays[:1]) + (f" and {len(arrays) - 1} more" if len(arrays) > 1 else "")
        words = ", ".join(self.label_words[:8]) if self.label_words else "free text"
        return f"Prompt({shown or 'empty'}; {words}; tuned on {self.model or 'an unknown model'})"
