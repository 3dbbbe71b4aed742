"""What W&B has of a run: RUN_DIR/wandb/MODE.json and the segments of offline mode."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distil_tl.tracking.wandb.task import wandb_id
from distil_tl.utils.files import read_json

SENT_BY_US = "from metrics.jsonl"  # in the file by which `wandb sync` knows that a segment is sent


@dataclass
class Marks:
    """What W&B has of a run in one mode, online or offline: RUN_DIR/wandb/MODE.json.

    Attributes:
        step: the last step given to W&B's client.
        safe: the last step when the client last ended normally.
        segment: the folder of the offline segment that is being written.
        done: W&B has all of a completed run.
    """

    path: Path
    id: str
    step: int = -1
    safe: int = -1
    segment: str | None = None
    done: bool = False

    @classmethod
    def of(cls, run_dir: Path, mode: str) -> Marks:
        """Read from a run directory; without a valid file for this W&B run, a new one."""
        path, run_id = run_dir / "wandb" / f"{mode}.json", wandb_id(run_dir)
        with suppress(OSError, ValueError, TypeError):
            saved = read_json(path)
            if saved["id"] == run_id:
                return cls(path, **saved)
        return cls(path, run_id)

    def save(self) -> None:
        # Without fsync: to lose the last second matters little, and fsync on a shared file system may take a second.
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(
            json.dumps({key: value for key, value in vars(self).items() if key != "path"}), encoding="utf-8"
        )
        temporary.replace(self.path)

    def set_aside_segment(self, run_dir: Path) -> None:
        """Rename the segment of a killed attempt: its last rows may be lost, and the next segment repeats all."""
        if self.segment is None:
            return
        folder = run_dir / "wandb" / self.segment
        if folder.is_dir() and synced_by_hand(folder):
            self.safe = self.step
        elif folder.is_dir():
            folder.rename(folder.with_name(f"unfinished-{folder.name}"))
        self.segment = None


def segments(run_dir: Path) -> list[Path]:
    """The segments of offline mode that `wandb sync` can send, in order."""
    return sorted(run_dir.glob(f"wandb/offline-run-*-{wandb_id(run_dir)}"))


def synced_by_hand(segment: Path) -> bool:
    """Whether the user sent a segment with `wandb sync`."""
    return any(path.read_text(encoding="utf-8") != SENT_BY_US for path in segment.glob("*.wandb.synced"))


def mark_synced(run_dir: Path) -> None:
    """Mark the segments for `wandb sync` as sent: W&B has all their rows."""
    for segment in segments(run_dir):
        for path in segment.glob("run-*.wandb"):
            if not (mark := path.with_name(path.name + ".synced")).exists():
                mark.write_text(SENT_BY_US, encoding="utf-8")
