"""`python -m distil_tl.cli COMMAND ...`: the same as `distil-tl`, where the package is not installed."""

import sys

from distil_tl.cli.main import main

sys.exit(main())
