"""The benchmarks work, and measure what they are meant to measure. No test checks a figure."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from benchmarks import images, measure, pipeline
from benchmarks.measure import Measured, Results, Spread, interleaved, markdown, run_process
from benchmarks.peers import __main__ as peers
from benchmarks.peers import chart, comparison, installs, ours, parity, plain, shared, summary, trial, with_timm
from benchmarks.peers.job import Events, Job, Speed, lr_factor, read_events
from distil_tl.distributed import preemption
from distil_tl.training import metrics, optim
from distil_tl.utils.errors import UserError
from tests.helpers.devices import no_waiting, on_gpu


def test_packages_are_measured_in_alternating_order() -> None:
    assert list(interleaved(["a", "b"], 3)) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def test_tables() -> None:
    assert Spread.of([3.0, 1.0, 20.0]).text() == "3.0 (1.0-20.0)"
    assert Spread.of([1234.5]).text(0) == "1,234"
    assert markdown(["a", "b"], [[1, None]]) == "| a | b |\n| --- | --- |\n| 1 | - |\n"


def test_results_can_be_resumed_and_belong_to_one_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out" / "r.json"
    first = Results(path, {"epochs": 1, "mean": (1, 2)})
    first.add("a", 0, Measured(0.0, 1.5, 1.0, 10.0, 0.0, 0.1), top1=0.5)
    assert first.once("trial", lambda: 7) == 7
    again = Results(path, {"epochs": 1, "mean": (1, 2)})
    assert again.has("a", 0)
    assert not again.has("a", 1)
    assert again.of("a")[0]["seconds"] == 1.5
    assert again.once("trial", lambda: 8) == 7
    with pytest.raises(UserError, match="different: epochs"):
        Results(path, {"epochs": 2, "mean": (1, 2)})
    assert not Results(path, {"epochs": 2}, fresh=True).has("a", 0)
    monkeypatch.setattr(measure, "machine", lambda: {**first.content["machine"], "cpu": "another"})
    with pytest.raises(UserError, match="another machine or .*different: cpu"):
        Results(path, {"epochs": 1, "mean": (1, 2)})
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(UserError, match="not a file of benchmark results"):
        Results(tmp_path / "other.json", {})


def test_the_error_of_a_failed_process_has_its_output(tmp_path: Path) -> None:
    log = tmp_path / "log"
    measured = run_process([sys.executable, "-c", "print('fine')"], {}, log)
    assert measured.seconds > 0
    assert measured.peak_mb > 1
    assert measured.began <= time.time()
    with pytest.raises(RuntimeError, match=r"status 3.*\nlost"):
        run_process([sys.executable, "-c", "print('lost'); raise SystemExit(3)"], {}, log)


def test_a_process_that_exceeds_its_timeout_is_killed_with_its_children(tmp_path: Path) -> None:
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    with pytest.raises(RuntimeError, match="longer than 2 s"):
        run_process([sys.executable, "-c", child], {}, tmp_path / "log", timeout=2)
    pid = int((tmp_path / "log").read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child is still running")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--python", "fastai"], "NAME=VALUE"),
        (["--python", "keras=/bin/sh"], "unknown peer keras"),
        (["--repeats", "0"], "at least 1"),
        (["--peers", "keras"], "invalid choice"),
    ],
)
def test_wrong_options_of_peers_are_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        peers.main(args)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_an_interpreter_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--peers", "plain", "--python", f"plain={tmp_path / 'none'}", "--out", str(tmp_path / "o.json")]
    assert peers.main(args) == 2
    assert "is not an executable file" in capsys.readouterr().err


def test_peers_that_need_no_packages_use_this_interpreter(tmp_path: Path) -> None:
    assert installs.interpreters(["plain", "timm"], {}, tmp_path) == {"plain": sys.executable, "timm": sys.executable}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("total", [1, 7, 240])
def test_all_packages_use_the_same_learning_rates(total: int) -> None:
    steps = range(total)
    mine = [optim.lr_factor(step, total, 0.1, "cosine") for step in steps]
    assert [lr_factor(step, total, 0.1) for step in steps] == pytest.approx(mine)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = with_timm.cosine(optimizer, total, 0.1, 0.01)
    theirs = []
    for step in steps:
        theirs.append(optimizer.param_groups[0]["lr"] / 0.01)
        scheduler.step_update(step + 1)
    assert theirs == pytest.approx(mine)


@pytest.fixture
def job(folder: Path, tmp_path: Path) -> Job:
    args = ["--data", str(folder), "--image-size", "32", "--batch", "8", "--model", "test_resnet", "--weights", "none"]
    return peers.make_job(peers.parse([*args, "--head-epochs", "2", "--full-epochs", "1"]), tmp_path)


def test_a_job_is_equal_after_saving_and_loading(job: Job, tmp_path: Path) -> None:
    tuned = job.with_speed(Speed(True, ("head",), 0, True, True, True))
    assert Job.load(tuned.save(tmp_path / "job.json")) == tuned
    assert tuned.tuned
    assert not job.tuned
    assert job.with_epochs(full=0).stage("full").epochs == 0
    assert "weights" not in peers.task(job)


def test_the_augmentation_flip_is_the_view_of_the_evaluation_or_its_mirror_image(job: Job) -> None:
    image = Image.effect_noise((40, 30), 50).convert("RGB")
    evaluated = shared.transform(job, "none")(image)
    seen = {bool(shared.transform(job, "flip")(image).equal(evaluated)) for _ in range(30)}
    assert seen == {True, False}
    assert shared.transform(dataclasses.replace(job, hflip=False), "flip")(image).equal(evaluated)


def test_each_round_has_another_initial_head_for_all_packages(job: Job, folder: Path, tmp_path: Path) -> None:
    options = peers.parse(["--weights", "none"])
    second = peers.with_seed(job, 1, options, tmp_path)
    view = parity.our_view(second)
    assert view["loss"] != parity.our_view(job)["loss"]
    parity.refuse_unequal("plain", parity.compare(view, shared.check(second, shared.network, shared.folder_view, view)))
    assert "seed=1" in ours.command(second, tmp_path / "run")


@pytest.mark.parametrize("peer", [plain, with_timm])
def test_a_peer_runs_the_job(peer: Any, job: Job, tmp_path: Path) -> None:
    speed = Speed(channels_last=True, workers=0, fused=True, frozen_statistics=True)
    peer.run(job.with_speed(speed), Events(tmp_path / "events"))
    happened = [(e["event"], e["stage"], e.get("epoch")) for e in read_events(tmp_path / "events")]
    assert happened == [
        ("begin", "head", None),
        ("epoch", "head", 1),
        ("epoch", "head", 2),
        ("begin", "full", None),
        ("epoch", "full", 1),
    ]


@pytest.mark.parametrize("peer", [plain, with_timm])
def test_a_peer_starts_from_the_same_pixels_and_loss(peer: Any, job: Job) -> None:
    view = parity.our_view(job)
    seen = with_timm.view if peer is with_timm else shared.folder_view
    found = parity.compare(view, shared.check(job, shared.network, seen, view))
    parity.refuse_unequal("peer", found)
    with pytest.raises(UserError, match="in another order"):
        parity.refuse_unequal("peer", {**found, "same_targets": False})
    with pytest.raises(UserError, match="pixels differ"):
        parity.refuse_unequal("peer", {**found, "mean_pixel_difference": 9.0})
    with pytest.raises(UserError, match="on the same pixels"):
        parity.refuse_unequal("peer", {**found, "loss_on_our_pixels": found["our_loss"] * 1.01})


def test_frozen_statistics_do_not_change(job: Job, tmp_path: Path) -> None:
    before = shared.network(job).state_dict()
    for frozen in (True, False):
        model = shared.network(job)
        speed = Speed(workers=0, frozen_statistics=frozen, fused=True)
        head = job.with_speed(speed).with_epochs(full=0)
        plain.train_stage(head, model, head.stage("head"), {"val": shared.val_loader(head)}, Events(tmp_path / "e"))
        names = [name for name in before if name.endswith("running_mean")]
        assert all(torch.equal(before[name], model.state_dict()[name]) for name in names) is frozen


def test_the_fastest_settings_are_chosen_over_all_epochs() -> None:
    def way(head: float, full: float) -> dict[str, float]:
        return {"head": head, "full": full}

    found = {
        "fp32 NCHW": way(50, 30),
        "bf16 NCHW": way(60, 20),
        "fp32 channels_last": way(90, 60),
        "bf16 channels_last": way(200, 40),
    }
    speed = trial.best_speed(found, {"head": 5, "full": 2}, 1)
    assert speed == Speed(True, ("head",), 1, True, True, True)
    found["bf16 NCHW"] = way(1000, 500)
    assert trial.best_speed(found, {"head": 5, "full": 2}, 1).bf16 == ("head", "full")


def run(seconds: float, *points: tuple[str, int, float, float], **more: Any) -> dict[str, Any]:
    events = [{"event": "begin", "stage": "head", "time": 102.0}]
    events += [
        {"event": "epoch", "stage": s, "epoch": n, "time": 100.0 + t, "top1": top1, "loss": 1.0}
        for s, n, t, top1 in points
    ]
    return {"began": 100.0, "seconds": seconds, "load": 0.0, "events": events, **more}


def test_seconds_to_an_accuracy_count_from_the_start_of_the_process() -> None:
    result = run(9.0, ("head", 1, 3.0, 0.5), ("full", 1, 8.0, 0.7))
    assert summary.seconds_to(result, 0.5) == 3.0
    assert summary.seconds_to(result, 0.6) == 8.0
    assert summary.seconds_to(result, 0.8) is None
    assert summary.stage_seconds_to_epoch(result, "head", 1) == 1.0


def test_the_tables_compare_with_the_fastest_peer_that_was_measured_in_all_rounds(job: Job, tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json", {})
    points = (("head", 1, 4.0, 0.3), ("head", 2, 6.0, 0.5), ("full", 1, 19.0, 0.7))

    def add(name: str, repeat: int, found: dict[str, Any]) -> None:
        results.content["runs"].append({"name": name, "repeat": repeat, "commit": "c", **found})

    for repeat in range(3):
        add("plain, tuned", repeat, run(20.0, *points))
        add(summary.OURS, repeat, run(10.0, *points, stage_seconds={"head": 1.0}))
    add("timm, tuned", 0, run(1.0, *points))  # once, and so no median of three
    for k in (1, 2):
        add(f"{summary.HEAD_ALONE}{k}", 0, run(3.0, *points[:k], stage_seconds={"head": 1.0}))
    add(f"{summary.FIFTY}2", 0, run(3.3, *points[:2], stage_seconds={"head": 1.2}))
    add(summary.SOONEST, 0, run(5.0, ("head", 1, 2.0, 0.71)))
    names = [summary.OURS, "plain, tuned", "timm, tuned", summary.SOONEST]
    text = summary.report(results, job, ["plain, tuned", "timm, tuned"], names)
    assert "| distil_tl | 3 | 10.0 (10.0-10.0) | 2.00x |" in text
    assert "| head stage of 2, the stage | 1.8x | 4.00x | yes |" in text
    assert "| head stage of 1, whole process | 1.0x | 1.33x | yes |" in text
    assert "| the best of 50 heads, compared with one | at most 1.2x | 1.10x | yes |" in text
    assert "| to a top-1 of 0.700, compared with its whole schedule | 5.0x | 10.00x | yes |" in text
    assert "| the same, compared with the time when it first had it | - | 9.50x | - |" in text


def test_the_chart_shows_the_time_of_each_part(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json", {})
    theirs = [run(s, ("head", 1, 6.0, 0.5), ("full", 1, s - 2, 0.7)) for s in (18.0, 20.0, 30.0)]
    assert chart.parts(theirs[0]) == [("start", 0, 2), ("head", 2, 6), ("full", 6, 16), ("end", 16, 18)]
    assert chart.median_parts(theirs) == [("start", 0, 2), ("head", 2, 6), ("full", 6, 18), ("end", 18, 20)]
    ours = run(10.0, ("head", 1, 4.0, 0.5), stage_seconds={"head": 1.0})
    ours["events"].pop(0)  # distil_tl records the duration of a stage, not its start
    assert chart.parts(ours) == [("start", 0, 3), ("head", 3, 4), ("end", 4, 10)]
    runs = [("plain, tuned", theirs), (summary.OURS, [ours])]
    results.content["runs"] += [{"name": name, "repeat": i, **r} for name, found in runs for i, r in enumerate(found)]
    svg = ElementTree.fromstring(chart.draw_chart(results, ["plain, tuned", "timm, tuned"]))
    assert [text.text for text in svg.iterfind(".//{*}desc")] == [
        "distil_tl: 10.0 s, top-1 0.500; plain, tuned: 20.0 s, top-1 0.700"
    ]
    widths = [float(bar.get("width", 0)) for bar in svg.iterfind(".//{*}rect") if bar.get("height") == "20"]
    assert [round(w / widths[0] * 3, 3) for w in widths] == [3, 1, 6, 2, 4, 12, 2]


def test_the_command_of_distil_tl_is_valid(job: Job, tmp_path: Path) -> None:
    from distil_tl.config import check, load

    keys = ours.command(job, tmp_path / "run", ("stages.head.views=2", *ours.search_keys(10, 5)))[3:]
    read, _ = load(keys)
    check(read, 1)
    search = read.stages["head"].search
    assert len(search.lr) * len(search.weight_decay) == 50
    assert (search.lr[0], search.lr[-1], search.weight_decay[0], search.weight_decay[-1]) == (5e-4, 5e-2, 0.0, 1.0)
    assert (read.stages["head"].epochs, read.stages["full"].epochs, read.stages["head"].views) == (2, 1, 2)


def test_a_short_comparison(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(comparison, "run_process", fake_process)
    args = ["--data", str(folder), "--image-size", "32", "--batch", "8", "--model", "test_resnet", "--weights", "none"]
    args += ["--peers", "plain", "--quick", "--out", str(tmp_path / "r.json"), "--ours", "more=stages.head.views=2"]
    assert peers.main(args) == 0
    output = capsys.readouterr().out
    assert "**Goals**, against plain, tuned" in output
    assert "| more | 1 |" in output
    content = json.loads((tmp_path / "r.json").read_text())
    assert {r["name"] for r in content["runs"]} >= {summary.OURS, summary.OFF, "plain, tuned", "more"}
    assert (tmp_path / "r.md").read_text().count("Goals") == 1
    assert "distil_tl: 1.0 s" in (tmp_path / "r.svg").read_text()
    monkeypatch.setattr(comparison, "run_process", None)  # everything is measured already
    assert peers.main(args) == 0


def fake_process(command: list[str], env: dict[str, str], log: Path) -> Measured:
    """Instead of running a process, write the files that it would write."""
    began = time.time()
    if "--check" in command:
        job, path = Job.load(Path(command[3])), Path(command[4])
        torch.save(shared.check(job, shared.network, shared.folder_view, torch.load(path)), path)
    elif command[2] == "benchmarks.peers.trial":
        Path(command[4]).write_text(json.dumps({name: {"head": 2.0, "full": 1.0} for name in trial.SETTINGS}))
    elif command[2] == "distil_tl.train":
        fake_run(dict(key.split("=", 1) for key in command[3:]), began)
    else:
        events, job = Events(Path(command[4])), Job.load(Path(command[3]))
        for stage in job.stages:
            events.begin(stage.name)
            for epoch in range(stage.epochs):
                events.epoch(stage.name, epoch + 1, 0.5, 1.0)
    return Measured(began, 1.0, 1.0, 1.0, 0.0, 0.0)


def fake_run(keys: dict[str, str], began: float) -> None:
    run_dir = Path(keys["run_dir"])
    run_dir.mkdir(parents=True)
    epochs = int(keys["stages.head.epochs"])
    line = {"time": began + 0.5, "stage": "head", "split": "val", "top1": 0.5, "loss": 1.0}
    lines = [json.dumps({**line, "epoch": epoch + 1}) for epoch in range(epochs)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines))
    (run_dir / "summary.json").write_text(json.dumps({"stages": {"head": {"seconds": 1.0, "cached": True}}}))


def test_synthetic_images_are_as_large_as_imagenets(tmp_path: Path) -> None:
    images.write_images(tmp_path, 20)
    sizes = [path.stat().st_size for path in tmp_path.glob("train/*/*.jpg")]
    assert len(sizes) == 20
    assert 95_000 < sum(sizes) / len(sizes) < 125_000
    assert len(list(tmp_path.glob("val/*/*.jpg"))) == 10


@pytest.mark.parametrize("mode", pipeline.MODES)
def test_the_pipeline_measures_the_loop_of_the_trainer(
    mode: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = pipeline.Task(str(folder), mode, 0, "shufflenet_v2_x0_5", 32, 8, "light", "fp32")
    train: Any = importlib.import_module("distil_tl.train")
    source: Any = importlib.import_module("distil_tl.data.source")
    calls = []

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*args: Any, **more: Any) -> Any:
            calls.append(name)
            return original(*args, **more)

        monkeypatch.setattr(module, name, call)

    for module, name in (
        (train, "check_finite"), (preemption.Agreement, "exchange"), (metrics.ClassificationMetrics, "update"),
        (source, "to_device"),
    ):  # fmt: skip
        counted(module, name)
    found = pipeline.run_one(task, tmp_path)
    steps, computed = 3 * 6, 0 if mode == "loader" else 3 * 6
    assert calls.count("exchange") == steps
    assert calls.count("check_finite") == 3  # once in an epoch of so few steps
    assert calls.count("update") == computed
    assert ("to_device" in calls) == (mode != "synthetic")
    assert found["images"] == 48  # of 52, in whole batches
    assert len(found["epoch_seconds"]) == 3
    assert min(found["epoch_seconds"]) > 0


@pytest.mark.parametrize("device", ["cpu", on_gpu("cuda")])
def test_a_synthetic_batch_does_not_wait_for_the_device(device: str, tmp_path: Path) -> None:
    source: Any = SimpleNamespace(info=SimpleNamespace(device=torch.device(device)))
    task = pipeline.Task("", "synthetic", 0, "resnet50", 32, 8, "light", "fp32")
    batches = pipeline.synthetic(task, source, None, "train")
    first = next(batches)
    with no_waiting(device):
        again = [next(batches) for _ in range(3)]
    assert all(batch.images is first.images and batch.indices.device.type == "cpu" for batch in again)
    assert list(pipeline.synthetic(task, source, None, "val")) == []


@pytest.mark.parametrize(("preset", "batch", "reference"), [("resnet50", 256, 3000), ("resnet50-32", 32, None)])
def test_presets_of_the_pipeline(preset: str, batch: int, reference: int | None) -> None:
    options = pipeline.parse(["--preset", preset, "--images", "512"])
    assert (options.model, options.batch, options.image_size) == ("resnet50", batch, 224)
    assert options.reference == reference
    other = pipeline.parse(["--preset", preset, "--images", "512", "--image-size", "160"])
    assert (other.batch, other.image_size, other.reference) == (batch, 160, None)


def test_the_table_of_the_pipeline(tmp_path: Path) -> None:
    options = pipeline.parse(["--workers", "1", "--cache", "cold", "--repeats", "1", "--out", str(tmp_path / "p.json")])
    results = Results(options.out, {})
    for key, seconds in (("synthetic", [9.0, 1.0]), ("loader, 1 workers, cold", [2.0, 1.0])):
        results.add(key, 0, Measured(0.0, 9.0, 9.0, 9.0, 3.0, 0.0), images=100, epoch_seconds=seconds, device="cpu")
    both = {"images": 100, "epoch_seconds": [4.0, 1.0], "device": "cpu"}
    results.add("both, 1 workers, cold", 0, Measured(0.0, 9.0, 9.0, 9.0, 3.0, 0.0), **both)
    assert "| 1 | cold, first epoch | 50 | 100 | 25 | 0.50 | 0.75 | 3 |" in pipeline.report(results, options)


@pytest.mark.parametrize("args", [["--images", "8", "--batch", "16"], ["--workers", "-1"], ["--repeats", "0"]])
def test_wrong_options_of_the_pipeline_are_refused(args: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        pipeline.main(args)
    assert error.value.code == 2
