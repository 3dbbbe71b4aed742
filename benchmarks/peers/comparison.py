"""The comparison: runs each package in a fresh process, in turns, and saves the measurements."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Measured, Results, Spread, environment, interleaved, log, run_process
from benchmarks.peers import ours, parity, summary, trial
from benchmarks.peers.installs import PEERS
from benchmarks.peers.job import DOCUMENTED, Job, Speed, read_events
from distil_tl.utils.threads import available_cpus

KEEP = 1.15  # tuned peers that take this much longer than the fastest after two rounds are not measured further


class Comparison:
    """Runs the packages, each time in a fresh process, and saves the results.

    Attributes:
        job: what all run, with the settings of tuned peers.
        pythons: the interpreter of each peer.
        work: a folder for temporary files.
        seeded: `seeded(job, seed)` is the job of a round.
    """

    def __init__(
        self, job: Job, results: Results, pythons: dict[str, str], work: Path, seeded: Callable[[Job, int], Job]
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
        """Check that every peer starts from the same pixels and the same loss.

        Raises:
            UserError: one does not.
        """
        checked: dict[str, Any] = self.results.content["found"].setdefault("parity", {})
        view = None
        for peer, python in self.pythons.items():
            if peer not in checked:
                log(f"parity of {peer}")
                view = view or parity.our_view(self.job)
                exchanged = self.work / "view.pt"
                torch.save(view, exchanged)
                tuned = self.job.with_speed(Speed(workers=0, fused=True))
                command = [python, "-m", PEERS[peer][0], str(tuned.save(self.work / "job.json")), str(exchanged)]
                run_process([*command, "--check"], self.env, self.work / "log")
                difference = parity.compare(view, torch.load(exchanged))
                parity.refuse_unequal(peer, difference)
                checked[peer] = difference
                self.results.save()

    def choose_speed(self) -> Speed:
        """The fastest settings, by measurement. All peers use the same ones: their network and PyTorch are the same."""

        def measure() -> dict[str, Any]:
            rates = self.results.once("trial", self._trial)
            epochs = {stage.name: stage.epochs for stage in self.job.stages}
            speed = trial.best_speed(rates, epochs, 0)
            seconds = self.results.once("workers", lambda: self._try_workers(speed))
            return asdict(replace(speed, workers=int(min(seconds, key=lambda count: seconds[count]))))

        chosen = self.results.once("speed", measure)
        return Speed(**{**chosen, "bf16": tuple(chosen["bf16"])})

    def _trial(self) -> dict[str, dict[str, float]]:
        log("measuring precisions and memory formats")
        out = self.work / "trial.json"
        job = self.job.save(self.work / "job.json")
        command = [sys.executable, "-m", "benchmarks.peers.trial", str(job), str(out)]
        run_process(command, self.env, self.work / "log")
        rates: dict[str, dict[str, float]] = json.loads(out.read_text())
        return rates

    def _try_workers(self, speed: Speed) -> dict[str, float]:
        cpus = available_cpus()
        job, seconds = self.job.with_epochs(head=1, full=0), {}
        for count in sorted({0, 1, min(16, cpus // 2), min(16, cpus)}):
            log(f"measuring {count} loader processes")
            measured, _ = self._run_peer("plain", sys.executable, job.with_speed(replace(speed, workers=count)))
            seconds[str(count)] = measured.seconds
        return seconds

    def _run_peer(self, peer: str, python: str, job: Job) -> tuple[Measured, dict[str, Any]]:
        events = self.work / "events.jsonl"
        events.unlink(missing_ok=True)
        command = [python, "-m", PEERS[peer][0], str(job.save(self.work / "job.json")), str(events)]
        measured = run_process(command, self.env, self.work / "log")
        return measured, {"events": read_events(events)}

    def _run_ours(self, job: Job, keys: tuple[str, ...]) -> tuple[Measured, dict[str, Any]]:
        """Run distil_tl with an empty cache, so that the time to compute the features is included."""
        run_dir, cache = self.work / "run", self.work / "cache"
        for folder in (run_dir, cache):
            shutil.rmtree(folder, ignore_errors=True)
        env = {**self.env, "DISTIL_TL_CACHE": str(cache)}
        measured = run_process(ours.command(job, run_dir, keys), env, self.work / "log")
        return measured, ours.read_run(run_dir)

    def rows(self, more: dict[str, str], *, views: bool) -> dict[str, tuple[str, Any]]:
        """The rows by name: ("peer", (name, Speed)) or ("ours", (job, keys))."""
        rows: dict[str, tuple[str, Any]] = {}
        rows[summary.OURS] = ("ours", (self.job, ()))
        for k in summary.head_epochs(self.job):
            rows[f"{summary.HEAD_ALONE}{k}"] = ("ours", (self.job.with_epochs(head=k, full=0), ()))
        for peer in self.pythons:
            rows[self.name(peer, tuned=True)] = ("peer", (peer, self.job.speed))
        alone = self.job.with_epochs(full=0)
        augment = self.job.stage("full").augment
        light = (f"stages.head.augment={augment}",)
        rows[summary.SOONEST] = ("ours", (self.job.with_epochs(head=20, full=0), ours.search_keys(6, 4)))
        if augment != "none":
            four = (*light, "stages.head.views=4", *ours.search_keys(6, 4))
            rows[summary.FOUR_VIEWS] = ("ours", (self.job.with_epochs(head=30, full=0), four))
        rows[f"{summary.FIFTY}{summary.head_epochs(self.job)[-1]}"] = ("ours", (alone, ours.search_keys(10, 5)))
        rows |= {name: ("ours", (self.job, tuple(shlex.split(keys)))) for name, keys in more.items()}
        rows[summary.OFF] = ("ours", (self.job, ("stages.head.features=off",)))
        for peer in self.pythons:
            rows[self.name(peer, tuned=False)] = ("peer", (peer, DOCUMENTED))
        if views and augment != "none":
            rows[f"{summary.VIEWS}one view without augmentation"] = ("ours", (alone, ()))
            for v, label in ((1, "1 cached view"), (2, "2 cached views"), (4, "4 cached views")):
                rows[f"{summary.VIEWS}{label}"] = ("ours", (alone, (*light, f"stages.head.views={v}")))
            rows[f"{summary.VIEWS}a new view each epoch"] = ("ours", (alone, (*light, "stages.head.features=off")))
        return rows

    def measure(self, rows: dict[str, tuple[str, Any]], repeats: int, documented: int) -> None:
        once = [name for name in rows if name.startswith(summary.VIEWS)]
        limits = {name: 1 if name in once else repeats for name in rows}
        limits |= {name: documented for name in rows if name.endswith(", as documented")}
        for repeat, name in interleaved(list(rows), max(limits.values())):
            if repeat < limits[name] and not self._is_too_slow(name, repeat) and not self.results.has(name, repeat):
                self._measure(name, repeat, *rows[name])

    def _measure(self, name: str, repeat: int, kind: str, row: Any) -> None:
        if kind == "ours":
            job, keys = row
            measured, run = self._run_ours(self.seeded(job, repeat), keys)
        else:
            peer, speed = row
            job = self.seeded(self.job, repeat).with_speed(speed)
            measured, run = self._run_peer(peer, self.pythons[peer], job)
        self.results.add(name, repeat, measured, **run)
        top1 = run["events"][-1]["top1"]
        log(f"round {repeat + 1}: {name}: {measured.seconds:.1f} s, top-1 {top1:.3f}, load before {measured.load:.1f}")

    def _is_too_slow(self, name: str, repeat: int) -> bool:
        """Whether a tuned peer is so much slower after two rounds that it can't be the fastest."""
        tuned = [self.name(peer, tuned=True) for peer in self.pythons]
        if repeat < 2 or name not in tuned:
            return False
        # Judged by the first two rounds only, so that all later rounds give the same answer.
        medians = {
            other: Spread.of([run["seconds"] for run in self.results.of(other) if run["repeat"] < 2]).median
            for other in tuned
        }
        return medians[name] > KEEP * min(medians.values())
