"""Imported by the server from which ranks are forked: what a run would import or compute first is there already."""

from __future__ import annotations

import importlib

from PIL import Image

from distil_tl.data.pixels import installed_decoders

for module in ("omegaconf._impl", "torch.utils.serialization", "numpy.ctypeslib", "distil_tl.evaluate", "timm"):
    importlib.import_module(module)
Image.init()  # imports a module for each format
installed_decoders()  # decodes some small images, once a process
