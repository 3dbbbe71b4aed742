"""How far ahead a loader works, by bytes; and batches that do not go through /dev/shm."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distil_tl.data import prefetch
from distil_tl.data.feature_cache import feature_loader
from distil_tl.data.loader import Batch, ImageDataset, make_loader
from distil_tl.data.prefetch import Prefetch, batches_of_thread, plan_prefetch
from distil_tl.data.read_ahead import PinnedLoader
from distil_tl.data.sampler import EvalBatches, EvalSampler
from distil_tl.data.scan import scan
from distil_tl.data.transforms import eval_transform
from distil_tl.distributed.launch_env import Launch
from distil_tl.models.preprocess import Preprocess
from distil_tl.utils.log import setup_console
from tests.helpers.shared_memory import LINUX, files_in_memory

MB, GIB = 10**6, 2**30
LARGE = 3 * 224**2 * 256  # 38.5 MB, a batch of 256 images


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with this memory, and where there are no files in anonymous memory, with this /dev/shm."""

    def set_(memory: int = 1000 * GIB, shm: int | None = None, *, anonymous: bool = True) -> None:
        def statvfs(path: str) -> Any:
            assert path == "/dev/shm"
            if shm is None:
                raise FileNotFoundError(path)
            return SimpleNamespace(f_bavail=shm // 4096, f_frsize=4096)

        prefetch._warn.cache_clear()
        monkeypatch.setattr(prefetch, "available_memory", lambda: memory)
        monkeypatch.setattr(prefetch, "has_memory_files", lambda: anonymous)
        monkeypatch.setattr(os, "statvfs", statvfs)
        setup_console(True)

    set_()
    return set_


def plan(workers: int, batch_bytes: int, *, ranks: int = 1, limit_mib: int = 2048, pinned: bool = False) -> Prefetch:
    return plan_prefetch(
        Launch(world_size=ranks, local_world_size=ranks), workers, batch_bytes, limit_mib=limit_mib, pinned=pinned
    )


@pytest.mark.parametrize(
    ("workers", "batch_bytes", "limit_mib", "expected"),
    [
        (15, LARGE, 2048, Prefetch(15, 3)),  # 45 batches, 1.7 GB
        (15, LARGE, 1024, Prefetch(15, 1)),
        (15, LARGE, 1, Prefetch(15, 1)),  # at least one of each process
        (15, LARGE // 8, 2048, Prefetch(15, 8)),
        (1, LARGE // 8, 2048, Prefetch(1, 8)),  # small batches get more, within reason
        (0, LARGE, 2048, Prefetch(0, 0)),
    ],
)
def test_prefetching_is_bounded_in_bytes(
    machine: Any, capsys: pytest.CaptureFixture[str], workers: int, batch_bytes: int, limit_mib: int, expected: Prefetch
) -> None:
    found = plan(workers, batch_bytes, limit_mib=limit_mib)
    assert found == expected
    assert found.batches <= 1 or found.workers * found.batches * batch_bytes <= limit_mib << 20
    assert capsys.readouterr().out == ""


def test_pinned_memory_is_counted_as_it_is_allocated(machine: Any) -> None:
    """In powers of two: 64 MiB for 38.5 MB."""
    assert plan(15, LARGE, pinned=True) == Prefetch(15, 2)
    assert plan(1, 1 << 20, limit_mib=4, pinned=True) == Prefetch(1, 4)
    assert plan(1, (1 << 20) + 1, limit_mib=4, pinned=True) == Prefetch(1, 2)


@pytest.mark.parametrize(
    ("memory", "ranks", "expected", "said"),
    [
        (16 * GIB, 1, Prefetch(15, 3), None),
        (8 * GIB, 1, Prefetch(15, 3), None),
        (8 * GIB, 8, Prefetch(6, 1), "should use at most 268 MB of the free memory: 6 instead of 15 loader processes"),
        (0, 1, Prefetch(0, 0), "of the free memory: images are loaded in the training process"),
    ],
)
def test_little_memory_means_fewer_loader_processes(
    machine: Any, capsys: pytest.CaptureFixture[str], memory: int, ranks: int, expected: Prefetch, said: str | None
) -> None:
    machine(memory)
    assert plan(15, LARGE, ranks=ranks) == expected
    plan(15, LARGE, ranks=ranks)
    output = capsys.readouterr().out
    assert output.count("each loader process needs 39 MB for a batch") == (said is not None)  # once
    assert said is None or said in output


@pytest.mark.parametrize(
    ("shm", "batch_bytes", "ranks", "expected", "said"),
    [
        (
            64 * MB,
            LARGE // 8,
            1,
            Prefetch(4, 1),
            "/dev/shm has 64 MB free for two loaders of each rank, and a batch has 5",
        ),
        (64 * MB, LARGE, 1, Prefetch(0, 0), "images are loaded in the training process, which takes much longer"),
        (64 * MB, LARGE // 8, 8, Prefetch(0, 0), "docker run --shm-size=8g"),
        (2000 * MB, LARGE, 1, Prefetch(15, 1), None),
        (100_000 * MB, LARGE, 8, Prefetch(15, 2), None),  # as each is four open files
        (None, LARGE, 1, Prefetch(15, 2), None),  # not Linux
    ],
)
def test_a_small_dev_shm_where_batches_go_through_it(
    machine: Any, capsys: pytest.CaptureFixture[str],
    shm: int | None, batch_bytes: int, ranks: int, expected: Prefetch, said: str | None,
) -> None:  # fmt: skip
    machine(shm=shm, anonymous=False)
    found = plan(15, batch_bytes, ranks=ranks)
    assert found == expected
    if shm is not None and found.workers:
        assert 2 * ranks * (found.workers * found.batches + prefetch.IN_USE) * batch_bytes <= shm
    output = capsys.readouterr().out
    assert said in output if said else output == ""
    machine(shm=shm)
    assert plan(15, batch_bytes) == plan(15, batch_bytes)  # no matter where there is anonymous memory
    assert plan(15, batch_bytes).workers == 15


def loaded(folder: Path, workers: int) -> Iterator[Batch]:
    dataset = ImageDataset(scan(folder / "val"), eval_transform(Preprocess(), 32), 32)
    batches = EvalBatches(EvalSampler(31, world_size=1, rank=0), 8)
    return iter(make_loader(dataset, batches, workers=workers, ahead=2, pin_memory=False))


@LINUX
def test_batches_arrive_in_anonymous_memory_and_leave_none_behind(folder: Path) -> None:
    gc.collect()
    before = files_in_memory()
    batches = loaded(folder, workers=1)
    first = next(batches)
    assert files_in_memory() - before
    assert "/dev/shm/torch" not in Path("/proc/self/maps").read_text()
    assert first.images.is_contiguous()
    first.images.add_(1)  # private, not read-only
    assert len(list(batches)) == 3
    del first, batches
    gc.collect()
    assert files_in_memory() <= before


@pytest.mark.parametrize("anonymous", [True, False])
def test_batches_arrive_as_they_were_sent(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anonymous: bool
) -> None:
    if not anonymous:
        monkeypatch.setattr("distil_tl.distributed.shared_memory.new_memory", lambda size: None)
    here, there = list(loaded(folder, 0)), list(loaded(folder, 1))
    assert [len(batch.images) for batch in there] == [8, 8, 8, 7]
    for one, two in zip(here, there, strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one[:4], two[:4], strict=True))
        assert one.faults == two.faults == []


def test_faults_arrive(data: Path) -> None:
    path = scan(data / "val").path(3)
    path.write_bytes(b"")
    batch = next(loaded(data, 1))
    assert batch.faults == [(3, "the file is empty")]
    assert batch.valid.tolist() == [True] * 3 + [False] + [True] * 4


def test_a_thread_for_features_has_its_share_of_the_memory(machine: Callable[..., None]) -> None:
    assert batches_of_thread(Launch(), 12 * MB, limit_mib=64) == 4  # 16 MiB each, in pinned memory
    assert batches_of_thread(Launch(), 1, limit_mib=64) == prefetch.MOST
    machine(memory=GIB)
    assert [batches_of_thread(Launch(local_world_size=n), 48 * MB, limit_mib=2048) for n in (1, 2, 8)] == [4, 2, 1]


def test_the_ranks_of_a_node_share_the_memory_for_features(
    machine: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    machine(memory=GIB)
    features: Any = SimpleNamespace(bytes_per_image=48 * MB // 32)
    loader = feature_loader(
        features, [], 32, launch=Launch(local_world_size=8), device=torch.device("cuda"), limit_mib=2048
    )
    assert isinstance(loader, PinnedLoader)
    assert loader.ahead == 1
    assert capsys.readouterr().out == "", "no loader process is meant"
