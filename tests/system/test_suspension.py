"""A job that is suspended as a whole for longer than a collective may take starts again by itself."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.arguments import small_args
from tests.helpers.ranks import lines, rank, run_ranks, train
from tests.helpers.runs import same_result, summary_of

LIMIT = 8.0  # seconds that a collective may take; the job is suspended for more


def suspended_train(args: list[str], step: int, gave_up: Path) -> tuple[int, str]:
    """Train, and stop all ranks and their watchdogs after a step, while rank 0 waits for rank 1 in a collective.

    Rank 1 waits until the collective of rank 0 has timed out, which creates `gave_up`. Else it could join at the last
    moment, and the run would simply continue.
    """
    train_module: Any = importlib.import_module("distil_tl.train")
    leaving: Any = importlib.import_module("distil_tl.distributed.leaving")
    times: Any = importlib.import_module("distil_tl.distributed.watchdog.client").TIMES
    times["suspended"] = 3.0
    run_stage, optimizer_step, taken = train_module.run_stage, train_module.optimizer_step, iter(range(1, 1000))
    suspension = leaving.suspension
    found: dict[str, Any] = {}

    def suspension_after_timeout(info: Any) -> Any:
        if rank() == 0:
            gave_up.touch()
        return suspension(info)

    def run_stage_with_limit(run: Any, stage: Any) -> None:
        found["info"] = run.info
        run.info.batch_timeout = 1.5 * LIMIT  # more, as rank 0 may begin to wait after the suspension on a busy machine
        dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=LIMIT))  # type: ignore[union-attr]
        run_stage(run, stage)

    def optimizer_step_and_stop(*args: Any) -> None:
        optimizer_step(*args)
        if next(taken) != step:
            return
        info = found["info"]
        own = [os.getpid(), info.watchdog.process.pid]
        processes: list[Any] = [None] * info.world_size
        dist.all_gather_object(processes, own)
        pids = " ".join(str(pid) for pair in processes for pid in pair)
        if rank() == 0:
            script = f"sleep 1; kill -STOP {pids}; sleep {LIMIT + 1}; kill -CONT {pids}"
            subprocess.Popen(["sh", "-c", script], start_new_session=True)
            return
        while not gave_up.exists():
            time.sleep(0.05)

    leaving.suspension = suspension_after_timeout
    train_module.run_stage, train_module.optimizer_step = run_stage_with_limit, optimizer_step_and_stop
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return train(args), said.getvalue()


def test_a_run_that_is_suspended_for_longer_than_a_collective_may_take(folder: Path, tmp_path: Path) -> None:
    args = [*small_args(folder), "stages.full.epochs=0", "stages.head.features=off", "checkpoint.every_steps=2"]
    assert run_ranks(2, train, [*args, f"run_dir={tmp_path}/reference"]) == [0, 0]
    args.append(f"run_dir={tmp_path}/run")
    ended = run_ranks(2, suspended_train, args, 3, tmp_path / "gave_up")
    assert [status for status, _ in ended] == [4, 4], f"both start again: {ended}"
    assert "the job was suspended for " in ended[0][1]
    assert "Traceback" not in ended[0][1] + ended[1][1]
    assert summary_of(tmp_path / "run")["status"] == "preempted"
    assert run_ranks(2, train, args) == [0, 0]
    same_result(tmp_path / "run", tmp_path / "reference")
    assert lines(tmp_path / "run")
