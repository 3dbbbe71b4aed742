"""`python -m benchmarks.peers`: the same transfer-learning job by distil_tl and by tuned peers, timed in turns."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.measure import Results
from benchmarks.peers import summary
from benchmarks.peers.chart import draw_chart
from benchmarks.peers.comparison import Comparison
from benchmarks.peers.installs import PEERS, interpreters
from benchmarks.peers.job import Job, Stage
from distil_tl.data.digits import digits_folder
from distil_tl.data.scan import scan
from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import TransferModel, build
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import write_atomic
from distil_tl.utils.threads import available_cpus


def main(args: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if args is None else list(args))
    return run_command("benchmarks.peers", lambda: benchmark(options))


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder with train/ and val/ (default: the demo's digits)")
    parser.add_argument("--image-size", type=int, help="pixels (default: 128; for the digits 64)")
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="a timm model with one linear head")
    parser.add_argument("--weights", default="auto", help="as model.weights of distil_tl.train")
    parser.add_argument("--batch", type=int, default=32, help="images (default: 32)")
    parser.add_argument("--head-epochs", type=int, default=5)
    parser.add_argument("--full-epochs", type=int, default=2)
    parser.add_argument("--head-lr", type=float, default=1e-2)
    parser.add_argument("--full-lr", type=float, default=3e-4)
    parser.add_argument("--repeats", type=int, default=5, help="runs of distil_tl and of each tuned peer")
    parser.add_argument("--documented", type=int, default=1, help="runs of each peer as documented")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="the interpreter of a peer")
    parser.add_argument("--ours", action="append", default=[], metavar="NAME=KEYS", help="another row of distil_tl: "
                        "its name, and key=value arguments")  # fmt: skip
    parser.add_argument("--threads", type=int, default=available_cpus(), help="of each process (default: all CPUs)")
    parser.add_argument("--quick", action="store_true", help="2 + 1 epochs, one run, only tuned peers")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/peers.json"), help="file of results")
    parser.add_argument("--venvs", type=Path, default=Path("runs/benchmarks/venvs"), help="where to install peers")
    parser.add_argument("--fresh", action="store_true", help="start again and replace --out")
    options = parser.parse_args(args)
    if options.quick:
        options.head_epochs, options.full_epochs, options.repeats, options.documented = 2, 1, 1, 0
    if min(options.head_epochs, options.full_epochs, options.repeats, options.batch, options.threads) < 1:
        parser.error("--head-epochs, --full-epochs, --repeats, --batch and --threads must be at least 1")
    for name in ("python", "ours"):
        setattr(options, name, dict(_pair(parser, f"--{name}", text) for text in getattr(options, name)))
    if unknown := set(options.python) - set(PEERS):
        parser.error(f"--python: unknown peer {', '.join(sorted(unknown))}; choose from {', '.join(PEERS)}")
    return options


def _pair(parser: argparse.ArgumentParser, option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        parser.error(f"{option} {text}: give NAME=VALUE")
    return name, value


def benchmark(options: argparse.Namespace) -> None:
    pythons = interpreters(options.peers, options.python, options.venvs)
    with tempfile.TemporaryDirectory(prefix="distil-tl-peers-") as folder:
        work = Path(folder)
        job = make_job(options, work)
        results = Results(options.out, task(job), fresh=options.fresh)
        comparison = Comparison(job, results, pythons, work, lambda job, seed: with_seed(job, seed, options, work))
        comparison.check_parity()
        job = comparison.job = job.with_speed(comparison.choose_speed())
        rows = comparison.rows(dict(options.ours), views=not options.quick)
        comparison.measure(rows, options.repeats, options.documented)
        tuned = [comparison.name(peer, tuned=True) for peer in pythons]
        text = summary.report(results, job, tuned, list(rows))
    path, chart = results.write_report(text), results.path.with_suffix(".svg")
    write_atomic(chart, draw_chart(results, tuned))
    sys.stdout.write(f"{text}\n{results.path}\n{path}\n{chart}\n")


def make_job(options: argparse.Namespace, work: Path) -> Job:
    """The job. Writes the network's initial state to a file in `work`.

    Raises:
        UserError: the data, the model or the weights do not exist, or the model has several heads.
    """
    digits = options.data is None
    root = digits_folder() if digits else options.data.absolute()
    classes = len(scan(root / "train").classes)
    size = options.image_size or (64 if digits else 128)
    config = ModelConfig(name=f"timm/{options.model}", weights=options.weights)
    model = build(config, classes, image_size=size, seed=0)
    if len(model.heads) != 1:
        raise UserError(f"--model {options.model} has several heads; choose a model with one classifier")
    return Job(
        root=str(root),
        model=options.model,
        weights=str(save_initial_state(model, work / "initial-0.safetensors")),
        head=model.heads[0],
        classes=classes,
        image_size=size,
        resize=model.preprocess.resize_for(size),
        mean=model.preprocess.mean,
        std=model.preprocess.std,
        interpolation=model.preprocess.interpolation,
        hflip=not digits,
        batch=options.batch,
        stages=(
            Stage("head", options.head_epochs, options.head_lr, "none"),
            Stage("full", options.full_epochs, options.full_lr, "none" if digits else "light"),
        ),
        weight_decay=0.01,
        warmup=0.1,
        clip_norm=1.0,
        seed=0,
        threads=options.threads,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def save_initial_state(model: TransferModel, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in model.module.state_dict().items()}, path)
    return path


def with_seed(job: Job, seed: int, options: argparse.Namespace, work: Path) -> Job:
    """The job with another seed: another order, other augmentations and another head, equal for all packages."""
    path = work / f"initial-{seed}.safetensors"
    if not path.exists():
        config = ModelConfig(name=f"timm/{job.model}", weights=options.weights)
        save_initial_state(build(config, job.classes, image_size=job.image_size, seed=seed), path)
    return replace(job, seed=seed, weights=str(path))


def task(job: Job) -> dict[str, Any]:
    """Everything that the results depend on, without the paths of files."""
    fields = asdict(job)
    for name in ("weights", "speed", "root"):
        del fields[name]
    fields["images"] = {split: scan(Path(job.root) / split).fingerprint for split in ("train", "val")}
    return fields


if __name__ == "__main__":
    sys.exit(main())
