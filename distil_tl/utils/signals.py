"""The signals that ask a run to save and stop."""

from __future__ import annotations

import signal

# Ctrl-C, preemption or scancel, the warning before a time limit, a lost connection.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
