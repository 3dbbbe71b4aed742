"""Code that the peers share: the network, the images, accuracy and loss, and their command line."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from benchmarks.peers.job import Events, Job, Stage

Batches: TypeAlias = "DataLoader[Any]"
# A peer's input for some images of val, given by their paths in it: normalised [N, 3, S, S], and targets [N].
ImageTransform: TypeAlias = Callable[[Job, Sequence[str]], tuple[Tensor, Tensor]]


def main(
    package: str, run: Callable[[Job, Events], None], network: Callable[[Job], nn.Module], view: ImageTransform
) -> None:
    """Run a job: arguments `JOB EVENTS`. With `JOB FILE --check`, only write the peer's pixels and loss to FILE."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    job = Job.load(args.job)
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    if args.check:
        torch.save(check(job, network, view, torch.load(args.out)), args.out)
        return
    events = Events(args.out)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    events.versions(**versions, **{package: importlib.metadata.version(package)})
    run(job, events)


@torch.no_grad()
def check(job: Job, network: Callable[[Job], nn.Module], view: ImageTransform, ours: dict[str, Any]) -> dict[str, Any]:
    """The peer's pixels of the images named in `ours`, and its loss before the first step on them and on our pixels."""
    model = network(job).eval()
    images, targets = view(job, ours["names"])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (job.mean, job.std))
    given = (ours["pixels"].float() / 255 - mean) / std
    return {
        "pixels": (images.float() * std + mean) * 255,
        "targets": targets,
        "loss": F.cross_entropy(model(images.float()), targets).item(),
        "loss_given": F.cross_entropy(model(given), targets).item(),
    }


def network(job: Job) -> nn.Module:
    model: nn.Module = timm.create_model(job.model, pretrained=False, num_classes=job.classes)
    model.load_state_dict(load_file(job.weights))
    return model.to(job.device)


def transform(job: Job, augment: str) -> v2.Transform:
    """The transform of a Pillow image, as in torchvision's references."""
    mode = InterpolationMode(job.interpolation)
    if augment in ("none", "flip"):
        size = [job.image_size, job.image_size] if job.squash else job.resize
        steps: list[nn.Module] = [v2.Resize(size, interpolation=mode), v2.CenterCrop(job.image_size)]
    else:
        steps = [v2.RandomResizedCrop(job.image_size, scale=(0.5, 1.0), interpolation=mode)]
    if augment != "none" and job.hflip:
        steps.append(v2.RandomHorizontalFlip())
    to_float = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(job.mean), list(job.std))]
    return v2.Compose([*steps, *to_float])


def train_loader(job: Job, stage: Stage) -> Batches:
    data = ImageFolder(f"{job.root}/train", transform(job, stage.augment))
    return DataLoader(data, job.batch, shuffle=True, drop_last=True, **loader_options(job))


def val_loader(job: Job, split: str = "val") -> Batches:
    data = ImageFolder(f"{job.root}/{split}", transform(job, "none"))
    return DataLoader(data, job.batch, **loader_options(job))


def loader_options(job: Job) -> dict[str, Any]:
    workers = job.speed.workers
    return {
        "num_workers": workers,
        "persistent_workers": job.speed.persistent and workers > 0,
        "pin_memory": job.device == "cuda",
    }


def folder_view(job: Job, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    data = ImageFolder(f"{job.root}/val", transform(job, "none"))
    where = {str(Path(path).relative_to(data.root)): i for i, (path, _) in enumerate(data.samples)}
    items = [data[where[name]] for name in names]
    return torch.stack([image for image, _ in items]), torch.tensor([target for _, target in items])


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: vectors and scalars have no weight decay."""
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def freeze_statistics(model: nn.Module) -> None:
    """BatchNorm layers in evaluation mode, until the next `model.train()`."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def to_format(job: Job, batch: Tensor) -> Tensor:
    batch = batch.to(job.device, non_blocking=True)
    return batch.contiguous(memory_format=torch.channels_last) if job.speed.channels_last else batch


def autocast(job: Job, stage: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(job.device, torch.bfloat16, enabled=stage in job.speed.bf16)


class Autocast(nn.Module):
    """A part of a network in the precision of its stage, for packages whose own mixed precision ignores CPUs."""

    def __init__(self, job: Job, network: nn.Module, *, last: bool) -> None:
        super().__init__()
        self.network = network
        self.job = job
        self.last = last
        self.stage = ""

    def forward(self, images: Tensor) -> Tensor:
        with autocast(self.job, self.stage):
            output: Tensor = self.network(to_format(self.job, images))
        return output.float() if self.last else output


class Count:
    """Correct predictions and the sum of losses over all of val."""

    def __init__(self) -> None:
        self.n, self.correct, self.losses = 0, 0.0, 0.0

    def add(self, logits: Tensor, targets: Tensor) -> None:
        self.n += len(targets)
        self.correct += float((logits.argmax(1) == targets).sum())
        self.losses += float(F.cross_entropy(logits.float(), targets, reduction="sum"))

    def write(self, events: Events, stage: str, epoch: int, split: str = "val") -> None:
        events.epoch(stage, epoch, self.correct / self.n, self.losses / self.n, split)


@torch.no_grad()
def evaluate(job: Job, model: nn.Module, stage: str, batches: Iterable[Any]) -> Count:
    model.eval()
    count = Count()
    for images, targets in batches:
        with autocast(job, stage):
            logits = model(to_format(job, images))
        count.add(logits, targets.to(job.device))
    return count
