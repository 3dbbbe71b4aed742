"""One sequence of batches for a stage: loaded over the ends of epochs, taken only when asked for."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distil_tl.data.bad_images import BadImages
from distil_tl.data.config import DataConfig
from distil_tl.data.decode import decode
from distil_tl.data.loader import Batch
from distil_tl.data.sampler import epoch_order
from distil_tl.data.scan import scan
from distil_tl.data.source import ImageSource
from distil_tl.data.stage_batches import StageBatches
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.process_group import DistInfo
from distil_tl.models.preprocess import Preprocess
from tests.helpers.images import make_folder

SIZE, BATCH, EPOCHS = 16, 8, 3


def batches_of(folder: Path, workers: int, rank: int = 0, world: int = 1) -> StageBatches:
    """The batches of a stage of 3 epochs of 6 steps, on one rank."""
    info = DistInfo(Launch(rank=rank, world_size=world), torch.device("cpu"), 1.0)
    config = DataConfig(root=str(folder), global_batch_size=BATCH, workers=workers)
    splits = {split: scan(folder / split) for split in ("train", "val")}
    source = ImageSource(info, config, splits, Preprocess(), BadImages("skip"))
    sampler, val_sampler = source.sampler(seed=0, stage="full", epochs=EPOCHS), source.eval_batches("val")
    dataset = source.train_dataset("train", SIZE, "light", seed=0, stage="full")
    return StageBatches(
        source, sampler, source.train_loader(dataset, sampler, BATCH // world), val_sampler,
        source.eval_loader("val", SIZE, val_sampler),
    )  # fmt: skip


def content(batch: Batch) -> tuple[list[int], bytes]:
    return batch.indices.tolist(), batch.images.numpy().tobytes()


def take(batches: StageBatches, count: int) -> list[tuple[list[int], bytes]]:
    return [content(batches.next()) for _ in range(count)]


def processes() -> set[int | None]:
    return {process.pid for process in multiprocessing.active_children()}


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[tuple[list[int], bytes]]:
    """All training batches of the stage."""
    batches = batches_of(folder, workers=0)
    batches.start(0, 0)
    return take(batches, 18)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("epoch", "done"), [(0, 3), (1, 0), (1, 6), (2, 5)])
def test_a_stage_continues_from_any_position(
    folder: Path, whole: list[tuple[list[int], bytes]], workers: int, epoch: int, done: int
) -> None:
    batches = batches_of(folder, workers)
    batches.start(epoch, done * BATCH)
    first = 6 * epoch + done
    assert take(batches, 18 - first) == whole[first:]
    with pytest.raises(StopIteration):
        batches.next()


def test_no_loader_process_starts_at_the_end_of_an_epoch(folder: Path) -> None:
    before = processes()
    batches = batches_of(folder, workers=1)
    batches.start(0, 0)
    batches.next()
    batches.start_val()
    started = processes() - before
    assert len(started) == 2
    left = 5
    for _ in range(EPOCHS):
        take(batches, left)
        assert processes() - before == started
        assert len(list(batches.evaluation())) == 4
        assert processes() - before == started
        left = 6
    del batches
    gc.collect()
    wait_for(lambda: not processes() & started)


def test_the_next_batches_are_loaded_before_they_are_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing asks for a batch, as during an evaluation or a checkpoint."""

    def noted(path: Path, *, min_side: int | None, intensity: str) -> torch.Tensor:
        with (tmp_path / "loaded").open("a") as file:
            file.write(f"{path.relative_to(folder)}\n")
        return decode(path, min_side=min_side)

    def loaded(split: str) -> list[str]:
        return [line for line in (tmp_path / "loaded").read_text().splitlines() if line.startswith(split)]

    monkeypatch.setattr("distil_tl.data.loader.decode", noted)
    batches = batches_of(folder, workers=1)
    batches.start(0, 0)
    take(batches, 6)
    index = batches.source.index("train")
    of_second_epoch = [f"train/{index.relative_path(int(i))}" for i in epoch_order(52, 0, "full", 1)[:BATCH]]
    wait_for(lambda: loaded("train")[48:56] == of_second_epoch)
    assert not loaded("val")
    batches.start_val()
    wait_for(lambda: len(loaded("val")) >= BATCH)


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (1, 1), (0, 8)])
def test_every_evaluation_has_each_image_once(folder: Path, workers: int, world: int) -> None:
    """31 images on 8 ranks, in batches of one: the last rank has a batch less than the others in each pass."""
    ranks = [batches_of(folder, workers, rank, world) for rank in range(world)]
    for batches in ranks:
        batches.start(1, 0)
    for _ in range(EPOCHS - 1):
        shares = [[index for batch in batches.evaluation() for index in batch.indices.tolist()] for batches in ranks]
        assert sorted(itertools.chain(*shares)) == list(range(31))
    assert all(next(batches.start_val(), None) is None for batches in ranks)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_noticed_when_its_batch_is_taken(tmp_path: Path, workers: int) -> None:
    root = make_folder(tmp_path, {"train": 52, "val": 31})
    batches = batches_of(root, workers)
    index = batches.source.index("train")
    index.path(int(epoch_order(52, 0, "full", 0)[BATCH])).write_bytes(b"")  # the first of the second batch
    batches.start(0, 0)
    found = batches.source.bad_images.by_split
    batches.next()
    assert found == {}
    assert batches.next().valid.tolist() == [False] + 7 * [True]
    assert len(found["train"]) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_draws_no_random_numbers_of_the_training(folder: Path, workers: int) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    batches = batches_of(folder, workers)
    batches.start(0, 0)
    batches.next()
    next(batches.start_val())
    assert torch.equal(torch.get_rng_state(), before)
