"""The home folder and the cache: `~` in paths, and a place for caches where there is no home that can be written to."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from distil_tl.utils.errors import UserError
from distil_tl.utils.paths import path_problem

_UNKNOWN = "~"  # what os.path.expanduser leaves as it is


def expand_home(text: str | Path) -> Path:
    """A path with `~` or `~user` at its beginning replaced; as it is where that home is not known."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  # pathlib's raises


def path_argument(text: str) -> Path:
    """A path on the command line. The shell replaces `~`, but not in --output=~/file, nor in quotes."""
    if problem := path_problem(text):
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: {problem}")
    if Path(text).exists():
        return Path(text)
    for unknown in home_problems({"path": text}):
        raise argparse.ArgumentTypeError(unknown)
    return expand_home(text)


def home_problems(paths: Mapping[str, str | None]) -> Iterator[str]:
    """One message for each path, by key, that begins with a home that is not known.

    Such a path would be taken literally, and a folder named `~` created.
    """
    for key, text in paths.items():
        if text is None or not text.startswith("~") or not str(expand_home(text)).startswith(_UNKNOWN):
            continue
        user = text.partition("/")[0][1:]
        if user:
            yield f"{key}={text}: there is no user {user}; write the whole path, or ./{text} for a folder of that name"
        else:
            yield f"{key}={text}: the home folder of this user is not known; set HOME, or write the whole path"


def provide_home(*, show: bool) -> None:
    """Make sure that this process and those that it starts have a home, and a cache that can be created.

    Libraries keep downloads and compiled code in the home folder. In a container a user often has none: no HOME and no
    entry in the list of users, or HOME=/, which can't be written to. Libraries would then fail, or create a folder
    named `~`. A cache that exists is never replaced, even if it can't be written to: it may hold what is needed.

    Args:
        show: say on standard error what is used instead.
    """
    home = expand_home("~")
    reason = None
    if str(home) == _UNKNOWN:
        reason = "this user has no home folder"
        os.environ["HOME"] = str(_private_folder())
    elif not os.environ.get("XDG_CACHE_HOME") and not _can_be_created(home / ".cache"):
        reason = f"the home folder {home} can't be written to"
        os.environ["XDG_CACHE_HOME"] = str(_private_folder() / ".cache")
    if not os.environ.keys() & {"LOGNAME", "USER", "LNAME", "USERNAME"}:  # else libraries look into the list of users
        os.environ["USER"] = f"user{os.geteuid()}"
    if reason is not None and show:
        where = os.environ["HOME"] if reason.startswith("this") else os.environ["XDG_CACHE_HOME"]
        sys.stderr.write(
            f"{reason}: downloads and caches go to {where}. To keep them, set HOME or XDG_CACHE_HOME to a folder that "
            f"can be written to\n"
        )


def cache_dir() -> Path:
    """The folder of downloads and derived files. It may not exist yet.

    `$DISTIL_TL_CACHE`, else `$XDG_CACHE_HOME/distil_tl`, else `~/.cache/distil_tl`. An empty variable counts as unset.
    """
    if own := os.environ.get("DISTIL_TL_CACHE"):
        for problem in home_problems({"DISTIL_TL_CACHE": own}):
            raise UserError(problem)
        return expand_home(own)
    provide_home(show=False)  # for programs that import this package
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "distil_tl"
    return expand_home("~/.cache/distil_tl")


def _can_be_created(folder: Path) -> bool:
    """Whether a folder exists, or can be created."""
    if folder.exists():
        return True
    existing = next((parent for parent in folder.parents if parent.exists()), Path("/"))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _private_folder() -> Path:
    """A folder for temporary files that only this user can read; the same for all processes on this machine."""
    folder = Path(tempfile.gettempdir()) / f"distil_tl-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if folder.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            return Path(tempfile.mkdtemp(prefix="distil_tl-"))
    except OSError:
        return Path(tempfile.gettempdir())
    return folder
