"""What the lessons share: one style for figures, a stopwatch, and checks that do not give an answer away."""

import numbers
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler

warnings.filterwarnings("ignore", "IProgress not found")  # said where tqdm is imported; no lesson shows a bar
import tinyprompt  # noqa: E402

DEMO = Path(tinyprompt.__file__).parent / "demo"
# Dark to light, so that they differ in grey too; markers and dashes differ for those who see no colour at all.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\")
STYLE = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "lines.markersize": 4,
    "legend.frameon": False,
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(marker=MARKERS) + cycler(linestyle=DASHES),
}


class NotDone(Exception):
    """An exercise that nobody has written yet."""


def figure(columns: int = 1, width: float = 6.5, height: float = 3.4, **options):
    """A figure of the lessons: (figure, axes), or as many axes side by side as there are columns."""
    plt.rcParams.update(STYLE)
    return plt.subplots(1, columns, figsize=(width, height), **options)


def seconds(jobs: dict[str, Callable], rounds: int) -> dict[str, float]:
    """The shortest time of each job: others can only make a run longer. In turn, so that all suffer alike."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    return {name: min(found) for name, found in times.items()}


def named(value) -> str:
    """The kind of a value, for a reader: "an array (3, 5)", "a number", "a str"."""
    if isinstance(value, np.ndarray) and value.ndim:
        return f"an array {value.shape}" + ("" if value.dtype.kind in "biuf" else f" of {value.dtype}")
    if value is None:
        return "None"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def amiss(found, like) -> str | None:
    """What is wrong with the kind of a value: one sentence, or None if it has the kind and the shape of `like`.

    `like` is an example: an array, a number, a str, or a tuple, a list or a dict of them. An empty one has any length.
    """
    if isinstance(like, np.ndarray) and like.ndim:
        right, expected = named(found) == named(like), named(like)
    elif isinstance(like, numbers.Real | np.ndarray):
        right = isinstance(found, numbers.Real) or (isinstance(found, np.ndarray) and found.ndim == 0)
        right, expected = right and np.asarray(found).dtype.kind in "iuf", "a number"
    elif isinstance(like, tuple | list):
        right = isinstance(found, tuple | list) and len(like) in (0, len(found))
        expected = named(like) + (f" of {len(like)}" if like else "")
    else:
        right, expected = isinstance(found, type(like)), named(like)
    if not right:
        length = f" of {len(found)}" if isinstance(found, tuple | list) else ""
        return f"returned {named(found)}{length}; expected {expected}"
    if isinstance(like, dict) and set(found) != set(like):
        return f"returned a dict with {list(found)}; expected {list(like)}"
    places = list(like) if isinstance(like, dict) else range(len(like)) if isinstance(like, tuple | list) else ()
    wrong = ((place, amiss(found[place], like[place])) for place in places)
    return next((f"in the place [{place!r}], {what}" for place, what in wrong if what), None)


class Unusable(Exception):
    """A hint about an answer that the claims cannot be asked about."""


def check(name: str, mine: Callable, like) -> Callable:
    """Judge an exercise at once: `@check("Exercise 1", mine, like)` over a generator of (holds, hint), given `mine`.

    `like` is an example of a result, for `amiss`, or a function that makes one of the arguments. The first hint whose
    claim does not hold is printed. An exercise that returns None waits for its reader.
    """
    last = None

    def attempt(*args, **kwargs):
        nonlocal last
        if not callable(mine):
            raise Unusable(f"the name stands for {named(mine)}; expected a function")
        try:
            last = mine(*args, **kwargs)
        except Exception as error:  # whatever a learner's code may raise is a hint for the learner
            raise Unusable(f"your code raises {type(error).__name__}: {error}") from error
        if last is None:
            raise NotDone
        wrong = amiss(last, like(*args, **kwargs) if callable(like) else like)
        if wrong:
            raise Unusable(wrong)
        return last

    def judge(claims: Callable[[Callable], Iterator[tuple[bool, str]]]) -> None:
        try:
            hint = next((hint for holds, hint in claims(attempt) if not holds), None)
            verdict = "right" if hint is None else f"not yet: {hint}"
        except NotDone:
            verdict = "your turn"
        except Unusable as error:
            verdict = f"not yet: {error}"
        except Exception as error:  # a value of the right kind, such as nan, with which no claim can be computed
            verdict = f"not yet: returned {last!r:.60}, with which the check fails: {type(error).__name__}: {error}"
        print(f"{name}: {verdict}")

    return judge
