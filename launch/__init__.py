"""Submission of runs and sweeps to Slurm through submitit; see docs/cluster.md."""

import distil_tl  # noqa: F401  # first, as it decides from where modules are imported
