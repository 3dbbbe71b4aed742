"""A training that requeues its Slurm job: `python -m launch.task [CONFIG.yaml] [key=value ...]`, for batch scripts.

As `python -m distil_tl.train`, but when a run was asked to stop, and has saved, its job goes back into the queue.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from distil_tl.utils.command import leave
from launch.args import split
from launch.job import train_and_requeue


def main(args: Sequence[str] | None = None) -> int:
    return train_and_requeue(split(sys.argv[1:] if args is None else args)[1])


if __name__ == "__main__":
    leave(main())
