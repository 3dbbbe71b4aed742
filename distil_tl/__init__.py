"""Staged transfer learning of image classifiers on many GPUs."""

from distil_tl.version import __version__

__all__ = ["__version__"]
