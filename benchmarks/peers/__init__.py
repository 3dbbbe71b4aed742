"""The same job by several packages, timed. What runs in a peer's own environment imports nothing of distil_tl."""
