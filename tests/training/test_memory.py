"""Out of memory: passes over fewer images, the same results, a record of it."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distil_tl.data import loader
from distil_tl.data.loader import Batch
from distil_tl.training import autotune, batched_heads
from distil_tl.training.memory import PartSize, SavedStatistics, is_out_of_memory, part_sizes, replayed
from distil_tl.training.network import FeatureNetwork, ImageNetwork, Prefix
from distil_tl.training.precision import Compute
from distil_tl.training.step import optimizer_step
from distil_tl.utils.errors import UserError
from tests.helpers.arguments import head_args, small_args
from tests.helpers.memory import SmallDevice, info_of_one, out_of_memory, train_on_small_device
from tests.helpers.ranks import lines, run_ranks, train
from tests.helpers.runs import losses, summary_of
from tests.helpers.torchrun import ENVIRONMENT, TORCHRUN

train_module: Any = importlib.import_module("distil_tl.train")

EXACT = ("model.name=shufflenet_v2_x0_5", "data.augment=none", "stages.full.epochs=1")  # no dropout


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTIL_TL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (out_of_memory(), True),
        (MemoryError(), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 8 bytes"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("expected scalar type Float but found Half"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_recognised(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    compiling = RuntimeError("backend='inductor' raised an error")
    compiling.__cause__ = error
    assert is_out_of_memory(compiling) is expected


def batch_of(count: int) -> Batch:
    numbers = torch.arange(count)
    return Batch(torch.rand(count, 3, 2, 2), numbers, numbers, numbers >= 0, [])


@pytest.mark.parametrize(("count", "size", "expected"), [(8, None, [8]), (8, 8, [8]), (8, 3, [3, 3, 2]), (1, 4, [1])])
def test_a_batch_is_divided_in_order(count: int, size: int | None, expected: list[int]) -> None:
    parts = PartSize("training", "training", {} if size is None else {"training": size}).split(batch_of(count))
    assert [len(part.images) for part in parts] == expected
    assert torch.cat([part.targets for part in parts]).tolist() == list(range(count))


def test_a_pass_is_repeated_with_half_the_images() -> None:
    sizes: list[int] = []

    def network(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > 3:
            raise out_of_memory()
        return images * 2

    record: dict[str, int] = {}
    part_size = PartSize("evaluation", "the evaluation", record)
    images = torch.rand(10, 2)
    assert torch.equal(part_size.apply(network, images), images * 2)
    assert sizes == [10, 5, 3, 3, 3, 1]
    part_size.agree(info_of_one())
    assert record == {"evaluation": 3}


def test_one_image_that_does_not_fit_is_an_error_with_a_remedy() -> None:
    def network(images: torch.Tensor) -> torch.Tensor:
        raise out_of_memory()

    with pytest.raises(UserError, match="too little memory for the evaluation, even with 1 image at once: use a small"):
        PartSize("evaluation", "the evaluation").apply(network, torch.rand(4, 2))


def test_other_errors_are_raised() -> None:
    def network(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        PartSize("evaluation", "the evaluation").apply(network, torch.rand(4, 2))


def test_a_step_is_repeated_with_the_same_batches() -> None:
    batches, taken = iter([batch_of(1), batch_of(2), batch_of(3)]), list[Batch]()
    source = partial(next, batches)
    first = next(replayed(source, 2, taken))
    assert [len(batch.images) for batch in replayed(source, 2, taken)] == [1, 2]
    assert taken[0] is first
    assert len(source().images) == 3


@pytest.mark.parametrize(
    ("count", "size", "smallest", "expected"),
    [(8, 3, 1, [3, 3, 2]), (15, 2, 2, [2] * 6 + [3]), (3, 3, 2, [3]), (1, 2, 2, [1])],
)
def test_a_last_part_that_is_too_small_is_added_to_the_one_before(
    count: int, size: int, smallest: int, expected: list[int]
) -> None:
    assert part_sizes(count, size, smallest) == expected


def test_statistics_are_restored() -> None:
    norm = torch.nn.BatchNorm2d(3)
    assert norm.running_mean is not None
    saved = SavedStatistics([norm.running_mean])
    saved.save()
    norm(torch.rand(4, 3, 2, 2) + 5)
    saved.restore()
    assert torch.equal(norm.running_mean, torch.zeros(3))


def same_losses(run_dir: Path, reference: Path) -> None:
    for stage in ("head", "full"):
        assert losses(run_dir, stage) == pytest.approx(losses(reference, stage), rel=1e-3)
    assert len(lines(run_dir)) == len(lines(reference))


@pytest.fixture(scope="module")
def reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("memory") / "reference"
    assert train([*small_args(folder), *EXACT, f"run_dir={run_dir}"]) == 0
    return run_dir


EMA = ("stages.head.ema=0.8", "stages.full.ema=0.9", "stages.full.lr=0.05")


@pytest.fixture(scope="module")
def averaged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("memory") / "averaged"
    assert train([*small_args(folder), *EXACT, *EMA, f"run_dir={run_dir}"]) == 0
    return run_dir


@pytest.mark.parametrize("more", [(), ("data.max_local_batch_size=4",), ("stages.full.batch_norm=train",)])
def test_a_run_completes_with_smaller_parts(
    folder: Path, tmp_path: Path, reference: Path, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    args = [*small_args(folder), *EXACT, f"run_dir={run_dir}", *more]
    statuses, failures = train_on_small_device(args, chance=0.3, seed=1, place="any")
    assert statuses == [0]
    assert failures
    if "train" not in str(more):
        same_losses(run_dir, reference)
    sizes = [stage["part_sizes"].get("training") for stage in summary_of(run_dir)["stages"].values()]
    assert any(sizes)
    messages = [line for line in capsys.readouterr().out.splitlines() if line.startswith("out of memory in")]
    assert len(messages) == len(set(messages)), "each size is reported once"
    assert ("BatchNorm statistics" in str(messages)) == ("train" in str(more))


def ranks_on_small_devices(args: list[str], place: str) -> tuple[list[int], int]:
    return train_on_small_device(args, chance=0.3, seed=3, place=place)


@pytest.mark.parametrize("place", ["forward", "loss", "backward"])
def test_ranks_agree_and_complete(folder: Path, tmp_path: Path, reference: Path, place: str) -> None:
    """In a forward pass a rank repeats the step by itself. After it DDP waits for the others: the ranks start again."""
    args = [*small_args(folder), *EXACT, f"run_dir={tmp_path}/run", "checkpoint.every_steps=2"]
    ended = run_ranks(2, ranks_on_small_devices, args, place)
    assert [statuses[-1] for statuses, _ in ended] == [0, 0]
    assert ended[0][0] == ended[1][0], "the ranks start again together"
    assert (len(ended[0][0]) > 1) == (place != "forward")
    assert sum(failures for _, failures in ended)
    same_losses(tmp_path / "run", reference)
    assert any(stage["part_sizes"] for stage in summary_of(tmp_path / "run")["stages"].values())


@pytest.mark.parametrize(("world", "place"), [(1, "any"), (2, "backward")])
def test_the_average_of_weights_is_that_of_a_run_with_enough_memory(
    folder: Path, tmp_path: Path, averaged: Path, world: int, place: str
) -> None:
    """A step that is repeated counts once, and ranks that start again restore the average and the raw weights."""
    args = [*small_args(folder), *EXACT, *EMA, f"run_dir={tmp_path}/run", "checkpoint.every_steps=2"]
    ended = run_ranks(world, ranks_on_small_devices, args, place)
    assert {statuses[-1] for statuses, _ in ended} == {0}
    assert sum(failures for _, failures in ended)
    assert (len(ended[0][0]) > 1) == (place == "backward")
    same_losses(tmp_path / "run", averaged)
    for name, path in (("average", "weights.safetensors"), ("raw", "train_state.pt")):
        one, two = (run_dir / "checkpoints" / "last" / path for run_dir in (tmp_path / "run", averaged))
        if name == "average":
            found, expected = load_file(one), load_file(two)
        else:
            found, expected = torch.load(one)["raw"], torch.load(two)["raw"]
        assert found.keys() == expected.keys()
        for key in found:
            assert torch.allclose(found[key].double(), expected[key].double(), rtol=1e-3, atol=1e-4), (name, key)


SABOTAGE = """
import os, sys
if any("distil_tl.train" in word for word in sys.orig_argv) and "RANK" in os.environ:
    from tests.helpers.memory import SmallDevice
    applied = SmallDevice(1.0, 3, "backward").applied()
    applied.__enter__()
"""


def test_processes_of_torchrun_start_again(folder: Path, tmp_path: Path, reference: Path) -> None:
    """Once: from then on they take fewer images."""
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    args = [*small_args(folder), *EXACT, "stages.full.epochs=0", f"run_dir={tmp_path}/run", "resume=never"]
    ended = subprocess.run(
        [*TORCHRUN, "-m", "distil_tl.train", *args], env={**ENVIRONMENT, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "the run starts again from its last checkpoint" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert losses(tmp_path / "run", "head") == pytest.approx(losses(reference, "head"), rel=1e-3)


def test_a_smaller_size_is_kept_on_resume(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [*small_args(folder), *EXACT, f"run_dir={tmp_path}/run", "stages.full.epochs=0"]
    with monkeypatch.context() as patch, SmallDevice(1.0, 1, "forward").applied():
        patch.setattr(train_module, "optimizer_step", optimizer_step_and_signal)
        assert train(args) == 3
    state = json.loads((tmp_path / "run" / "checkpoints" / "last" / "state.json").read_text())
    assert state["run"]["stages"]["head"]["part_sizes"] == {"training": 2}
    sizes: list[int] = []
    whole = FeatureNetwork.forward

    def forward(self: Any, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            sizes.append(len(images))
        return whole(self, images)

    monkeypatch.setattr(FeatureNetwork, "forward", forward)
    assert train(args) == 0
    assert set(sizes) == {2}


def optimizer_step_and_signal(*args: Any) -> None:
    optimizer_step(*args)
    os.kill(os.getpid(), signal.SIGTERM)


def test_too_little_memory_to_load_images_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def decode(*args: Any, **options: Any) -> torch.Tensor:
        raise MemoryError

    args = [*small_args(folder), f"run_dir={tmp_path}/run", "stages.head.epochs=0"]
    monkeypatch.setattr(loader, "decode", decode)
    assert train(args) == 2
    assert "distil_tl.train: this machine has too little memory to load images: use fewer" in capsys.readouterr().err


def test_evaluation_and_features_continue_with_smaller_parts(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for network in (ImageNetwork, Prefix):
        whole = network.forward

        def forward(self: Any, images: torch.Tensor, whole: Any = whole) -> Any:
            if len(images) > 3:
                raise out_of_memory()
            return whole(self, images)

        monkeypatch.setattr(network, "forward", forward)
    args = head_args(folder, tmp_path / "run", "precision=fp32")
    assert train(args) == 0
    stages = summary_of(tmp_path / "run")["stages"]
    assert stages["head"]["part_sizes"]["features"] <= 3
    assert stages["full"]["part_sizes"]["training"] <= 3
    assert stages["full"]["part_sizes"]["evaluation"] <= 3


def test_a_trial_takes_fewer_images() -> None:
    seen: list[int] = []

    def step(compute: Compute, count: int) -> None:
        seen.append(count)
        if count > 2:
            raise out_of_memory()

    options = [Compute(None, True), Compute(None, False)]
    chosen = autotune.choose(
        info_of_one(), options, step, what="the trial", images=8, remaining=10**6, depends_on={"test": os.getpid()}
    )
    assert chosen in options
    assert sorted(set(seen)) == [2, 4, 8]


def test_a_search_continues_with_fewer_heads_at_once(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ["stages.head.search.lr=[0.1,0.01,0.001,0.0001]", "stages.full.epochs=0"]
    assert train(head_args(folder, tmp_path / "whole", *search)) == 0
    step = batched_heads.BatchedHeads.step

    def small(self: Any, batch: Any) -> None:
        if len(self.weight) > 2:
            raise out_of_memory()
        step(self, batch)

    monkeypatch.setattr(batched_heads.BatchedHeads, "step", small)
    assert train(head_args(folder, tmp_path / "parts", *search)) == 0
    assert "in 2 rounds with fewer heads each" in capsys.readouterr().out
    one, two = (summary_of(tmp_path / name)["stages"]["head"]["search"] for name in ("whole", "parts"))
    assert one["lr"] == two["lr"]
    assert [head["loss"] for head in two["heads"]] == pytest.approx([head["loss"] for head in one["heads"]], rel=1e-4)
    monkeypatch.setattr(batched_heads.BatchedHeads, "step", lambda self, batch: (_ for _ in ()).throw(out_of_memory()))
    assert train(head_args(folder, tmp_path / "none", *search)) == 2


def test_the_process_starts_again_with_the_same_command(tmp_path: Path) -> None:
    code = """
import os, sys
from distil_tl.utils.command import exit_process
if os.environ.get("AGAIN"):
    print("again", os.getpid(), sys.argv[1:])
    sys.exit(0)
os.environ["AGAIN"] = "1"
print("first", os.getpid())
opened = os.open("/dev/null", os.O_RDONLY)
os.set_inheritable(opened, True)
exit_process(4)
"""
    (tmp_path / "program.py").write_text(code)
    command = [sys.executable, str(tmp_path / "program.py"), "an argument"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n")
    first, again = output[0].split(), output[1].split(maxsplit=2)
    assert first[1] == again[1]
    assert again[2] == "['an argument']"
