"""A trained model as ONNX: uint8 images in, probabilities out, with the normalisation in the graph."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distil_tl.export.names import CLASSES, INPUT, INSTALL, OUTPUT, PREPROCESS, PROVENANCE, SIDES
from distil_tl.models.preprocess import Normalize, Preprocess
from distil_tl.models.transfer import TransferModel
from distil_tl.utils.errors import ExportError, UserError
from distil_tl.utils.log import printable

MAX_BYTES = 2_000_000_000  # of one file: protobuf allows 2 GiB


class _Exported(nn.Module):
    """uint8 images [N, 3, S, S] to probabilities, float32 [N, C]."""

    def __init__(self, model: TransferModel, temperature: float | None) -> None:
        super().__init__()
        self.temperature = temperature
        self.normalize = Normalize(model.preprocess)
        self.module = model.module

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.module(self.normalize(images))
        return (logits if self.temperature is None else logits / self.temperature).softmax(dim=1)


def refuse_missing_libraries() -> None:
    """Raises UserError if a library is missing that writes or checks ONNX."""
    try:
        for name in ("onnx", "onnxscript", "onnxruntime"):  # torch's exporter needs the first two
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"to write ONNX, {error.name} is needed, which cannot be imported: {INSTALL}") from error


def to_onnx(
    model: TransferModel, image_size: int, metadata: Mapping[str, str], temperature: float | None = None
) -> bytes:
    """The content of an ONNX file with the weights in float32, for images of `image_size` and any number of them.

    Args:
        temperature: divides the logits.

    Raises:
        UserError: the weights are too large for one file.
        ExportError: torch can't export this model.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.module.state_dict().values())
    if size > MAX_BYTES:
        raise UserError(f"{model.name} has {size:,} bytes of weights, and an ONNX file at most {MAX_BYTES:,}: "
                        f"use --format safetensors")  # fmt: skip
    images = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    network = _Exported(model, temperature).eval()
    disabled = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)  # of torch.onnx, onnxscript and onnx_ir
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network, (images,), input_names=[INPUT], output_names=[OUTPUT],
                dynamic_shapes={INPUT: {0: "batch"}}, dynamo=True, verbose=False,
            )  # fmt: skip
    except Exception as error:  # of many types, with many lines
        reason = printable(str(error).strip().partition("\n")[0])
        raise ExportError(
            f"torch can't export {model.name} to ONNX ({reason}); use --format safetensors, or another model"
        ) from error
    finally:
        logging.disable(disabled)
    assert program is not None, "with dynamo=True"
    proto = program.model_proto
    if not proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise ExportError(f"{model.name} depends on the number of images in a batch, so it is not exported to ONNX")
    _describe(proto, image_size, metadata)
    content: bytes = proto.SerializeToString()
    return content


def _describe(proto: Any, image_size: int, metadata: Mapping[str, str]) -> None:
    """Set the metadata and the descriptions, and remove those of the exporter, which have paths of this machine."""
    graphs = [proto.graph, *proto.functions]
    while graphs:
        graph = graphs.pop()
        graph.ClearField("metadata_props")
        graph.ClearField("doc_string")
        for node in graph.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
            graphs += [
                found for attribute in node.attribute for found in (*attribute.graphs, attribute.g) if found.node
            ]
        for value in (*graph.value_info, *getattr(graph, "initializer", ()), *getattr(graph, "output", ())):
            if not isinstance(value, str):
                value.ClearField("metadata_props")
                value.ClearField("doc_string")
    proto.ClearField("metadata_props")
    for key, text in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, text
    proto.doc_string = "An image classifier, written by distil-tl export."
    proto.graph.input[0].ClearField("metadata_props")
    proto.graph.input[0].doc_string = (
        f"uint8 [N, 3, {image_size}, {image_size}]: N images of any number, channels red, green and blue, rows from "
        f"the top, values 0 to 255. The graph scales and normalises them."
    )
    proto.graph.output[0].doc_string = f"float32 [N, C]: probabilities of the classes in the metadata, {CLASSES}"


def describe(
    preprocess: Preprocess, image_size: int, classes: list[str], provenance: Mapping[str, Any], **reading: Any
) -> dict[str, str]:
    """The metadata of an ONNX file.

    Args:
        provenance: where the weights come from.
        reading: `intensity` and `extensions`, as in the section `data`.
    """
    settings = {
        "image_size": image_size,
        SIDES[preprocess.crop_mode]: preprocess.resize_for(image_size),
        "interpolation": preprocess.interpolation,
        "mean": preprocess.mean,
        "std": preprocess.std,
        **({"fill": preprocess.fill} if preprocess.crop_mode == "border" else {}),
        **reading,
    }
    values = {CLASSES: classes, PREPROCESS: settings, PROVENANCE: provenance}
    # Escapes keep names that are not UTF-8, with lone surrogates, which protobuf can't hold.
    return {key: json.dumps(value, allow_nan=False) for key, value in values.items()}
