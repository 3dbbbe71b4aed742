"""`python -m benchmarks.pipeline`: images per second of the loader alone, of training alone, and of both together."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.images import write_images
from benchmarks.measure import Results, Spread, environment, interleaved, log, markdown, run_process
from distil_tl.data.bad_images import BadImages
from distil_tl.data.config import DataConfig
from distil_tl.data.loader import Batch, BatchPlan
from distil_tl.data.source import ImageSource
from distil_tl.data.splits import open_splits
from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import read_launch
from distil_tl.distributed.process_group import DistInfo, init_distributed
from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import build
from distil_tl.rundir.state import Position, StageRecord
from distil_tl.train import forward_backward
from distil_tl.training.config import OptimConfig, StageConfig
from distil_tl.training.metrics import Meter
from distil_tl.training.network import ImageNetwork, lay_out, set_layout, try_to_fold
from distil_tl.training.precision import default_compute
from distil_tl.training.stage import Stage, apply_stage
from distil_tl.training.stage_setup import StageSetup
from distil_tl.training.stage_start import begin_stage
from distil_tl.training.step import optimizer_step
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.threads import available_cpus

MODES = ("loader", "synthetic", "both")


@dataclass(frozen=True)
class Task:
    """The measurement of one process: three epochs, of which the second counts.

    In the first one the loader processes start and the network warms up. During the second one batches of the third are
    loaded, as many as batches of the second were loaded before it began.
    """

    root: str
    mode: str  # loader: batches are loaded and discarded | synthetic: training on one batch, repeated | both: training
    workers: int
    model: str
    image_size: int
    batch: int
    augment: str
    precision: str
    epochs: int = 3


def main(args: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if args is None else list(args)
    if argv[:1] == ["--one"]:
        result = run_one(Task(**json.loads(Path(argv[1]).read_text())))
        Path(argv[2]).write_text(json.dumps(result))
        return 0
    options = parse(argv)
    return run_command("benchmarks.pipeline", lambda: benchmark(options))


def parse(args: list[str]) -> argparse.Namespace:
    gpu, cpus = torch.cuda.is_available(), available_cpus()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument("--images", type=int, default=20000 if gpu else 384, help="number of images to write")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=256 if gpu else 32, help="images")
    parser.add_argument("--model", default="resnet50" if gpu else "mobilenet_v2", help="as model.name")
    parser.add_argument("--augment", default="light", choices=["none", "light", "strong"])
    parser.add_argument("--precision", default="auto", help="as precision of distil_tl.train")
    parser.add_argument(
        "--workers", type=int, nargs="*", default=sorted({0, 1, cpus // 2, cpus - 1, cpus} & {*range(17)}),
        help="numbers of loader processes",
    )  # fmt: skip
    parser.add_argument(
        "--cache", nargs="*", default=["warm"], choices=["warm", "cold"],
        help="page cache; cold: the images are dropped from it before each process",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write and keep the images (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/pipeline.json"), help="file of results")
    parser.add_argument("--fresh", action="store_true", help="start again and replace --out")
    options = parser.parse_args(args)
    if min(options.images, options.batch, options.repeats) < 1 or options.image_size < 8:
        parser.error("--images, --batch and --repeats must be at least 1, and --image-size at least 8")
    if options.images < options.batch:
        parser.error("--images must be at least --batch")
    if not options.workers or min(options.workers) < 0:
        parser.error("--workers needs numbers of 0 or more")
    return options


def benchmark(options: argparse.Namespace) -> None:
    keys = ("images", "image_size", "batch", "model", "augment", "precision")
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
            options.precision,
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


def run_one(task: Task) -> dict[str, Any]:
    """Images of an epoch, and the wall-clock seconds of each epoch."""
    config = DataConfig(
        root=task.root, global_batch_size=task.batch, image_size=task.image_size, workers=task.workers,
        augment=task.augment,
    )  # fmt: skip
    launch = read_launch(os.environ)
    with init_distributed(launch, DistributedConfig()) as info:
        splits = open_splits(info, config)
        settings = ModelConfig(name=task.model, weights="none")
        model = build(settings, len(splits.classes), image_size=task.image_size, seed=0)
        stage = Stage("full", StageConfig(epochs=task.epochs), OptimConfig(), task.image_size, task.augment, seed=0,
                      precision=task.precision, compile="none")  # fmt: skip
        apply_stage(model, stage.config)
        compute = default_compute(task.precision, model.module, info.device)
        model.module.to(info.device)
        set_layout(model.module, compute)
        folded = try_to_fold(model, task.image_size, info.device, trains=True)
        network = ImageNetwork(model, compute, info.device, folded, task.image_size)
        lay_out(network)
        setup = StageSetup(network, None, task.image_size)
        source = ImageSource(info, config, splits.as_dict(), model.preprocess, BadImages("error"))
        training = begin_stage(info, stage, model, setup, source, BatchPlan(task.batch, 1), StageRecord(), log_every=1)
        sampler, loader, marks = training.sampler, training.batches.loader, [time.monotonic()]
        batches = iter(loader) if task.mode == "loader" else source.batches(loader, "train")
        if task.mode == "synthetic":
            batches = synthetic(info, task)
        for epoch in range(task.epochs):
            if task.mode == "loader":
                for _ in itertools.islice(batches, sampler.steps_per_epoch):
                    pass
            else:
                training.meter = Meter(info, len(splits.classes))
                for step in training.steps_left(Position("full", epoch, 0, 0)):
                    training.begin_step()
                    loss = forward_backward(info, training, next(batches), step, 0)
                    training.end_step()
                    optimizer_step(training, loss, step)
                training.meter.total()  # waits for the device
            marks.append(time.monotonic())
    seconds = [end - begin for begin, end in itertools.pairwise(marks)]
    return {"images": sampler.end, "epoch_seconds": seconds, "device": str(info.device)}


def synthetic(info: DistInfo, task: Task) -> Iterator[Batch]:
    """The same batch again and again, on the network's device."""
    shape = (task.batch, 3, task.image_size, task.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=info.device)
    zeros = torch.zeros(task.batch, dtype=torch.long, device=info.device)
    valid = torch.ones(task.batch, dtype=torch.bool, device=info.device)
    while True:
        yield Batch(images, zeros, zeros.cpu(), valid, [])


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
    return (
        f"Images per second (wall clock) of {task}, {options.images:,} images; median (range) of "
        f"{options.repeats}:\n\n{markdown(header, rows)}\n"
        "*Both / slower one*: 1 means perfect overlap, possible if loading and training use different processors. "
        "*Both / in turns*: 1 means no overlap, the best possible if both use the same cores.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
