"""`distil-tl doctor` among real ranks: planted faults are named."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from distil_tl.cli.doctor import main
from distil_tl.doctor import facts, folders, group
from tests.helpers.arguments import small_args
from tests.helpers.doctor import lines_of, problems
from tests.helpers.ranks import rank, run_ranks


def examine_in(where: str, args: list[str], fault: str, seconds: str) -> tuple[int, dict[str, Any]]:
    """The command on this rank, in the folder `where`/RANK. Returns its exit status, and what rank 0 printed."""
    import contextlib
    import io

    home = Path(where) / str(rank())
    home.mkdir()
    os.chdir(home)
    if fault == "absent" and rank() == 1:
        return 0, {}
    module: Any = facts
    if fault == "no answer" and rank() == 1:
        module.probe_folder = lambda path, write: time.sleep(9)  # longer than the timeout
    if fault == "hangs" and rank() == 1:
        group.try_collectives = lambda *_: time.sleep(4) or {}  # type: ignore[func-returns-value]
    if fault == "pixels" and rank() == 1:
        module.pixel_digests = lambda config: {"JPEG": "other"}
    folders.VISIBLE_SECONDS = 0.5
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = main(["--json", "--timeout", seconds, *args])
    return status, json.loads(output.getvalue()) if rank() == 0 else {}


def test_two_ranks_reduce_and_must_share_the_run_directory(folder: Path, tmp_path: Path) -> None:
    args = [*small_args(folder), "data.global_batch_size=9"]
    (status, content), (other_status, _) = run_ranks(
        2, examine_in, str(tmp_path), [*args, "run_dir=runs/a"], "pixels", "60"
    )
    assert status == other_status == 2
    lines = lines_of(content)
    shown = "\n".join(lines)
    assert "ok ranks/present: 2 of 2 on " in shown
    assert "ok collectives/gloo: 2 ranks add up right; an all-reduce of 64 MiB runs at " in shown
    assert "fail folders/run_dir: what rank 0 writes there is not visible to rank 1 on " in shown
    assert "data.global_batch_size=9 can't be divided evenly among 2 processes" in shown
    assert "fail data/decoders: rank 0 and rank 1 would decode JPEG images to different pixels" in shown
    assert len(problems(lines)) == 3
    assert [path.name for path in tmp_path.rglob("*")] in (["0", "1"], ["1", "0"]), "something was left behind"


def test_a_rank_that_does_not_join(folder: Path, tmp_path: Path) -> None:
    (status, content), _ = run_ranks(2, examine_in, str(tmp_path), small_args(folder), "absent", "1")
    assert status == 2
    assert "fail ranks/missing: rank 1 did not report in time; see their output" in "\n".join(lines_of(content))


def test_a_folder_that_does_not_answer_on_one_rank(folder: Path, tmp_path: Path) -> None:
    args = [*small_args(folder), f"run_dir={tmp_path}/run"]
    (status, content), (other_status, _) = run_ranks(2, examine_in, str(tmp_path), args, "no answer", "6")
    assert status == other_status == 2
    assert {line for line in lines_of(content) if "ranks/" in line and not line.startswith("ok ")} == {
        f"fail ranks/{name}: rank 1: did not answer within 6 s" for name in ("run_dir", "cache", "data.root")
    }


def test_an_all_reduce_that_hangs(folder: Path, tmp_path: Path) -> None:
    args = [*small_args(folder), f"run_dir={tmp_path}/run"]
    (status, content), (other_status, _) = run_ranks(2, examine_in, str(tmp_path), args, "hangs", "2")
    assert status == other_status == 2
    shown = "\n".join(problems(lines_of(content)))
    assert "fail collectives/gloo: rank 0: forming the process group did not end within 2 s" in shown
