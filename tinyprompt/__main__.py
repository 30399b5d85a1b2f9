"""`python -m tinyprompt` is the command `tinyprompt`."""

import sys


def main() -> int:
    """Run the command line. Ctrl-C while it is being imported is not a traceback."""
    try:
        from tinyprompt.cli.main import main
    except KeyboardInterrupt:
        print("tinyprompt: stopped; nothing was done", file=sys.stderr)
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(main())
