"""Exit statuses and messages of commands, and that the modules behind them import quickly."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distil_tl.utils.command import quick_imports, run_command
from distil_tl.utils.errors import (
    LostRanksError,
    NonFiniteError,
    NoProgressError,
    PreemptedError,
    SupersededError,
    UserError,
    WriteError,
)
from distil_tl.utils.log import add_rank_file, logger


def fails_with(error: BaseException) -> None:
    raise error


def test_the_exit_status_is_what_the_command_returns() -> None:
    assert run_command("test", lambda: None) == 0
    assert run_command("test", lambda: 1) == 1


def test_imports_are_not_searched_for_cycles() -> None:
    frozen = gc.get_freeze_count()
    quick_imports()
    assert not gc.isenabled()
    imported: list[list[int]] = [[] for _ in range(1000)]
    assert run_command("test", lambda: not gc.isenabled()) == 0
    assert gc.get_freeze_count() >= frozen + len(imported)
    frozen = gc.get_freeze_count()
    assert run_command("test", lambda: None) == 0
    assert gc.get_freeze_count() <= frozen, "only what was imported is never searched"


def test_a_current_folder_that_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run_command("test", lambda: fails_with(AssertionError())) == 2
    said = capsys.readouterr().err
    assert said.startswith("test: the current folder does not exist any more")
    assert said.count("\n") == 1


def test_a_compiler_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    error = type("InductorError", (RuntimeError,), {})("InvalidCxxCompiler: no working compiler\n\nSet TORCH_LOGS")
    assert run_command("test", lambda: fails_with(error)) == 2
    message = "test: torch.compile failed: InvalidCxxCompiler: no working compiler. Correct that, or set compile=none\n"
    assert capsys.readouterr().err == message


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("test", lambda: fails_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "test: stopped by Ctrl-C\n"


def test_the_log_of_a_rank_ends_with_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each rank, also where only rank 0 prints it; `launch.status` reads the log of rank 0."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("RANK", "1")
    try:
        path = add_rank_file(tmp_path, 1)
        logger.setLevel("DEBUG")
        run_command("test", lambda: fails_with(UserError("message")))
    finally:
        logger.handlers.pop().close()
    assert path.read_text().endswith(" DEBUG test: message\n")


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("error", "status", "ranks"),
    [
        (UserError("message"), 2, "0"),
        (UserError("message", one_rank=True), 2, "01"),
        (PreemptedError("message"), 3, "0"),
        (NonFiniteError("message"), 1, "0"),
        (NoProgressError("message"), 1, "0"),
        (LostRanksError("message"), 1, "01"),
        (SupersededError("message"), 1, "01"),
        (WriteError("message"), 1, "01"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_an_exception_becomes_a_message_and_an_exit_status(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    ranks: str,
    rank: str,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", rank)
    assert run_command("test", lambda: fails_with(error)) == status
    assert capsys.readouterr().err == ("test: message\n" if rank in ranks else "")
    # A launcher would end rank 0, which prints the message, as soon as another rank exits.
    assert bool(waited) == (isinstance(error, UserError) and rank not in ranks)


def test_too_little_memory_for_anything_has_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation")
    assert run_command("test", lambda: fails_with(error)) == 2
    assert "too little memory; use a smaller model or image size" in (said := capsys.readouterr().err)
    assert "See the documentation" not in said


def test_an_operation_that_does_not_repeat_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    text = "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set ..."
    assert run_command("test", lambda: fails_with(RuntimeError(text))) == 2
    assert "adaptive_avg_pool2d_backward_cuda does not have" in (said := capsys.readouterr().err)
    assert "use deterministic=false" in said


def test_a_file_of_the_system_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "/some\nfile")
    assert run_command("command", lambda: fails_with(error)) == 1
    assert capsys.readouterr().err == "command: /some\\nfile: Permission denied\n"
    assert run_command("command", lambda: fails_with(OSError(errno.ENAMETOOLONG, "File name too long", "x"))) == 2


def test_an_exception_that_is_not_expected_has_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "handlers", [])
    with pytest.raises(KeyError):
        run_command("test", lambda: fails_with(KeyError("x")))


LEAVES_A_THREAD = """
import atexit, sys, threading, time
from distil_tl.utils.command import exit_process, run_command
from distil_tl.utils.errors import PreemptedError
from distil_tl.utils.threads import call_with_timeout

def work():
    try:
        call_with_timeout(0.1, lambda: time.sleep(60))
    except Exception as error:
        print(type(error).__name__)
        raise PreemptedError("stopped") from error

atexit.register(lambda: print("atexit"))
status = run_command("test", work)
threading.Thread(target=time.sleep, args=(600,)).start()  # Python would wait for it at exit
exit_process(status)
"""


def test_the_exit_status_does_not_depend_on_an_abandoned_thread() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_A_THREAD], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 3, done
    assert done.stdout.splitlines() == ["CallTimeoutError", "atexit"]
    assert done.stderr == "test: stopped\n"


LIGHT = [
    *(f"distil_tl.utils.{name}" for name in ("command", "errors", "files", "log", "threads", "version")),
    *("distil_tl.distributed.config", "distil_tl.distributed.launch_env", "distil_tl.tracking.config"),
]
HEAVY = {"torch", "numpy", "torchvision", "timm", "wandb", "tqdm", "PIL"}


def test_what_a_command_needs_before_it_starts_is_light() -> None:
    code = f"import sys, {', '.join(LIGHT)}; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True, env=dict(os.environ)
    )
    assert done.stdout.split() == []
