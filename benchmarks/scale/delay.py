"""A switch between network namespaces, in this process, that delays each packet. Not every kernel has `tc netem`."""

from __future__ import annotations

import fcntl
import os
import selectors
import struct
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PACKET = 1 << 16


def tunnel(name: str) -> int:
    """A new network interface. What is sent on it is read from the descriptor, a packet at a time."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return file


def forward(files: Sequence[int], first: bytes, seconds: float) -> None:
    """Deliver packets, `seconds` after they were sent, until this process is killed.

    Args:
        files: by node. Node i has the IPv4 address `first` + i.
    """
    base = int.from_bytes(first, "big")
    waiting: deque[tuple[float, int, bytes]] = deque()  # all wait equally long, so the first is due first
    selector = selectors.DefaultSelector()
    for file in files:
        selector.register(file, selectors.EVENT_READ)
    while True:
        wait = None if not waiting else max(0.0, waiting[0][0] - time.monotonic())
        for key, _ in selector.select(wait):
            with suppress(BlockingIOError):
                for _ in range(64):
                    packet = os.read(key.fd, _PACKET)
                    node = int.from_bytes(packet[16:20], "big") - base
                    if packet[0] >> 4 == 4 and 0 <= node < len(files):
                        waiting.append((time.monotonic() + seconds, node, packet))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, node, packet = waiting.popleft()
            with suppress(OSError):  # dropped, as by any switch
                os.write(files[node], packet)
