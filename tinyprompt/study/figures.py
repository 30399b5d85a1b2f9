"""Plots: the paper's figure 4, and the table of a study. They need matplotlib."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

from tinyprompt import methods
from tinyprompt.config import Config
from tinyprompt.files import io
from tinyprompt.settings import Settings
from tinyprompt.study.summary import Result, Summary


def draw_parameters(
    configs: dict[str, Config], lengths: tuple[int, int], settings: Settings, labels: int, path: Path
) -> None:
    """Draw the paper's figure 4: the stored parameters of each method in percent, against the size of the model.

    A method with a length is a band from the shorter to the longer length. Prompt design, which stores token ids, is a
    band from 500 to 2,000 tokens (section 4 of the paper). `labels` is the number of label words.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    totals = [methods.count(config, replace(settings, method="full")).model for config in configs.values()]

    def band(low: Any, high: Any, name: str, **style: Any) -> None:
        """Draw a line, and a thin line at the lower end of its band."""
        (line,) = axes.plot(totals, high, marker="o", ms=3, label=name, **style)
        if low != high:
            axes.plot(totals, low, color=line.get_color(), lw=0.8)
            axes.fill_between(totals, low, high, color=line.get_color(), alpha=0.06, lw=0)

    for method in methods.METHODS:
        low, high = (
            [
                methods.count(config, replace(settings, method=method, prompt_length=length), labels)
                for config in configs.values()
            ]
            for length in lengths
        )
        style: dict[str, Any] = {"color": "black"} if method == "full" else {}
        if any(count.trained > count.stored for count in high):  # a network computes the stored arrays
            trained = [100 * count.trained / (n + count.trained) for count, n in zip(high, totals, strict=True)]
            band(trained, trained, f"{method}, in training", ls="--")
        else:
            dashes = (0, (2, 2)) if method == "warp" else "-"  # almost the same line as prompt tuning
            band([count.percent for count in low], [count.percent for count in high], method, ls=dashes, **style)
    few, many = ([100 * ids / n for n in totals] for ids in (500, 2000))
    band(few, many, "prompt design, token ids", color="black", ls=":")
    axes.set(
        xscale="log", yscale="log", xlabel="size of the frozen T5", ylabel="parameters for a task (% of the model)"
    )
    axes.set_xticks(totals, list(configs), minor=False)
    axes.minorticks_off()
    axes.set_title(
        f"{lengths[0]} to {lengths[1]} vectors; rank {settings.rank}, hidden {settings.hidden}, {labels} labels",
        fontsize=10,
    )
    figure.legend(fontsize=8, loc="outside right center")
    save(figure, path)


def draw_study(table: Summary, path: Path) -> None:
    """Draw the table of a study: lines over the first numeric axis, or dots without one. Error bars show the spread.

    With a numeric axis, every column is a subplot. A result that ignores the numeric axis is a dashed line.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib.pyplot as plt

    columns, lines = table.columns(), table.lines()
    number = next((i for i, name in enumerate(table.down) if is_number(line[i] for line in lines)), None)
    wide, high = (4 * len(columns), 3.5) if number is not None else (7, 1.2 + 0.3 * len(lines))
    figure, all_axes = plt.subplots(
        1, len(columns) if number is not None else 1, figsize=(wide, high), layout="constrained", squeeze=False
    )
    for i, column in enumerate(columns):
        axes = all_axes[0][i if number is not None else 0]
        found = {line: of[column] for line, of in lines.items() if column in of}
        if number is None:
            names = [", ".join(map(str, line)) or "score" for line in found]
            axes.errorbar(
                [one.mean for one in found.values()], names, xerr=[one.spread or 0 for one in found.values()],
                fmt="o", ms=4, capsize=2, label=str(column),
            )  # fmt: skip
            axes.set(xlabel="score")
            continue
        draw_lines(axes, found, number)
        axes.set(xlabel=table.down[number], ylabel="score", title=str(column))
    if number is None:
        all_axes[0][0].invert_yaxis()
    if len(all_axes[0][0].get_legend_handles_labels()[1]) > 1:
        all_axes[0][0].legend(fontsize=8)
    figure.suptitle(table.title, fontsize=10)
    save(figure, path)


def draw_lines(axes: Any, found: Mapping[tuple, Result], number: int) -> None:
    """Draw a line over a numeric axis for each combination of the other axes."""
    curves: dict[tuple, dict[Any, Result]] = {}
    for line, one in found.items():
        curves.setdefault(line[:number] + line[number + 1 :], {})[line[number]] = one
    for i, (name, curve) in enumerate(curves.items()):
        style: dict[str, Any] = {"label": ", ".join(str(x) for x in name if x != ""), "color": f"C{i}"}
        if list(curve) == [""]:
            axes.axhline(curve[""].mean, ls="--", **style)
            continue
        points = sorted((x, one) for x, one in curve.items() if x != "")
        spreads = [one.spread or 0 for _, one in points]
        places, means = [x for x, _ in points], [one.mean for _, one in points]
        axes.errorbar(places, means, yerr=spreads, marker="o", ms=4, capsize=2, **style)


def is_number(values: Iterable[Any]) -> bool:
    """Return whether the values are distinct numbers. Empty values are ignored."""
    found = {x for x in values if x != ""}
    return len(found) > 1 and all(isinstance(x, int | float) for x in found)


def save(figure: Any, path: Path) -> None:
    """Write a figure to a file, and close it. The suffix selects the format."""
    import matplotlib.pyplot as plt

    out = BytesIO()
    figure.savefig(out, format=path.suffix[1:], dpi=150)
    io.write({path: out.getvalue()})
    plt.close(figure)
