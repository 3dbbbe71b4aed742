"""Which changes of the configuration a run can be resumed with."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distil_tl.utils.args import flatten, plain, read_yaml
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import read_json
from distil_tl.utils.log import logger

# Keys that change how a run proceeds but not what it computes. They may differ when a run is resumed.
FREE_ON_RESUME = (
    "run_dir",
    "resume",
    "data.root",  # a folder may be moved; the fingerprint of its index is compared
    "data.labels",  # the same
    "data.stage_to",
    "data.workers",
    "data.prefetch_mib",
    "data.on_bad_image",  # without bad images it has no effect, and with one `error` ended the run
    "data.max_local_batch_size",
    "deterministic",  # it only rounds in another order
    "recipe",  # the keys that it sets are compared
    "checkpoint.",
    "distributed.",
    "tracking.",
)

# Keys that concern only stages that have not begun, and are part of the name of a run.
FREE_FOR_LATER_STAGES = ("max_minutes",)

# Keys that are newer than some saved runs, as `data.KEY` or `stages.*.KEY`, with the value for the behaviour before. A
# saved configuration without the key gets this value, and this value is not part of a run's name.
NEW_KEYS: dict[str, Any] = {
    "data.crop_mode": "weights",
    "data.crop_pct": None,
    "data.extensions": [],
    "data.balance": "none",
    "data.intensity": "dtype",
    "data.labels": None,
    "data.columns.path": None,
    "data.columns.label": None,
    "data.columns.split": None,
    "data.columns.weight": None,
    "data.split.val": 0.2,  # folders without splits were refused
    "data.split.test": 0.0,
    "data.split.group": None,
    "data.split.seed": 0,
    "data.prefetch_mib": 2048,  # it had no limit; what is computed does not depend on it
    "distributed.heartbeat_seconds": None,  # frozen ranks were not looked for
    "model.drop_path": None,
    "model.dropout": None,
    "model.readout": "pooled",
    "recipe": None,
    "metric": "top1",
    "prefer_last": False,
    "stages.*.patience": None,
    "stages.*.distill.teacher": None,
    "stages.*.distill.model": None,
    "stages.*.distill.image_size": None,
    "stages.*.distill.temperature": 2.0,
    "stages.*.distill.alpha": 0.5,
    "max_minutes": None,
    "optim.loss": "cross_entropy",
    "optim.focal_gamma": 2.0,
    "optim.effective_beta": 0.999,
    "stages.*.search.prefer": "best",
    "stages.*.head": "linear",
    "stages.*.mixup": 0.0,
    "stages.*.cutmix": 0.0,
    "stages.*.mix_off_epochs": 0,
    "stages.*.ema": None,
    "stages.*.wise_ft": False,
    "compile_mode": "default",
    "tf32": True,
    "deterministic": False,
}

# Keys whose default has changed, with the earlier one. A run that began with it keeps it, if the command does not give
# the key.
EARLIER_DEFAULTS: dict[str, Any] = {
    "data.augment": "light",
    "data.crop_mode": "weights",
    "prefer_last": False,
    "stages.head.augment": None,
    "stages.full.lr": 3e-4,
    "stages.full.layer_decay": 0.9,
    "stages.full.wise_ft": False,
}


def earlier_defaults(then: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The values of keys with another default now that a configuration has, and that are not given anew.

    Args:
        then: its values by dotted key.
        given: dotted keys.
    """
    return {key: value for key, value in EARLIER_DEFAULTS.items()
            if key in then and then[key] == value and key not in given}  # fmt: skip


def new_keys(stages: Iterable[str]) -> dict[str, Any]:
    """`NEW_KEYS` with the names of the stages filled in."""
    found: dict[str, Any] = {}
    for key, value in NEW_KEYS.items():
        names = stages if key.startswith("stages.*.") else [""]
        found |= {key.replace("*", name, 1): value for name in names}
    return found


def is_free_on_resume(key: str) -> bool:
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE_ON_RESUME)


def unsafe_changes(
    saved: dict[str, Any],
    now: dict[str, Any],
    started: Sequence[str],
    digests: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
) -> list[str]:
    """Differences between two configurations that a run can't resume with.

    Args:
        saved, now: nested dicts.
        started: stages that have begun. Others may still change.
        digests: `interpolation_digests` of both.
    """
    before, after = flatten(saved), flatten(now)
    for key, value in new_keys({**(saved.get("stages") or {}), **(now.get("stages") or {})}).items():
        before.setdefault(key, value)
        after.setdefault(key, value)
    changes = []
    for key in sorted(before.keys() | after.keys()):
        parts = key.split(".")
        not_started = parts[0] == "stages" and len(parts) > 1 and parts[1] not in started
        if is_free_on_resume(key) or not_started or key in FREE_FOR_LATER_STAGES:
            continue
        if before.get(key) != after.get(key):
            changes.append(f"{key}: was {_as_yaml(before.get(key))}, now {_as_yaml(after.get(key))}")
        elif key in digests[0] and digests[0][key] != digests[1].get(key):
            changes.append(f"{key}: {after[key]} has another value than before")
    stages = now.get("stages") or {}
    left = [name for name in started if name in stages]
    ahead = [name for name, stage in stages.items() if name in left or stage.get("epochs") != 0]
    if ahead[: len(left)] != left:
        changes.append(f"stages: the order was {', '.join(started)}, now {', '.join(ahead)}")
    return changes


def _as_yaml(value: Any) -> str:
    """A value as a configuration file has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def refuse_changes(values: dict[str, Any], unresolved: DictConfig, state: dict[str, Any], run_dir: Path) -> None:
    """Refuse to resume a run with a configuration that would not be the same training.

    Args:
        values: the configuration as nested dicts.
        unresolved: the same with its interpolations unresolved.
        state: state.json of the checkpoint to resume from.
        run_dir: that the checkpoint is in.

    Raises:
        UserError: listing the changes.
    """
    saved = run_dir / "config.yaml"
    if not saved.exists():
        logger.warning("%s is missing; cannot check for changes of the configuration", saved)
        return
    digests = state.get("interpolated", {}), interpolation_digests(values, unresolved)
    changes = unsafe_changes(read_yaml(saved), plain(unresolved), list(state["run"]["stages"]), digests)
    if changes:
        listing = "\n".join(f"  - {change}" for change in changes)
        only_epochs = all(".epochs: " in change for change in changes)
        completed = "The run in it is completed. " if _is_completed(run_dir) else ""
        raise UserError(
            f"{run_dir} holds a run of another configuration, and resuming it with this one would not be the same "
            f"training:\n{listing}\n{completed}Use the old values, or choose another run_dir."
            f"{_way_to_train_longer(run_dir, values, state) if only_epochs else ''}"
        )


def _way_to_train_longer(run_dir: Path, values: dict[str, Any], state: dict[str, Any]) -> str:
    """What to do where a stage that has begun is to have more epochs; empty if none is.

    The learning rate follows from the number of epochs, so a stage can't be continued as if it had been longer.
    """
    before = read_yaml(run_dir / "config.yaml").get("stages") or {}
    for name in state["run"]["stages"]:
        epochs = before.get(name, {}).get("epochs")
        wanted = values["stages"].get(name, {}).get("epochs")
        if isinstance(wanted, int) and isinstance(epochs, int) and wanted > epochs:
            more = wanted - epochs
            first = "" if _is_completed(run_dir) else "let it end with the old values, and "
            return (
                f" To train longer, {first}add a stage: distil-tl extend "
                f"{shlex.quote(str(run_dir))} stages.{name}.epochs=+{more}"
            )
    return ""


def _is_completed(run_dir: Path) -> bool:
    try:
        return bool(read_json(run_dir / "summary.json")["status"] == "completed")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def interpolation_digests(values: dict[str, Any], unresolved: DictConfig) -> dict[str, str]:
    """Digests of the values behind interpolations such as `${oc.env:SEED}`, by key: comparable, but not readable."""
    leaves = flatten(values)
    found = {}
    for key, text in flatten(plain(unresolved)).items():
        if isinstance(text, str) and "${" in text and not is_free_on_resume(key):
            found[key] = hashlib.sha256(f"{key}={leaves[key]!r}".encode()).hexdigest()[:16]
    return found
