"""How models and files of weights are named; imports neither torch nor a model library."""

from __future__ import annotations

TIMM_PREFIX = "timm/"  # before the name of a timm model; a name without it is torchvision's
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
