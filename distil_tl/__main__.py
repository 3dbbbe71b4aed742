"""`python -m distil_tl COMMAND ...`: the same as `distil-tl`, where its folder is not in PATH."""

import sys

from distil_tl.cli.main import main

sys.exit(main())
