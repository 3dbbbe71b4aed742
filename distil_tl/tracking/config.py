"""The section `tracking` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

WANDB_MODES = ("disabled", "offline", "online")


@dataclass
class WandbConfig:
    mode: str = "disabled"  # disabled | offline | online
    project: str = "distil_tl"  # the W&B project of the runs
    entity: str | None = None  # the user or team; null: W&B's default
    name: str | None = None  # null: the name of the run directory
    group: str | None = None  # runs shown together, such as those of a sweep
    tags: list[str] = field(default_factory=list)  # as in [baseline,224px]
    mistakes: int = 20  # most confident mistakes to show at the end, with a thumbnail each
    artifact: bool = False  # also upload the weights of the best checkpoint at the end
    finish_timeout_seconds: float = 60.0  # time to send the rest at the end; `launch.sync` sends what is left


@dataclass
class TrackingConfig:
    log_every: int = 20  # optimizer steps between lines of training metrics
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def problems(self) -> list[str]:
        """One message for each value that is not valid."""
        found = []
        if self.log_every < 1:
            found.append("tracking.log_every must be at least 1")
        if self.wandb.mode not in WANDB_MODES:
            found.append(f"tracking.wandb.mode is {self.wandb.mode!r}; choose one of {', '.join(WANDB_MODES)}")
        if self.wandb.mistakes < 0:
            found.append("tracking.wandb.mistakes can't be less than 0")
        if self.wandb.finish_timeout_seconds <= 0:
            found.append("tracking.wandb.finish_timeout_seconds must be more than 0")
        return found
