"""`distil-tl doctor [CONFIG.yaml] [key=value ...]`: what a run will use here, and what will fail.

Alone, or with all ranks under torchrun or srun: rank 0 prints one table. Nothing is trained, nothing is left behind.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from distil_tl.utils.command import run_command
from distil_tl.utils.errors import EXIT_USER_ERROR, LostRanksError

if TYPE_CHECKING:
    from distil_tl.cli.doctor_plan import Plan
    from distil_tl.doctor.facts import Facts
    from distil_tl.doctor.lines import Report
    from distil_tl.doctor.meeting import Meeting

TIMEOUT = 60.0  # seconds, of each check
LEAST = 600.0  # seconds for the whole command with a short --timeout: importing torch may take a minute
DAY = 86400.0


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="distil-tl doctor",
        usage="distil-tl doctor [--json] [--images] [--timeout SECONDS] [CONFIG.yaml] [key=value ...]",
        description="Print what a run with these arguments will use on this machine, and what will fail. Start it as "
        "the run: alone, with torchrun, or with srun. Without arguments it checks the demo. Nothing is trained or "
        "changed.",
        epilog="Exit status: 0 if the run will work, also with warnings; 2 if it will not.",
    )
    parser.add_argument("--json", action="store_true", help="print the lines as JSON")
    parser.add_argument("--images", action="store_true", help="decode all images, and name each that can't be used")
    parser.add_argument(
        "--timeout", type=limit, default=TIMEOUT, metavar="SECONDS", help=f"limit of each check (default: {TIMEOUT:g})"
    )
    options, rest = parser.parse_known_args(args)
    if odd := [arg for arg in rest if arg.startswith("-")]:
        parser.error(f"unknown option {odd[0]}")
    return run_command(
        "distil-tl doctor", lambda: examine(rest, as_json=options.json, seconds=options.timeout, images=options.images)
    )


def limit(text: str) -> float:
    """A number of seconds from the command line."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= DAY:  # also not a number
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0, up to {DAY:.0f}")
    return seconds


def examine(args: Sequence[str], *, as_json: bool = False, seconds: float = TIMEOUT, images: bool = False) -> int:
    """Run all checks, on all ranks. Rank 0 prints the table.

    Args:
        images: whether all images are decoded, which may take hours.

    Returns:
        0 if a run will work, else 2; the same on all ranks.

    Raises:
        UserError: this rank can't reach the others.
        LostRanksError: rank 0 ended before this rank.
    """
    limit_all(max(LEAST, 20 * seconds))
    try:
        # They import torch, which takes seconds; --help does not need it.
        from distil_tl.cli.doctor_arguments import launch_of, plan_within
        from distil_tl.distributed.preemption import StopSignal
        from distil_tl.doctor.facts import gather
        from distil_tl.doctor.lines import Report
        from distil_tl.doctor.meeting import LONGEST, Meeting

        with StopSignal("the checks ended"):  # a signal raises an exception, so that files are removed
            report = Report(show=os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0")
            launch = launch_of(report, os.environ)
            meeting = Meeting(launch, seconds)
            plan = plan_within(seconds, args, report, launch)
            plan.decode_all = images
            facts = gather(launch, plan.distributed, plan.folders(), plan.data, plan.model, seconds)
            facts.failed = {**plan.failed, **facts.failed}
            meeting.tell_as_rank("facts", facts.to_json())
            if not meeting.is_main:
                return follow(meeting, facts, seconds, DAY if images else LONGEST)
            lead(meeting, plan, facts, report, seconds)
            status = 0 if report.works else EXIT_USER_ERROR
            print_report(report, plan, as_json=as_json)
            meeting.tell("status", status)
            others = [rank for rank in range(meeting.launch.world_size) if rank > 0]
            meeting.from_ranks("bye", others, 5.0)  # this process may serve the store
            return status
    finally:
        faulthandler.cancel_dump_traceback_later()


def lead(meeting: Meeting, plan: Plan, facts: Facts, report: Report, seconds: float) -> None:
    """Rank 0: collect what all ranks found, let them try the collectives, and judge everything."""
    from distil_tl.cli.doctor_plan import GROUP as CONFIGURATION
    from distil_tl.cli.doctor_plan import judge_plan
    from distil_tl.doctor import machine
    from distil_tl.doctor.facts import Facts
    from distil_tl.doctor.folders import archive_size, judge_folders
    from distil_tl.doctor.group import backends_of, judge_collectives
    from distil_tl.doctor.images import judge_pixels
    from distil_tl.doctor.lines import guarded, named_if_slow
    from distil_tl.doctor.meeting import LONGEST

    world = range(meeting.launch.world_size)
    longest = 3 * seconds  # a rank needs up to `seconds` for its arguments, and as long for its facts
    with named_if_slow(f"waiting for the other ranks (at most {longest:g} s)", show=report.show and len(world) > 1):
        arrived = meeting.from_ranks("facts", world, longest)
    everyone = [Facts.from_json(arrived[rank]) for rank in sorted(arrived)]
    judge_ranks(report, plan, everyone)
    able = len(everyone) == len(world) > 1 and len({each.device for each in everyone}) == 1
    if facts.device == "cuda":
        able = able and all(each.gpu.index is not None and each.gpu.fault is None for each in everyone)
    backends = backends_of(facts.device, plan.config.distributed.backend) if able else []
    answers = ask_all(meeting, facts, [each.rank for each in everyone], backends, report, seconds)

    def judge_machines(found: Report) -> None:
        machine.judge_versions(found, everyone)
        if plan.is_submission:  # the devices and limits of the nodes count, not those of this machine
            found.ok("GPUs", "device", "not looked at: a node of the job decides")
        else:
            machine.judge_gpus(found, everyone, plan.distributed, plan.config.precision)
            plan.judge_machine(found, everyone)
        offsets = {rank: answer["offset"] for rank, answer in answers.items() if rank > 0}
        machine.judge_clocks(found, offsets, {each.rank: each.host for each in everyone})

    def judge_communication(found: Report) -> None:
        unseen = {rank: answer["unseen"] for rank, answer in answers.items()}
        archive = archive_size(everyone)
        judge_folders(found, everyone, unseen, lambda name: plan.needs_folder(name, archive))
        if backends:
            judge_collectives(found, backends, {r: a["collectives"] for r, a in answers.items()}, len(world))
        elif len(world) > 1:
            found.warn("collectives", "ranks", "not tried, because not all ranks are there and able to compute")

    guarded(report, "machine", "all", seconds, judge_machines)
    guarded(report, "folders", "all", seconds, judge_communication)
    guarded(report, "data", "decoders", seconds, lambda found: judge_pixels(found, everyone))
    limit_all(DAY if plan.decode_all else LONGEST)
    judge_plan(report, plan, everyone, seconds)
    report.drop_repetitions(first=CONFIGURATION)


def ask_all(
    meeting: Meeting, facts: Facts, present: Sequence[int], backends: Sequence[str], report: Report, seconds: float
) -> dict[int, dict[str, Any]]:
    """Rank 0: let all ranks look for its files and reduce together. Returns their answers by rank."""
    from distil_tl.doctor.folders import Marks
    from distil_tl.doctor.lines import name_ranks, named_if_slow

    others = [rank for rank in present if rank > 0]
    marks = Marks({name: folder for name, folder in facts.folders.items() if name in ("run_dir", "cache")})
    try:
        meeting.tell("go", {"time": time.time(), "marks": marks.names, "backends": list(backends)})
        own = take_part(meeting, facts, marks.names, backends, seconds)
        with named_if_slow(f"waiting for {name_ranks(others)}", show=report.show and bool(others)):
            return {0: own, **meeting.from_ranks("answer", others, 2 * seconds)}
    finally:
        marks.remove()


def limit_all(seconds: float) -> None:
    """End this process after `seconds`, with a traceback, unless this is called again or cancelled.

    A check that hangs is given up in its thread, except where it keeps the interpreter locked, as some calls into a
    broken driver do. This limit needs no lock.
    """
    with suppress(io.UnsupportedOperation, AttributeError):  # standard error is not a file
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)  # type: ignore[arg-type]


def follow(meeting: Meeting, facts: Facts, seconds: float, longest: float) -> int:
    """Another rank: take part in what rank 0 asks for, for `longest` seconds. Returns the status that rank 0 tells."""
    go = meeting.hear("go", 6 * seconds)  # rank 0 waits for the facts of all
    if go is not None:
        offset = time.time() - go["time"]
        answer = take_part(meeting, facts, go["marks"], go["backends"], seconds)
        meeting.tell_as_rank("answer", {**answer, "offset": offset})
        limit_all(2 * longest)
        status: int | None = meeting.hear("status", longest)
        if status is not None:
            meeting.tell_as_rank("bye", True)
            return status
    raise LostRanksError(f"rank {meeting.launch.rank} lost contact with rank 0; see its output")


def take_part(
    meeting: Meeting, facts: Facts, marks: dict[str, str], backends: Sequence[str], seconds: float
) -> dict[str, Any]:
    """What this rank finds out together with the others."""
    from distil_tl.doctor.folders import unseen
    from distil_tl.doctor.group import try_collectives

    return {
        "offset": 0.0,
        "unseen": [] if meeting.is_main else unseen(facts.folders, marks),
        "collectives": try_collectives(meeting, backends, facts.gpu.index, seconds) if backends else {},
    }


def judge_ranks(report: Report, plan: Plan, everyone: Sequence[Facts]) -> None:
    """Lines about the ranks: who is there, who is missing, what could not be found out."""
    from distil_tl.doctor.lines import FAIL, name_ranks

    launch, group = plan.launch, "ranks"
    missing = sorted(set(range(launch.world_size)) - {each.rank for each in everyone})
    hosts = list(dict.fromkeys(each.host for each in everyone))
    started = {"none": "a single process", "torchrun": "started by torchrun", "slurm": "started by srun"}
    count = f"{len(everyone)} of {launch.world_size}"
    report.ok(group, "present", f"{count} on {', '.join(hosts)}, {started[launch.launcher]}")
    if missing:
        report.fail(
            group,
            "missing",
            f"{name_ranks(missing)} did not report in time; see their output, or try a longer --timeout",
        )
    for name in dict.fromkeys(name for each in everyone for name in each.failed):
        failed = {each.rank: (FAIL, each.failed[name]) for each in everyone if name in each.failed}
        report.per_rank(group, name, failed, of=launch.world_size)


def print_report(report: Report, plan: Plan, *, as_json: bool) -> None:
    from distil_tl.doctor.lines import as_json as to_json
    from distil_tl.doctor.lines import as_text

    text = json.dumps(to_json(report, plan.title), indent=2) if as_json else as_text(report, plan.title)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
