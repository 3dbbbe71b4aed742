"""Names in exported files, and how to install what writes and reads them. Imports no torch."""

from __future__ import annotations

from distil_tl.models.names import LIBRARY_CONFIG, LIBRARY_WEIGHTS

ONNX = ".onnx"
INPUT, OUTPUT = "images", "probabilities"  # of the graph
SCRIPT = "predict.py"  # written beside a model
WEIGHTS, CONFIG = LIBRARY_WEIGHTS, LIBRARY_CONFIG

# Keys of the metadata of an ONNX file; the values are JSON.
CLASSES = "distil_tl.classes"
PREPROCESS = "distil_tl.preprocess"
PROVENANCE = "distil_tl.provenance"

# The side that is resized, by the crop mode: each has a key of its own, so that a reader which does not know it fails.
SIDES = {"center": "shorter_side", "squash": "both_sides", "border": "longer_side"}

INSTALL = "pip install 'distil_tl[export]'"
