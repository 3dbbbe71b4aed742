"""Commands that measure: `python -m benchmarks.peers`, `.pipeline` and `.scale`. docs/benchmarks.md has the figures."""
