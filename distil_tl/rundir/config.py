"""The section `checkpoint` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CheckpointConfig:
    every_steps: int | None = None  # also within an epoch; null: by time only
    every_minutes: float | None = 10.0  # also within an epoch; null: by steps only
    keep: int = 2  # newest checkpoints kept, besides the best

    def problems(self) -> list[str]:
        found = []
        if self.keep < 1:
            found.append("checkpoint.keep must be at least 1")
        if self.every_steps is not None and self.every_steps < 1:
            found.append("checkpoint.every_steps must be at least 1, or null")
        if self.every_minutes is not None and self.every_minutes <= 0:
            found.append("checkpoint.every_minutes must be positive, or null")
        return found
