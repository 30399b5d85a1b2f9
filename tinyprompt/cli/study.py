"""The commands `study`, which computes a grid of tuning runs, and `count`, which counts parameters."""

import argparse
import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinyprompt import methods
from tinyprompt.cli.report import DEVICE, Output, argument, command, given, say
from tinyprompt.cli.report import settings as options
from tinyprompt.cli.shared import check_plot
from tinyprompt.config import T5_1_1
from tinyprompt.device import describe_device
from tinyprompt.files import hub, models
from tinyprompt.settings import Settings
from tinyprompt.study import cells, figures, summary
from tinyprompt.study.grid import Cell, Study, read_study

LENGTHS = (1, 5, 20, 50, 100, 150)  # the prompt lengths of the paper's table 4


@command(
    "study",
    "study.toml --jobs 4",
    argument("file", metavar="FILE", help="the study: settings, tasks and a grid, a .toml file"),
    argument("--out", metavar="DIR", help="folder for the rows, the table's plot and the cells (FILE without .toml)"),
    argument("--jobs", type=int, metavar="N", help="number of processes (1; on a cluster: all workers)"),
    argument("--backend", choices=[*cells.BACKENDS], default="loky", help="processes of joblib here, or a cluster"),
    argument("--dry-run", action="store_true", help="check the study and count its cells without computing them"),
    DEVICE,
)
def study(args: argparse.Namespace) -> Output:
    """Tune over a grid of methods, lengths, models, seeds and tasks, and print a table of the scores.

    Finished cells are kept. Repeat the same command to continue a stopped study.
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
    """Compute cells with a progress bar. Print and return the errors of failed cells."""
    named, errors = {cell.key: str(cell) for cell in waiting}, {}
    try:
        with tqdm(total=len(waiting), unit="cell", dynamic_ncols=True, disable=not waiting) as bar:
            for outcome in cells.run(waiting, folder, args.backend, args.jobs):
                bar.update()
                if outcome.error:
                    errors[named[outcome.key]] = outcome.error
                bar.set_postfix_str(named[outcome.key], refresh=False)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"finished cells are in {folder}; repeat the command to continue") from None
    for name, error in errors.items():
        say(f"failed: {name}: {error}")
    return errors


def estimate(all_cells: Sequence[Cell], waiting: Sequence[Cell], found: Mapping[str, Any]) -> str:
    """Estimate the time for the waiting cells from finished cells with the same method and model."""
    seconds: dict[tuple, list[float]] = {}
    for cell in all_cells:
        if cell.key in found:
            seconds.setdefault((cell.method, cell.model), []).append(found[cell.key]["seconds"])
    known = [statistics.fmean(seconds[of]) for cell in waiting if (of := (cell.method, cell.model)) in seconds]
    if not waiting or len(known) < len(waiting):
        return ""
    return f", about {sum(known) / 60:.1f} minutes of one process"


def draw(table: summary.Summary, path: Path) -> bool:
    """Draw the table if it has results and matplotlib is installed."""
    if not table.results or not importlib.util.find_spec("matplotlib"):
        return False
    figures.draw_study(table, path)
    return True


def odd(one: Study, found: Mapping[str, Any]) -> str:
    """Return a warning if several versions of tinyprompt computed the rows."""
    made = {found[cell.key]["versions"]["tinyprompt"] for cell in one.cells if cell.key in found}
    return f"\nwarning: rows of several versions of tinyprompt: {', '.join(sorted(made))}" if len(made) > 1 else ""


@command(
    "count",
    "--prompt-length 20 --plot figure4.png",
    argument("--labels", type=int, metavar="N", default=2, help="label words"),
    argument("--model", metavar="MODEL", help="model to count (all sizes of T5 1.1); only config.json is read"),
    argument("--plot", metavar="FILE", help="file for a plot like the paper's figure 4, a .png file"),
    options(names=["prompt_length", "rank", "hidden"]),
)
def count(args: argparse.Namespace) -> Output:
    """Count the parameters that every method trains and stores, for each size of T5 1.1 or for --model.

    The counts correspond to the paper's table 4 and figure 4.
    """
    settings = Settings(**given(args))
    if args.labels < 1:
        raise ValueError(f"--labels: expected at least 1, found {args.labels}")
    configs = dict(T5_1_1)
    if args.model:
        configs = {args.model: models.read_config(hub.find(args.model) / "config.json")}
    check_plot(args.plot)
    if args.plot:
        figures.draw_parameters(configs, (1, settings.prompt_length), settings, args.labels, Path(args.plot))
    rows, table = [], []
    for name, config in configs.items():
        for method in methods.METHODS:
            found = methods.count(config, replace(settings, method=method), args.labels)
            rows.append({"size": name, "method": method, **found._asdict(), "percent": found.percent})
        for length in LENGTHS:
            found = methods.count(config, replace(settings, prompt_length=length))
            table.append({"size": name, "length": length, **found._asdict(), "percent": found.percent})
    lines = ["a prompt: vectors, parameters, parameters of the model with the prompt, percent (table 4)"]
    lines += ["{size:<8}{length:>5}{stored:>12,}{model:>18,}{percent:>12.5f}".format(**one) for one in table]
    numbers = f"{settings.prompt_length} vectors, rank {settings.rank}, hidden {settings.hidden}, {args.labels} labels"
    lines.append(f"parameters stored by each method: {numbers}")
    for one in rows:
        more = "   trained: {trained:,}".format(**one) if one["trained"] > one["stored"] else ""
        lines.append("{size:<8}{method:<14}{stored:>16,}{percent:>12.5f}".format(**one) + more)
    return Output({"rows": rows, "table": table, "plot": args.plot}, "\n".join(lines))
