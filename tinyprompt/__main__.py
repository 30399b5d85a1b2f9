"""`python -m tinyprompt` is the command `tinyprompt`."""

import sys

from tinyprompt.cli.main import main

sys.exit(main())
