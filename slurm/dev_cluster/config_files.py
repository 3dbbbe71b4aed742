"""The files that Slurm and the machines read, and the directories for what the daemons write."""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import asdict

from dev_cluster.config import GPUS, HEAD, Cluster

# The first process of a machine. It ignores CHLD, so that the kernel removes orphaned processes when they end. dash
# cannot ignore CHLD, bash can.
MACHINE = """#!/bin/bash
set -e
mount -t proc proc /proc
mount -t tmpfs -o mode=1777 shm /dev/shm
mount --bind "${0%/*}/hosts" /etc/hosts
hostname "$1"
ip link set lo up
echo ready
exec >/dev/null
trap '' CHLD
exec sleep infinity
"""

# Kills the orphaned processes of a task that has ended, as cgroups do on a production cluster. Otherwise the step would
# wait a minute for the end of the orphan's output, and Slurm might drain the node. The script drops its environment, so
# that it does not find itself.
TASK_EPILOG = r"""#!/bin/sh
[ $# = 3 ] || exec env -i "$0" "$SLURM_JOB_ID" "$SLURM_STEP_ID" "$SLURM_PROCID"
for environ in $(grep -lzx "SLURM_JOB_ID=$1" /proc/[0-9]*/environ 2>/dev/null); do
  task=$(tr '\0' '\n' <"$environ" 2>/dev/null | sed -n 's/^SLURM_\(STEP_ID\|PROCID\)=/\1 /p' | sort | tr '\n' ' ')
  [ "$task" = "PROCID $3 ${2:+STEP_ID $2 }" ] || continue
  pid=${environ#/proc/}
  kill -KILL "${pid%/environ}" 2>/dev/null
done
exit 0
"""

SLURM_CONF = """
ClusterName={name}
SlurmctldHost=head({head})
SlurmUser=root
AuthType=auth/munge
# A requeued job cannot start before its old credentials have expired: after two minutes by default.
AuthInfo=socket={dir}/munge/socket,cred_expire=5
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdPidFile={dir}/run/slurmd-%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd-%n.log
MailProg=/bin/true
TaskEpilog={dir}/etc/task-epilog
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={head}
AccountingStoragePass={dir}/munge/socket
AccountingStorageTRES=gres/gpu
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none

# Nodes may claim more than the machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu

# Short intervals and timeouts, for tests.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2,bf_min_age_reserve=0
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=30
MinJobAge=3600
InactiveLimit=0
OverTimeLimit=0
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE

NodeName=DEFAULT CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=UNLIMITED DefaultTime=60
PartitionName=batch Default=YES PriorityTier=1
PartitionName=grace PriorityTier=1 GraceTime=20
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
"""

SLURMDBD_CONF = """
DbdHost=head
DbdAddr={head}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
LogFile={dir}/log/slurmdbd.log
PidFile={dir}/run/slurmdbd.pid
"""


def write_files(cluster: Cluster) -> None:
    """Fill the cluster's directory, which exists and is empty but for cluster.json."""
    for name, mode in {
        "etc": 0o755, "log": 0o755, "run": 0o755, "munge": 0o755,
        "key": 0o700, "db": 0o700, "state": 0o700, "spool": 0o755, "gpus": 0o755,
        **{f"spool/{node}": 0o755 for node in cluster.node_names},
    }.items():  # fmt: skip
        (cluster.dir / name).mkdir(0o700)
        (cluster.dir / name).chmod(mode)  # independent of the umask
    key = cluster.dir / "key/munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    for i in range(GPUS):
        # Slurm checks that the device exists and never opens it. This one is /dev/null under another name.
        os.mknod(cluster.dir / f"gpus/gpu{i}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    nodes = [f"NodeName={node} NodeAddr={cluster.address(node)}" for node in cluster.node_names]
    values = asdict(cluster) | {"nodes": "\n".join(nodes), "head": cluster.address(HEAD), "gpus": GPUS}
    files = {
        "hosts": hosts(cluster),
        "slurm.conf": SLURM_CONF.format(**values),
        "gres.conf": f"Name=gpu File={cluster.dir}/gpus/gpu[0-{GPUS - 1}]\n",
        "cgroup.conf": "",
        "slurmdbd.conf": SLURMDBD_CONF.format(**values),
        "task-epilog": TASK_EPILOG,
        "machine": MACHINE,
    }
    for name, text in files.items():
        path = cluster.dir / "etc" / name
        path.touch(mode=0o600)
        path.write_text(text)
        path.chmod({"slurmdbd.conf": 0o600, "task-epilog": 0o755, "machine": 0o755}.get(name, 0o644))


def hosts(cluster: Cluster) -> str:
    """/etc/hosts of all machines: the head, the nodes and the host."""
    here = socket.gethostname()
    names = {name: cluster.address(name) for name in (HEAD, *cluster.node_names)}
    if here != "localhost":
        names.setdefault(here, cluster.address(""))
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
    return "\n".join(lines) + "\n"
