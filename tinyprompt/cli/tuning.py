"""Commands that tune a prompt: `demo` and `tune`."""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from tinyprompt import data, display, methods
from tinyprompt.cli.report import COLUMNS, DEVICE, Output, argument, command, given, say
from tinyprompt.cli.report import model as model_argument
from tinyprompt.cli.report import settings as options
from tinyprompt.cli.shared import ROWS, Job, check_plot, check_task, warn_of_loss
from tinyprompt.device import describe_device
from tinyprompt.errors import CheckpointError, DataError
from tinyprompt.files import io, models, prompts, tables
from tinyprompt.fit import check_fit
from tinyprompt.model import Model, Prompt
from tinyprompt.predict import predict
from tinyprompt.settings import Settings
from tinyprompt.tasks import metrics
from tinyprompt.tasks.registry import DEMO, DEMO_TASKS, TASKS
from tinyprompt.train import TaskData
from tinyprompt.tuning import Result, evaluate, run_task, split, task_data

DEMO_SETTINGS = Settings(
    steps=400, batch_size=16, prompt_length=20, optimizer="adam", schedule="linear", eval_every=40
)  # fmt: skip


@command(
    "demo",
    "--task sentiment --model small",
    argument("--task", choices=DEMO_TASKS, default="topic", help="which built-in data"),
    model_argument(),
    argument("--seed", type=int, metavar="N", default=0, help="seed of the first values and the order of the rows"),
    argument("--out", metavar="DIR", default="tinyprompt-demo", help="folder for the prompt and the curve"),
    DEVICE,
)
def demo(args: argparse.Namespace) -> Output:
    """Tune a prompt on built-in data; compare it with no prompt and the majority class."""
    started, path = time.perf_counter(), Path(args.out) / f"{args.task}.safetensors"
    prompts.check_target(path)
    model, settings = models.load(args.model), replace(DEMO_SETTINGS, seed=args.seed)
    rows, dev, test = (tables.read_rows(DEMO / f"{args.task}.{part}.tsv") for part in ("train", "dev", "test"))
    words = data.label_words(rows)
    say(describe_device(args.device))
    vectors = f"{settings.prompt_length} x {model.config.d_model}"
    say(f"frozen T5 {model.name}; task {args.task}: {', '.join(words or ())}; prompt {vectors} float32")
    bare = evaluate(model, Prompt(label_words=words), test, args.device)
    result = tuned(args, model, task_data(settings, rows, dev, words), settings, path)
    curve: Path | None = path.with_suffix(".png")
    try:
        result.plot(curve)
    except ImportError:
        curve = None
    answers, targets = predict(model, result.prompt, [row.input for row in test], args.device), [r.target for r in test]
    right = next((row for row, answer in zip(test, answers, strict=True) if answer == row.target), test[0])
    found = {
        "majority": metrics.majority([row.target for row in rows], targets),
        "unprompted": bare.mean,
        "tuned": metrics.accuracy(answers, targets),
    }
    seconds = round(time.perf_counter() - started, 1)
    names = ("majority class", "frozen model, no prompt", "frozen model, tuned prompt")
    lines = [f"accuracy on {len(test)} test rows it never saw"]
    lines += [f"  {name:<28}{x:6.3f}" for name, x in zip(names, found.values(), strict=True)]
    lines.append(f"prompt saved to {path}" + (f", learning curve to {curve}" if curve else "") + f"; {seconds} s")
    lines.append(f"try: tinyprompt predict {path} {json.dumps(right.input)}")
    about = {"task": args.task, "test_rows": len(test), "seconds": seconds, "device": args.device}
    files = {"prompt": str(path), "curve": str(curve) if curve else None}
    return Output({**about, **found, **files}, "\n".join(lines))


def tuned(
    args: argparse.Namespace, model: Model, task: TaskData, settings: Settings, path: Path, resume: Prompt | None = None
) -> Result:
    """Tune with a progress bar, and save the best prompt at every dev score. Ctrl-C says where it is."""
    started, saved, steps = time.perf_counter(), False, run_task(model, task, settings, args.device, resume)
    try:
        with io.claimed(path):
            for progress in display.followed(steps, settings.steps):
                if progress.prompt:
                    prompts.save_prompt(progress.prompt, path)
                    saved = True
    except (CheckpointError, DataError) as error:
        if resume and not str(error).startswith(str(path)):
            raise type(error)(f"{args.resume}: {error}") from None
        raise
    except KeyboardInterrupt:
        if not saved:
            raise
        advice = "" if path.suffix == ".npy" else f"; to continue, repeat the command with --resume {path}"
        raise KeyboardInterrupt(f"the best prompt so far is in {path}{advice}") from None
    return Result.of(progress, time.perf_counter() - started)


@command(
    "tune",
    "train.tsv --dev dev.tsv --out mine.safetensors --steps 500",
    argument("train", metavar="TRAIN", nargs="+", help=f"training rows: {ROWS}"),
    argument("--dev", metavar="FILE", action="append", help="dev rows (a fifth of the training rows)"),
    model_argument(),
    argument("--out", metavar="FILE", help="where the prompt goes (prompt.safetensors, or that of --resume)"),
    argument("--seeds", type=int, metavar="N", help="tune N prompts, with seeds from --seed on: FILE-0 to FILE-(N-1)"),
    argument("--resume", metavar="PROMPT", help="saved prompt whose training continues (--steps may grow)"),
    argument("--plot", metavar="FILE", help="where to draw the learning curve, a .png file"),
    DEVICE,
    COLUMNS,
    options("data", "method", "optimiser", "text"),
)
def tune(args: argparse.Namespace) -> Output:
    """Tune a prompt, or the arrays of another method, on rows of a file.

    The best is saved at every dev score, with the state that --resume needs to continue the same run.
    """
    check_plot(args.plot)
    resume = prompts.load_prompt(args.resume) if args.resume else None
    if resume and resume.train_state is None:
        raise ValueError(f"{args.resume}: has no training state to resume; to start from it: --init-file {args.resume}")
    settings = Settings(**given(args))
    if resume:
        settings = Settings.saved(resume.settings | given(args), args.resume)
    check_task(settings.task, args.resume if resume and "task" not in given(args) else "--task")
    path = Path(args.out or args.resume or "prompt.safetensors")
    runs = {path: settings}
    if args.seeds is not None:
        if args.seeds < 1 or args.resume or args.plot:
            wrong = "expected 1 or more" if args.seeds < 1 else "goes without --resume and --plot"
            raise ValueError(f"--seeds {args.seeds}: {wrong}")
        seeds = range(settings.seed, settings.seed + args.seeds)
        runs = {path.with_stem(f"{path.stem}-{seed}"): replace(settings, seed=seed) for seed in seeds}
    for path in runs:
        prompts.check_target(path, settings.method)
    model = models.load(args.model)
    if resume:
        check_fit(resume, model, args.resume)
    check_sizes(args, settings, model)
    done = [tune_one(Job(args, model, settings), path, resume) for path, settings in runs.items()]
    if args.seeds is None:
        return done[0]
    return Output({"prompts": [one.data for one in done]}, "\n".join(str(one.text) for one in done))


def tune_one(job: Job, path: Path, resume: Prompt | None) -> Output:
    """Tune with one seed."""
    args, model, settings = job.args, job.model, job.settings
    rows, dev = split(job.reader, args.train, args.dev, settings)
    if not args.dev:
        say(f"no --dev: {len(dev)} of the training rows, drawn with seed {settings.seed}, are the dev rows")
    words = resume.label_words if resume and settings.task not in TASKS else job.reader.label_words(rows)
    say(describe_device(args.device))
    say(f"{len(rows)} train rows, {len(dev)} dev rows; " + (f"labels: {', '.join(words)}" if words else "free text"))
    job.warn_of_cut([row.input for row in (*rows, *dev)])
    job.warn_of_rows(rows, dev, words)
    result = tuned(args, model, task_data(settings, rows, dev, words, start=not resume), settings, path, resume)
    warn_of_loss(result.prompt, path)
    if args.plot:
        result.plot(args.plot)
    found = {"prompt": str(path), "label_words": words, "dev": result.best_dev, "best_step": result.best_step}
    steps, seconds = len(result.history) - 1, round(result.seconds, 1)
    return Output({**found, "steps": steps, "seconds": seconds, "device": args.device}, f"{result}; saved to {path}")


def check_sizes(args: argparse.Namespace, settings: Settings, model: Model) -> None:
    """Raise ValueError for a size that the method does not have."""
    shapes = methods.trained_shapes(model.config, settings, 2)
    for name in given(args).keys() & {"prompt_length", "rank", "hidden"}:
        other = replace(settings, **{name: getattr(settings, name) + 1})
        if methods.trained_shapes(model.config, other, 2) == shapes:
            raise ValueError(f"--{name.replace('_', '-')}: method {settings.method!r} has no such size; leave it out")
