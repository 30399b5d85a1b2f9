"""Helpers of all lessons: one style for figures, a stopwatch, and checks that do not reveal an answer."""

import builtins
import dis
import inspect
import numbers
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler

warnings.filterwarnings(
    "ignore", "IProgress not found"
)  # tqdm warns on import; lessons show no progress bar
import tinyprompt  # noqa: E402

DEMO = Path(tinyprompt.__file__).parent / "demo"
HERE = Path(__file__).parent
# Functions of the reader that lesson 11 combines.
PIECES = {"tanh_rule", "log_softmax_vjp", "my_attention", "causal_bias", "my_norm"}
PIECES |= {"my_shift_right", "my_feed_forward", "put_in_front", "mean_loss", "adam"}
PIECES |= {"needed", "merged", "matmul_shape"}
BLUE, ORANGE, GREY = "#3B8BD0", "#D9822B", "#808890"  # readable on white and on black
# Dark to light, so that the colours differ in grey too; markers and dashes differ for colour-blind readers.
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
    "axes.prop_cycle": cycler(color=COLOURS)
    + cycler(marker=MARKERS)
    + cycler(linestyle=DASHES),
}


class NotDone(Exception):
    """An exercise without a solution."""


def figure(columns: int = 1, width: float = 6.5, height: float = 3.4, **options):
    """Return (figure, axes) in the style of the lessons, with one axes object per column."""
    plt.rcParams.update(STYLE)
    return plt.subplots(1, columns, figsize=(width, height), **options)


def diagram(boxes: dict[str, tuple], arrows: list[tuple], width=3.8, height=4.0):
    """Draw boxes {name: (text, column, row, colour)} and arrows (from, to, colour).

    Rows count from the top. The background is transparent. Orange arrows are dashed. A text in GREY without an arrow
    has no box.
    """
    fig, axes = figure(width=width, height=height)
    fig.patch.set_alpha(0)
    columns, rows = ([place[i] for place in boxes.values()] for i in (1, 2))
    axes.set(xlim=(min(columns) - 0.5, max(columns) + 0.5), facecolor="none")
    axes.set_ylim(max(rows) + 0.5, min(rows) - 0.5)
    axes.axis("off")
    ends = {end for arrow in arrows for end in arrow[:2]}
    drawn = {}
    for name, (text, column, row, colour) in boxes.items():
        line = {"boxstyle": "round,pad=0.4", "fc": "none", "lw": 1.8}
        line["ec"] = colour if name in ends or colour != GREY else "none"
        style = {"color": colour, "size": 11, "bbox": line}
        drawn[name] = axes.text(column, row, text, ha="center", va="center", **style)
    for start, end, colour in arrows:
        look = {"color": colour, "lw": 1.8, "shrinkA": 3, "shrinkB": 3}
        look |= {"arrowstyle": "->", "linestyle": "--" if colour == ORANGE else "-"}
        look |= {"patchA": drawn[start].get_bbox_patch()}
        look |= {"patchB": drawn[end].get_bbox_patch()}
        axes.annotate("", boxes[end][1:3], boxes[start][1:3], arrowprops=look)


def seconds(jobs: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Return the shortest time of each job, since other processes only slow it down. The jobs alternate."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    return {name: min(found) for name, found in times.items()}


def named(value) -> str:
    """Name the type of a value for a reader: "an array (3, 5)", "a number", "a str"."""
    if isinstance(value, np.ndarray) and value.ndim:
        return f"an array {value.shape}" + (
            "" if value.dtype.kind in "biuf" else f" of {value.dtype}"
        )
    if value is None:
        return "None"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def amiss(found, like) -> str | None:
    """Return one sentence about a wrong type, or None if a value has the type and the shape of `like`.

    `like` is an example: an array, a number, a str, or a tuple, a list or a dict of them. An empty one matches any
    length.
    """
    if isinstance(like, np.ndarray) and like.ndim:
        right, expected = named(found) == named(like), named(like)
    elif isinstance(like, numbers.Real | np.ndarray):
        right = isinstance(found, numbers.Real) or (
            isinstance(found, np.ndarray) and found.ndim == 0
        )
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
    places = (
        list(like)
        if isinstance(like, dict)
        else range(len(like))
        if isinstance(like, tuple | list)
        else ()
    )
    wrong = ((place, amiss(found[place], like[place])) for place in places)
    return next(
        (f"in the place [{place!r}], {what}" for place, what in wrong if what), None
    )


class Unusable(Exception):
    """A hint about an answer to which the claims cannot be applied."""


def check(name: str, mine: Callable, like) -> Callable:
    """Judge an exercise: `@check("Exercise 1", mine, like)` over a generator of (holds, hint), given `mine`.

    `like` is an example of a result, for `amiss`, or a function that computes one from the arguments. The first hint
    whose claim is false is printed. An exercise without code is skipped.
    """
    last = None

    def attempt(*args, **kwargs):
        nonlocal last
        if not callable(mine):
            raise Unusable(f"the name stands for {named(mine)}; expected a function")
        try:
            last = mine(*args, **kwargs)
        except Exception as error:  # any error of a learner's code becomes a hint
            raise Unusable(
                f"your code raises {type(error).__name__}: {error}"
            ) from error
        if last is None and unwritten(mine):
            raise NotDone
        if last is None:
            raise Unusable("returned None: is a `return` missing?")
        wrong = amiss(last, like(*args, **kwargs) if callable(like) else like)
        if wrong:
            raise Unusable(wrong)
        return last

    def judge(claims: Callable[[Callable], Iterator[tuple[bool, str]]]) -> None:
        try:
            hint = next((hint for holds, hint in claims(attempt) if not holds), None)
            known = claims.__globals__
            piece = next((x for x in sorted(PIECES) if known.get(x) is mine), None)
            verdict = (
                f"right{keep(mine, piece)}" if hint is None else f"not yet: {hint}"
            )
        except NotDone:
            verdict = "your turn"
        except Unusable as error:
            verdict = f"not yet: {error}"
        except (
            Exception
        ) as error:  # a claim fails on a value of the right type, such as nan
            verdict = f"not yet: returned {last!r:.60}, with which the check fails: {type(error).__name__}: {error}"
        print(f"{name}: {verdict}")

    return judge


def unwritten(mine: Callable) -> bool:
    """Return whether a function has no code besides a docstring, `...` and `pass`."""
    if not inspect.isfunction(mine):
        return False
    found = {step.opname for step in dis.get_instructions(mine)}
    return found <= {"RESUME", "NOP", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE"}


def keep(mine: Callable, name: str | None) -> str:
    """Write a function for lesson 11 to its file, and report it or the reason against it; ignore other functions."""
    if name is None:
        return ""
    try:
        source = inspect.getsource(mine)
        own: dict = {"np": np}
        exec(source, own)
        if compiled(own[name]) != compiled(mine):
            raise OSError  # the file has changed since it was run
    except (OSError, TypeError, SyntaxError, KeyError, NameError, AttributeError):
        return "; not kept: Python does not know its source. Define it with `def` in a cell of a notebook"
    foreign = {
        name for name in globals_of(mine.__code__) if not hasattr(builtins, name)
    }
    if foreign := foreign - {"np"} - PIECES:
        return f"; not kept: it uses {', '.join(sorted(foreign))}. Lesson 11 has only np and your other pieces"
    try:
        folder().mkdir(parents=True, exist_ok=True)
        (folder() / f"{name}.py").write_text(source, encoding="utf-8")
    except OSError as error:
        return f"; not kept: {error}"
    return f"; kept for lesson 11 in pieces/{name}.py"


def folder() -> Path:
    """Return the folder of the reader's functions."""
    return Path(os.environ.get("TINYPROMPT_PIECES", HERE / "pieces"))


def compiled(function: Callable) -> tuple:
    """Return the content of a function without its location in a file."""
    code = function.__code__
    return (
        code.co_code,
        code.co_names,
        [x for x in code.co_consts if not inspect.iscode(x)],
    )


def globals_of(code) -> Iterator[str]:
    """Yield the global names that a function, or a function inside it, uses."""
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            yield step.argval
    for part in code.co_consts:
        if inspect.iscode(part):
            yield from globals_of(part)


def pieces(*names: str) -> list[Callable]:
    """Load the reader's functions, or solutions of exercises for missing ones, and print which."""
    own: dict = {"np": np}
    for path in sorted((HERE / "solutions").glob("*.py")):
        for cell in re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.M):
            found = re.search(r'\A tags=\["exercise-\d"\]\s+def (\w+)', cell)
            if found and found[1] in names:
                kept, source, whose = folder() / f"{found[1]}.py", cell, "the solution"
                if kept.exists():
                    source, whose = kept.read_text(encoding="utf-8"), "yours"
                source = source.removeprefix(found[0].partition("\n")[0])
                exec(compile(source, str(kept), "exec"), own)
                if found[1] not in own:
                    raise NameError(
                        f"{kept} does not define {found[1]}: delete the file, and run its exercise again"
                    )
                print(f"lesson {int(path.name[:2])}: {found[1]:16} {whose}")
    return [own[name] for name in names]
