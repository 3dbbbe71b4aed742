"""Runs tracked by a real server, while the server, W&B's processes or the training fail."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.wandb_runs import ALL, Run
from tests.helpers.wandb_server import KEY, Server, serving, struck, tracked

RESUMED = ("kill it", "kill all", "warn it", "end all")
UNTRACKED = ("kill server", "stop server", "kill core", "stop core", "kill tracking", "stop tracking")


def test_everything_is_on_the_server(folder: Path, tmp_path: Path, wandb_server: Server) -> None:
    more = ["tracking.wandb.group=sweep", "tracking.wandb.tags=[baseline,32px]", "tracking.wandb.mistakes=3"]
    run = Run(tmp_path, folder, *more, "tracking.wandb.artifact=true", "tracking.wandb.name=${oc.env:TEAM_SECRET}")
    environment = {**wandb_server.environment, "TEAM_SECRET": "hunter2", "UNRELATED_TOKEN": "only-here"}
    run.attempt(partial(tracked, environment), world=2)
    run.finished()
    assert run.warnings() == []
    assert f"Weights & Biases: {wandb_server.url}" in run.ended[0].said[0]
    there = wandb_server.run(run.dir)
    assert (there["state"], json.loads(there["tags_json"])) == ("finished", ["baseline", "32px"])
    config = json.loads(there["config_json"])
    assert config["optim"]["value"]["name"] == "sgd"
    assert config["tracking"]["value"]["wandb"]["name"] == "${oc.env:TEAM_SECRET}"
    assert config["env"]["value"]["world_size"] == 2
    assert [secret for secret in ("hunter2", "only-here", KEY) if secret in json.dumps(config)] == []
    summary, best = json.loads(there["summary_json"]), json.loads((run.dir / "summary.json").read_text())["best"]
    sent = {key.removeprefix("best/"): value for key, value in summary.items() if key.startswith("best/")}
    assert sent == {key: best[key] for key in best if key not in ("split", "n", "stage", "metric")}
    assert summary["final/step"] == 12

    assert wandb_server.steps(run.dir) == ALL
    for key in ("train_epoch/top1", "val/loss", "val/macro_f1"):
        assert wandb_server.steps(run.dir, key) == [6, 12], key
    assert wandb_server.steps(run.dir, "stage_head/val_top1") == [6]
    assert wandb_server.steps(run.dir, "stage_full/epoch") == [12]
    files = {row["name"] for row in wandb_server.query("select name from files where run_id = ?", there["run_id"])}
    assert [name for name in files if "evaluation/mistakes" in name]
    assert [name for name in files if "evaluation/confusion_matrix" in name]
    artifacts = wandb_server.query("select name, artifact_type from artifacts where run_id = ?", there["run_id"])
    assert {"name": f"model-{there['run_id']}", "artifact_type": "model"} in artifacts
    assert wandb_server.query("select * from system_metrics where run_id = ?", there["run_id"])


# The runs below wait most of the time, so they run in parallel.


@pytest.fixture(scope="module")
def runs(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, wandb_server: Server, telling_server: Server
) -> Iterator[dict[str, Future[Run]]]:
    def resumed(server: Server, what: str) -> Run:
        run = Run(tmp_path_factory.mktemp("resumed"), folder)
        run.attempt(partial(struck, server.environment, run.dir, 10, what))
        run.attempt(partial(tracked, server.environment))
        return run

    def untracked(what: str) -> Run:
        ends = what in ("kill core", "kill tracking")
        run = Run(
            tmp_path_factory.mktemp("untracked"),
            folder,
            f"tracking.wandb.finish_timeout_seconds={60 if ends else 6}",
        )
        if "server" in what:
            with serving() as server:
                run.attempt(partial(struck, server.environment, run.dir, 8, what, server.process.pid))
        else:
            run.attempt(partial(struck, telling_server.environment, run.dir, 8, what))
        return run

    with ThreadPoolExecutor(4) as pool:
        found = {what: pool.submit(resumed, telling_server, what) for what in RESUMED}
        found["not reported"] = pool.submit(resumed, wandb_server, "kill it")
        yield found | {what: pool.submit(untracked, what) for what in UNTRACKED}


@pytest.mark.parametrize("what", RESUMED)
def test_a_resumed_run_stays_one_run(runs: dict[str, Future[Run]], telling_server: Server, what: str) -> None:
    """Interrupted in step 10, it resumes there, or from step 8."""
    run = runs[what].result()
    assert run.ended[0].statuses == [-signal.SIGKILL if what.startswith("kill") else 3], run.ended
    run.finished()
    if "all" not in what:
        assert run.warnings() == []
    assert telling_server.steps(run.dir) == ALL
    assert telling_server.steps(run.dir, "val/loss") == [6, 12]
    assert telling_server.run(run.dir)["state"] == "finished"


def test_no_step_is_sent_twice_to_a_server_that_does_not_report_its_steps(
    runs: dict[str, Future[Run]], wandb_server: Server
) -> None:
    """Steps 9 and 10 are trained twice, and the server would keep both rows."""
    run = runs["not reported"].result()
    run.finished()
    assert wandb_server.steps(run.dir) == ALL


@pytest.mark.parametrize("what", UNTRACKED)
def test_training_does_not_depend_on_wandb(runs: dict[str, Future[Run]], telling_server: Server, what: str) -> None:
    run = runs[what].result()
    run.finished()
    assert len(run.warnings()) == 1, run.ended
    if what in ("kill core", "kill tracking"):  # a new tracking process was started
        assert telling_server.steps(run.dir) == ALL
        assert telling_server.run(run.dir)["state"] == "finished"
