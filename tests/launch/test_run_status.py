"""The status of a run from its files and Slurm's queue, also from incomplete or foreign files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distil_tl.rundir.lock import Attempt
from launch import evidence
from launch.records import read_record, write_record
from launch.run_status import QUIET_S, STATES, RunStatus, read_evaluations, read_status
from launch.squeue import ACTIVE, WAITING, QueuedJob
from launch.squeue import Queue as SlurmQueue

Queue = dict[str, QueuedJob]


class Run:
    """A run directory in the making."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)

    def summary(self, status: str, **fields: Any) -> Run:
        (self.path / "summary.json").write_text(json.dumps({"status": status, "best": None, **fields}))
        return self

    def submitted(self, job: str = "7", cluster: str = "slurm", **fields: Any) -> Run:
        write_record(self.path, job, cluster)
        return self._change("submitted.json", fields)

    def attempt(self, **fields: Any) -> Run:
        """An attempt of job 7 whose process has ended, unless the fields change that."""
        Attempt(self.path).begin(0, {})
        gone = {"slurm_job_id": "7", "process": "of another machine", "host": "n1"}
        return self._change("attempt.json", {**gone, **fields})

    def evaluated(self, *top1: float, stage: str = "head", ago: float = 0, **fields: Any) -> Run:
        with (self.path / "metrics.jsonl").open("a") as file:
            for epoch, value in enumerate(top1, start=1):
                line = {"step": 10 * epoch, "epoch": epoch, "stage": stage, "split": "val", "top1": value}
                file.write(json.dumps({**line, "loss": 1.0, "time": time.time() - ago, **fields}) + "\n")
        return self

    def stages(self, **epochs: int) -> Run:
        stages = {name: {"unfreeze": "head", "epochs": count} for name, count in epochs.items()}
        (self.path / "config.yaml").write_text(json.dumps({"stages": stages}))
        return self

    def _change(self, name: str, fields: dict[str, Any]) -> Run:
        content = {**json.loads((self.path / name).read_text()), **fields}
        (self.path / name).write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))
        return self

    def stands(self, queue: Queue | None = None, **jobs: str) -> RunStatus:
        return read_status(self.path, queued(**jobs) if queue is None else queue)

    @property
    def unasked(self) -> RunStatus:
        return read_status(self.path, None)


def queued(**jobs: str) -> Queue:
    """Such as `queued(_7="RUNNING")`."""
    return {
        name.removeprefix("_"): QueuedJob(name.removeprefix("_"), state, "n3" if state == "RUNNING" else "", "None")
        for name, state in jobs.items()
    }


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a command line like that of a local submitit job."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "submitit.local._local"])
    yield process
    process.kill()
    process.wait()


# Each state


def test_completed(run: Run) -> None:
    run.submitted().attempt(ended_at="now").summary("completed", total_seconds=5.0, best={"top1": 0.9})
    found = run.stands()
    assert (found.state, found.progress, found.seconds, found.best) == ("completed", 1.0, 5.0, {"top1": 0.9})
    assert run.unasked.state == "completed"
    assert run.stands(_7="COMPLETING").state == "completed"
    assert run.stands(_7="COMPLETED").state == "completed"


def test_a_completed_run_that_waits_to_go_on_is_not_complete(run: Run) -> None:
    """Submitted again with one more stage."""
    run.attempt(ended_at="now").summary("completed").submitted("8")
    assert run.stands(_8="PENDING").state in ("pending", "requeued")


@pytest.mark.parametrize("state", ACTIVE)
def test_running_by_slurm(run: Run, state: str) -> None:
    run.submitted()
    assert run.stands(_7=state).state == "running"
    assert run.attempt().summary("failed").stands(_7=state).state == "running"


def test_running_by_slurm_says_where(run: Run) -> None:
    found = run.submitted().attempt(restarts=2).stands(_7="RUNNING")
    assert (found.host, found.job_id, found.restarts) == ("n3", "7", 2)


def test_running_by_a_process_of_this_machine(run: Run) -> None:
    Attempt(run.path).begin(0, {})
    assert (run.stands().state, run.unasked.state) == ("running", "running")
    attempt = Attempt(run.path)
    attempt.begin(0, {})
    attempt.end()
    assert run.stands().state == "failed"


def test_running_from_the_moment_a_job_of_this_machine_is_started(run: Run, sleeper: Any) -> None:
    """Before training has written attempt.json, and regardless of the files of an earlier attempt."""
    run.submitted(str(sleeper.pid), "local")
    assert (run.stands().state, run.unasked.state) == ("running", "running")
    assert run.attempt(slurm_job_id=None, ended_at="now").summary("failed").stands().state == "running"
    sleeper.kill()
    sleeper.wait()
    assert run.stands().state == "failed"


def test_another_process_with_a_jobs_number_is_not_the_job(run: Run) -> None:
    assert run.submitted(str(os.getpid()), "local").stands().state == "failed"


@pytest.mark.parametrize("state", WAITING)
def test_pending(run: Run, state: str) -> None:
    run.submitted()
    assert run.stands(_7=state).state == "pending"


def test_pending_says_what_it_waits_for(run: Run) -> None:
    run.submitted()
    assert run.stands({"7": QueuedJob("7", "PENDING", "", "Resources")}).detail == "Resources"
    assert run.stands({"7": QueuedJob("7", "PENDING", "", "None")}).detail is None


def test_requeued_once_it_has_run(run: Run) -> None:
    run.submitted(time="2020-01-01T00:00:00+00:00").attempt(started_at="2020-01-02T00:00:00+00:00")
    assert run.stands(_7="PENDING").state == "requeued"
    assert run.summary("preempted").stands(_7="PENDING").state == "requeued"


def test_submitted_again_it_waits_for_the_first_time(run: Run) -> None:
    run.attempt(started_at="2020-01-01T00:00:00+00:00").submitted("8", time="2020-01-02T00:00:00+00:00")
    assert run.summary("preempted").stands(_8="PENDING").state == "pending"


def test_requeued_without_a_record_as_by_a_batch_script(run: Run) -> None:
    assert run.attempt().stands(_7="PENDING").state == "requeued"


def test_stopped(run: Run) -> None:
    run.submitted().attempt(ended_at="now").summary("preempted")
    found = run.stands()
    assert found.state == "stopped"
    assert found.detail == "preempted and saved; submit it again to resume"
    assert run.unasked.state == "unknown", "Slurm may have it in the queue again"
    assert run.submitted("7", "local").attempt(slurm_job_id=None, ended_at="now").unasked.state == "stopped"


def test_stopped_by_scancel_before_it_could_save(run: Run) -> None:
    found = run.submitted().stands(_7="CANCELLED")
    assert (found.state, found.detail) == ("stopped", "cancelled")


def test_failed(run: Run) -> None:
    assert run.submitted().attempt(ended_at="now").summary("failed").stands().state == "failed"
    assert run.unasked.state == "failed"


@pytest.mark.parametrize("state", ["FAILED", "COMPLETED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"])
def test_failed_without_a_status(run: Run, state: str) -> None:
    """COMPLETED too: Slurm knows of exit statuses, and not of trainings."""
    for run_ in (run.submitted(), run.attempt()):
        found = run_.stands(_7=state)
        assert (found.state, found.detail) == ("failed", f"exited without writing a status (job 7 is {state})")


def test_failed_and_no_longer_in_the_queue(run: Run) -> None:
    for run_ in (run.submitted(), run.attempt()):
        found = run_.stands()
        assert (found.state, found.detail) == (
            "failed",
            "exited without writing a status (its job is no longer in the queue)",
        )


def test_pruned(run: Run) -> None:
    (run.path / "pruned.json").write_text("{}")
    assert run.submitted().attempt().summary("preempted").stands(_7="CANCELLED").state == "pruned"


def test_missing(run: Run, tmp_path: Path) -> None:
    assert run.stands().state == "missing"
    assert read_status(tmp_path / "nowhere", None) == RunStatus(tmp_path / "nowhere", "missing")


def test_unknown_when_slurm_does_not_answer(run: Run) -> None:
    """Submitted, or started by a batch script; with metrics of late it is taken for a running one."""
    for run_ in (run.submitted(), run.attempt()):
        assert (run_.unasked.state, run_.unasked.detail) == ("unknown", "Slurm does not answer")
    run.evaluated(0.5, ago=QUIET_S + 60)
    assert run.unasked.state == "unknown"
    run.evaluated(0.6)
    assert (run.unasked.state, run.unasked.detail) == ("running", "Slurm does not answer")


def test_unknown_on_another_machine_outside_slurm(run: Run) -> None:
    """A colleague's, say: its processes are not to be seen from here."""
    run.attempt(slurm_job_id=None, host="colleague")
    for found in (run.stands(), run.unasked):
        assert (found.state, found.detail) == ("unknown", "can't check its process on colleague")
    assert run.evaluated(0.5).stands().state == "running"
    assert run.attempt(slurm_job_id=None, host="colleague", ended_at="now").stands().state == "failed"


def test_unknown_before_the_start_on_another_machine(run: Run) -> None:
    assert run.submitted("123", "local", host="colleague").stands().detail == "can't check its process on colleague"


def listed(cluster: str = "here", uids: tuple[int, ...] = (0, 5), **jobs: str) -> Queue:
    """Slurm's queue of a cluster, with the jobs of those users."""
    queue = SlurmQueue(cluster, uids)
    queue.update(queued(**jobs))
    return queue


def test_a_job_of_another_cluster_is_unknown(run: Run) -> None:
    """Not ended, because this cluster does not list it; nor running, because this cluster has a job of that number."""
    run.submitted(slurm_cluster="there", uid=0)
    for queue in (listed(), listed(_7="RUNNING"), listed(_7="FAILED")):
        found = run.stands(queue)
        assert (found.state, found.detail) == (
            "unknown", "job 7 is of the cluster there, which can't be asked from here"
        )  # fmt: skip
    assert run.stands(listed("there", _7="RUNNING")).state == "running"
    run.attempt(slurm_cluster="there", uid=0, ended_at="now").summary("preempted")
    assert run.stands(listed()).state == "unknown", "it may be in the queue of its cluster again"
    assert run.stands(listed("there")).state == "stopped"
    assert run.summary("completed").stands(listed()).state == "completed"
    assert run.summary("failed").stands(listed()).state == "failed"


def test_a_job_of_a_user_who_is_not_listed_is_unknown(run: Run) -> None:
    run.submitted(slurm_cluster="here", uid=9, user="colleague")
    found = run.stands(listed())
    assert (found.state, found.detail) == ("unknown", "job 7 is of colleague, whose jobs Slurm does not show to you")
    assert run.stands(listed(uids=(9,))).state == "stopped"


def test_a_batch_script_on_another_cluster_is_unknown(run: Run) -> None:
    run.attempt(slurm_cluster="there", uid=0)
    assert run.stands(listed()).detail == "job 7 is of the cluster there, which can't be asked from here"
    assert run.evaluated(0.5).stands(listed()).state == "running"
    assert run.stands(listed("there")).state == "failed"


def test_a_later_process_counts_beside_a_job_that_has_ended(run: Run) -> None:
    """Someone trains by hand in the run directory of a job: on another machine, or in another job."""
    run.submitted(time="2020-01-01T00:00:00+00:00").attempt(slurm_job_id=None, host="colleague")
    assert run.stands(_7="FAILED").detail == "can't check its process on colleague"
    run.attempt(slurm_job_id="12")
    assert run.stands(_7="FAILED", _12="RUNNING").state == "running"
    run.attempt(slurm_job_id=None, started_at="2019-01-01T00:00:00+00:00", host="colleague")
    assert run.stands(_7="FAILED").state == "failed", "it was known to have ended when the job was submitted"


def test_a_process_of_another_container_on_this_machine_is_unknown(run: Run) -> None:
    Attempt(run.path).begin(0, {})
    own = json.loads((run.path / "attempt.json").read_text())
    boot, _, start = own["process"].split(" ")
    (run.path / "attempt.json").write_text(json.dumps({**own, "process": f"{boot} pid:[1] {start}"}))
    assert run.stands().detail == f"can't check its process on {own['host']}"
    (run.path / "attempt.json").write_text(json.dumps({**own, "process": f"another-boot pid:[1] {start}"}))
    assert run.stands().state == "failed", "this machine has restarted since"


def test_an_attempt_says_on_which_cluster_it_trains(run: Run) -> None:
    Attempt(run.path).begin(0, {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "there"})
    content = json.loads((run.path / "attempt.json").read_text())
    assert (content["slurm_cluster"], content["uid"]) == ("there", os.getuid())


# Jobs that never started


def test_cancelled_before_it_started_and_forgotten_by_slurm(run: Run) -> None:
    run.submitted("7_3")
    found = run.stands()
    assert (found.state, found.detail) == ("stopped", "its job was cancelled before it started; submit it again")
    assert run.unasked.state == "unknown"
    assert run.stands(_7_3="FAILED").state == "failed"


@pytest.mark.parametrize("folder", ["run", "."], ids=["of a run", "of a sweep"])
def test_a_job_that_started_without_training_has_failed(run: Run, folder: str) -> None:
    """For example in slurm.setup: it is not submitted again by itself."""
    run.submitted("7_3")
    (run.path.parent / folder / "slurm").mkdir()
    (run.path.parent / folder / "slurm/7_3_0_log.out").touch()
    assert run.stands().state == "failed"


def test_what_a_colleague_can_not_see_may_have_started(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError

    run.submitted("7_3")
    monkeypatch.setattr(Path, "exists", lambda path: denied(path) if path.parent.name == "slurm" else False)
    assert run.stands().state == "failed"


def test_an_attempt_before_the_last_submission_is_no_start(run: Run) -> None:
    run.attempt(started_at="2020-01-01T00:00:00+00:00", ended_at="now").submitted("8", time="2020-01-02T00:00:00+00:00")
    assert run.stands().state == "stopped"


def test_every_state_is_in_the_table() -> None:
    assert set(STATES) == {
        "completed", "running", "pending", "requeued", "stopped", "failed", "pruned", "unknown", "missing"
    }  # fmt: skip


# Which job is a run's


def test_the_job_is_that_of_the_last_submission(run: Run) -> None:
    run.attempt().submitted("9")
    assert run.stands(_9="RUNNING").job_id == "9"
    assert run.stands(_7="FAILED", _9="RUNNING").state == "running"


def test_a_task_of_an_array_is_found_by_either_number(run: Run) -> None:
    """It sees a number of its own, and sbatch gave the array's."""
    run.attempt(slurm_job_id="12")
    assert run.stands(_12="RUNNING").state == "running"
    run.submitted("7_3")
    assert run.stands(_7_3="RUNNING").state == "running"
    assert run.stands(_7_2="RUNNING").state == "failed"


def test_a_record_that_is_not_whole_is_none(run: Run) -> None:
    for text in ("", "{", "[]", "null", "{}", '{"job_id": "7"}', '{"job_id": "7", "cluster": "slurm"}'):
        (run.path / "submitted.json").write_text(text)
        assert read_record(run.path) is None
        assert run.stands(_7="RUNNING").state == "missing"


# How far


def test_progress_is_in_epochs_of_all_stages(run: Run) -> None:
    run.stages(head=2, full=6).submitted()
    assert run.stands(_7="RUNNING").progress is None
    run.evaluated(0.1, stage="head")
    assert run.stands(_7="RUNNING").progress == 1 / 8
    run.evaluated(0.1, 0.2, stage="full")
    found = run.stands(_7="RUNNING")
    assert (found.progress, found.stage, found.epoch, found.step) == (4 / 8, "full", 2, 20)
    run.evaluated(0.3, stage="full", split="train", epoch=3)
    assert run.stands(_7="RUNNING").progress == 4 / 8, "an epoch counts when it was evaluated"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", "stages: 5", "stages: {}", "stages: {head: {}}", "stages: {head: {epochs: '${x}'}}"]
)
def test_progress_is_unknown_without_a_valid_configuration(run: Run, text: str) -> None:
    (run.path / "config.yaml").write_text(text)
    found = run.submitted().evaluated(0.1).stands(_7="RUNNING")
    assert (found.state, found.progress, found.epoch) == ("running", None, 1)


def test_the_best_so_far(run: Run) -> None:
    run.submitted().evaluated(0.5, 0.7, 0.6)
    run.evaluated(0.7, loss=0.5, step=99)
    run.evaluated(0.7, loss=None, step=100)  # it was not finite
    run.evaluated(0.9, split="train")
    best = run.stands(_7="RUNNING").best
    assert best is not None
    assert (best["top1"], best["loss"], best["step"]) == (0.7, 0.5, 99)
    assert run.summary("completed", best={"top1": 0.8}).stands().best == {"top1": 0.8}


def test_how_long_training_will_still_take(run: Run) -> None:
    run.submitted().attempt()
    (run.path / "config.yaml").write_text(
        "stages: {head: {unfreeze: head, epochs: 3}, full: {unfreeze: all, epochs: 2}}\n"
    )
    line = {"epoch": 1, "stage": "head", "window": "epoch", "step": 1, "time": 1, "top1": 0.5, "loss": 1.0}
    lines = [{**line, "split": "train", "seconds": 100.0}, {**line, "split": "val", "seconds": 20.0}]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert run.stands(_7="RUNNING").remaining == "about 4 min left, then full"
    assert run.stands(_7="PENDING").remaining is None
    (run.path / "config.yaml").write_text("stages: 3\n")
    assert run.stands(_7="RUNNING").remaining is None


def test_the_metric_of_the_run_chooses_the_best(run: Run) -> None:
    run.attempt()
    for epoch, (top1, balanced) in enumerate([(0.9, 0.2), (0.5, 0.4), (0.6, 0.4)], start=1):
        run.evaluated(top1, balanced_accuracy=balanced, epoch=epoch, loss=1 / epoch)
    assert (read_status(run.path, {}).best or {})["top1"] == 0.9
    (run.path / "config.yaml").write_text("seed: 1\nmetric: balanced_accuracy\n")
    assert (read_status(run.path, {}).best or {})["top1"] == 0.6


def test_only_the_end_of_a_long_metrics_file_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best evaluation before that is in the checkpoint; without a checkpoint the whole file is read."""
    monkeypatch.setattr(evidence, "TAIL", 4096)
    run.submitted().stages(head=1000)
    path = run.path / "metrics.jsonl"
    run.evaluated(0.9).evaluated(*[0.5] * 500, loss=2.0)
    (run.path / "checkpoints/last").mkdir(parents=True)
    saved = run.path / "checkpoints/last/state.json"
    saved.write_text(json.dumps({"run": {"best": {"split": "val", "top1": 0.9, "loss": 1.0, "epoch": 1}}}))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"0.9,", b"1.0,", 1))  # must not be read
    found = run.stands(_7="RUNNING")
    assert found.best is not None
    assert (found.best["top1"], found.epoch, found.step) == (0.9, 500, 5000)
    run.evaluated(0.95)
    assert (run.stands(_7="RUNNING").best or {})["top1"] == 0.95, "evaluated, and not saved yet"

    path.write_bytes(whole)
    for content in ("{", "[]", "5", '{"run": 5}', '{"run": {}}', '{"run": {"best": null}}', '{"run": {"best": {}}}'):
        saved.write_text(content)
        assert run.stands(_7="RUNNING").state == "running"
    saved.unlink()
    assert (run.stands(_7="RUNNING").best or {})["top1"] == 0.9


# Files that are not whole, or not ours


def test_incomplete_lines_are_skipped(run: Run) -> None:
    run.submitted().evaluated(0.5)
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'5\n[1]\nnull\n\n"text"\n\xff\xfe\n{"step": 11, "epo')
    found = run.stands(_7="RUNNING")
    assert (found.state, found.epoch, found.best and found.best["top1"]) == ("running", 1, 0.5)
    assert len(read_evaluations(run.path)) == 1


NAMES = ("summary.json", "attempt.json", "submitted.json", "metrics.jsonl", "config.yaml")
WHOLE = {
    "summary.json": '{"status": "failed", "best": {"top1": 0.5}, "total_seconds": 1.0}',
    "attempt.json": '{"token": "a", "host": "n1", "pid": 1, "process": "x", "slurm_job_id": "7", "restarts": 0,'
    ' "step": 0, "stuck": 0, "started_at": "2020-01-01T00:00:00+00:00"}',
    "submitted.json": '{"job_id": "7", "cluster": "slurm", "time": "2020-01-01T00:00:00+00:00"}',
    "metrics.jsonl": '{"step": 1, "epoch": 1, "stage": "head", "split": "val", "top1": 0.5, "loss": 1, "time": 1}\n'
    '{"step": "x", "epoch": "x", "stage": 5, "split": "val", "top1": "x", "loss": "x", "time": "x"}\n',
    "config.yaml": "stages: {head: {unfreeze: head, epochs: 2}}",
}
FOREIGN = [
    "",
    "{",
    "[]",
    "5",
    "null",
    '"completed"',
    "{}",
    '{"best": 5}',
    '{"token": 1}',
    '{"status": null}',
    '{"a": "completed"}',
]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_files_cut_anywhere_or_foreign_are_never_a_completed_run(tmp_path: Path, data: st.DataObject) -> None:
    """Every such run has a state."""
    for name in NAMES:
        whole = WHOLE[name].encode()
        content = data.draw(
            st.one_of(
                st.none(),
                st.integers(0, len(whole)).map(lambda cut, whole=whole: whole[:cut]),  # type: ignore[misc]
                st.sampled_from(FOREIGN).map(str.encode),
                st.binary(max_size=20),
            ),
            name,
        )
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / name).write_bytes(content)
    for queue in (None, {}, queued(_7="RUNNING"), queued(_7="PENDING"), queued(_7="COMPLETED")):
        assert read_status(tmp_path, queue).state in STATES[1:]


def test_a_summary_that_is_a_folder(run: Run) -> None:
    for name in NAMES:
        (run.path / name).mkdir()
    assert run.stands().state == "missing"
