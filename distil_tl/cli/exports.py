"""Exports of a trained model: as ONNX, after it is compared with PyTorch on val, and as its library loads it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distil_tl.config import check_evaluation
from distil_tl.data.bad_images import BadImages
from distil_tl.data.loader import Batch
from distil_tl.data.source import ImageSource
from distil_tl.data.splits import open_split
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.process_group import init_distributed
from distil_tl.export import comparison, predict
from distil_tl.export.library import check_folder, crop_note, library_config, loading_lines, write_library_files
from distil_tl.export.names import CONFIG, PREPROCESS, SCRIPT, WEIGHTS
from distil_tl.export.onnx_model import OnnxModel
from distil_tl.export.to_onnx import describe, refuse_missing_libraries, to_onnx
from distil_tl.inference import RestoredModel, restore_model
from distil_tl.models.names import LINEAR
from distil_tl.rundir import checkpoint as ckpt
from distil_tl.training.heads.config import network_head
from distil_tl.training.network import evaluation_network
from distil_tl.training.precision import default_compute
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import sha256_file
from distil_tl.utils.log import logger, printable, setup_console
from distil_tl.utils.outputs import open_output, replaced_output
from distil_tl.utils.version import __version__

SPLIT = "val"
PREPARED = 200  # images on which predict.py is compared with the package


def export_onnx(run_dir: Path, checkpoint: str, overrides: Sequence[str], output: Path, *, calibrated: bool) -> None:
    """Write the model to `output`, and predict.py beside it.

    The file gets its name only after onnxruntime has answered every image of val. PyTorch evaluates in float32 on the
    CPU, as the exported model does.

    Args:
        calibrated: divide the logits by the temperature of the checkpoint, if it has one.

    Raises:
        UserError: no such run, images or library, or the output can't be written.
        ExportError: the model can't be exported, or the exported one answers otherwise; no file is left.
    """
    refuse_missing_libraries()
    setup_console(True)
    restored = restore_model(run_dir, checkpoint, [*overrides, "distributed.device=cpu", "distributed.backend=auto"])
    config, model, size = restored.config, restored.model, restored.image_size
    temperature = restored.temperature if calibrated else None
    check_evaluation(config)
    with init_distributed(Launch(), config.distributed) as info:
        index = open_split(info, config.data, SPLIT, restored.classes, run_dir)
        metadata = describe(
            model.preprocess, size, restored.classes, provenance(run_dir, restored, temperature),
            intensity=config.data.intensity, extensions=config.data.image_extensions,
        )  # fmt: skip
        content = to_onnx(model, size, metadata, temperature)
        with replaced_output(output) as partial:
            partial.write_bytes(content)
            exported = OnnxModel(partial)
            bad_images = BadImages(config.data.on_bad_image)
            source = ImageSource(info, config.data, {SPLIT: index}, model.preprocess, bad_images)
            network = evaluation_network(model, default_compute("fp32", model.module, info.device), info.device, size)
            batches = source.batches(source.eval_loader(SPLIT, size, source.eval_batches(SPLIT)), SPLIT)
            views: dict[int, Tensor] = {}
            chosen = set(np.linspace(0, len(index) - 1, min(PREPARED, len(index))).astype(int).tolist())
            answers = comparison.compare(
                network.eval(), exported, keep_views(batches, chosen, views), len(index), temperature
            )
            bad_images.refuse_none_usable(len(answers.answers), SPLIT, index)
            comparison.judge(answers, index, SPLIT, restored.classes)
            comparison.check_script(index.local_path, views, json.loads(metadata[PREPROCESS]))
    with open_output(output.parent / SCRIPT) as file:
        file.write(Path(predict.__file__).read_text(encoding="utf-8"))
    logger.info(
        "%s: %.1f MB, uint8 images [N, 3, %d, %d] to probabilities of %d classes. Predict with %s, which needs "
        "onnxruntime, numpy and Pillow alone: python %s IMAGES", printable(output), len(content) / 1e6, size, size,
        len(restored.classes), SCRIPT, printable(output.parent / SCRIPT),
    )  # fmt: skip


def keep_views(batches: Iterable[Batch], chosen: set[int], views: dict[int, Tensor]) -> Iterator[Batch]:
    """The same batches. The inputs of the images `chosen` are added to `views`."""
    for batch in batches:
        for position, i in enumerate(batch.indices.tolist()):
            if i in chosen and batch.valid[position]:
                views[i] = batch.images[position].clone()
        yield batch


def export_library(run_dir: Path, checkpoint: str, overrides: Sequence[str], folder: Path) -> None:
    """Write model.safetensors and config.json into `folder`, as timm or torchvision load them.

    Raises:
        UserError: no such run, the output can't be written, or the library can't build the read-out.
        ExportError: the library does not load them as the same model; nothing is written then.
    """
    check_folder(folder)
    setup_console(True)
    restored = restore_model(run_dir, checkpoint, list(overrides))
    config, model = restored.config.model, restored.model
    if (head := network_head(restored.config.stages)) != LINEAR:
        raise UserError(
            f"--format safetensors: no library builds {config.name} with a head of the kind {head}; use --format onnx, "
            f"or the weights in {printable(restored.checkpoint / ckpt.WEIGHTS)} with distil_tl.load"
        )
    if config.is_own:
        raise UserError(
            f"--format safetensors is for models of timm and torchvision, and {config.name} is none of them: use its "
            f"weights in {printable(restored.checkpoint / ckpt.WEIGHTS)} with your code, or --format onnx"
        )
    content = library_config(
        config, model, restored.image_size, restored.classes, provenance(run_dir, restored, restored.temperature)
    )
    write_library_files(folder, config, model, content)
    logger.info(
        "%s: %s and %s; its library loads them with the same answers:\n\n%s\n", printable(folder), WEIGHTS, CONFIG,
        loading_lines(folder, config, content),
    )  # fmt: skip
    if note := crop_note(config, model.preprocess):
        logger.warning("%s", note)


def provenance(run_dir: Path, restored: RestoredModel, temperature: float | None) -> dict[str, Any]:
    """Where exported weights come from. Without paths and times: the same checkpoint gives the same file."""
    state = ckpt.load_state(restored.checkpoint)
    run: dict[str, Any] = state["run"]
    final = run.get("final") or {}
    evaluated = final.get("step") == run["position"].get("step")
    return {
        "distil_tl": __version__,
        "torch": torch.__version__,
        "model": restored.config.model.name,
        "pretrained_weights": state.get("weights"),
        "run": run_dir.resolve().name,
        "checkpoint": restored.checkpoint.name,
        "position": run["position"],
        SPLIT: {key: final[key] for key in ("top1", "top5", "macro_f1", "loss") if key in final} if evaluated else None,
        "data": state.get("data"),
        "weights_sha256": sha256_file(restored.checkpoint / ckpt.WEIGHTS),
        **({} if temperature is None else {"temperature": temperature}),
    }
