"""An ONNX file that `distil-tl export` wrote, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distil_tl.data.config import intensity_problem
from distil_tl.data.pillow import Intensity
from distil_tl.export import predict
from distil_tl.export.names import INPUT, INSTALL, SIDES
from distil_tl.models.preprocess import Preprocess
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import printable
from distil_tl.utils.paths import why_no_file

_ONLY_ERRORS = 3  # of onnxruntime's log levels


class OnnxModel:
    """uint8 images [N, 3, S, S] to probabilities, float32 [N, C].

    Args:
        path: the file.
        device: auto, cpu or cuda. `auto` uses CUDA if onnxruntime was built with it.

    Attributes:
        classes: names, in the order of the probabilities.
        preprocess, image_size, intensity: how an image becomes an input.
        extensions: how the names of images end.

    Raises:
        UserError: onnxruntime is missing or lacks the device; there is no such file, it is not an ONNX model, or
            another program wrote it.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"onnxruntime cannot be imported ({error}): {INSTALL}") from error
        if path.exists() and not path.is_file():
            raise UserError(f"{printable(path)} {why_no_file(path)}")
        if not path.is_file():
            raise UserError(f"there is no file {printable(path)}")
        has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        if device == "cuda" and not has_cuda:
            raise UserError("--device cuda, but the installed onnxruntime is for CPUs: pip install onnxruntime-gpu")
        providers: list[Any] = ["CPUExecutionProvider"]
        if has_cuda and device != "cpu":
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ONLY_ERRORS
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # of several types of its own
            reason = printable(str(error).partition("\n")[0])
            raise UserError(f"onnxruntime can't read {printable(path)} ({reason})") from error
        try:
            settings, self.classes = predict.read_model(self._session)
            levels = (settings["mean"], settings["std"])
            mean, std = ((float(red), float(green), float(blue)) for red, green, blue in levels)
            problem = intensity_problem(settings["intensity"])
            if not np.isfinite([*mean, *std]).all():
                problem = "its mean and std are no numbers"
        except Exception as error:  # as above, and of damaged metadata
            problem = str(error).partition("\n")[0] or type(error).__name__
        if problem:
            raise UserError(
                f"{printable(path)} was not written by `distil-tl export`, or is damaged ({printable(problem)})"
            )
        self.image_size: int = settings["image_size"]
        self.intensity: Intensity = settings["intensity"]
        self.extensions: tuple[str, ...] = tuple(settings["extensions"])
        mode, side = next((mode, key) for mode, key in SIDES.items() if key in settings)
        self.preprocess = Preprocess(
            mean=mean, std=std, interpolation=settings["interpolation"],
            crop_size=settings["image_size"], resize_size=settings[side], crop_mode=mode,
        )  # fmt: skip

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        answer: npt.NDArray[np.float32] = self._session.run(None, {INPUT: images})[0]
        return answer
