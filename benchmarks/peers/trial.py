"""Which way a network computes fastest on this machine, training and not: measured, as it differs by both."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.peers import shared
from benchmarks.peers.job import Job, Speed

WAYS = {
    "fp32 NCHW": Speed(),
    "fp32 channels_last": Speed(channels_last=True),
    "bf16 NCHW": Speed(bf16=("head", "full")),
    "bf16 channels_last": Speed(channels_last=True, bf16=("head", "full")),
}


def images_per_second(job: Job, step: Callable[[], object], seconds: float = 3.0) -> float:
    """After two steps to warm up, steps for at least `seconds`."""
    for _ in range(2):
        step()
    _finish(job)
    began, steps = time.monotonic(), 0
    while (spent := time.monotonic() - began) < seconds:
        step()
        _finish(job)
        steps += 1
    return steps * job.batch / spent


def _finish(job: Job) -> None:
    if job.device == "cuda":
        torch.cuda.synchronize()


def measure(job: Job) -> dict[str, float]:
    """Images a second of a step of the `head` stage (the backbone only runs) and of the `full` one."""
    images = torch.rand(job.batch, 3, job.image_size, job.image_size, device=job.device)
    targets = torch.zeros(job.batch, dtype=torch.long, device=job.device)
    found = {}
    for stage in ("head", "full"):
        model = shared.network(job)
        if job.speed.channels_last:
            model.to(memory_format=torch.channels_last)
        model.requires_grad_(stage == "full")
        model.get_submodule(job.head).requires_grad_(True)
        shared.freeze_statistics(model.train())
        groups = shared.parameter_groups(model.named_parameters(), 0.0)
        optimizer = torch.optim.AdamW(groups, lr=1e-6, fused=True)

        def step(
            model: torch.nn.Module = model, optimizer: torch.optim.Optimizer = optimizer, stage: str = stage
        ) -> None:
            with shared.autocast(job, stage):
                loss = F.cross_entropy(model(shared.to_format(job, images)).float(), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        found[stage] = images_per_second(job, step)
    return found


def best_speed(found: dict[str, dict[str, float]], stage_epochs: dict[str, int], workers: int) -> Speed:
    """The memory format that takes the fewest seconds over all epochs, each stage in its faster precision there."""
    choices = []
    for layout in ("NCHW", "channels_last"):
        picked = {s: max(("fp32", "bf16"), key=lambda p: found[f"{p} {layout}"][s]) for s in stage_epochs}
        seconds = sum(n / found[f"{picked[s]} {layout}"][s] for s, n in stage_epochs.items())
        choices.append((seconds, layout, tuple(s for s, precision in picked.items() if precision == "bf16")))
    _, layout, bf16 = min(choices)
    return Speed(layout == "channels_last", bf16, workers, persistent=True, fused=True, frozen_statistics=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    job = Job.load(args.job)
    torch.set_num_threads(job.threads)
    found = {name: measure(replace(job, speed=way)) for name, way in WAYS.items()}
    args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
