"""Submission of runs and sweeps to Slurm through submitit; see docs/cluster.md."""
