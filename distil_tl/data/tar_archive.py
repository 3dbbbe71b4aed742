"""A tar file of images, unpacked to the node's own disk before training, once per node."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from pathlib import Path
from typing import IO

from distil_tl.data.local_folder import (
    BLOCK_SIZE,
    FolderWriter,
    StagingError,
    node_label,
    prepare_folder,
    reason_of,
    require_free_space,
)
from distil_tl.distributed.process_group import DistInfo
from distil_tl.distributed.rank_zero import on_each_node
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import printable


def stage_archive(info: DistInfo, stage_to: str, archive: Path) -> Path:
    """The folder on this node with the splits of a tar file, which is unpacked on all nodes at once.

    Raises:
        UserError: on all ranks: the content does not fit, is damaged, or has a member that is neither a file nor a
            folder, or that would be written outside the folder.
    """

    def unpack_here() -> str:
        try:
            return str(_unpack(stage_to, archive, show=info.is_main))
        except (StagingError, OSError) as error:
            raise UserError(
                f"data.root={archive} can't be unpacked to data.stage_to={stage_to}{node_label(info)}: "
                f"{reason_of(error)}"
            ) from error

    return Path(on_each_node(info, "unpacking the images", unpack_here))


def _unpack(stage_to: str, archive: Path, *, show: bool) -> Path:
    status = archive.stat()

    def fill(writer: FolderWriter) -> None:
        require_free_space(writer.images, status.st_size)  # a lower limit: the unpacked size is not known beforehand
        try:
            _write_members(archive, writer)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise StagingError(f"it is damaged or truncated ({error}); create or copy it again") from error
        _folder_of_splits(writer.images)

    digest = f"{archive.name} {status.st_size} {status.st_mtime_ns}"
    return _folder_of_splits(prepare_folder(stage_to, archive, digest, status.st_size, fill, show=show))


def _write_members(archive: Path, writer: FolderWriter) -> None:
    """Write all files of a tar file.

    Not by tarfile's extraction filters: some versions of Python lack them, and they silently change members that must
    be refused here.
    """
    with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:*") as tar:
        writer.position = raw.tell
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all members, 1 kB each
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            if member.name.startswith("/") or ".." in parts:
                raise StagingError(f"its member {member.name!r} would be written outside the folder; do not trust it")
            content = tar.extractfile(member) if member.isreg() else None
            if content is not None:
                writer.write(content, "/".join(parts), member.size)
            elif member.isdir():
                writer.make_folder("/".join(parts))
            else:
                raise StagingError(
                    f"its member {member.name!r} is neither a file nor a folder; to store links as files, create it "
                    f"with tar --dereference --hard-dereference"
                )
        _refuse_missing_end(tar.fileobj)  # type: ignore[arg-type]


def _refuse_missing_end(file: IO[bytes]) -> None:
    """Raise ReadError unless only zeros follow, as at the end of an archive.

    tarfile also stops, without an error, at the end of a truncated file and at anything that is not a header.
    """
    has_end = False
    while block := file.read(BLOCK_SIZE):
        has_end = len(block) >= tarfile.BLOCKSIZE or has_end
        if block.count(0) != len(block):
            raise tarfile.ReadError("invalid header before the end of the archive")
    if not has_end:
        raise tarfile.ReadError("no end-of-archive marker")


def _folder_of_splits(images: Path) -> Path:
    """The folder that contains train/: `images`, or its only sub-folder, as in an archive made by `tar c flowers`."""
    folders = sorted(path for path in images.iterdir() if path.is_dir())
    for folder in (images, *folders) if len(folders) == 1 else (images,):
        if (folder / "train").is_dir():
            return folder
    names = ", ".join(printable(path.name) for path in folders[:5]) or "none"
    raise StagingError(f"it contains no train/CLASS/*.jpg and val/CLASS/*.jpg (its folders: {names})")
