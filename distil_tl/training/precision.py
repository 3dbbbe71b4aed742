"""What numbers a network computes in and how they lie in memory: set, or found by a trial.

Which is fastest differs by model, machine and direction, so `precision: auto` times a few steps of each where a stage
is long enough to be worth it. What was found is agreed on by all ranks, recorded with the run and kept when it goes on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distil_tl.distributed.collectives import max_over_ranks
from distil_tl.distributed.process_group import DistInfo
from distil_tl.distributed.rank_zero import on_rank_zero
from distil_tl.utils.files import cache_dir, write_json
from distil_tl.utils.log import logger

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
COMPILE = ("none", "prefix", "all")
ROUNDS = 3  # steps of each way that are timed, after one that is not
MARGIN = 1.15  # how much faster another way must be to be taken instead of the first
FORMAT = 2  # counted up when networks compute otherwise, so that what was found before is not believed
WORTH = 20  # a trial of n images is made where n times this are to come

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """One way to compute.

    Attributes:
        dtype: what autocast computes in; None is plain float32.
        channels_last: whether maps lie in memory with their channels innermost.
    """

    dtype: torch.dtype | None
    channels_last: bool

    def __str__(self) -> str:
        name = next(name for name, dtype in _DTYPES.items() if dtype is self.dtype)
        return f"{name} channels_last" if self.channels_last else name

    @classmethod
    def parse(cls, text: str) -> Compute:
        """The way back from `str`."""
        name, _, layout = text.partition(" ")
        return cls(_DTYPES[name], layout == "channels_last")

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, self.dtype, enabled=self.dtype is not None)


def ways_to_compute(precision: str, module: nn.Module, device: torch.device) -> list[Compute]:
    """The ways that may be tried, the one to take without a trial first; a `precision` that is set leaves no other.

    `auto` without a trial: bf16 (else fp16) on CUDA, float32 on CPU.
    """
    convolutional = any(isinstance(m, nn.Conv2d) for m in module.modules())
    if precision != "auto":
        return [Compute(_DTYPES[precision], convolutional)]
    if device.type == "cuda":
        half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        ways = [Compute(half, True), Compute(half, False), Compute(None, True)]
    else:
        ways = [Compute(None, True), Compute(None, False), Compute(torch.bfloat16, True)]
    if convolutional:
        return ways
    return list(dict.fromkeys(Compute(way.dtype, False) for way in ways))


def usual_way(precision: str, module: nn.Module, device: torch.device) -> Compute:
    """The one to take without a trial."""
    return ways_to_compute(precision, module, device)[0]


def choose(
    info: DistInfo,
    ways: Sequence[Compute],
    step: Callable[[Compute], None],
    *,
    what: str,
    images: int,
    to_come: int,
    depends_on: dict[str, Any],
) -> Compute:
    """The fastest of some ways, the same on all ranks; the first, where a trial would not pay.

    A machine asked the same again answers the same, from a file in the cache.

    Args:
        step: takes a step of `images` images in the way given, and leaves no trace.
        what: for the log.
        to_come: images that this rank will be through in the way chosen.
        depends_on: what else than machine and software may make another way the fastest.
    """
    if len(ways) == 1 or to_come < WORTH * images * len(ways) * (ROUNDS + 1):
        return ways[0]
    matter = {**depends_on, "ways": [str(way) for way in ways], "images": images, "ranks": info.launch.local_world_size}
    path = _memory(info.device, matter)
    known = on_rank_zero(info, f"looking up how to compute {what}", lambda: _recall(path))
    if known in matter["ways"]:
        return Compute.parse(known)
    seconds = [max_over_ranks(info, found) for found in _time(info, ways, step)]
    fastest = min(range(len(ways)), key=seconds.__getitem__)
    chosen = ways[fastest] if seconds[0] > MARGIN * seconds[fastest] else ways[0]
    shown = ", ".join(f"{way} {images / s:.0f}" for way, s in zip(ways, seconds, strict=True))
    logger.info("%s computes in %s (images/s a rank in a trial: %s)", what, chosen, shown)
    on_rank_zero(info, f"noting how to compute {what}", lambda: _remember(path, str(chosen)))
    return chosen


def _time(info: DistInfo, ways: Sequence[Compute], step: Callable[[Compute], None]) -> list[float]:
    """Seconds of the fastest step in each way, tried in turn; infinite for one that does not work here."""
    best = [float("inf")] * len(ways)
    broken = set[int]()
    for turn in range(ROUNDS + 1):
        for i, way in enumerate(ways):
            if i in broken:
                continue
            began = time.perf_counter()
            try:
                step(way)
            except RuntimeError:  # out of memory, or an operator that this precision lacks
                broken.add(i)
                continue
            if info.device.type == "cuda":
                torch.cuda.synchronize(info.device)
            if turn:
                best[i] = min(best[i], time.perf_counter() - began)
    return [float("inf") if i in broken else seconds for i, seconds in enumerate(best)]


def _memory(device: torch.device, matter: dict[str, Any]) -> Path:
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    matter = {
        **matter,
        "format": FORMAT,
        "machine": machine,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(matter, sort_keys=True).encode()).hexdigest()[:24]
    return cache_dir() / "precision" / f"{digest}.json"


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _recall(path: Path) -> str | None:
    try:
        found: str = json.loads(path.read_text())["chosen"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _remember(path: Path, chosen: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"chosen": chosen})
    except OSError as error:
        logger.info("can't remember how to compute in %s: %s", path, error)
