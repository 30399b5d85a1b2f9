"""Commands that check gradients and measure time."""

import argparse
from pathlib import Path

import numpy as np

from tinyprompt.bench import runs as bench_tuning
from tinyprompt.bench import steps as bench
from tinyprompt.check import ledger
from tinyprompt.check.devices import Survey
from tinyprompt.cli.report import Output, argument, command, given, say
from tinyprompt.cli.report import model as model_argument
from tinyprompt.cli.report import settings as options
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
    argument("--batch", metavar="FILE", help="a .npz file with a prompt and the arrays of a batch"),
    argument("--gradient", metavar="FILE", help="a .npy file: your gradient of its loss with respect to its prompt"),
    argument("--device", choices=DEVICES, help="check only this device beside NumPy and torch (all float32 devices)"),
    argument("--save", metavar="FILE", help="file for a batch, to compute its gradient elsewhere"),
)
def check(args: argparse.Namespace) -> Output:
    """Compare logits, loss and prompt gradient of every engine with NumPy in float64. Exit status 1 if one is wrong.

    Without --batch, three random batches are drawn. With --gradient, your gradient of the batch's loss is checked.
    """
    if args.save and args.gradient:
        raise ValueError("--save: leave it out with --gradient, which needs the batch of --batch")
    if args.device:
        check_device(args.device)
    folder = hub.find(args.model) if args.model else models.default_model()
    model = models.load(folder, tokenizer=False)
    cases = [ledger.load_case(args.batch, model)] if args.batch else [ledger.draw(model, i) for i in range(3)]
    if args.save:
        ledger.save_case(cases[0], args.save)
        return Output({"saved": args.save}, f"{args.save}: {', '.join(('prompt', *Batch._fields))}")
    if args.gradient and not args.batch:
        raise ValueError("--gradient: add --batch FILE, the batch of this gradient; --save FILE writes a batch")
    if args.gradient:
        report = ledger.check_gradient(read_array(args.gradient), model, *cases[0], name=args.gradient)
    else:
        report = ledger.check_model(model, folder, cases, say, args.device)
    return Output(report.as_dict(), report, report.ok)


@command("devices", "--json")
def devices(args: argparse.Namespace) -> Output:
    """List the devices: availability, the error of loss and gradient, and steps per second.

    The error is relative to NumPy in float64, on the built-in model `tiny`. The speed is measured for about a second on
    the default model, with steps of 8 rows, 32 tokens and 20 vectors. Exit status 1 if a device is wrong.
    """
    survey = survey_devices()
    return Output(survey.as_dict(), survey, all(line.right or bool(line.why) for line in survey.lines))


def survey_devices() -> Survey:
    """Measure all devices on the built-in models."""
    return Survey.of(models.load("tiny"), models.load(None), report=lambda x: say(f"trying {x}"))


def choose_device(auto: str) -> str:
    """Return and report the fastest correct device for a name of AUTO."""
    line = survey_devices().fastest(auto)
    say(f"device {auto}: {line.device}, at {line.steps_per_second:.3g} steps a second (tinyprompt devices)")
    return line.device


def read_array(path: str) -> np.ndarray:
    """Read an array of floats from a .npy file. Raises CheckpointError."""
    array = load_numpy(Path(path))
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise CheckpointError(f"{path}: expected one array of floats, as numpy.save writes it")
    return array


ENGINES = ", ".join(dict.fromkeys(name for names in bench.ENGINES.values() for name in names))


@command(
    "bench",
    "--size small --rounds 3",
    argument("--engines", metavar="A,B", help=f"some of {ENGINES} (default: all that can run here)"),
    argument("--rounds", type=int, metavar="N", default=5, help="number of rounds"),
    argument("--task", metavar="STUDY", help="measure whole runs: the cells of this study, a file as for `study`"),
    options("problem", of=bench.Problem),
)
def measure(args: argparse.Namespace) -> Output:
    """Measure NumPy, ONNX Runtime and, if installed, PEFT on a frozen T5 with random weights.

    With --task, whole tuning runs are measured, from the start of Python to the last dev score, and the time to the
    accuracy that all runs reach. --size then replaces the study's model by random weights of that size.
    """
    if args.rounds < 1:
        raise ValueError(f"--rounds: expected at least 1, found {args.rounds}")
    engines = None if args.engines is None else [*dict.fromkeys(name.strip() for name in args.engines.split(","))]
    chosen = given(args, bench.Problem)
    if args.task:
        for name in chosen.keys() - {"size"}:
            raise ValueError(f"--{name.replace('_', '-')}: for single steps; for whole runs, set it in {args.task}")
        cells = read_study(Path(args.task), "cpu").cells
        found = bench_tuning.measure(
            cells, engines or bench_tuning.engines_here(), args.rounds, say, chosen.get("size")
        )
        return Output(found, "\n\n".join(f"{run['cell']}\n{bench.table(run)}" for run in found["runs"]))
    problem = bench.Problem(**chosen)
    found = bench.measure(problem, engines or bench.available(problem.device), args.rounds, say)
    return Output(found, bench.table(found))
