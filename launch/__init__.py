"""Submission of runs and sweeps to Slurm through submitit; see docs/cluster.md."""

from distil_tl.utils import import_path  # noqa: F401  # first: with it the package decides from where to import
