"""A trained model as its library loads it: model.safetensors, and config.json for timm or torchvision."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision

from distil_tl.export.names import CONFIG, WEIGHTS
from distil_tl.models import timm_models, torchvision_models
from distil_tl.models.config import ModelConfig, resolve_weights
from distil_tl.models.preprocess import Preprocess
from distil_tl.models.transfer import TransferModel
from distil_tl.utils.errors import ExportError, UserError
from distil_tl.utils.files import json_text, read_json
from distil_tl.utils.log import printable
from distil_tl.utils.outputs import check_output, replaced_output
from distil_tl.utils.signals import removed_on_signal

ROUNDING = 1e-5  # of logits in float32, relative to the largest one
_TIMM_READOUTS: dict[str, tuple[dict[str, object], ...]] = {  # arguments of timm's models that may give a read-out
    "avg_max": ({"global_pool": "catavgmax"},),
    "token": tuple({"global_pool": "token", **norm} for norm in ({}, {"fc_norm": True}, {"use_fc_norm": True})),
    "mean": tuple({"global_pool": "avg", **norm} for norm in ({}, {"fc_norm": False}, {"use_fc_norm": False})),
}
_TIMM_KEYS = ("first_conv", "classifier", "pool_size")  # of a published configuration


def check_folder(folder: Path) -> None:
    """Raises UserError if `folder` can't be made or written to, or has another model's files."""
    shown = f"-o {printable(folder)}"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{shown} is a file: name a folder for {WEIGHTS} and {CONFIG}")
    if not folder.parent.is_dir():
        raise UserError(f"{shown}: there is no folder {printable(folder.parent)}")
    there = [name for name in (WEIGHTS, CONFIG) if (folder / name).exists()]
    if there and not _is_own(folder / CONFIG):
        raise UserError(f"{shown} has a {there[0]} that `distil-tl export` did not write: name another folder")
    if folder.is_dir() and not there and any(folder.iterdir()):
        raise UserError(f"{shown} has other files in it: name a new folder")
    for name in (WEIGHTS, CONFIG) if folder.is_dir() else ():
        check_output("-o", folder / name, whole=True)
    if not folder.is_dir() and not os.access(folder.parent, os.W_OK):
        raise UserError(f"{shown}: no permission to write in {printable(folder.parent)}")


def _is_own(path: Path) -> bool:
    try:
        content = read_json(path) if path.is_file() else None
        return isinstance(content, dict) and "distil_tl" in content
    except (OSError, ValueError, RecursionError):
        return False


def write_library_files(folder: Path, config: ModelConfig, model: TransferModel, content: Mapping[str, Any]) -> None:
    """Write model.safetensors and config.json into `folder`, which is made.

    Args:
        content: of config.json, as `library_config` returns it.

    Raises:
        ExportError: the library does not load them as the same model; nothing is written then.
    """
    state = {name: tensor.detach().contiguous().clone() for name, tensor in model.module.state_dict().items()}
    place = folder if folder.is_dir() else folder.parent  # not always the parent: the user may not write there
    with tempfile.TemporaryDirectory(dir=place, prefix=".") as temporary, removed_on_signal(Path(temporary)):
        partial = Path(temporary)
        (partial / WEIGHTS).write_bytes(safetensors.torch.save(state, metadata={"format": "pt"}))
        (partial / CONFIG).write_text(json_text(content), encoding="utf-8", errors="backslashreplace")
        _check(partial, config, model, content)
        folder.mkdir(exist_ok=True)
        for name in (WEIGHTS, CONFIG):
            with replaced_output(folder / name) as target:
                shutil.move(partial / name, target)


def crop_note(config: ModelConfig, preprocess: Preprocess) -> str | None:
    """What the library's own transform can't do; None if it can prepare images as in training."""
    if config.from_timm or preprocess.crop_mode != "border":
        return None
    return (
        f"torchvision has no transform for data.crop_mode=border: resize the longer side to resize_size of {CONFIG}, "
        f"crop the centre to crop_size, and pad to a square with the colour fill"
    )


def loading_lines(folder: Path, config: ModelConfig, content: Mapping[str, Any]) -> str:
    """The lines of Python that load what `write_library_files` wrote."""
    if config.from_timm:
        call = content["distil_tl"].get("load")
        by_name = f"# or in this folder, without {CONFIG}: {call}\n" if call else ""
        return (
            f"{by_name}model = timm.create_model({_literal(f'local-dir:{folder}')}, pretrained=True).eval()\n"
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
        )
    return (
        f'config = json.load(open({_literal(folder / CONFIG)}, encoding="utf-8"))\n'
        'model = torchvision.models.get_model(config["architecture"], **config["model_args"]).eval()\n'
        f"model.load_state_dict(safetensors.torch.load_file({_literal(folder / WEIGHTS)}))"
    )


def readout_arguments(config: ModelConfig, model: TransferModel, num_classes: int) -> dict[str, object]:
    """Arguments with which the library builds the model with its read-out; empty for what it pools without any.

    Raises:
        UserError: there are none.
    """
    if config.readout == "pooled":
        return {}
    candidates = ({}, *(_TIMM_READOUTS.get(config.readout, ()) if config.from_timm else ()))
    for arguments in candidates:
        try:
            loaded = _built(config, model, num_classes, arguments)
            loaded.load_state_dict(model.module.state_dict())
            if _difference(model, loaded) is None:
                return dict(arguments)
        except Exception:  # of many types; the classes of timm have different arguments
            continue
    library = "timm" if config.from_timm else "torchvision"
    raise UserError(
        f"--format safetensors: no argument of {library} builds {config.name} with model.readout={config.readout}; "
        f"use --format onnx, or the run with distil_tl.load"
    )


def _built(
    config: ModelConfig, model: TransferModel, num_classes: int, arguments: Mapping[str, object]
) -> torch.nn.Module:
    """The architecture of a trained model as its library builds it."""
    if config.from_timm:
        import timm

        own = _timm_arguments(config, model)
        built: torch.nn.Module = timm.create_model(_architecture(config), num_classes=num_classes, **own, **arguments)
        return built
    own = torchvision_models.arguments(config.name, model.image_size, random=resolve_weights(config) == "none")
    network: torch.nn.Module = torchvision.models.get_model(config.name, num_classes=num_classes, **own)
    return network


def _timm_arguments(config: ModelConfig, model: TransferModel) -> dict[str, object]:
    """Arguments besides the number of classes, with the size of the position embeddings, which config.json changes."""
    arguments = timm_models.arguments(config.library_name, model.image_size)
    built_for = getattr(getattr(model.module, "patch_embed", None), "img_size", None)
    if "dynamic_img_size" in arguments and built_for is not None and built_for[0] == built_for[1]:
        arguments["img_size"] = built_for[0]
    return arguments


def _architecture(config: ModelConfig) -> str:
    return config.library_name.partition(".")[0]


def loading_call(config: ModelConfig, content: Mapping[str, Any]) -> str:
    """The call of timm that loads the weights by the name of the architecture, without config.json."""
    arguments = {"num_classes": content["num_classes"], **content["model_args"], "checkpoint_path": WEIGHTS}
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"timm.create_model({_architecture(config)!r}, {given})"


def _literal(text: str | Path) -> str:
    """A text as Python has it, in double quotes."""
    escaped = str(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{printable(escaped)}"'


def library_config(
    config: ModelConfig, model: TransferModel, image_size: int, classes: list[str], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of config.json: as timm's own `save_config_for_hf` writes it, or for torchvision's `get_model`.

    Raises:
        UserError: the library can't build the model with its read-out.
    """
    readout = readout_arguments(config, model, len(classes))
    found: dict[str, Any] = {"architecture": _architecture(config), "num_classes": len(classes)}
    found["label_names"] = classes
    preprocess = model.preprocess
    statistics = {"interpolation": preprocess.interpolation, "mean": preprocess.mean, "std": preprocess.std}
    if config.from_timm:
        network: Any = model.module
        published: dict[str, Any] = getattr(network, "pretrained_cfg", None) or {}
        found["num_features"] = getattr(network, "num_features", None)
        found["model_args"] = {**_timm_arguments(config, model), **readout}
        found["pretrained_cfg"] = {
            **{key: published[key] for key in _TIMM_KEYS if published.get(key) is not None},
            "num_classes": len(classes),
            "input_size": [3, image_size, image_size],
            "fixed_input_size": model.fixed_image_size,
            "crop_pct": crop_share(preprocess, image_size),
            "crop_mode": preprocess.crop_mode,
            **statistics,
        }
    else:
        random = resolve_weights(config) == "none"
        arguments = torchvision_models.arguments(config.name, model.image_size, random=random)
        found["model_args"] = {"num_classes": len(classes), **arguments}
        side = preprocess.resize_for(image_size)
        found["preprocess"] = {
            "resize_size": [side, side] if preprocess.crop_mode == "squash" else side,
            "crop_size": image_size,
            **({"crop_mode": "border", "fill": preprocess.fill} if preprocess.crop_mode == "border" else {}),
            **statistics,
        }
    own = {"load": loading_call(config, found)} if readout else {}
    return {**found, "distil_tl": {**provenance, **own}}


def crop_share(preprocess: Preprocess, image_size: int) -> float:
    """`crop_pct`, with which timm resizes to the same size: it rounds `image_size / crop_pct` down."""
    resized = preprocess.resize_for(image_size)
    share = image_size / resized
    return share if math.floor(image_size / share) == resized else image_size / (resized + 0.5)


def _check(folder: Path, config: ModelConfig, model: TransferModel, content: Mapping[str, Any]) -> None:
    """Build the model with its library from what was written, and compare its answers with those of `model`."""
    library = "timm" if config.from_timm else "torchvision"
    try:
        if config.from_timm:
            import timm

            loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
        else:
            loaded = torchvision.models.get_model(content["architecture"], **content["model_args"])
            loaded.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    except Exception as error:  # of many types
        reason = printable(str(error).strip().partition("\n")[0])
        raise ExportError(
            f"{library} does not load {config.name} as it was trained ({reason}). No file was written"
        ) from error
    if (off := _difference(model, loaded)) is not None:
        raise ExportError(
            f"{config.name} answers otherwise when {library} loads it: logits differ by {off:.1e}. No file was written"
        )


def _difference(model: TransferModel, loaded: torch.nn.Module) -> float | None:
    """The largest difference of logits, None if it is only rounding."""
    images = torch.rand(2, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = (network.eval()(images) for network in (model.module, loaded))
    off = float((expected - found).abs().max())
    return None if off <= ROUNDING * max(1.0, float(expected.abs().max())) else off  # also if it is not a number
