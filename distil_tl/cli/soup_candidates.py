"""The checkpoints that a soup is made of, and whether they can be averaged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distil_tl.config import Config, load_saved
from distil_tl.rundir.checkpoint import Checkpoints, find_damage, load_state
from distil_tl.training.config import METRICS, rank_by
from distil_tl.training.heads.config import network_head
from distil_tl.utils.args import refuse
from distil_tl.utils.errors import UserError, listed
from distil_tl.utils.log import logger, printable

# Keys with which the figures that the runs recorded would be others.
VIEW = ("data.image_size", "data.crop_mode", "data.crop_pct", "data.intensity")


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that was evaluated when it was written.

    Attributes:
        path: its folder.
        config: of its run.
        state: its state.json.
        run: the name of its run in messages.
    """

    path: Path
    config: Config
    state: Mapping[str, Any]
    run: str

    @property
    def run_dir(self) -> Path:
        return self.path.parent.parent

    @property
    def name(self) -> str:
        return f"{self.run}/{self.path.name}"

    @property
    def figures(self) -> Mapping[str, Any]:
        """Of its evaluation on val."""
        final: Mapping[str, Any] = self.state["run"]["final"]
        return final

    @property
    def stage(self) -> str:
        name: str = self.state["run"]["position"]["stage"]
        return name

    @property
    def image_size(self) -> int:
        size: int = (
            self.config.stages[self.stage].image_size
            or self.config.data.image_size
            or self.state["preprocess"]["crop_size"]
        )
        return size


def find_candidates(paths: Sequence[Path], overrides: Sequence[str]) -> list[Candidate]:
    """The checkpoints at `paths`, the best first; each once.

    Args:
        paths: run directories, or single checkpoints.
        overrides: `key=value` arguments that change the configuration of each run.

    Raises:
        UserError: all problems together: a path that is neither, fewer than two checkpoints, or other classes, another
            model, preprocessing or images of val.
    """
    refuse([
        f"{argument}: the checkpoints were evaluated otherwise, and these figures say what is added; remove it, and "
        f"give it to `distil-tl evaluate` of the average"
        for argument in overrides if argument.partition("=")[0] in VIEW or argument.startswith("stages.")
    ])  # fmt: skip
    found: dict[Path, Candidate] = {}
    for folder in (folder for path in paths for folder in _folders_at(path)):
        resolved = folder.resolve()
        if resolved not in found and (candidate := _read(folder, overrides)) is not None:
            found[resolved] = candidate
    candidates = named(list(found.values()))
    refuse([problem for candidate in candidates[1:] for problem in _differences(candidate, candidates[0])])
    if len(candidates) < 2:
        given = listed([str(path) for path in paths], 3)
        raise UserError(
            f"a soup needs at least two checkpoints that were evaluated, and {given} "
            f"has {'one' if candidates else 'none'}: give several runs, or train with a higher checkpoint.keep"
        )
    metric = candidates[0].config.metric
    if metric not in METRICS:
        raise UserError(f"metric is {metric!r}; choose one of {', '.join(METRICS)}")
    lacking = [candidate.name for candidate in candidates if metric not in candidate.figures]
    if lacking:
        raise UserError(f"{listed(lacking, 3)}: its figures lack {metric}; choose another one, such as metric=top1")
    return sorted(candidates, key=lambda candidate: rank_by(metric, candidate.figures))  # stable


def named(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with the name of each run: of its path, as few of the last folders as tell the runs apart."""
    paths = {candidate.run_dir.resolve() for candidate in candidates}
    count = 1
    while len({path.parts[-count:] for path in paths}) < len(paths):
        count += 1
    return [
        dataclasses.replace(candidate, run="/".join(candidate.run_dir.resolve().parts[-count:]))
        for candidate in candidates
    ]


def _folders_at(path: Path) -> list[Path]:
    if (path / "config.yaml").is_file():
        return Checkpoints(path / "checkpoints").all()
    if (path / "state.json").is_file():
        return [path.resolve()]  # `best` and `last` are links
    raise UserError(f"{path} is not a run directory, nor a checkpoint of one: config.yaml and state.json are missing")


def _read(folder: Path, overrides: Sequence[str]) -> Candidate | None:
    """The checkpoint in a folder; None, with a warning, if it can't be used."""
    damage = find_damage(folder)
    if damage is not None:
        logger.warning("%s is left out, as it is damaged: %s", folder, damage)
        return None
    state, run_dir = load_state(folder), folder.parent.parent
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is not a run directory: config.yaml is missing")
    position, final = state["run"]["position"], state["run"].get("final") or {}
    if position.get("consumed", 0) or final.get("step") != position.get("step"):
        logger.warning("%s is left out, as it was not evaluated: it was saved within an epoch", folder)
        return None
    return Candidate(folder, load_saved(run_dir, overrides), state, run_dir.name)


def _differences(one: Candidate, first: Candidate) -> Iterator[str]:
    """What speaks against an average of two checkpoints."""
    mine, theirs = set(one.state["classes"]), set(first.state["classes"])
    if one.state["classes"] != first.state["classes"]:
        differing = listed([printable(name) for name in sorted(mine ^ theirs)], 5) or "in another order"
        yield f"{one.name} has other classes than {first.name} ({differing}): give runs with the same classes"
    model = [candidate.config.model.name for candidate in (one, first)]
    if model[0] != model[1]:
        yield f"{one.name} is {model[0]}, and {first.name} is {model[1]}: give runs of one model"
    for what, values in {
        "image size": (one.image_size, first.image_size),
        "data.intensity": (one.config.data.intensity, first.config.data.intensity),
        "head": tuple(network_head(candidate.config.stages) for candidate in (one, first)),
        "preprocessing": (one.state["preprocess"], first.state["preprocess"]),
    }.items():
        if values[0] != values[1]:
            yield f"{one.name} has the {what} {values[0]}, and {first.name} has {values[1]}: give runs with the same"
    data = [candidate.state.get("data", {}).get("val") for candidate in (one, first)]
    if data[0] != data[1] and mine == theirs:
        yield (
            f"{one.name} was evaluated on other images than {first.name}, and may be trained on those of its val: give "
            f"runs with the same split"
        )
