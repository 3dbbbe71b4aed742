"""Submission of a sweep: checks, jobs, and a second submission of the same sweep."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import threading
import time
from pathlib import Path

import pytest
import yaml

from distil_tl.rundir.lock import Attempt
from launch import snapshot, status, sweep
from launch.records import read_record
from tests.helpers.fake_slurm import FakeSlurm, fake_training

PLAIN = ["data.root=null", "model.name=shufflenet_v2_x0_5", "model.weights=none"]


def yaml_file(text: str, name: str = "rates.yaml") -> str:
    Path(name).write_text(text)
    return name


def submitted(*args: str) -> None:
    assert sweep.main([*PLAIN, *args]) == 0


def refusal(capsys, *args: str) -> str:
    assert sweep.main([*PLAIN, *args]) == 2
    err: str = capsys.readouterr().err
    return err.removeprefix("launch.sweep: ")


def trials_of(folder: str = "sweeps/rates") -> dict[int, Path]:
    """Run directories by their trial's seed."""
    listed = json.loads(Path(folder, "sweep.json").read_text())["trials"]
    return {values["seed"]: Path(folder, name).absolute() for name, values in listed.items()}


def jobs_of(folder: str = "sweeps/rates") -> dict[int, str]:
    records = {seed: read_record(run_dir) for seed, run_dir in trials_of(folder).items()}
    return {seed: found["job_id"] for seed, found in records.items() if found is not None}


def ended(run_dir: Path, status: str) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "summary.json").write_text(json.dumps({"status": status, "best": None}))


# What is submitted


def test_the_metrics_of_a_sweep_and_its_runs_are_the_same(slurm: FakeSlurm, capsys) -> None:
    def metrics(name: str) -> tuple[str, set[str]]:
        folder = Path("sweeps", name)
        runs = {yaml.safe_load(path.read_text())["metric"] for path in folder.glob("*/slurm/config.yaml")}
        return json.loads((folder / "sweep.json").read_text())["metric"], runs

    submitted(yaml_file("{seeds: [0], metric: macro_f1}", "a.yaml"))
    submitted(yaml_file("{seeds: [0], set: {metric: loss}}", "b.yaml"))
    submitted(yaml_file("{seeds: [0]}", "c.yaml"), "metric=balanced_accuracy")
    submitted(yaml_file("{seeds: [0]}", "d.yaml"))
    expected = {"a": "macro_f1", "b": "loss", "c": "balanced_accuracy", "d": "top1"}
    assert {name: metrics(name) for name in expected} == {name: (metric, {metric}) for name, metric in expected.items()}
    message = refusal(capsys, yaml_file("{seeds: [0], metric: macro_f1}", "e.yaml"), "metric=loss")
    assert "ranks its trials by `metric: macro_f1`, but each run chooses its best epoch by metric=loss" in message


def test_a_sweep_is_one_array(slurm: FakeSlurm, capsys) -> None:
    submitted(yaml_file("{seeds: [0, 1, 2], slurm: {time: 8:00:00, array_parallelism: 2}}"))
    assert len(slurm.calls("sbatch")) == 1
    assert jobs_of() == {0: "7_0", 1: "7_1", 2: "7_2"}
    script = slurm.jobs["7_0"]["script"]
    assert "#SBATCH --array=0-2%2\n" in script
    assert "#SBATCH --time=480\n" in script
    assert "#SBATCH --job-name=rates\n" in script
    folder = Path("sweeps/rates").absolute()
    assert capsys.readouterr().out.splitlines() == [
        "submitted job 7: 3 trials, each on 1 node x 1 GPU, time limit 8:00:00; at most 2 run at once",
        f"monitor with: python -m launch.status {folder}",
    ]


def test_each_trial_has_a_configuration_of_its_own(slurm: FakeSlurm) -> None:
    yaml_file("{precision: fp32, optim: {name: sgd}, data: {root: null}}", "base.yaml")
    path = yaml_file("{config: base.yaml, set: {optim.momentum: 0.5}, grid: {stages.head.lr: [0.1, 0.2]}, seeds: [3]}")
    assert sweep.main([path, "model.weights=none", "model.name=shufflenet_v2_x0_5", "--dir", "out"]) == 0
    rates = set()
    for run_dir in (run_dir for run_dir in Path("out").absolute().iterdir() if (run_dir / "submitted.json").exists()):
        saved = yaml.safe_load((run_dir / "slurm/config.yaml").read_text())
        assert (saved["precision"], saved["optim"]["name"], saved["optim"]["momentum"]) == ("fp32", "sgd", 0.5)
        assert (saved["seed"], saved["run_dir"]) == (3, str(run_dir))
        wandb = saved["tracking"]["wandb"]
        assert wandb["group"] == "rates"
        assert wandb["name"] == f"stages.head.lr={saved['stages']['head']['lr']} seed=3"
        rates.add(saved["stages"]["head"]["lr"])
    assert rates == {0.1, 0.2}


def test_the_folders_with_pickles_are_private(slurm: FakeSlurm) -> None:
    submitted(yaml_file("seeds: [0, 1]"))
    for folder in (Path("sweeps/rates"), *trials_of().values()):
        assert stat.S_IMODE((folder / "slurm").stat().st_mode) == 0o700


def test_more_trials_than_an_array_may_have_are_submitted_in_parts(slurm: FakeSlurm, capsys) -> None:
    slurm.limit(MaxArraySize="2")
    sweep_file = yaml_file("seeds: [0, 1, 2]")
    submitted(sweep_file)
    assert jobs_of() == {0: "7_0", 1: "7_1"}
    assert (
        "not submitted yet: 1 trials, as an array of this cluster has at most 2 tasks (MaxArraySize); run the same "
        "command again to submit them\n"
    ) in capsys.readouterr().out
    submitted(sweep_file)
    assert jobs_of() == {0: "7_0", 1: "7_1", 2: "8"}


def test_the_parallelism_of_a_queued_sweep_can_be_changed(slurm: FakeSlurm, capsys) -> None:
    sweep_file = yaml_file("{seeds: [0, 1, 2], slurm: {array_parallelism: 1}}")
    submitted(sweep_file)
    slurm.change("7_0", "RUNNING", own="9", nodes="n1")
    submitted(sweep_file)
    assert not [call for call in slurm.calls("scontrol") if call[0] == "update"], "only if it is on the command line"
    submitted(sweep_file, "slurm.array_parallelism=5")
    assert [call for call in slurm.calls("scontrol") if call[0] == "update"] == [
        ["update", "JobId=7", "ArrayTaskThrottle=5"]
    ]
    assert "job 7: now at most 5 trials run at once\n" in capsys.readouterr().out
    slurm.change("7_0", "COMPLETED")  # scontrol fails then, though it changes the others
    submitted(sweep_file, "slurm.array_parallelism=6")
    assert slurm.jobs["7_1"]["throttle"] == "6"
    assert "job 7: now at most 6 trials run at once\n" in capsys.readouterr().out


def test_only_the_id_of_the_array_for_scripts(slurm: FakeSlurm, capsys) -> None:
    submitted(yaml_file("seeds: [0, 1]"), "--parsable")
    said = capsys.readouterr()
    assert said.out == "7\n"
    assert "submitted job 7: 2 trials" in said.err


def test_one_trial_is_an_array_of_one(slurm: FakeSlurm) -> None:
    submitted(yaml_file("seeds: [5]"))
    assert jobs_of() == {5: "7"}
    submitted("rates.yaml")
    assert len(slurm.calls("sbatch")) == 1
    slurm.change("7", "FAILED")
    submitted("rates.yaml", "--resubmit-failed")
    assert jobs_of() == {5: "8"}


def test_the_slurm_section_goes_over_that_of_the_configuration(slurm: FakeSlurm) -> None:
    yaml_file("{data: {root: null}, slurm: {partition: a, account: a, qos: a, time: 12:00:00}}", "base.yaml")
    submitted(yaml_file("{config: base.yaml, seeds: [0, 1], slurm: {account: b, qos: b}}"), "slurm.qos=c")
    script = slurm.jobs["7_0"]["script"]
    for option in ("partition=a", "account=b", "qos=c", "time=720"):
        assert f"#SBATCH --{option}\n" in script


def test_the_command_line_applies_to_all_trials(slurm: FakeSlurm) -> None:
    submitted(yaml_file("{seeds: [0], set: {optim.name: adamw}}"), "optim.momentum=0.25", "slurm.nodes=2")
    saved = yaml.safe_load((trials_of()[0] / "slurm/config.yaml").read_text())
    assert (saved["optim"]["name"], saved["optim"]["momentum"]) == ("adamw", 0.25)
    assert "#SBATCH --nodes=2\n" in slurm.jobs["7"]["script"]


def test_a_trial_can_override_set(slurm: FakeSlurm) -> None:
    submitted(yaml_file("{set: {optim.momentum: 0.5}, trials: {low: {optim.momentum: 0.1}, as_set: {}}}"))
    found = {path.parents[1].name[:3]: path.read_text() for path in Path("sweeps/rates").glob("*/slurm/config.yaml")}
    assert {name: yaml.safe_load(text)["optim"]["momentum"] for name, text in found.items()} == {"low": 0.1, "as_": 0.5}


# Submitted again


def test_the_same_sweep_again_submits_nothing(slurm: FakeSlurm, capsys) -> None:
    submitted(yaml_file("seeds: [0, 1, 2]"))
    slurm.change("7_0", "RUNNING", own="8", nodes="n1")
    ended(trials_of()[1], "completed")
    slurm.forget("7_1")
    before = {path: path.read_bytes() for path in Path("sweeps").rglob("*") if path.is_file()}
    capsys.readouterr()
    submitted("rates.yaml", "--resubmit-failed")
    assert len(slurm.calls("sbatch")) == 1
    assert capsys.readouterr().out.splitlines() == [
        "not submitted: 1 completed, 1 pending, 1 running",
        f"nothing to submit; monitor with: python -m launch.status {Path('sweeps/rates').absolute()}",
    ]
    assert {path: path.read_bytes() for path in Path("sweeps").rglob("*") if path.is_file()} == before


def test_a_larger_sweep_submits_what_is_new(slurm: FakeSlurm) -> None:
    submitted(yaml_file("{random: {stages.head.lr: {log_uniform: [1e-3, 1]}}, count: 2, seeds: [0]}"))
    submitted(yaml_file("{random: {stages.head.lr: {log_uniform: [1e-3, 1]}}, count: 4, seeds: [0]}"))
    assert "--array=0-1%" in slurm.jobs["8_0"]["script"]
    assert len(slurm.jobs) == 4


def test_a_changed_sweep_keeps_in_its_list_what_was_submitted(slurm: FakeSlurm, capsys) -> None:
    def listed() -> tuple[list[int], list[int]]:
        found = json.loads(Path("sweeps/rates/sweep.json").read_text())
        return tuple([values["seed"] for values in found[key].values()] for key in ("trials", "earlier"))  # type: ignore[return-value]

    submitted(yaml_file("seeds: [0, 1, 2]"))
    first = trials_of()
    submitted(yaml_file("seeds: [2, 3]"))
    assert listed() == ([2, 3], [0, 1])
    submitted(yaml_file("seeds: [3, 0]"))
    assert listed() == ([3, 0], [1, 2]), "nothing was to be submitted"
    (first[1] / "submitted.json").unlink()
    submitted(yaml_file("seeds: [3, 0]"))
    assert listed() == ([3, 0], [2]), "what was never submitted is no trial"
    capsys.readouterr()
    assert status.main(["sweeps/rates"]) == 0
    said = capsys.readouterr().out
    assert said.count("pending") == 4
    assert f"no longer in the sweep: {first[2].name}\n" in said


def test_a_sweep_can_vary_the_images(slurm: FakeSlurm, capsys) -> None:
    for name in ("flowers", "birds"):
        for split in ("train", "val"):
            Path(name, split, "a").mkdir(parents=True)
    yaml_file("optim: {name: sgd}", "base.yaml")
    yaml_file("{config: base.yaml, grid: {data.root: [flowers, birds]}}", "images.yaml")
    args = ["images.yaml", *PLAIN[1:]]
    assert sweep.main(args) == 0
    roots = [yaml.safe_load(path.read_text())["data"]["root"] for path in Path().glob("sweeps/*/*/slurm/config.yaml")]
    assert sorted(roots) == ["birds", "flowers"]
    assert sweep.main(args) == 0
    assert len(slurm.calls("sbatch")) == 1
    capsys.readouterr()
    yaml_file("{config: base.yaml, seeds: [0, 1]}", "images.yaml")
    assert sweep.main(args) == 2
    assert "base.yaml names no images: add data.root=FOLDER" in capsys.readouterr().err


def test_failed_trials_are_resubmitted_only_on_request(slurm: FakeSlurm, capsys) -> None:
    submitted(yaml_file("seeds: [0, 1, 2, 3]"))
    for seed, how in ((0, "completed"), (1, "failed"), (2, "preempted")):
        ended(trials_of()[seed], how)
        slurm.forget(f"7_{seed}")
    slurm.change("7_3", "FAILED")  # without a summary.json
    capsys.readouterr()
    submitted("rates.yaml")
    assert jobs_of() == {0: "7_0", 1: "7_1", 2: "8", 3: "7_3"}, "a stopped trial is resubmitted, as it did not fail"
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["not submitted: 1 completed, 2 failed", "to resume failed trials, add --resubmit-failed"]
    submitted("rates.yaml", "--resubmit-failed")
    assert jobs_of() == {0: "7_0", 1: "9_0", 2: "8", 3: "9_1"}
    assert not (trials_of()[1] / "summary.json").exists(), "it stands for an attempt that is over"
    assert (trials_of()[0] / "summary.json").exists()


def test_no_trial_is_submitted_while_slurm_does_not_answer(slurm: FakeSlurm, capsys) -> None:
    submitted(yaml_file("seeds: [0, 1]"))
    slurm.refuse("squeue", "no controller")
    capsys.readouterr()
    submitted("rates.yaml", "--resubmit-failed")
    said = capsys.readouterr()
    assert "not submitted: 2 unknown" in said.out
    assert said.err == "launch: squeue: no controller; the states of jobs are read from their files only\n"
    assert len(slurm.calls("sbatch")) == 1


def test_trials_in_slurms_queue_are_not_run_here_too(slurm: FakeSlurm, capsys) -> None:
    submitted(yaml_file("seeds: [0, 1]"))
    capsys.readouterr()
    submitted("rates.yaml", "--cluster=local", "--resubmit-failed", "slurm.gpus_per_node=0")
    assert "not submitted: 2 pending" in capsys.readouterr().out


def test_another_common_configuration_is_refused(slurm: FakeSlurm, capsys) -> None:
    submitted(yaml_file("seeds: [0, 1]"))
    message = refusal(capsys, "rates.yaml", "optim.momentum=0.25", "stages.head.epochs=7")
    assert f"{Path('sweeps/rates').absolute()} holds trials with another common configuration:" in message
    assert "optim.momentum: was 0.9, now 0.25" in message
    assert "stages.head.epochs: was 3, now 7" in message
    assert "or another --dir" in message
    assert len(slurm.calls("sbatch")) == 1
    submitted("rates.yaml", "data.workers=3", "tracking.log_every=5", "slurm.nodes=2")  # these change no result
    submitted("rates.yaml", "optim.momentum=0.25", "--dir", "another")


def test_trials_without_a_snapshot_of_their_own_keep_theirs(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that was edited between two submissions is for the second alone."""
    source = fake_training(tmp_path / "source", "return 0")
    monkeypatch.setattr(snapshot, "_source_root", lambda: source)
    submitted(yaml_file("seeds: [0, 1]"))
    (source / "distil_tl/train.py").write_text("# edited")
    submitted(yaml_file("seeds: [0, 1, 2]"))
    codes = [re.findall(r"^cd (.*) \|\| exit 2$", slurm.jobs[job]["script"], re.MULTILINE)[0] for job in ("7_0", "8")]
    assert [Path(code, "distil_tl/train.py").read_text() == "# edited" for code in codes] == [False, True]


def test_trials_on_another_cluster_are_submitted_only_on_request(slurm: FakeSlurm, capsys) -> None:
    submitted(yaml_file("seeds: [0, 1]"))
    slurm.configure(cluster="other", jobs=[])
    capsys.readouterr()
    submitted("rates.yaml", "--resubmit-failed")
    said = capsys.readouterr().out
    assert "not submitted: 2 unknown\n" in said
    assert "unknown: job 7_0 is of the cluster fake, which can't be asked from here, job 7_1 is of the" in said
    assert len(slurm.calls("sbatch")) == 1
    submitted("rates.yaml", "--assume-ended")
    assert jobs_of() == {0: "8_0", 1: "8_1"}


def test_trials_of_a_colleague_are_asked_about(slurm: FakeSlurm, capsys, monkeypatch) -> None:
    submitted(yaml_file("seeds: [0]"))
    content = json.loads((trials_of()[0] / "submitted.json").read_text())
    (trials_of()[0] / "submitted.json").write_text(json.dumps({**content, "uid": 1, "user": "daemon"}))
    slurm.configure(jobs=[{**job, "uid": 1} for job in slurm.jobs.values()])
    submitted("rates.yaml", "--resubmit-failed")
    assert "not submitted: 1 pending\n" in capsys.readouterr().out
    monkeypatch.setattr(os, "getuid", lambda: 5)
    slurm.configure(private=True)
    submitted("rates.yaml", "--resubmit-failed")
    assert "job 7 is of daemon, whose jobs Slurm does not show to you" in capsys.readouterr().out


def test_cancelled_trials_that_never_started_are_submitted_again(slurm: FakeSlurm) -> None:
    submitted(yaml_file("seeds: [0, 1]"))
    for task in (0, 1):
        slurm.forget(f"7_{task}")
    (Path("sweeps/rates/slurm") / "7_1_0_log.out").touch()  # it started, and left nothing
    submitted("rates.yaml")
    assert jobs_of() == {0: "8", 1: "7_1"}


# What is refused


def test_one_trial_that_cannot_work_is_named_and_nothing_is_submitted(slurm: FakeSlurm, capsys) -> None:
    message = refusal(capsys, yaml_file("grid: {optim.name: [sgd, sgdd], seed: [0, 1]}"))
    assert message.startswith("2 of 4 trials can't work: ")
    assert "sgdd" in message
    assert "in optim.name=sgdd seed=0; optim.name=sgdd seed=1\n" in message
    assert "optim.name=sgd " not in message
    assert not slurm.calls("sbatch")
    assert not Path("sweeps").exists()


def test_a_problem_of_all_trials_is_listed_once(slurm: FakeSlurm, capsys) -> None:
    message = refusal(capsys, yaml_file("seeds: [0, 1, 2, 3, 4]"), "slurm.nodes=0")
    assert message.count("slurm.nodes must be at least 1") == 1
    assert "in seed=0; seed=1; seed=2 and 2 more" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{seeds: [0], slurm: {nods: 2}}", "unknown key `slurm.nods`, did you mean `nodes`?"),
        ("{seeds: [0], slurm: 5}", "`slurm` is a section"),
        ("{seeds: [0], set: {optim.nam: sgd}}", "unknown key `optim.nam`"),
        ("grid: {optim.nam: [sgd]}", "unknown key `optim.nam`, did you mean `name`?"),
        ("grids: {}", "unknown key `grids`"),
    ],
)
def test_mistakes_in_the_file(slurm: FakeSlurm, capsys, text: str, message: str) -> None:
    assert message in refusal(capsys, yaml_file(text))


@pytest.mark.parametrize("args", [[], ["a.yaml", "b.yaml"], ["a.yaml", "--frobnicate"]])
def test_a_sweep_takes_one_file(slurm: FakeSlurm, capsys, args: list[str]) -> None:
    assert "usage: python -m launch.sweep SWEEP.yaml" in refusal(capsys, *args)


def test_after_an_error_of_sbatch_all_trials_can_be_submitted(slurm: FakeSlurm, capsys) -> None:
    yaml_file("seeds: [0, 1]")
    slurm.refuse("sbatch", "sbatch: error: invalid partition specified: gpuu")
    assert "sbatch refused the job: sbatch: error: invalid partition" in refusal(capsys, "rates.yaml")
    assert jobs_of() == {}
    slurm.refuse("sbatch", None)
    submitted("rates.yaml", "optim.momentum=0.25")  # no trial was submitted, so the configuration may change
    assert jobs_of() == {0: "7_0", 1: "7_1"}


def test_after_an_error_of_sbatch_stopped_trials_can_be_resumed(slurm: FakeSlurm, capsys) -> None:
    submitted(yaml_file("seeds: [0, 1]"))
    for seed in (0, 1):
        Attempt(trials_of()[seed]).begin(0, {"SLURM_JOB_ID": f"{seed + 7}"})
        Attempt(trials_of()[seed]).path.write_text("{}")
        ended(trials_of()[seed], "preempted")
        slurm.forget(f"7_{seed}")
    slurm.refuse("sbatch", "sbatch: error: Batch job submission failed: Job limit")
    assert "Job limit" in refusal(capsys, "rates.yaml")
    slurm.refuse("sbatch", None)
    submitted("rates.yaml")
    assert jobs_of() == {0: "8_0", 1: "8_1"}


def test_resume_never_applies_only_to_the_submission(slurm: FakeSlurm) -> None:
    """A trial that was requeued finds its own checkpoints, and would refuse them."""
    submitted(yaml_file("seeds: [0]"), "resume=never")
    assert yaml.safe_load((trials_of()[0] / "slurm/config.yaml").read_text())["resume"] == "auto"


# Dry runs


def test_a_dry_run_lists_the_trials_and_creates_nothing(slurm: FakeSlurm, capsys) -> None:
    submitted(yaml_file("{trials: {low: {optim.momentum: 0.1}, high: {optim.momentum: 0.9}}}"), "--dry-run")
    said = capsys.readouterr().out
    names = [line.split()[0] for line in said.splitlines()[:2]]
    assert [re.sub("[0-9a-f]{10}$", "HASH", name) for name in names] == ["low-HASH", "high-HASH"]
    assert said.splitlines()[0] == f"{names[0]}  optim.momentum=0.1  would be submitted"
    assert "\n#SBATCH --array=0-1%2\n" in said
    assert [path.name for path in Path().iterdir()] == ["rates.yaml"]
    assert not slurm.calls("sbatch")
    submitted("rates.yaml", "--dry-run", "--cluster=local", "slurm.gpus_per_node=0")
    assert [path.name for path in Path().iterdir()] == ["rates.yaml"]
    assert "#SBATCH" not in capsys.readouterr().out


def test_a_dry_run_prints_the_states_of_trials(slurm: FakeSlurm, capsys) -> None:
    submitted(yaml_file("seeds: [0, 1, 2]"))
    for seed, how in ((0, "completed"), (1, "preempted")):
        ended(trials_of()[seed], how)
        slurm.forget(f"7_{seed}")
    capsys.readouterr()
    submitted("rates.yaml", "--dry-run")
    said = capsys.readouterr().out
    assert [line.rpartition("  ")[2] for line in said.splitlines()[:3]] == [
        "completed",
        "would be submitted",
        "pending",
    ]
    assert "--array" not in said


# On this machine


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short trainings: seed 1 fails, seed 9 runs until it is stopped, the others complete."""
    body = """import signal, time, yaml
    config = yaml.safe_load(open(args[0]))
    run_dir, seed = pathlib.Path(config["run_dir"]), config["seed"]
    def end(name, status):
        (run_dir / "summary.json").write_text(json.dumps({"status": name, "best": None}))
        return status
    def asked(*_):
        raise InterruptedError
    print("seed", seed)
    if seed == 9:
        signal.signal(signal.SIGTERM, asked)
        (run_dir / "begun").touch()
        try:
            time.sleep(60)
        except InterruptedError:
            return end("preempted", 3)
    return end("failed", 1) if seed == 1 else end("completed", 0)"""
    source = fake_training(tmp_path / "source", body)
    monkeypatch.setattr(snapshot, "_source_root", lambda: source)


LOCAL = ["--cluster=local", "slurm.gpus_per_node=0"]


def test_a_local_sweep_runs_one_trial_after_another(slurm: FakeSlurm, short: None, capsys) -> None:
    assert sweep.main([*PLAIN, *LOCAL, yaml_file("seeds: [0, 1, 2]")]) == 1
    said = capsys.readouterr()
    trials = trials_of()
    assert said.out.splitlines() == [
        *(f"trial {i + 1} of 3: {trials[i]}" for i in range(3)),
        "1 of 3 trials failed",
        f"monitor with: python -m launch.status {Path('sweeps/rates').absolute()}",
    ]
    (output,) = re.findall("launch: the job failed; its output is in (.*)\n", said.err)
    assert "seed 1" in Path(output).read_text()
    assert not slurm.calls("sbatch")

    assert sweep.main([*PLAIN, *LOCAL, "rates.yaml"]) == 0
    assert "not submitted: 2 completed, 1 failed" in capsys.readouterr().out
    assert sweep.main([*PLAIN, *LOCAL, "rates.yaml", "--resubmit-failed"]) == 1
    assert f"trial 1 of 1: {trials[1]}" in capsys.readouterr().out


def test_ctrl_c_ends_the_trial_and_the_sweep(slurm: FakeSlurm, short: None, capsys) -> None:
    def interrupt() -> None:
        deadline = time.monotonic() + 240
        while not list(Path("sweeps/rates").glob("*/begun")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert sweep.main([*PLAIN, *LOCAL, yaml_file("seeds: [0, 9, 2]")]) == 3
    thread.join()
    assert "the job was stopped; run the same command to resume" in capsys.readouterr().err
    assert json.loads((trials_of()[9] / "summary.json").read_text())["status"] == "preempted"
    assert sorted(jobs_of()) == [0, 9], "the third did not begin"
