"""Training from a node's own disk gives the same result: on one or several nodes, interrupted or not."""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from distil_tl.data import local_copy
from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import read_launch
from distil_tl.distributed.process_group import init_distributed
from distil_tl.distributed.rank_zero import on_each_node
from distil_tl.utils.errors import UserError
from tests.helpers.arguments import small_args
from tests.helpers.ranks import rank, run_ranks, train
from tests.helpers.runs import refused, same_result, stopped_train
from tests.helpers.staging import (
    SHORT,
    as_node_of_its_own,
    content,
    fingerprints,
    folders_of,
    interrupted,
    reading_train,
    watched_train,
)


@pytest.fixture(scope="module")
def unstaged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("unstaged") / "run"
    assert run_ranks(2, train, [*small_args(folder), *SHORT, f"run_dir={run_dir}"]) == [0, 0]
    return run_dir


# In the ranks.


def waiting_train(args: list[str], meeting: str) -> int:
    """Train on two nodes, each of which finishes its copy only after the other has started."""
    as_node_of_its_own()
    module: Any = importlib.import_module("distil_tl.data.local_copy")
    original = module._copy

    def waits(*args: Any, **kwargs: Any) -> Any:
        Path(meeting, str(rank())).touch()
        deadline = time.monotonic() + 120
        while not Path(meeting, str(1 - rank())).exists():
            assert time.monotonic() < deadline, "the other node does not copy at the same time"
            time.sleep(0.02)
        return original(*args, **kwargs)

    module._copy = waits
    return train([*args, f"data.stage_to={meeting}/near-{rank()}"])


def train_with_disk(args: list[str], disk: str) -> int:
    os.environ["NODE_DISK"] = disk
    return train(args)


def raising(node_that_fails: int) -> str:
    as_node_of_its_own()
    launch = read_launch(os.environ)

    def work() -> str:
        if launch.node == node_that_fails:
            raise UserError("this node fails")
        return f"node {launch.node}"

    config = DistributedConfig(device="cpu", timeout_seconds=30, prepare_timeout_seconds=30)
    with init_distributed(launch, config) as info:
        assert on_each_node(info, "first", lambda: rank() * 10) == rank() * 10
        try:
            return str(on_each_node(info, "second", work))
        except UserError as error:
            return f"raised: {error}"


# The same result.


def test_two_ranks_of_a_node_train_alike_from_one_copy(
    folder: Path, tmp_path: Path, near: Path, unstaged: Path
) -> None:
    args = [*small_args(folder), *SHORT]
    found = run_ranks(2, reading_train, [*args, f"run_dir={tmp_path}/b", f"data.stage_to={near}"])
    (place,) = folders_of(near)
    assert [(status, roots) for status, roots, _ in found] == [(0, [str(place / "ready" / "images")])] * 2
    assert "images: 83 files, " in found[0][2]
    same_result(tmp_path / "b", unstaged)
    assert fingerprints(unstaged) == fingerprints(tmp_path / "b")
    assert content(place / "ready" / "images") == content(folder)
    mistakes = json.loads((tmp_path / "b" / "evaluation.json").read_text())["mistakes"]
    assert mistakes
    assert all(Path(m["path"]).is_relative_to(folder) for m in mistakes), "records name the source"


@pytest.mark.parametrize("second", ["has a disk", "has none"])
def test_each_node_reads_from_its_own_disk_or_from_the_source(
    folder: Path, tmp_path: Path, second: str, unstaged: Path
) -> None:
    args = [*small_args(folder), *SHORT]
    disks = [str(tmp_path / "disk-0"), str(tmp_path / "disk-1") if second == "has a disk" else None]
    found = run_ranks(2, watched_train, [*args, f"run_dir={tmp_path}/b", "data.stage_to=$DISK/x"], disks)
    assert [status for status, _, _ in found] == [0, 0]
    assert found[0][1][0].startswith(disks[0] or "")
    warning = f"DISK is not set in '$DISK/x'; reading the images from {folder}"
    if disks[1] is None:
        assert found[1][1] == [str(folder)]
        assert f"data.stage_to on node 1 ({os.uname().nodename}): {warning}" in found[0][2]
    else:
        assert found[1][1][0].startswith(disks[1])
        assert "data.stage_to" not in found[0][2]
    same_result(tmp_path / "b", unstaged)


def test_all_nodes_copy_at_once(folder: Path, tmp_path: Path) -> None:
    assert run_ranks(2, waiting_train, [*small_args(folder), *SHORT, f"run_dir={tmp_path}/run"], str(tmp_path)) == [
        0,
        0,
    ]
    assert len(folders_of(tmp_path / "near-0")) == len(folders_of(tmp_path / "near-1")) == 1


def test_an_error_on_one_node_is_raised_on_all() -> None:
    assert run_ranks(3, raising, 2) == ["raised: this node fails"] * 3
    assert run_ranks(2, raising, 9) == ["node 0", "node 1"]


def test_a_folder_named_by_a_variable_gives_a_bit_equal_result(
    folder: Path, tmp_path: Path, near: Path, unstaged: Path
) -> None:
    """With `${oc.env:...}`, as for a variable of Slurm."""
    args = [*small_args(folder), *SHORT, "data.stage_to=${oc.env:NODE_DISK}", f"run_dir={tmp_path}/b"]
    assert run_ranks(2, train_with_disk, args, str(near)) == [0, 0]
    (place,) = folders_of(near)
    assert (place / "ready").is_dir()
    same_result(tmp_path / "b", unstaged)
    assert "${oc.env:NODE_DISK}" in (tmp_path / "b" / "config.yaml").read_text()


@pytest.mark.parametrize("first", ["staged", "unstaged"])
def test_a_run_is_resumed_with_and_without_a_copy(
    folder: Path, tmp_path: Path, near: Path, first: str, unstaged: Path
) -> None:
    args = [*small_args(folder), *SHORT, f"run_dir={tmp_path}/run"]
    ways = {"staged": [*args, f"data.stage_to={near}"], "unstaged": args}
    assert run_ranks(2, stopped_train, ways.pop(first), 3, 0, signal.SIGTERM) == [3, 3]
    assert near.exists() == (first == "staged")
    (second,) = ways.values()
    assert run_ranks(2, train, second) == [0, 0]
    same_result(tmp_path / "run", unstaged)


def test_a_signal_stops_the_copy_and_the_waiting_rank_at_once(folder: Path, tmp_path: Path, near: Path) -> None:
    args = [*small_args(folder), *SHORT, f"run_dir={tmp_path}/run", f"data.stage_to={near}"]
    (status, said), _ = found = run_ranks(2, interrupted, train, args, signal.SIGTERM, 20)
    assert [each for each, _ in found] == [3, 3]
    message = "stopped by SIGTERM before training started; run the same command to start again"
    assert said == f"distil_tl.train: {message}\n", status
    (place,) = folders_of(near)
    assert sorted(path.name for path in place.iterdir()) == ["lock", "partial"]
    assert not (tmp_path / "run").exists()


def test_messages_name_the_source_and_the_unreadable_file_of_the_copy(
    data: Path, near: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*small_args(data), *SHORT, f"run_dir={tmp_path}/run", f"data.stage_to={near}"]
    bad = data / "train" / "noise" / "bad.png"
    bad.write_bytes(b"")
    assert f"can't use the image {bad} of class noise: the file is empty" in refused(args, capsys)
    bad.unlink()
    original: Any = local_copy._copy

    def loses_one(*args: Any, **kwargs: Any) -> Path:
        here: Path = original(*args, **kwargs)
        for image in (here / "train" / "noise").iterdir():
            image.unlink()
        return here

    monkeypatch.setattr(local_copy, "_copy", loses_one)
    message = refused(args, capsys)
    assert f"can't use the image {data}/train/noise/" in message
    assert f"the file can't be read, at {near}/" in message
