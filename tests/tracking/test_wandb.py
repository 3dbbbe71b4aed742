"""Tracked by a real server, through all that befalls it, W&B's own processes and the training."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.arguments import small_args
from tests.helpers.chaos import Ended, attempt, left_over_processes
from tests.helpers.ranks import lines
from tests.helpers.wandb_server import KEY, Server, serving, struck, tracked, with_variable

ALL = list(range(1, 13))  # two epochs of 6 steps
GOES_ON = ("kill it", "kill all", "warn it", "end all")
GOES_WITHOUT = ("kill server", "stop server", "kill core", "stop core", "kill mirror", "stop mirror")


def then(one: Callable[[], None], two: Callable[[], None]) -> None:
    one()
    two()


class Run:
    """A training whose every step is tracked, with a checkpoint every 4 of them."""

    def __init__(self, folder: Path, images: Path, *more: str):
        self.folder, self.dir, self.ended = folder, folder / "run", list[Ended]()
        self.args = [*small_args(images), f"run_dir={self.dir}", "stages.full.epochs=1", "checkpoint.every_steps=4"]
        self.args += ["tracking.wandb.mode=online", "tracking.wandb.mistakes=0", *more]

    def attempt(self, prepare: Callable[[], None], world: int = 1) -> None:
        prepare = partial(then, partial(tracked, {"TRACKED_RUN": str(self.folder)}), prepare)
        self.ended.append(attempt(self.folder / f"attempt-{len(self.ended)}", self.args, world, prepare=prepare))

    def finished(self) -> None:
        """It ended as it would have without W&B."""
        assert not any("Traceback" in said for ended in self.ended for said in ended.said), self.ended
        assert set(self.ended[-1].statuses) == {0}, self.ended
        assert json.loads((self.dir / "summary.json").read_text())["status"] == "completed"
        assert [line["step"] for line in lines(self.dir, window="interval")] == ALL
        assert len(lines(self.dir, split="val")) == 2
        assert left_over_processes(self.folder) == []
        assert with_variable(f"TRACKED_RUN={self.folder}") == [], "of W&B's"

    def warnings(self) -> list[str]:
        said = "".join(ended.said[0] for ended in self.ended)
        return [line for line in said.splitlines() if line.startswith("Weights & Biases does")]


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
    assert {key: summary[f"best/{key}"] for key in best} == best
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


# Most of the time of those below is waiting, so they go through it side by side.


@pytest.fixture(scope="module")
def runs(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, wandb_server: Server, telling_server: Server
) -> Iterator[dict[str, Future[Run]]]:
    def goes_on(server: Server, what: str) -> Run:
        run = Run(tmp_path_factory.mktemp("goes-on"), folder)
        run.attempt(partial(struck, server.environment, run.dir, 10, what))
        run.attempt(partial(tracked, server.environment))
        return run

    def goes_without(what: str) -> Run:
        ends = what in ("kill core", "kill mirror")
        run = Run(
            tmp_path_factory.mktemp("goes-without"),
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
        found = {what: pool.submit(goes_on, telling_server, what) for what in GOES_ON}
        found["nothing said"] = pool.submit(goes_on, wandb_server, "kill it")
        yield found | {what: pool.submit(goes_without, what) for what in GOES_WITHOUT}


@pytest.mark.parametrize("what", GOES_ON)
def test_a_run_that_goes_on_is_one_run(runs: dict[str, Future[Run]], telling_server: Server, what: str) -> None:
    """Struck in step 10, it same command to resume, or from step 8."""
    run = runs[what].result()
    assert run.ended[0].statuses == [-signal.SIGKILL if what.startswith("kill") else 3], run.ended
    run.finished()
    if "all" not in what:
        assert run.warnings() == []
    assert telling_server.steps(run.dir) == ALL
    assert telling_server.steps(run.dir, "val/loss") == [6, 12]
    assert telling_server.run(run.dir)["state"] == "finished"


def test_no_step_comes_twice_to_a_server_that_says_nothing(runs: dict[str, Future[Run]], wandb_server: Server) -> None:
    """Steps 9 and 10 are trained twice, and the server would keep both."""
    run = runs["nothing said"].result()
    run.finished()
    assert wandb_server.steps(run.dir) == ALL


@pytest.mark.parametrize("what", GOES_WITHOUT)
def test_the_training_does_not_notice(runs: dict[str, Future[Run]], telling_server: Server, what: str) -> None:
    run = runs[what].result()
    run.finished()
    assert len(run.warnings()) == 1, run.ended
    if what in ("kill core", "kill mirror"):  # the mirror came back
        assert telling_server.steps(run.dir) == ALL
        assert telling_server.run(run.dir)["state"] == "finished"
