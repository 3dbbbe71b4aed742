"""How long it takes until all ranks end after one is killed or frozen: `python -m benchmarks.lost_ranks --help`.

Of three ranks, rank 0 waits in a collective, rank 1 is blocked in C code that holds Python's lock and never returns,
and rank 2 kills or stops itself. torchrun and srun notice a killed process too; only the watchdogs notice a frozen one.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from distil_tl.utils.command import exit_process, run_command
from distil_tl.utils.log import setup_console

RANKS, BLOCKED, STRUCK = 3, 1, 2
FAULTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
PATIENCE = 300.0  # seconds
LAUNCHERS = {
    "torchrun": f"{Path(sys.executable).parent}/torchrun --nproc_per_node={RANKS} --rdzv-backend=c10d "
    f"--rdzv-endpoint=localhost:0 --no-python",
    "srun": f"srun --kill-on-bad-exit=1 --ntasks={RANKS}",
}


@dataclass
class Ended:
    """One repetition: seconds from the fault to the end of all ranks, then by rank its status and who is named."""

    seconds: float
    statuses: str
    named: str


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--launcher", choices=tuple(LAUNCHERS), default="torchrun")
    parser.add_argument("--options", default="", help="of the launcher, as in --options=--nodes=2")
    parser.add_argument("--fault", choices=tuple(FAULTS), default="kill")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--parallel", type=int, default=4, help="repetitions at the same time")
    parser.add_argument("--heartbeat", type=float, default=60.0, help="distributed.heartbeat_seconds")
    parser.add_argument("--rank", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        exit_process(run_command("lost_ranks", lambda: rank(options.rank, options.fault, options.heartbeat)))
    # Not in /tmp, which each node of a cluster may have for itself.
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder, ThreadPoolExecutor(options.parallel) as pool:
        found = list(pool.map(lambda n: repetition(Path(folder) / str(n), options), range(options.repeats)))
    times = sorted(one.seconds for one in found)
    lines = [
        f"{options.launcher}, {options.fault}, {len(found)} times: seconds until all ended: min {times[0]:.1f}, median "
        f"{statistics.median(times):.1f}, max {times[-1]:.1f}"
    ]
    for one, number in Counter((one.statuses, one.named) for one in found).most_common():
        lines.append(f"  {number} times: {one[0]}; {one[1]}")
    sys.stdout.write("\n".join(lines) + "\n")


def repetition(folder: Path, options: argparse.Namespace) -> Ended:
    folder.mkdir()
    arguments = ["--rank", str(folder), f"--fault={options.fault}", f"--heartbeat={options.heartbeat}"]
    body = shlex.join([sys.executable, "-m", "benchmarks.lost_ranks", *arguments])
    number = "${RANK:-$SLURM_PROCID}"
    # The shell ignores TERM, which launchers send, so that it can write down how the rank ended.
    script = f'trap "" TERM; {body} 2>{folder}/said-{number}; s=$?; echo $s >{folder}/status-{number}; exit $s'
    command = [*shlex.split(LAUNCHERS[options.launcher]), *shlex.split(options.options), "bash", "-c", script]
    with (folder / "launcher").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            wait_until(folder, lambda: all((folder / f"ready-{number}").exists() for number in range(RANKS)))
            (folder / "go").touch()
            wait_until(folder, lambda: all(has_ended(folder / f"lock-{number}") for number in range(RANKS)))
            ended = time.time()
            process.wait(PATIENCE)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    others = [number for number in range(RANKS) if number != STRUCK]
    statuses = [f"rank {number}: status {read(folder / f'status-{number}')}" for number in range(RANKS)]
    struck = f"rank {STRUCK} (host "
    named = [number for number in others if struck in read(folder / f"said-{number}")]
    return Ended(ended - float(read(folder / "struck")), ", ".join(statuses), f"rank {STRUCK} named by ranks {named}")


def read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else "unknown"


def has_ended(lock: Path) -> bool:
    """Whether the process that had locked the file has ended."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def wait_until(folder: Path, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            said = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
            raise TimeoutError(f"nothing happened in {PATIENCE} s: {said}")
        time.sleep(0.05)


def rank(folder: Path, fault: str, heartbeat: float) -> None:
    """One rank of a repetition."""
    import torch  # only the ranks need it

    from distil_tl.distributed.collectives import sum_over_ranks
    from distil_tl.distributed.config import DistributedConfig
    from distil_tl.distributed.launch_env import read_launch
    from distil_tl.distributed.preemption import StopSignal
    from distil_tl.distributed.process_group import init_distributed

    launch = read_launch(os.environ)
    setup_console(False)
    lock = (folder / f"lock-{launch.rank}").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    config = DistributedConfig(device="cpu", heartbeat_seconds=heartbeat)
    with StopSignal() as stop, init_distributed(launch, config) as info:
        stop.defer()  # as while a run trains
        (folder / f"ready-{launch.rank}").touch()
        if launch.rank == BLOCKED:
            mutex, library = ctypes.create_string_buffer(64), ctypes.PyDLL(None)  # which keeps Python's lock
            library.pthread_mutex_lock(mutex)
            library.pthread_mutex_lock(mutex)  # never returns, also not for a signal
        if launch.rank == STRUCK:
            while not (folder / "go").exists():
                time.sleep(0.02)
            (folder / "struck").write_text(str(time.time()))
            os.kill(os.getpid(), FAULTS[fault])
        sum_over_ranks(info, torch.zeros(1))


if __name__ == "__main__":
    main()
