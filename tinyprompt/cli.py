"""The command line: the parser of the arguments, and what becomes of an error."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import get_args

from tinyprompt import __version__, backend, bench, commands, hub, optim, tasks
from tinyprompt.backend import DeviceError
from tinyprompt.checkpoint import CheckpointError
from tinyprompt.data import DataError
from tinyprompt.initial import INITS
from tinyprompt.lowering import LoweringError
from tinyprompt.methods import METHODS
from tinyprompt.train import Settings

ENGINE_NAMES = dict.fromkeys(name for names in bench.ENGINES.values() for name in names)

HELP = {
    "task": f"a built-in task, whose files are read as distributed: {', '.join(tasks.TASKS)}; "
    "several with commas between: a mixture, whose inputs begin with the task's name; "
    "files of columns: rank the labels (classify), write freely (generate), or what the targets look like (auto)",
    "size": "shape of the T5: 1.1, or 1.0 where it says so",
    "input_tokens": "tokens of every input, padding included",
    "target_tokens": "tokens of every target",
    "new_tokens": "tokens that are written greedily",
    "storage": "dtype of the weights in their file",
    "device": "where to compute",
    "steps": "training steps",
    "batch": "rows of a batch",
    "method": f"what is trained: {', '.join(METHODS)}",
    "length": "prompt vectors",
    "rank": "rank of lora's products, width of an adapter",
    "hidden": "width of the network of p-tuning and prefix-mlp",
    "init": f"first prompt: {', '.join(INITS)}",
    "init_text": "text for --init text",
    "init_file": "saved prompt for --init file",
    "optimizer": f"one of {', '.join(optim.OPTIMIZERS)} (the method's own: adafactor-t5x for a prompt)",
    "rate": "learning rate (the method's own: 0.3 for a prompt)",
    "schedule": "constant, or linear (down to 0)",
    "warmup": "steps in which the rate rises",
    "z_loss": "weight of the squared log of the softmax denominator",
    "dropout": "dropout rate of the model during training",
    "eval_every": "steps between two dev scores",
    "patience": "dev scores without a better one before stopping; 0: never stop early",
    "max_input": "tokens of an input that are read",
    "max_target": "tokens of a free-text answer that are written",
    "beams": "hypotheses of a free-text answer; 1: greedy",
    "length_penalty": "power of its length that an answer's log probability is divided by (labels: 0, free text: 1)",
    "seed": "seed of the first prompt, the order of the rows, dropout",
}


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    top = argparse.ArgumentParser(prog="tinyprompt", description="Soft prompts for a frozen T5, in NumPy.")
    top.add_argument("--version", action="version", version=__version__)
    subparsers = top.add_subparsers(required=True, metavar="command")

    def command(name, function, computes=True):
        sub = subparsers.add_parser(
            name,
            help=function.__doc__.partition("\n")[0],
            description=function.__doc__,
            formatter_class=argparse.MetavarTypeHelpFormatter,
        )
        sub.set_defaults(function=function)
        sub.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        if computes:
            device = "where to compute (cpu if ONNX Runtime is installed)"
            sub.add_argument("--device", choices=backend.DEVICES, type=str, help=device)
            precision = "int8 on cpu or bf16 on cuda: faster, less exact (full)"
            sub.add_argument("--precision", choices=backend.PRECISIONS, type=str, default="full", help=precision)
        return sub

    def columns(sub):
        sub.add_argument("--input", type=str, default="input", help="column of the input text (input)")
        sub.add_argument("--target", type=str, default="target", help="column of the target text (target)")
        sub.add_argument("--words", type=str, nargs="+", help="label words for coded targets: 0=bad 1=good")

    def writing(sub):
        for name, kind in commands.WRITING.items():
            sub.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{HELP[name]} (as the prompt was tuned)")

    sizes = ", ".join(hub.BUILT_IN)
    model = dict(type=str, help=f"Hugging Face T5 directory, a built-in size ({sizes}), or a pulled model (base)")

    sub = command("demo", commands.demo)
    sub.add_argument(
        "--task", choices=commands.DEMO_TASKS, type=str, default="topic", help="which built-in data (topic)"
    )
    sub.add_argument("--model", **model)
    sub.add_argument("--seed", type=int, default=0, help=HELP["seed"])
    sub.add_argument("--out", type=str, default="tinyprompt-demo", help="folder for the prompt and the curve")

    sub = command("tune", commands.tune_command)
    rows = ".tsv, .csv or .jsonl, or the task's own; for --task a,b two files"
    sub.add_argument("train", type=str, nargs="+", help=f"training rows: {rows}")
    sub.add_argument(
        "--dev", type=str, action="append", help="dev rows (a fifth of the training rows); of a mixture, for each"
    )
    sub.add_argument("--model", **model)
    sub.add_argument("--out", type=str, help="where the prompt goes (prompt.safetensors, or what --resume names)")
    sub.add_argument(
        "--resume", type=str, help="saved prompt whose training goes on, with its settings (--steps may grow)"
    )
    columns(sub)
    for field in fields(Settings):
        kind = (get_args(field.type) or (field.type,))[0]  # of `float | None`: float
        shown = "" if field.default is None else f" ({field.default})"
        sub.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help=HELP[field.name] + shown
        )

    sub = command("eval", commands.eval_command)
    sub.add_argument("prompt", type=str, help="saved prompt of any format (see convert)")
    sub.add_argument("data", type=str, nargs="+", help=f"rows: {rows}")
    sub.add_argument("--task", type=str, help="another task than the prompt was tuned on: how to read and score")
    sub.add_argument("--model", **model)
    columns(sub)
    writing(sub)

    sub = command("predict", commands.predict_command)
    sub.add_argument("prompt", type=str, help="saved prompt of any format (see convert)")
    sub.add_argument("text", type=str, nargs="*", help="texts to answer (lines on standard input)")
    sub.add_argument("--data", type=str, help="take the texts from a .tsv, .csv or .jsonl file, or the task's own")
    sub.add_argument("--task", type=str, help="another task than the prompt was tuned on: how to read the file")
    sub.add_argument("--input", type=str, default="input", help="column of the input text (input)")
    sub.add_argument("--model", **model)
    sub.add_argument("--stream", action="store_true", help="print free text while it is written")
    writing(sub)

    sub = command("few-shot", commands.few_shot_command)
    sub.add_argument("train", type=str, help="rows to take the examples from: .tsv, .csv or .jsonl")
    sub.add_argument("data", type=str, help="rows to score")
    sub.add_argument("--task", type=str, default="auto", help=HELP["task"])
    sub.add_argument("--model", **model)
    sub.add_argument("--k", type=int, default=4, help="examples in front of every row (4)")
    sub.add_argument("--template", type=str, default="{input} answer: {target}", help="how an example reads")
    sub.add_argument("--seed", type=int, default=0, help="draws the examples (0)")
    sub.add_argument("--max-input", type=int, default=512, help=f"{HELP['max_input']} (512)")
    columns(sub)
    writing(sub)

    sub = command("count", commands.count_command, computes=False)
    for name, default in (("length", 100), ("rank", 8), ("hidden", 512)):
        sub.add_argument(f"--{name}", type=int, default=default, help=f"{HELP[name]} ({default})")
    sub.add_argument("--labels", type=int, default=2, help="label words (2)")
    sub.add_argument("--model", type=str, help="T5 directory, of which only config.json is read (all sizes of T5 1.1)")
    sub.add_argument("--plot", type=str, help="where to draw the paper's figure 4, a .png file")

    sub = command("check", commands.check_command, computes=False)
    sub.add_argument("model", nargs="?", **model)
    sub.add_argument("--batch", type=str, help="a .npz file: prompt, input_ids, attention_mask, labels, weights")
    sub.add_argument("--gradient", type=str, help="a .npy file: your gradient of that batch by its prompt")
    sub.add_argument("--save", type=str, help="write a batch there, to compute its gradient elsewhere, and stop")

    sub = command("pull", commands.pull_command, computes=False)
    sub.add_argument("name", type=str, help="org/name, as in google/t5-v1_1-small")
    sub.add_argument("--revision", type=str, help="a branch, tag or commit (main)")

    sub = command("inspect", commands.inspect_command, computes=False)
    sub.add_argument("thing", type=str, nargs="+", help="prompts, a model directory or name, an .onnx file")
    sub.add_argument("--model", type=str, help="model that the prompts were tuned on (the built-in one, if it fits)")
    sub.add_argument("--top", type=int, default=5, help="nearest pieces of each vector (5)")

    sub = command("convert", commands.convert_command, computes=False)
    sub.add_argument("source", type=str, help="prompt (also all.npz:NAME, or a PEFT directory), or model directory")
    sub.add_argument("target", type=str, help="name.safetensors, name.npy, or a directory")
    sub.add_argument("--model", type=str, help="model that the prompt belongs to, if it does not say so")
    sub.add_argument("--labels", type=str, nargs="+", help="label words, if the prompt does not know them")
    sub.add_argument("--tokenizer", type=str, help="tokenizer file or folder, for a model without one")

    sub = command("export", commands.export_command, computes=False)
    sub.add_argument("--model", **model)
    sub.add_argument("--prompt", type=str, help="saved prompt of any format (a first one, of vocabulary rows)")
    sub.add_argument("--out", type=str, default="tinyprompt-export", help="folder for graphs, prompt and weights")
    sub.add_argument("--batch", type=int, default=8, help="rows of all inputs, always (8)")
    sub.add_argument("--input-tokens", type=int, default=64, help="length of input_ids, always (64)")
    sub.add_argument("--target-tokens", type=int, default=4, help="length of labels, always (4)")
    sub.add_argument("--length", type=int, default=100, help="prompt vectors, if no --prompt brings its own (100)")

    sub = command("bench", commands.bench_command, computes=False)
    sub.add_argument("--engines", type=str, help=f"some of {', '.join(ENGINE_NAMES)} (all that can run here)")
    sub.add_argument("--rounds", type=int, default=5, help="turns of every engine (5)")
    for field in fields(bench.Problem):
        known = {"size": bench.SIZES, "storage": bench.STORAGE, "device": bench.ENGINES}.get(field.name)
        sub.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            choices=known,
            help=f"{HELP[field.name]} ({field.default})",
        )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Bad input is one line on standard error and exit status 2; a check that finds a fault is 1."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if "text" in args and not any(word.startswith("-") for word in rest):
        args.text += rest  # argparse wants them all before the options
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if hasattr(args, "precision"):
            args.device = args.device or backend.default()
            backend.check(args.device, args.precision)
        out = args.function(args)
        if args.json:
            print(json.dumps(out))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CheckpointError, DataError, DeviceError, LoweringError, ValueError, FloatingPointError, OSError) as error:
        commands.say(f"tinyprompt: {error}")
        return 2
    except (MemoryError, OverflowError) as error:
        commands.say(f"tinyprompt: too large for this machine: {error}")
        return 2
    except KeyboardInterrupt as stop:
        commands.say(f"tinyprompt: stopped; {str(stop) or 'nothing was saved'}")
        return 130
    return 0 if out.get("ok", True) else 1
