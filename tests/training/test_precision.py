"""Precision and memory format of a stage: tuned where that saves time, agreed on by all ranks, recorded and kept."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from distil_tl import evaluate
from distil_tl.distributed.config import DistributedConfig
from distil_tl.distributed.launch_env import read_launch
from distil_tl.distributed.process_group import DistInfo, init_distributed
from distil_tl.train import main
from distil_tl.training import autotune
from distil_tl.training.autotune import choose
from distil_tl.training.precision import Compute, candidates, default_compute
from tests.helpers.arguments import small_args
from tests.helpers.ranks import lines, run_ranks

CPU = torch.device("cpu")
FP32, CONTIGUOUS, BF16 = Compute(None, True), Compute(None, False), Compute(torch.bfloat16, True)
WAYS = [FP32, CONTIGUOUS, BF16]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTIL_TL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "precision"


def test_the_candidates() -> None:
    convolutional, other = nn.Conv2d(3, 4, 3), nn.Linear(3, 4)
    assert candidates("auto", convolutional, CPU) == WAYS
    assert candidates("auto", other, CPU) == [CONTIGUOUS, Compute(torch.bfloat16, False)]
    assert candidates("bf16", convolutional, CPU) == [BF16], "a configured precision has no trial"
    assert default_compute("fp32", other, CPU) == CONTIGUOUS
    assert [str(way) for way in WAYS] == ["fp32 channels_last", "fp32", "bf16 channels_last"]
    assert [Compute.parse(str(way)) for way in WAYS] == WAYS


def chosen(
    seconds: dict[Compute, float], *, remaining: int = 10**6, info: DistInfo | None = None, of: str = "x"
) -> str:
    steps: list[Compute] = []

    def step(way: Compute, images: int) -> None:
        steps.append(way)
        if seconds[way] < 0:
            raise RuntimeError("this operator is not there in bfloat16")
        time.sleep(seconds[way])

    def ask(info: DistInfo) -> str:
        way = choose(info, WAYS, step, what="a test", images=4, remaining=remaining, depends_on={"of": of})
        return f"{way} after {len(steps)}"

    if info is not None:
        return ask(info)
    with init_distributed(read_launch({}), DistributedConfig(device="cpu")) as info:
        return ask(info)


def test_the_fastest_candidate_is_chosen_and_cached(cache: Path) -> None:
    speeds = {FP32: 0.05, CONTIGUOUS: 0.1, BF16: 0.01}
    assert chosen(speeds) == "bf16 channels_last after 12"
    assert chosen({FP32: 0, CONTIGUOUS: 0.1, BF16: 0.1}) == "bf16 channels_last after 0", "the same request"
    assert chosen({FP32: 0, CONTIGUOUS: 0.1, BF16: 0.1}, of="y") == "fp32 channels_last after 12", "another request"
    for path in cache.iterdir():
        path.write_text("{")
    assert chosen({FP32: 0, CONTIGUOUS: 0.1, BF16: 0.1}) == "fp32 channels_last after 12", "a damaged file is ignored"


def test_the_default_is_replaced_only_for_a_clear_gain() -> None:
    assert chosen({FP32: 0.044, CONTIGUOUS: 0.1, BF16: 0.04}) == "fp32 channels_last after 12"


def test_no_trial_in_a_short_stage() -> None:
    assert chosen({FP32: 0.1, CONTIGUOUS: 0, BF16: 0}, remaining=100) == "fp32 channels_last after 0"


def test_a_candidate_that_fails_is_skipped() -> None:
    assert chosen({FP32: 0.05, CONTIGUOUS: 0, BF16: -1}) == "fp32 after 9"
    assert chosen({FP32: -1, CONTIGUOUS: 0.05, BF16: -1}, of="y") == "fp32 after 6"


def rank_with_a_speed_of_its_own(cache: str) -> str:
    os.environ["DISTIL_TL_CACHE"] = cache
    with init_distributed(read_launch(os.environ), DistributedConfig(device="cpu", timeout_seconds=60)) as info:
        mine = {FP32: 0.05, CONTIGUOUS: 0.02 if info.rank else 0.2, BF16: 0.2 if info.rank else 0.02}
        return chosen(mine, info=info)


def test_ranks_agree_on_the_best_for_the_slowest(tmp_path: Path) -> None:
    assert run_ranks(2, rank_with_a_speed_of_its_own, str(tmp_path)) == ["fp32 channels_last after 12"] * 2


def preferring(way: Compute, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    shutil.rmtree(cache, ignore_errors=True)
    monkeypatch.setattr(autotune, "WORTH", 0)
    monkeypatch.setattr(autotune, "_time", lambda info, ways, step, images: [0.1 if w == way else 1.0 for w in ways])


def test_a_resumed_run_keeps_its_precision(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    args = [*small_args(folder), f"run_dir={run}"]
    preferring(BF16, monkeypatch, cache)
    assert main([*args, "checkpoint.every_steps=1", "checkpoint.keep=20"]) == 0
    whole = [line["loss"] for line in lines(run)]
    stages = json.loads((run / "summary.json").read_text())["stages"]
    assert {stages[name][key] for name in stages for key in ("precision", "prefix_precision")} == {str(BF16)}

    for path in (run / "checkpoints").glob("step-*"):  # as if killed within the second stage
        if int(path.name.split("-")[1]) > 8:
            shutil.rmtree(path)
    (run / "summary.json").unlink()
    preferring(FP32, monkeypatch, cache)
    assert main([*args, "checkpoint.every_steps=1", "checkpoint.keep=20"]) == 0
    assert [line["loss"] for line in lines(run)] == whole, "it continues in bf16"

    assert evaluate.main([str(run), "--json", str(tmp_path / "again.json")]) == 0
    found, again = (json.loads(path.read_text()) for path in (run / "evaluation.json", tmp_path / "again.json"))
    assert again["loss"] == pytest.approx(found["loss"], rel=1e-6), "evaluation uses the precision of training"
    assert main([*args[:-1], f"run_dir={tmp_path / 'other'}"]) == 0
    assert [line["loss"] for line in lines(tmp_path / "other")] != whole, "and the other run uses fp32"


def test_a_trial_leaves_no_trace(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    general = [*small_args(folder), "stages.full.batch_norm=train", "stages.full.unfreeze=all"]
    assert main([*general, f"run_dir={tmp_path / 'without'}"]) == 0
    monkeypatch.setattr(autotune, "WORTH", 0)
    monkeypatch.setattr(autotune, "MARGIN", float("inf"))
    assert main([*general, f"run_dir={tmp_path / 'with'}"]) == 0
    assert list((tmp_path / "cache" / "precision").iterdir()), "there was a trial"
    assert [line["loss"] for line in lines(tmp_path / "with")] == [line["loss"] for line in lines(tmp_path / "without")]


def test_what_is_compiled(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiled.append(type(self).__name__))
    for what in ("none", "prefix", "all"):
        assert main([*small_args(folder), f"run_dir={tmp_path / what}", f"compile={what}"]) == 0
    assert compiled == ["Prefix", "Prefix", "SplitNetwork", "SplitNetwork"]


def test_several_passes_a_step_are_compiled_without_cuda_graphs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str | None] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: modes.append(how["mode"]))
    more = ["compile=all", "data.max_local_batch_size=4", "stages.full.epochs=0"]
    for mode in ("reduce-overhead", "max-autotune"):
        assert main([*small_args(folder), *more, f"run_dir={tmp_path / mode}", f"compile_mode={mode}"]) == 0
    assert modes == ["reduce-overhead", None, "max-autotune", "max-autotune-no-cudagraphs"]
