"""Commands that check gradients and measure time."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from tinyprompt.bench import runs as bench_tuning
from tinyprompt.bench import steps as bench
from tinyprompt.check import ledger
from tinyprompt.check.devices import Survey
from tinyprompt.cli.report import Argument, Output, argument, command, say
from tinyprompt.cli.report import model as model_argument
from tinyprompt.data import Batch
from tinyprompt.device import DEVICES, check_device
from tinyprompt.errors import CheckpointError
from tinyprompt.files import hub, models
from tinyprompt.files.io import load_numpy
from tinyprompt.study.grid import read_study


@command(
    "check",
    "path/to/t5",
    model_argument("model", nargs="?"),
    argument("--batch", metavar="FILE", help="a .npz file: prompt and the arrays of a batch"),
    argument("--gradient", metavar="FILE", help="a .npy file: your gradient of its loss with respect to its prompt"),
    argument("--device", choices=DEVICES, help="check this device alone beside NumPy and torch (all in float32)"),
    argument("--save", metavar="FILE", help="write a batch there, for a gradient computed elsewhere"),
)
def check(args: argparse.Namespace) -> Output:
    """Compare logits, loss and prompt gradient of every engine with NumPy in float64; exit status 1 if one is wrong.

    Without --batch, it draws three random batches. With --gradient, it checks your gradient of the batch's loss.
    """
    if args.save and args.gradient:
        raise ValueError("--save: leave it out with --gradient, which is judged by the batch of --batch")
    if args.device:
        check_device(args.device)
    folder = hub.find(args.model) if args.model else models.default_model()
    model = models.load(folder, tokenizer=False)
    cases = [ledger.load_case(args.batch, model)] if args.batch else [ledger.draw(model, i) for i in range(3)]
    if args.save:
        ledger.save_case(cases[0], args.save)
        return Output({"saved": args.save}, f"{args.save}: {', '.join(('prompt', *Batch._fields))}")
    if args.gradient and not args.batch:
        raise ValueError("--gradient: add --batch FILE, the batch of this gradient; --save FILE writes one")
    if args.gradient:
        report = ledger.check_gradient(read_array(args.gradient), model, *cases[0], name=args.gradient)
    else:
        report = ledger.check_model(model, folder, cases, say, args.device)
    return Output(report.as_dict(), report, report.ok)


@command("devices", "--json")
def devices(args: argparse.Namespace) -> Output:
    """List the devices: which can be used here, the error of loss and gradient, and steps in a second.

    The error is relative to NumPy in float64, on the built-in model `tiny`. The speed is that of a step of the default
    model with 8 rows of 32 tokens and 20 vectors, measured for about a second. A wrong device is exit status 1.
    """
    survey = survey_devices()
    return Output(survey.as_dict(), survey, all(line.right or bool(line.why) for line in survey.lines))


def survey_devices() -> Survey:
    """Try all devices on the built-in models."""
    return Survey.of(models.load("tiny"), models.load(None), report=lambda x: say(f"trying {x}"))


def choose_device(auto: str) -> str:
    """Return the fastest right device for a word of AUTO, and say which."""
    line = survey_devices().fastest(auto)
    say(f"device {auto}: {line.device}, at {line.steps_per_second:.3g} steps a second (tinyprompt devices)")
    return line.device


def read_array(path: str) -> np.ndarray:
    """Read an array of floats from a .npy file. Raises CheckpointError."""
    array = load_numpy(Path(path))
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise CheckpointError(f"{path}: expected one array of floats, as numpy.save writes it")
    return array


def problem_arguments() -> list[Argument]:
    """The arguments of a Problem."""
    out = []
    for field in fields(bench.Problem):
        choices = {"size": bench.SIZES, "storage": bench.STORAGE, "device": bench.ENGINES}.get(field.name)
        options: dict[str, Any] = {"choices": choices} if choices else {"metavar": "N"}
        shown = f"{field.metadata['help']} ({field.default})"
        options |= dict(type=type(field.default), help=shown)
        out.append(argument(f"--{field.name.replace('_', '-')}", **options))
    return out


ENGINES = ", ".join(dict.fromkeys(name for names in bench.ENGINES.values() for name in names))


@command(
    "bench",
    "--size small --rounds 3",
    argument("--engines", metavar="A,B", help=f"some of {ENGINES} (all that can run here)"),
    argument("--rounds", type=int, metavar="N", default=5, help="turns of every engine"),
    argument("--task", metavar="STUDY", help="time whole runs: the cells of this study, as `study` reads it"),
    problem_arguments(),
)
def measure(args: argparse.Namespace) -> Output:
    """Time NumPy, ONNX Runtime and, where installed, PEFT on one frozen T5 with random weights.

    With --task: whole runs of tuning, from the start of Python to the last dev score, and the time to the accuracy that
    all runs come to. --size then puts random weights of that shape in the place of the study's model.
    """
    if args.rounds < 1:
        raise ValueError(f"--rounds: expected at least 1, found {args.rounds}")
    engines = None if args.engines is None else [*dict.fromkeys(name.strip() for name in args.engines.split(","))]
    given = {f.name: getattr(args, f.name) for f in fields(bench.Problem) if getattr(args, f.name) is not None}
    if args.task:
        for name in given.keys() - {"size"}:
            raise ValueError(f"--{name.replace('_', '-')}: goes with one step; of a whole run, {args.task} says it")
        cells = read_study(Path(args.task), "cpu").cells
        found = bench_tuning.measure(cells, engines or bench_tuning.engines_here(), args.rounds, say, args.size)
        return Output(found, "\n\n".join(f"{run['cell']}\n{bench.table(run)}" for run in found["runs"]))
    problem = bench.Problem(**given)
    found = bench.measure(problem, engines or bench.available(problem.device), args.rounds, say)
    return Output(found, bench.table(found))
