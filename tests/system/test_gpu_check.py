"""The GPU check, as CI can run it: all steps on the CPU. And what it makes of steps that fail or hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu_check import __main__ as check
from tests.gpu_check import speed, steps
from tests.gpu_check.check import Check, expect
from tests.helpers.paths import ROOT


def started(*args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        [str(ROOT / "tests/gpu_check.sh"), *args], env=environment, capture_output=True, text=True, check=False,
        timeout=590,
    )  # fmt: skip


def test_all_steps_pass_on_a_cpu(tmp_path: Path) -> None:
    ended = started("--dry", str(tmp_path / "out"))
    assert ended.returncode == 0, ended.stdout + (tmp_path / "out/log.txt").read_text()[-6000:]
    assert ended.stderr == ""
    found = json.loads((tmp_path / "out/results.json").read_text())["steps"]
    assert {step["name"] for step in found} == set(steps.STEPS)
    assert {step["status"] for step in found} == {"passed"}
    figures = {step["name"]: step["figures"] for step in found}
    assert figures["stop-and-resume"]["deterministic"]["byte_equal"] is True
    assert figures["pipeline-resnet50"]["both"]["images_per_second"] > 0


@pytest.mark.parametrize(
    ("args", "message"), [(["--only", "fact", "out"], "no step fact; steps: facts"), ([], "OUT_DIR")]
)
def test_wrong_arguments_are_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        check.main(args)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def steps_with(monkeypatch: pytest.MonkeyPatch, **bodies: Callable[[Check, dict[str, object]], str]) -> None:
    monkeypatch.setattr(steps, "STEPS", {name: steps.Step(body, 60) for name, body in bodies.items()})


@pytest.mark.parametrize("seconds", ["1", "600"])
def test_steps_for_which_there_is_no_time_are_recorded(
    seconds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The time is over after `seconds`, or when SIGTERM arrives."""

    def hangs(given: Check, figures: dict[str, object]) -> str:
        sys.stdout.write("before\n")
        sys.stdout.flush()
        if seconds == "600":
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
        return "ended"

    steps_with(monkeypatch, passes=lambda given, figures: "fine", hangs=hangs, never=hangs)
    monkeypatch.setenv("GPU_CHECK_SECONDS", seconds)
    monkeypatch.setenv("DISTIL_TL_CACHE", str(tmp_path / "cache"))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert check.main([str(tmp_path / "out")]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    shown = capsys.readouterr().out.splitlines()
    expected = [["passes", "passed"], ["hangs", "killed"], ["never", "skipped"]]
    assert [line.split()[:2] for line in shown[:3]] == expected
    assert shown[3].startswith("not passed: hangs, never in ")
    found = json.loads((tmp_path / "out/results.json").read_text())["steps"]
    assert {step["name"]: step["last_line"] for step in found} == {
        "passes": "fine", "hangs": "before", "never": "no time was left"
    }  # fmt: skip


def test_an_epoch_is_longer_than_what_is_loaded_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Check(dry=False, work=tmp_path, own=tmp_path)
    monkeypatch.setattr(speed, "available_cpus", lambda: 16)
    monkeypatch.setattr("distil_tl.data.prefetch.available_memory", lambda: 128 << 30)
    monkeypatch.setattr("distil_tl.data.prefetch.has_memory_files", lambda: True)
    monkeypatch.setattr(speed, "write_images", lambda root, count, link: Path(str(count)))
    both = speed.task_of(given, "resnet50", "both")
    assert (both.epochs, both.root) == (3, str(3 * 15 * 2 * 256))  # 15 loader processes, two batches each
    alone = speed.task_of(given, "resnet50", "synthetic")
    assert (alone.epochs, alone.root) == (2, str(30 * 256))


def test_steps_that_fail_or_hang_do_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hangs(given: Check, figures: dict[str, object]) -> str:
        figures["never"] = True
        subprocess.run(["sh", "-c", "echo $$; exec sleep 600"], start_new_session=True, check=True)
        return "ended"

    def fails(given: Check, figures: dict[str, object]) -> str:
        figures["found"] = 3
        expect(False, "it is 3")
        return ""

    def breaks(given: Check, figures: dict[str, object]) -> str:
        raise ValueError("a fault of the step")

    def passes(given: Check, figures: dict[str, object]) -> str:
        return "fine"

    bodies = {"hangs": hangs, "fails": fails, "breaks": breaks, "passes": passes}
    limits = {name: steps.Step(body, 3 if body is hangs else 60) for name, body in bodies.items()}
    monkeypatch.setattr(steps, "STEPS", limits)
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # `main` replaces a handler
    monkeypatch.setenv("DISTIL_TL_CACHE", str(tmp_path / "cache"))
    assert check.main([str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["hangs", "killed"], ["fails", "failed"], ["breaks", "failed"], ["passes", "passed"]
    ]  # fmt: skip
    assert lines[1].endswith("it is 3")
    assert lines[2].endswith("ValueError: a fault of the step")
    assert lines[3].endswith("fine")
    assert "not passed: hangs, fails, breaks in" in lines[4]
    found = json.loads((tmp_path / "out/results.json").read_text())["steps"]
    assert found[1]["figures"] == {"found": 3}
    child = Path("/proc") / found[0]["last_line"] / "stat"
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("a program in a session of its own is still running")
