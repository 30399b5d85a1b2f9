"""The command that writes and judges golden files."""

import argparse
from pathlib import Path

from tinyprompt.cli.report import Output, argument, command
from tinyprompt.golden import suite
from tinyprompt.golden.judge import judge


@command(
    "golden",
    "golden-files",
    argument("folder", metavar="DIR", nargs="?", help="folder of the suite (tinyprompt-golden)"),
    argument("--judge", metavar="THEIRS", help="a folder of your results; without DIR, the suite is computed"),
)
def golden(args: argparse.Namespace) -> Output:
    """Write small models with every value that a right T5 computes from them, or judge results by them.

    It is for implementations in other languages; README.md of the suite explains every file. With --judge, the first
    array that differs is named for each batch, and the exit status is 1 if there is one.
    """
    if args.judge:
        report = judge(Path(args.judge), Path(args.folder) if args.folder else None)
        return Output(report.as_dict(), report, report.ok)
    folder = Path(args.folder or "tinyprompt-golden")
    sizes = suite.write(folder)
    told = f"{folder}: {len(sizes)} files, {sum(sizes.values()):,} bytes; begin with {folder / 'README.md'}"
    return Output({"folder": str(folder), "golden": suite.VERSION, "files": sizes}, told)
