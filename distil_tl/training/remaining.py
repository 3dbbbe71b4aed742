"""How long training will still take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distil_tl.rundir.state import planned
from distil_tl.utils.log import duration


def time_left(epochs: Mapping[str, int], stage: str, done: int, seconds: float) -> str:
    """The time that is left, in words, after an epoch that took `seconds` with its evaluation.

    How long an epoch of a later stage takes is not known before that stage has begun.

    Args:
        epochs: of each stage, by name.
        done: epochs of `stage` that are completed.
    """
    names = [name for name, count in epochs.items() if count > 0]
    later = names[names.index(stage) + 1 :]
    left = epochs[stage] - done
    if left <= 0:
        return f"next: {', '.join(later)}" if later else ""
    return f"about {duration(left * seconds)} left" + (f", then {', '.join(later)}" if later else "")


def planned_epochs(stages: Mapping[str, Mapping[str, Any]], state: Mapping[str, Any]) -> dict[str, int]:
    """The epochs of each stage, by name: as configured or recorded, or fewer where it stopped early.

    Args:
        stages: the section `stages` of config.yaml.
        state: what state.json of the last checkpoint has under `run`; empty without one.

    Raises:
        ValueError: they are `auto`, and there is no checkpoint yet.
    """
    records = state.get("stages", {})
    stopped = {name: int(record["epochs"]) for name, record in records.items() if record.get("stopped_early")}
    resolved = state.get("resolved", {})
    found = {name: planned(name, stage["epochs"], resolved, begun=name in records) for name, stage in stages.items()}
    return {name: int(epochs) for name, epochs in found.items()} | stopped
