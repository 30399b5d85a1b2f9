"""`python -m tinyprompt` is the command `tinyprompt`."""

import sys

from tinyprompt.cli import main

sys.exit(main())
