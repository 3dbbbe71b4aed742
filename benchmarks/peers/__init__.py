"""The same job in several packages, timed. Modules that run in a peer's own environment do not import distil_tl."""
