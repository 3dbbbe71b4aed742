"""benchmarks.scale measures what it is meant to measure. No test checks a figure."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measure import ROOT
from benchmarks.scale import __main__ as scale
from benchmarks.scale import extrapolation, files, link, many_ranks, ranks, stand_in, startup, traffic
from benchmarks.scale.stand_ins import stand_ins
from distil_tl.data.scan import scan
from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import read_launch
from distil_tl.distributed.process_group import init_distributed
from tests.helpers.ranks import processes_of, run_ranks


def test_a_synthetic_index_is_like_that_of_a_scan() -> None:
    index = files.synthetic_index(5000)
    assert len(index) == 5000
    assert index.relative_path(0) == "class-0000/image-00000000.jpg"
    assert index.relative_path(4999) == "class-0999/image-00004999.jpg"
    assert all(index.relative_path(i).startswith(index.classes[index.targets[i]]) for i in range(0, 5000, 313))
    assert index.class_counts.tolist() == [5] * 1000


def test_an_existing_tree_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CLASSES", 4)
    files.write_tree(tmp_path, 20)
    assert len(scan(tmp_path)) == 20
    before = next(tmp_path.rglob("*.jpg")).stat().st_mtime_ns
    files.write_tree(tmp_path, 20)
    assert next(tmp_path.rglob("*.jpg")).stat().st_mtime_ns == before


def _traffic(compression: str) -> dict[str, Any]:
    task = {"model": "shufflenet_v2_x0_5", "image_size": 32, "steps": 2, "batch": 2, "count": True,
            "stages": {"head": "head", "all": "all"}, "compression": compression}  # fmt: skip
    return traffic.measure_all(task)


def test_gradients_are_counted_where_ddp_reduces_them() -> None:
    for rank in run_ranks(2, _traffic, "none"):
        assert rank["head"]["reduced_bytes"] == 4 * (1024 * 10 + 10)
        for stage in rank.values():
            assert stage["reduced_bytes"] == 4 * stage["trainable_parameters"]
            assert stage["step_seconds"] > 0


def _startup() -> dict[str, Any]:
    # Loader processes are forked, as under torchrun. A child of a fork server would start another server for them, and
    # import torch again.
    multiprocessing.set_start_method("fork", force=True)
    with init_distributed(read_launch(os.environ), DistributedConfig(device="cpu")) as info:
        return startup.measure(info, 4096, 2)


def test_start_up_is_measured_on_each_rank() -> None:
    found = run_ranks(2, _startup)
    assert [mark["batches"] for mark in found[1]["workers"]] == [1, 2]
    assert all(mark["private_mb"] > 0 for rank in found for mark in rank["workers"])
    files_, copy, *seconds, more, beyond, peak = ["4096", *scale.startup_row([found])]
    assert (files_, copy) == ("4096", "0")
    assert len(seconds) == 3
    assert float(peak.replace(",", "")) > 10
    assert float(more.replace(",", "")) >= float(beyond.replace(",", ""))


def test_the_error_of_a_failed_rank_has_its_output(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank \d failed with status 1.*No module named benchmarks\.nosuch"):
        ranks.run_ranks(2, "benchmarks.nosuch", {}, tmp_path)


def test_without_root_there_is_no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert link.missing() == "network namespaces need root"


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


NO_LINK = link.missing()
needs_link = pytest.mark.skipif(NO_LINK is not None, reason=f"no link: {NO_LINK}")


def test_stand_in_ranks_meet_agree_to_stop_and_end() -> None:
    """Each rank ends as a preempted one, else it is an error."""
    (found,) = run_ranks(1, stand_ins, {"ranks": 8, "per_node": 4, "files": 1000})
    parts = found["parts"]
    assert next(iter(parts)) == "name of the start"
    assert list(parts)[-1] == "agreement to stop"
    # Rank 0 writes a result and the seven others read it.
    assert parts["work of rank 0"]["requests"] >= 15
    assert found["private_mb"] > 1
    assert found["descriptors"] > 8
    runs = {8: [found], 16: [found]}
    text = many_ranks.measured(runs, "no root") + many_ranks.modelled(runs, {10.0: runs, 50.0: runs}, 4096)
    shown = (ROOT / "docs/scale.md").read_text().partition("## Measured")[2].partition("## Modelled")[0]
    rows = re.findall(r"^\| (\w[^|]*) \|", shown, re.MULTILINE)
    assert len(rows) == 36
    assert [row for row in rows if f"| {row} |" not in text] == [], "not printed"


def test_stand_in_ranks_end_when_one_is_killed() -> None:
    (found,) = run_ranks(1, stand_ins, {"ranks": 4, "lost": True, "lazy": False})
    assert found["end_seconds"] > 0


def _failing_stand_ins() -> None:
    stand_in.run = lambda task, report: 1 // int(os.environ["LOCAL_RANK"])
    stand_ins({"ranks": 2})


def test_a_stand_in_rank_that_fails_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank \d ended with status .*its last output"):
        run_ranks(1, _failing_stand_ins)


@needs_link
@pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="no /dev/net/tun")
def test_stand_in_ranks_on_nodes_behind_a_slow_network() -> None:
    with link.cluster(2, delay_ms=20.0, mbit=100) as made:
        (found,) = run_ranks(1, stand_ins, {"ranks": 2, "per_node": 1, "files": 100}, made)
    polls = found["parts"][f"{stand_in.POLLS} polls"]
    assert polls["seconds"] > stand_in.POLLS * 0.02  # each waits for a message of the other
    assert polls["sent"] > 20 * stand_in.POLLS
    assert f"distil-tl-{os.getpid()}-" not in namespaces()


def test_a_law_is_found_and_its_error_is_that_at_the_largest_size() -> None:
    sizes = (8, 16, 32, 64, 128)
    law = extrapolation.fit(sizes, [5 + 2 * n * n for n in sizes])
    assert law(4096) == pytest.approx(5 + 2 * 4096**2)
    assert extrapolation.fit(sizes, [3.0] * 5).factors == pytest.approx({"1": 3.0})
    assert extrapolation.fit(sizes, [0.0] * 5)(4096) == 0
    found, wrong = many_ranks.checked_law({**{n: 2.0 * n for n in sizes}, 256: 1024.0})
    assert found(4096) == pytest.approx(2 * 4096)
    assert wrong == pytest.approx(-0.5)


@needs_link
def test_a_link_leaves_nothing_behind() -> None:
    with link.link(100) as made:
        shown = subprocess.run(
            [*made.prefixes[1], "tc", "qdisc", "show", "dev", made.interface],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "rate 100Mbit" in shown
    assert f"distil-tl-{os.getpid()}-" not in namespaces()


@needs_link
def test_a_terminated_benchmark_leaves_nothing_behind(tmp_path: Path) -> None:
    options = ["--parts", "link", "--mbit", "10", "--model", "shufflenet_v2_x0_5"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.scale", *options, "--out", str(tmp_path / "found.json")],
            env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 240
            while len(processes_of(tmp_path)) < 3:  # the benchmark, and a rank in each namespace
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        finally:
            process.terminate()
            status = process.wait(timeout=240)
    left = processes_of(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert status == 128 + signal.SIGTERM, log.read_text()
    assert not left
    assert f"distil-tl-{process.pid}-" not in namespaces()


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--files", "100"], "one batch"), (["--mbit", "0"], "at least 1"), (["--parts", "x"], "choose")],
)
def test_wrong_options_of_scale_are_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        scale.main(args)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
