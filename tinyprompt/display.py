"""Output for terminals and notebooks: progress, learning curves and small HTML tables."""

import html
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from tinyprompt.train import Progress

SMOOTHING = 20  # steps of the moving average of a loss curve
REDRAWN = 20  # number of times a notebook redraws the curve in a run
SHOWN = 20  # rows shown of a table


def listing(items: Iterable[str]) -> str:
    """Join items with commas, or with semicolons if an item contains a comma."""
    texts = list(items)
    return ("; " if any("," in text for text in texts) else ", ").join(texts)


def table(rows: Iterable[Sequence[Any]], header: Sequence[str] = ()) -> str:
    """Return an HTML table with escaped cells."""

    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    head = f"<thead>{line(header, 'th')}</thead>" if header else ""
    return f"<table>{head}<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


def in_notebook() -> bool:
    """Return whether the code runs in a notebook instead of a terminal."""
    try:
        return get_ipython().__class__.__name__ == "ZMQInteractiveShell"  # type: ignore[name-defined]
    except NameError:
        return False


def followed(run: Iterator["Progress"], steps: int) -> Iterator["Progress"]:
    """Show the progress of a run while iterating: a bar, and in a notebook with matplotlib a live loss curve."""
    curve = _Curve(steps) if in_notebook() else None
    if not curve and not sys.stderr.isatty():
        yield from _as_lines(run, steps)
        return
    with tqdm(total=steps, unit="step", dynamic_ncols=True, mininterval=0.5) as bar:
        for progress in run:
            bar.set_postfix_str(str(progress), refresh=False)
            bar.update(progress.step - bar.n)  # more than 1 if a run is resumed
            if curve:
                curve.update(progress)
            yield progress
    if curve:
        curve.close()


def _as_lines(run: Iterator["Progress"], steps: int) -> Iterator["Progress"]:
    """Print a line for each dev score if the output is a file or a pipe."""
    started = time.perf_counter()
    for progress in run:
        if progress.dev is not None:
            seconds = time.perf_counter() - started
            print(f"step {progress.step} of {steps}: {progress}; {seconds:.0f} s", file=sys.stderr, flush=True)
        yield progress


class _Curve:
    """A plot of the losses so far, redrawn a few times in a run."""

    def __init__(self, steps: int):
        self.every, self.handle = max(1, steps // REDRAWN), None

    def update(self, progress: "Progress") -> None:
        if progress.step % self.every or not progress.step:
            return
        try:
            import matplotlib.pyplot as plt
            from IPython.display import display
        except ImportError:
            return
        figure = plot_curve(progress.state.history(), progress.state.best_step).figure
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        plt.close(figure)

    def close(self) -> None:
        """Remove the plot, because `Result.plot` draws the whole curve."""
        if self.handle is not None:
            from IPython.display import HTML

            self.handle.update(HTML(""))


def plot_curve(history: Sequence[dict[str, Any]], best_step: int, path: str | Path | None = None) -> Any:
    """Draw training loss and dev score over the steps.

    Returns matplotlib's axes, or None if the plot is written to `path`. Raises ImportError without matplotlib.
    """
    import matplotlib.pyplot as plt

    figure, left = plt.subplots(figsize=(6, 3.5), layout="constrained")
    right = left.twinx()
    scored = [row for row in history if row["dev"] is not None]
    losses = [row["loss"] for row in history[1:]]
    smooth = np.convolve(losses, np.ones(SMOOTHING) / SMOOTHING, "valid") if len(losses) >= SMOOTHING else losses
    left.plot(range(1, len(losses) + 1), losses, color="0.8", lw=0.6)
    left.plot(range(len(losses) - len(smooth) + 1, len(losses) + 1), smooth, color="0.4", label="training loss")
    dev = [row["dev"] for row in scored]
    right.plot([row["step"] for row in scored], dev, color="tab:blue", marker="o", ms=3, label="dev score")
    right.axvline(best_step, color="tab:blue", lw=0.8, ls=":")
    left.set(xlabel="step", ylabel="training loss (nats a token)", ylim=(0, None))
    right.set(ylabel="dev score", ylim=(min(0, *dev), 1))
    best = next(row["dev"] for row in scored if row["step"] == best_step)
    left.set_title(f"best on dev: {best:.2f} at step {best_step}", fontsize=10)
    left.legend(handles=[left.lines[1], right.lines[0]], loc="center right", fontsize=8)
    if path is None:
        return left
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return None
