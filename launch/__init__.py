"""Runs and sweeps of runs on Slurm, by way of submitit: see docs/cluster.md."""
