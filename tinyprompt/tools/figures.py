"""The paper's figure 4, for which matplotlib must be installed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyprompt import methods
from tinyprompt.config import Config
from tinyprompt.settings import Settings


def draw_parameters(
    configs: dict[str, Config], lengths: tuple[int, int], settings: Settings, labels: int, path: Path
) -> None:
    """The paper's figure 4: what each method stores in percent of the model with it, by the size of the model.

    A band if the method has a length, from the shorter to the longer one; for prompt design, which stores ids of
    tokens, from 500 to 2,000 (section 4 there). labels: the number of label words. Raises ImportError.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    totals = [methods.count(config, replace(settings, method="full")).model for config in configs.values()]

    def band(low, high, name, **style):
        """A line, and a thin one where the band below it ends."""
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
        f"{lengths[0]} to {lengths[1]} vectors; rank {settings.rank}, hidden {settings.hidden}, {labels} labels",
        fontsize=10,
    )
    figure.legend(fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=150)
    plt.close(figure)
