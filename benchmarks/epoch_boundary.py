"""`python -m benchmarks.epoch_boundary`: seconds without a batch at the start of epochs and of evaluations.

Trains on generated JPEGs with real loader processes. A step sleeps instead of computing, like a training process that
waits for a GPU: so loading has all CPUs, and either loading or training can be made the slower one. The times at which
batches are asked for and arrive are recorded. With `--against`, other code is measured in turns with this one.
With `--image-ms`, an image is not decoded either, but sleeps: then the figures do not depend on the machine.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SCENARIOS = {"training-bound": 2.0, "loader-bound": 0.5}  # seconds of a step, as a multiple of the loader's for a batch


@dataclass(frozen=True)
class Task:
    """One run: the epochs of one stage, each followed by an evaluation."""

    root: str
    run_dir: str
    workers: int
    batch: int
    image_size: int
    epochs: int
    image_ms: float | None
    step_seconds: float


def main(args: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if args is None else list(args)
    if argv[:1] == ["--one"]:
        Path(argv[2]).write_text(json.dumps(run_one(Task(**json.loads(Path(argv[1]).read_text())))))
        return 0
    from distil_tl.utils.command import run_command

    options = parse(argv)
    return run_command("benchmarks.epoch_boundary", lambda: benchmark(options))


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.epoch_boundary", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="a folder with other code of this package")
    parser.add_argument("--steps", type=int, default=12, help="of an epoch (default: 12)")
    parser.add_argument("--batch", type=int, default=128, help="images (default: 128)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: 2)")
    parser.add_argument("--epochs", type=int, default=4, help="default: 4; the first one is not counted")
    parser.add_argument("--image-ms", type=float, help="milliseconds of an image, instead of decoding it")
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/epoch_boundary.json"), help="file of results")
    parser.add_argument("--fresh", action="store_true", help="start again and replace --out")
    options = parser.parse_args(args)
    if min(options.steps, options.batch, options.workers, options.repeats) < 1 or options.epochs < 2:
        parser.error("--steps, --batch, --workers and --repeats must be at least 1, and --epochs at least 2")
    return options


def benchmark(options: argparse.Namespace) -> None:
    from benchmarks.images import write_images
    from benchmarks.measure import ROOT, Results, interleaved, log, run_process

    keys = ("steps", "batch", "image_size", "workers", "epochs", "image_ms")
    results = Results(options.out, {key: getattr(options, key) for key in keys}, fresh=options.fresh)
    codes = {"this code": ROOT} | ({"other code": options.against.resolve()} if options.against else {})
    with tempfile.TemporaryDirectory(prefix="distil-tl-boundary-") as temporary:
        work = Path(temporary)
        root = write_images(work / "images", options.steps * options.batch)
        log(f"{options.steps * options.batch:,} images")

        def measure(name: str, code: Path, step_seconds: float) -> tuple[Any, dict[str, Any]]:
            task = Task(str(root), str(work / name), options.workers, options.batch, options.image_size,
                        options.epochs, options.image_ms, step_seconds)  # fmt: skip
            (work / "task.json").write_text(json.dumps(asdict(task)))
            command = [sys.executable, __file__, "--one", str(work / "task.json"), str(work / "result.json")]
            env = {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "DISTIL_TL_CACHE": str(work / "cache")}
            measured = run_process(command, env, work / "log")
            return measured, json.loads((work / "result.json").read_text())

        def loader_seconds() -> float:
            if options.image_ms is not None:
                return float(options.image_ms / 1000 * options.batch / options.workers)
            epochs = measure("pace", ROOT, 0.0)[1]["epochs"]
            return float(min(epoch["seconds"] for epoch in epochs) / options.steps)

        pace = results.once("seconds of the loader for a batch", loader_seconds)
        log(f"the loader needs {pace:.3f} s for a batch")
        for repeat, key in interleaved([f"{s}, {c}" for s in SCENARIOS for c in codes], options.repeats):
            if results.has(key, repeat):
                continue
            scenario, _, code = key.partition(", ")
            name = key.replace(", ", "-").replace(" ", "-")
            measured, found = measure(f"{name}-{repeat}", codes[code], pace * SCENARIOS[scenario])
            results.add(key, repeat, measured, **found)
            log(f"round {repeat + 1}: {key}: {measured.seconds:.1f} s")
    text = report(results, list(codes), options)
    path = results.write_report(text)
    sys.stdout.write(f"{text}\n{results.path}\n{path}\n")


def run_one(task: Task) -> dict[str, Any]:
    """For each epoch but the first its seconds with the evaluation, and the wait for each batch of both."""
    import torch
    from torch import Tensor, nn

    train: Any = importlib.import_module("distil_tl.train")
    bad_images: Any = importlib.import_module("distil_tl.data.bad_images").BadImages
    waits: dict[str, list[float]] = {"train": [], "val": []}
    ends: list[float] = []  # of the evaluations
    original, evaluate = bad_images.check, train.evaluate

    def check(self: Any, batches: Any, split: str, index: Any) -> Iterator[Any]:
        inner = original(self, batches, split, index)
        while True:
            asked = time.monotonic()
            batch = next(inner, None)
            if batch is None:
                return
            waits[split].append(time.monotonic() - asked)
            yield batch

    def evaluated(info: Any, network: Any, turns: Any, batches: Any, classes: int, **more: Any) -> Any:
        result = evaluate(info, Sleep(classes), turns, batches, classes, **more)
        ends.append(time.monotonic())
        return result

    class Sleep(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.classes = classes
            self.is_compiled = False

        def forward(self, images: Tensor) -> Tensor:
            time.sleep(task.step_seconds / 3)  # a forward pass alone
            return torch.zeros(len(images), self.classes)

    def step(info: Any, training: Any, batch: Any, *args: Any) -> Tensor:
        time.sleep(task.step_seconds)
        return torch.zeros(())

    def wait(*args: Any, **more: Any) -> Tensor:
        time.sleep(task.image_ms / 1000 if task.image_ms else 0.0)
        return torch.zeros(3, task.image_size, task.image_size, dtype=torch.uint8)

    if task.image_ms is not None:
        importlib.import_module("distil_tl.data.loader").decode = wait  # type: ignore[attr-defined]
    bad_images.check = check
    train.forward_backward = step
    train.optimizer_step = lambda *args: None
    train.evaluate = evaluated
    args = [
        f"data.root={task.root}", f"run_dir={task.run_dir}", f"data.global_batch_size={task.batch}",
        f"data.image_size={task.image_size}", f"data.workers={task.workers}", "model.name=shufflenet_v2_x0_5",
        "model.weights=none", "stages.head.epochs=0", f"stages.full.epochs={task.epochs}",
        "stages.full.wise_ft=false", "precision=fp32",
        "distributed.device=cpu", "checkpoint.every_minutes=null",
    ]  # fmt: skip
    status = train.main(args)
    if status:
        raise SystemExit(status)
    steps, turns = len(waits["train"]) // task.epochs, len(waits["val"]) // task.epochs
    return {
        "epochs": [
            {
                "seconds": ends[epoch] - ends[epoch - 1],
                "train": waits["train"][epoch * steps : (epoch + 1) * steps],
                "val": waits["val"][epoch * turns : (epoch + 1) * turns],
            }
            for epoch in range(1, task.epochs)
        ]
    }


def report(results: Any, codes: list[str], options: argparse.Namespace) -> str:
    from benchmarks.measure import Spread, markdown

    rows = []
    for scenario, code in itertools.product(SCENARIOS, codes):
        epochs = [epoch for run in results.of(f"{scenario}, {code}") for epoch in run["epochs"]]
        columns = (
            [epoch["train"][0] for epoch in epochs],
            [sum(epoch["train"]) for epoch in epochs],
            [epoch["val"][0] for epoch in epochs],
            [sum(epoch["val"]) for epoch in epochs],
            [epoch["seconds"] for epoch in epochs],
        )
        rows.append([scenario, code, *(Spread.of(column).text(2) for column in columns)])
    header = ["", "code", "first batch of an epoch", "all of an epoch", "first batch of an evaluation",
              "all of an evaluation", "epoch and evaluation"]  # fmt: skip
    pace = results.content["found"]["seconds of the loader for a batch"]
    return (
        f"Seconds of waiting for batches, and of the whole, median (range) over the epochs from the second on: "
        f"{options.steps} steps of {options.batch} images at {options.image_size} px, {options.workers} loader "
        f"processes that need {pace:.2f} s for a batch together.\n\n{markdown(header, rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
