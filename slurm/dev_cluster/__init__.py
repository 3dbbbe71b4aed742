"""slurm/dev-cluster: a temporary Slurm cluster with accounting, on one Debian machine.

Each machine of the cluster, the head and the nodes, is a set of namespaces (network, mounts, host name, processes).
One sleeping process, the holder, keeps them. When it dies, the kernel ends everything that runs in them and removes
their links and mounts. So `down` has to end the holders and remove one directory, and this works for a cluster that is
half made, too. On the host there is one new link, by which the host's commands reach the cluster.

The head runs munged, mariadbd, slurmdbd and slurmctld. Each node runs slurmd. The network is a bridge in the head:

    this machine (.1) --- head (.2) === n1 (.11), n2 (.12), ...
"""
