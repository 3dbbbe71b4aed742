"""The peer timm: its datasets, loaders, freezing, optimizer factory and scheduler, used as in its train.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader, create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import dispatch_clip_grad, freeze, unfreeze
from torch import Tensor, nn

from benchmarks.peers import shared
from benchmarks.peers.job import Events, Job, Stage


def run(job: Job, events: Events) -> None:
    model = shared.network(job)
    if job.speed.channels_last:
        model.to(memory_format=torch.channels_last)
    val = loader(job, "val", "none")
    backbone = [name for name, _ in model.named_children() if name != job.head.partition(".")[0]]
    for stage in job.stages:
        if not stage.epochs:
            continue
        events.begin(stage.name)
        if stage.name == "head":
            freeze(model, backbone, include_bn_running_stats=job.speed.frozen_statistics)
        else:
            unfreeze(model, backbone, include_bn_running_stats=True)
        train_stage(job, model.to(job.device), stage, val, events)


def loader(job: Job, split: str, augment: str) -> Any:
    if augment not in ("none", "light"):
        raise ValueError(f"only the plain loop has the augmentation {augment}")
    training = split == "train"
    batches = create_loader(
        create_dataset("", root=f"{job.root}/{split}", split="train"),
        input_size=(3, job.image_size, job.image_size),
        batch_size=job.batch,
        is_training=training,
        scale=(0.5, 1.0),
        hflip=0.5 if job.hflip else 0.0,
        color_jitter=0.0,
        interpolation=job.interpolation,
        mean=job.mean,
        std=job.std,
        num_workers=job.speed.workers,
        crop_pct=job.image_size / job.resize,
        device=torch.device(job.device),
        pin_memory=job.device == "cuda",
        persistent_workers=job.speed.persistent and job.speed.workers > 0,
    )
    if training and augment == "none":
        batches.dataset.transform = view_transform(job)
    return batches


def view_transform(job: Job) -> Any:
    """The transform of evaluation, without normalisation, which timm's loader does."""
    return create_transform(
        (3, job.image_size, job.image_size),
        interpolation=job.interpolation,
        crop_pct=job.image_size / job.resize,
        use_prefetcher=True,
    )


def train_stage(job: Job, model: nn.Module, stage: Stage, val: Any, events: Events) -> None:
    batches = loader(job, "train", stage.augment)
    fused = {"fused": True} if job.speed.fused else {}
    optimizer = create_optimizer_v2(model, opt="adamw", lr=stage.lr, weight_decay=job.weight_decay, **fused)
    total = stage.epochs * len(batches)
    scheduler = cosine(optimizer, total, job.warmup, stage.lr)
    criterion = nn.CrossEntropyLoss()
    step = 0
    for epoch in range(stage.epochs):
        model.train()
        if job.speed.frozen_statistics:
            shared.freeze_statistics(model)
        for images, targets in batches:
            with shared.autocast(job, stage.name):
                loss = criterion(model(shared.to_format(job, images)), targets)
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(model.parameters(), job.clip_norm)
            optimizer.step()
            step += 1
            scheduler.step_update(step)
        shared.evaluate(job, model, stage.name, val).write(events, stage.name, epoch + 1)


def cosine(optimizer: torch.optim.Optimizer, total: int, warmup: float, lr: float) -> Any:
    """timm's scheduler with settings that make it equal to `lr_factor`."""
    first = round(warmup * total)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=max(1, total - first),
        warmup_t=first,
        warmup_lr_init=lr / (first + 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )
    scheduler.step_update(0)
    return scheduler


def view(job: Job, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    data = create_dataset("", root=f"{job.root}/val", split="train", transform=view_transform(job))
    where = {str(Path(data.filename(i))): i for i in range(len(data))}
    items = [data[where[name]] for name in names]
    pixels = torch.stack([torch.as_tensor(image) for image, _ in items]).float() / 255
    images = (pixels - torch.tensor(job.mean).view(3, 1, 1)) / torch.tensor(job.std).view(3, 1, 1)
    return images, torch.tensor([target for _, target in items])


if __name__ == "__main__":
    shared.main("timm", run, shared.network, view)
