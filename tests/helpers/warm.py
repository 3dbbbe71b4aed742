"""Imported by the server from which ranks are forked: what a run would import or compute first is there already."""

from __future__ import annotations

import gc
import importlib

from PIL import Image

gc.disable()  # an import only adds objects

for module in (
    "omegaconf._impl",
    "torch.utils.serialization",
    "numpy.ctypeslib",
    "distil_tl.train",
    "distil_tl.evaluate",
    "tests.helpers.ranks",
    "timm",
):
    importlib.import_module(module)
Image.init()  # imports a module for each format
importlib.import_module("distil_tl.data.pixels").installed_decoders()  # decodes some small images, once a process
gc.freeze()  # a rank that searched these objects for cycles would write to their pages, and so copy them
gc.enable()
