"""Small ONNX files as `distil-tl export` writes them, and what a disk or another program makes of them."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from distil_tl.export import to_onnx
from distil_tl.models.preprocess import Preprocess

SIZE, SHORTER = 24, 28


@functools.cache
def network(classes: int) -> bytes:
    """A network of four operators: probabilities of the mean colour of an image."""
    weights = np.random.default_rng(0).normal(size=(3, classes)).astype(np.float32) / 50
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["colours"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["colours", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes, "classifier",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(weights, "weights")],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return bytes(proto.SerializeToString())


def model(names: list[str], **changed: str) -> bytes:
    """A file for these classes, with metadata that is replaced by `changed`; an empty value removes it."""
    proto: Any = onnx.load_from_string(network(len(names)))
    preprocess = Preprocess(crop_size=SIZE, resize_size=SHORTER)
    metadata = to_onnx.describe(preprocess, SIZE, names, {"run": "x"}, intensity="dtype", extensions=[".jpg", ".png"])
    metadata |= {f"distil_tl.{name}": value for name, value in changed.items()}
    to_onnx._describe(proto, SIZE, {name: value for name, value in metadata.items() if value})
    return bytes(proto.SerializeToString())


SETTINGS: dict[str, Any] = {
    "image_size": SIZE, "shorter_side": SHORTER, "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5],
    "std": [1, 1, 1], "intensity": "dtype", "extensions": [".png"],
}  # fmt: skip
odd: st.SearchStrategy[Any] = st.sampled_from(
    [None, 0, -1, 1, SIZE, SIZE + 1, 10**9, 10**30, 1.5, float("nan"), True, "", "x", "lanczos", [], [1], ["x"], [None],
     {}, {"a": 1}, [0, 0, 0], [1, 2, 3, 4], [0, 255], "percentile", [[]]]
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file that may be damaged or of another program."""
    classes = draw(st.sampled_from([["cat", "dog"], ["cat"], ["a", "b", "c"]]))
    how = draw(st.integers(0, 8))
    if how == 0:
        settings = SETTINGS | {draw(st.sampled_from([*SETTINGS, "both_sides", "longer_side", "fill"])): draw(odd)}
        return model(classes, preprocess=json.dumps(settings))
    if how == 1:
        settings = {key: value for key, value in SETTINGS.items() if draw(st.integers(0, 6))}
        return model(classes, preprocess=json.dumps(settings))
    if how == 2:
        texts = [
            "",
            "null",
            "[]",
            "{}",
            "1",
            "[1, 2]",
            '["cat"]',
            '["a", "b", "c", "d"]',
            "{",
            "[" * 100_000,
            '"ab"',
            "NaN",
        ]
        return model(classes, **{draw(st.sampled_from(["preprocess", "classes"])): draw(st.sampled_from(texts))})
    content = model(classes)
    at = draw(st.integers(0, len(content) - 1))
    if how == 3:
        return content[:at]
    if how == 4:
        return content[:at] + draw(st.binary(max_size=8)) + content[at:]
    if how == 5:
        return content[:at] + content[draw(st.integers(at, len(content))) :]
    if how == 6:
        return draw(st.binary(max_size=60))
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    return bytes(changed)
