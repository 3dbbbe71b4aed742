"""Judgement of collectives, folders, space and weights, from results that are made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from distil_tl.distributed.launch_env import Launch
from distil_tl.doctor import folders, group, space, weights
from distil_tl.doctor.folders import FolderFacts
from distil_tl.doctor.images import ImagesFound, judge_pixels
from distil_tl.doctor.lines import FAIL, OK, WARN, Report
from distil_tl.doctor.meeting import LONGEST, Meeting
from distil_tl.doctor.weights import ModelFound
from distil_tl.models.config import ModelConfig
from distil_tl.models.weight_sources import weights_file
from distil_tl.training.config import OptimConfig, StageConfig
from distil_tl.utils.errors import UserError
from tests.helpers.doctor import found, gpu_rank
from tests.helpers.ranks import free_port

MODEL = ModelFound(image_size=224, parameters=1 << 20, trainable=1 << 18, head_width=512)


def test_nccl_on_some_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert group.backends_of("cuda", "auto") == ["gloo", "nccl"]
    assert group.backends_of("cuda", "gloo") == group.backends_of("cpu", "auto") == ["gloo"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    fine, hung = {"rate": 2e9}, {"problem": "an all-reduce did not end within 60 s"}
    report = Report()
    results = {0: {"gloo": fine, "nccl": hung}, 1: {"gloo": {"rate": 1e9}, "nccl": {"problem": "NCCL error"}}}
    group.judge_collectives(report, ["gloo", "nccl"], results, 3)
    assert found(report, OK) == [
        "collectives/gloo: 3 ranks add up right; an all-reduce of 64 MiB runs at 1.00 GB/s, GLOO_SOCKET_IFNAME=ib0"
    ]
    silent, hung_line, failed = found(report, FAIL)
    assert silent == "collectives/ranks: rank 2 did not answer after the all-reduce; see their output"
    assert hung_line.startswith("collectives/nccl: rank 0: an all-reduce did not end within 60 s; can the nodes reach")
    assert "rank 1: NCCL error" in failed


def test_folders_of_several_nodes() -> None:
    def folder(path: str, problem: str | None = None) -> FolderFacts:
        return FolderFacts(path, "/", problem, 1 << 30)

    both = {"cache": folder("/c"), "data.root": folder("/d")}
    ranks = [gpu_rank(0, folders=both), gpu_rank(2, folders={**both, "data.root": folder("/d", "/d does not exist")})]
    report = Report()
    folders.judge_folders(report, ranks, {0: [], 2: ["cache"]}, lambda name: name != "cache")
    assert found(report, FAIL) == [
        "folders/data.root: rank 2: /d does not exist; all ranks must see the images, under the same path"
    ]
    (line,) = found(report, WARN)
    assert "what rank 0 writes there is not visible to rank 2 on n1, so stages cannot train on features" in line


def test_space_for_features_and_checkpoints(tmp_path: Path) -> None:
    folder, images = FolderFacts(str(tmp_path), str(tmp_path), None, 10 << 20), ImagesFound(3, {"train": 10_000})
    head = StageConfig(unfreeze="head", features="on")
    report = Report()
    space.judge_features(report, folder, MODEL, images, {"head": head}, {"head": "none"})
    assert found(report, FAIL)[0].startswith("disk/stages.head: 10 MiB free for 19.5 MiB of features in ")
    report = Report()
    space.judge_features(report, folder, MODEL, images, {"head": StageConfig(unfreeze="head")}, {"head": "none"})
    assert "else the frozen part runs in each epoch" in found(report, WARN)[0]
    report = Report()
    space.judge_features(report, folder, MODEL, images, {"head": StageConfig(unfreeze="head")}, {"head": "light"})
    assert report.lines == []

    space.judge_checkpoints(report, folder, MODEL, OptimConfig(), 2, {})
    assert found(report, FAIL)[0].startswith(
        "disk/checkpoints: 10 MiB free for 24 MiB: up to 4 checkpoints of up to 6 MiB"
    )
    report = Report()
    space.judge_checkpoints(report, folder, MODEL, OptimConfig(), 2, {"head": StageConfig(ema=0.9)})
    assert "up to 4 checkpoints of up to 7 MiB" in found(report, FAIL)[0]  # with the raw weights
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000001/weights.safetensors").write_bytes(bytes(15 << 20))  # will be replaced
    report = Report()
    space.judge_checkpoints(report, folder, MODEL, OptimConfig(), 2, {})
    assert found(report, FAIL) == []

    report, images.bytes = Report(), 10 << 20
    space.judge_copy(report, folder, "flowers", images, None)
    assert "the images will be read from flowers instead" in found(report, WARN)[0]


def test_a_collective_that_hangs_does_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread is given up after `seconds`; NCCL must not end the process at the same time."""
    asked: dict[str, Any] = {}

    def form(backend: str, **options: Any) -> None:
        asked.update(options)
        raise RuntimeError("asked")

    monkeypatch.setattr("torch.distributed.init_process_group", form)
    meeting: Any = SimpleNamespace(store=MagicMock(), launch=Launch())
    assert "asked" in group.try_collectives(meeting, ["gloo"], None, 5.0)["gloo"]["problem"]
    assert asked["timeout"].total_seconds() == LONGEST > 5.0


def test_ranks_that_decode_to_different_pixels() -> None:
    report = Report()
    ranks = [gpu_rank(0, pixels={"JPEG": "a", "HEIF": "b"}), gpu_rank(1, pixels={"JPEG": "a", "HEIF": ""}), gpu_rank(2)]
    judge_pixels(report, ranks)
    (line,) = found(report, FAIL)
    assert line.startswith("data/decoders: rank 0 and rank 1 (no decoder) would decode HEIF images to different pixels")


def test_damaged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub._hub_dir", None)
    config = ModelConfig("resnet18", weights="default")
    path = weights_file(config)[0]
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_bytes(b"an error page")
    report = Report()
    weights.judge_weights(report, config, [gpu_rank(0)])
    assert found(report, FAIL)[0].startswith(
        f"model/model.weights: {path} is damaged: its checksum is wrong; delete it"
    )


def test_a_store_that_can_not_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch(1, 2, 1, 2, url=f"tcp://127.0.0.1:{free_port()}", launcher="slurm")
    with pytest.raises(UserError, match="rank 1 can't reach the store .* at 127.0.0.1:.*Connection refused") as refused:
        Meeting(launch, 0.2)
    assert refused.value.one_rank
