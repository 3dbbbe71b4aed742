"""Loader processes: the memory that they share, and the number of their CPUs."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, get_worker_info

from distil_tl.data.config import default_workers
from distil_tl.data.index import Index
from distil_tl.data.loader import ImageDataset, choose_workers, warn_of_few_cpus
from distil_tl.data.sampler import SampleKey
from distil_tl.data.scan import scan
from distil_tl.data.transforms import eval_transform
from distil_tl.distributed.launch_env import Launch
from distil_tl.models.preprocess import Preprocess
from distil_tl.utils.log import setup_console
from tests.helpers.shared_memory import LINUX, files_in_memory


def dataset_of(index: Index) -> ImageDataset:
    return ImageDataset(index, eval_transform(Preprocess(), 32), 32)


# Memory.


def test_an_index_holds_no_object_for_each_image(folder: Path) -> None:
    """Reading a Python object copies its memory into the loader process; reading an array does not."""
    index = scan(folder / "train")
    for name, value in vars(index).items():
        if name == "classes":
            assert len(value) == 3
        elif name in ("copy", "shared", "weights"):
            assert value is None
        else:
            assert isinstance(value, (np.ndarray, int, str, Path)), name
            assert not isinstance(value, np.ndarray) or value.dtype != object


class _WhereIs(ImageDataset):
    """Returns facts about the index in the loader process, instead of images."""

    def __getitem__(self, key: SampleKey) -> Any:
        assert get_worker_info() is not None
        assert self.index.copy == Path("/copy")
        self.index.targets[key.image] += 100  # must not be visible to other processes
        return self.index.relative_path(key.image), os.getpid(), files_in_memory()


@LINUX
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_share_the_index(folder: Path, method: str) -> None:
    index = dataclasses.replace(scan(folder / "train"), copy=Path("/copy"))
    dataset = _WhereIs(index, eval_transform(Preprocess(), 32), 32)
    names, before = [index.relative_path(i) for i in range(6)], index.targets[:6].tolist()
    keys: Any = [SampleKey(i, 0, i) for i in range(6)]
    others = files_in_memory()
    loader: Any = DataLoader(
        dataset, sampler=keys, batch_size=1, num_workers=2, multiprocessing_context=method, collate_fn=list
    )
    found = [row for rows in loader for row in rows]
    assert [name for name, _, _ in found] == names
    assert len({process for _, process, _ in found} - {os.getpid()}) == 2
    here = files_in_memory() - others
    assert len(here) == 1
    assert all(there == here for _, _, there in found)
    assert dataset.index.targets[:6].tolist() == before


@pytest.fixture
def as_a_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distil_tl.data.index.get_spawning_popen", lambda: "one that starts")


@LINUX
@pytest.mark.usefixtures("as_a_process_starts")
def test_an_index_is_shared_once_for_all_workers(folder: Path) -> None:
    dataset = dataset_of(scan(folder / "train"))
    first, second = dataset.__getstate__()["index"], dataset.__getstate__()["index"]
    assert first is second is first.to_share()
    assert set(first.__getstate__()) & {"names", "offsets", "targets", "sizes"} == set()


@LINUX
@pytest.mark.usefixtures("as_a_process_starts")
def test_an_index_with_other_arrays_is_not_shared(folder: Path) -> None:
    other = dataclasses.replace(scan(folder / "train").to_share(), targets=np.array([7]))
    state = other.__getstate__()
    assert state["targets"] is other.targets
    assert state["shared"] is None


@LINUX
def test_an_index_that_is_copied_holds_its_arrays(folder: Path) -> None:
    shared = scan(folder / "train").to_share()
    again = pickle.loads(pickle.dumps(shared))
    assert again.shared is None
    assert again.targets.tolist() == shared.targets.tolist()


@LINUX
@pytest.mark.usefixtures("as_a_process_starts")
def test_an_index_under_another_name_stays_shared(folder: Path) -> None:
    shared = scan(folder / "train").to_share()
    other = dataclasses.replace(shared, root=Path("/else"))
    assert other.to_share() is other
    again = Index.__new__(Index)
    again.__setstate__(other.__getstate__())
    assert again.root == Path("/else")
    assert again.fingerprint == shared.fingerprint
    assert again.names.ctypes.data == shared.names.ctypes.data


def test_without_shared_memory_an_index_is_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distil_tl.distributed.shared_memory.new_memory", lambda size: None)
    index = scan(folder / "train")
    assert index.to_share() is index
    again = pickle.loads(pickle.dumps(index))
    assert again.relative_path(3) == index.relative_path(3)
    assert again.sizes.tolist() == index.sizes.tolist()


# CPUs.


def slurm(tasks: int) -> Launch:
    return Launch(world_size=tasks, local_world_size=tasks, launcher="slurm")


@pytest.fixture
def cpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_(mine: int, machine: int, step: int | None = None) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(mine)), raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: machine)
        monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
        if step is not None:
            monkeypatch.setenv("SLURM_CPUS_ON_NODE", str(step))

    return set_


@pytest.mark.parametrize(("cpus_", "workers"), [(1, 0), (2, 1), (8, 7), (17, 16), (128, 16)])
def test_workers_by_cpus(cpus_: int, workers: int) -> None:
    assert default_workers(cpus_) == workers


@pytest.mark.parametrize(
    ("launch", "mine", "step", "workers"),
    [
        (Launch(), 16, None, 15),
        (Launch(world_size=8, local_world_size=8, launcher="torchrun"), 96, None, 11),
        (Launch(world_size=8, local_world_size=8, launcher="torchrun"), 96, 96, 11),  # in a batch script
        (slurm(8), 12, 96, 11),  # bound to 12 of its own
        (slurm(8), 96, 96, 11),  # not bound
        (slurm(8), 1, 8, 0),
        (Launch(world_size=4, local_world_size=4, launcher="torchrun"), 2, None, 0),
    ],
)
def test_the_cpus_of_a_rank(cpus, launch: Launch, mine: int, step: int | None, workers: int) -> None:
    cpus(mine, 96, step)
    assert choose_workers(launch, None) == workers
    assert choose_workers(launch, 3) == 3


@pytest.mark.parametrize(
    ("launch", "mine", "step", "workers", "said"),
    [
        (slurm(2), 1, 2, None, "1 of the machine's 64 CPUs, and none is left for loader processes"),
        (slurm(2), 4, 8, 6, "4 of the machine's 64 CPUs, and data.workers is 6"),
        (Launch(), 64, None, 65, "64 of the machine's 64 CPUs, and data.workers is 65"),
        (slurm(2), 4, 8, None, None),
        (slurm(2), 4, 8, 4, None),
        (slurm(2), 1, 2, 0, None),
        (Launch(), 64, None, None, None),
        (Launch(world_size=64, local_world_size=64, launcher="torchrun"), 64, None, None, None),  # the whole machine
    ],
)
def test_too_few_cpus_cause_a_warning(cpus, capsys, launch: Launch, mine: int, step, workers, said: str | None) -> None:
    cpus(mine, 64, step)
    setup_console(True)
    warn_of_few_cpus(launch, workers)
    output = capsys.readouterr().out
    if said is None:
        assert output == ""
    else:
        assert said in output
        assert "slurm.cpus_per_task" in output
        assert "--cpus-per-task" in output
