"""Cached features: the frozen backbone runs once, and training on its features is the same training."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distil_tl.config import check, load
from distil_tl.data import feature_cache, loader
from distil_tl.data.feature_cache import FeatureCache, FeatureDataset
from distil_tl.data.sampler import SampleKey
from distil_tl.data.scan import scan
from distil_tl.models.config import ModelConfig
from distil_tl.models.graph.frozen_prefix import cut_frozen_prefix
from distil_tl.models.transfer import TransferModel, build
from distil_tl.train import main
from distil_tl.training import feature_extraction as module
from distil_tl.training import stage_setup
from distil_tl.training.config import StageConfig, wants_features
from distil_tl.training.features import Views, cache_key
from distil_tl.training.network import Prefix, lay_out, set_layout
from distil_tl.training.precision import Compute
from distil_tl.training.stage import apply_stage
from distil_tl.utils import log
from distil_tl.utils.errors import UserError
from tests.helpers.arguments import head_args
from tests.helpers.ranks import lines, run_ranks, train
from tests.helpers.runs import losses, summary_of
from tests.helpers.same_run import timeless

HEAD = StageConfig(unfreeze="head")
CPU = torch.device("cpu")
NO_FULL = "stages.full.epochs=0"
FP32 = Compute(None, True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTIL_TL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(feature_cache, "CHUNK", 16)
    monkeypatch.setattr(module, "BATCH", 8)
    return tmp_path / "cache" / "features"


def in_ranks(variables: dict[str, str], args: list[str], small_chunks: bool = True) -> int:
    os.environ |= variables
    if small_chunks:
        feature_cache.CHUNK, module.BATCH = 16, 8
    return train(args)


def built(name: str = "shufflenet_v2_x0_5", stage: StageConfig = HEAD) -> TransferModel:
    model = build(ModelConfig(name, weights="none"), 3, image_size=64, seed=0)
    set_layout(model.module, FP32)
    apply_stage(model, stage)
    return model


def prefix_of(model: TransferModel, compute: Compute = FP32) -> Prefix:
    prefix = Prefix(model, cut_frozen_prefix(model.module, torch.randn(3, 3, 64, 64)), compute, CPU)
    lay_out(prefix)
    return prefix


def views(**changes: Any) -> Views:
    return dataclasses.replace(Views(image_size=64, augment="none", hflip=True, seed=0, count=1), **changes)


# The same training.


@pytest.mark.parametrize(
    ("name", "unfreeze"),
    [
        ("shufflenet_v2_x0_5", "head"),
        ("mobilenet_v3_small", "head"),
        ("timm/tf_efficientnet_lite0", "head"),
        ("tests.helpers.small_networks:tnt", "2"),  # its features are several tensors in one
    ],
)
def test_training_on_features_is_training_on_images(
    folder: Path, tmp_path: Path, cache: Path, name: str, unfreeze: str
) -> None:
    """Also with a dropout before the head, which draws the same masks."""
    for how in ("off", "on"):
        more = (f"model.name={name}", f"stages.head.unfreeze={unfreeze}", f"stages.head.features={how}")
        args = head_args(folder, tmp_path / how, *more)
        assert main(args) == 0
    for stage in ("head", "full"):
        assert losses(tmp_path / "on", stage) == pytest.approx(losses(tmp_path / "off", stage), rel=1e-4)
    on, off = summary_of(tmp_path / "on"), summary_of(tmp_path / "off")
    assert (on["stages"]["head"]["cached"], off["stages"]["head"]["cached"]) == (True, False)
    assert not on["stages"]["full"]["cached"]
    assert on["stages"]["head"]["train_images"] == off["stages"]["head"]["train_images"]


def test_packed_features_are_not_taken_for_pooled_ones(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like feature maps they must fit in memory with features=auto, and the layers after them have a trial."""
    tried: list[str] = []

    def choose(info: object, options: list[Compute], step: object, *, what: str, **more: object) -> Compute:
        tried.append(what)
        return options[0]

    def run(name: str, *more: str) -> tuple[bool, bool]:
        tried.clear()
        assert main(head_args(folder, tmp_path / name, NO_FULL, *more)) == 0
        return summary_of(tmp_path / name)["stages"]["head"]["cached"], "the training of stage head" in tried

    monkeypatch.setattr(stage_setup, "choose", choose)
    monkeypatch.setattr(module, "available_memory", lambda: 0)
    packed = ("model.name=tests.helpers.small_networks:tnt", "stages.head.unfreeze=2")
    assert run("pooled") == (True, False)
    assert run("auto", *packed)[0] is False
    assert run("on", *packed, "stages.head.features=on") == (True, True)


def test_features_do_not_depend_on_the_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    found = {}
    for world in (1, 2, 3):
        where = tmp_path / str(world)
        args = head_args(
            folder, where / "run", NO_FULL, "stages.head.epochs=1",
            "stages.head.views=2", "data.augment=light", "data.global_batch_size=12",
        )  # fmt: skip
        assert run_ranks(world, in_ranks, {"DISTIL_TL_CACHE": str(where / "cache")}, args) == [0] * world
        files = (where / "cache" / "features").rglob("*.npy")
        found[world] = {path.relative_to(where): path.read_bytes() for path in files}
    assert len(found[1]) == 2 * 4 + 2  # two views of 52 images and one of 31, 16 at a time
    assert found[1] == found[2] == found[3]


def test_a_second_run_computes_nothing(folder: Path, tmp_path: Path, cache: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(log, "LINE_SECONDS", 0.0)
    assert main(head_args(folder, tmp_path / "one", NO_FULL)) == 0
    output = capsys.readouterr().out
    assert "features of train for stage head  14%\n" in output, "after the first of 7 batches"
    monkeypatch.setattr(module, "_compute_chunk", None)
    assert main(head_args(folder, tmp_path / "two", "stages.head.lr=0.02", NO_FULL)) == 0
    assert summary_of(tmp_path / "two")["stages"]["head"]["cached"]
    assert main(head_args(folder, tmp_path / "three", NO_FULL)) == 0
    assert timeless(lines(tmp_path / "three")) == timeless(lines(tmp_path / "one"))


def test_epochs_alternate_between_views(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 20, views=3)
    arrays = [np.full((20, 2), view, np.float32) for view in range(3)]
    dataset = FeatureDataset(cache, arrays, torch.float32, {(1, 4): "damaged"}, np.arange(20) % 5)
    for epoch in range(7):
        batch = dataset.__getitems__([SampleKey(4, epoch, 0), SampleKey(11, epoch, 1)])
        assert batch.images.tolist() == [[epoch % 3] * 2] * 2
        assert batch.targets.tolist() == [4, 1]
        assert batch.valid.tolist() == [epoch % 3 != 1, True]
        assert batch.faults == ([(4, "damaged")] if epoch % 3 == 1 else [])


def test_low_precision_survives_the_disk(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        cache = FeatureCache(tmp_path / str(dtype), 5, 1)
        features = torch.randn(5, 7).to(dtype)
        cache.write(0, 0, features, {})
        dataset = cache.open(np.zeros(5, np.int64))
        batch = dataset.__getitems__([SampleKey(i, 0, i) for i in range(5)])
        assert batch.images.dtype == dtype
        assert torch.equal(batch.images, features)


def test_bad_images_are_left_out_alike(folder: Path, tmp_path: Path, cache: Path) -> None:
    data = shutil.copytree(folder, tmp_path / "data")
    for path in sorted((data / "train" / "noise").iterdir())[:3]:
        path.write_bytes(b"broken")
    for how in ("off", "on"):
        args = head_args(data, tmp_path / how, f"stages.head.features={how}", "data.on_bad_image=skip", NO_FULL)
        assert main(args) == 0
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-4)
    assert summary_of(tmp_path / "on")["bad_images"] == summary_of(tmp_path / "off")["bad_images"]
    assert main(head_args(data, tmp_path / "error")) == 2


# Faults.


DAMAGE = ("truncated", "flipped", "no note", "no array", "another note")


def damage(array: Path, kind: str) -> None:
    content, note = array.read_bytes(), array.with_suffix(".json")
    if kind == "truncated":
        array.write_bytes(content[:-1])
    elif kind == "flipped":
        array.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif kind == "no array":
        array.unlink()
    elif kind == "no note":
        note.unlink()
    else:
        note.write_text("{")


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_chunk_is_not_valid(tmp_path: Path, kind: str) -> None:
    chunks = FeatureCache(tmp_path, 5, 1)
    chunks.write(0, 0, torch.randn(5, 2), {})
    assert chunks.is_valid(0, 0)
    damage(next(tmp_path.glob("*.npy")), kind)
    assert not chunks.is_valid(0, 0)


def test_damaged_chunks_are_computed_again(folder: Path, tmp_path: Path, cache: Path) -> None:
    assert main(head_args(folder, tmp_path / "one", NO_FULL)) == 0
    before = {path: path.read_bytes() for path in sorted(cache.rglob("*.npy"))}
    for array, kind in zip(list(before)[1:], DAMAGE, strict=True):
        damage(array, kind)
    assert main(head_args(folder, tmp_path / "two", NO_FULL)) == 0
    assert {path: path.read_bytes() for path in sorted(cache.rglob("*.npy"))} == before
    assert timeless(lines(tmp_path / "two")) == timeless(lines(tmp_path / "one"))


def test_a_killed_extraction_resumes(folder: Path, tmp_path: Path) -> None:
    variables = {"DISTIL_TL_CACHE": str(tmp_path / "cache")}
    args = head_args(folder, tmp_path / "run", NO_FULL)
    with pytest.raises(AssertionError, match="died"):
        run_ranks(2, killed_in_extraction, variables, args, 2)
    chunks = sorted((tmp_path / "cache" / "features").rglob("*.json"))
    written = {path: path.stat().st_mtime_ns for path in chunks}
    assert 1 <= len(written) < 4 + 2
    assert run_ranks(2, in_ranks, variables, args) == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in written} == written, "existing chunks are not computed again"
    assert summary_of(tmp_path / "run")["stages"]["head"]["cached"]


def killed_in_extraction(variables: dict[str, str], args: list[str], after: int) -> int:
    original: Callable[..., Any] = module._compute_chunk
    calls = []

    def compute_chunk(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == after:
            os.kill(os.getpid(), 9)
        return original(*args)

    module._compute_chunk = compute_chunk  # type: ignore[assignment]
    return in_ranks(variables, args)


def stopped_in_extraction(variables: dict[str, str], args: list[str]) -> int:
    original: Callable[..., Any] = module._compute_chunk

    def compute_chunk(info: Any, *args: Any) -> Any:
        if info.rank == 1:
            os.kill(os.getpid(), 15)
        return original(info, *args)

    module._compute_chunk = compute_chunk  # type: ignore[assignment]
    return in_ranks(variables, args)


def test_a_signal_to_one_rank_during_extraction_stops_all(folder: Path, tmp_path: Path) -> None:
    variables = {"DISTIL_TL_CACHE": str(tmp_path / "cache")}
    args = head_args(folder, tmp_path / "run", NO_FULL)
    assert run_ranks(2, stopped_in_extraction, variables, args) == [3, 3]
    assert summary_of(tmp_path / "run")["status"] == "preempted"
    assert run_ranks(2, in_ranks, variables, args) == [0, 0]


def test_a_full_disk_stops_a_run_only_if_features_are_required(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert main(head_args(folder, tmp_path / "auto", NO_FULL)) == 0
    assert not summary_of(tmp_path / "auto")["stages"]["head"]["cached"]
    assert "No space left on device" in capsys.readouterr().out
    assert main(head_args(folder, tmp_path / "on", "stages.head.features=on")) == 2
    assert "stages.head.features: they can't be written to" in capsys.readouterr().err
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_chunk_that_a_rank_does_not_find_is_noticed(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 5, 1)
    assert not cache.has_full_length(0, 0)
    cache.write(0, 0, torch.zeros(5, 2), {})
    assert cache.has_full_length(0, 0)
    array = next(tmp_path.glob("*.npy"))
    array.write_bytes(array.read_bytes()[:-1])
    assert not cache.has_full_length(0, 0)


def test_two_jobs_at_once(folder: Path, tmp_path: Path) -> None:
    variables = {"DISTIL_TL_CACHE": str(tmp_path / "cache")}
    ended: dict[str, list[int]] = {}

    def one(name: str) -> None:
        ended[name] = run_ranks(2, in_ranks, variables, head_args(folder, tmp_path / name, NO_FULL))

    jobs = [threading.Thread(target=one, args=(name,)) for name in ("one", "two")]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert ended == {"one": [0, 0], "two": [0, 0]}
    assert timeless(lines(tmp_path / "one")) == timeless(lines(tmp_path / "two"))
    assert not list((tmp_path / "cache").rglob(".*")), "no incomplete file is left"


# Keys of the cache.


def test_the_key_is_of_all_that_features_depend_on(folder: Path) -> None:
    model = built()
    index, light = scan(folder / "train"), views(augment="light")

    def key(**changes: Any) -> str:
        return cache_key(model, prefix_of(model), index, dataclasses.replace(light, **changes))

    keys = [
        key(),
        key(image_size=32),
        key(augment="none"),
        key(augment=["crop"]),
        key(hflip=False),
        key(seed=1),
        key(count=2),
    ]
    keys.append(key(pixels={"JPEG": "0123456789abcdef"}))
    keys += [key(intensity="percentile"), key(intensity=[0, 4095]), key(intensity=[0, 1023])]
    weights_own = model.preprocess
    for crop in (("squash", None), ("border", None), ("center", None), ("center", 0.9)):
        model.preprocess = weights_own.with_crop(*crop)
        keys.append(key())
    model.preprocess = weights_own
    assert key() == keys[0]
    keys.append(cache_key(model, prefix_of(model), scan(folder / "val"), light))
    keys.append(cache_key(model, prefix_of(model, Compute(torch.bfloat16, True)), index, light))
    apply_stage(model, StageConfig(unfreeze=2))
    keys.append(key())
    apply_stage(model, HEAD)
    with torch.no_grad():
        next(p for name, p in model.module.named_parameters() if model.group_of(name) == 0).add_(1e-3)
    keys.append(key())
    assert len(set(keys)) == len(keys)
    with torch.no_grad():
        model.module.get_submodule(model.heads[0]).weight.add_(1)  # type: ignore[operator]
    assert key() == keys[-1], "the head may change"
    assert key(augment="none", seed=3, hflip=False) == key(augment="none"), "no random numbers are drawn"


def test_what_a_layer_does_is_part_of_the_key_even_if_its_weights_are_the_same(folder: Path) -> None:
    index = scan(folder / "train")

    def key(padding_mode: str) -> str:
        model = built("resnet18")
        model.module.get_submodule("layer1.0.conv1").padding_mode = padding_mode  # type: ignore[assignment]
        return cache_key(model, prefix_of(model), index, views())

    assert key("zeros") == key("zeros")
    assert key("zeros") != key("reflect")


def test_images_that_were_changed_in_place_have_other_features(data: Path) -> None:
    model = built()
    keys = []
    for moment in (10**9, 10**9 + 1):
        os.utime(next((data / "train").rglob("*.png")), (moment, moment))
        keys.append(cache_key(model, prefix_of(model), scan(data / "train"), views()))
    assert keys[0] != keys[1]


def test_an_unreadable_file_may_be_readable_later(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = loader.decode  # type: ignore[attr-defined]

    def decode(path: Path, **how: Any) -> torch.Tensor:
        if path.name == "0040.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(path, **how)

    args = head_args(folder, tmp_path / "run", "data.on_bad_image=skip", NO_FULL)
    with monkeypatch.context() as broken:
        broken.setattr(loader, "decode", decode)
        assert main(args) == 2
    assert "check the disk" in capsys.readouterr().err
    assert list(cache.rglob("*.npy")), "complete chunks are kept"
    assert main(args) == 0
    assert not summary_of(tmp_path / "run").get("bad_images")


def test_features_that_cannot_be_mapped_are_not_used(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(feature_cache._libc, "mmap", lambda *args: ctypes.c_void_p(-1).value)
    assert main(head_args(folder, tmp_path / "auto", NO_FULL)) == 0
    assert summary_of(tmp_path / "auto")["stages"]["head"]["cached"] is False
    assert main(head_args(folder, tmp_path / "on", "stages.head.features=on")) == 2
    assert "they can't be mapped from" in capsys.readouterr().err


def test_a_bad_image_is_known_from_features_that_are_found(data: Path, tmp_path: Path, cache: Path) -> None:
    bad = data / "train" / "noise" / "0001.png"
    bad.write_bytes(b"no image")
    for name in ("first", "second"):
        args = head_args(data, tmp_path / name, "data.on_bad_image=skip", NO_FULL)
        assert main(args) == 0
        assert summary_of(tmp_path / name)["bad_images"]["train"]["count"] == 1
    assert main(head_args(data, tmp_path / "third", NO_FULL)) == 2


def test_when_features_are_used() -> None:
    assert wants_features(HEAD, "none")
    assert not wants_features(HEAD, "light"), "it would be another training"
    assert wants_features(StageConfig(unfreeze="head", views=2), "light")
    assert wants_features(StageConfig(unfreeze="head", features="on"), "light")
    assert not wants_features(StageConfig(unfreeze="head", features="off", views=2), "none")
    assert wants_features(StageConfig(unfreeze=2), "none")
    assert not wants_features(StageConfig(unfreeze="all"), "none")


def test_a_stage_that_can_not_use_features_is_refused(folder: Path, tmp_path: Path, cache: Path, capsys) -> None:
    assert main(head_args(folder, tmp_path / "run", "stages.full.features=on", "stages.full.unfreeze=all")) == 2
    assert "can't use features" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"stages.head.views must be at least 1"):
        check(load(["stages.head.views=0"])[0], 1)
