"""The section `tracking` of the configuration."""

from __future__ import annotations

import pytest

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


@pytest.mark.parametrize(
    ("wandb", "said"),
    [
        (WandbConfig(project="a/b"), "project=a/b must have none of / \\ # ? % :; the user or team goes in"),
        (WandbConfig(project="a?b"), "project=a?b must have none of"),
        (WandbConfig(project="x" * 129), "project has 129 characters; W&B permits 128"),
        (WandbConfig(entity="my team"), "entity=my team is the name of a user or team, without spaces"),
        (WandbConfig(tags=["ok", "x" * 65]), "must have 1 to 64 characters"),
    ],
)
def test_names_that_wandb_refuses(wandb: WandbConfig, said: str):
    assert TrackingConfig(wandb=wandb).problems() == [], "nothing is sent"
    for mode in ("offline", "online"):
        wandb.mode = mode
        (problem,) = TrackingConfig(wandb=wandb).problems()
        assert problem.startswith("tracking.wandb.")
        assert said in problem
