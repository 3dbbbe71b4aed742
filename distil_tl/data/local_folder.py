"""A folder on a node's own disk for one set of images: filled once, used by all jobs of the node.

STAGE_TO/NAME-DIGEST/ready/images contains the images. The digest depends on the data, so changed data get a new folder.
`partial` is renamed to `ready` when it is complete; an interrupted copy is made again from the beginning. Jobs of a
node that need the same data wait for each other by a lock, so that only the first one copies. Nothing here deletes a
complete folder; Slurm deletes the folders that it creates for a job.

A copy is verified after it is made and before each use: the number and total size of all files, and the content of a
sample of them. Verifying the content of all files would take as long as training without a copy.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distil_tl.data.config import data_name
from distil_tl.distributed.process_group import DistInfo
from distil_tl.utils.files import read_json, write_json
from distil_tl.utils.home import expand_home
from distil_tl.utils.log import Progress, logger, printable

BLOCK_SIZE = 1 << 22  # bytes read and written at once
SAMPLE_BYTES = 1 << 28  # total size of the files whose content is verified, approximately
FREE_SPACE_FACTOR = 1.05  # of the required space must be free
PROGRESS_INTERVAL = 10.0  # seconds
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class StagingError(Exception):
    """Images cannot be copied or unpacked to this node; the message says why."""


def prepare_folder(
    stage_to: str, source: Path, digest: str, total: int, fill: Callable[[FolderWriter], None], *, show: bool
) -> Path:
    """The folder with the complete images on this node; `fill` writes them if they are not there yet.

    Nothing is left on the disk if `fill` fails, as other jobs may need the space.

    Args:
        digest: changes with the data.
        total: the amount of work in bytes, for the progress.
        show: whether to show the progress.

    Raises:
        StagingError, OSError: the images cannot be written to this disk.
    """
    with _locked_folder(stage_to, data_name(source), digest) as folder:
        ready, partial = folder / "ready", folder / "partial"
        if ready.exists():
            if _is_complete(ready):
                logger.info("images: using the existing copy in %s", printable(ready / "images"))
                return ready / "images"
            logger.info("images: the copy in %s is no longer complete", printable(ready / "images"))
            ready.rename(partial)
        if partial.exists():
            shutil.rmtree(partial)
        writer = FolderWriter(partial / "images", total, show=show)
        try:
            fill(writer)
            figures = {"files": writer.files, "bytes": writer.bytes, "sample": writer.sample}
            write_json(partial / "complete.json", {"source": str(source), "boot": _boot_id(), **figures})
            if not _is_complete(partial):
                raise StagingError(f"the files read back from {partial} differ from those written")
            partial.rename(ready)
        except (StagingError, OSError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StagingError(f"{folder.parent} was full after {_size(writer.bytes)}") from error
            raise
        finally:
            writer.progress.close()
        logger.info("images: %s to %s", writer.figures(), printable(ready / "images"))
        return ready / "images"


def expand(stage_to: str) -> Path:
    """`stage_to` with the environment variables and the home directory of this node. Raises StagingError."""
    unset = [name for name in re.findall(r"\$\{?(\w+)", stage_to) if not os.environ.get(name)]
    if unset:
        verb = "is" if len(unset) == 1 else "are"
        raise StagingError(f"{', '.join(unset)} {verb} not set in {stage_to!r}")
    return expand_home(os.path.expandvars(stage_to))


def require_free_space(folder: Path, needed: int) -> None:
    """Raises StagingError if the file system has less than `needed` bytes free, counted in whole blocks."""
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    if free < needed * FREE_SPACE_FACTOR:
        raise StagingError(f"{_size(needed)} do not fit in {folder.parents[2]}, where {_size(free)} are free")


def node_label(info: DistInfo) -> str:
    """The number and name of this node for a message; empty if there is only one node."""
    several = info.launch.local_world_size < info.world_size
    return f" on node {info.launch.node} ({socket.gethostname()})" if several else ""


def reason_of(error: StagingError | OSError) -> str:
    """An error as text for a message."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


class FolderWriter:
    """Writes files below `images`, counts them, shows the progress and keeps checksums of a sample. Thread-safe."""

    def __init__(self, images: Path, total: int, *, show: bool) -> None:
        images.mkdir(parents=True)
        self.images, self.total = images, total
        self.files = self.bytes = 0
        self.sample: dict[str, int] = {}
        self.position: Callable[[], int] = lambda: self.bytes  # how much of `total` is done
        self.stopped = threading.Event()
        self.progress = Progress("images", total, show=show)
        self._lock = threading.Lock()
        self._folders: set[str] = set()
        self._shown = 0
        self._start = self._last_line = time.monotonic()

    def make_folder(self, name: str) -> None:
        if name not in self._folders:
            (self.images / name).mkdir(parents=True, exist_ok=True)
            self._folders.add(name)

    def write(self, reader: Any, name: str, size: int) -> None:
        """Write the new file `name` from `reader`. Raises StagingError if it does not have `size` bytes."""
        self.make_folder(name.rpartition("/")[0])
        count = crc = 0
        with open(f"{self.images}/{name}", "xb") as file:  # noqa: PTH123  # faster, for millions of files
            while block := reader.read(min(BLOCK_SIZE, size - count + 1)):
                if self.stopped.is_set():
                    return
                count, crc = count + len(block), zlib.crc32(block, crc)
                file.write(block)
        if count != size:
            raise StagingError(f"{name} has {count} bytes instead of {size}: it changed or is truncated")
        with self._lock:
            self.files, self.bytes = self.files + 1, self.bytes + size
            if zlib.crc32(os.fsencode(name)) % max(1, self.total // SAMPLE_BYTES) == 0:
                self.sample[name] = crc
            self._show_progress()

    def figures(self) -> str:
        seconds = time.monotonic() - self._start
        rate = _size(self.bytes / max(seconds, 1e-9))
        return f"{self.files:,} files, {_size(self.bytes)} in {seconds:.1f} s, {rate}/s"

    def _show_progress(self) -> None:
        done = self.position()
        self.progress.advance(done - self._shown)
        self._shown = done
        if time.monotonic() - self._last_line >= PROGRESS_INTERVAL:
            self._last_line = time.monotonic()
            self.progress.show(f"{100 * done / max(1, self.total):.0f}%  {self.figures()}")


@contextlib.contextmanager
def _locked_folder(stage_to: str, name: str, digest: str) -> Iterator[Path]:
    """The folder for one set of data, locked for one job at a time, and not readable by other users."""
    # The name depends on the user: another user could otherwise create the folder first. It depends on the node, too:
    # if the disk is shared by several nodes, locks may not work between them.
    key = hashlib.sha256(f"{os.geteuid()} {socket.gethostname()} {digest}".encode()).hexdigest()[:16]
    folder = expand(stage_to) / f"{name}-{key}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise StagingError(f"{folder} belongs to another user")
    with (folder / "lock").open("w", encoding="utf-8") as lock:
        waiting = False
        while not _try_lock(lock.fileno()):
            if not waiting:
                logger.info("another job is copying the same images to %s; waiting for it", printable(folder))
            waiting = True
            time.sleep(0.2)
        yield folder


def _try_lock(lock: int) -> bool:
    """Try to take the lock. Returns whether it was free. The system releases the lock of a killed process."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_complete(folder: Path) -> bool:
    """Whether all files listed in complete.json exist, and those of the sample have the listed content."""
    try:
        listed = read_json(folder / "complete.json")
        sample = {name: zlib.crc32((folder / "images" / name).read_bytes()) for name in listed["sample"]}
    except (OSError, ValueError, KeyError):
        return False
    if listed["boot"] != _boot_id():  # after a crash of the node, data that had not reached the disk may be zeros
        return False
    return sample == listed["sample"] and _count_files(folder / "images") == (listed["files"], listed["bytes"])


def _boot_id() -> str:
    return BOOT_ID.read_text(encoding="utf-8").strip() if BOOT_ID.exists() else ""


def _count_files(folder: Path) -> tuple[int, int]:
    """Number of files below a folder, and their total size in bytes."""
    files = size = 0
    pending = [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    files, size = files + 1, size + entry.stat(follow_symlinks=False).st_size
    return files, size


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
