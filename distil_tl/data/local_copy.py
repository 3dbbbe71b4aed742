"""Copy of the folder of images to the node's own disk before training, once per node."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distil_tl.data.index import Index
from distil_tl.data.local_folder import (
    FolderWriter,
    StagingError,
    expand,
    node_label,
    prepare_folder,
    reason_of,
    require_free_space,
)
from distil_tl.distributed.collectives import gather_objects
from distil_tl.distributed.process_group import DistInfo
from distil_tl.distributed.rank_zero import on_each_node
from distil_tl.utils.log import logger, printable

THREADS = 16  # files copied in parallel, to hide the latency of a network file system
FILES_PER_TASK = 64


def stage_folder(info: DistInfo, stage_to: str, indexes: dict[str, Index]) -> Path | None:
    """The folder on this node with a copy of the splits; made on all nodes at once if it is not there.

    None if this node cannot have a copy, for example because it does not fit; rank 0 prints a warning for every such
    node. It is fine if only some nodes have a copy, as all of them read the same bytes.
    """
    roots = {index.root for index in indexes.values()}
    source = min(roots) if len(roots) == 1 else indexes["train"].root.parent  # of a split that was made here

    def copy_here() -> dict[str, str | None]:
        try:
            return {"copy": str(_copy(stage_to, source, indexes, show=info.is_main)), "problem": None}
        except (StagingError, OSError) as error:
            return {"copy": None, "problem": reason_of(error)}

    result = on_each_node(info, "copying the images", copy_here)
    first_of_node = info.launch.local_rank == 0
    problem = [node_label(info), result["problem"]] if first_of_node and result["problem"] else None
    for node, reason in filter(None, gather_objects(info, problem)):
        logger.warning("data.stage_to%s: %s; reading the images from %s", node, printable(reason), printable(source))
    return None if result["copy"] is None else Path(result["copy"])


def _copy(stage_to: str, source: Path, indexes: dict[str, Index], *, show: bool) -> Path:
    if expand(stage_to).resolve().is_relative_to(source.resolve()):
        raise StagingError(f"{stage_to} is inside {source}")

    def fill(writer: FolderWriter) -> None:
        block = os.statvfs(writer.images).f_frsize
        needed = sum(int((-(-index.sizes // block)).sum()) for index in indexes.values()) * block
        require_free_space(writer.images, needed)
        _copy_files(indexes, writer)

    total = sum(int(index.sizes.sum()) for index in indexes.values())
    digest = " ".join(f"{split} {index.fingerprint} {index.times}" for split, index in indexes.items())
    return prepare_folder(stage_to, source, digest, total, fill, show=show)


def _copy_files(indexes: dict[str, Index], writer: FolderWriter) -> None:
    def copy_files(task: tuple[str, int]) -> None:
        split, first = task
        index = indexes[split]
        for i in range(first, min(first + FILES_PER_TASK, len(index))):
            if writer.stopped.is_set():
                return
            relative = index.relative_path(i)
            path = f"{index.root}/{relative}"
            with open(path, "rb", buffering=0) as reader:  # noqa: PTH123  # faster, for millions of files
                writer.write(reader, f"{split}/{relative}", int(index.sizes[i]))

    tasks = ((split, first) for split, index in indexes.items() for first in range(0, len(index), FILES_PER_TASK))
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for _ in pool.map(copy_files, tasks):
                pass
        finally:
            writer.stopped.set()  # if a signal interrupted the loop, the threads stop soon, too
