"""Collectives: shared arrays, sums, averages, and the values of all ranks.

All ranks call these functions in the same order. With a single rank they return their input.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distil_tl.distributed.shared_memory import Place, SharedArrays, fill, mapped, new_memory, places_of, size_of, views

if TYPE_CHECKING:
    from distil_tl.distributed.process_group import DistInfo

PIECE = 64 << 20  # bytes of one broadcast


def share_arrays(info: DistInfo, arrays: Mapping[str, np.ndarray] | None) -> Mapping[str, np.ndarray]:
    """Rank 0's `arrays` on every rank, without pickling; the ranks of a node share one copy in memory.

    Writes are private to a rank (copy on write). The memory has no name in any file system, so nothing is left
    however the ranks end. A rank that can't access the memory of its node, for example from another container, gets
    its own copy.

    Args:
        arrays: on rank 0; None on the others.
    """
    if info.store is None:
        assert arrays is not None
        return arrays
    header = [json.dumps(places_of(arrays)) if arrays is not None else ""]
    dist.broadcast_object_list(header, src=0, device=torch.device("cpu"))
    places = [Place(*fields) for fields in json.loads(header[0])]
    size = size_of(places)
    file, memory, filling = _memory_of_node(info, size)
    try:
        if memory is not None and arrays is not None:
            fill(memory, places, arrays)
        if memory is not None:
            _send_along_tree(memory, filling.index(info.rank), filling)
        gather_objects(info, None)  # now the memory is filled on every node
    except BaseException:
        if file is not None:
            os.close(file)
        raise
    if file is not None:
        return SharedArrays(file, places)
    assert memory is not None
    return views(memory, places)


def _memory_of_node(info: DistInfo, size: int) -> tuple[int | None, np.ndarray | None, list[int]]:
    """The file descriptor of the memory that the node shares, the memory that this rank fills, uint8 [size], and ranks.

    Without shared memory the descriptor is None, and every rank fills its own. With it, the rank that made it fills it.
    The ranks are those that fill memory, rank 0 first.
    """
    leads = info.launch.local_rank == 0 and info.launch.local_world_size > 1
    file = new_memory(size) if leads else None
    fill = None if file is None else mapped(file, size, mmap.ACCESS_WRITE)
    offers = gather_objects(info, None if file is None else [info.launch.node, *_address(file)])
    if fill is None:
        offer = next((offer[1:] for offer in offers if offer and offer[0] == info.launch.node), None)
        file = None if offer is None or info.is_main else _opened(offer, size)
        fill = np.empty(size, np.uint8) if file is None else None
    # A rank that fails must not close its file before the others have opened it: it is open once all have answered.
    filling = [rank for rank, fills in enumerate(gather_objects(info, fill is not None)) if fills]
    return file, fill, filling


def _send_along_tree(memory: np.ndarray, place: int, ranks: Sequence[int]) -> None:
    """Copy the bytes of the first of `ranks`, which is rank 0, to the others: one rank of each node, in most cases.

    A rank receives from one other and sends to at most log2(len(ranks)) others. A broadcast would take the bytes
    to every rank, and rank 0's node would send them eight times with eight ranks a node. A process group of these
    ranks would avoid that too. But torch creates a group with other code than a collective uses: on CUDA, in some
    versions, with code that waits for every rank (pytorch#197568).

    Args:
        place: of this rank among `ranks`.
    """
    for start in range(0, len(memory), PIECE):
        piece = torch.from_numpy(memory[start : start + PIECE])
        distance = 1
        while distance < len(ranks):
            if place < distance and place + distance < len(ranks):
                dist.send(piece, ranks[place + distance])
            elif distance <= place < 2 * distance:
                dist.recv(piece, ranks[place - distance])
            distance *= 2


def _address(file: int) -> tuple[int, int, int, int]:
    """Numbers with which another process of this machine and user can open the file and check its identity."""
    status = os.fstat(file)
    return os.getpid(), file, status.st_dev, status.st_ino


def _opened(address: Sequence[int], size: int) -> int | None:
    """Open another process's file; None if it isn't visible here, for example in a container with other pids."""
    process, number, device, inode = address
    path, expected = f"/proc/{process}/fd/{number}", (device, inode, size)
    try:
        status = os.stat(path)  # noqa: PTH116 - checked first: opening a pipe or terminal has side effects
        if (status.st_dev, status.st_ino, status.st_size) != expected:
            return None
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None


def sum_over_ranks(info: DistInfo, tensor: Tensor) -> Tensor:
    """The element-wise sum of `tensor` over all ranks, in place."""
    if info.store is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def max_over_ranks(info: DistInfo, value: float) -> float:
    """The largest `value` of all ranks."""
    return max_of_each_over_ranks(info, [value])[0]


def max_of_each_over_ranks(info: DistInfo, values: Sequence[float]) -> list[float]:
    """The largest of each of `values` over all ranks."""
    if info.store is None:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    largest: list[float] = tensor.tolist()
    return largest


def gather_objects(info: DistInfo, value: Any) -> list[Any]:
    """The JSON-able values of all ranks, by rank."""
    if info.store is None:
        return [value]
    texts: list[Any] = [None] * info.world_size
    dist.all_gather_object(texts, json.dumps(value))
    return [json.loads(text) for text in texts]


def gather_rows(info: DistInfo, rows: Tensor, at_most: int) -> Tensor:
    """The rows of all ranks, concatenated. `rows` is a CPU float tensor [n, k]; n <= `at_most` may differ by rank."""
    if info.store is None:
        return rows
    padded = rows.new_full((at_most, rows.shape[1]), float("nan"))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(info.world_size)]
    dist.all_gather(parts, padded)
    everything = torch.cat(parts)
    return everything[~everything.isnan().all(dim=1)]


def gather_uneven_rows(info: DistInfo, rows: Tensor) -> Tensor:
    """The rows of all ranks, concatenated. `rows` is a CPU tensor [n, k]; n may be large, and differ by rank.

    One rank sends at a time, so memory is needed for the rows alone, and not for as many of each rank.
    """
    if info.store is None:
        return rows
    parts = []
    for rank, count in enumerate(gather_objects(info, len(rows))):
        if count:
            part = rows.contiguous() if rank == info.rank else rows.new_empty(count, rows.shape[1])
            dist.broadcast(part, src=rank)
            parts.append(part)
    return torch.cat(parts) if parts else rows


def average_over_ranks(info: DistInfo, buffers: Sequence[Tensor]) -> None:
    """Average float tensors of one dtype over the ranks, in place, all in one reduction."""
    if info.store is None or not buffers:
        return
    flat = torch.cat([buffer.reshape(-1) for buffer in buffers]) / info.world_size
    dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    averages = torch.split(flat, [buffer.numel() for buffer in buffers])
    for buffer, average in zip(buffers, averages, strict=True):
        buffer.copy_(average.view_as(buffer))
