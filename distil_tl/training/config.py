"""The sections `stages` and `optim` of the configuration, and the valid values of `precision` and `compile`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distil_tl.data.augmentation import Augment, augment_problem
from distil_tl.models.library_folder import is_weights, weights_in, weights_problem
from distil_tl.models.names import LIBRARY_CONFIG
from distil_tl.training.heads.config import head_problems
from distil_tl.utils.auto import AUTO, real_number, whole_number
from distil_tl.utils.home import expand_home

BATCH_NORM = ("frozen", "train")
FEATURES = ("auto", "on", "off")
OPTIMIZERS = ("adamw", "sgd")
COMPRESSIONS = ("none", "bf16")
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
PREFERENCES = ("best", "regularized")
LOSSES = ("cross_entropy", "focal")
METRICS = ("top1", "top5", "macro_f1", "balanced_accuracy", "loss")
MAX_VIEWS = 10_000  # each is as large as the features of all images
COMPILE = ("none", "prefix", "all")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


def rank_by(metric: str, figures: Mapping[str, Any]) -> tuple[float, float]:
    """A sort key for evaluations, the best first: by the metric, then by the loss. What is not finite is the worst."""
    value, loss = (x if math.isfinite(x) else math.inf for x in (figures[metric], figures["loss"]))
    return (value if metric == "loss" or value == math.inf else -value), loss


@dataclass
class SearchConfig:
    """A grid of heads, trained on features before the stage. An empty list means the stage's own value."""

    lr: list[float] = field(default_factory=list)  # candidates for lr, chosen by `metric` on val; []: no search
    weight_decay: list[float] = field(default_factory=list)  # candidates for optim.weight_decay
    prefer: str = "best"  # of the heads: best | regularized (highest weight decay within a standard error of the best)

    @property
    def wanted(self) -> bool:
        return bool(self.lr or self.weight_decay)

    def problems(self, key: str) -> list[str]:
        found = []
        if not all(0 < lr < float("inf") for lr in self.lr):
            found.append(f"{key}.lr must hold positive numbers")
        if not all(0 <= decay < float("inf") for decay in self.weight_decay):
            found.append(f"{key}.weight_decay must hold numbers of 0 or more")
        if self.prefer not in PREFERENCES:
            found.append(f"{key}.prefer is {self.prefer!r}; choose one of {', '.join(PREFERENCES)}")
        return found


@dataclass
class DistillConfig:
    """Knowledge distillation: the stage learns from the outputs of a trained model, and from the labels."""

    # Weights are a file, or a folder of `distil-tl export --format safetensors`. Of a run its best checkpoint teaches.
    teacher: str | None = None  # a trained model of the same classes: a run directory or weights; null: none
    temperature: float = 2.0  # that softens the probabilities of both models
    alpha: float = 0.5  # share of the teacher in the loss; the labels have the rest
    model: str | None = None  # of weights, as model.name; null: as config.json beside them says
    image_size: int | None = None  # of weights, in pixels; null: as config.json says, else that of `model`

    def problems(self, key: str) -> list[str]:
        found = []
        if not 0 < self.temperature < float("inf"):
            found.append(f"{key}.temperature must be a positive number")
        if not 0 <= self.alpha <= 1:
            found.append(f"{key}.alpha must be from 0 (the labels alone) to 1 (the teacher alone)")
        if self.image_size is not None and self.image_size < 8:
            found.append(f"{key}.image_size must be at least 8 pixels")
        return found + list(self._teacher_problems(key))

    @property
    def weights(self) -> Path | None:
        """The path of a teacher that is weights; None for a run directory, and without a teacher."""
        path = None if self.teacher is None else expand_home(self.teacher)
        return path if path is not None and is_weights(path) else None

    def _teacher_problems(self, key: str) -> Iterator[str]:
        described = [name for name in ("model", "image_size") if getattr(self, name) is not None]
        if self.teacher is None:
            yield from (f"{key}.{name} is of a teacher: set {key}.teacher to its weights" for name in described)
            return
        path, shown = expand_home(self.teacher), f"{key}.teacher={self.teacher}"
        if str(path).startswith("~"):  # a home that is not known, which is named with those of other paths
            return
        if self.weights is not None:
            if problem := weights_problem(path):
                yield f"{key}.teacher: {problem}"
            elif self.model is None and not weights_in(path).with_name(LIBRARY_CONFIG).is_file():
                yield f"{shown}: name the network of these weights, as in {key}.model=timm/efficientnet_b0"
            return
        if not (path / "config.yaml").is_file():
            yield f"{shown} is not a run directory: config.yaml is missing"
        elif not (path / "checkpoints" / "best").is_dir():
            yield f"{shown} has no best checkpoint: let that run reach its first one"
        for name in described:
            yield f"{key}.{name} is of a teacher that is weights, and {self.teacher} is a run directory: remove it"


@dataclass
class StageConfig:
    unfreeze: Any = "all"  # head | all | the N last groups | [group names]
    epochs: Any = 1  # 0 skips the stage; auto: by the number of training images
    patience: int | None = None  # epochs without a better `metric` on val that end the stage early; null: none do
    lr: Any = 1e-3  # peak learning rate of the head; auto: by the accuracy of the stage before
    layer_decay: Any = 1.0  # learning rate of each group, relative to the group above it; auto: as for lr
    batch_norm: str = "frozen"  # frozen: running statistics are kept | train: they are updated in unfrozen groups
    augment: Any = None  # as data.augment; null: data.augment
    mixup: float = 0.0  # blend images of a batch, by shares from Beta(mixup, mixup), as in 0.2; 0: off
    cutmix: float = 0.0  # paste boxes of other images, by shares from Beta(cutmix, cutmix), as in 1.0; 0: off
    mix_off_epochs: int = 0  # the last epochs, without mixup and cutmix
    image_size: int | None = None  # pixels; null: data.image_size
    features: str = "auto"  # train on cached output of the frozen part: on | off | auto (if results stay the same)
    views: int | None = None  # augmented views of each image in the features; null: one view, not augmented
    head: str = "linear"  # linear: epochs of steps | fitted: logistic | ridge | lda | prototypes | cosine | mlp
    search: SearchConfig = field(default_factory=SearchConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    ema: float | None = None  # decay of a moving average of the weights, which is evaluated and kept; null: none
    wise_ft: bool = False  # at the end, interpolate between the first weights of the stage and its last or best ones

    def __post_init__(self) -> None:
        self.epochs = whole_number(self.epochs)
        self.lr = real_number(self.lr)
        self.layer_decay = real_number(self.layer_decay)

    @property
    def fits_head(self) -> bool:
        """Whether the head is fitted, which counts as one epoch of one step."""
        return self.head != "linear"

    @property
    def trains_head(self) -> bool:
        """Whether the head trains alone."""
        return self.unfreeze in ("head", 1, ["head"])

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def mixes_in_no_epoch(self) -> bool:
        """Whether the last epochs, which are without mixing, are all that there are."""
        return self.mixes and type(self.epochs) is int and 0 < self.epochs <= self.mix_off_epochs

    def problems(self, name: str, *, hflip: bool = True) -> list[str]:
        """Messages for all invalid values; `hflip` is `data.hflip`."""
        found = []
        key = f"stages.{name}"
        if self.augment is not None and (problem := augment_problem(self.augment, f"{key}.augment", hflip=hflip)):
            found.append(problem)
        if not _is_unfreeze(self.unfreeze):
            found.append(
                f"{key}.unfreeze is {self.unfreeze!r}; give `head`, `all`, a number of last groups (1 is the head "
                f"alone), or a list of group names"
            )
        if self.epochs != AUTO and type(self.epochs) is not int:
            found.append(f"{key}.epochs is {self.epochs!r}; give a whole number, or auto")
        elif self.epochs != AUTO and self.epochs < 0:
            found.append(f"{key}.epochs must be 0 (skip the stage) or more")
        if self.patience is not None and self.patience < 1:
            found.append(f"{key}.patience must be at least 1 epoch, or null")
        if self.lr != AUTO and not (isinstance(self.lr, float) and 0 < self.lr < math.inf):
            found.append(f"{key}.lr is {self.lr!r}; give a positive number, or auto")
        if self.layer_decay != AUTO and not (isinstance(self.layer_decay, float) and 0 < self.layer_decay <= 1):
            found.append(f"{key}.layer_decay is {self.layer_decay!r}; give a number above 0 and at most 1, or auto")
        if self.batch_norm not in BATCH_NORM:
            found.append(f"{key}.batch_norm is {self.batch_norm!r}; choose one of {', '.join(BATCH_NORM)}")
        if self.features not in FEATURES:
            found.append(f"{key}.features is {self.features!r}; choose one of {', '.join(FEATURES)}")
        if self.views is not None and not 1 <= self.views <= MAX_VIEWS:
            found.append(f"{key}.views must be at least 1 and at most {MAX_VIEWS:,}, or null")
        if self.unfreeze == "all" and (self.features == "on" or self.views is not None):
            found.append(
                f"{key} trains the whole network, so it can't use features; remove {key}.features and {key}.views"
            )
        elif self.views is not None and self.features == "off":
            found.append(f"{key}.views are of features, and {key}.features=off; remove one of them")
        found += self._mixing_problems(key)
        steps = {
            "search": self.search.wanted, "distill.teacher": self.distill.teacher, "mixup": self.mixup,
            "cutmix": self.cutmix, "views": self.views, "ema": self.ema, "wise_ft": self.wise_ft,
            "patience": self.patience,
        }  # fmt: skip
        found += head_problems(key, self.head, [name for name, value in steps.items() if value])
        if self.ema is not None and not 0 < self.ema < 1:
            found.append(f"{key}.ema is the decay of an average: above 0 and below 1, such as 0.99, or null for none")
        if self.image_size is not None and self.image_size < 8:
            found.append(f"{key}.image_size must be at least 8 pixels")
        if self.search.wanted and self.distill.teacher is not None:
            found.append(f"{key}.search trains heads on the labels alone; remove it, or {key}.distill.teacher")
        return found + self.search.problems(f"{key}.search") + self.distill.problems(f"{key}.distill")

    def _mixing_problems(self, key: str) -> Iterator[str]:
        for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            if not 0 <= alpha < float("inf"):
                yield f"{key}.{name} must be a number of 0 (off) or more"
        if self.mix_off_epochs < 0:
            yield f"{key}.mix_off_epochs must be 0 or more"
        elif self.mixes_in_no_epoch:
            yield f"{key}.mix_off_epochs={self.mix_off_epochs} leaves none of {self.epochs} epochs to mix images in"
        if self.mixes and (self.features == "on" or self.views is not None or self.search.wanted):
            which = "search" if self.search.wanted else "features" if self.features == "on" else "views"
            yield f"{key} mixes images, and features can't be mixed; remove its mixup and cutmix, or {key}.{which}"


def _is_unfreeze(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return value >= 1
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(name, str) for name in value)
    return value in ("head", "all")


def default_stages() -> dict[str, StageConfig]:
    """A new head on the frozen backbone, then the whole network."""
    return {
        "head": StageConfig(unfreeze="head", epochs=3, lr=1e-2, augment="none"),
        "full": StageConfig(unfreeze="all", epochs=5, lr=AUTO, layer_decay=AUTO, wise_ft=True),
    }


def wants_features(stage: StageConfig, augment: Augment) -> bool:
    """Whether a stage asks for features. `auto` does where the result is the same with and without them."""
    if stage.features == "auto":
        same = stage.unfreeze != "all" and (augment == "none" or stage.views is not None)
        return same and not stage.mixes
    return stage.features == "on"


@dataclass
class OptimConfig:
    name: str = "adamw"  # adamw | sgd
    weight_decay: float = 0.01  # not applied to norms, biases, class tokens and position embeddings
    momentum: float = 0.9  # Nesterov, for sgd
    warmup: float = 0.1  # share of a stage's steps
    schedule: str = "cosine"  # after the warm-up: cosine | linear | constant
    loss: str = "cross_entropy"  # cross_entropy | focal (less weight for images that are right already)
    focal_gamma: float = 2.0  # of the focal loss: 0 is cross-entropy
    effective_beta: float = 0.999  # of data.balance=effective_number: 0 is none, 1 is data.balance=weights
    label_smoothing: float = 0.0  # share of each target spread over all classes
    clip_norm: float | None = 1.0  # limit of the global gradient norm; null: no clipping
    compression: str = "none"  # gradients between ranks: none | bf16 (half the bytes, for slow networks)

    def problems(self) -> list[str]:
        found = []
        if self.name not in OPTIMIZERS:
            found.append(f"optim.name is {self.name!r}; choose one of {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            found.append(f"optim.schedule is {self.schedule!r}; choose one of {', '.join(SCHEDULES)}")
        if self.compression not in COMPRESSIONS:
            found.append(f"optim.compression is {self.compression!r}; choose one of {', '.join(COMPRESSIONS)}")
        if self.loss not in LOSSES:
            found.append(f"optim.loss is {self.loss!r}; choose one of {', '.join(LOSSES)}")
        if self.loss == "focal" and self.label_smoothing:
            found.append("optim.loss=focal has no label smoothing; set optim.label_smoothing=0")
        if self.focal_gamma != 0 and self.focal_gamma < 1:
            found.append("optim.focal_gamma must be 0, or at least 1")
        if not 0 <= self.effective_beta < 1:
            found.append("optim.effective_beta must be at least 0 and below 1")
        if self.weight_decay < 0:
            found.append("optim.weight_decay must be 0 or more")
        if not 0 <= self.momentum < 1:
            found.append("optim.momentum must be at least 0 and below 1")
        if not 0 <= self.warmup < 1:
            found.append("optim.warmup is a share of the steps of each stage: at least 0 and below 1")
        if not 0 <= self.label_smoothing < 1:
            found.append("optim.label_smoothing must be at least 0 and below 1")
        if self.clip_norm is not None and self.clip_norm <= 0:
            found.append("optim.clip_norm must be positive, or null for no clipping")
        return found
