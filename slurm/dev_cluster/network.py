"""The network: a bridge in the head, to which the nodes and the host are linked."""

from __future__ import annotations

import contextlib
import ipaddress
import json
from pathlib import Path

from dev_cluster.config import HEAD, Cluster, RefusedError, digest
from dev_cluster.processes import execute

PRIVATE_NETWORKS = ("10.213.0.0/16", "172.29.0.0/16", "192.168.0.0/16")


def free_subnet(directory: Path) -> str:
    """A private /24 that overlaps with no route or address of this machine.

    The search starts at a place that depends on the directory, so that two clusters rarely try the same subnet.

    Raises:
        RefusedError: every candidate is in use.
    """
    used = []
    for family in ("route show table all", "address show"):
        for entry in json.loads(execute(["ip", "-4", "-json", *family.split()])):
            addresses = (f"{info['local']}/{info['prefixlen']}" for info in entry.get("addr_info", []))
            for text in (entry.get("dst"), *addresses):
                with contextlib.suppress(ValueError):  # "default"
                    used.append(ipaddress.IPv4Network(text or "", strict=False))
    begin = int(digest(directory), 16)
    for private in PRIVATE_NETWORKS:
        subnets = list(ipaddress.IPv4Network(private).subnets(new_prefix=24))
        for i in range(len(subnets)):
            subnet = subnets[(begin + i) % len(subnets)]
            if not any(subnet.overlaps(network) for network in used):
                return str(subnet)
    raise RefusedError("all private subnets that this command may use are already in use on this machine")


def link_name(directory: Path) -> str:
    """The name of the link on the host."""
    return f"dtl{digest(directory)}"


def ip_in(holder: int) -> list[str]:
    """The `ip` command in a machine's network."""
    return ["nsenter", f"--target={holder}", "--net", "ip"]


def connect(cluster: Cluster, machines: dict[str, int]) -> None:
    """Link the host and the nodes to the head's bridge. `machines` are the holders."""
    head, link = machines[HEAD], link_name(cluster.dir)
    at_head = ip_in(head)
    execute([*at_head, "link", "add", "bridge", "type", "bridge"])
    execute([*at_head, "address", "add", f"{cluster.address(HEAD)}/24", "dev", "bridge"])
    execute([*at_head, "link", "set", "bridge", "up"])
    execute(["ip", "link", "add", link, "type", "veth", "peer", "name", "outside", "netns", head])
    execute(["ip", "address", "add", f"{cluster.address('')}/24", "dev", link])
    execute(["ip", "link", "set", link, "up"])
    for node in cluster.node_names:
        holder = machines[node]
        at_node = ip_in(holder)
        execute([*at_head, "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", holder])
        execute([*at_node, "address", "add", f"{cluster.address(node)}/24", "dev", "eth0"])
        execute([*at_node, "link", "set", "eth0", "up"])
    for port in ("outside", *cluster.node_names):
        execute([*at_head, "link", "set", port, "master", "bridge", "up"])


def link_is_cut(head: int, node: str) -> bool:
    links = json.loads(execute([*ip_in(head), "-json", "link", "show", "dev", node]))
    return "UP" not in links[0]["flags"]


def set_link(head: int, node: str, state: str) -> None:
    """Set the node's link "up" or "down"."""
    execute([*ip_in(head), "link", "set", node, state])
