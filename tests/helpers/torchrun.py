"""The commands that a user types, for tests that start them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
