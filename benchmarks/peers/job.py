"""The job that all packages run, as a JSON file, and the file of events that each peer writes."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Stage:
    """`augment` is none (as in evaluation), flip (that, mirrored at random), or light.

    `light` is a random crop of at least half the area, mirrored at random.
    """

    name: str
    epochs: int
    lr: float
    augment: str


@dataclass(frozen=True)
class Speed:
    """Settings for speed. They do not change what a peer learns, except `frozen_statistics` of BatchNorm."""

    channels_last: bool = False
    bf16: tuple[str, ...] = ()  # in which stages
    workers: int = 2
    persistent: bool = False
    fused: bool = False
    frozen_statistics: bool = False


DOCUMENTED = Speed()


@dataclass(frozen=True)
class Job:
    """A training job. `root` contains train/ and val/; `weights` is the file of the initial state, head included."""

    root: str
    model: str  # timm's name
    weights: str
    head: str  # the name of the last layer in the network
    classes: int
    image_size: int
    resize: int  # shorter side before the centre crop
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    hflip: bool
    batch: int
    stages: tuple[Stage, ...]
    weight_decay: float
    warmup: float  # share of a stage's steps
    clip_norm: float
    seed: int
    threads: int
    device: str
    speed: Speed = DOCUMENTED
    squash: bool = False  # evaluation resizes both sides to `image_size`, in place of a centre crop
    test: bool = False  # test/ is evaluated after each epoch, too

    @property
    def tuned(self) -> bool:
        return self.speed != DOCUMENTED

    def with_speed(self, speed: Speed) -> Job:
        return replace(self, speed=speed)

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def with_epochs(self, **epochs: int) -> Job:
        return replace(self, stages=tuple(replace(s, epochs=epochs.get(s.name, s.epochs)) for s in self.stages))

    def save(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self), indent=1))
        return path

    @classmethod
    def load(cls, path: Path) -> Job:
        tree = json.loads(path.read_text())
        tree["stages"] = tuple(Stage(**stage) for stage in tree["stages"])
        tree["speed"] = Speed(**{**tree["speed"], "bf16": tuple(tree["speed"]["bf16"])})
        return cls(**{**tree, "mean": tuple(tree["mean"]), "std": tuple(tree["std"])})


def lr_factor(step: int, total: int, warmup: float) -> float:
    """The learning rate at `step`, relative to the stage's: linear warm-up, then cosine to 0. As in distil_tl."""
    first = round(warmup * total)
    if step < first:
        return (step + 1) / (first + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, total - first)))


class Events:
    """JSON lines with the time of each event: `begin` of a stage, and `epoch` after the evaluation of an epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _write(self, **fields: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"time": time.time(), **fields}) + "\n")

    def versions(self, **versions: str) -> None:
        self._write(event="versions", versions=versions)

    def begin(self, stage: str) -> None:
        self._write(event="begin", stage=stage)

    def epoch(self, stage: str, epoch: int, top1: float, loss: float, split: str = "val") -> None:
        """`epoch` counts from 1; `loss` and `top1` are over all images of `split`."""
        event = "epoch" if split == "val" else split
        self._write(event=event, stage=stage, epoch=epoch, top1=top1, loss=loss)


def read_events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
