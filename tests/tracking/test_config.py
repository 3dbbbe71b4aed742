"""The section `tracking` of the configuration."""

from __future__ import annotations

from distil_tl.tracking.config import TrackingConfig, WandbConfig


def test_problems():
    assert TrackingConfig().problems() == []
    wrong = TrackingConfig(log_every=0, wandb=WandbConfig(mode="on", mistakes=-1, finish_timeout_seconds=0))
    problems = wrong.problems()
    assert problems[0] == "tracking.log_every must be at least 1"
    assert problems[1].startswith("tracking.wandb.mode is 'on'")
    assert [problem.split()[0] for problem in problems[2:]] == [
        "tracking.wandb.mistakes", "tracking.wandb.finish_timeout_seconds",
    ]  # fmt: skip
