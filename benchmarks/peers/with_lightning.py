"""The peer Lightning. As documented: `BackboneFinetuning` in one fit. Tuned: `BaseFinetuning` and a fit per stage."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import Tensor, nn

from benchmarks.peers import shared
from benchmarks.peers.job import Events, Job, Stage, lr_factor

DOCUMENTED_LR = 1e-3  # from the example in BackboneFinetuning's documentation


class Classifier(LightningModule):  # type: ignore[misc]
    """The network with its training and validation steps. As documented `stage` is None: one optimizer for all."""

    def __init__(self, job: Job, events: Events | None) -> None:
        super().__init__()
        self.job, self.events = job, events
        self.backbone = shared.network(job)
        self.head = self.backbone.get_submodule(job.head)
        self.backbone.set_submodule(job.head, nn.Identity())
        self.stage: Stage | None = None
        self.count = shared.Count()

    def forward(self, images: Tensor) -> Tensor:
        with shared.autocast(self.job, self.stage.name if self.stage else ""):
            logits: Tensor = self.head(self.backbone(shared.to_format(self.job, images)))
        return logits.float()

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.job.speed.frozen_statistics:
            shared.freeze_statistics(self)
        return self

    def training_step(self, batch: Any, index: int) -> Tensor:
        images, targets = batch
        return F.cross_entropy(self(images), targets)

    def validation_step(self, batch: Any, index: int) -> None:
        images, targets = batch
        self.count.add(self(images), targets)

    def on_validation_epoch_end(self) -> None:
        epoch, name, head = self.current_epoch + 1, "head", self.job.stage("head").epochs
        if self.stage is not None:
            name = self.stage.name
        elif epoch > head:
            epoch, name = epoch - head, "full"
        if self.events is not None and not self.trainer.sanity_checking:
            self.count.write(self.events, name, epoch)
        self.count = shared.Count()

    def configure_optimizers(self) -> Any:
        if self.stage is None:
            return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=DOCUMENTED_LR)
        groups = shared.parameter_groups(self.named_parameters(), self.job.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.stage.lr, fused=self.job.speed.fused or None)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, total, self.job.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class FrozenBackbone(BaseFinetuning):  # type: ignore[misc]
    def freeze_before_training(self, module: Classifier) -> None:
        self.freeze(module.backbone, train_bn=False)

    def finetune_function(self, module: Classifier, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        pass


def run(job: Job, events: Events) -> None:
    warnings.filterwarnings("ignore", module="lightning")
    model = Classifier(job, events)
    if job.tuned:
        run_tuned(job, model, events)
        return
    events.begin("head")
    head, full = job.stage("head"), job.stage("full")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=head.epochs + full.epochs, accelerator=accelerator(job), devices=1, default_root_dir=folder,
            callbacks=[BackboneFinetuning(head.epochs)], enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, shared.train_loader(job, full), shared.val_loader(job))


def run_tuned(job: Job, model: Classifier, events: Events) -> None:
    if job.speed.channels_last:
        model.to(memory_format=torch.channels_last)
    val = shared.val_loader(job)
    for stage in job.stages:
        if not stage.epochs:
            continue
        events.begin(stage.name)
        model.stage = stage
        if stage.name == "full":
            BaseFinetuning.make_trainable(model)
        model.train()  # fit() does not change the training mode of modules
        trainer = Trainer(
            max_epochs=stage.epochs, accelerator=accelerator(job), devices=1, gradient_clip_val=job.clip_norm,
            callbacks=[FrozenBackbone()] if stage.name == "head" else [], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(model, shared.train_loader(job, stage), val)


def accelerator(job: Job) -> str:
    return "gpu" if job.device == "cuda" else "cpu"


def network(job: Job) -> nn.Module:
    return Classifier(job, None)


if __name__ == "__main__":
    shared.main("lightning", run, network, shared.folder_view)
