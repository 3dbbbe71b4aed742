"""The steps that measure: the tasks of benchmarks.pipeline, and a profile of ten steps."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import trace
from benchmarks.images import write_images
from benchmarks.pipeline import PRESETS, Task, run_one
from distil_tl.data.config import DataConfig, default_workers
from distil_tl.data.prefetch import plan_prefetch
from distil_tl.distributed.launch_env import Launch
from distil_tl.utils.threads import available_cpus
from tests.gpu_check.check import Check, Forked, expect

STEPS = 30  # of an epoch in which nothing is loaded
PROFILED = (12, 10)  # steps before the profile, and in it


def steps_of_epoch(mode: str, workers: int, batch_bytes: int) -> int:
    """The steps of an epoch: at least three times as many as batches are loaded ahead.

    Else a part of the second epoch, which counts, is loaded before it begins, or nothing is loaded during it.
    """
    if mode == "synthetic":
        return STEPS
    ahead = plan_prefetch(Launch(), workers, batch_bytes, limit_mib=DataConfig().prefetch_mib, pinned=True)
    return max(STEPS, 3 * ahead.workers * ahead.batches)


def task_of(check: Check, name: str, mode: str) -> Task:
    preset = PRESETS[name]
    if check.dry:
        root, workers, model, size, batch, precision = check.images(16), 0, "shufflenet_v2_x0_5", 32, 8, "fp32"
    else:
        workers, size, batch = default_workers(available_cpus()), preset.image_size, preset.batch
        count = batch * steps_of_epoch(mode, workers, batch * 3 * size * size)
        root = write_images(check.work / f"jpegs-{count}", count, link=True)
        model, precision = preset.model, "auto"
    # During the second epoch batches of the third are loaded, if any are.
    epochs = 2 if check.dry or mode == "synthetic" else 3
    return Task(str(root), mode, workers, model, size, batch, "light", precision, epochs=epochs, device=check.device)


def measured(check: Check, task: Task) -> dict[str, Any]:
    """The result of one task in a process of its own, with the images per second of its second epoch.

    On a CPU the tasks of all presets are the same, and run once.
    """
    result = check.work / f"task-{task.mode}.json" if check.dry else check.own / f"{task.mode}.json"
    if result.exists():
        return figures_of_epoch(result)

    def body() -> int:
        result.write_text(json.dumps(run_one(task, check.own / "runs" / task.mode)))
        return 0

    status, _ = Forked(check.own / f"{task.mode}.txt", body).wait()
    expect(status == 0, f"{task.mode} ended with status {status}")
    return figures_of_epoch(result)


def figures_of_epoch(result: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.read_text())
    return {**found, "images_per_second": round(found["images"] / found["epoch_seconds"][1], 1)}


def pipeline(name: str) -> Callable[[Check, dict[str, Any]], str]:
    """The step: images per second of a preset, beside its reference. Too few do not fail it.

    The loader alone is the same for all presets, so the first one measures it.
    """

    def step(check: Check, figures: dict[str, Any]) -> str:
        loader = check.work / "loader.json"
        if not loader.exists():
            figures["loader"] = measured(check, task_of(check, name, "loader"))
            loader.write_text(json.dumps(figures["loader"]))
        rates = {"loader": json.loads(loader.read_text())["images_per_second"]}
        for mode in ("synthetic", "both"):
            figures[mode] = measured(check, task_of(check, name, mode))
            rates[mode] = figures[mode]["images_per_second"]
        figures["reference"] = PRESETS[name].reference
        figures["both_of_slower"] = share = round(rates["both"] / min(rates["loader"], rates["synthetic"]), 3)
        aim = f" (reference: {PRESETS[name].reference:,})" if PRESETS[name].reference else ""
        return (
            f"{rates['synthetic']:,.0f} images/s alone{aim}, loader {rates['loader']:,.0f}, both {rates['both']:,.0f}: "
            f"{share:.2f} of the slower one (reference: 0.95), {figures['both']['precision']}"
        )

    return step


def profiled(task: Task, work: Path, before: int, steps: int) -> list[dict[str, Any]]:
    """The events of some steps of training, after the first ones."""
    train: Any = importlib.import_module("distil_tl.train")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities = [torch.profiler.ProfilerActivity.CUDA]  # alone: the host is not slowed down
    profiler, count, original = (
        torch.profiler.profile(activities=activities),
        iter(range(1, 1_000_000)),
        train.optimizer_step,
    )

    def optimizer_step(*args: Any) -> None:
        original(*args)
        done = next(count)
        if done == before:
            profiler.start()
        elif done == before + steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            profiler.stop()

    train.optimizer_step = optimizer_step
    run_one(task, work)
    path = work / "trace.json"
    profiler.export_chrome_trace(str(path))
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def profile(check: Check, figures: dict[str, Any]) -> str:
    """Ten steps of ResNet-50 on images: is the GPU busy, and do copies overlap with computing?"""
    short = task_of(check, "resnet50", "synthetic")
    task = replace(short, mode="both", epochs=2 if check.dry else 1)
    before, steps = (1, 2) if check.dry else PROFILED
    result = check.own / "trace.json"

    def body() -> int:
        events = profiled(task, check.own / "runs" / "profile", before, steps)
        kinds = ("cpu_op",) if check.dry else trace.COMPUTING
        result.write_text(json.dumps(trace.summarize(events, steps, kinds)))
        return 0

    status, _ = Forked(check.own / "profile.txt", body).wait()
    expect(status == 0, f"status {status}")
    figures.update(json.loads(result.read_text()))
    expect(figures["busy"] is not None, "the profile has no kernels")
    overlapped = figures["overlapped"]
    return (
        f"busy {figures['busy']:.3f} of the time (reference: 0.95), {figures['ms_per_step']:.1f} ms a step, "
        f"{figures['copies']} copies, overlapped {'-' if overlapped is None else f'{overlapped:.2f}'}"
    )
