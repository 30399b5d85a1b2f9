"""The command that writes golden files and compares results with them."""

import argparse
from pathlib import Path

from tinyprompt.cli.report import Output, argument, command
from tinyprompt.golden import suite
from tinyprompt.golden.judge import judge


@command(
    "golden",
    "golden-files",
    argument("folder", metavar="DIR", nargs="?", help="folder of the suite (tinyprompt-golden)"),
    argument("--judge", metavar="THEIRS", help="compare results in this folder; without DIR, the suite is computed"),
)
def golden(args: argparse.Namespace) -> Output:
    """Write small models with all values of a correct T5, or compare results with them.

    The files are for implementations in other languages. README.md of the suite explains every file. --judge reports
    the first array that differs in each batch. The exit status is 1 if an array differs.
    """
    if args.judge:
        report = judge(Path(args.judge), Path(args.folder) if args.folder else None)
        return Output(report.as_dict(), report, report.ok)
    folder = Path(args.folder or "tinyprompt-golden")
    sizes = suite.write(folder)
    told = f"{folder}: {len(sizes)} files, {sum(sizes.values()):,} bytes; start with {folder / 'README.md'}"
    return Output({"folder": str(folder), "golden": suite.VERSION, "files": sizes}, told)
