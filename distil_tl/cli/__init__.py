"""The `distil-tl` commands. Each module reads its arguments before it imports torch."""
