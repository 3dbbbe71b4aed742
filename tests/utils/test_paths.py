"""Paths that no file can have, and small files that are none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distil_tl.cli import predict
from distil_tl.config import load
from distil_tl.utils.args import read_yaml
from distil_tl.utils.errors import UserError
from distil_tl.utils.paths import MAX_BYTES, path_problem
from launch.args import load_slurm_section, read_run


def test_a_path_that_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert path_problem("x" * 256) == path_problem("/nowhere/" + "x" * 256) == "the name is too long"
    assert path_problem("x/" * 2500) == "the name is too long"
    assert path_problem("a\0b") == "it contains a NUL character"
    assert path_problem(tmp_path / "loop") == "symbolic links form a loop"
    assert [path_problem(path) for path in ("x" * 255, "/nowhere/x", "", ".", "caf\udce9")] == [""] * 5


def test_a_folder_that_may_not_be_entered(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "sub").mkdir(parents=True)
    closed.chmod(0)
    is_root = os.geteuid() == 0  # who may enter any folder
    try:
        if is_root:
            os.seteuid(65534)
        assert path_problem(closed / "sub" / "x") == "no permission to look into a folder above it"
    finally:
        if is_root:
            os.seteuid(0)
        closed.chmod(0o700)


@pytest.mark.parametrize("key", ["data.root", "data.stage_to", "run_dir", "resume", "model.weights"])
def test_it_is_refused_by_its_key(key: str) -> None:
    with pytest.raises(UserError, match=rf"{key}='a/x+\.\.\.': the name is too long; give another path"):
        load([f"{key}=a/{'x' * 300}.pt"])


def test_it_is_refused_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        predict.main(["run", str(tmp_path / ("x" * 300))])
    assert ended.value.code == 2
    assert "the name is too long" in capsys.readouterr().err


def test_what_is_no_configuration_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "powershell").write_bytes("seed: 1\n".encode("utf-16"))
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    (tmp_path / "nul").write_text('base: "a\\0"')
    cases = {
        "pipe": "it is not a regular file", "loop": "symbolic links form a loop", "x" * 300: "the name is too long",
        "powershell": "it is UTF-16; save it as UTF-8", "large": "are too much", "nul": "contains a NUL character",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(UserError, match=rf"can't read the configuration .*: .*{message}"):
            read_yaml(tmp_path / name)
    with pytest.raises(UserError, match="it is not a regular file"):
        read_yaml(Path("/dev/zero"))


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "notepad.yaml").write_bytes("seed: 1\nslurm: {nodes: 2}".encode("utf-8-sig"))
    assert read_yaml(tmp_path / "notepad.yaml")["seed"] == 1
    assert load_slurm_section(tmp_path / "notepad.yaml") == {"nodes": "2"}


@pytest.mark.parametrize("content", ["", "text", "# nothing"])
def test_an_empty_file_is_refused_before_a_submission(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(UserError, match="names no images|must hold keys and values"):
        read_run([str(tmp_path / "x.yaml")])
