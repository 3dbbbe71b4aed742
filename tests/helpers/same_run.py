"""Comparison of two runs: their samples, metrics, evaluation and weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from distil_tl.rundir.checkpoint import find_damage
from tests.helpers.ranks import lines


@dataclass
class Reference:
    run_dir: Path
    seen: dict[tuple[str, int], dict[int, str]]
    counted: list[dict[str, int]]  # lines by region, by rank


def hashed(batch: Any) -> list[tuple[int, str]]:
    """(image, hash of its tensor, and of all that it is mixed with) of each image of a batch."""
    parts = [list(batch.images[: len(batch.targets)])]
    if batch.partners is not None:
        mixed = batch.partners._replace(rows=batch.images[batch.partners.rows])
        parts += [list(column) for column in mixed]
    digests = [
        hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in row)).hexdigest()
        for row in zip(*parts, strict=True)
    ]
    return list(zip(batch.indices.tolist(), digests, strict=True))


def samples(folder: Path) -> tuple[dict[tuple[str, int], dict[int, str]], list[str]]:
    """Image and hash by (stage, step), over all ranks and attempts below `folder`.

    And the images that differ between two attempts.
    """
    seen: dict[tuple[str, int], dict[int, str]] = {}
    wrong = []
    for path in sorted(folder.rglob("seen-*.jsonl")):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last line of a rank that was killed
                stage, step, pairs = json.loads(line)
                images = seen.setdefault((stage, step), {})
                wrong += [f"image {i} of {stage} {step} differs" for i, h in pairs if images.setdefault(i, h) != h]
    return seen, wrong


def compare(run_dir: Path, reference: Reference, folder: Path, *, exact: bool) -> list[str]:
    """Differences between an interrupted run and the reference; empty if they are the same."""
    summaries = [json.loads((path / "summary.json").read_text()) for path in (run_dir, reference.run_dir)]
    if summaries[0]["status"] != "completed":
        return [f"the run is {summaries[0]['status']}"]
    found = []
    checkpoints = run_dir / "checkpoints"
    steps = sorted(path for path in checkpoints.iterdir() if path.is_dir() and not path.is_symlink())
    names = {path.name for path in checkpoints.iterdir()} - {path.name for path in steps} - {"last", "best"}
    found += [f"checkpoints/{name} is left over" for name in sorted(names)]
    if len(steps) > 3 or any(not path.name.removeprefix("step-").isdigit() for path in steps):
        found.append(f"checkpoints left: {[path.name for path in steps]}")
    found += [f"{path.name}: {fault}" for path in steps if (fault := find_damage(path))]
    missing = [name for name in ("report.html", "evaluation.json", "metrics.jsonl") if not (run_dir / name).exists()]
    found += [f"no {name}" for name in missing]

    seen, wrong = samples(folder)
    found += wrong
    if seen != reference.seen:
        steps_off = [key for key in seen.keys() | reference.seen.keys() if seen.get(key) != reference.seen.get(key)]
        found.append(f"other samples in {sorted(steps_off)}")

    metrics = [timeless(lines(path)) for path in (run_dir, reference.run_dir)]
    if exact:
        if metrics[0] != metrics[1]:
            first = next((i for i, pair in enumerate(zip(*metrics, strict=False)) if pair[0] != pair[1]), "the end")
            found.append(f"{len(metrics[0])} lines of metrics, not {len(metrics[1])}; they differ from {first} on")
        evaluations = [json.loads((path / "evaluation.json").read_text()) for path in (run_dir, reference.run_dir)]
        if evaluations[0] != evaluations[1]:
            found.append("another evaluation.json")
        for key in ("best", "final"):
            if summaries[0][key] != summaries[1][key]:
                found.append(f"{key}: {summaries[0][key]}, not {summaries[1][key]}")
        for name in ("last", "best"):
            mine, theirs = (path / "checkpoints" / name for path in (run_dir, reference.run_dir))
            if mine.readlink() != theirs.readlink():
                found.append(f"{name} is {mine.readlink()}, not {theirs.readlink()}")
            found += differing(f"{name} weights", *(load_file(p / "weights.safetensors") for p in (mine, theirs)))
            states = (torch.load(path / "train_state.pt", weights_only=True) for path in (mine, theirs))
            found += differing(f"{name} state", *states)
    else:
        keys = [[(m["step"], m["split"], m["window"], m["lr"]) for m in part] for part in metrics]
        if keys[0] != keys[1]:
            found.append("other lines of metrics")
        for one, two in zip(*metrics, strict=False):
            if abs(one["loss"] - two["loss"]) > 1e-3 * max(1.0, abs(two["loss"])):
                found.append(f"loss {one['loss']} and not {two['loss']} at step {one['step']} ({one['split']})")
    images = [{name: stage["train_images"] for name, stage in one["stages"].items()} for one in summaries]
    if images[0] != images[1]:
        found.append(f"trained on {images[0]} images, not {images[1]}")
    return [*found[:20], f"and {len(found) - 20} more"] if len(found) > 20 else found


TIMES = ("seconds", "data_wait_seconds")  # of a saved meter


def timeless(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rates = ("time", "seconds", "data_wait_seconds", "images_per_second")
    return [{key: value for key, value in line.items() if key not in rates} for line in found]


def differing(name: str, one: Any, two: Any) -> list[str]:
    """Places where two nested containers are not bit-equal, times left out."""
    if isinstance(one, dict) and isinstance(two, dict):
        if one.keys() != two.keys():
            return [f"{name}: other keys"]
        return [d for key in one if key not in TIMES for d in differing(f"{name}/{key}", one[key], two[key])]
    if isinstance(one, (list, tuple)):
        if len(one) != len(two):
            return [f"{name}: other length"]
        return [d for i in range(len(one)) for d in differing(f"{name}/{i}", one[i], two[i])]
    if isinstance(one, torch.Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape
        same = same and bool((one.reshape(-1).view(torch.uint8) == two.reshape(-1).view(torch.uint8)).all())
        return [] if same else [f"{name} differs"]
    return [] if one == two else [f"{name}: {one!r}, not {two!r}"]
