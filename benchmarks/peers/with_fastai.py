"""The peer fastai. As documented: `vision_learner` and `fine_tune`. Tuned: the same learner with the common loaders and
schedule."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.training import GradientClip
from fastai.vision.all import (
    Adam,
    Callback,
    CrossEntropyLossFlat,
    DataLoaders,
    ImageDataLoaders,
    Learner,
    Normalize,
    ParamScheduler,
    Resize,
    accuracy,
    vision_learner,
)
from safetensors.torch import load_file
from torch import nn

from benchmarks.peers import shared
from benchmarks.peers.job import Events, Job, Stage, lr_factor


class WriteEvents(Callback):  # type: ignore[misc]  # fastai is untyped
    """Writes an event after the evaluation of each epoch."""

    order = 80

    def __init__(self, job: Job, events: Events) -> None:
        self.job, self.events, self.seen = job, events, 0

    def after_epoch(self) -> None:
        _, loss, top1 = self.learn.final_record
        self.seen += 1
        head = self.job.stage("head").epochs
        stage, epoch = ("head", self.seen) if self.seen <= head else ("full", self.seen - head)
        self.events.epoch(stage, epoch, float(top1), float(loss))


class FrozenStatistics(Callback):  # type: ignore[misc]
    def before_train(self) -> None:
        shared.freeze_statistics(self.model)


def run(job: Job, events: Events) -> None:
    if job.tuned:
        run_tuned(job, events)
    else:
        run_documented(job, events)


def run_documented(job: Job, events: Events) -> None:
    events.begin("head")
    dls = ImageDataLoaders.from_folder(
        job.root, valid="val", bs=job.batch, item_tfms=Resize(job.image_size),
        batch_tfms=Normalize.from_stats(job.mean, job.std), num_workers=job.speed.workers, device=job.device,
    )  # fmt: skip
    learn = learner(job, dls, cbs=[WriteEvents(job, events)])
    head, full = job.stage("head"), job.stage("full")
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(full.epochs, freeze_epochs=head.epochs)


def run_tuned(job: Job, events: Events) -> None:
    cbs = [WriteEvents(job, events), GradientClip(job.clip_norm), FrozenStatistics()]
    if job.speed.channels_last:
        cbs.append(ChannelsLast())
    val = shared.val_loader(job)
    learn = None
    for stage in job.stages:
        if not stage.epochs:
            continue
        events.begin(stage.name)
        train = shared.train_loader(job, stage)
        dls = DataLoaders(train, val, device=torch.device(job.device))
        if learn is None:
            learn = learner(job, dls, cbs=cbs, opt_func=partial(Adam, eps=1e-8), wd=job.weight_decay, train_bn=False)
        learn.dls = dls
        fit_stage(job, learn, stage, stage.epochs * len(train))


def fit_stage(job: Job, learn: Learner, stage: Stage, total: int) -> None:
    if stage.name == "head":
        learn.freeze()
    else:
        learn.unfreeze()
    for part in learn.model:
        part.stage = stage.name
    schedule = ParamScheduler({"lr": lambda done: stage.lr * lr_factor(round(done * total), total, job.warmup)})
    with learn.no_bar(), learn.no_logging():
        learn.fit(stage.epochs, stage.lr, cbs=schedule)


def learner(job: Job, dls: Any, **options: Any) -> Any:
    """A learner on a timm network. The head is one linear layer, as in all packages."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features(job), job.classes))
    learn = vision_learner(
        dls, job.model, pretrained=False, normalize=False, n_out=job.classes, custom_head=head, metrics=accuracy,
        loss_func=CrossEntropyLossFlat(), **options,
    )  # fmt: skip
    learn.model.load_state_dict(renamed(job))
    if job.tuned:
        body, last = learn.model
        learn.model = nn.Sequential(shared.Autocast(job, body, last=False), shared.Autocast(job, last, last=True))
    learn.model.to(job.device)
    return learn


def renamed(job: Job) -> dict[str, torch.Tensor]:
    """The weights with fastai's names: `0.model.` for the body, `1.2.` for the only layer of the head."""
    head = f"{job.head}."
    return {
        f"1.2.{name.removeprefix(head)}" if name.startswith(head) else f"0.model.{name}": tensor
        for name, tensor in load_file(job.weights).items()
    }


def features(job: Job) -> int:
    return int(load_file(job.weights)[f"{job.head}.weight"].shape[1])


def network(job: Job) -> nn.Module:
    val = shared.val_loader(job)
    model: nn.Module = learner(job, DataLoaders(val, val, device=torch.device(job.device))).model
    return model


if __name__ == "__main__":
    shared.main("fastai", run, network, shared.folder_view)
