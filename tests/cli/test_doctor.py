"""`distil-tl doctor`: planted faults are named, in one process."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from distil_tl.cli import doctor_plan
from distil_tl.cli.doctor import main
from distil_tl.data.config import DataConfig
from distil_tl.data.pixels import pixel_digests
from distil_tl.data.scan import scan
from distil_tl.doctor import facts, folders, gpus
from distil_tl.rundir.start import Start
from tests.helpers.arguments import WITHOUT_TIMM, small_args
from tests.helpers.doctor import lines_of, problems
from tests.helpers.fake_slurm import FakeSlurm
from tests.helpers.paths import ROOT

Doctor = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def doctor(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Run the command on a small run with other values. Returns the exit status, and lines `fail group/name: text`."""

    def run(*args: str, data: Path = folder) -> tuple[int, list[str]]:
        status = main(["--json", *small_args(data), WITHOUT_TIMM, f"run_dir={tmp_path}/run", *args])
        content = json.loads(capsys.readouterr().out)
        assert content["works"] == (status == 0)
        return status, lines_of(content)

    return run


def test_a_run_that_will_work(doctor: Doctor, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    status, lines = doctor()
    assert status == 0
    assert problems(lines) == []
    shown = "\n".join(lines)
    for expected in (
        "ok ranks/present: 1 of 1 on ",
        "ok configuration/batch: 8 images a step = 1 rank x 1 micro-batch x 8 images",
        "ok data/train: 52 images of 3 classes, ",
        "ok data/val, decoded: 16 of 16 images tried, ",
        "ok model/model.weights: none: random weights",
        "ok disk/checkpoints: ",
        "ok tracking/W&B: disabled",
        f"ok run/start: it begins in {tmp_path}/run",
    ):
        assert expected in shown
    assert sorted(tmp_path.rglob("*")) == before
    sample = (ROOT / "docs/doctor.md").read_text().partition("```text\n")[2].partition("```")[0]
    names = {line.split(": ")[0].partition("/")[2] for line in lines if not line.startswith("ok versions/not ")}
    assert [name for name in names if f"  {name} " not in sample] == [], "the sample in docs/doctor.md is old"


def test_wrong_keys_and_values(doctor: Doctor) -> None:
    status, lines = doctor("optim.nam=sgd", "data.workers=many")
    assert status == 2
    shown = "\n".join(problems(lines))
    assert "fail configuration/arguments: unknown key `optim.nam`, did you mean `name`?" in shown
    assert "fail configuration/arguments: `data.workers`: " in shown
    assert any(line.startswith("ok versions/main: distil_tl ") for line in lines), "the machine is checked anyway"
    assert any(line.startswith("ok data/train: 52 images") for line in lines), "and all that can be read"
    assert any(line.startswith("ok model/model.name: shufflenet") for line in lines)
    assert shown.count("fail ") == 2

    status, lines = doctor("model.name=resnet5O", "data.global_batch_size=0", "data.root=nowhere")
    assert status == 2
    shown = "\n".join(problems(lines))
    assert (
        "model.name=resnet5O is not a torchvision classifier (timm models are written timm/NAME), did you mean" in shown
    )
    assert "data.global_batch_size must be at least 1" in shown
    assert "data.root=nowhere is not a folder" in shown
    assert shown.count("nowhere") == 1, "by one check"


def test_what_auto_will_be(doctor: Doctor) -> None:
    status, lines = doctor("data.global_batch_size=auto", "stages.head.epochs=auto")
    assert (status, problems(lines)) == (0, [])
    assert "ok configuration/auto: data.global_batch_size=8, stages.head.epochs=50 (52 training images)" in lines
    assert any(line.startswith("ok model/stages.head: epochs: auto, ") for line in lines)


def test_what_the_crop_will_be(doctor: Doctor, data: Path) -> None:
    for path in data.rglob("*.png"):
        Image.open(path).resize((40, 30)).save(path)
    _, lines = doctor(data=data)
    assert "ok configuration/auto: data.crop_mode=squash, data.augment=flip (52 training images)" in lines


def test_a_stage_or_size_that_the_model_does_not_have(doctor: Doctor) -> None:
    status, lines = doctor("stages.full.unfreeze=[layer9]")
    assert status == 2
    assert "fail model/model.name: stages.full.unfreeze names layer9; the model's groups are" in "\n".join(lines)


def test_an_empty_class_and_one_that_train_lacks(doctor: Doctor, data: Path) -> None:
    (data / "train/thistle").mkdir()
    (data / "val/nois").mkdir()
    status, lines = doctor(data=data)
    assert status == 2
    shown = "\n".join(problems(lines))
    assert "fail data/train: class folders without images" in shown
    (data / "train/thistle").rmdir()
    status, lines = doctor(data=data)
    assert status == 2
    assert "fail data/val: " in "\n".join(lines)
    assert "did you mean `noise`?" in "\n".join(lines)


def test_a_class_that_val_lacks_is_a_warning(doctor: Doctor, data: Path) -> None:
    for image in (data / "val/noise").iterdir():
        image.unlink()
    status, lines = doctor(data=data)
    assert status == 0
    (line,) = problems(lines)
    assert line.startswith("warn data/val: no images of noise: ")


def test_fewer_images_than_a_batch(doctor: Doctor) -> None:
    status, lines = doctor("data.global_batch_size=64")
    assert status == 2
    assert "has 52 images, fewer than one global batch; set data.global_batch_size to at most 52" in problems(lines)[0]


def test_an_image_that_can_not_be_decoded(doctor: Doctor, data: Path) -> None:
    first = min((data / "train/circles").iterdir())
    first.write_bytes(first.read_bytes()[:90])
    status, lines = doctor(data=data)
    assert status == 2
    (line,) = problems(lines)
    assert line.startswith(f"fail data/train: {first} can't be used: ")
    status, lines = doctor("data.on_bad_image=skip", data=data)
    assert status == 0
    assert problems(lines)[0].startswith(f"warn data/train: {first} can't be used: ")


def test_all_images_that_can_not_be_used_are_named(doctor: Doctor, data: Path) -> None:
    damaged = [path for split in ("train", "val") for path in sorted((data / split / "noise").iterdir())[1:3]]
    for path in damaged:
        path.write_bytes(b"damaged")
    status, lines = doctor("--images", data=data)
    assert status == 2
    assert [line.partition(" can't be used")[0].partition(": ")[2] for line in problems(lines)] == [*map(str, damaged)]
    assert "ok data/train, decoded: 50 of 52 images tried" in "\n".join(lines)


def test_a_run_directory_that_can_not_be_written_to(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, lines = doctor(f"run_dir={tmp_path}/file/run")
    assert status == 2
    assert f"fail folders/run_dir: {tmp_path}/file is not a folder; choose another run_dir" in lines


def test_a_disk_that_is_too_small(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_free", lambda path: 2 << 20)
    status, lines = doctor()
    assert status == 2
    (line,) = problems(lines)
    assert line.startswith("fail disk/checkpoints: 2 MiB free for ")
    assert "choose another run_dir, or lower checkpoint.keep" in line


def test_limits_of_the_machine(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "free_shared_memory", lambda: 4096)
    monkeypatch.setattr(facts, "has_memory_files", lambda: False)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))
    status, lines = doctor("data.workers=2")
    assert status == 0
    assert [line.partition(":")[0] for line in problems(lines)] == ["warn machine//dev/shm", "warn machine/open files"]


def test_gpus_that_torch_can_not_use(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "device_files", lambda: [Path("/dev/nvidia0")])
    monkeypatch.setattr(gpus, "why_unavailable", lambda: "The NVIDIA driver on your system is too old")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    status, lines = doctor("distributed.device=auto")
    assert status == 0, "training uses the CPU"
    (line,) = problems(lines)
    assert "torch cannot use them: The NVIDIA driver on your system is too old; repair that, or set" in line
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    status, lines = doctor("distributed.device=auto")
    assert status == 2
    assert "fail GPUs/device: this job was given GPUs (SLURM_JOB_GPUS=0,1), but torch sees none: " in "\n".join(lines)


def test_the_devices_of_a_login_node_do_not_count(
    doctor: Doctor, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "device_files", lambda: [Path("/dev/nvidia0")])
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    _, lines = doctor("slurm.nodes=2", "slurm.time=1:00:00", "distributed.device=auto", "data.workers=40",
                      "data.stage_to=$DISK_OF_A_NODE")  # fmt: skip
    assert [line for line in lines if "GPUs/" in line or "machine/" in line or "stage_to" in line] == [
        "ok GPUs/device: not looked at: a node of the job decides",
        "ok configuration/data.stage_to: not looked at: it is on the disk of each node of the job",
    ]


def test_a_tar_file_that_can_not_be_unpacked(
    doctor: Doctor, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar, disk = tmp_path / "flowers.tar", tmp_path / "disk"
    with tarfile.open(tar, "w") as file:
        file.add(data, "flowers")
    disk.mkdir()
    args = [f"data.root={tar}", f"data.stage_to={disk}"]
    assert doctor(*args)[0] == 0
    status, lines = doctor(args[0], "data.stage_to=$NO_SUCH_DISK/x")
    assert status == 2
    (line,) = problems(lines)
    assert line.startswith("fail configuration/data.stage_to: NO_SUCH_DISK is not set in ")
    status, lines = doctor(args[0], f"data.stage_to={tar}/disk")
    assert status == 2
    assert f"fail folders/data.stage_to: {tar} is not a folder; {folders.UNPACKED}" in lines
    monkeypatch.setattr(folders, "_free", lambda path: 1000 if path == disk else 1 << 40)
    status, lines = doctor(*args)
    assert status == 2
    (line,) = problems(lines)
    assert line.startswith("fail disk/data.stage_to: 0.977 KiB free for ")
    (disk / "flowers-0123/ready").mkdir(parents=True)
    assert doctor(*args)[0] == 0, "it may be unpacked already"


@pytest.mark.parametrize(
    "look", ["distil_tl.config.loading._saved_configuration", "distil_tl.models.config.Path.is_file"]
)
def test_arguments_on_a_server_that_does_not_answer(look: str, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    over, original = threading.Event(), Path.is_file

    def hang(given: Any) -> bool | None:
        if isinstance(given, Path):
            return over.wait(10) if given.name == "weights.pt" else original(given)
        return None if given.run_dir is None else over.wait(10)

    monkeypatch.setattr(look, hang)
    status, lines = doctor("--timeout", "1", "model.weights=dead/weights.pt")
    over.set()
    assert status == 2
    (line,) = problems(lines)
    assert line.startswith("fail ranks/arguments: reading the arguments and the files that they name did not end")
    assert any(line.startswith("ok folders/cache: ") for line in lines), "the rest is checked"


def test_a_run_that_can_not_be_resumed(
    doctor: Doctor, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {split: scan(data / split) for split in ("train", "val")}
    saved = {"data": {name: index.fingerprint for name, index in splits.items()}, "pixels": pixel_digests(DataConfig())}
    start = Start(f"{tmp_path}/run", f"{tmp_path}/run/checkpoints/step-00000006", saved)
    monkeypatch.setattr(doctor_plan, "look_for_start", lambda *args: start)
    status, lines = doctor(data=data)
    assert status == 0
    assert lines[-1] == f"ok run/start: it resumes from {start.checkpoint}"
    saved["pixels"]["JPEG"] = "other"
    assert problems(doctor(data=data)[1])[0].startswith("fail run/start: the installed image decoder (JPEG by ")
    del saved["pixels"]
    min((data / "train/circles").iterdir()).unlink()
    status, lines = doctor(data=data)
    assert status == 2
    (line,) = problems(lines)
    assert line.startswith(f"fail run/start: the images in {data}/train differ from those that this run was started")


def test_missing_weights_without_network(doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(address: tuple[str, int], timeout: float) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub._hub_dir", None)
    status, lines = doctor("model.weights=default")
    assert status == 2
    (line,) = problems(lines)
    assert line.startswith("fail model/model.weights: torchvision IMAGENET1K_V1 must be downloaded on ")
    assert "Network is unreachable" in line
    assert "run `distil-tl prefetch` with the same arguments" in line

    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: SimpleNamespace(close=lambda: None))
    status, lines = doctor("model.weights=default")
    assert status == 0
    assert problems(lines)[0].startswith("warn model/model.weights: torchvision IMAGENET1K_V1 will be downloaded on ")


def test_a_partition_that_does_not_exist(doctor: Doctor, slurm: FakeSlurm) -> None:
    script = slurm.folder / "sinfo"
    script.write_text("#!/bin/sh\necho 'gpu|up|gpu:4|64'\n")
    script.chmod(0o755)
    status, lines = doctor("slurm.partition=gpus", "slurm.nodes=3", "slurm.gpus_per_node=1", "slurm.time=soon")
    assert status == 2
    shown = "\n".join(problems(lines))
    assert "fail configuration/values: data.global_batch_size=8 can't be divided evenly among 3 processes" in shown or (
        "fail Slurm/slurm: slurm.time=soon is not a time limit" in shown
    )
    assert "fail Slurm/slurm.partition: there is no partition gpus, did you mean `gpu`?" in shown


def test_a_job_that_slurm_could_never_run(doctor: Doctor, slurm: FakeSlurm) -> None:
    slurm.refuse("sbatch_test", "allocation failure: Requested node configuration is not available")
    status, lines = doctor("slurm.nodes=2")
    assert status == 2
    assert "fail Slurm/job: this cluster can't run the job: Requested node configuration is not available" in (
        "\n".join(problems(lines))
    )
    assert not slurm.jobs


def test_an_incomplete_launch_environment(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, lines = doctor()
    assert status == 2
    assert problems(lines)[0].startswith(
        "fail ranks/environment: the environment looks like torchrun's (WORLD_SIZE set)"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--jsn"], "unknown option --jsn"),
        *([["--timeout", text], f"argument --timeout: '{text}' is not a number"] for text in ("0", "nan", "inf", "1m")),
        (["--timeout=-1"], "argument --timeout: '-1' is not a number of seconds above 0, up to 86400"),
    ],
)
def test_options(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(args)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_itself(folder: Path, tmp_path: Path) -> None:
    arguments = [*small_args(folder), WITHOUT_TIMM, "run_dir=run", "data.workers=-1"]
    done = subprocess.run(
        [sys.executable, "-m", "distil_tl.cli", "doctor", *arguments],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "\n  fail  values" in done.stdout
    assert "data.workers must be 0 or more" in done.stdout
    assert done.stdout.endswith("\nIt will not work: 1 failure, no warnings.\n")
    assert list(tmp_path.iterdir()) == []
