"""Benchmarks: `python -m benchmarks.peers`, `pipeline`, `scale`, `profiles`, `folding`. Results: docs/benchmarks.md."""
