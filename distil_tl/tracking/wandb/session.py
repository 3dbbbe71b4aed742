"""One open W&B run: rows, summary, charts and the artifact are sent through it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from distil_tl.rundir.lock import FILE as ATTEMPT
from distil_tl.rundir.lock import read_attempt
from distil_tl.tracking.wandb.rows import Rows, summary_of
from distil_tl.tracking.wandb.state import Marks, mark_synced, segments, synced_by_hand
from distil_tl.tracking.wandb.task import Task, wandb_id
from distil_tl.utils.files import read_json

Report = Callable[[str, str], None]  # a kind, "warn" or "url", and a text


class Session:
    """One open W&B run.

    Args:
        report: receives the URL of the run.
    """

    def __init__(self, task: Task, report: Report) -> None:
        self._task, self._run_dir = task, Path(task.run_dir)
        self._rows = Rows(self._run_dir / "metrics.jsonl")
        self._marks = Marks.of(self._run_dir, task.mode)
        self._token = _token(self._run_dir)
        last_step = self._last_step()
        self._run = _init(task, wandb_id(self._run_dir))
        if task.mode == "offline":
            self._marks.segment = Path(self._run.dir).parent.name
        elif self._run.resumed:  # the server knows best which steps it has
            last_step = self._run.starting_step - 1
        self._marks.step = last_step
        self._marks.save()
        if url := getattr(self._run, "url", None):
            report("url", url)

    def _last_step(self) -> int:
        """The last step that W&B has, according to the run directory."""
        if self._task.mode == "offline":
            online = Marks.of(self._run_dir, "online")
            self._marks.set_aside_segment(self._run_dir)
            return max(self._marks.safe, online.step)
        by_hand = [synced_by_hand(segment) for segment in segments(self._run_dir)]
        if by_hand and all(by_hand):
            return max(self._marks.step, Marks.of(self._run_dir, "offline").step)
        return self._marks.step

    def follow(self) -> None:
        """Send the rows that are new and complete."""
        before = self._marks.step
        for step, row in self._rows.whole():
            self._send(step, row)
        if self._marks.step != before:
            self._marks.save()

    def _send(self, step: int, row: dict[str, Any]) -> None:
        if step > self._marks.step:
            self._run.log(row, step=step, commit=True)
            self._marks.step = step

    def finish(self, status: str) -> None:
        """Send the rest, and close the W&B run with the status of the run: completed, preempted, failed or killed."""
        self.follow()
        if self._task.pid is not None and _token(self._run_dir) != self._token:
            return  # a newer process took over the run, which is still in progress
        summary = _read_json(self._run_dir / "summary.json")
        if status == "completed":
            self._send_charts()
        elif status == "preempted":
            self._run.mark_preempting()
        if summary.get("status") == status:
            for key, value in summary_of(summary).items():
                self._run.summary[key] = value
        if status == "completed" and self._task.artifact:
            from distil_tl.tracking.wandb.media import add_artifact

            add_artifact(self._run, self._run_dir, summary.get("best") or {})
        self._run.finish(exit_code={"completed": 0, "preempted": 3}.get(status, 1))
        if self._task.mode == "offline":
            _end_client()
        self._marks.segment, self._marks.safe = None, self._marks.step
        self._marks.done = status == "completed"
        self._marks.save()
        if self._task.mode == "online":
            mark_synced(self._run_dir)

    def _send_charts(self) -> None:
        """Send the row of the last step together with the charts; W&B takes no second row of a step."""
        from distil_tl.tracking.wandb.media import final_charts  # imports Pillow, which is needed only here

        step, row = self._rows.last()
        intensity = (self._task.config.get("data") or {}).get("intensity", "dtype")
        charts = final_charts(_read_json(self._run_dir / "evaluation.json"), self._task.mistakes, intensity)
        self._send(max(step, self._marks.step + 1), {**row, **charts} if step > self._marks.step else charts)


def _init(task: Task, run_id: str) -> Any:
    """`wandb.init` for a task, with those settings that this version of wandb has."""
    import wandb

    settings: dict[str, Any] = {"console": "off", "program": "distil_tl.train"}
    if task.pid is not None:
        settings |= {"x_stats_pid": task.pid, "x_stats_track_process_tree": True}
    else:  # figures of the machine that runs launch.sync say nothing about the training
        settings |= {"x_disable_stats": True, "x_disable_meta": True}
    supported = getattr(wandb.Settings, "model_fields", {})
    environment = _read_json(Path(task.run_dir) / "env.json")
    environment.pop("command", None)  # may contain in plain text what the configuration hides
    run = wandb.init(
        id=run_id,
        resume="allow" if task.mode == "online" else None,
        mode=cast(Any, task.mode),
        dir=task.run_dir,
        project=task.project,
        entity=task.entity,
        name=task.name,
        group=task.group,
        tags=task.tags,
        job_type="train",
        config={**task.config, "env": environment},
        settings=wandb.Settings(**{key: value for key, value in settings.items() if key in supported}),
    )
    for stage in task.config.get("stages") or {}:
        run.define_metric(f"stage_{stage}/*", step_metric=f"stage_{stage}/epoch")
    return run


def _end_client() -> None:
    """Wait until W&B's own process has written the segment: in offline mode `finish` may return before."""
    import wandb

    wandb.teardown()


def _token(run_dir: Path) -> str | None:
    """The token of the process that owns the run directory."""
    attempt = read_attempt(run_dir / ATTEMPT)
    return None if attempt is None else attempt["token"]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is none."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
