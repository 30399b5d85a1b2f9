"""Pictures, where matplotlib is installed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyprompt import methods, t5
from tinyprompt.methods import Sizes
from tinyprompt.train import Result


def pyplot() -> Any:
    """matplotlib.pyplot drawing to files, or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_curve(result: Result, path: Path) -> Path | None:
    """Loss and dev score over the steps as a PNG; None where matplotlib is not installed."""
    plt = pyplot()
    if plt is None:
        return None
    figure, left = plt.subplots(figsize=(6, 3.5), layout="constrained")
    right = left.twinx()
    rows = result.history
    left.plot([r["step"] for r in rows[1:]], [r["loss"] for r in rows[1:]], color="tab:gray", label="training loss")
    right.plot([r["step"] for r in rows], [r["dev"] for r in rows], color="tab:blue", marker="o", ms=3, label="dev")
    right.axvline(result.best_step, color="tab:blue", lw=0.8, ls=":")
    left.set(xlabel="step", ylabel="training loss (nats a token)", ylim=(0, None))
    right.set(ylabel="dev accuracy", ylim=(0, 1))
    left.set_title(f"best on dev: {result.best_dev:.2f} at step {result.best_step}", fontsize=10)
    left.legend(handles=[*left.lines, right.lines[0]], loc="lower left", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def draw_parameters(configs: dict[str, t5.Config], lengths: tuple[int, int], sizes: Sizes, path: Path) -> Path | None:
    """The paper's figure 4: what each method stores in percent of the model with it, by the size of the model.

    A band where the method has a length, from the shorter to the longer one; for prompt design, which stores ids of
    tokens, from 500 to 2,000 (section 4 there). None where matplotlib is not installed.
    """
    plt = pyplot()
    if plt is None:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    totals = [methods.count("full", config, sizes).model for config in configs.values()]

    def band(low, high, name, **style):
        """A line, and a thin one where the band below it ends."""
        (line,) = axes.plot(totals, high, marker="o", ms=3, label=name, **style)
        if low != high:
            axes.plot(totals, low, color=line.get_color(), lw=0.8)
            axes.fill_between(totals, low, high, color=line.get_color(), alpha=0.06, lw=0)

    for method in methods.METHODS:
        low, high = (
            [methods.count(method, config, replace(sizes, length=length)) for config in configs.values()]
            for length in lengths
        )
        style: dict[str, Any] = {"color": "black"} if method == "full" else {}
        if any(count.trained > count.stored for count in high):  # a network, which makes what another method stores
            trained = [100 * count.trained / (n + count.trained) for count, n in zip(high, totals, strict=True)]
            band(trained, trained, f"{method}, in training", ls="--")
        else:
            dashes = (0, (2, 2)) if method == "warp" else "-"  # hardly more than a prompt
            band([count.percent for count in low], [count.percent for count in high], method, ls=dashes, **style)
    few, many = ([100 * ids / n for n in totals] for ids in (500, 2000))
    band(few, many, "prompt design, token ids", color="black", ls=":")
    axes.set(
        xscale="log", yscale="log", xlabel="size of the frozen T5", ylabel="parameters for a task (% of the model)"
    )
    axes.set_xticks(totals, list(configs), minor=False)
    axes.minorticks_off()
    axes.set_title(
        f"{lengths[0]} to {lengths[1]} vectors; rank {sizes.rank}, hidden {sizes.hidden}, {sizes.labels} labels",
        fontsize=10,
    )
    figure.legend(fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
