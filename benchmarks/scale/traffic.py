"""One rank: trains a few steps of each stage, and counts the bytes of gradients that DDP reduces."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from distil_tl.data.loader import Batch
from distil_tl.data.sampler import TrainSampler
from distil_tl.distributed.collectives import gather_objects
from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import read_launch
from distil_tl.distributed.process_group import DistInfo, session
from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import TransferModel, build
from distil_tl.training.metrics import Meter
from distil_tl.training.network import ImageNetwork
from distil_tl.training.optim import OptimConfig
from distil_tl.training.precision import usual_way
from distil_tl.training.stage import StageConfig, count_trainable
from distil_tl.training.step import begin_stage, train_epoch

CLASSES = 10


def main() -> None:
    torch.set_num_threads(1)
    found = measure_all(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))


def measure_all(task: dict[str, Any]) -> dict[str, Any]:
    """What `measure` finds, by stage."""
    with session(read_launch(os.environ), DistributedConfig(device="cpu")) as info:
        model = build(ModelConfig(name=task["model"], weights="none"), CLASSES, image_size=task["image_size"], seed=0)
        network = ImageNetwork(model, usual_way("fp32", model.module, info.device), info.device)
        return {name: measure(info, model, network, name, unfreeze, task) for name, unfreeze in task["stages"].items()}


def measure(
    info: DistInfo, model: TransferModel, network: ImageNetwork, name: str, unfreeze: Any, task: dict[str, Any]
) -> dict[str, Any]:
    """Bytes of gradients a step, and seconds of a step, the median of all but the first."""
    steps, batch = task["steps"], task["batch"]
    total = batch * info.world_size
    sampler = TrainSampler(total * steps, global_batch_size=total, world_size=info.world_size, rank=info.rank, seed=0,
                           stage=name)  # fmt: skip
    stage, optim = StageConfig(unfreeze=unfreeze), OptimConfig(compression=task.get("compression", "none"))
    run = begin_stage(info, model, network, name, stage, optim, steps, remember=1)
    parameters = count_trainable(run.network)
    images = torch.randint(0, 256, (batch, 3, task["image_size"], task["image_size"]), dtype=torch.uint8)
    zeros, valid = torch.zeros(batch, dtype=torch.long), torch.ones(batch, dtype=torch.bool)
    batches = iter([Batch(images, zeros, zeros, valid, [])] * steps)
    seconds, began = [], time.monotonic()
    gather_objects(info, None)
    for _ in train_epoch(info, run, batches, sampler, Meter(info, CLASSES), accumulation=1, optim=optim, seed=0):
        seconds.append(time.monotonic() - began)
        began = time.monotonic()
    return {
        "trainable_parameters": parameters,
        "reduced_bytes": reduced_bytes(run.network, images) if task.get("count") else None,
        "step_seconds": statistics.median(seconds[1:] or seconds),
    }


def reduced_bytes(network: torch.nn.Module, images: torch.Tensor) -> int | None:
    """What DDP hands over to be reduced in one backward pass, counted where it does; None for a single rank."""
    if not isinstance(network, DistributedDataParallel):
        return None
    counted: list[int] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and takes none that are strings
        counted.append(bucket.buffer().nbytes)
        done: Any = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    if getattr(network, "_comm_hooks", None):  # one is there already, and DDP takes no second
        return None
    network.register_comm_hook(None, hook)
    network(images).sum().backward()
    network.zero_grad()
    return sum(counted)


if __name__ == "__main__":
    main()
