"""`python -m benchmarks.pipeline`: images per second of the loader alone, of training alone, and of both together."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.images import write_images
from benchmarks.measure import Results, Spread, environment, interleaved, log, markdown, run_process
from distil_tl.data.config import default_workers
from distil_tl.data.loader import Batch
from distil_tl.data.source import ImageSource
from distil_tl.distributed.process_group import DistInfo
from distil_tl.rundir.state import Position
from distil_tl.training.metrics import Meter
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.threads import available_cpus

MODES = ("loader", "synthetic", "both")


@dataclass(frozen=True)
class Preset:
    """A network, its batch, and what one H100 should reach: images per second, estimated from published figures."""

    model: str
    batch: int
    reference: int | None = None
    image_size: int = 224


PRESETS = {
    "resnet50": Preset("resnet50", 256, 3000),
    "resnet50-32": Preset("resnet50", 32),  # configs/resnet50.yaml on 8 GPUs
    "vit_b_16": Preset("vit_b_16", 256, 1800),
    "mobilenet_v2": Preset("mobilenet_v2", 256),
}


@dataclass(frozen=True)
class Task:
    """The measurement of one process: some epochs, of which the second counts.

    In the first one the loader processes start and the network warms up. During the second one batches of the third are
    loaded, as many as batches of the second were loaded before it began.
    """

    root: str
    mode: str  # loader: without computation | synthetic: on one batch, repeated | both
    workers: int
    model: str
    image_size: int
    batch: int
    augment: str
    precision: str
    compile: str = "none"
    compile_mode: str = "default"
    epochs: int = 3
    device: str = "auto"  # as distributed.device

    def arguments(self, run_dir: Path) -> list[str]:
        """Of distil_tl.train: one stage that trains everything."""
        return [
            f"data.root={self.root}", f"data.global_batch_size={self.batch}", f"data.image_size={self.image_size}",
            f"data.workers={self.workers}", f"data.augment={self.augment}", f"model.name={self.model}",
            "model.weights=none", "stages.head.epochs=0", f"stages.full.epochs={self.epochs}",
            "stages.full.wise_ft=false",
            f"precision={self.precision}", f"compile={self.compile}", f"compile_mode={self.compile_mode}",
            f"distributed.device={self.device}",
            "checkpoint.every_minutes=null", f"run_dir={run_dir}",
        ]  # fmt: skip


def main(args: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if args is None else list(args)
    if argv[:1] == ["--one"]:
        task = Task(**json.loads(Path(argv[1]).read_text()))
        with tempfile.TemporaryDirectory(prefix="distil-tl-pipeline-") as temporary:
            result = run_one(task, Path(temporary))
        Path(argv[2]).write_text(json.dumps(result))
        return 0
    options = parse(argv)
    return run_command("benchmarks.pipeline", lambda: benchmark(options))


def parse(args: list[str]) -> argparse.Namespace:
    gpu, cpus = torch.cuda.is_available(), available_cpus()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="resnet50" if gpu else None,
        help="network, batch and image size; the options below replace single ones",
    )  # fmt: skip
    parser.add_argument("--images", type=int, default=12800 if gpu else 384, help="number of images to write")
    parser.add_argument("--image-size", type=int, help="pixels")
    parser.add_argument("--batch", type=int, help="images")
    parser.add_argument("--model", help="as model.name")
    parser.add_argument("--augment", default="light", choices=["none", "flip", "light", "strong"])
    parser.add_argument("--precision", default="auto", help="as precision of distil_tl.train")
    parser.add_argument("--compile", default="none", choices=["none", "all"], help="as compile of distil_tl.train")
    parser.add_argument("--compile-mode", default="default", help="as compile_mode of distil_tl.train")
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[default_workers(cpus)],
        help="numbers of loader processes (default: the one that training chooses)",
    )  # fmt: skip
    parser.add_argument(
        "--cache", nargs="*", default=["warm"], choices=["warm", "cold"],
        help="page cache; cold: the images are dropped from it before each process",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=2, help="default: 2")
    parser.add_argument("--folder", type=Path, help="where to write and keep the images (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/pipeline.json"), help="file of results")
    parser.add_argument("--fresh", action="store_true", help="start again and replace --out")
    options = parser.parse_args(args)
    preset = PRESETS[options.preset] if options.preset else Preset("mobilenet_v2", 32)
    for name in ("model", "batch", "image_size"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(preset, name))
    same = all(getattr(options, name) == getattr(preset, name) for name in ("model", "batch", "image_size"))
    options.reference = preset.reference if same else None
    if min(options.images, options.batch, options.repeats) < 1 or options.image_size < 8:
        parser.error("--images, --batch and --repeats must be at least 1, and --image-size at least 8")
    if options.images < options.batch:
        parser.error("--images must be at least --batch")
    if not options.workers or min(options.workers) < 0:
        parser.error("--workers needs numbers of 0 or more")
    return options


def benchmark(options: argparse.Namespace) -> None:
    keys = ("images", "image_size", "batch", "model", "augment", "precision", "compile", "compile_mode")
    results = Results(options.out, {key: getattr(options, key) for key in keys}, fresh=options.fresh)
    with tempfile.TemporaryDirectory(prefix="distil-tl-pipeline-") as temporary:
        folder = options.folder or Path(temporary)
        log(f"{options.images:,} images in {folder}")
        write_images(folder / "images", options.images)
        tasks = {name(task, cache): (task, cache) for task, cache in combinations(options, folder / "images")}
        for repeat, key in interleaved(list(tasks), options.repeats):
            if not results.has(key, repeat):
                measure(results, repeat, key, *tasks[key], Path(temporary))
    text = report(results, options)
    path = results.write_report(text)
    sys.stdout.write(f"{text}\n{results.path}\n{path}\n")


def combinations(options: argparse.Namespace, root: Path) -> Iterator[tuple[Task, str]]:
    def task(mode: str, workers: int) -> Task:
        return Task(
            str(root), mode, workers, options.model, options.image_size, options.batch, options.augment,
            options.precision, options.compile, options.compile_mode,
        )  # fmt: skip

    yield task("synthetic", 0), "warm"
    for workers in options.workers:
        for cache in options.cache:
            yield task("loader", workers), cache
            yield task("both", workers), cache


def name(task: Task, cache: str) -> str:
    return "synthetic" if task.mode == "synthetic" else f"{task.mode}, {task.workers} workers, {cache}"


def measure(results: Results, repeat: int, key: str, task: Task, cache: str, work: Path) -> None:
    spec, out = work / "task.json", work / "result.json"
    spec.write_text(json.dumps(asdict(task)))
    set_page_cache(Path(task.root), warm=cache == "warm")
    command = [sys.executable, "-m", "benchmarks.pipeline", "--one", str(spec), str(out)]
    measured = run_process(command, environment(), work / "log")
    result = json.loads(out.read_text())
    results.add(key, repeat, measured, **result)
    rates = " and ".join(f"{result['images'] / seconds:,.0f}" for seconds in result["epoch_seconds"])
    log(f"round {repeat + 1}: {key}: {rates} images/s")


def set_page_cache(root: Path, *, warm: bool) -> None:
    """Read all files once, or ask the kernel to drop them from the page cache."""
    os.sync()
    for path in root.rglob("*.jpg"):
        with path.open("rb") as file:
            if warm:
                file.read()
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_one(task: Task, work: Path) -> dict[str, Any]:
    """Train as `distil_tl.train` does, without evaluations and checkpoints. Returns the seconds of each epoch.

    All modes go through the loop of the trainer: the agreement of the ranks, the check for values that are not finite,
    the meter, and the copy to the device of what is loaded. Only what a mode leaves out is replaced.

    Args:
        work: a folder for the run directory.
    """
    train: Any = importlib.import_module("distil_tl.train")
    original, marks, found = train.train_one_epoch, list[float](), dict[str, Any]()

    def train_one_epoch(run: Any, training: Any, position: Position) -> None:
        if not marks:
            marks.append(time.monotonic())
        original(run, training, position)

    def end_epoch(run: Any, training: Any, position: Position) -> Position:
        training.meter.total()  # waits for the device
        marks.append(time.monotonic())
        record = run.state.stages[training.stage.name]
        found.update(images=training.sampler.end, device=str(run.info.device), precision=record.precision)
        found["data_wait_seconds"] = record.data_wait_seconds
        record.epochs += 1  # which ends the stage
        training.meter = Meter(run.info, run.num_classes)
        run.state.position = following = replace(position, epoch=position.epoch + 1, consumed=0)
        return following

    with contextlib.ExitStack() as stack:
        for name, value in (
            ("train_one_epoch", train_one_epoch), ("evaluate_epoch", end_epoch), ("finish", lambda run: None),
            *_left_out(task),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(train, name, value))
        if task.mode == "synthetic":
            stack.enter_context(mock.patch.object(ImageSource, "batches", lambda *args: synthetic(task, *args)))
        status = train.main(task.arguments(work / "run"))
    if status:
        raise RuntimeError(f"training ended with status {status}")
    return {**found, "epoch_seconds": [end - begin for begin, end in itertools.pairwise(marks)]}


def _left_out(task: Task) -> list[tuple[str, Any]]:
    """Functions of distil_tl.train that do nothing in this mode."""
    if task.mode != "loader":
        return []

    def no_pass(info: DistInfo, *args: Any) -> Tensor:
        return torch.zeros((), device=info.device)

    return [("forward_backward", no_pass), ("optimizer_step", lambda *args: None)]


def synthetic(task: Task, source: ImageSource, loader: Any, split: str) -> Iterator[Batch]:
    """One batch again and again, on the device, in place of those of a loader. Nothing waits for the device."""
    device = source.info.device
    images = torch.randint(0, 256, (task.batch, 3, task.image_size, task.image_size), dtype=torch.uint8, device=device)
    indices = torch.arange(task.batch)
    targets = torch.zeros(task.batch, dtype=torch.long, device=device)
    valid = torch.ones(task.batch, dtype=torch.bool, device=device)
    while split == "train":
        yield Batch(images, targets, indices, valid, [])


def rate(results: Results, key: str, epoch: int) -> Spread | None:
    """Images per second of an epoch, over the repeats."""
    runs = results.of(key)
    return Spread.of([run["images"] / run["epoch_seconds"][epoch] for run in runs]) if runs else None


def report(results: Results, options: argparse.Namespace) -> str:
    alone = rate(results, "synthetic", 1)
    if alone is None:
        raise UserError("there is no measurement yet")
    device = results.of("synthetic")[0]["device"]
    rows = []
    for cache in options.cache:
        for workers in options.workers:
            # The first epoch reads all files into the page cache, so only that one can be cold.
            epoch = 0 if cache == "cold" else 1
            keys = [f"{mode}, {workers} workers, {cache}" for mode in ("loader", "both")]
            loader, both = (rate(results, key, epoch) for key in keys)
            if loader is None or both is None:
                continue
            disk = Spread.of([run["disk_mb"] for run in results.of(keys[0])])
            in_turns = 1 / (1 / loader.median + 1 / alone.median)
            rows.append([
                workers, f"{cache}, {'first' if epoch == 0 else 'second'} epoch", loader.text(0), alone.text(0),
                both.text(0), f"{both.median / min(loader.median, alone.median):.2f}", f"{both.median / in_turns:.2f}",
                disk.text(0),
            ])  # fmt: skip
    header = ["loader processes", "page cache", "loader alone", "training alone", "both", "both / slower one",
              "both / in turns", "MiB from disk"]  # fmt: skip
    task = f"{options.model} at {options.image_size} px on {device}, batches of {options.batch}, {options.augment}"
    aim = f"{options.reference:,}" if options.reference else "none"
    return (
        f"Images per second (wall clock) of {task}, {options.images:,} images; median (range) of "
        f"{options.repeats}:\n\n{markdown(header, rows)}\n"
        "*Both / slower one*: 1 means perfect overlap, possible if loading and training use different processors. "
        "*Both / in turns*: 1 means no overlap, the best possible if both use the same cores. "
        f"Training alone on one H100 should reach (an estimate from published figures): {aim}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
