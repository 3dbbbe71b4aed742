"""The Optuna study of a search: storage, sampler, search space. Needs Optuna."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import optuna

from distil_tl.utils.errors import UserError
from distil_tl.utils.files import write_atomic
from launch.sweep_file import Sweep, Values, draw_value

STORAGE_FILE = "optuna.log"
STARTUP = 5  # completed trials before the median of the others is used to prune


def open_study(sweep: Sweep, folder: Path) -> Any:
    """Create the study in `folder`, or load it to resume a search.

    Raises:
        UserError: the search began with another search space.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / STORAGE_FILE
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        write_atomic(path, content[: content.rfind(b"\n") + 1])  # a kill or a full disk left an incomplete last line
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path))),
        study_name="search",
        direction="minimize" if sweep.metric == "loss" else "maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
        load_if_exists=True,
    )
    space = {"metric": sweep.metric, "seed": sweep.seed, "random": sweep.random}
    before = study.user_attrs.get("space", space)
    changed = [f"`{key}`" for key in space if before.get(key) != space[key]]
    if changed:
        raise UserError(
            f"{folder} holds a search with another {' and '.join(changed)}; use the earlier values, or another --dir"
        )
    if "space" not in study.user_attrs:
        study.set_user_attr("space", space)
    return study


def ask_trial(study: Any, sweep: Sweep) -> tuple[Any, Values]:
    """A new trial of the study, and the values that Optuna suggests for it."""
    # Each trial has its own sampler seed: a resumed search must not draw the same numbers again.
    study.sampler = _sampler(f"{sweep.seed} {len(study.get_trials(deepcopy=False))}")
    asked = study.ask()
    suggested = {key: draw_value(_Suggest(asked, key), distribution) for key, distribution in sweep.random.items()}
    values = {**suggested, "seed": sweep.seed + asked.number}  # its own seed, so equal suggestions are two trials
    asked.set_user_attr("values", values)
    return asked, values


class _Suggest:
    """Optuna's suggestions for one key, with the methods of random.Random that `draw_value` calls."""

    def __init__(self, trial: Any, key: str) -> None:
        self.trial, self.key = trial, key

    def choice(self, values: list[Any]) -> Any:
        return values[self.trial.suggest_categorical(self.key, list(range(len(values))))]

    def uniform(self, low: float, high: float) -> float:
        value: float = self.trial.suggest_float(self.key, low, high)
        return value


def _sampler(seed: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=random.Random(seed).getrandbits(32), multivariate=True, constant_liar=True
        )
