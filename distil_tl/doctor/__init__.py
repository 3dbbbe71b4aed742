"""Checks of `distil-tl doctor`: what a run will use here, and what will fail. Each check yields lines of a table."""
