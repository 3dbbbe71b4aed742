"""Tests of distil_tl and launch. tests/ mirrors the packages."""

import os

# Before torch is imported. Several tests run at once, and several ranks in some: more threads would be slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
