"""Auto-tuning: the fastest precision and memory format for a stage, found by timing a few steps of each.

Which is fastest differs by model, machine and direction, so `precision: auto` times a few steps of each if a stage
is long enough. All ranks agree on the result; it is recorded with the run and kept on resume.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from distil_tl.distributed.collectives import max_over_ranks
from distil_tl.distributed.process_group import DistInfo
from distil_tl.distributed.rank_zero import on_rank_zero
from distil_tl.training.memory import free_memory
from distil_tl.training.precision import Compute
from distil_tl.utils.files import read_json, write_json
from distil_tl.utils.home import cache_dir
from distil_tl.utils.log import logger

ROUNDS = 3  # timed steps of each candidate, after one that is not timed
MARGIN = 1.15  # how much faster than the default another candidate must be to be chosen
FORMAT = 2  # of the cached results; increased when networks compute differently, so that old results are not used
WORTH = 20  # a trial of n images is made if at least this many times n images follow


def choose(
    info: DistInfo,
    options: Sequence[Compute],
    step: Callable[[Compute, int], None],
    *,
    what: str,
    images: int,
    remaining: int,
    depends_on: dict[str, Any],
) -> Compute:
    """The fastest of `options`, the same on all ranks; the first one if the stage is too short for a trial.

    The result is cached in a file, so that it is the same each time on the same machine.

    Args:
        step: one step of so many images, without side effects.
        what: for the log.
        images: of a step; fewer where memory does not suffice.
        remaining: images that this rank will process with the result.
        depends_on: what may change the result, other than machine and software.
    """
    if len(options) == 1 or remaining < WORTH * images * len(options) * (ROUNDS + 1):
        return options[0]
    names = [str(option) for option in options]
    # The keys of this dictionary name the cached file: they stay as they are.
    question = {**depends_on, "ways": names, "images": images, "ranks": info.launch.local_world_size, **_rounding()}
    path = _cache_file(info.device, question)
    cached = on_rank_zero(info, f"looking up the precision of {what}", lambda: _read(path))
    if cached in names:
        return Compute.parse(cached)
    while True:
        seconds = [max_over_ranks(info, found) for found in _time(info, options, step, images)]
        if images == 1 or min(seconds) < float("inf"):
            break
        images //= 2
    fastest = min(range(len(options)), key=seconds.__getitem__)
    chosen = options[fastest] if seconds[0] > MARGIN * seconds[fastest] else options[0]
    speeds = ", ".join(f"{name} {images / s:.0f}" for name, s in zip(names, seconds, strict=True))
    logger.info("%s: %s (images/s per rank in a trial: %s)", what, chosen, speeds)
    on_rank_zero(info, f"caching the precision of {what}", lambda: _write(path, str(chosen)))
    return chosen


def _time(info: DistInfo, options: Sequence[Compute], step: Callable[[Compute, int], None], images: int) -> list[float]:
    """Seconds of the fastest step of each option, tried in turn; infinite for one that does not work here."""
    best = [float("inf")] * len(options)
    broken = set[int]()
    for turn in range(ROUNDS + 1):
        for i, option in enumerate(options):
            if i in broken:
                continue
            began = time.perf_counter()
            try:
                step(option, images)
            except RuntimeError:  # out of memory, or an operator without this precision
                broken.add(i)
            if i in broken:
                free_memory()
                continue
            if info.device.type == "cuda":
                torch.cuda.synchronize(info.device)
            if turn:
                best[i] = min(best[i], time.perf_counter() - began)
    return [float("inf") if i in broken else seconds for i, seconds in enumerate(best)]


def _rounding() -> dict[str, bool]:
    """The settings of `set_rounding` that are not the default, which earlier results were found with."""
    cudnn = torch.backends.cudnn
    found = {"tf32": False} if not cudnn.allow_tf32 else {}
    return {**found, "deterministic": True} if cudnn.deterministic else found


def _cache_file(device: torch.device, question: dict[str, Any]) -> Path:
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    question = {
        **question,
        "format": FORMAT,
        "machine": machine,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:24]
    return cache_dir() / "precision" / f"{digest}.json"


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _read(path: Path) -> str | None:
    try:
        found: str = read_json(path)["chosen"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _write(path: Path, chosen: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"chosen": chosen})
    except OSError as error:
        logger.info("can't cache the precision in %s: %s", path, error)
