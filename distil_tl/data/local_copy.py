"""Images on a node's own disk before training: a folder is copied there, a tar file unpacked, once per node.

STAGE_TO/NAME-DIGEST/ready/images holds them, where the digest is of the data, so that changed data get a folder of
their own. `partial` becomes `ready` in one step, when it is whole: a copy that was cut off is made again from nothing.
Jobs of a node that want the same data take turns, and the second finds it ready. Nothing deletes it; Slurm clears what
it gives to a job.

A copy is looked at when it is made and before each use: number and bytes of all files, contents of a sample. Reading
all of it once more would take as long as doing without a copy.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from distil_tl.data.config import data_name
from distil_tl.data.index import Index
from distil_tl.distributed.collectives import gather_objects
from distil_tl.distributed.process_group import DistInfo, on_each_node
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import write_json
from distil_tl.utils.log import Progress, logger, printable

THREADS = 16  # files copied at once, which hides the delay of a network file system
PART = 64  # files that a thread takes at a time
BLOCK = 1 << 22
SAMPLE = 1 << 28  # bytes whose contents are compared, about
ROOM = 1.05  # of what is needed must be free
SAY_EVERY = 10.0  # seconds
BOOT = Path("/proc/sys/kernel/random/boot_id")


class StagingError(Exception):
    """Why the images can't be brought to this node, for people."""


def stage_folder(info: DistInfo, stage_to: str, indexes: dict[str, Index]) -> Path | None:
    """The folder on this node with a copy of the splits, made on all nodes at once if it is not there.

    None where a node can't have one, as when it does not fit; rank 0 warns of every such node. A node may do with a
    copy what another does without: they read the same bytes.
    """
    source = indexes["train"].root.parent

    def work() -> dict[str, str | None]:
        try:
            return {"copy": str(_copied(stage_to, source, indexes, show=info.is_main)), "problem": None}
        except (StagingError, OSError) as error:
            return {"copy": None, "problem": _reason(error)}

    found = on_each_node(info, "copying the images", work)
    leads = info.launch.local_rank == 0
    told = gather_objects(info, [_node(info), found["problem"]] if leads and found["problem"] else None)
    for node, problem in filter(None, told):
        logger.warning("data.stage_to%s: %s; reading the images from %s", node, printable(problem), printable(source))
    return None if found["copy"] is None else Path(found["copy"])


def stage_archive(info: DistInfo, stage_to: str, archive: Path) -> Path:
    """The folder on this node that a tar file was unpacked to, on all nodes at once; it has the splits in it.

    Raises:
        UserError: on all ranks: it does not fit, is damaged, or holds what is neither file nor folder within it.
    """

    def work() -> str:
        try:
            return str(_unpacked(stage_to, archive, show=info.is_main))
        except (StagingError, OSError) as error:
            raise UserError(
                f"data.root={archive} can't be unpacked to data.stage_to={stage_to}{_node(info)}: {_reason(error)}"
            ) from error

    return Path(on_each_node(info, "unpacking the images", work))


def _node(info: DistInfo) -> str:
    several = info.launch.local_world_size < info.world_size
    return f" on node {info.launch.node} ({socket.gethostname()})" if several else ""


def _reason(error: StagingError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


# A folder, and a tar file.


def _copied(stage_to: str, source: Path, indexes: dict[str, Index], *, show: bool) -> Path:
    if _expanded(stage_to).resolve().is_relative_to(source.resolve()):
        raise StagingError(f"{stage_to} lies within {source}")

    def fill(copy: _Copy) -> None:
        block = os.statvfs(copy.images).f_frsize
        needed = sum(int((-(-index.sizes // block)).sum()) for index in indexes.values()) * block
        _refuse_no_room(copy.images, needed)
        _copy_files(indexes, copy)

    total = sum(int(index.sizes.sum()) for index in indexes.values())
    digest = " ".join(f"{split} {index.fingerprint} {index.times}" for split, index in indexes.items())
    return _ready(stage_to, source, digest, total, fill, show=show)


def _copy_files(indexes: dict[str, Index], copy: _Copy) -> None:
    def copy_part(part: tuple[str, int]) -> None:
        split, first = part
        index = indexes[split]
        for i in range(first, min(first + PART, len(index))):
            if copy.stopped.is_set():
                return
            relative = index.relative(i)
            with open(f"{index.root}/{relative}", "rb", buffering=0) as reader:  # noqa: PTH123  # for millions
                copy.write(reader, f"{split}/{relative}", int(index.sizes[i]))

    parts = ((split, first) for split, index in indexes.items() for first in range(0, len(index), PART))
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for _ in pool.map(copy_part, parts):
                pass
        finally:
            copy.stopped.set()  # a signal may have ended the loop: then the threads end soon, too


def _unpacked(stage_to: str, archive: Path, *, show: bool) -> Path:
    status = archive.stat()

    def fill(copy: _Copy) -> None:
        _refuse_no_room(copy.images, status.st_size)  # the least: what a compressed one holds shows at its end
        try:
            _unpack(archive, copy)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise StagingError(f"it is damaged or cut off ({error}); make or copy it again") from error
        _splits_in(copy.images)

    digest = f"{archive.name} {status.st_size} {status.st_mtime_ns}"
    return _splits_in(_ready(stage_to, archive, digest, status.st_size, fill, show=show))


def _unpack(archive: Path, copy: _Copy) -> None:
    """Not by tarfile's own filters, which some Pythons lack and which quietly change what should be refused."""
    with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:*") as tar:
        copy.position = raw.tell
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # where it keeps every member, a kilobyte each
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            if member.name.startswith("/") or ".." in parts:
                raise StagingError(f"{member.name!r} in it would be written outside the folder; don't trust it")
            content = tar.extractfile(member) if member.isreg() else None
            if content is not None:
                copy.write(content, "/".join(parts), member.size)
            elif member.isdir():
                copy.make_folder("/".join(parts))
            else:
                raise StagingError(
                    f"{member.name!r} in it is neither a file nor a folder; of links, tar makes files with "
                    f"--dereference --hard-dereference"
                )
        _refuse_cut_off(tar.fileobj)  # type: ignore[arg-type]


def _refuse_cut_off(file: IO[bytes]) -> None:
    """tarfile takes the end of a file, and whatever is no header, for the end of the archive: that has zeros."""
    ends = False
    while block := file.read(BLOCK):
        ends = len(block) >= tarfile.BLOCKSIZE or ends
        if block.count(0) != len(block):
            raise tarfile.ReadError("something that is no member, before its end")
    if not ends:
        raise tarfile.ReadError("it has no end")


def _splits_in(images: Path) -> Path:
    """Where train/ is: at the top, or in the one folder that there is, as `tar c flowers` makes it."""
    inside = sorted(path for path in images.iterdir() if path.is_dir())
    for folder in (images, *inside) if len(inside) == 1 else (images,):
        if (folder / "train").is_dir():
            return folder
    have = ", ".join(printable(path.name) for path in inside[:5]) or "none"
    raise StagingError(f"it holds no train/CLASS/*.jpg and val/CLASS/*.jpg (its folders: {have})")


# The place.


def _ready(stage_to: str, source: Path, digest: str, total: int, fill: Callable[[_Copy], None], *, show: bool) -> Path:
    """The folder that `fill` has filled, now or before, whole. `total` is in the bytes that progress is shown by.

    When it can't be filled nothing is left on the disk, which others may need.
    """
    with _place(stage_to, data_name(source), digest) as folder:
        ready, partial = folder / "ready", folder / "partial"
        if ready.exists():
            if _is_whole(ready):
                logger.info("images: read from %s, where they were already", printable(ready / "images"))
                return ready / "images"
            logger.info("images: %s is not whole any more", printable(ready / "images"))
            ready.rename(partial)
        if partial.exists():
            shutil.rmtree(partial)
        copy = _Copy(partial / "images", total, show=show)
        try:
            fill(copy)
            figures = {"files": copy.files, "bytes": copy.bytes, "sample": copy.sample}
            write_json(partial / "complete.json", {"source": str(source), "boot": _boot(), **figures})
            if not _is_whole(partial):
                raise StagingError(f"what was written to {partial} is not what can be read there")
            partial.rename(ready)
        except (StagingError, OSError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StagingError(f"{folder.parent} was full after {_size(copy.bytes)}") from error
            raise
        finally:
            copy.bar.close()
        logger.info("images: %s to %s", copy.said(), printable(ready / "images"))
        return ready / "images"


def _expanded(stage_to: str) -> Path:
    """`stage_to` as this node understands it: with its variables and home."""
    unset = [name for name in re.findall(r"\$\{?(\w+)", stage_to) if not os.environ.get(name)]
    if unset:
        verb = "is" if len(unset) == 1 else "are"
        raise StagingError(f"{', '.join(unset)} {verb} not set in {stage_to!r}")
    return Path(os.path.expanduser(os.path.expandvars(stage_to)))  # noqa: PTH111  # pathlib's raises


@contextlib.contextmanager
def _place(stage_to: str, name: str, digest: str) -> Iterator[Path]:
    """The folder for one set of data, for one job at a time, and closed to other users as the source may be."""
    # By user: a name that others can tell beforehand must not lead to what they put there. By node: where the disk is
    # shared after all, locks may not hold.
    whose = hashlib.sha256(f"{os.geteuid()} {socket.gethostname()} {digest}".encode()).hexdigest()[:16]
    folder = _expanded(stage_to) / f"{name}-{whose}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise StagingError(f"{folder} belongs to another user")
    with (folder / "lock").open("w") as lock:
        waiting = False
        while not _locked(lock.fileno()):
            if not waiting:
                logger.info("another job is bringing the same images to %s; waiting for it", printable(folder))
            waiting = True
            time.sleep(0.2)
        yield folder


def _locked(lock: int) -> bool:
    """Whether this process has the lock now. One that was killed has none."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _refuse_no_room(folder: Path, needed: int) -> None:
    """`needed` in whole blocks of the file system."""
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    if free < needed * ROOM:
        raise StagingError(f"{_size(needed)} do not fit in {folder.parents[2]}, where {_size(free)} are free")


def _is_whole(folder: Path) -> bool:
    """Whether all is there that complete.json tells, and what the sample tells is in it."""
    try:
        note = json.loads((folder / "complete.json").read_text())
        sample = {name: zlib.crc32((folder / "images" / name).read_bytes()) for name in note["sample"]}
    except (OSError, ValueError, KeyError):
        return False
    if note["boot"] != _boot():  # what had not reached the disk when the node went down may be zeros
        return False
    return sample == note["sample"] and _count(folder / "images") == (note["files"], note["bytes"])


def _boot() -> str:
    return BOOT.read_text().strip() if BOOT.exists() else ""


def _count(folder: Path) -> tuple[int, int]:
    """Files below a folder, and their bytes."""
    files = count = 0
    pending = [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    files, count = files + 1, count + entry.stat(follow_symlinks=False).st_size
    return files, count


class _Copy:
    """Files being written below `images`: counted, shown, and a sample of them remembered. Threads may share it."""

    def __init__(self, images: Path, total: int, *, show: bool) -> None:
        images.mkdir(parents=True)
        self.images, self.total = images, total
        self.files = self.bytes = self.shown = 0
        self.sample: dict[str, int] = {}
        self.position: Callable[[], int] = lambda: self.bytes  # how much of `total` is done
        self.stopped = threading.Event()
        self.bar = Progress("images", total, show=show)
        self._lock = threading.Lock()
        self._made: set[str] = set()
        self._began = self._said = time.monotonic()

    def make_folder(self, name: str) -> None:
        if name not in self._made:
            (self.images / name).mkdir(parents=True, exist_ok=True)
            self._made.add(name)

    def write(self, reader: Any, name: str, size: int) -> None:
        """Write the file `name`, which is not there, and has to have `size` bytes."""
        self.make_folder(name.rpartition("/")[0])
        count = crc = 0
        with open(f"{self.images}/{name}", "xb") as writer:  # noqa: PTH123  # for millions
            while block := reader.read(min(BLOCK, size - count + 1)):
                if self.stopped.is_set():
                    return
                count, crc = count + len(block), zlib.crc32(block, crc)
                writer.write(block)
        if count != size:
            raise StagingError(f"{name} had {count} bytes in place of {size}: it changed, or is cut off")
        with self._lock:
            self.files, self.bytes = self.files + 1, self.bytes + size
            if zlib.crc32(os.fsencode(name)) % max(1, self.total // SAMPLE) == 0:
                self.sample[name] = crc
            self._show()

    def _show(self) -> None:
        done = self.position()
        self.bar.advance(done - self.shown)
        self.shown = done
        if time.monotonic() - self._said >= SAY_EVERY:
            self._said = time.monotonic()
            self.bar.say(f"{100 * done / max(1, self.total):.0f}%  {self.said()}")

    def said(self) -> str:
        seconds = time.monotonic() - self._began
        rate = _size(self.bytes / max(seconds, 1e-9))
        return f"{self.files:,} files, {_size(self.bytes)} in {seconds:.1f} s, {rate}/s"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
