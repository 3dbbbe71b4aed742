"""Whether a server can be reached, with a short timeout."""

from __future__ import annotations

import socket
import urllib.request
from urllib.parse import urlsplit

from distil_tl.utils.threads import CallTimeoutError, call_with_timeout

SECONDS = 3.0


def reach(url: str, seconds: float = SECONDS) -> str | None:
    """Connect to the server of a URL, or to the proxy that is set for it. Why that fails; None if it doesn't."""
    parts = urlsplit(url)
    host, port, through = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443), ""
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        address = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        host, port, through = address.hostname or "", address.port or 3128, f", the proxy for {host}"
    try:
        # The timeout of a socket does not limit the resolution of the name.
        call_with_timeout(seconds + 1, lambda: socket.create_connection((host, port), timeout=seconds).close())
    except CallTimeoutError:
        return f"{host} can't be resolved within {seconds:g} s{through}"
    except OSError as error:
        return f"{host}:{port}{through}: {error.strerror or error}"
    return None
