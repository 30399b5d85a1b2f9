"""Commands that tune a prompt: `demo` and `tune`."""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tinyprompt import assess, data, display, methods
from tinyprompt.assess import Share, table
from tinyprompt.cli.report import COLUMNS, DEVICE, Output, argument, command, given, say
from tinyprompt.cli.report import model as model_argument
from tinyprompt.cli.report import settings as options
from tinyprompt.cli.shared import ROWS, Job, check_plot, open_model, warn_of_loss
from tinyprompt.data import Row
from tinyprompt.device import describe_device
from tinyprompt.errors import CheckpointError, DataError
from tinyprompt.files import io, models, prompts, tables
from tinyprompt.fit import check_fit
from tinyprompt.model import Model, Prompt
from tinyprompt.predict import predict
from tinyprompt.settings import Settings
from tinyprompt.tasks import metrics
from tinyprompt.tasks.registry import DEMO, DEMO_TASKS, check_name
from tinyprompt.train import TaskData
from tinyprompt.tuning import (
    DEV_SHARE,
    Result,
    default_settings,
    evaluate,
    prepare,
    resumable,
    run_task,
    split,
    task_data,
)

DEMO_SETTINGS = Settings(
    steps=400, batch_size=16, prompt_length=20, optimizer="adam", schedule="linear", eval_every=40
)  # fmt: skip


@command(
    "demo",
    "--task sentiment --model small",
    argument("--task", choices=DEMO_TASKS, default="topic", help="name of the built-in data"),
    model_argument(),
    argument("--seed", type=int, metavar="N", default=0, help="seed of the initial values and the order of the rows"),
    argument("--out", metavar="DIR", default="tinyprompt-demo", help="folder for the prompt and the curve"),
    DEVICE,
)
def demo(args: argparse.Namespace) -> Output:
    """Tune a prompt on built-in data, and compare it with the frozen model and the majority class."""
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
    """Tune a prompt. Save the best prompt at every dev score, and when Ctrl-C stops the run."""
    started, progress, steps = time.perf_counter(), None, run_task(model, task, settings, args.device, resume)
    try:
        with io.claimed(path):
            for progress in display.followed(steps, settings.steps):
                if progress.prompt:
                    prompts.save_prompt(progress.prompt, path)
    except (CheckpointError, DataError) as error:
        if resume and not str(error).startswith(str(path)):
            raise type(error)(f"{args.resume}: {error}") from None
        raise
    except KeyboardInterrupt:
        if progress is None or not progress.step:
            raise
        prompts.save_prompt(resumable(progress), path)
        advice = "" if path.suffix == ".npy" else f"; to continue, repeat the command with --resume {path}"
        raise KeyboardInterrupt(f"the best prompt so far is in {path}{advice}") from None
    assert progress is not None
    return Result.of(progress, time.perf_counter() - started)


@command(
    "tune",
    "train.tsv --dev dev.tsv --out mine.safetensors",
    argument("train", metavar="TRAIN", nargs="+", help=f"training rows: {ROWS}"),
    argument("--dev", metavar="FILE", action="append", help="dev rows (default: a fifth of the training rows)"),
    model_argument(),
    argument("--out", metavar="FILE", help="file for the prompt (prompt.safetensors, or the file of --resume)"),
    argument("--seeds", type=int, metavar="N", help="tune N prompts, seeds from --seed: FILE-0 to FILE-(N-1)"),
    argument("--folds", type=int, metavar="N", help="also tune N prompts for cross-validation over all rows"),
    argument("--learning-curve", action="store_true", help="also tune on a quarter and on half of the rows"),
    argument("--resume", metavar="PROMPT", help="saved prompt whose training continues (--steps may grow)"),
    argument("--plot", metavar="FILE", help="file for a plot of the learning curve, a .png file"),
    DEVICE,
    COLUMNS,
    options("data", "method", "optimiser", "text"),
)
def tune(args: argparse.Namespace) -> Output:
    """Tune a prompt, or the arrays of another method, on the rows of a file.

    Steps, batch size and prompt length depend on the number of rows, unless they are given; from 2,000 rows on they
    are the paper's. The best prompt is saved at every dev score and on Ctrl-C, with the state that --resume needs.
    """
    check_plot(args.plot)
    resume = prompts.load_prompt(args.resume) if args.resume else None
    if resume and resume.train_state is None:
        raise ValueError(f"{args.resume}: has no training state to resume; to start from it: --init-file {args.resume}")
    settings = Settings(**given(args))
    if resume:
        settings = Settings.saved(resume.settings | given(args), args.resume)
    check_name(settings.task, args.resume if resume and "task" not in given(args) else "--task")
    path = Path(args.out or args.resume or free_name("prompt.safetensors"))
    seeds = [settings.seed]
    for option in ("seeds", "folds"):
        number = getattr(args, option)
        least = 1 if option == "seeds" else 2
        if number is not None and (number < least or args.resume or args.plot):
            wrong = f"expected {least} or more" if number < least else "cannot be combined with --resume or --plot"
            raise ValueError(f"--{option} {number}: {wrong}")
    if args.seeds is not None:
        seeds = [*range(settings.seed, settings.seed + args.seeds)]
    paths = [path if args.seeds is None else path.with_stem(f"{path.stem}-{seed}") for seed in seeds]
    for one in paths:
        prompts.check_target(one, settings.method)
    model = open_model(args.model, resume)
    if resume:
        check_fit(resume, model, args.resume)
    check_sizes(args, settings, model)
    done = [
        tune_one(Job(args, model, replace(settings, seed=seed), columns=resume.columns if resume else {}), one, resume)
        for seed, one in zip(seeds, paths, strict=True)
    ]
    if args.seeds is None:
        return done[0]
    return Output({"prompts": [one.data for one in done]}, "\n".join(str(one.text) for one in done))


def free_name(name: str) -> Path:
    """Return an unused path: the name itself, or with -2, -3 and so on."""
    path, number = Path(name), 2
    while path.exists():
        path, number = Path(name).with_stem(f"{Path(name).stem}-{number}"), number + 1
    if path.name != name:
        say(f"{name} exists; the new prompt is written to {path} (--out names another file)")
    return path


def tune_one(job: Job, path: Path, resume: Prompt | None) -> Output:
    """Tune with one seed."""
    args, model = job.args, job.model
    rows, dev = split(job.reader, args.train, args.dev, job.settings)
    if not resume:
        chosen = {**given(args), "seed": job.settings.seed}
        job = replace(job, settings=default_settings(model, rows, chosen))
    settings = job.settings
    if not args.dev:
        say(f"no --dev: {len(dev)} of the training rows become dev rows, drawn with seed {settings.seed}")
    task = prepare(model, job.reader, settings, (rows, dev), resume, drawn=not args.dev)
    words = task.label_words
    say(describe_device(args.device))
    kind = f"labels: {display.listing(words)}" if words else "free text"
    say(f"{len(rows)} train rows, {len(dev)} dev rows; {kind}")
    check_assessment(args, settings, task)
    job.say_targets(rows if args.dev else [*rows, *dev], task)
    size = f", {settings.prompt_length} vectors" if settings.method == "prompt" else ""
    options = "--steps, --batch-size, --eval-every" + (", --prompt-length" if size else "")
    every = f"a dev score every {settings.eval_every}"
    say(f"{settings.steps} steps of {settings.batch_size} rows{size}, {every} ({options})")
    job.warn_of_cut([row.input for row in (*rows, *dev)])
    job.warn_of_rows(rows, dev, words)
    result = tuned(args, model, task, settings, path, resume)
    warn_of_loss(result.prompt, path)
    if args.plot:
        result.plot(args.plot)
    found: dict[str, Any] = {"prompt": str(path), "label_words": words, "verbalizer": dict(task.verbalizer)}
    found |= {"dev": result.best_dev, "best_step": result.best_step}
    found |= {"steps": len(result.history) - 1, "seconds": round(result.seconds, 1), "device": args.device}
    lines = [f"{result}; saved to {path}"]
    if words and settings.task in data.TASKS:
        try:
            shares, told = worth(job, task, result)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the prompt is in {path}") from None
        found["baselines"] = {name: share._asdict() for name, share in shares.items()}
        lines += told
    return Output(found, "\n".join(lines))


def check_assessment(args: argparse.Namespace, settings: Settings, task: TaskData) -> None:
    """Raise ValueError before the computation if --folds or --learning-curve does not apply to these rows."""
    if (args.folds or args.learning_curve) and not (task.label_words and settings.task in data.TASKS):
        raise ValueError("--folds and --learning-curve: expected a file of columns whose targets are labels")
    number = len({row.input for row in (*task.train, *task.dev)})
    if args.folds and args.folds > number:
        raise ValueError(f"--folds {args.folds}: expected at most the number of distinct inputs, {number}")


def worth(job: Job, task: TaskData, result: Result) -> tuple[dict[str, Share], list[str]]:
    """Compare a tuned prompt with three baselines on the dev rows, and with --folds on all rows."""
    args, model, settings = job.args, job.model, job.settings
    rows, dev = [*task.train], [*task.dev]
    bare = Prompt(label_words=task.label_words, verbalizer=dict(task.verbalizer), settings=asdict(settings))
    shares = {
        "majority class": assess.majority(rows, dev),
        "frozen model, no prompt": assess.share(predict(model, bare, [row.input for row in dev], args.device), dev),
    }
    few = len(rows) + len(dev) <= assess.MOST_ROWS
    if few:
        shares["bag of words"] = assess.share(assess.bag_of_words(rows, dev), dev)
    shares["tuned prompt"] = assess.Share(result.best_dev, len(dev))
    lines = [f"accuracy on {len(dev)} dev rows, which also chose the best step; with standard errors:", *table(shares)]

    def answers(some: list[Row], test: list[Row]) -> list[str]:
        part, held_out = data.split(some, DEV_SHARE, settings.seed)
        chosen = default_settings(model, part, {**given(args), "seed": settings.seed})
        *_, last = run_task(model, task._replace(train=part, dev=held_out), chosen, args.device)
        return predict(model, last.best(), [row.input for row in test], args.device)

    if args.folds:
        every = [*rows, *dev]
        number, seed = args.folds, settings.seed
        engines: dict[str, Any] = {"bag of words": assess.bag_of_words} if few else {}
        engines["tuned prompt"] = answers
        folds = {name: assess.cross_validate(every, number, seed, engine) for name, engine in engines.items()}
        lines += [f"accuracy on all {len(every)} rows, each held out once ({number} folds):", *table(folds)]
        shares |= {f"{name}, {number} folds": share for name, share in folds.items()}
    own = [share for name, share in shares.items() if name.startswith("tuned prompt")][-1]
    words = [share for name, share in shares.items() if name.startswith("bag of words")]
    if words and own.value <= words[-1].value:
        lines.append(
            "the prompt is not better than a bag of words; try more rows, more --steps, --words TARGET=WORD with a "
            "common word for each label, or --folds 5 for a score on all rows"
        )
    if args.learning_curve:
        sizes = [size for size in (len(rows) // 4, len(rows) // 2) if size >= 4]
        curve = {}
        for size in sizes:
            part = data.split(rows, size / len(rows), settings.seed)[1]
            curve[f"{size} rows"] = assess.share(answers(part, dev), dev)
        curve[f"{len(rows)} rows"] = shares["tuned prompt"]
        lines += ["learning curve, accuracy of a prompt on the dev rows:", *table(curve)]
        shares |= curve
    return shares, lines


def check_sizes(args: argparse.Namespace, settings: Settings, model: Model) -> None:
    """Raise ValueError for an option that the method does not use."""
    shapes = methods.trained_shapes(model.config, settings, 2)
    for name in given(args).keys() & {"prompt_length", "rank", "hidden"}:
        other = replace(settings, **{name: getattr(settings, name) + 1})
        if methods.trained_shapes(model.config, other, 2) == shapes:
            raise ValueError(f"--{name.replace('_', '-')}: method {settings.method!r} does not use it; leave it out")
