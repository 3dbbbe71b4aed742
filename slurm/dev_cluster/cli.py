"""The sub-commands and their arguments."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from dev_cluster import accounting, daemons, lifecycle, network
from dev_cluster.config import (
    DEFAULT_DIR,
    DIR_VARIABLE,
    GPUS,
    HEAD,
    Cluster,
    FailedError,
    RefusedError,
    message,
    read_cluster,
)
from dev_cluster.namespaces import holder_of, holders, running


def up(args: argparse.Namespace) -> None:
    cluster = bring_up(args)
    script, option = shlex.quote(sys.argv[0]), f"--dir {cluster.dir}"
    print(f'eval "$({script} env {option})"   # then srun, sbatch, squeue, sacct ...')
    print(f"{script} down {option}")


def bring_up(args: argparse.Namespace) -> Cluster:
    return lifecycle.bring_up(args.dir, args.name, args.nodes, args.cpus, args.memory)


def run(args: argparse.Namespace) -> int:
    """Run a command with a new cluster. Returns its exit status."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise RefusedError("no command given: dev-cluster run [OPTIONS] -- COMMAND ...")
    cluster = bring_up(args)
    try:
        process = subprocess.Popen(command, env={**os.environ, **cluster.environment})

        def forward(number: int, frame: FrameType | None) -> None:
            if number != signal.SIGINT:  # the terminal sends Ctrl-C to the command, too
                process.send_signal(number)

        for number in lifecycle.SIGNALS:
            signal.signal(number, forward)
        code = process.wait()
        return code if code >= 0 else 128 - code
    except OSError as error:
        raise RefusedError(f"{command[0]}: {error.strerror}") from None
    finally:
        lifecycle.ignore_signals()
        with lifecycle.locked(cluster.dir):
            lifecycle.take_down(cluster.dir)


def down(args: argparse.Namespace) -> None:
    lifecycle.ignore_signals()  # otherwise half of a cluster could remain
    existed = lifecycle.take_down_checked(args.dir)
    message(f"{args.dir} is down" if existed else f"there is no cluster in {args.dir}")


def env(args: argparse.Namespace) -> None:
    for name, value in read_cluster(args.dir).environment.items():
        print(f"export {name}={shlex.quote(value)}")


def status(args: argparse.Namespace) -> int:
    """0 if all machines and daemons run and all links are up, else 1."""
    cluster = read_cluster(args.dir)
    alive = holders(cluster.dir)
    commands = {machine: set(running(holder).values()) for machine, holder in alive.items()}
    states = {}
    if "slurmctld" in commands.get(HEAD, ()):  # without it sinfo waits for a long time
        with contextlib.suppress(FailedError):
            states = daemons.node_states(cluster)
    print(f"{cluster.dir}: {cluster.name}, {cluster.nodes} x ({cluster.cpus} CPUs, {GPUS} GPUs), {cluster.subnet}")
    all_ok = True
    for machine in (HEAD, *cluster.node_names):
        problems = ["dead"]
        if machine in commands:
            problems = [f"no {name}" for name in daemons.missing_daemons(machine, commands[machine])]
        if machine != HEAD and HEAD in alive and network.link_is_cut(alive[HEAD], machine):
            problems.append("cut off")
        all_ok = all_ok and not problems
        state = "" if machine == HEAD else states.get(machine, "unknown")
        print(f"{machine:<6}{cluster.address(machine):<16}{state:<10}{', '.join(problems) or 'ok'}")
    return 0 if all_ok else 1


def read_node(args: argparse.Namespace) -> tuple[Cluster, str]:
    cluster = read_cluster(args.dir)
    if args.node not in cluster.node_names:
        raise RefusedError(f"there is no node {args.node or ''!r}: {', '.join(cluster.node_names)}")
    return cluster, args.node


def cut(args: argparse.Namespace) -> None:
    cluster, node = read_node(args)
    network.set_link(holder_of(cluster, HEAD), node, "down")


def heal(args: argparse.Namespace) -> None:
    cluster, node = read_node(args)
    network.set_link(holder_of(cluster, HEAD), node, "up")


def kill_slurmd(args: argparse.Namespace) -> None:
    cluster, node = read_node(args)
    daemons.kill_slurmd(holder_of(cluster, node))


def start_slurmd(args: argparse.Namespace) -> None:
    cluster, node = read_node(args)
    holder = holder_of(cluster, node)
    if not daemons.slurmds(holder):
        daemons.start_slurmd(cluster, holder, node)


def read_daemon(args: argparse.Namespace) -> tuple[Cluster, str]:
    """The cluster, and the machine of the daemon."""
    if args.what == "node":
        return read_node(args)
    if args.node is not None:
        raise RefusedError(f"{args.what} takes no NODE")
    return read_cluster(args.dir), HEAD


def stop(args: argparse.Namespace) -> None:
    cluster, machine = read_daemon(args)
    daemons.stop(holder_of(cluster, machine), daemons.STOPPABLE[args.what])


def start(args: argparse.Namespace) -> None:
    cluster, machine = read_daemon(args)
    holder, deadline = holder_of(cluster, machine), time.monotonic() + daemons.TIMEOUT
    if daemons.STOPPABLE[args.what] in running(holder).values():
        return
    if args.what == "node":
        daemons.start_slurmd(cluster, holder, machine)
    elif args.what == "munge":
        daemons.start_munged(cluster, holder)
        daemons.wait_for_munged(cluster, holder, deadline)
    elif args.what == "accounting":
        accounting.restart_slurmdbd(cluster, holder, deadline)
    else:
        daemons.start_slurmctld(cluster, holder, deadline)


def build_parser() -> argparse.ArgumentParser:
    description = "A temporary Slurm cluster with accounting, on one Debian machine. Needs root."
    parser = argparse.ArgumentParser(prog="dev-cluster", description=description)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--dir", type=lambda text: Path(text).resolve(), default=os.environ.get(DIR_VARIABLE) or DEFAULT_DIR,
            help=f"directory of the cluster; use two for two clusters (${DIR_VARIABLE}, else {DEFAULT_DIR})",
        )  # fmt: skip
        command.set_defaults(function=function)
        return command

    starting = [
        add("up", up, "bring up a cluster, and wait until its nodes are idle"),
        add("run", run, "bring up a cluster, run a command with it, and take it down"),
    ]
    starting[1].add_argument("command", nargs=argparse.REMAINDER)
    for command in starting:
        command.add_argument("--nodes", type=int, default=2, help="number of nodes: n1, n2, ... (2)")
        command.add_argument("--cpus", type=int, default=4, help="CPUs that each node claims (4)")
        command.add_argument("--memory", type=int, default=64000, metavar="MB", help="memory it claims (64000)")
        command.add_argument("--name", default="dev", help="name of the cluster in accounting (dev)")
    add("down", down, "take a cluster down completely, also one that is only half made")
    add("env", env, 'print the variables that Slurm\'s commands need, for eval "$(dev-cluster env)"')
    add("status", status, "print the state of each machine; exit status 1 if anything is not ok")
    for name, function, text in (
        ("cut", cut, "cut a node off the network; its processes keep running"),
        ("heal", heal, "connect it again"),
        ("kill-slurmd", kill_slurmd, "kill a node's slurmd; its jobs' processes keep running"),
        ("start-slurmd", start_slurmd, "start it again"),
    ):
        add(name, function, text).add_argument("node", metavar="NODE")
    for name, function, text in (
        ("stop", stop, "stop slurmctld, slurmdbd, munged, or a node's slurmd, as its service would be"),
        ("start", start, "start it again, and wait until it answers"),
    ):
        command = add(name, function, text)
        command.add_argument("what", choices=list(daemons.STOPPABLE))
        command.add_argument("node", nargs="?", metavar="NODE", help="of what=node")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 1 failed, 2 refused; else that of the command of `run` or of `status`."""
    args = build_parser().parse_args(arguments)
    try:
        if os.geteuid() != 0 and args.function is not env:
            raise RefusedError("only root may make and enter network namespaces; run this as root")
        with lifecycle.signals_raise_exit():
            return args.function(args) or 0
    except RefusedError as error:
        message(f"dev-cluster: {error}")
        return 2
    except (FailedError, OSError) as error:
        message(f"dev-cluster: {error}")
        return 1
