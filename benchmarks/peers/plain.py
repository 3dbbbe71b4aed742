"""The peer `plain`: a training loop as in torchvision's references and PyTorch's transfer-learning tutorial."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers import shared
from benchmarks.peers.job import Events, Job, Stage, lr_factor


def run(job: Job, events: Events) -> None:
    model = shared.network(job)
    if job.speed.channels_last:
        model.to(memory_format=torch.channels_last)
    splits = {split: shared.val_loader(job, split) for split in (("val", "test") if job.test else ("val",))}
    for stage in job.stages:
        if stage.epochs:
            events.begin(stage.name)
            train_stage(job, model, stage, splits, events)


def train_stage(job: Job, model: nn.Module, stage: Stage, splits: Mapping[str, shared.Batches], events: Events) -> None:
    head = model.get_submodule(job.head)
    model.requires_grad_(stage.name != "head")
    head.requires_grad_(True)
    loader = shared.train_loader(job, stage)
    groups = shared.parameter_groups(model.named_parameters(), job.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=stage.lr, fused=job.speed.fused or None)
    total = stage.epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, total, job.warmup))
    for epoch in range(stage.epochs):
        model.train()
        if job.speed.frozen_statistics:
            shared.freeze_statistics(model)
        for images, targets in loader:
            with shared.autocast(job, stage.name):
                logits = model(shared.to_format(job, images))
                loss = F.cross_entropy(logits, targets.to(job.device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
            optimizer.step()
            scheduler.step()
        for split, batches in splits.items():
            shared.evaluate(job, model, stage.name, batches).write(events, stage.name, epoch + 1, split)


if __name__ == "__main__":
    shared.main("torchvision", run, shared.network, shared.folder_view)
