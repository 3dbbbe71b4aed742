"""Files that a command writes for the user: what is replaced, what is written into, what is refused before the work."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from distil_tl.utils.errors import UserError
from distil_tl.utils.outputs import check_output, open_output
from distil_tl.utils.signals import removed_on_signal
from tests.helpers.paths import ROOT

ENDINGS = (".jpg", ".png")


def write(path: Path, text: str) -> None:
    check_output("--output", path)
    with open_output(path) as file:
        file.write(text)


def test_a_new_and_an_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write(path, "one")
    path.chmod(0o640)
    write(path, "two")
    assert path.read_text() == "two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_keeps_pointing_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "out.csv", tmp_path / "elsewhere" / "real.csv"
    link.symlink_to(target)
    for text in ("one", "two"):  # the target does not exist at first
        write(link, text)
        assert (link.is_symlink(), target.read_text()) == (True, text)


def test_a_device_stays_a_device(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a device")
    node = tmp_path / "null"
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    write(node, "text")
    assert stat.S_ISCHR(node.stat().st_mode)
    write(Path("/dev/null"), "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)  # noqa: PTH116


def test_a_device_without_room_is_named() -> None:
    with pytest.raises(UserError, match="can't write /dev/full: No space left on device"):
        write(Path("/dev/full"), "text")


def test_a_pipe_whose_reader_has_exited_is_no_fault_of_the_user() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        write(Path(f"/dev/fd/{writer}"), "text")
    os.close(writer)


def test_a_pipe_gets_the_text(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write(pipe, "text")
    reader.join(30)
    assert found == ["text"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_what_is_open_already_is_written_into(tmp_path: Path) -> None:
    """As for /dev/stdout, when standard output is a file."""
    with (tmp_path / "log").open("w") as log:
        write(Path(f"/dev/fd/{log.fileno()}"), "text")
        assert (tmp_path / "log").stat().st_ino == os.fstat(log.fileno()).st_ino
    assert (tmp_path / "log").read_text() == "text"
    with (tmp_path / "log").open("a") as log:  # as for `-o /dev/stdout >> log`
        write(Path(f"/dev/fd/{log.fileno()}"), " and more")
    assert (tmp_path / "log").read_text() == "text and more"


def test_a_file_in_shared_memory_is_replaced_like_any_other() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "out.csv"
        write(path, "earlier")
        before = path.stat().st_ino
        write(path, "text")
        assert path.stat().st_ino != before
        assert path.read_text() == "text"


def test_the_file_is_utf_8_whatever_its_text(tmp_path: Path) -> None:
    write(tmp_path / "out.csv", "猫 caf\udce9")
    assert (tmp_path / "out.csv").read_bytes() == "猫 caf\\udce9".encode()


def test_an_error_leaves_the_earlier_file(tmp_path: Path) -> None:
    write(tmp_path / "out.csv", "earlier")
    with pytest.raises(ZeroDivisionError), open_output(tmp_path / "out.csv") as file:
        file.write("p" * (1 // 0))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_what_is_refused(tmp_path: Path) -> None:
    photo, folder = tmp_path / "a.txt", tmp_path / "folder"
    photo.write_bytes(b"photo")
    folder.mkdir()
    (tmp_path / "link.csv").symlink_to(photo)
    (tmp_path / "other.csv").symlink_to(tmp_path / "other.jpg")
    cases = {
        folder: "is a folder: name a file in it",
        tmp_path / "nowhere" / "x": "there is no folder",
        photo: "is one of the inputs",
        tmp_path / "link.csv": "is one of the inputs",
        tmp_path / "b.JPG": "is named like an image",
        tmp_path / "other.csv": "is a link to .*other.jpg, which is named like an image",
        tmp_path / ("x" * 300): "can't write|File name too long",
        Path("/proc/x"): "can't write in /proc",
    }
    for path, message in cases.items():
        with pytest.raises((UserError, OSError), match=message):
            check_output("--output", path, [photo, tmp_path / "missing"], ENDINGS)
    assert photo.read_bytes() == b"photo"


@pytest.mark.parametrize(
    ("content", "refused"),
    [(b"path,prediction,probability\n", False), (b"", False), (b"path;label\n", True), (b"\x00" * 50, True)],
)
def test_only_earlier_outputs_are_replaced(tmp_path: Path, content: bytes, refused: bool) -> None:
    path = tmp_path / "out.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no earlier output of this command") if refused else nullcontext():
        check_output("-o", path, earlier=(b"path,prediction,",))
    check_output("-o", tmp_path / "new.csv", earlier=())
    with pytest.raises(UserError, match="is no earlier output") if content else nullcontext():
        check_output("-o", path, earlier=())
    assert path.read_bytes() == content


KILLED = """
import os, signal, sys
from pathlib import Path
from distil_tl.utils.outputs import replaced_output
from distil_tl.utils.signals import removed_on_signal
folder = Path(sys.argv[1])
(folder / ".part").mkdir()
(folder / ".part/x").touch()
with removed_on_signal(folder / ".part"), replaced_output(folder / "out.csv") as partial:
    partial.write_text("half")
    print(len(list(folder.iterdir())))
    if os.fork() == 0:  # as a loader process, which must not remove what is not its own
        os.kill(os.getpid(), signal.SIGTERM)
    os.wait()
    print(len(list(folder.iterdir())), flush=True)
    os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_file_behind(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "out.csv").write_text("earlier")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(int(number))], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == -number
    assert done.stdout.split() == [b"3", b"3"]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_a_signal_that_a_run_handles_is_left_to_it(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with removed_on_signal(tmp_path / "x"):
            (tmp_path / "x").touch()
            os.kill(os.getpid(), signal.SIGTERM)
            assert (seen, (tmp_path / "x").exists()) == ([signal.SIGTERM], True)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_full_disk_behind_standard_output_is_named() -> None:
    script = "from distil_tl.utils.command import run_command\nfrom distil_tl.utils.outputs import open_output\n"
    script += "def body():\n    with open_output(None) as file:\n        file.write('x' * 10)\n"
    script += "raise SystemExit(run_command('a', body))"
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (ended.returncode, ended.stderr) == (2, "a: can't write to standard output: No space left on device\n")
