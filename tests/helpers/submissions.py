"""Submissions with `launch.submit` to the fake Slurm."""

from __future__ import annotations

from launch import submit

PLAIN = ["data.root=null", "model.name=shufflenet_v2_x0_5", "model.weights=none", "run_dir=runs/flowers"]
ON_CPUS = ["slurm.gpus_per_node=0", "slurm.cpus_per_task=1"]


def submitted(*args: str) -> None:
    assert submit.main([*PLAIN, *args]) == 0


def refusal(capsys, *args: str) -> str:
    assert submit.main([*PLAIN, *args]) == 2
    err: str = capsys.readouterr().err
    assert err.startswith("launch.submit: ")
    return err.removeprefix("launch.submit: ")
