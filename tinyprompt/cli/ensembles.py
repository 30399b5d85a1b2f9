"""The command that scores several prompts as one."""

import argparse

import numpy as np

from tinyprompt.cli import tuning
from tinyprompt.cli.report import COLUMNS as COLUMN_ARGUMENTS
from tinyprompt.cli.report import DEVICE, TASK, Output, argument, command, say
from tinyprompt.cli.report import model as model_argument
from tinyprompt.cli.report import settings as options
from tinyprompt.device import describe_device
from tinyprompt.ensemble import ensemble
from tinyprompt.files import models, prompts
from tinyprompt.tasks import registry

# Of the table that is printed: three are those of the paper's table 3.
COLUMNS = {"average": "average", "best": "best alone", "majority": "majority vote", "mean": "mean score"}


@command(
    "ensemble",
    "mine-0.safetensors mine-1.safetensors mine-2.safetensors --data test.tsv",
    argument("prompts", metavar="PROMPT", nargs="+", help="saved prompts of one task"),
    argument("--data", metavar="FILE", required=True, help=f"rows: {tuning.ROWS}"),
    TASK,
    model_argument(),
    DEVICE,
    COLUMN_ARGUMENTS,
    options("text", names=["max_input_tokens"]),
)
def score_ensemble(args: argparse.Namespace) -> Output:
    """Score several prompts of one task: average, best, majority vote and mean score.

    All of them answer in one pass over the rows. Average, best and majority are the paper's table 3.
    """
    model = models.load(args.model)
    opened = [tuning.as_asked(args, path, prompts.load_prompt(path), model) for path in args.prompts]
    (first, settings), given = opened[0], [prompt for prompt, _ in opened]
    for path, (prompt, other) in zip(args.prompts, opened, strict=True):
        if prompt.params:
            prompt.vectors(path)
        if other.task != settings.task:
            told = f"{args.prompts[0]} is of task {settings.task!r}, {path} of {other.task!r}"
            raise ValueError(f"{told}; an ensemble is of one task, name it with --task")
    rows = tuning.read(args, [args.data], settings.task, named=tuning.of_mixture(first))
    tuning.check_targets(args.data, rows, first.label_words)
    say(describe_device(args.device))
    tuning.say_what_is_cut([row.input for row in rows], model, settings)
    together = ensemble(model, given, [row.input for row in rows], args.device)
    words = registry.labels_of(settings.task, tuning.words_of(args)) if settings.task in registry.TASKS else None
    score = lambda said: registry.score(settings.task, said, rows, words or first.label_words)
    each = [score(said) for said in together.each]
    means = [one.mean for one in each]
    numbers: dict[str, float | None] = {
        "average": float(np.mean(means)),
        "best": max(means),
        "majority": score(together.majority).mean,
    }
    numbers["mean"] = score(together.mean).mean if together.mean else None
    found = {"prompts": args.prompts, "rows": len(rows), "metric": each[0].name, "task": settings.task, **numbers}
    lines = [f"{each[0].name} of {len(given)} prompts on {len(rows)} rows"]
    lines += [f"  {what:<16}{numbers[name]:.3f}" for name, what in COLUMNS.items() if numbers[name] is not None]
    return Output(found | {"each": [one.metrics for one in each], "device": args.device}, "\n".join(lines))
