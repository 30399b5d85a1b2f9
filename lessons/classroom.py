"""What the lessons share: one style for figures, a stopwatch, and checks that do not give an answer away."""

import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
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


def check(name: str, mine: Callable) -> Callable:
    """Judge an exercise at once: `@check("Exercise 1", mine)` over a generator of (holds, hint), which is given `mine`.

    The first hint whose claim does not hold is printed. An exercise that returns None waits for its reader.
    """

    def attempt(*args, **kwargs):
        result = mine(*args, **kwargs)
        if result is None:
            raise NotDone
        return result

    def judge(claims: Callable[[Callable], Iterator[tuple[bool, str]]]) -> None:
        try:
            hint = next((hint for holds, hint in claims(attempt) if not holds), None)
            verdict = "right" if hint is None else f"not yet: {hint}"
        except NotDone:
            verdict = "your turn"
        except Exception as error:  # whatever a learner's code may raise is a hint for the learner
            verdict = f"not yet: your code raises {type(error).__name__}: {error}"
        print(f"{name}: {verdict}")

    return judge
