"""Accounting, for sacct: slurmdbd and its database, mariadbd."""

from __future__ import annotations

import time

from dev_cluster.config import Cluster
from dev_cluster.daemons import start, wait_for, works
from dev_cluster.namespaces import entered
from dev_cluster.processes import execute


def start_database(cluster: Cluster, head: int, deadline: float) -> None:
    """Make an empty database, and start mariadbd for it."""
    directory = cluster.dir
    # Small, local, and without waiting for the disk: the data are temporary.
    options = (
        "--no-defaults", f"--datadir={directory}/db", "--user=root", f"--tmpdir={directory}/db",
        "--innodb-log-file-size=8M", "--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0",
    )  # fmt: skip
    install = ("mariadb-install-db", *options, "--auth-root-authentication-method=normal", "--skip-test-db")
    execute([*entered(head), *install], timeout=deadline - time.monotonic())
    start(
        cluster, head, "mariadbd", "mariadbd", *options, "--skip-networking", f"--socket={directory}/db/socket",
        f"--pid-file={directory}/run/mariadbd.pid", "--skip-log-bin",
    )  # fmt: skip


def start_slurmdbd(cluster: Cluster, head: int, deadline: float) -> None:
    """Start slurmdbd and add the cluster to it, which slurmctld needs when it starts."""
    wait_for(cluster, head, "mariadbd", (cluster.dir / "db/socket").is_socket, deadline)
    start(cluster, head, "slurmdbd", "slurmdbd")
    add = ("sacctmgr", "-i", "add", "cluster", cluster.name)
    wait_for(cluster, head, "slurmdbd", lambda: works(cluster, *add), deadline)


def restart_slurmdbd(cluster: Cluster, head: int, deadline: float) -> None:
    start(cluster, head, "slurmdbd", "slurmdbd")
    wait_for(cluster, head, "slurmdbd", lambda: works(cluster, "sacctmgr", "list", "cluster"), deadline)
