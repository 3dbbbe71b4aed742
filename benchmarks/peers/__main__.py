"""`python -m benchmarks.peers`: the same transfer-learning job by distil_tl and by tuned peers, timed in turns."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.measure import Results, Spread, environment, interleaved, run_process, say
from benchmarks.peers import ours, parity, trial, verdict
from benchmarks.peers.installs import PEERS, interpreters
from benchmarks.peers.job import DOCUMENTED, Job, Speed, Stage, read_events
from benchmarks.peers.picture import picture
from distil_tl.data.digits import digits_folder
from distil_tl.data.scan import scan
from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import TransferModel, build
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import write_atomic
from distil_tl.utils.threads import available_cpus

KEEP = 1.15  # a tuned peer that takes so much longer than the fastest after two rounds is not measured on


def main(args: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if args is None else list(args))
    return run_command("benchmarks.peers", lambda: benchmark(options))


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder with train/ and val/; by default the demo's digits")
    parser.add_argument("--image-size", type=int, help="pixels; 128, of the digits 64")
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="of timm, with one linear head")
    parser.add_argument("--weights", default="auto", help="as model.weights of distil_tl.train")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--head-epochs", type=int, default=5)
    parser.add_argument("--full-epochs", type=int, default=2)
    parser.add_argument("--head-lr", type=float, default=1e-2)
    parser.add_argument("--full-lr", type=float, default=3e-4)
    parser.add_argument("--repeats", type=int, default=5, help="of the tuned peers and of distil_tl")
    parser.add_argument("--documented", type=int, default=1, help="repeats of the peers as documented")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="a peer's own interpreter")
    parser.add_argument("--ours", action="append", default=[], metavar="NAME=KEYS", help="one more row of distil_tl: "
                        "its name, and keys as on its command line")  # fmt: skip
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--quick", action="store_true", help="2 + 1 epochs, once, tuned peers only")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/peers.json"))
    parser.add_argument("--venvs", type=Path, default=Path("runs/benchmarks/venvs"))
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever --out holds")
    options = parser.parse_args(args)
    if options.quick:
        options.head_epochs, options.full_epochs, options.repeats, options.documented = 2, 1, 1, 0
    if min(options.head_epochs, options.full_epochs, options.repeats, options.batch, options.threads) < 1:
        parser.error("epochs, repeats, batch and threads must be at least 1")
    for name in ("python", "ours"):
        setattr(options, name, dict(_pair(parser, f"--{name}", text) for text in getattr(options, name)))
    if unknown := set(options.python) - set(PEERS):
        parser.error(f"--python: there is no peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
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
        contest = Contest(job, results, pythons, work, lambda job, seed: with_seed(job, seed, options, work))
        contest.check_parity()
        job = contest.job = job.with_speed(contest.choose_speed())
        rows = contest.rows(dict(options.ours), views=not options.quick)
        contest.measure(rows, options.repeats, options.documented)
        tuned = [contest.name(peer, tuned=True) for peer in pythons]
        text = verdict.report(results, job, tuned, list(rows))
    path, drawn = results.write_report(text), results.path.with_suffix(".svg")
    write_atomic(drawn, picture(results, tuned))
    sys.stdout.write(f"{text}\n{results.path}\n{path}\n{drawn}\n")


def make_job(options: argparse.Namespace, work: Path) -> Job:
    """The job, with the network's first state written to a file.

    Raises:
        UserError: no such data, model or weights.
    """
    digits = options.data is None
    root = digits_folder() if digits else options.data.absolute()
    classes = len(scan(root / "train").classes)
    size = options.image_size or (64 if digits else 128)
    config = ModelConfig(name=f"timm/{options.model}", weights=options.weights)
    model = build(config, classes, image_size=size, seed=0)
    if len(model.heads) != 1:
        raise UserError(f"--model {options.model} has several heads; choose one with a single classifier")
    return Job(
        root=str(root),
        model=options.model,
        weights=str(save_first_state(model, work / "first-0.safetensors")),
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


def save_first_state(model: TransferModel, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in model.module.state_dict().items()}, path)
    return path


def with_seed(job: Job, seed: int, options: argparse.Namespace, work: Path) -> Job:
    """The job with another order, other augmentations and another head: the same ones for all contestants."""
    path = work / f"first-{seed}.safetensors"
    if not path.exists():
        config = ModelConfig(name=f"timm/{job.model}", weights=options.weights)
        save_first_state(build(config, job.classes, image_size=job.image_size, seed=seed), path)
    return replace(job, seed=seed, weights=str(path))


def grid(rates: int, decays: int) -> tuple[str, ...]:
    """Keys for a search over so many learning rates, from 5e-4 to 5e-2, and weight decays, from 0 and 1e-3 to 1."""
    lr = [round(5e-4 * 100 ** (i / (rates - 1)), 6) for i in range(rates)]
    decay = [0.0, *(round(1e-3 * 1000 ** (i / (decays - 2)), 6) for i in range(decays - 1))]
    lists = {"lr": lr, "weight_decay": decay}
    return tuple(f"stages.head.search.{key}=[{','.join(map(str, values))}]" for key, values in lists.items())


def task(job: Job) -> dict[str, Any]:
    """What figures depend on, and not where files happen to lie."""
    fields = asdict(job)
    for name in ("weights", "speed", "root"):
        del fields[name]
    fields["images"] = {split: scan(Path(job.root) / split).fingerprint for split in ("train", "val")}
    return fields


class Contest:
    """Runs contestants, each time in a fresh process, and keeps what came of it."""

    def __init__(
        self,
        job: Job,
        results: Results,
        pythons: dict[str, str],
        work: Path,
        seeded: Callable[[Job, int], Job],
    ) -> None:
        self.job = job
        self.seeded = seeded
        self.results = results
        self.pythons = pythons
        self.work = work
        self.env = environment(OMP_NUM_THREADS=str(job.threads))

    @staticmethod
    def name(peer: str, *, tuned: bool) -> str:
        return f"{peer}, tuned" if tuned else f"{peer}, as documented"

    def check_parity(self) -> None:
        known: dict[str, Any] = self.results.content["found"].setdefault("parity", {})
        view = None
        for peer, python in self.pythons.items():
            if peer not in known:
                say(f"parity of {peer}")
                view = view or parity.our_view(self.job)
                exchanged = self.work / "view.pt"
                torch.save(view, exchanged)
                tuned = self.job.with_speed(Speed(workers=0, fused=True))
                command = [python, "-m", PEERS[peer][0], str(tuned.save(self.work / "job.json")), str(exchanged)]
                run_process([*command, "--check"], self.env, self.work / "log")
                found = parity.compare(view, torch.load(exchanged))
                parity.refuse_unequal(peer, found)
                known[peer] = found
                self.results.save()

    def choose_speed(self) -> Speed:
        """By measuring; the same for all peers, as they run the same network on the same PyTorch."""

        def find() -> dict[str, Any]:
            found = self.results.found("trial", self._trial)
            epochs = {stage.name: stage.epochs for stage in self.job.stages}
            speed = trial.best_speed(found, epochs, 0)
            seconds = self.results.found("workers", lambda: self._try_workers(speed))
            return asdict(replace(speed, workers=int(min(seconds, key=lambda count: seconds[count]))))

        chosen = self.results.found("speed", find)
        return Speed(**{**chosen, "bf16": tuple(chosen["bf16"])})

    def _trial(self) -> dict[str, dict[str, float]]:
        say("trying precisions and memory formats")
        out = self.work / "trial.json"
        job = self.job.save(self.work / "job.json")
        command = [sys.executable, "-m", "benchmarks.peers.trial", str(job), str(out)]
        run_process(command, self.env, self.work / "log")
        found: dict[str, dict[str, float]] = json.loads(out.read_text())
        return found

    def _try_workers(self, speed: Speed) -> dict[str, float]:
        cpus = available_cpus()
        job, found = self.job.with_epochs(head=1, full=0), {}
        for count in sorted({0, 1, min(16, cpus // 2), min(16, cpus)}):
            say(f"trying {count} loader processes")
            found[str(count)] = self._run_peer("plain", sys.executable, job.with_speed(replace(speed, workers=count)))[
                0
            ].seconds
        return found

    def _run_peer(self, peer: str, python: str, job: Job) -> tuple[Any, dict[str, Any]]:
        events = self.work / "events.jsonl"
        events.unlink(missing_ok=True)
        command = [python, "-m", PEERS[peer][0], str(job.save(self.work / "job.json")), str(events)]
        measured = run_process(command, self.env, self.work / "log")
        return measured, {"events": read_events(events)}

    def _run_ours(self, job: Job, keys: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
        """With an empty cache: what it holds must be computed, and counts."""
        run_dir, cache = self.work / "run", self.work / "cache"
        for folder in (run_dir, cache):
            shutil.rmtree(folder, ignore_errors=True)
        env = {**self.env, "DISTIL_TL_CACHE": str(cache)}
        measured = run_process(ours.command(job, run_dir, keys), env, self.work / "log")
        return measured, ours.read_run(run_dir)

    def rows(self, more: dict[str, str], *, views: bool) -> dict[str, tuple[str, Any]]:
        """Contestants by name: ("peer", (name, Speed)) or ("ours", (job, keys))."""
        found: dict[str, tuple[str, Any]] = {}
        found[verdict.OURS] = ("ours", (self.job, ()))
        for k in verdict.head_epochs(self.job):
            found[f"{verdict.HEAD_ALONE}{k}"] = ("ours", (self.job.with_epochs(head=k, full=0), ()))
        for peer in self.pythons:
            found[self.name(peer, tuned=True)] = ("peer", (peer, self.job.speed))
        alone = self.job.with_epochs(full=0)
        augment = self.job.stage("full").augment
        light = (f"stages.head.augment={augment}",)
        found[verdict.SOONEST] = ("ours", (self.job.with_epochs(head=20, full=0), grid(6, 4)))
        if augment != "none":
            four = (*light, "stages.head.views=4", *grid(6, 4))
            found[verdict.FOUR_VIEWS] = ("ours", (self.job.with_epochs(head=30, full=0), four))
        found[f"{verdict.FIFTY}{verdict.head_epochs(self.job)[-1]}"] = ("ours", (alone, grid(10, 5)))
        found |= {name: ("ours", (self.job, tuple(shlex.split(keys)))) for name, keys in more.items()}
        found[verdict.OFF] = ("ours", (self.job, ("stages.head.features=off",)))
        for peer in self.pythons:
            found[self.name(peer, tuned=False)] = ("peer", (peer, DOCUMENTED))
        if views and augment != "none":
            found[f"{verdict.VIEWS}one view without augmentation"] = ("ours", (alone, ()))
            for v, said in ((1, "1 cached view"), (2, "2 cached views"), (4, "4 cached views")):
                found[f"{verdict.VIEWS}{said}"] = ("ours", (alone, (*light, f"stages.head.views={v}")))
            found[f"{verdict.VIEWS}a new view each epoch"] = ("ours", (alone, (*light, "stages.head.features=off")))
        return found

    def measure(self, rows: dict[str, tuple[str, Any]], repeats: int, documented: int) -> None:
        once = [name for name in rows if name.startswith(verdict.VIEWS)]
        limits = {name: 1 if name in once else repeats for name in rows}
        limits |= {name: documented for name in rows if name.endswith(", as documented")}
        for repeat, name in interleaved(list(rows), max(limits.values())):
            if repeat < limits[name] and not self._has_lost(name, repeat) and not self.results.has(name, repeat):
                self._measure(name, repeat, *rows[name])

    def _measure(self, name: str, repeat: int, kind: str, what: Any) -> None:
        if kind == "ours":
            job, keys = what
            measured, found = self._run_ours(self.seeded(job, repeat), keys)
        else:
            peer, speed = what
            job = self.seeded(self.job, repeat).with_speed(speed)
            measured, found = self._run_peer(peer, self.pythons[peer], job)
        self.results.add(name, repeat, measured, **found)
        top1 = found["events"][-1]["top1"]
        say(f"round {repeat + 1}: {name}: {measured.seconds:.1f} s, top-1 {top1:.3f}, load before {measured.load:.1f}")

    def _has_lost(self, name: str, repeat: int) -> bool:
        """Whether a tuned peer is so much slower after two rounds that it can't be the fastest."""
        tuned = [self.name(peer, tuned=True) for peer in self.pythons]
        if repeat < 2 or name not in tuned:
            return False
        # By the first two rounds alone, so that all that come later are judged alike.
        medians = {
            other: Spread.of([run["seconds"] for run in self.results.of(other) if run["repeat"] < 2]).median
            for other in tuned
        }
        return medians[name] > KEEP * min(medians.values())


if __name__ == "__main__":
    sys.exit(main())
