"""The command that computes a grid of tuning runs."""

import argparse
import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinyprompt.cli.report import DEVICE, Output, argument, command, say
from tinyprompt.device import describe_device
from tinyprompt.tools import cells, figures, summary
from tinyprompt.tools.study import Cell, Study, read_study


@command(
    "study",
    "study.toml --jobs 4",
    argument("file", metavar="FILE", help="the study: settings, tasks and a grid, a .toml file"),
    argument("--out", metavar="DIR", help="folder for the rows, the table's plot and the cells (FILE without .toml)"),
    argument("--jobs", type=int, metavar="N", help="processes, which share the cores (1; of a cluster: all)"),
    argument("--backend", choices=[*cells.BACKENDS], default="loky", help="joblib's: processes here, or a cluster"),
    argument("--dry-run", action="store_true", help="check the study, count its cells, and compute none"),
    DEVICE,
)
def study(args: argparse.Namespace) -> Output:
    """Tune over a grid of methods, lengths, models, seeds, tasks and the like; print the table of the scores.

    A cell that is finished is kept. The same command goes on where it was stopped.
    """
    cells.check_workers(args.backend, args.jobs)
    path = Path(args.file)
    folder = Path(args.out) if args.out else path.with_suffix("")
    if folder == path:
        raise ValueError(f"{path}: expected a name that ends in .toml, or a folder with --out")
    one = read_study(path, args.device)
    found = cells.records(folder)
    cells.check_settings(one.cells, found, folder)
    waiting = [cell for cell in one.cells if cell.key not in found]
    say(describe_device(args.device))
    told = f"{len(one.cells)} cells: {len(one.cells) - len(waiting)} done, {len(waiting)} to compute"
    say(told + estimate(one.cells, waiting, found))
    if args.dry_run:
        numbers = {"cells": len(one.cells), "done": len(one.cells) - len(waiting)}
        return Output(numbers | {"waiting": list(map(str, waiting))}, "\n".join(map(str, waiting)) or None)
    errors = compute(waiting, folder, args)
    rows = cells.write_rows(folder, one.cells)
    found = cells.records(folder)
    table, plot = summary.summarize(one, found), folder / "plot.png"
    drawn = draw(table, plot)
    data = {"title": one.title, "cells": len(one.cells), "done": sum(cell.key in found for cell in one.cells)}
    data |= {"errors": errors, "rows": str(rows), "plot": str(plot) if drawn else None}
    data |= {"columns": table.across, "table": [result.as_dict() for result in table.results]}
    text = f"{table}\n\nrows in {rows}" + (f", plot in {plot}" if drawn else "")
    return Output(data, text + odd(one, found), ok=not errors)


def compute(waiting: Sequence[Cell], folder: Path, args: argparse.Namespace) -> dict[str, str]:
    """Compute cells with a progress bar. Returns, and says, the errors of those that failed."""
    named, errors = {cell.key: str(cell) for cell in waiting}, {}
    try:
        with tqdm(total=len(waiting), unit="cell", dynamic_ncols=True, disable=not waiting) as bar:
            for outcome in cells.run(waiting, folder, args.backend, args.jobs):
                bar.update()
                if outcome.error:
                    errors[named[outcome.key]] = outcome.error
                bar.set_postfix_str(named[outcome.key], refresh=False)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"finished cells are in {folder}; the same command goes on") from None
    for name, error in errors.items():
        say(f"failed: {name}: {error}")
    return errors


def estimate(all_cells: Sequence[Cell], waiting: Sequence[Cell], found: Mapping[str, Any]) -> str:
    """How long the waiting cells take one after the other, if each takes what those of its method and model took."""
    seconds: dict[tuple, list[float]] = {}
    for cell in all_cells:
        if cell.key in found:
            seconds.setdefault((cell.method, cell.model), []).append(found[cell.key]["seconds"])
    known = [statistics.fmean(seconds[of]) for cell in waiting if (of := (cell.method, cell.model)) in seconds]
    if not waiting or len(known) < len(waiting):
        return ""
    return f", about {sum(known) / 60:.1f} minutes of one process"


def draw(table: summary.Summary, path: Path) -> bool:
    """Draw the table if there is something to draw, and matplotlib to do it."""
    if not table.results or not importlib.util.find_spec("matplotlib"):
        return False
    figures.draw_study(table, path)
    return True


def odd(one: Study, found: Mapping[str, Any]) -> str:
    """A line for what makes rows hard to compare: several versions of tinyprompt."""
    made = {found[cell.key]["versions"]["tinyprompt"] for cell in one.cells if cell.key in found}
    return f"\nwarning: the rows were made by several versions: {', '.join(sorted(made))}" if len(made) > 1 else ""
