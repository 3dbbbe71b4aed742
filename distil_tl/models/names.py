"""Conventions in the names of models and weights files; imports neither torch nor a model library."""

from __future__ import annotations

TIMM_PREFIX = "timm/"  # timm/NAME is a timm model, NAME alone a torchvision model
OWN_SEPARATOR = ":"  # MODULE:FUNCTION is a network of the user
HUB_SCHEMES = tuple(prefix + scheme for prefix in ("", TIMM_PREFIX) for scheme in ("hf-hub:", "hf_hub:", "local-dir:"))
OWN_VARIABLE = "DISTIL_TL_OWN_MODELS"  # of the environment; 1: such names of saved configurations are imported, too
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
INSTALL_TIMM = "pip install 'distil_tl[timm]'"
LIBRARY_WEIGHTS, LIBRARY_CONFIG = "model.safetensors", "config.json"  # of distil-tl export and of timm
LINEAR, BUILT_HEADS = "linear", ("cosine", "mlp")  # kinds of heads that a network is built with
READOUTS = ("pooled", "avg_max", "last2", "last3", "token", "mean", "token_mean", "last4")  # of `model.readout`
