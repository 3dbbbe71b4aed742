"""One rank: trains a few steps of each stage and counts the bytes of gradients that DDP reduces."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from distil_tl.distributed.collectives import gather_objects
from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import read_launch
from distil_tl.distributed.process_group import DistInfo, init_distributed
from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import TransferModel, build
from distil_tl.training.config import OptimConfig, StageConfig
from distil_tl.training.network import ImageNetwork, lay_out
from distil_tl.training.optim import build_optimizer
from distil_tl.training.precision import default_compute
from distil_tl.training.stage import apply_stage, count_trainable
from distil_tl.training.stage_start import wrap_in_ddp

CLASSES = 10


def main() -> None:
    torch.set_num_threads(1)
    results = measure_all(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(results))


def measure_all(task: dict[str, Any]) -> dict[str, Any]:
    """The results of `measure`, by stage."""
    with init_distributed(read_launch(os.environ), DistributedConfig(device="cpu")) as info:
        model = build(ModelConfig(name=task["model"], weights="none"), CLASSES, image_size=task["image_size"], seed=0)
        return {name: measure(info, model, unfreeze, task) for name, unfreeze in task["stages"].items()}


def measure(info: DistInfo, model: TransferModel, unfreeze: Any, task: dict[str, Any]) -> dict[str, Any]:
    """Gradient bytes per step, and seconds per step: the median of all steps but the first."""
    batch, compression = task["batch"], task.get("compression", "none")
    stage = StageConfig(unfreeze=unfreeze)
    apply_stage(model, stage)
    compute = default_compute("fp32", model.module, info.device)
    inner = ImageNetwork(model, compute, info.device)
    lay_out(inner)
    network = wrap_in_ddp(info, inner, compression)
    optimizer = build_optimizer(model, stage, OptimConfig())
    images = torch.randint(0, 256, (batch, 3, task["image_size"], task["image_size"]), dtype=torch.uint8)
    targets = torch.zeros(batch, dtype=torch.long)
    seconds = []
    gather_objects(info, None)
    for _ in range(task["steps"]):
        began = time.monotonic()
        F.cross_entropy(network(images), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.monotonic() - began)
    return {
        "trainable_parameters": count_trainable(network),
        "reduced_bytes": reduced_bytes(network, images) if task.get("count") else None,
        "step_seconds": statistics.median(seconds[1:] or seconds),
    }


def reduced_bytes(network: torch.nn.Module, images: torch.Tensor) -> int | None:
    """Bytes that DDP reduces in one backward pass, counted in a communication hook; None for a single rank."""
    if not isinstance(network, DistributedDataParallel):
        return None
    counted: list[int] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP rejects annotations that are strings
        counted.append(bucket.buffer().nbytes)
        done: Any = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    if getattr(network, "_comm_hooks", None):  # DDP allows only one hook
        return None
    network.register_comm_hook(None, hook)
    network(images).sum().backward()
    network.zero_grad()
    return sum(counted)


if __name__ == "__main__":
    main()
