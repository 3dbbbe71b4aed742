"""Synthetic run directories for the report, and checks of the written page."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from distil_tl.report import write_report

EVIL = "<script>alert(1)</script>"
STAGES = (("head", 4, 3e-3, 18_000.0), ("layer4", 6, 6e-4, 3100.0), ("full", 10, 8e-5, 2150.0))
NAMES = ["daisy", "dandelion", "rose", "sunflower", "tulip", "iris", "lily", "orchid", "poppy", "peony"]


def build_metrics(intervals: int = 12) -> list[dict[str, Any]]:
    """A run in stages: each lowers the loss further, with its own learning rate."""
    noise = random.Random(7)
    lines: list[dict[str, Any]] = []
    step, clock, seen, level = 0, 1_760_000_000.0, 0, 2.2
    for stage, epochs, peak, speed in STAGES:
        floor = level * 0.42
        for epoch in range(1, epochs + 1):
            for i in range(intervals):
                step, seen = step + 10, seen + 5120
                clock += 5120 / speed
                done = ((epoch - 1) * intervals + i) / (epochs * intervals)
                loss = floor + (level - floor) * math.exp(-3.5 * done)
                lr = peak * (min(1.0, done * 10 + 0.05) * (0.5 + 0.5 * math.cos(math.pi * done)))
                common = {"step": step, "epoch": epoch, "stage": stage, "lr": lr, "samples_seen": seen}
                lines.append(
                    common
                    | {"split": "train", "window": "interval", "loss": loss * noise.uniform(0.85, 1.2)}
                    | {
                        "top1": max(0.0, 1 - loss * 0.33),
                        "top5": 0.99,
                        "macro_f1": None,
                        "seconds": 5120 / speed,
                    }
                    | {"images_per_second": speed * noise.uniform(0.92, 1.05), "time": clock}
                )
            top1 = 1 - loss * 0.33 + noise.uniform(-0.01, 0.01)
            scores = {"loss": loss, "top1": top1, "top5": 0.99, "macro_f1": top1 - 0.01}
            train = {
                "split": "train",
                "window": "epoch",
                "images_per_second": speed,
                "seconds": 3.0,
                "time": clock,
            }
            lines.append(common | scores | train)
            val = {"split": "val", "loss": loss * 1.07 + 0.03, "top1": top1 - 0.02, "time": clock + 1}
            lines.append(common | scores | val)
        level = floor
    return lines


def build_evaluation(names: list[str], per: int = 80, directory: Path | None = None) -> dict[str, Any]:
    """An evaluation in which neighbouring classes are confused."""
    noise = random.Random(3)
    size = len(names)
    matrix = [[0] * size for _ in names]
    for i in range(size):
        right = round(per * noise.uniform(0.55, 0.99))
        matrix[i][i] = right
        for _ in range(per - right):
            matrix[i][(i + noise.choice([1, 1, 1, size - 1, 2])) % size] += 1
    classes = []
    for i, name in enumerate(names):
        predicted = sum(row[i] for row in matrix)
        recall, precision = matrix[i][i] / per, matrix[i][i] / predicted if predicted else 0.0
        f1 = 2 * recall * precision / (recall + precision) if recall + precision else 0.0
        classes.append(
            {
                "class": name,
                "n": per,
                "correct": matrix[i][i],
                "recall": recall,
                "precision": precision,
                "f1": f1,
            }
        )
    top1 = sum(matrix[i][i] for i in range(size)) / (per * size)
    mistakes = [
        {
            "path": str((directory or Path("/data/flowers")) / names[k % size] / f"img_{k:04d}.png"),
            "target": names[k % size],
            "prediction": names[(k + 1) % size],
            "probability": 0.99 - 0.012 * k,
        }
        for k in range(40)
    ]
    return {
        "split": "val",
        "n": per * size,
        "top1": top1,
        "top5": 0.991,
        "macro_f1": top1 - 0.004,
        "loss": 0.41,
        "per_class": classes,
        "confusion_matrix": matrix,
        "mistakes": mistakes,
        "calibration": build_calibration(),
    }


def build_calibration() -> dict[str, Any]:
    """An overconfident network, and the same one with a temperature."""

    def figures(too_high: float) -> dict[str, Any]:
        bins = []
        for i in range(15):
            n, middle = (i - 4) * 10 if i > 4 else 0, (i + 0.5) / 15
            mean, accuracy = (middle, middle - too_high) if n else (None, None)
            bins.append({"low": i / 15, "high": (i + 1) / 15, "n": n, "confidence": mean, "accuracy": accuracy})
        return {"n": 550, "ece": too_high, "nll": 0.41 + too_high, "brier": 0.2 + too_high, "bins": bins}

    return {"temperature": 1.375, "standard_error": 0.05, "raw": figures(0.12), "calibrated": figures(0.01)}


def write_lines(run: Path, lines: list[dict[str, Any]]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def build_run(run: Path, names: list[str] | None = None, intervals: int = 12) -> Path:
    """A completed run with all files that the report reads."""
    names = names or NAMES
    lines = build_metrics(intervals)
    write_lines(run, lines)
    best = max((line for line in lines if line["split"] == "val"), key=lambda line: line["top1"])
    keys = ("split", "loss", "top1", "top5", "macro_f1", "stage", "epoch", "step")
    stages = {
        stage: {
            "epochs": epochs,
            "seconds": epochs * 41.0 * 3000 / speed,
            "train_images": 61_440 * epochs,
            "images_per_second": speed,
            "cached": stage == "head",
            "trainable_parameters": 10 ** (i + 4) * 2,
            "top1": 0.9,
        }
        for i, (stage, epochs, _, speed) in enumerate(STAGES)
    }
    summary = {
        "status": "completed",
        "world_size": 8,
        "best": {k: best[k] for k in keys},
        "final": {k: lines[-1][k] for k in keys},
        "stages": stages,
        "total_seconds": 812.4,
        "peak_memory_mb": 9312.0,
        "test": {"top1": 0.9012, "macro_f1": 0.894},
    }
    env = {
        "versions": {"python": "3.11.9", "torch": "2.8.0", "torchvision": "0.23.0", "distil_tl": "0.1.0"},
        "git": {"commit": "4f1c2a9be77d03aa10cd9f2b8f0e4d1122aa33bb", "dirty": True},
        "command": "torchrun --nproc_per_node=8 -m distil_tl.train configs/flowers.yaml",
        "host": "node-17",
        "world_size": 8,
        "device": "NVIDIA H100",
        "start_time": 1_760_000_000.0,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "env.json").write_text(json.dumps(env))
    (run / "classes.json").write_text(json.dumps(names))
    (run / "config.yaml").write_text("model:\n  name: resnet50\ndata:\n  root: ${oc.env:DATA}/flowers\n")
    (run / "evaluation.json").write_text(json.dumps(build_evaluation(names, directory=run / "images")))
    return run


class Checker(HTMLParser):
    """Checks that tags are balanced, and that the page loads nothing and runs no script from the data."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        assert len({name for name, _ in attrs}) == len(attrs)
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("href", "xlink:href", "srcset", "data", "action")
            if name == "src":
                assert value is not None
                assert value.startswith("data:image/")

    def handle_endtag(self, tag):
        assert self.open, f"closing {tag} with nothing open"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u202f", " ").split())


def report(run: Path) -> tuple[str, str]:
    """The source of the page and its visible text, after the checks of `Checker`."""
    path = write_report(run)
    assert path == run / "report.html"
    page = path.read_text("utf-8")
    checker = Checker(page)
    assert checker.tags.count("script") == 1
    assert not re.search(r"@import|url\(|https?://", page)
    assert "default-src 'none'" in page or "default-src &#x27;none&#x27;" in page
    return page, checker.text
