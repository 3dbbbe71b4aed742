"""`python -m benchmarks.profiles [CONFIG.yaml] [key=value ...]`: where the time of a run goes, by part of it.

Trains in this process, with those arguments, under Python's profiler, and prints for the imports, the start, each
stage and the end what took most time of its own. What compiled code does counts for the call that began it; threads
and loader processes are not seen, but waiting for them is.
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

TOP = 8
IMPORTS = ("torch", "torchvision", "distil_tl.train")  # timm comes with the network, if it has it


class Parts:
    """A profile for each part of a run; one at a time is on."""

    def __init__(self) -> None:
        self.profiles: dict[str, cProfile.Profile] = {}
        self.seconds: dict[str, float] = {}
        self.now: str | None = None
        self._began = 0.0

    def enter(self, part: str | None) -> None:
        """Go on in another part; None: in none."""
        if self.now is not None:
            self.profiles[self.now].disable()
            self.seconds[self.now] = self.seconds.get(self.now, 0.0) + time.monotonic() - self._began
        self.now, self._began = part, time.monotonic()
        if part is not None:
            self.profiles.setdefault(part, cProfile.Profile()).enable()

    def within(self, function: Callable[..., Any], part_of: Callable[..., str]) -> Callable[..., Any]:
        """`function`, as a part of its own, which `part_of` its arguments names; then on in the part around it."""

        def timed(*args: Any, **options: Any) -> Any:
            around = self.now
            self.enter(part_of(*args))
            try:
                return function(*args, **options)
            finally:
                self.enter(around)

        return timed


def main(args: list[str]) -> int:
    imports = []
    for name in IMPORTS:
        began = time.monotonic()
        importlib.import_module(name)
        imports.append((name, time.monotonic() - began))
    from benchmarks.measure import markdown

    train: Any = importlib.import_module("distil_tl.train")
    parts = Parts()
    os.register_at_fork(after_in_child=lambda: parts.enter(None))  # loader processes are no part of it
    train.run_stage = parts.within(train.run_stage, lambda job, name, *_: f"stage {name}, all else")
    train.get_ready = parts.within(train.get_ready, lambda job, name, *_: f"stage {name}, getting ready")
    train.train_one_epoch = parts.within(train.train_one_epoch, lambda job, run, *_: f"stage {run.name}, training")
    train.evaluate = parts.within(train.evaluate, lambda info, *_: f"{evaluated(info.phase)}, evaluation")
    train.finish = parts.within(train.finish, lambda job: "the end")
    parts.enter("start, after the imports")
    status: int = train.main(args)
    parts.enter(None)
    if status:
        return status

    text = "**Imports**, seconds on top of those before:\n\n"
    text += markdown(["package", "seconds"], [(name, f"{seconds:.2f}") for name, seconds in imports])
    for part, profile in parts.profiles.items():
        rows = top(profile, parts.seconds[part])
        text += (
            f"\n**{part}**, {parts.seconds[part]:.2f} s:\n\n{markdown(['of its own', 'calls', 'seconds', ''], rows)}"
        )
    sys.stdout.write(text)
    return status


def evaluated(phase: str) -> str:
    """Of `the evaluation after epoch 2 of stage head` the stage; of `the final evaluation on val`, the end."""
    return phase.rpartition(" of ")[2] if " of " in phase else "the end"


def top(profile: cProfile.Profile, total: float) -> list[list[str]]:
    """The functions with most time of their own: name, calls, seconds, share."""
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    found = sorted(((entry[2], entry[1], where) for where, entry in stats.items()), reverse=True)[:TOP]
    return [[name(*where), f"{calls:,}", f"{own:.2f}", f"{own / total:.0%}"] for own, calls, where in found]


def name(path: str, line: int, function: str) -> str:
    """As people know it: `torch/_ops.py:1209 __call__`, or a built-in one without its address."""
    if path == "~":
        return f"`{function.strip('<>').removeprefix('built-in method ').removeprefix('method ')}`"
    short = path.rpartition("site-packages/")[2]
    return f"`{'/'.join(short.split('/')[-3:])}:{line} {function}`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
