"""torchrun and the console script as a user starts them."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from distil_tl.cli import predict
from distil_tl.train import main
from tests.helpers.arguments import WITHOUT_TIMM, small_args
from tests.helpers.ranks import lines, processes_of, run_ranks, train
from tests.helpers.torchrun import BIN, ENVIRONMENT, TORCHRUN


def test_ctrl_c_leaves_no_process_and_a_run_that_can_be_resumed(small: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = [
        *small,
        WITHOUT_TIMM,
        f"run_dir={run_dir}",
        "stages.head.epochs=10",
        "stages.full.epochs=0",
        "data.workers=1",
    ]
    process = subprocess.Popen(
        [*TORCHRUN, "-m", "distil_tl.train", *args],
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 240
        while not (run_dir / "metrics.jsonl").exists() or len(lines(run_dir)) < 5:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # to all processes of the group, as a terminal does
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert b"same command to resume" in output
    assert processes_of(run_dir) == []
    stopped = json.loads((run_dir / "summary.json").read_text())
    assert stopped["status"] == "preempted"
    assert main(args) == 0
    assert len(lines(run_dir, window="interval")) == 10 * 6


@pytest.fixture(scope="module")
def run_dir(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, forked: `tests/system/test_dying.py` has complete runs under torchrun."""
    path = tmp_path_factory.mktemp("torchrun") / "run"
    args = [*small_args(folder), WITHOUT_TIMM, f"run_dir={path}", "stages.full.epochs=1", "tracking.log_every=3"]
    assert run_ranks(2, train, args) == [0, 0]
    return path


def distil_tl_command(*args: object) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "distil-tl"), *map(str, args)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)


def test_evaluate_under_torchrun(run_dir: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*TORCHRUN, "-m", "distil_tl.evaluate", str(run_dir), "--json", str(tmp_path / "e.json")],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["n"] == 31
    assert found["top1"] == json.loads((run_dir / "summary.json").read_text())["best"]["top1"]


def test_predict_writes_a_row_an_image(run_dir: Path, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG")
    out = tmp_path / "out.csv"
    done = distil_tl_command("predict", run_dir, folder / "val", broken, "-o", out, "--all")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert len(rows) == 32
    assert rows[-1]["path"] == str(broken)
    assert rows[-1]["error"]
    assert rows[-1]["prediction"] == ""
    best = json.loads((run_dir / "summary.json").read_text())["best"]
    hits = sum(row["prediction"] == Path(row["path"]).parent.name for row in rows[:-1])
    assert hits / 31 == best["top1"]
    assert sum(float(rows[0][f"p({name})"]) for name in ("circles", "noise", "stripes")) == pytest.approx(1, abs=1e-4)


def test_predict_refuses_missing_runs_and_files(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for args in ((tmp_path, tmp_path), (run_dir, tmp_path / "x.png"), (run_dir, tmp_path)):
        assert predict.main(list(map(str, args))) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert len(message.splitlines()) == 1


def test_the_console_script_names_its_commands() -> None:
    assert "evaluate" in distil_tl_command("--help").stdout
    wrong = distil_tl_command("evalute")
    assert wrong.returncode == 2
    assert "did you mean `evaluate`" in wrong.stderr


def test_report_can_be_made_again(run_dir: Path) -> None:
    (run_dir / "report.html").unlink()
    assert distil_tl_command("report", run_dir).returncode == 0
    assert (run_dir / "report.html").exists()
    wrong = distil_tl_command("report", run_dir / "logs")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
