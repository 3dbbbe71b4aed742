"""The state of a run besides tensors: its position, its best result, and a record of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from distil_tl.utils.auto import AUTO


@dataclass
class Position:
    """The position of a run.

    Attributes:
        stage: its name.
        epoch: of the stage, from 0.
        consumed: samples of the epoch that were trained on, over all ranks.
        step: optimizer steps since the run began.
    """

    stage: str
    epoch: int
    consumed: int
    step: int


@dataclass
class StageRecord:
    """What a stage has done so far. `seconds` includes set-up and evaluations, `train_seconds` does not."""

    epochs: int = 0
    lr: float | None = None  # what `lr: auto` is; None: a number is configured
    layer_decay: float | None = None  # likewise
    seconds: float = 0.0
    train_seconds: float = 0.0
    epoch_seconds: float = 0.0  # of training in the current epoch
    data_wait_seconds: float = 0.0  # of `train_seconds`, for which training waited for a batch
    epoch_data_wait_seconds: float = 0.0  # the same of `epoch_seconds`
    train_images: int = 0
    cached: bool = False  # it trains on features
    precision: str | None = None  # of the trained part; set once the stage has begun
    prefix_precision: str | None = None  # of the frozen part
    folded: bool | None = None  # BatchNorm is folded while the whole network trains
    trainable_parameters: int = 0
    train_top1: float | None = None  # running average over the last epoch
    top1: float | None = None  # on val, after the last epoch
    best: dict[str, Any] | None = None  # its best evaluation
    stopped_early: bool = False  # out of patience; its last checkpoint has the weights of its best evaluation
    search: dict[str, Any] | None = None  # result of the head search
    fit: dict[str, Any] | None = None  # the head that was fitted, and the settings that it was chosen from
    limit: dict[str, Any] | None = None  # what `max_minutes` made of its epochs, and from which figures
    teacher: dict[str, Any] | None = None  # whose outputs it learns from: run_dir, checkpoint and digest
    wise_ft: dict[str, Any] | None = None  # result of the interpolation at the end
    peak_memory_mb: float = 0.0  # of the rank with the highest peak: GPU memory, else memory of the process
    part_sizes: dict[str, int] = field(default_factory=dict)  # images at once, by work, after memory ran out

    @property
    def has_begun(self) -> bool:
        return self.precision is not None

    def has_finished(self, epochs: int) -> bool:
        return self.stopped_early or self.epochs >= epochs

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Whether as many epochs as `patience` have passed since the best evaluation of the stage."""
        if patience is None or self.best is None:
            return False
        passed: int = self.epochs - self.best["epoch"]
        return passed >= patience

    def summary(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["epoch_seconds"], fields["epoch_data_wait_seconds"]
        speed = self.train_images / self.train_seconds if self.train_seconds else 0.0
        return {**fields, "images_per_second": speed}


@dataclass
class RunState:
    """Position and history of a run; what `state.json` of a checkpoint holds under `run`."""

    position: Position | None = None
    best: dict[str, Any] | None = None
    final: dict[str, Any] | None = None
    stages: dict[str, StageRecord] = field(default_factory=dict)
    seconds: float = 0.0
    bad_images: dict[str, dict[str, str]] = field(default_factory=dict)  # by split and path below it: the reason
    resolved: dict[str, Any] = field(default_factory=dict)  # by key: what `auto` and `max_minutes` made of them

    @property
    def step(self) -> int:
        return self.position.step if self.position else 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> RunState:
        return cls(
            position=Position(**tree["position"]),
            best=tree["best"],
            final=tree["final"],
            stages={name: StageRecord(**record) for name, record in tree["stages"].items()},
            seconds=tree["seconds"],
            bad_images=tree["bad_images"],
            resolved=tree.get("resolved", {}),
        )


def planned(name: str, epochs: Any, resolved: Mapping[str, Any], *, begun: bool) -> Any:
    """The epochs of a stage: as configured, or what a run recorded; `auto` if it did not yet.

    Args:
        epochs: as configured.
        resolved: of the state of the run.
        begun: whether the stage has begun: then `max_minutes` may have changed its epochs.
    """
    if epochs == 0 or (epochs != AUTO and not begun):
        return epochs
    return resolved.get(f"stages.{name}.epochs", epochs)
