"""Declaration of commands, options for settings, and output."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, get_args

from tqdm import tqdm

from tinyprompt.check.devices import AUTO
from tinyprompt.device import DEVICES
from tinyprompt.files import hub
from tinyprompt.settings import Settings

STDOUT = "standard output"  # replaces the file name in errors
CHUNK = 256  # number of texts answered per printed chunk
ALIASES = {"learning_rate": ["--lr"], "prompt_length": ["--num-virtual-tokens"]}
METAVARS = {int: "N", float: "X", str: "TEXT"}


class Output(NamedTuple):
    """The result of a command: an object for --json, and a text."""

    data: dict[str, Any]
    text: Any = None  # printed with str()
    ok: bool = True  # False if a check failed, which gives exit status 1


class Argument(NamedTuple):
    """An argument for argparse, with its group in the help."""

    flags: tuple[str, ...]
    options: dict[str, Any]
    group: str = ""


class Command(NamedTuple):
    """A command: its function, an example and its arguments."""

    run: Callable[[argparse.Namespace], Output]
    example: str
    arguments: list[Argument]


COMMANDS: dict[str, Command] = {}


def argument(*flags: str, group: str = "", **options: Any) -> Argument:
    """Declare an argument. Its help shows a default that is a number or a text."""
    if isinstance(options.get("default"), int | str):
        options["help"] = f"{options['help']} ({options['default']})"
    return Argument(flags, options, group)


def command(name: str, example: str, *arguments: Argument | list[Argument]) -> Callable:
    """Declare a command with its arguments, as a decorator of its function."""

    def declare(run: Callable[[argparse.Namespace], Output]) -> Callable:
        flat = [one for some in arguments for one in ([some] if isinstance(some, Argument) else some)]
        COMMANDS[name] = Command(run, f"tinyprompt {name} {example}", flat)
        return run

    return declare


def settings(*groups: str, names: Sequence[str] = (), of: Any = Settings) -> list[Argument]:
    """Build the options for the settings of some groups or names. Omitted options are missing in the namespace."""
    out = []
    for f in fields(of):
        about, kind = f.metadata, (get_args(f.type) or (f.type,))[0]  # `float | None` -> float
        if about["group"] not in groups and f.name not in names:
            continue
        options: dict[str, Any] = dict(type=kind, default=argparse.SUPPRESS, dest=f.name, help=about["help"])
        options["help"] += "" if f.default is None else f" ({f.default})"
        options |= {"choices": about["choices"]} if about["choices"] else {"metavar": METAVARS[kind]}
        flags = (f"--{f.name.replace('_', '-')}", *ALIASES.get(f.name, []))
        out.append(Argument(flags, options, about["group"] if about["group"] in groups else ""))
    return out


def model(*flags: str, **options: Any) -> Argument:
    """Build the argument that names a model."""
    sizes = ", ".join(hub.BUILT_IN)
    help = f"a Hugging Face T5 directory, a built-in size ({sizes}), or a pulled model (the prompt's, or base)"
    return argument(*(flags or ("--model",)), metavar="MODEL", help=help, **options)


DEVICE = argument(
    "--device",
    choices=[*DEVICES, *AUTO],
    help="device and precision; auto measures all (cpu, if ONNX Runtime is installed)",
)
INPUT = argument("--input", metavar="NAME", help="column of the input text (input, or the prompt's)", group="columns")
COLUMNS = [
    INPUT,
    argument("--target", metavar="NAME", help="column of the target text (target, or the prompt's)", group="columns"),
    argument("--words", nargs="+", metavar="TARGET=WORD", help="label words for codes: 0=bad 1=good", group="columns"),
]
PROMPT = argument("prompt", metavar="PROMPT", help="saved prompt of any format")
TASK = argument("--task", metavar="TASK", help="task of the rows, if it differs from the prompt's task")


def given(args: argparse.Namespace, of: Any = Settings) -> dict[str, Any]:
    """Return the settings of the given options. --init-text and --init-file imply their --init."""
    found = {f.name: getattr(args, f.name) for f in fields(of) if getattr(args, f.name, None) is not None}
    for name in ("text", "file"):
        if f"init_{name}" in found:
            found.setdefault("init", name)
    return found


def visible(text: Any, most: int | None = None) -> str:
    """Escape control characters and lone surrogates for a terminal. Line breaks are kept.

    most: Number of characters after which the text is truncated.
    """
    text = str(text)
    text = text if most is None or len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def put(text: str, end: str = "\n") -> None:
    """Print a text on standard output. An OSError names standard output as its file."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, STDOUT) from None


def say(text: Any) -> None:
    """Print a line on standard error."""
    print(visible(text, 1000), file=sys.stderr)


def chunks(texts: Sequence[str], show: bool = True) -> Iterator[Sequence[str]]:
    """Yield texts in chunks, with a progress bar if there are several."""
    starts = range(0, len(texts), CHUNK)
    for start in tqdm(
        starts, unit="batch", dynamic_ncols=True, disable=not show or len(starts) < 2 or not sys.stderr.isatty()
    ):
        yield texts[start : start + CHUNK]
