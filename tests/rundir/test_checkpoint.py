"""Checkpoints: atomic, verified when they are read, and limited in number."""

from __future__ import annotations

import errno
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distil_tl.rundir import checkpoint
from distil_tl.rundir.checkpoint import (
    CHECKSUMS,
    STATE,
    TRAIN_STATE,
    WEIGHTS,
    Checkpoints,
    find_damage,
    load_state,
    load_train_state,
    load_weights,
    weights_hash,
)
from distil_tl.rundir.config import CheckpointConfig
from distil_tl.utils.errors import CheckpointError, UserError
from distil_tl.utils.log import logger


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 3))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def save(checkpoints: Checkpoints, step: int, *, best: bool = False, module: nn.Module | None = None) -> Path:
    begin_save(checkpoints, step, best=best, module=module)
    checkpoints.wait()
    return checkpoints.path(step)


def begin_save(
    checkpoints: Checkpoints,
    step: int,
    *,
    best: bool = False,
    module: nn.Module | None = None,
    kept_step: int | None = None,
) -> None:
    checkpoints.save(
        step,
        weights=(module or network(step)).state_dict(),
        train_state={"step": step, "moments": torch.full((1024,), float(step))},
        state={"position": {"step": step}, "best": None},
        is_best=best,
        kept_step=kept_step,
    )


def steps(checkpoints: Checkpoints) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints.all()]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger.name)
    return caplog


# Round trips


def test_a_checkpoint_loads_as_it_was_saved(checkpoints: Checkpoints):
    module = network(1)
    path = save(checkpoints, 12, module=module)
    assert path == checkpoints.folder / "step-00000012"
    assert {file.name for file in path.iterdir()} == {WEIGHTS, TRAIN_STATE, STATE, CHECKSUMS}
    assert find_damage(path) is None

    other = network(2)
    assert weights_hash(other) != weights_hash(module)
    load_weights(path, other)
    assert weights_hash(other) == weights_hash(module)
    assert load_state(path) == {"position": {"step": 12}, "best": None}
    train_state = load_train_state(path)
    assert train_state["step"] == 12
    assert train_state["moments"].tolist() == [12.0] * 1024


def test_channels_last_weights_come_back_into_either_memory_format(checkpoints: Checkpoints):
    module = network(1).to(memory_format=torch.channels_last)
    path = save(checkpoints, 1, module=module)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        other = network(2).to(memory_format=memory_format)
        load_weights(path, other)
        assert weights_hash(other) == weights_hash(module) == weights_hash(network(1))
        assert other.get_parameter("0.weight").is_contiguous(memory_format=memory_format)


def test_loading_is_in_place(checkpoints: Checkpoints):
    path = save(checkpoints, 1)
    module = network(2)
    before = [parameter.data_ptr() for parameter in module.parameters()]
    load_weights(path, module)
    assert [parameter.data_ptr() for parameter in module.parameters()] == before


class _Versioned(nn.Linear):
    """Refuses a state dict without its version, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *more: Any) -> None:
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *more)


def test_a_network_that_requires_its_version_is_loaded(checkpoints: Checkpoints):
    path = save(checkpoints, 1, module=_Versioned(2, 2))
    other = _Versioned(2, 2)
    load_weights(path, other)
    assert torch.equal(other.weight, load_file(path / WEIGHTS)["weight"])


def test_weights_of_another_model_are_the_users_error(checkpoints: Checkpoints):
    path = save(checkpoints, 1)
    with pytest.raises(UserError, match="does not fit the model"):
        load_weights(path, nn.Linear(8, 3))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizer_state_loads_without_running_code(checkpoints: Checkpoints, name: str):
    module = network()
    options: dict[str, Any] = {"lr": 0.1, "fused": True}
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    optimizer = kind([{"params": list(module.parameters()), "param_names": ["a"] * 6, "group": "head"}], **options)
    module(torch.randn(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "scaler": torch.amp.GradScaler("cpu", enabled=False).state_dict()}
    checkpoints.save(1, weights=module.state_dict(), train_state=state, state={}, is_best=False)
    checkpoints.wait()
    restored = load_train_state(checkpoints.path(1))  # weights_only: raises on anything but plain values
    again = kind([{"params": list(module.parameters()), "param_names": ["a"] * 6, "group": "head"}], **options)
    again.load_state_dict(restored["optimizer"])
    assert again.param_groups[0]["group"] == "head"
    torch.testing.assert_close(again.state_dict()["state"], state["optimizer"]["state"], rtol=0, atol=0)


def test_a_train_state_with_code_in_it_is_refused(checkpoints: Checkpoints):
    path = save(checkpoints, 1)
    torch.save({"code": Path("x")}, path / TRAIN_STATE)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_train_state(path)


def test_the_hash_depends_on_every_byte_name_and_shape():
    one, other = network(), network()
    assert weights_hash(one) == weights_hash(other)
    other.get_buffer("1.running_mean")[3] += 1e-7
    assert weights_hash(one) != weights_hash(other)
    assert weights_hash(nn.Linear(2, 3, bias=False)) != weights_hash(nn.Linear(3, 2, bias=False))


# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, Path.unlink])
@pytest.mark.parametrize("name", [WEIGHTS, TRAIN_STATE, STATE])
def test_damage_is_found_and_the_file_named(checkpoints: Checkpoints, name: str, damage: Callable[[Path], None]):
    path = save(checkpoints, 1)
    damage(path / name)
    fault = find_damage(path)
    assert fault is not None
    assert name in fault


@pytest.mark.parametrize("damage", [flip_a_bit, empty, Path.unlink])
def test_damaged_checksums_are_found(checkpoints: Checkpoints, damage: Callable[[Path], None]):
    path = save(checkpoints, 1)
    damage(path / CHECKSUMS)
    assert find_damage(path)


def test_checksums_that_leave_out_a_file_are_a_fault(checkpoints: Checkpoints):
    path = save(checkpoints, 1)
    lines = (path / CHECKSUMS).read_text().splitlines(keepends=True)
    (path / CHECKSUMS).write_text("".join(lines[:1]))
    assert find_damage(path)


def test_a_damaged_checkpoint_is_skipped_with_a_warning(checkpoints: Checkpoints, warnings: pytest.LogCaptureFixture):
    valid = save(checkpoints, 1)
    assert checkpoints.newest_valid() == valid
    assert not warnings.records
    flip_a_bit(save(checkpoints, 2) / WEIGHTS)
    assert checkpoints.newest_valid() == valid
    (record,) = warnings.records
    assert "step-00000002 is damaged (weights.safetensors does not match its checksum)" in record.getMessage()
    truncate(valid / STATE)
    assert checkpoints.newest_valid() is None
    assert warnings.records[-1].getMessage().endswith("; there is no earlier one")


def test_a_new_folder_has_no_checkpoint(checkpoints: Checkpoints):
    assert checkpoints.all() == []
    assert checkpoints.newest_valid() is None
    assert checkpoints.named("last") is None


# Number of checkpoints, and their links


def test_the_newest_are_kept_and_the_best(checkpoints: Checkpoints):
    save(checkpoints, 1)
    assert steps(checkpoints) == [1]
    save(checkpoints, 2, best=True)
    save(checkpoints, 3)
    save(checkpoints, 4)
    assert steps(checkpoints) == [2, 3, 4]
    save(checkpoints, 5)
    assert steps(checkpoints) == [2, 4, 5]
    save(checkpoints, 6, best=True)
    assert steps(checkpoints) == [5, 6]
    save(checkpoints, 7)
    save(checkpoints, 8)
    assert steps(checkpoints) == [6, 7, 8]


def test_damaged_checkpoints_do_not_cause_valid_ones_to_be_removed(checkpoints: Checkpoints):
    for step in (1, 2):
        save(checkpoints, step)
    for step in (8, 9):  # damaged, then trained again from step 2 with other intervals
        shutil.copytree(checkpoints.path(2), checkpoints.path(step))
        truncate(checkpoints.path(step) / WEIGHTS)
    for step in (3, 4):
        save(checkpoints, step)
    assert [path.name[-1] for path in checkpoints.all()] == ["3", "4", "8", "9"]
    save(checkpoints, 10)
    assert [path.name[-2:] for path in checkpoints.all()] == ["09", "10"]


def test_keeping_one(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, best=True)
    save(checkpoints, 2)
    save(checkpoints, 3)
    assert steps(checkpoints) == [1, 3]
    assert CheckpointConfig(keep=1).problems() == []
    assert CheckpointConfig(keep=0).problems() == ["checkpoint.keep must be at least 1"]


def test_the_links_survive_moving_the_run(checkpoints: Checkpoints, tmp_path: Path):
    save(checkpoints, 1, best=True)
    save(checkpoints, 2)
    for name, target in (("last", "step-00000002"), ("best", "step-00000001")):
        link = checkpoints.folder / name
        assert link.is_symlink()
        assert str(link.readlink()) == target
    moved = Checkpoints(checkpoints.folder.rename(tmp_path / "elsewhere"))
    assert moved.named("last") == moved.path(2)
    assert moved.named("best") == moved.path(1)
    assert find_damage(moved.folder / "best") is None


def test_a_copy_with_folders_in_place_of_links(checkpoints: Checkpoints, tmp_path: Path):
    """As made by `cp -rL`, `scp -r` and network drives."""
    save(checkpoints, 1, best=True)
    save(checkpoints, 2)
    copied = Checkpoints(shutil.copytree(checkpoints.folder, tmp_path / "copy"))
    assert not (copied.folder / "best").is_symlink()
    assert copied.named("best") == copied.folder / "best"
    assert find_damage(copied.folder / "best") is None
    copied.repair_links(copied.path(2), copied.path(1))
    assert (copied.named("last"), copied.named("best")) == (copied.path(2), copied.path(1))
    save(copied, 3)
    assert copied.named("last") == copied.path(3)
    assert sorted(path.name for path in copied.folder.iterdir()) == [
        "best", "last", "step-00000001", "step-00000002", "step-00000003",
    ]  # fmt: skip


def test_a_broken_link_names_no_checkpoint(checkpoints: Checkpoints):
    shutil.rmtree(save(checkpoints, 1))
    assert (checkpoints.folder / "last").is_symlink()
    assert checkpoints.named("last") is None


def test_a_step_is_saved_again(checkpoints: Checkpoints):
    save(checkpoints, 1, module=network(1))
    path = save(checkpoints, 1, module=network(2), best=True)
    assert steps(checkpoints) == [1]
    assert find_damage(path) is None
    module = network(3)
    load_weights(path, module)
    assert weights_hash(module) == weights_hash(network(2))
    assert checkpoints.named("best") == path


@pytest.mark.parametrize("left", ["", ".replaced"])
def test_a_step_is_saved_again_after_a_kill_in_the_middle_of_that(checkpoints: Checkpoints, left: str):
    """Killed after the old checkpoint was renamed: before the new one had its name, and after."""
    path = save(checkpoints, 1, module=network(1))
    shutil.copytree(path, path.with_name("step-00000001.replaced"))
    if not left:
        shutil.rmtree(path)
    newest = checkpoints.newest_valid()
    assert newest is not None
    assert find_damage(newest) is None
    save(checkpoints, 1, module=network(2))
    module = network(3)
    load_weights(path, module)
    assert weights_hash(module) == weights_hash(network(2))
    assert checkpoints.named("last") == path


# In the background


def test_what_is_saved_is_as_it_was_when_save_was_called(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    go = threading.Event()

    def later(*args: Any) -> None:
        assert go.wait(30)
        save_file(*args)

    monkeypatch.setattr(checkpoint, "save_file", later)
    module = network(1)
    begin_save(checkpoints, 1, module=module)
    assert checkpoints.all() == []
    for parameter in module.parameters():
        parameter.data.zero_()
    go.set()
    checkpoints.wait()
    load_weights(checkpoints.path(1), module)
    assert weights_hash(module) == weights_hash(network(1))


@pytest.mark.parametrize("next_call", ["save", "wait"])
def test_an_error_of_a_save_is_raised_once_by_the_next_call(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, next_call: str
):
    save(checkpoints, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", failing)
        begin_save(checkpoints, 2)
        with pytest.raises(CheckpointError, match=r"step-00000002: no space left.*step-00000001, is kept"):
            begin_save(checkpoints, 3) if next_call == "save" else checkpoints.wait()
    checkpoints.wait()
    save(checkpoints, 4)
    assert steps(checkpoints) == [1, 4]


def test_tied_weights_are_saved(checkpoints: Checkpoints):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    path = save(checkpoints, 1, module=module)
    before = weights_hash(module)
    load_weights(path, module)
    assert weights_hash(module) == before


# Interruption


def failing(*_args: Any, **_kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


@pytest.mark.parametrize(
    "where",
    ["save_file", "torch.save", "write_json", "sha256_file", "write_atomic", "os.fsync", "fsync_directory"],
)
def test_an_interrupted_save_leaves_the_old_ones(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, where: str):
    old = save(checkpoints, 1, best=True)
    with monkeypatch.context() as patch:
        owner, _, name = where.rpartition(".")
        patch.setattr(getattr(checkpoint, owner) if owner else checkpoint, name, failing)
        with pytest.raises(CheckpointError, match=r"the last good one, step-00000001, is kept"):
            save(checkpoints, 2)

    assert checkpoints.named("last") == checkpoints.named("best") == old
    # The folder is renamed last, so a folder with this name is complete.
    assert checkpoints.newest_valid() == (checkpoints.path(2) if where == "fsync_directory" else old)
    module = network(9)
    load_weights(old, module)
    assert weights_hash(module) == weights_hash(network(1))

    save(checkpoints, 2)
    assert steps(checkpoints) == [1, 2]
    assert checkpoints.newest_valid() == checkpoints.named("last") == checkpoints.path(2)
    assert not list(checkpoints.folder.glob(".*"))


def test_files_left_by_a_killed_save_are_removed(checkpoints: Checkpoints):
    partial = checkpoints.folder / ".step-00000007.partial"
    partial.mkdir(parents=True)
    (partial / WEIGHTS).write_bytes(b"half of it")
    assert checkpoints.all() == []
    save(checkpoints, 8)
    assert not partial.exists()


@pytest.mark.parametrize("limit", [64, 3000], ids=["weights", "train state"])
def test_a_full_disk(checkpoints: Checkpoints, limit: int):
    """A limit on file sizes simulates the full disk: each library reports it in its own way."""
    resource = pytest.importorskip("resource")
    old = save(checkpoints, 1)
    assert (old / WEIGHTS).stat().st_size < 3000 < (old / TRAIN_STATE).stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"the last good one, step-00000001, is kept"):
            save(checkpoints, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints.newest_valid() == checkpoints.named("last") == old
    assert not list(checkpoints.folder.glob(".*"))


def test_the_best_of_a_stage_is_kept_while_the_stage_needs_it(checkpoints: Checkpoints) -> None:
    for step in range(1, 6):
        begin_save(checkpoints, step, best=step == 1, kept_step=2)
    checkpoints.wait()
    assert [path.name[-1] for path in checkpoints.all()] == ["1", "2", "4", "5"]
    save(checkpoints, 6)
    assert [path.name[-1] for path in checkpoints.all()] == ["1", "5", "6"]
