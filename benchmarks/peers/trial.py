"""The fastest precision and memory format of a network on this machine, measured for each stage."""

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

SETTINGS = {
    "fp32 NCHW": Speed(),
    "fp32 channels_last": Speed(channels_last=True),
    "bf16 NCHW": Speed(bf16=("head", "full")),
    "bf16 channels_last": Speed(channels_last=True, bf16=("head", "full")),
}


def images_per_second(job: Job, step: Callable[[], object], seconds: float = 3.0) -> float:
    """Two warm-up steps, then measured steps for at least `seconds`."""
    for _ in range(2):
        step()
    _synchronize(job)
    began, steps = time.monotonic(), 0
    while (spent := time.monotonic() - began) < seconds:
        step()
        _synchronize(job)
        steps += 1
    return steps * job.batch / spent


def _synchronize(job: Job) -> None:
    if job.device == "cuda":
        torch.cuda.synchronize()


def measure(job: Job) -> dict[str, float]:
    """Images per second of training steps in the stages `head` (frozen backbone) and `full`."""
    images = torch.rand(job.batch, 3, job.image_size, job.image_size, device=job.device)
    targets = torch.zeros(job.batch, dtype=torch.long, device=job.device)
    rates = {}
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

        rates[stage] = images_per_second(job, step)
    return rates


def best_speed(rates: dict[str, dict[str, float]], stage_epochs: dict[str, int], workers: int) -> Speed:
    """The memory format with the fewest seconds over all epochs, with the faster precision for each stage."""
    choices = []
    for layout in ("NCHW", "channels_last"):
        picked = {s: max(("fp32", "bf16"), key=lambda p: rates[f"{p} {layout}"][s]) for s in stage_epochs}
        seconds = sum(n / rates[f"{picked[s]} {layout}"][s] for s, n in stage_epochs.items())
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
    rates = {name: measure(replace(job, speed=speed)) for name, speed in SETTINGS.items()}
    args.out.write_text(json.dumps(rates))


if __name__ == "__main__":
    main()
