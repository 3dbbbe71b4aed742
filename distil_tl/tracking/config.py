"""The section `tracking` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

WANDB_MODES = ("disabled", "offline", "online")
_NOT_IN_NAMES = "/\\#?%:"
MAX_PROJECT, MAX_TAG = 128, 64  # characters


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
        if self.wandb.mode != "disabled":
            found += _name_problems(self.wandb)
        if self.wandb.mistakes < 0:
            found.append("tracking.wandb.mistakes can't be less than 0")
        if self.wandb.finish_timeout_seconds <= 0:
            found.append("tracking.wandb.finish_timeout_seconds must be more than 0")
        return found


def _name_problems(config: WandbConfig) -> list[str]:
    """Names that W&B refuses, which would be found only after training."""
    found, key = [], "tracking.wandb"
    if bad := sorted(set(config.project) & set(_NOT_IN_NAMES)):
        hint = "; the user or team goes in tracking.wandb.entity" if "/" in bad else ""
        found.append(f"{key}.project={config.project} must have none of {' '.join(_NOT_IN_NAMES)}{hint}")
    if len(config.project) > MAX_PROJECT:
        found.append(f"{key}.project has {len(config.project)} characters; W&B permits {MAX_PROJECT}")
    if config.entity is not None and any(char in _NOT_IN_NAMES or char.isspace() for char in config.entity):
        found.append(f"{key}.entity={config.entity} is the name of a user or team, without spaces and {_NOT_IN_NAMES}")
    if long := [tag for tag in config.tags if not 1 <= len(tag) <= MAX_TAG]:
        found.append(f"{key}.tags: {long[0]!r} must have 1 to {MAX_TAG} characters")
    return found
