"""Plans of faults: a run with all its attempts, compared with one that was never interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.chaos import DAMAGE, KINDS, SIGNALS, Ended, Fault, attempt, damage, left_over_processes, small_disk
from tests.helpers.same_run import Reference, compare, samples


@dataclass(frozen=True)
class Plan:
    """The worlds of the attempts, and the faults that end all but the last of them."""

    name: str
    args: tuple[str, ...]
    variant: str
    worlds: tuple[int, ...]
    faults: tuple[Fault, ...]
    seed: int

    @property
    def same_world(self) -> bool:
        return set(self.worlds) == {2}


@dataclass
class Outcome:
    plan: Plan
    run_dir: Path
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def make_reference(folder: Path, args: list[str]) -> Reference:
    run_dir = folder / "run"
    ended = attempt(folder / "scratch", [*args, f"run_dir={run_dir}"], 2, count=True)
    assert ended.statuses == [0, 0], ended
    counted = [json.loads((folder / "scratch" / f"counted-{rank}.json").read_text()) for rank in (0, 1)]
    seen, wrong = samples(folder / "scratch")
    assert not wrong, wrong
    return Reference(run_dir, seen, counted)


def carry_out(plan: Plan, folder: Path, reference: Reference) -> Outcome:
    """Carry out the plan; the outcome lists every difference from the reference."""
    began = time.monotonic()
    disk = folder / "disk"
    with small_disk(disk) if any(fault.kind == "disk full" for fault in plan.faults) else contextlib.nullcontext():
        disk.mkdir(parents=True, exist_ok=True)
        outcome = Outcome(plan, disk / "run")
        args = [*plan.args, f"run_dir={outcome.run_dir}"]
        rng = random.Random(plan.seed)
        for number, world in enumerate(plan.worlds):
            fault = plan.faults[number] if number < len(plan.faults) else None
            ended = attempt(folder / f"attempt-{number}", args, world, fault)
            (disk / "ballast").unlink(missing_ok=True)
            note = f"{world} ranks: {fault.kind + ' in ' + fault.region if fault else 'no fault'}"
            note += f" at {ended.struck} of rank {fault.by}" if fault and ended.struck else ""
            if fault and fault.kind in DAMAGE and ended.struck:
                note += f", {damage(outcome.run_dir, fault.kind, rng)}"
            outcome.notes.append(f"{note} -> {ended.statuses}")
            wrong = wrong_end(ended, fault)
            if wrong:
                outcome.problems.append(f"attempt {number} ({outcome.notes[-1]}): {wrong}\n" + "\n".join(ended.said))
            if ended.statuses == [0] * world:
                break
        outcome.problems += [f"process {pid} is still alive" for pid in left_over_processes(folder)]
        outcome.problems += compare(outcome.run_dir, reference, folder, exact=plan.same_world)
    outcome.seconds = time.monotonic() - began
    return outcome


def wrong_end(ended: Ended, fault: Fault | None) -> str | None:
    """What is wrong with the end of an attempt, given its fault; None if nothing is."""
    if None in ended.statuses:
        return "it did not end"
    if set(ended.statuses) == {-signal.SIGKILL}:  # loader workers without a parent print messages of torch
        return None
    for said in ended.said:
        if "Traceback" in said or "Logging error" in said:
            return "a traceback"
    statuses = {status for status in ended.statuses if status is not None}
    if fault is None or ended.struck is None:
        return None if statuses == {0} else f"statuses {ended.statuses} without a fault"
    if fault.kind in SIGNALS:  # it may come too late to stop; and the second signal may kill it when all is saved
        allowed = [{0}, {3}]
        if fault.kind == "twice":
            allowed += [{0, -SIGNALS["twice"]}, {3, -SIGNALS["twice"]}]
    elif fault.kind == "disk full":
        allowed = [{0}, {1}]
    elif fault.kind == "kill one":
        allowed = [{-9}, {-9, 1}, {-9, 0}]
    else:
        return None
    if statuses not in allowed:
        return f"statuses {ended.statuses}"
    if statuses == {1} and "can't write" not in ended.said[0]:
        return "no message about the file that could not be written"
    return None


def random_fault(rng: random.Random, kind: str, world: int, reference: Reference, *, first: bool) -> Fault:
    region = rng.choice(("start-up", "step", "step", "evaluation", "checkpoint", "checkpoint", "finish"))
    if kind == "disk full" and region in ("finish", "start-up"):
        region = "step"
    by = 0 if region == "checkpoint" else rng.randrange(world)
    if kind == "disk full" and os.geteuid() != 0:
        by = 0  # the size of whose files is limited
    there = reference.counted[min(by, 1)][region]
    # A first attempt reaches every line; a later one only those of the work that is left.
    line = 1 + int(rng.random() * there * (1 if first or region in ("start-up", "finish") else 0.5))
    return Fault(kind, region, by, line, rng.random())


def random_plan(number: int, args: list[str], variant: str, kind: str, reference: Reference, final: int) -> Plan:
    """A plan whose first fault is of `kind`, and that ends on `final` ranks, with up to two more faults between."""
    rng = random.Random(f"chaos {number}")
    faults = [random_fault(rng, kind, 2, reference, first=True)]
    worlds = [2]
    for _ in range(rng.choice((0, 1, 1, 2))):
        world = 2 if final == 2 else rng.choice((1, 2, 4))
        worlds.append(world)
        faults.append(random_fault(rng, rng.choice(KINDS), world, reference, first=False))
    return Plan(f"{number:02d}", (*args, f"data.workers={int(number % 5 == 4)}"), variant, (*worlds, final),
                tuple(faults), number)  # fmt: skip


def table(outcomes: list[Outcome]) -> str:
    """A line for each run, with its attempts below it, and counts by kind."""
    rows = []
    for outcome in outcomes:
        plan = outcome.plan
        result = "FAILED" if outcome.problems else "bit-equal" if plan.same_world else "same samples"
        worlds = "-".join(map(str, plan.worlds))
        rows.append(f"{plan.name}  {plan.variant:<10} worlds {worlds:<9} {outcome.seconds:5.1f} s  {result}")
        rows += [f"      {note}" for note in outcome.notes]
    notes = [note for outcome in outcomes for note in outcome.notes]
    struck = Counter(note.split(": ", 1)[1].split(" in ")[0] for note in notes if " at " in note)
    regions = Counter(note.split(" in ", 1)[1].split(" at ")[0] for note in notes if " at " in note)
    rows.append(f"{len(outcomes)} runs, {len(notes)} attempts, {sum(struck.values())} faults that struck")
    rows.append("by kind: " + ", ".join(f"{kind} {count}" for kind, count in sorted(struck.items())))
    rows.append("by moment: " + ", ".join(f"{region} {count}" for region, count in sorted(regions.items())))
    return "\n".join(rows)
