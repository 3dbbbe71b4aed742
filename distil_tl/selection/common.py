"""The settings that all cells of a selection have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from distil_tl.data.config import DataConfig
from distil_tl.models.config import ModelConfig
from distil_tl.selection.cells import Cell
from distil_tl.training.config import OptimConfig, StageConfig
from distil_tl.training.stage import Stage


@dataclass(frozen=True)
class Common:
    """The configuration of a cell, but for its backbone, size, crop and read-out.

    Attributes:
        stage: its name.
        config: of the stage whose heads are compared.
        model: as configured, with any name.
        data, optim, metric, precision, seed, tf32, deterministic: of the configuration.
        later: stages of best.yaml after this one.
    """

    stage: str
    config: StageConfig
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    metric: str
    precision: str
    seed: int
    tf32: bool
    deterministic: bool
    later: Mapping[str, StageConfig] = field(default_factory=dict)

    def model_of(self, cell: Cell) -> ModelConfig:
        return replace(self.model, name=cell.name, weights=cell.weights, readout=cell.readout)

    def stage_of(self, cell: Cell) -> Stage:
        return Stage(
            name=self.stage,
            config=self.config,
            optim=self.optim,
            image_size=cell.image_size,
            augment=self.config.augment,
            seed=self.seed,
            precision=self.precision,
            compile="none",
            metric=self.metric,
            balance=self.data.balance,
        )
