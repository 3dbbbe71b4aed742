"""A training that is tracked by a W&B-compatible server, in several attempts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.helpers.arguments import small_args
from tests.helpers.chaos import Ended, attempt, left_over_processes
from tests.helpers.ranks import lines
from tests.helpers.wandb_server import tracked, with_variable

ALL = list(range(1, 13))  # two epochs of 6 steps


def both(one: Callable[[], None], two: Callable[[], None]) -> None:
    one()
    two()


class Run:
    """A training that tracks every step and saves a checkpoint every 4 steps."""

    def __init__(self, folder: Path, images: Path, *more: str):
        self.folder, self.dir, self.ended = folder, folder / "run", list[Ended]()
        self.args = [*small_args(images), f"run_dir={self.dir}", "stages.full.epochs=1", "checkpoint.every_steps=4"]
        self.args += ["tracking.wandb.mode=online", "tracking.wandb.mistakes=0", *more]

    def attempt(self, prepare: Callable[[], None], world: int = 1) -> None:
        prepare = partial(both, partial(tracked, {"TRACKED_RUN": str(self.folder)}), prepare)
        self.ended.append(attempt(self.folder / f"attempt-{len(self.ended)}", self.args, world, prepare=prepare))

    def finished(self) -> None:
        """Check that training ended as without W&B, and that no process is left."""
        assert not any("Traceback" in said for ended in self.ended for said in ended.said), self.ended
        assert set(self.ended[-1].statuses) == {0}, self.ended
        assert json.loads((self.dir / "summary.json").read_text())["status"] == "completed"
        assert [line["step"] for line in lines(self.dir, window="interval")] == ALL
        assert len(lines(self.dir, split="val")) == 2
        assert left_over_processes(self.folder) == []
        assert with_variable(f"TRACKED_RUN={self.folder}") == [], "of W&B's"

    def warnings(self) -> list[str]:
        said = "".join(ended.said[0] for ended in self.ended)
        return [line for line in said.splitlines() if line.startswith("Weights & Biases does not")]
