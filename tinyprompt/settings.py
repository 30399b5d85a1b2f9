"""The settings of a tuning run. The command line, the checks and the docs use this one definition."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, get_args

from tinyprompt.errors import CheckpointError
from tinyprompt.methods import INITS, METHODS
from tinyprompt.optim import OPTIMIZERS, SCHEDULES


class Bound(NamedTuple):
    """The bound of a number, as a predicate and in words."""

    holds: Callable[[float], bool]
    words: str


ANY = Bound(lambda x: True, "a number")
POSITIVE = Bound(lambda x: 0 < x < math.inf, "more than 0")
COUNT = Bound(lambda x: x >= 1, "at least 1")
NOT_NEGATIVE = Bound(lambda x: 0 <= x < math.inf, "0 or more")
SHARE = Bound(lambda x: 0 <= x < 1, "0 to below 1")
ROWS = Bound(lambda x: 1 <= x <= 100_000, "1 to 100,000")
BEAMS = Bound(lambda x: 1 <= x <= 100, "1 to 100")
POWER = Bound(lambda x: -10 <= x <= 10, "-10 to 10")
MANY_ROWS = 2000  # training rows from which on the defaults are the paper's


def setting(default: Any, group: str, help: str, bound: Bound = ANY, choices: Iterable[str] = ()) -> Any:
    """Declare a field of Settings with its group, help, bound and choices."""
    return field(default=default, metadata=dict(group=group, help=help, bound=bound, choices=tuple(choices)))


def check_fields(found: Any) -> None:
    """Check the fields of a dataclass of settings.

    Raises:
        TypeError, ValueError: A value has the wrong type or is out of range. The message names the setting.
    """
    for f in fields(found):
        value, kinds, about = getattr(found, f.name), get_args(f.type) or (f.type,), f.metadata
        if isinstance(value, bool) or not isinstance(value, (*kinds, int) if float in kinds else kinds):
            raise TypeError(f"setting {f.name}: expected {kinds[0].__name__}, found {value!r}")
        if value is None:
            continue
        if about["choices"] and value not in about["choices"]:
            raise ValueError(f"setting {f.name}: expected one of {', '.join(about['choices'])}, found {value!r}")
        if not about["bound"].holds(value):
            raise ValueError(f"setting {f.name}: expected {about['bound'].words}, found {value}")


@dataclass(frozen=True)
class Settings:
    """The settings of a tuning run. The defaults are the paper's (section 2, appendix A), except for `steps` (30,000).

    Raises:
        TypeError, ValueError: A value has the wrong type or is out of range. The message names the setting.

    Example:
        >>> Settings(steps=200, prompt_length=20).learning_rate is None
        True
    """

    # fmt: off
    task: str = setting("auto", "data", "a built-in task, a mixture (a,b), or for columns: auto, classify, generate")
    max_input_tokens: int = setting(256, "data", "longest input, in tokens; longer inputs are truncated", COUNT)
    method: str = setting("prompt", "method", "tuning method", choices=METHODS)
    prompt_length: int = setting(100, "method", "vectors of the prompt (num_virtual_tokens in PEFT)", COUNT)
    rank: int = setting(8, "method", "rank of lora's products, width of an adapter", COUNT)
    hidden: int = setting(512, "method", "width of the network of p-tuning and prefix-mlp", COUNT)
    init: str = setting("labels", "method", "initialisation of the prompt", choices=INITS)
    init_text: str | None = setting(None, "method", "text for --init text")
    init_file: str | None = setting(None, "method", "saved prompt for --init file")
    steps: int = setting(1000, "optimiser", "training steps", COUNT)
    batch_size: int = setting(32, "optimiser", "rows of a batch", ROWS)
    optimizer: str | None = setting(None, "optimiser", "the method's; a prompt: adafactor-t5x", choices=OPTIMIZERS)
    learning_rate: float | None = setting(None, "optimiser", "the method's; a prompt: 0.3", POSITIVE)
    schedule: str = setting("constant", "optimiser", "learning rate schedule; linear falls to 0", choices=SCHEDULES)
    warmup_steps: int = setting(0, "optimiser", "steps over which the learning rate rises", NOT_NEGATIVE)
    z_loss: float = setting(1e-4, "optimiser", "weight of the squared log of the softmax denominator", NOT_NEGATIVE)
    dropout: float = setting(0.0, "optimiser", "dropout rate of the model during training", SHARE)
    eval_every: int = setting(50, "optimiser", "steps between two dev scores", COUNT)
    patience: int = setting(0, "optimiser", "dev scores without improvement before stopping; 0: never", NOT_NEGATIVE)
    seed: int = setting(0, "optimiser", "seed of the initial values, the order of the rows, and dropout", NOT_NEGATIVE)
    max_new_tokens: int = setting(32, "text", "longest free-text answer, in tokens", COUNT)
    num_beams: int = setting(1, "text", "beams for free text; 1 is greedy", BEAMS)
    length_penalty: float | None = setting(
        None, "text", "log probabilities are divided by length ** this; labels: 0, text: 1", POWER)
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), int) and float in (f.type, *get_args(f.type)):
                object.__setattr__(self, f.name, float(value))  # 1 and 1.0 are the same setting
        for name in ("text", "file"):
            if getattr(self, f"init_{name}") is not None and self.init != name:
                raise ValueError(f"setting init_{name}: needs init {name!r}, found {self.init!r}")

    @classmethod
    def for_rows(cls, rows: int, tokens: float = 30, **given: Any) -> "Settings":
        """Build Settings for a number of training rows. From 2,000 rows on, they are the paper's.

        A run on few rows reads each row about 24 times, or less often if the rows are long.

        Args:
            rows: Number of training rows.
            tokens: Mean number of tokens of an input.
            **given: Settings that override the choice.

        Raises:
            TypeError, ValueError: A given value is invalid. The message names the setting.
        """
        chosen: dict[str, Any] = {}
        if rows < MANY_ROWS:
            batch_size = given.get("batch_size") or (8 if rows < 100 or tokens > 64 else 16)
            vectors = given.get("prompt_length") or 20
            positions = max(200_000, 900 * rows)  # of the encoder, with the vectors in front of each input
            affordable = max(60, int(positions / (batch_size * (vectors + tokens))))
            steps = given.get("steps") or min(400, max(100, 24 * rows // batch_size), affordable)
            chosen = {"steps": steps, "batch_size": batch_size, "schedule": "linear"}
            chosen["eval_every"] = max(1, steps // 8)
            if given.get("method", "prompt") == "prompt":
                chosen |= {"prompt_length": 20, "optimizer": "adam"}
        return cls.changed(chosen, given)

    @classmethod
    def saved(cls, values: Mapping[str, Any], path: Any = "this prompt") -> "Settings":
        """Build Settings of a saved prompt. Missing fields take their defaults. Raises CheckpointError."""
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its settings cannot be used ({error}); tune it again") from None

    @classmethod
    def changed(cls, values: Mapping[str, Any], changes: Mapping[str, Any]) -> "Settings":
        """Build Settings from values and changes to them. `init_text` and `init_file` imply their `init`.

        Raises TypeError or ValueError that names the setting.
        """
        known = {f.name for f in fields(cls)}
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(sorted(known))}"
                raise TypeError(f"setting {name!r} does not exist{hint}")
        implied = [name for name in ("text", "file") if changes.get(f"init_{name}") is not None]
        return cls(**{**values, **({"init": implied[0]} if implied else {}), **changes})
