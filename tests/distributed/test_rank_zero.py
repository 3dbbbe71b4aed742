"""Work of one rank for all: results, exceptions and keys in the store."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import Launch, read_launch
from distil_tl.distributed.process_group import DistInfo, init_distributed
from distil_tl.distributed.rank_zero import on_each_node, on_rank_zero, once_per_node
from distil_tl.utils.errors import LostRanksError, PreemptedError, UserError
from tests.helpers.ranks import rank, run_ranks

CONFIG = DistributedConfig(device="cpu", timeout_seconds=60, prepare_timeout_seconds=60)


def among(nodes: list[int], body: Callable[[DistInfo], Any]) -> Any:
    """`body` on this rank; `nodes` holds the node of each rank."""
    here = nodes[rank()]
    launch = replace(
        read_launch(os.environ),
        node=here,
        local_rank=nodes[: rank()].count(here),
        local_world_size=nodes.count(here),
    )
    try:
        with init_distributed(launch, CONFIG) as info:
            return body(info)
    except (Exception, PreemptedError) as error:
        return f"{type(error).__name__}: {error}"


def several_calls(info: DistInfo) -> list[Any]:
    return [on_rank_zero(info, "the same words", partial(list, (n, info.rank))) for n in range(3)]


def test_the_result_of_rank_zero_is_that_of_all_however_often_the_words_are_the_same() -> None:
    assert run_ranks(3, among, [0, 0, 0], several_calls) == [[[0, 0], [1, 0], [2, 0]]] * 3


def test_a_single_rank_does_the_work_itself() -> None:
    info = DistInfo(Launch(), torch.device("cpu"), 1.0)
    assert on_rank_zero(info, "work", lambda: 3) == 3
    assert on_each_node(info, "work", lambda: 4) == 4
    done: list[int] = []
    once_per_node(info, "work", lambda: done.append(1))
    assert done == [1]


def fail(info: DistInfo, error: BaseException) -> Any:
    def work() -> None:
        raise error

    dist.barrier()  # a rank that ends may cut off one that still connects, which then reports a lost rank
    return on_rank_zero(info, "reading", work)


def user_error(info: DistInfo) -> Any:
    return fail(info, UserError("no such file"))


def preempted(info: DistInfo) -> Any:
    return fail(info, PreemptedError("stopped"))


def fault(info: DistInfo) -> Any:
    return fail(info, KeyError("x"))


@pytest.mark.parametrize(
    ("body", "on_zero", "on_others"),
    [
        (user_error, "UserError: no such file", "UserError: no such file"),
        (preempted, "PreemptedError: stopped", "PreemptedError: stopped"),
        (fault, "KeyError: 'x'", f"{LostRanksError.__name__}: another rank failed: reading: 'x'"),
    ],
    ids=["user error", "preempted", "fault"],
)
def test_all_ranks_get_the_exception(body: Callable[[DistInfo], Any], on_zero: str, on_others: str) -> None:
    assert run_ranks(3, among, [0, 0, 0], body) == [on_zero, on_others, on_others]


def different_work(info: DistInfo) -> Any:
    return on_rank_zero(info, f"work of rank {info.rank}", lambda: 1)


def test_ranks_that_do_different_work_are_a_fault_and_get_no_wrong_result() -> None:
    found = run_ranks(2, among, [0, 0], different_work)
    words = "RuntimeError: the ranks do different work: another rank 'work of rank 0', rank 1 'work of rank 1'"
    assert found[1] == words


def work_on_nodes(info: DistInfo) -> Any:
    ran: list[int] = []
    once_per_node(info, "filling a cache", lambda: ran.append(info.rank))
    first = on_each_node(info, "copying", lambda: 10 * info.rank)

    def fails_on_node_one() -> None:
        if info.launch.node == 1:
            raise UserError("no space on node 1")

    try:
        on_each_node(info, "copying again", fails_on_node_one)
    except UserError as error:
        return [ran, first, str(error)]
    return None


def test_work_of_one_rank_of_each_node() -> None:
    found = run_ranks(4, among, [0, 0, 1, 1], work_on_nodes)
    error = "no space on node 1"
    assert found == [[[0], 0, error], [[], 0, error], [[2], 20, error], [[], 20, error]]
