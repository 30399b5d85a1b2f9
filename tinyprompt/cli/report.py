"""What the commands share: their arguments from the settings, and what they print."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, get_args

from tqdm import tqdm

from tinyprompt.device import DEVICES
from tinyprompt.files import hub
from tinyprompt.settings import Settings

CHUNK = 256  # texts that are answered before anything is printed
ALIASES = {"learning_rate": ["--lr"], "prompt_length": ["--num-virtual-tokens"]}
METAVARS = {int: "N", float: "X", str: "TEXT"}
MODEL = f"a Hugging Face T5 directory, a built-in size ({', '.join(hub.BUILT_IN)}), or a pulled model (base)"


class Output(NamedTuple):
    """What a command found: an object for --json, and its text."""

    data: dict[str, Any]
    text: Any  # what is printed, as str() makes it
    ok: bool = True  # False: a check found a fault, which is exit status 1


class Command(NamedTuple):
    """A command: what it does, its arguments, an example."""

    run: Callable[[argparse.Namespace], Output]
    arguments: Callable[[argparse.ArgumentParser], None]
    example: str


def say(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr)


def device_argument(parser: argparse.ArgumentParser) -> None:
    """--device."""
    help = "where to compute, and how exactly (cpu if ONNX Runtime is installed)"
    parser.add_argument("--device", choices=DEVICES, help=help)


def column_arguments(parser: argparse.ArgumentParser) -> None:
    """The names of columns, and label words for coded targets."""
    group = parser.add_argument_group("columns")
    group.add_argument("--input", metavar="NAME", default="input", help="column of the input text (input)")
    group.add_argument("--target", metavar="NAME", default="target", help="column of the target text (target)")
    group.add_argument("--words", nargs="+", metavar="TARGET=WORD", help="label words for coded targets: 0=bad 1=good")


def setting_arguments(parser: argparse.ArgumentParser, *groups: str, names: Sequence[str] = ()) -> None:
    """Options for the settings of some groups, or of some names; what is not given is not in the namespace."""
    shown = {name: parser.add_argument_group(name) for name in groups}
    for f in fields(Settings):
        about = f.metadata
        if about["group"] not in groups and f.name not in names:
            continue
        kind = (get_args(f.type) or (f.type,))[0]  # of `float | None`: float
        default = "" if f.default is None else f" ({f.default})"
        options: dict[str, Any] = dict(type=kind, default=argparse.SUPPRESS, dest=f.name, help=about["help"] + default)
        options |= {"choices": about["choices"]} if about["choices"] else {"metavar": METAVARS[kind]}
        place = shown.get(about["group"], parser)
        place.add_argument(f"--{f.name.replace('_', '-')}", *ALIASES.get(f.name, []), **options)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as options."""
    return {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name, None) is not None}


def chunks(texts: Sequence[str], show: bool = True) -> Iterator[Sequence[str]]:
    """Texts in parts, with a progress bar if there are several."""
    starts = range(0, len(texts), CHUNK)
    for start in tqdm(starts, unit="batch", dynamic_ncols=True, disable=not show or len(starts) < 2):
        yield texts[start : start + CHUNK]
