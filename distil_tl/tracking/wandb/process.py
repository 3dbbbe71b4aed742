"""The process that repeats a run's metrics.jsonl to Weights & Biases, so that nothing W&B does can reach the training.

It reads what is on disk, so it needs no queue and drops nothing: whatever W&B has not got is there for the next
attempt, or for `launch.sync`. On standard input it gets a `Task` as one line, later a word for how the training ended;
on standard output it says what a person should know. W&B's own output goes to RUN_DIR/logs/wandb.log.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

from distil_tl.rundir.lock import FILE as ATTEMPT
from distil_tl.rundir.lock import read_attempt

DONE, AGAIN, HOPELESS = 0, 1, 2  # how it ends: all is sent, another try may help, none will
LOOK_SECONDS = 0.5  # between two looks at metrics.jsonl
SENT = "from metrics.jsonl"  # in the file by which `wandb sync` knows what it need not send
ORPHAN_SECONDS = 10  # for the rest, when the training was killed
LOCK_SECONDS = 15  # for the mirror of a killed attempt to end
KEPT_OF_EPOCH = ("loss", "top1", "macro_f1")  # in a stage's own curves
Say = Callable[[str, str], None]


@dataclass(frozen=True)
class Task:
    """What to repeat, and as what. `pid` is the training's, whose use of the machine W&B records; none for a sync."""

    run_dir: str
    mode: str
    project: str
    entity: str | None
    name: str
    group: str | None
    tags: list[str]
    artifact: bool
    mistakes: int
    config: dict[str, Any]
    pid: int | None = None


@dataclass
class Marks:
    """What one mode, online or offline, has of a run: RUN_DIR/wandb/MODE.json.

    `step` is the last one handed to W&B, `safe` the last one when W&B ended in order. `segment` is the offline folder
    that is being written; `done` says that the completed run is all there.
    """

    path: Path
    id: str
    step: int = -1
    safe: int = -1
    segment: str | None = None
    done: bool = False

    @classmethod
    def of(cls, run_dir: Path, mode: str) -> Marks:
        path, run_id = run_dir / "wandb" / f"{mode}.json", wandb_id(run_dir)
        with suppress(OSError, ValueError, TypeError):
            found = json.loads(path.read_text())
            if found["id"] == run_id:
                return cls(path, **found)
        return cls(path, run_id)

    def save(self) -> None:
        # Without fsync, as a lost second matters little and a second of a shared file system's time does.
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({key: value for key, value in vars(self).items() if key != "path"}))
        temporary.replace(self.path)


def wandb_id(run_dir: Path) -> str:
    """The run's id at W&B, which stays the same however often it goes on; empty when it has none."""
    try:
        return (run_dir / "wandb-id").read_text().strip()
    except OSError:
        return ""


def segments(run_dir: Path) -> list[Path]:
    """What attempts without network left for `wandb sync`, in order."""
    return sorted(run_dir.glob(f"wandb/offline-run-*-{wandb_id(run_dir)}"))


def synced_by_hand(segment: Path) -> bool:
    return any(path.read_text() != SENT for path in segment.glob("*.wandb.synced"))


def mark_synced(run_dir: Path) -> None:
    """Have `wandb sync` leave the segments alone: all they hold was sent."""
    for segment in segments(run_dir):
        for path in segment.glob("run-*.wandb"):
            if not (mark := path.with_name(path.name + ".synced")).exists():
                mark.write_text(SENT)


@dataclass
class Rows:
    """metrics.jsonl as it grows: one row a step, given out when it is whole, which a line of a later step says."""

    path: Path
    _at: int = 0
    _step: int = -1
    _row: dict[str, Any] = field(default_factory=dict)

    def whole(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with self.path.open("rb") as file:
            file.seek(self._at)
            for text in file:
                if not text.endswith(b"\n"):
                    break
                self._at += len(text)
                try:
                    line = json.loads(text)
                    step = int(line["step"])
                except (ValueError, KeyError, TypeError):  # of another program's making
                    continue
                if step != self._step and self._row:
                    yield self._step, self._row
                    self._row = {}
                self._step = step
                self._row.update(row_of(line))

    def last(self) -> tuple[int, dict[str, Any]]:
        """The row of the last step, which no line has followed yet."""
        return self._step, self._row


def row_of(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl under W&B's names: curves over the whole run, and of each stage over its epochs."""
    split, whole_epoch = line["split"], line.get("window") == "epoch"
    series = "train_epoch" if split == "train" and whole_epoch else split
    numbers = {
        key: value
        for key, value in line.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("step", "epoch", "time")
    }
    row = {f"{series}/{key}": value for key, value in numbers.items()}
    row |= {"epoch": line["epoch"], "stage": line["stage"]}
    if whole_epoch:
        stage = f"stage_{line['stage']}"
        row |= {f"{stage}/{split}_{key}": numbers[key] for key in KEPT_OF_EPOCH if key in numbers}
        row[f"{stage}/epoch"] = line["epoch"]
    if "time" in line:
        row["_timestamp"] = line["time"]
    return row


class Session:
    """One run of W&B's, open."""

    def __init__(self, task: Task, say: Say) -> None:
        self._task, self._run_dir = task, Path(task.run_dir)
        self._rows = Rows(self._run_dir / "metrics.jsonl")
        self._marks = Marks.of(self._run_dir, task.mode)
        self._token = _token(self._run_dir)
        other = Marks.of(self._run_dir, "offline" if task.mode == "online" else "online")
        if task.mode == "offline":
            _put_aside(self._run_dir, self._marks)
            known = max(self._marks.safe, other.step)
        else:
            by_hand = [synced_by_hand(segment) for segment in segments(self._run_dir)]
            known = max(self._marks.step, other.step) if by_hand and all(by_hand) else self._marks.step
        self._run = _init(task, wandb_id(self._run_dir))
        if task.mode == "offline":
            self._marks.segment = Path(self._run.dir).parent.name
        elif self._run.resumed:  # then the server says what it has, and knows better
            known = self._run.starting_step - 1
        self._marks.step = known
        self._marks.save()
        if url := getattr(self._run, "url", None):
            say("url", url)

    def follow(self) -> None:
        """Send what is new."""
        before = self._marks.step
        for step, row in self._rows.whole():
            self._send(step, row)
        if self._marks.step != before:
            self._marks.save()

    def _send(self, step: int, row: dict[str, Any]) -> None:
        if step > self._marks.step:
            self._run.log(row, step=step, commit=True)
            self._marks.step = step

    def end(self, word: str) -> None:
        """Send the rest, and say how the training ended: completed, preempted, failed or killed."""
        self.follow()
        if self._task.pid is not None and _token(self._run_dir) != self._token:
            return  # another attempt has gone on with this run, and it is not over
        from distil_tl.tracking.wandb.media import (  # with Pillow, which the training needs not load
            add_artifact,
            final_charts,
        )

        summary = _read(self._run_dir / "summary.json")
        if word == "completed":
            step, row = self._rows.last()
            charts = final_charts(_read(self._run_dir / "evaluation.json"), self._task.mistakes)
            self._send(max(step, self._marks.step + 1), {**row, **charts} if step > self._marks.step else charts)
        elif word == "preempted":
            self._run.mark_preempting()
        if summary.get("status") == word:
            for split in ("best", "final", "test"):
                for key, value in (summary.get(split) or {}).items():
                    self._run.summary[f"{split}/{key}"] = value
            self._run.summary["total_seconds"] = summary.get("total_seconds")
        if word == "completed" and self._task.artifact:
            add_artifact(self._run, self._run_dir, summary.get("best") or {})
        self._run.finish(exit_code={"completed": 0, "preempted": 3}.get(word, 1))
        self._marks.segment, self._marks.safe = None, self._marks.step
        self._marks.done = word == "completed"
        self._marks.save()
        if self._task.mode == "online":
            mark_synced(self._run_dir)


def _init(task: Task, run_id: str) -> Any:
    import wandb

    wanted: dict[str, Any] = {"console": "off", "program": "distil_tl.train"}
    if task.pid is not None:
        wanted |= {"x_stats_pid": task.pid, "x_stats_track_process_tree": True}
    else:  # of the machine that syncs, nobody wants to know
        wanted |= {"x_disable_stats": True, "x_disable_meta": True}
    known = getattr(wandb.Settings, "model_fields", {})
    environment = _read(Path(task.run_dir) / "env.json")
    environment.pop("command", None)  # which may say in plain text what the configuration hides
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
        settings=wandb.Settings(**{key: value for key, value in wanted.items() if key in known}),
    )
    for stage in task.config.get("stages") or {}:
        run.define_metric(f"stage_{stage}/*", step_metric=f"stage_{stage}/epoch")
    return run


def _put_aside(run_dir: Path, marks: Marks) -> None:
    """Take the segment of a killed attempt away: its last rows may be lost, and the new one will have all of them."""
    if marks.segment is None:
        return
    left = run_dir / "wandb" / marks.segment
    if left.is_dir() and synced_by_hand(left):  # by hand, and so it counts
        marks.safe = marks.step
    elif left.is_dir():
        left.rename(left.with_name(f"unfinished-{left.name}"))
    marks.segment = None


def _token(run_dir: Path) -> str | None:
    signed = read_attempt(run_dir / ATTEMPT)
    return None if signed is None else signed["token"]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# The process.


def mirror(task: Task, words: queue.Queue[str], say: Say) -> int:
    """Follow the training until there is a word for how it ended. How that went: DONE, AGAIN or HOPELESS."""
    folder = Path(task.run_dir) / "wandb"
    folder.mkdir(exist_ok=True)
    with (folder / f"{task.mode}.lock").open("w") as lock:
        if not _locked(lock.fileno(), LOCK_SECONDS if task.pid is not None else 0):
            say("warn", "another process is sending this run")
            return AGAIN
        try:
            import wandb
        except Exception as error:
            say("warn", f"it can't be imported ({_one_line(error)})")
            return HOPELESS
        no_use = tuple(getattr(wandb.errors, name, ()) for name in ("UsageError", "AuthenticationError"))
        try:
            session = Session(task, say)
            while True:
                try:
                    word = words.get(timeout=LOOK_SECONDS)
                    break
                except queue.Empty:
                    session.follow()
            session.end(word)
        except Exception as error:
            traceback.print_exc()
            say("warn", _one_line(error))
            return HOPELESS if isinstance(error, no_use) else AGAIN
    return DONE


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _locked(handle: int, seconds: float) -> bool:
    """Whether this process is the only one now; taken for granted where files can't be locked."""
    import fcntl

    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.2)
        except OSError:
            return True


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they did; none where there is no /proc."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def kill_tree(pid: int) -> None:
    """End a process and all below it, also what is stopped or hangs."""
    for one in (pid, *descendants(pid)):
        with suppress(OSError):
            os.kill(one, signal.SIGKILL)


def _listen(handle: int, words: queue.Queue[str]) -> None:
    """Wait for the word; when the training ends without one, give the mirror a moment, even if it hangs."""
    with open(handle) as source:
        word = source.readline().strip()
    words.put(word or "killed")
    if not word:
        time.sleep(ORPHAN_SECONDS)
        kill_tree(os.getpid())


def main() -> NoReturn:
    """Run as a process of its own, until `mirror` ends."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR2"):  # for the training to act upon
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    # W&B's processes inherit neither of the two pipes.
    source, answers = os.dup(0), os.fdopen(os.dup(1), "w", buffering=1)
    task = Task(**json.loads(_line_of(source)))
    logs = Path(task.run_dir) / "logs"
    logs.mkdir(exist_ok=True)
    log = os.open(logs / "wandb.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard, other in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(other, standard)

    def say(kind: str, text: str) -> None:
        with suppress(OSError):
            answers.write(f"{kind} {text}\n")

    words: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(source, words), daemon=True).start()
    status = AGAIN
    try:
        status = mirror(task, words, say)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        for child in descendants(os.getpid()):  # they would wait for this process, and W&B's own exit hook for them
            with suppress(OSError):
                os.kill(child, signal.SIGKILL)
        os._exit(status)


def _line_of(handle: int) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(handle, 1)):
        line += byte
    return line
