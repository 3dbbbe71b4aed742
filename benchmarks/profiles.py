"""`python -m benchmarks.profiles [CONFIG.yaml] [key=value ...]`: where a run spends its time.

Trains in this process under Python's profiler, with the given arguments. For the imports, the start, each stage and the
end it prints the functions with the most time of their own. The time of compiled code counts for the Python call that
started it. Threads and loader processes are not profiled, but the time spent waiting for them is.
"""

from __future__ import annotations

import cProfile
import importlib
import os
import pstats
import sys
import time
from collections.abc import Callable
from typing import Any

from distil_tl import arguments

TOP = 8
IMPORTS = ("torch", "torchvision", "distil_tl.train")  # timm is imported later, if the network is one of timm's


class Parts:
    """A profile for each part of a run. Only one is enabled at a time."""

    def __init__(self) -> None:
        self.profiles: dict[str, cProfile.Profile] = {}
        self.seconds: dict[str, float] = {}
        self.now: str | None = None
        self._began = 0.0

    def enter(self, part: str | None) -> None:
        """Switch to another part; None: to no profile."""
        if self.now is not None:
            self.profiles[self.now].disable()
            self.seconds[self.now] = self.seconds.get(self.now, 0.0) + time.monotonic() - self._began
        self.now, self._began = part, time.monotonic()
        if part is not None:
            self.profiles.setdefault(part, cProfile.Profile()).enable()

    def within(self, function: Callable[..., Any], part_of: Callable[..., str]) -> Callable[..., Any]:
        """`function`, profiled as its own part. `part_of(*args)` is the name of the part."""

        def timed(*args: Any, **options: Any) -> Any:
            outer = self.now
            self.enter(part_of(*args))
            try:
                return function(*args, **options)
            finally:
                self.enter(outer)

        return timed


def main(args: list[str]) -> int:
    arguments.check_arguments("benchmarks.profiles", args)
    imports = []
    for name in IMPORTS:
        began = time.monotonic()
        importlib.import_module(name)
        imports.append((name, time.monotonic() - began))
    from benchmarks.measure import markdown

    train: Any = importlib.import_module("distil_tl.train")
    modules: list[Any] = [train, importlib.import_module("distil_tl.finish")]
    parts = Parts()
    os.register_at_fork(after_in_child=lambda: parts.enter(None))  # loader processes are not profiled
    train.run_stage = parts.within(train.run_stage, lambda run, stage: f"stage {stage.name}, rest")
    train.set_up_stage = parts.within(train.set_up_stage, lambda info, stage, *_: f"stage {stage.name}, setup")
    train.train_one_epoch = parts.within(
        train.train_one_epoch, lambda run, training, position: f"stage {training.stage.name}, training"
    )
    for module in modules:
        module.evaluate = parts.within(module.evaluate, lambda info, *_: f"{evaluated(info.phase)}, evaluation")
    train.finish = parts.within(train.finish, lambda run: "the end")
    parts.enter("start, after the imports")
    status: int = train.main(args)
    parts.enter(None)
    if status:
        return status

    text = "**Imports**, seconds in addition to the ones above:\n\n"
    text += markdown(["package", "seconds"], [(name, f"{seconds:.2f}") for name, seconds in imports])
    for part, profile in parts.profiles.items():
        rows = top(profile, parts.seconds[part])
        text += (
            f"\n**{part}**, {parts.seconds[part]:.2f} s:\n\n{markdown(['function', 'calls', 'own seconds', ''], rows)}"
        )
    sys.stdout.write(text)
    return status


def evaluated(phase: str) -> str:
    """The part of a phase: "stage head" for "... after epoch 2 of stage head", "the end" for the final evaluation."""
    return phase.rpartition(" of ")[2] if " of " in phase else "the end"


def top(profile: cProfile.Profile, total: float) -> list[list[str]]:
    """The functions with the most time of their own: name, calls, seconds, share of `total`."""
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    most = sorted(((entry[2], entry[1], where) for where, entry in stats.items()), reverse=True)[:TOP]
    return [[name(*where), f"{calls:,}", f"{own:.2f}", f"{own / total:.0%}"] for own, calls, where in most]


def name(path: str, line: int, function: str) -> str:
    """A readable name: `torch/_ops.py:1209 __call__`, or a built-in function without its address."""
    if path == "~":
        return f"`{function.strip('<>').removeprefix('built-in method ').removeprefix('method ')}`"
    short = path.rpartition("site-packages/")[2]
    return f"`{'/'.join(short.split('/')[-3:])}:{line} {function}`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
