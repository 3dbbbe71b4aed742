"""`~` in paths, and users without a home folder."""

from __future__ import annotations

import argparse
import os
import pwd
from pathlib import Path

import pytest

from distil_tl.utils.errors import UserError
from distil_tl.utils.home import cache_dir, expand_home, home_problems, path_argument, provide_home

NAMES = ("HOME", "XDG_CACHE_HOME", "DISTIL_TL_CACHE", "USER", "LOGNAME", "LNAME", "USERNAME")


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "changed by the test")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without an entry in the list of users, as in a container."""

    def unknown(*args: object) -> None:
        raise KeyError(args)

    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_home_is_replaced_at_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert [str(expand_home(text)) for text in ("~", "~/a", "a/~", "./~")] == ["/home/me", "/home/me/a", "a/~", "~"]
    assert list(home_problems({"run_dir": "~/a", "resume": None, "data.root": "x~"})) == []


def test_an_unknown_user_is_named() -> None:
    (problem,) = home_problems({"data.root": "~no-such-user/x"})
    assert problem.startswith("data.root=~no-such-user/x: there is no user no-such-user; write the whole path")


@pytest.mark.usefixtures("unlisted")
def test_an_unknown_home_is_named() -> None:
    (problem,) = home_problems({"run_dir": "~/a"})
    assert problem == "run_dir=~/a: the home folder of this user is not known; set HOME, or write the whole path"


def test_paths_of_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "~lock.jpg").touch()
    assert [str(path_argument(text)) for text in ("~/a", "b", "~lock.jpg")] == ["/home/me/a", "b", "~lock.jpg"]
    with pytest.raises(argparse.ArgumentTypeError, match="there is no user nobody-here"):
        path_argument("~nobody-here/x")


@pytest.mark.usefixtures("unlisted")
def test_without_a_home_there_is_a_private_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    provide_home(show=True)
    folder = tmp_path / f"distil_tl-{os.geteuid()}"
    assert os.environ["HOME"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert os.environ["USER"]
    assert f"this user has no home folder: downloads and caches go to {folder}" in capsys.readouterr().err
    assert cache_dir() == folder / ".cache/distil_tl"
    provide_home(show=True)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("unlisted")
def test_a_folder_of_another_user_is_not_used(tmp_path: Path) -> None:
    (tmp_path / f"distil_tl-{os.geteuid()}").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    provide_home(show=False)
    assert os.environ["HOME"] != str(tmp_path / f"distil_tl-{os.geteuid()}")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_home_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = tmp_path / "home"
    closed.mkdir()
    monkeypatch.setenv("HOME", str(closed / "nobody"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
    provide_home(show=True)
    assert os.environ["HOME"] == str(closed / "nobody")
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path / f"distil_tl-{os.geteuid()}" / ".cache")
    assert f"the home folder {closed}/nobody can't be written to" in capsys.readouterr().err


def test_a_cache_that_exists_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home/.cache").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    provide_home(show=True)
    assert "XDG_CACHE_HOME" not in os.environ


def test_a_cache_of_an_unknown_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTIL_TL_CACHE", "~no-such-user/cache")
    with pytest.raises(UserError, match="DISTIL_TL_CACHE=~no-such-user/cache: there is no user"):
        cache_dir()
