"""The configuration: the sections of all folders composed."""

from __future__ import annotations

from dataclasses import dataclass, field

from distil_tl.data.augmentation import Augment, effective
from distil_tl.data.config import DataConfig
from distil_tl.distributed.config import DistributedConfig
from distil_tl.models.config import ModelConfig
from distil_tl.rundir.config import CheckpointConfig
from distil_tl.tracking.config import TrackingConfig
from distil_tl.training.config import OptimConfig, StageConfig, default_stages


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    stages: dict[str, StageConfig] = field(default_factory=default_stages)
    optim: OptimConfig = field(default_factory=OptimConfig)
    recipe: str | None = None  # stages and settings to begin with, which other keys change: quick | standard | best
    metric: str = "top1"  # chooses the best epoch and head: top1 | top5 | macro_f1 | balanced_accuracy | loss
    prefer_last: bool = True  # keep the last epoch where val can't tell it from the best one, by its top1 or top5
    max_minutes: float | None = None  # of training: stages get fewer epochs where they would take longer; null: any
    precision: str = "auto"  # auto (chosen by a trial in long stages) | fp32 | bf16 | fp16
    compile: str = "none"  # torch.compile, which takes about a minute: none | prefix (the frozen part) | all
    compile_mode: str = "default"  # of torch.compile: default | reduce-overhead (CUDA graphs) | max-autotune
    tf32: bool = True  # on CUDA, round float32 convolutions to TF32, which is faster; matrix products never are
    deterministic: bool = False  # on CUDA, use only algorithms that repeat bit by bit; slower
    seed: int = 0  # of the new head, the order of the images and the augmentations
    run_dir: str | None = None  # null: runs/DATA-MODEL-HASH, so that the same command resumes its run
    resume: str = "auto"  # auto: from the last checkpoint in run_dir | never | the path of a run or checkpoint
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def uses_data_augment(self) -> bool:
        """Whether a stage that is trained has no augmentation of its own."""
        return any(stage.epochs != 0 and stage.augment is None for stage in self.stages.values())

    def augment_of(self, stage: StageConfig) -> Augment:
        """The augmentation of a stage, `none` if nothing is left of it."""
        return effective(stage.augment or self.data.augment, hflip=self.data.hflip)
