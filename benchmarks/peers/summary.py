"""The tables of the comparison: seconds to each goal, compared with the fastest tuned peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import Results, Spread, markdown
from benchmarks.peers.job import Job

# Names of rows, and prefixes of such names. They are also keys in the file of results.
OURS, OFF, SOONEST = "distil_tl", "distil_tl, features off", "distil_tl, to the accuracy"
FOUR_VIEWS = "distil_tl, best of 24 heads on 4 views"
HEAD_ALONE, FIFTY = "distil_tl, head alone, k=", "distil_tl, best of 50 heads, k="
VIEWS = "distil_tl, head on "  # with light augmentation: V cached views, or a new view in each epoch


@dataclass(frozen=True)
class Point:
    """An evaluation, with the seconds since the start of the process."""

    stage: str
    epoch: int
    seconds: float
    top1: float


def curve(run: dict[str, Any]) -> list[Point]:
    epochs = [event for event in run["events"] if event["event"] == "epoch"]
    return [Point(e["stage"], e["epoch"], e["time"] - run["began"], e["top1"]) for e in epochs]


def seconds_to(run: dict[str, Any], top1: float) -> float | None:
    """The time of the first evaluation that reached `top1`; None if none did."""
    return next((point.seconds for point in curve(run) if point.top1 >= top1), None)


def seconds_to_epoch(run: dict[str, Any], stage: str, epoch: int) -> float:
    return next(p.seconds for p in curve(run) if p.stage == stage and p.epoch == epoch)


def stage_seconds_to_epoch(run: dict[str, Any], stage: str, epoch: int) -> float:
    """As `seconds_to_epoch`, but since the start of the stage."""
    began: float = next(e["time"] for e in run["events"] if e["event"] == "begin" and e["stage"] == stage)
    return seconds_to_epoch(run, stage, epoch) - (began - float(run["began"]))


def final_top1(run: dict[str, Any]) -> float:
    return curve(run)[-1].top1


def head_loss(run: dict[str, Any]) -> float:
    """The loss on val after the head stage. For equal work it is equal, up to the effect of the order of the images."""
    return float([e["loss"] for e in run["events"] if e["event"] == "epoch" and e["stage"] == "head"][-1])


def fastest(results: Results, names: Sequence[str]) -> str | None:
    """The name with the smallest median, among those with the maximum number of runs. None if there are no runs."""
    counts = {name: len(results.of(name)) for name in names}
    most = max(counts.values(), default=0)
    medians = {name: _seconds(results.of(name)).median for name in names if counts[name]}
    complete = [name for name in medians if counts[name] == most]
    return min(complete, key=lambda name: medians[name]) if complete else None


def report(results: Results, job: Job, tuned: Sequence[str], names: Sequence[str]) -> str:
    """All tables as Markdown. `names` are the rows in order."""
    best = fastest(results, tuned)
    if best is None:
        return "No tuned peer was measured.\n"
    target = Spread.of([final_top1(run) for run in results.of(best)]).median
    parts = [_whole(results, job, names, best, target), _head(results, job, best), _views(results, job, names)]
    return "\n".join([*filter(None, parts), _goals(results, job, best, target), _settings(results)])


def _whole(results: Results, job: Job, names: Sequence[str], best: str, target: float) -> str:
    reference = Spread.of([run["seconds"] for run in results.of(best)]).median
    rows = []
    for name in names:
        runs = results.of(name)
        if not runs or name.startswith((HEAD_ALONE, FIFTY, VIEWS)):
            continue
        seconds = Spread.of([run["seconds"] for run in runs])
        reached = [s for run in runs if (s := seconds_to(run, target)) is not None]
        to_target = f"{Spread.of(reached).text()}, {len(reached)} of {len(runs)}" if reached else "not reached"
        speedup = f"{reference / seconds.median:.2f}x"
        top1 = Spread.of([final_top1(run) for run in runs])
        load = Spread.of([run["load"] for run in runs])
        losses = Spread.of([head_loss(run) for run in runs])
        rows.append([name, len(runs), seconds.text(), speedup, losses.text(3), top1.text(3), to_target, load.text()])
    header = ["", "runs", "seconds", f"faster than {best}", "loss after the head", "top-1", f"seconds to {target:.3f}",
              "load before"]  # fmt: skip
    head, full = job.stage("head").epochs, job.stage("full").epochs
    return (
        f"**{head} epochs of the head, then {full} of everything**, from process start to end, median (range):\n\n"
        + markdown(header, rows)
    )


def _head(results: Results, job: Job, best: str) -> str:
    rows = []
    for epochs in head_epochs(job):
        runs = results.of(f"{HEAD_ALONE}{epochs}")
        if not runs:
            continue
        theirs = Spread.of([seconds_to_epoch(run, "head", epochs) for run in results.of(best)])
        stage = Spread.of([stage_seconds_to_epoch(run, "head", epochs) for run in results.of(best)])
        ours, our_stage = _seconds(runs), Spread.of([run["stage_seconds"]["head"] for run in runs])
        rows.append([
            epochs, theirs.text(), ours.text(), f"{theirs.median / ours.median:.2f}x", stage.text(), our_stage.text(),
            f"{stage.median / our_stage.median:.2f}x",
        ])  # fmt: skip
    if not rows:
        return ""
    header = ["k", f"{best}, to epoch k", "distil_tl, whole process", "", f"{best}, stage", "distil_tl, stage", ""]
    return (
        "**Only the head stage, k epochs.** The whole process, or the stage with its features and evaluations:\n\n"
        + markdown(header, rows)
    )


def _seconds(runs: Sequence[dict[str, Any]]) -> Spread:
    return Spread.of([run["seconds"] for run in runs])


def _views(results: Results, job: Job, names: Sequence[str]) -> str:
    rows = []
    for name in names:
        if name.startswith(VIEWS) and (runs := results.of(name)):
            top1 = Spread.of([max(p.top1 for p in curve(run)) for run in runs])
            rows.append([name.removeprefix("distil_tl, "), len(runs), _seconds(runs).text(), top1.text(3)])
    if not rows:
        return ""
    return "**Accuracy with cached views**, only the head, best top-1 of its epochs:\n\n" + markdown(
        ["", "runs", "seconds", "top-1"], rows
    )


def head_epochs(job: Job) -> list[int]:
    return sorted({1, job.stage("head").epochs})


def _goals(results: Results, job: Job, best: str, target: float) -> str:
    rows = [row for epochs in head_epochs(job) for row in _head_goals(results, epochs, best)]
    reference = _seconds(results.of(best)).median
    if runs := results.of(OURS):
        ratio = reference / _seconds(runs).median
        rows.append(["the same schedule", "1.5x", f"{ratio:.2f}x", _met(ratio, 1.5)])
    reached = [seconds_to(run, target) for run in results.of(SOONEST)]
    goal = f"to a top-1 of {target:.3f}, compared with its whole schedule"
    if reached and None not in reached:
        soonest = Spread.of([s for s in reached if s is not None]).median
        rows.append([goal, "5.0x", f"{reference / soonest:.2f}x", _met(reference / soonest, 5.0)])
        first = [s for run in results.of(best) if (s := seconds_to(run, target)) is not None]
        ratio = Spread.of(first).median / soonest
        rows.append(["the same, compared with the time when it first had it", "-", f"{ratio:.2f}x", "-"])
    elif reached:
        rows.append([goal, "5.0x", "not reached in each run", "no"])
    longest = head_epochs(job)[-1]
    fifty, one = results.of(f"{FIFTY}{longest}"), results.of(f"{HEAD_ALONE}{longest}")
    if fifty and one:
        ratio = _seconds(fifty).median / _seconds(one).median
        rows.append(["the best of 50 heads, compared with one", "at most 1.2x", f"{ratio:.2f}x", _met(1.2, ratio)])
    return f"**Goals**, against {best}:\n\n" + markdown(["", "goal", "measured", "met"], rows)


def _head_goals(results: Results, epochs: int, best: str) -> list[list[str]]:
    """Rows of a head stage of `epochs`: the stage by itself, and the whole process."""
    runs = results.of(f"{HEAD_ALONE}{epochs}")
    if not runs:
        return []
    theirs = Spread.of([stage_seconds_to_epoch(run, "head", epochs) for run in results.of(best)]).median
    stage = theirs / Spread.of([run["stage_seconds"]["head"] for run in runs]).median
    whole = Spread.of([seconds_to_epoch(run, "head", epochs) for run in results.of(best)]).median
    whole /= _seconds(runs).median
    goal = 1.0 if epochs == 1 else 0.9 * epochs
    return [
        [f"head stage of {epochs}, {name}", f"{goal:.1f}x", f"{ratio:.2f}x", _met(ratio, goal)]
        for name, ratio in (("the stage", stage), ("whole process", whole))
    ]


def _met(ratio: float, minimum: float) -> str:
    return "yes" if ratio >= minimum else "no"


def _settings(results: Results) -> str:
    saved = results.content["found"]
    lines = []
    if "trial" in saved:
        rows = [[name, *[f"{speed:,.0f}" for speed in stages.values()]] for name, stages in saved["trial"].items()]
        lines.append(
            "**Trial of the settings**, images/s of a training step:\n\n"
            + markdown(["", "head alone", "everything"], rows)
        )
    if "workers" in saved:
        rows = [[count, f"{seconds:.1f}"] for count, seconds in saved["workers"].items()]
        lines.append("Seconds of one head epoch:\n\n" + markdown(["loader processes", "seconds"], rows))
    if "speed" in saved:
        lines.append(f"Tuned peers ran with: {_settings_text(saved['speed'])}.\n")
    if "parity" in saved:
        rows = [
            [name, f"{p['mean_pixel_difference']:.3f}", f"{p['largest_pixel_difference']:.0f}", f"{p['loss']:.5f}",
             f"{p['loss_on_our_pixels']:.6f}"]
            for name, p in saved["parity"].items()
        ]  # fmt: skip
        ours = next(iter(saved["parity"].values()))["our_loss"] if rows else 0.0
        header = ["", "mean pixel difference (of 255)", "maximum", "first loss", "first loss on our pixels"]
        lines.append(f"**Parity** on 32 images of val (our first loss is {ours:.6f}):\n\n" + markdown(header, rows))
    return "\n".join(lines)


def _settings_text(speed: dict[str, Any]) -> str:
    layout = "channels_last" if speed["channels_last"] else "NCHW"
    bf16 = f"bf16 in stage {' and '.join(speed['bf16'])}" if speed["bf16"] else "fp32"
    return f"{layout}, {bf16}, {speed['workers']} persistent loader processes, fused AdamW, BatchNorm statistics frozen"
