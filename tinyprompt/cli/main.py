"""The command line: the parser, and the handling of errors."""

import argparse
import contextlib
import difflib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from tinyprompt.check.devices import AUTO
from tinyprompt.cli import answering, checking, files, reference, serving, study, tuning  # noqa: F401 - they declare commands
from tinyprompt.cli.report import COMMANDS, STDOUT, put, say, visible
from tinyprompt.device import check_device, default_device
from tinyprompt.errors import TinypromptError
from tinyprompt.version import VERSION

TEXTS = {"text", "init_text", "template", "words", "input", "target"}  # arguments that are not file names
# Options of other tools, with our counterparts.
HINTS = {
    "--epochs": "training is measured in steps: epochs x rows / batch size; use --steps",
    "--precision": "the precision is part of the device: --device cpu-int8, --device cuda-bf16",
    "--rate": "use --learning-rate",
    "--length": "use --prompt-length",
    "--batch": "use --batch-size",
    "--beams": "use --num-beams",
    "--max-input": "use --max-input-tokens",
    "--max-target": "use --max-new-tokens",
    "--labels": "use --label-words, or --words TARGET=WORD",
}


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    top = argparse.ArgumentParser(prog="tinyprompt", description="Soft prompts for a frozen T5, in NumPy.")
    top.add_argument("--version", action="version", version=VERSION)
    commands = top.add_subparsers(required=True, metavar="command")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=(command.run.__doc__ or "").partition("\n")[0],
            description=command.run.__doc__,
            epilog=f"example: {command.example}",
            allow_abbrev=False,
        )
        groups: dict[str, Any] = {"": sub}
        for flags, options, group in command.arguments:
            if group not in groups:
                groups[group] = sub.add_argument_group(group)
            groups[group].add_argument(*flags, **options)
        sub.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        sub.set_defaults(run=command.run, parser=sub)
    return top


def refuse(parser: argparse.ArgumentParser, rest: Sequence[str]) -> None:
    """Exit with a message about unknown arguments, and a suggestion."""
    first = rest[0].partition("=")[0]
    near = difflib.get_close_matches(first, parser._option_string_actions, 1)
    hint = HINTS.get(first) or (f"did you mean {near[0]}?" if near else "")
    parser.error(f"unrecognized arguments: {' '.join(rest)}" + (f"; {hint}" if hint else ""))


def open_streams() -> None:
    """Prepare the standard streams: reopen closed ones, and escape characters that the terminal cannot show."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def as_utf8(value: Any) -> Any:
    """Decode an argument as UTF-8 if the locale has another encoding. Other bytes keep the locale's decoding."""
    if isinstance(value, list):
        return [as_utf8(one) for one in value]
    if not isinstance(value, str):
        return value
    try:
        return os.fsencode(value).decode("utf-8")
    except UnicodeError:
        return value


def describe(error: BaseException) -> str:
    """Return the message of an error in one line, beginning with the file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Invalid input gives one line on standard error and exit status 2; a failed check gives 1."""
    open_streams()
    try:
        return run(argv)
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        discard_output()
        return 0
    except (TinypromptError, ValueError, FloatingPointError, OSError, ImportError) as error:
        if isinstance(error, OSError) and error.filename == STDOUT:
            discard_output()
        say(f"tinyprompt: {describe(error)}")
        return 2
    except (MemoryError, OverflowError, RecursionError) as error:
        say(f"tinyprompt: too large for this machine: {describe(error) or type(error).__name__}")
        return 2
    except KeyboardInterrupt as stop:
        say(f"tinyprompt: stopped; {str(stop) or 'nothing was saved'}")
        return 130
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":  # a panic of a Rust library, which is not an Exception
            raise
        say(f"tinyprompt: the tokenizers library failed: {panic}")
        return 2


def discard_output() -> None:
    """Redirect standard output to nowhere, so that flushing its buffer cannot fail when Python exits."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(argv: Sequence[str] | None) -> int:
    """Parse the arguments, run the command and print its result."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser().print_help()
        return 0
    args, rest = parser().parse_known_args(argv)
    end = rest.index("--") if "--" in rest else len(rest)  # arguments after "--" are not options
    if "text" in args and not any(word.startswith("-") and " " not in word for word in rest[:end]):
        args.text += rest[:end] + rest[end + 1 :]  # argparse expects all texts before the options
    elif rest:
        refuse(args.parser, rest)
    for name in TEXTS & vars(args).keys():
        setattr(args, name, as_utf8(getattr(args, name)))
    if "device" in args and args.run not in (checking.measure, checking.check):
        args.device = args.device or default_device()
        if args.device in AUTO:
            args.device = checking.choose_device(args.device)
        check_device(args.device)
    out = args.run(args)
    if args.json:
        put(json.dumps(out.data))
    elif out.text is not None:
        put(visible(out.text))
    return 0 if out.ok else 1
