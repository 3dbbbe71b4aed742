"""A rank that dies or freezes, a loss that is not finite, a full disk: the other ranks end soon and report it."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distil_tl.rundir.checkpoint import Checkpoints, find_damage
from tests.helpers.arguments import WITHOUT_TIMM
from tests.helpers.chaos import Fault, attempt, left_over_processes, small_disk
from tests.helpers.ranks import lines, processes_of, rank
from tests.helpers.same_run import samples
from tests.helpers.torchrun import ENVIRONMENT, TORCHRUN

WITHIN = 90  # seconds, enough for a busy machine


def quick(small: list[str], tmp_path: Path, *more: str) -> list[str]:
    return [*small, f"run_dir={tmp_path}/run", "checkpoint.every_steps=2", "distributed.timeout_seconds=8", *more]


@pytest.mark.parametrize("kind", ["kill one", "freeze"])
@pytest.mark.parametrize(
    ("region", "line", "by", "phase"),
    [
        ("start-up", 30, 0, "start"),
        ("start-up", 90, 1, "start-up"),
        ("step", 400, 1, "stage head, epoch 1"),
        ("step", 400, 0, "stage head, epoch 1"),
        ("evaluation", 60, 1, "the evaluation after epoch 1 of stage head"),
    ],
)
def test_the_other_ranks_end_soon_and_name_the_phase(
    small: list[str], tmp_path: Path, kind: str, region: str, line: int, by: int, phase: str
) -> None:
    fault = Fault(kind, region, by, line)
    args = quick(small, tmp_path, "distributed.prepare_timeout_seconds=8")
    ended = attempt(tmp_path / "scratch", args, 2, fault, patience=WITHIN)
    assert ended.struck is not None
    assert ended.statuses[by] == (-signal.SIGKILL if kind == "kill one" else None)
    assert ended.statuses[1 - by] == 1, ended
    said = ended.said[1 - by]
    assert "Traceback" not in said
    wanted = [f"lost contact with the other ranks during {phase}", "waited 8 s for another rank: "]
    if region == "start-up":  # one rank may leave the rendezvous before the other
        wanted.append("could not connect to the other ranks")
    assert any(f"rank {1 - by} {words}" in said for words in wanted), said
    assert len(said.splitlines()) < 20, said
    if kind == "kill one":
        assert re.search(rf"rank {by} \(host \S+, pid \d+\) was killed or exited", said)
    assert left_over_processes(tmp_path) == []


def gone_before(step: str, by: int, how: signal.Signals) -> None:
    """One rank is killed, or freezes, when it reaches a step of the rendezvous."""
    module: Any = importlib.import_module(
        f"distil_tl.distributed.{'store' if step == 'rendezvous' else 'process_group'}"
    )
    owner = module if step == "rendezvous" else module.dist
    if rank() == by:
        setattr(owner, step, lambda *args, **kwargs: os.kill(os.getpid(), how))


@pytest.mark.parametrize("by", [0, 1])
@pytest.mark.parametrize("step", ["rendezvous", "init_process_group"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_waiting_for_a_rank_that_does_not_join_ends(
    small: list[str], tmp_path: Path, how: signal.Signals, step: str, by: int
) -> None:
    prepare = functools.partial(gone_before, step, by, how)
    frozen = by if how == signal.SIGSTOP else None
    args = quick(small, tmp_path, "distributed.timeout_seconds=4")
    ended = attempt(tmp_path / "scratch", args, 2, patience=WITHIN, prepare=prepare, frozen=frozen)
    assert ended.statuses[by] == (-signal.SIGKILL if how == signal.SIGKILL else None)
    assert ended.statuses[1 - by] == 1, ended
    said = ended.said[1 - by]
    assert "Traceback" not in said
    assert re.search(
        rf"rank {1 - by} could not connect to the other ranks at 127.0.0.1:\d+: .*see the logs of the others", said
    )
    assert not (tmp_path / "run").exists()


def slow_start(seconds: float) -> None:
    """Rank 0 is slow in everything that it does while the others wait."""
    module: Any = importlib.import_module("distil_tl.train")
    splits: Any = importlib.import_module("distil_tl.data.splits")

    def slow(function: Any) -> Any:
        def slowed(*args: Any) -> Any:
            if rank() == 0:
                time.sleep(seconds)
            return function(*args)

        return slowed

    module.look_for_start, module.download_weights = slow(module.look_for_start), slow(module.download_weights)
    splits.data_root = slow(splits.data_root)


def test_rank_zero_may_work_alone_for_longer_than_a_collective_may_take(small: list[str], tmp_path: Path) -> None:
    args = quick(small, tmp_path, "stages.full.epochs=0", "distributed.timeout_seconds=3")
    ended = attempt(tmp_path / "scratch", args, 2, prepare=functools.partial(slow_start, 5.0))
    assert ended.statuses == [0, 0], ended
    assert ended.seconds > 15


def test_waiting_for_rank_zero_has_a_limit(small: list[str], tmp_path: Path) -> None:
    args = quick(small, tmp_path, "distributed.prepare_timeout_seconds=1")
    ended = attempt(tmp_path / "scratch", args, 2, prepare=functools.partial(slow_start, 8.0))
    assert ended.statuses == [1, 1], ended
    assert "rank 1 waited 1 s for another rank: start" in ended.said[1]
    assert "Traceback" not in ended.said[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_to_every_process_does_not_break_the_save(small: list[str], tmp_path: Path, workers: int) -> None:
    args = quick(small, tmp_path, f"data.workers={workers}", "checkpoint.every_steps=null")
    ended = attempt(tmp_path / "scratch", args, 2, Fault("signal to everyone", "step", 1, 1500))
    assert ended.statuses == [3, 3], ended
    assert "same command to resume" in ended.said[0]
    assert not any("Traceback" in said for said in ended.said), ended
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest_valid() is not None
    assert left_over_processes(tmp_path) == []
    again = attempt(tmp_path / "again", args, 2)
    assert again.statuses == [0, 0]
    assert not any("Warning" in said for said in again.said), again


def on_a_node_of_its_own(folder: Path) -> None:
    """A relative run_dir is another folder for each rank."""
    importlib.import_module("distil_tl.rundir.directory").VISIBLE_WITHIN_S = 0.5  # type: ignore[attr-defined]
    (folder / f"node{rank()}").mkdir(exist_ok=True)
    os.chdir(folder / f"node{rank()}")


def test_a_run_directory_that_a_rank_does_not_see_is_refused_at_once(small: list[str], tmp_path: Path) -> None:
    prepare = functools.partial(on_a_node_of_its_own, tmp_path)
    args = quick(small, tmp_path, "stages.full.epochs=0")
    ended = attempt(tmp_path / "a", [*args, "run_dir=run"], 2, prepare=prepare)
    assert ended.statuses == [2, 2], ended
    assert re.search(
        r"run is not visible on \S+, but it is on rank 0: run_dir must be on storage that all nodes", ended.said[0]
    )
    assert not (tmp_path / "node0" / "run" / "checkpoints").exists()

    run_dir = tmp_path / "node0" / "run"
    assert attempt(tmp_path / "b", [*args, f"run_dir={run_dir}"], 2).statuses == [0, 0]
    (run_dir / "summary.json").unlink()
    ended = attempt(tmp_path / "c", [*args, "run_dir=run"], 2, prepare=prepare)
    assert ended.statuses == [2, 2], ended
    assert "run/checkpoints/step-00000006 is not visible on" in ended.said[0]


def bad_loss(step: int, by: int) -> None:
    """On one rank the loss of one image is not finite in a step of the stage `full`."""
    module, losses_module = (importlib.import_module(f"distil_tl.{name}") for name in ("train", "training.losses"))
    functional, original = losses_module.F, module.forward_backward
    stage = [""]

    def forward_backward(info: Any, training: Any, *args: Any) -> Any:
        stage[0] = training.stage.name
        return original(info, training, *args)

    calls = iter(range(1000))

    def cross_entropy(*args: Any, **kwargs: Any) -> Any:
        losses = functional.cross_entropy(*args, **kwargs)
        if stage[0] == "full" and next(calls) == step and rank() == by:
            losses = torch.cat([losses[:1] * float("nan"), losses[1:]])
        return losses

    vars(losses_module)["F"] = types.SimpleNamespace(cross_entropy=cross_entropy)
    vars(module)["forward_backward"] = forward_backward


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_step(
    small: list[str], tmp_path: Path, folder: Path
) -> None:
    args = quick(small, tmp_path, "tracking.log_every=5")
    ended = attempt(tmp_path / "scratch", args, 2, prepare=functools.partial(bad_loss, 3, 1))
    assert ended.statuses == [1, 1], ended
    said = "".join(ended.said)
    assert "Traceback" not in said
    assert said.count("not finite") == 1
    assert "not finite in step 4 of stage full" in said
    seen, _ = samples(tmp_path / "scratch")
    images = sorted(path for kind in sorted((folder / "train").iterdir()) for path in kind.iterdir())
    wanted = {str(images[i].relative_to(folder / "train")) for i in seen["full", 3]}
    assert len(wanted) == 8
    assert set(re.findall(r"\w+/\d+\.png", said)) == wanted
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in checkpoints.all()][-1] == "step-00000008"
    for path in checkpoints.all():
        assert find_damage(path) is None
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(path / "weights.safetensors").values())
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    assert attempt(tmp_path / "again", args, 2).statuses == [0, 0]


@pytest.mark.parametrize("space", [0.0, 0.15, 0.6], ids=["none", "some", "nearly enough"])
def test_a_full_disk_leaves_the_last_checkpoint(small: list[str], tmp_path: Path, space: float) -> None:
    with small_disk(tmp_path / "disk"):
        run_dir = tmp_path / "disk" / "run"
        args = quick(small, tmp_path, f"run_dir={run_dir}")
        ended = attempt(tmp_path / "scratch", args, 2, Fault("disk full", "step", 0, 3000, space))
        assert ended.struck is not None
        assert ended.statuses == [1, 1], ended
        assert "can't write" in ended.said[0]
        assert not any("Traceback" in said or "Logging error" in said for said in ended.said), ended
        if space:
            assert re.search(r"can't write the checkpoint .*; the last good one, step-\d+, is kept", ended.said[0])
        checkpoints = Checkpoints(run_dir / "checkpoints")
        valid = checkpoints.newest_valid()
        assert valid is not None
        assert valid == checkpoints.named("last")
        assert sorted(p.name for p in checkpoints.folder.iterdir() if p.name.startswith(".")) == []
        (tmp_path / "disk" / "ballast").unlink(missing_ok=True)
        assert attempt(tmp_path / "again", args, 2).statuses == [0, 0]


FULL_DISK = """
import resource, sys
import distil_tl.train as train
original, taken = train.check_finite, iter(range(1000))
def check_finite(*args):
    if next(taken) == 3:  # no file may get longer
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    return original(*args)
train.check_finite = check_finite
sys.exit(train.main())
"""


def test_a_full_disk_is_reported_in_a_sentence_for_any_file(small: list[str], tmp_path: Path) -> None:
    script = tmp_path / "full_disk.py"
    script.write_text(FULL_DISK)
    args = quick(small, tmp_path)
    done = subprocess.run(
        [sys.executable, str(script), *args], env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    said = f"distil_tl.train: can't write {metrics}: File too large; files saved before are unchanged\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert "Traceback" not in done.stdout
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    assert attempt(tmp_path / "again", args, 1).statuses == [0]


def dies_between(step: int) -> None:
    """Rank 0 is killed when the checkpoint of a step is written and `last` names it, but `best` does not yet."""
    writer: Any = importlib.import_module("distil_tl.rundir.checkpoint").Checkpoints
    original = writer._point

    def _point(self: Any, name: str, target: Path) -> None:
        if name == "best" and target == self.path(step):
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, name, target)

    writer._point = _point


def no_better() -> None:
    """No evaluation is the best so far."""
    records: Any = importlib.import_module("distil_tl.training.records").Records
    original = records.add_evaluation

    def add_evaluation(self: Any, *args: Any, **more: Any) -> bool:
        best = self._state.best
        original(self, *args, **more)
        self._state.best = best
        return False

    records.add_evaluation = add_evaluation


def test_best_is_repaired_after_a_kill_between_the_two_links(small: list[str], tmp_path: Path) -> None:
    args = quick(small, tmp_path, "checkpoint.keep=1", "stages.full.epochs=1")
    ended = attempt(tmp_path / "scratch", args, 2, prepare=functools.partial(dies_between, 6))
    assert ended.statuses == [-9, 1]
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.named("last") == checkpoints.path(6)
    assert checkpoints.named("best") is None
    assert attempt(tmp_path / "again", args, 2, prepare=no_better).statuses == [0, 0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best"]["step"] == 6
    assert checkpoints.named("best") == checkpoints.path(6)


def test_an_epoch_that_is_evaluated_again_is_written_once(small: list[str], tmp_path: Path) -> None:
    """Stopped within an evaluation, then killed after it but before the checkpoint that contains it."""
    args = quick(small, tmp_path, "stages.full.epochs=0")
    assert attempt(tmp_path / "a", args, 2, Fault("usr2", "evaluation", 1, 20)).statuses == [3, 3]
    ended = attempt(tmp_path / "b", args, 2, Fault("kill one", "checkpoint", 0, 5))
    assert ended.statuses[0] == -9
    assert len(lines(tmp_path / "run", window="epoch")) == 2
    assert attempt(tmp_path / "c", args, 2).statuses == [0, 0]
    assert [line["split"] for line in lines(tmp_path / "run", window="epoch")] == ["train", "val"]


# Started by torchrun.


def launch(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=ENVIRONMENT, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finished(process: subprocess.Popen[str], timeout: float = 240) -> str:
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return output


DIES_ONCE = """
import os, signal, sys
from pathlib import Path
import distil_tl.train as train
original, taken = train.optimizer_step, iter(range(1000))
def optimizer_step(*args):
    original(*args)
    marker = Path({marker!r})
    if next(taken) == {step} and os.environ["RANK"] == "1" and not marker.exists():
        marker.write_text(os.environ["TORCHELASTIC_RESTART_COUNT"])
        os.kill(os.getpid(), signal.SIGKILL)
train.optimizer_step = optimizer_step
sys.exit(train.main())
"""


def test_torchrun_restarts_a_job_from_its_last_checkpoint_beside_another_job(small: list[str], tmp_path: Path) -> None:
    args = [*small, WITHOUT_TIMM, f"run_dir={tmp_path}/other", "stages.full.epochs=1", "tracking.log_every=3"]
    other = launch([*TORCHRUN, "--nproc_per_node=1", "-m", "distil_tl.train", *args])
    script, marker = tmp_path / "dies_once.py", tmp_path / "marker"
    script.write_text(DIES_ONCE.format(marker=str(marker), step=9))
    args = [*small, WITHOUT_TIMM, f"run_dir={tmp_path}/run", "checkpoint.every_steps=2", "stages.full.epochs=1"]
    process = launch([*TORCHRUN, "--max-restarts=2", str(script), *args])
    output, of_other = finished(process), finished(other)
    assert (process.returncode, other.returncode) == (0, 0), output + of_other
    for words in ("stage head", "stage full", "val top-1", "images/s", "best: top-1", f"{tmp_path}/other"):
        assert words in of_other
    assert "Warning" not in of_other
    assert marker.read_text() == "0"
    assert "resuming from step 8" in output
    for name in ("run", "other"):
        assert json.loads((tmp_path / name / "summary.json").read_text())["status"] == "completed"
    steps = [line["step"] for line in lines(tmp_path / "run", window="interval")]
    assert steps == list(range(1, 13))


def test_term_to_everyone_under_torchrun_saves(small: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = [
        *small,
        WITHOUT_TIMM,
        f"run_dir={run_dir}",
        "stages.head.epochs=40",
        "data.workers=1",
        "checkpoint.every_minutes=null",
    ]
    process = launch([*TORCHRUN, "-m", "distil_tl.train", *args])
    deadline = time.monotonic() + 240
    while (not (run_dir / "metrics.jsonl").exists() or len(lines(run_dir)) < 12) and time.monotonic() < deadline:
        assert process.poll() is None, finished(process)
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    output = finished(process)
    assert process.returncode != 0
    assert "same command to resume" in output
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "preempted"
    newest = Checkpoints(run_dir / "checkpoints").newest_valid()
    assert newest is not None
    assert json.loads((newest / "state.json").read_text())["run"]["position"]["step"] == lines(run_dir)[-1]["step"]
    assert processes_of(run_dir) == []
