"""Submission to Slurm that may be killed anywhere: no job is forgotten, and none is submitted twice.

What will be submitted is written down before sbatch is called, and the job id in one write after it. Each submission
has a token, in the comment of its jobs and in the name of their script, by which squeue finds jobs whose id was not
written down. A job that starts notes its id beside the token, so it is found even after Slurm has forgotten it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distil_tl.utils.errors import UserError, WriteError
from distil_tl.utils.files import write_atomic, write_json
from distil_tl.utils.processes import run_text
from launch.executor import slurm_script, without_slurm_variables
from launch.folder_lock import submission_lock
from launch.records import OPEN_FOLDER, RECORD_FILE, Submission, read_json, read_open_submissions
from launch.squeue import Queue, SlurmUnavailableError, read_cluster, read_queue

DELAYED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def submit_to_slurm(
    executor: Any, folder: Path, run_dirs: Sequence[Path], tasks: Sequence[Callable[[], int]], lock: int
) -> list[Any]:
    """Submit one job, or several as one array, and record them. Returns submitit's jobs, in the order of `run_dirs`.

    Args:
        folder: the run directory, or the folder of the sweep.
        lock: descriptor of the folder's submission lock; sbatch holds it, too.

    Raises:
        UserError: sbatch refused the job, or nothing could be written; nothing is submitted.
        WriteError: the job is submitted, but its records are incomplete; `settle` completes them.
    """
    names = [str(run_dir.relative_to(folder)) for run_dir in run_dirs]
    summaries = [_written(run_dir / "summary.json") for run_dir in run_dirs]
    token = f"distil_tl-{secrets.token_hex(8)}"
    submission = Submission(folder, token, names, summaries, read_cluster()[0])
    script = folder / "slurm" / f".{token}.sh"
    try:
        submission.path.parent.mkdir(exist_ok=True)
        submission.write()
        _write_tasks(executor, submission, tasks)
        write_atomic(script, slurm_script(executor, token, len(tasks)))
    except BaseException:
        _discard(submission)
        raise
    with delayed_signals():
        job_id = _sbatch(script, submission, lock)
        submission = dataclasses.replace(submission, job_id=job_id)
        try:
            submission.write()
            _complete(submission)
        except OSError as error:
            raise WriteError(
                f"job {job_id} is submitted, but this can't be recorded in {folder}: {error.strerror or error}. Free "
                f"some space, and run the same command: it finds the job and submits it no second time"
            ) from error
    return _jobs(executor, submission)


def settle(folder: Path, queue: Queue | None = None) -> None:
    """Complete the submissions from `folder` that were interrupted: their jobs are recorded, or there are none.

    The caller holds the folder's submission lock.

    Args:
        queue: Slurm's, read after the lock was taken; read here, if it is needed, if None.

    Raises:
        UserError: Slurm can't be asked for the jobs of one.
        OSError: a record can't be written.
    """
    for partial in (folder / OPEN_FOLDER).glob("*.tmp"):  # of a write that was interrupted
        partial.unlink(missing_ok=True)
    for submission in read_open_submissions(folder):
        if submission.job_id is None:
            found = find_job(submission, queue)
            if found is None:
                _discard(submission)
                continue
            submission = dataclasses.replace(submission, job_id=found)
            submission.write()
            sys.stderr.write(f"launch: found job {found}, whose submission was interrupted\n")
        _complete(submission)


def find_job(submission: Submission, queue: Queue | None = None) -> str | None:
    """The id of the job or array of a submission; None if sbatch did not submit it.

    Raises:
        UserError: Slurm can't be asked.
    """
    started = _started_job(submission)
    if started is not None:
        return started
    why = None
    try:
        queue = queue if queue is not None else read_queue([submission.uid])
        if not queue.covers(submission.slurm_cluster, submission.uid):
            why = f"{submission.user} made it on the cluster {submission.slurm_cluster}; ask from there"
    except SlurmUnavailableError as error:
        why = str(error)
    if queue is None or why is not None:
        raise UserError(
            f"a submission of {submission.time} from {submission.folder} was interrupted, and Slurm can't be asked "
            f"whether it has the job ({why}); nothing is submitted before that is known, so try again later"
        )
    return queue.submissions.get(submission.token)


@contextmanager
def submitting(folder: Path) -> Iterator[int]:
    """Hold the submission lock of a run directory or sweep, with the records of earlier submissions complete.

    What was checked before must be checked again in the body: another process, or this command before it was killed,
    may have submitted something. An error of writing in the body means that nothing was submitted. Yields the lock's
    descriptor.

    Raises:
        UserError: the lock is held for long, Slurm can't be asked for an interrupted submission, or nothing can be
            written.
    """
    with nothing_submitted(folder), submission_lock(folder) as lock:
        settle(folder)
        yield lock


@contextmanager
def nothing_submitted(folder: Path) -> Iterator[None]:
    """Turn an error of writing below `folder`, before anything is submitted, into a UserError."""
    try:
        yield
    except (WriteError, BrokenPipeError):
        raise
    except OSError as error:
        raise UserError(f"can't write in {folder}: {error.strerror or error}; nothing was submitted") from None


@contextmanager
def delayed_signals() -> Iterator[None]:
    """Delay Ctrl-C, TERM and HUP to the end of the block. Children do not get them: they inherit the signal mask."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in DELAYED}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, DELAYED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        for caught in dict.fromkeys(received):
            os.kill(os.getpid(), caught)


def _sbatch(script: Path, submission: Submission, lock: int) -> str:
    """Call sbatch. Returns the id of the job or array.

    Raises:
        UserError: it refused; or it failed, and Slurm can't be asked whether it has the job all the same.
    """
    with without_slurm_variables():
        done = run_text(["sbatch", str(script)], stdin=subprocess.DEVNULL, pass_fds=(lock,), start_new_session=True)
    match = re.search(r"job (\d+)", done.stdout)
    if done.returncode == 0 and match is not None:
        return match[1]
    why = f"sbatch refused the job: {done.stderr.strip() or f'exit status {done.returncode}'}"
    if done.returncode == 0:
        why = f"sbatch printed no job id, but: {done.stdout.strip()}"
    try:
        found = find_job(submission)  # Slurm may have accepted the job when its answer was late
    except UserError:
        raise UserError(f"{why}\nSlurm can't be asked whether it has the job all the same: try again later") from None
    if found is None:
        _discard(submission)
        raise UserError(why)
    sys.stderr.write(f"launch: {why}; but Slurm has it, as job {found}\n")
    return found


def _write_tasks(executor: Any, submission: Submission, tasks: Sequence[Callable[[], int]]) -> None:
    """Write what each task of the job calls, in submitit's format."""
    import submitit

    inner = executor._executor
    for index, task in enumerate(tasks):
        delayed = submitit.core.utils.DelayedSubmission(task)
        delayed.set_timeout(inner.parameters["time"], inner.max_num_timeout)
        delayed.dump(submission.folder / "slurm" / f".{submission.token}-{index}.pkl")


def _complete(submission: Submission) -> None:
    """Record the job of each run, and give the files of the submission the names by which submitit finds them."""
    folder, job_id = submission.folder, submission.job_id
    assert job_id is not None
    for index, (name, summary) in enumerate(zip(submission.names, submission.summaries, strict=True)):
        run_dir, record = folder / name, submission.record(index, job_id)
        if not run_dir.is_dir():  # it was removed since
            continue
        if summary is not None and _written(run_dir / "summary.json") == summary:
            (run_dir / "summary.json").unlink(missing_ok=True)  # it is about the previous attempt
        before = read_json(run_dir / RECORD_FILE)
        if before is None or (before != record and before.get("time", "") <= submission.time):
            write_json(run_dir / RECORD_FILE, record)
        with suppress(FileNotFoundError):
            pickle = folder / "slurm" / f".{submission.token}-{index}.pkl"
            pickle.rename(folder / "slurm" / f"{submission.task_id(index, job_id)}_submitted.pkl")
    with suppress(FileNotFoundError):
        (folder / "slurm" / f".{submission.token}.sh").rename(folder / "slurm" / f"{job_id}_submission.sh")
    submission.path.unlink(missing_ok=True)


def _discard(submission: Submission) -> None:
    """Remove the files of a submission that Slurm has no job of."""
    with suppress(OSError):
        for path in (submission.folder / "slurm").glob(f".{submission.token}*"):
            path.unlink(missing_ok=True)
        submission.path.unlink(missing_ok=True)


def _started_job(submission: Submission) -> str | None:
    """The id that a started job of the submission has noted: see `executor.slurm_script`."""
    for path in (submission.folder / "slurm").glob("*_submitted.pkl"):
        if path.is_symlink() and str(path.readlink()).startswith(f".{submission.token}"):
            return path.name.partition("_")[0]
    return None


def _jobs(executor: Any, submission: Submission) -> list[Any]:
    import submitit

    assert submission.job_id is not None
    tasks = list(range(executor._executor._num_tasks()))
    ids = [submission.task_id(index, submission.job_id) for index in range(len(submission.names))]
    return [submitit.SlurmJob(folder=executor.folder, job_id=job_id, tasks=tasks) for job_id in ids]


def _written(path: Path) -> int | None:
    """When a file was written, in ns; None if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
