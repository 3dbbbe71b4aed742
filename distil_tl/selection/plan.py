"""The cells of a grid: which networks fit which image sizes, what they cost, and what their results depend on."""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distil_tl.data.pixels import unusual_pixels
from distil_tl.data.splits import Splits
from distil_tl.models.config import ModelConfig
from distil_tl.models.facts import count_macs
from distil_tl.models.names import OWN_SEPARATOR
from distil_tl.models.own_models import source_digest
from distil_tl.models.transfer import TransferModel, build, default_preprocess
from distil_tl.models.weight_sources import weights_file
from distil_tl.rundir.checkpoint import weights_hash
from distil_tl.selection.cells import Cell
from distil_tl.selection.common import Common
from distil_tl.selection.config import GridConfig
from distil_tl.training.config import StageConfig
from distil_tl.training.stage import stage_problems
from distil_tl.utils.args import refuse
from distil_tl.utils.errors import UserError

FORMAT = 1  # of the results; increased when cells are computed differently
METRICS = 2  # the same for metrics other than top-1, with their intervals
# Keys that are newer than some results, with the value for the behaviour before, which is no part of a digest.
NEWER: dict[str, Any] = {"model.readout": "pooled", "stage.head": "linear"}


def plan_cells(
    models: Sequence[ModelConfig], grid: GridConfig, common: Common, splits: Splits, device: str
) -> tuple[list[Cell], dict[str, str]]:
    """All cells, in the order of the lists; and for networks that a size does not fit, why.

    Args:
        device: the kind of device, such as cpu.
    """
    cells: list[Cell] = []
    left_out: dict[str, str] = {}
    for model in models:
        for size in grid.sizes or [default_preprocess(model).crop_size]:
            with torch.device("meta"):
                readouts, classes = grid.readouts or [model.readout], len(splits.classes)
                fitting, reasons = _networks(model, size, readouts, classes, common.later)
            left_out |= {f"{model.name} {size} px{name}": reason for name, reason in reasons.items()}
            own = _own_digest(model, size, classes, next(iter(fitting))) if fitting and model.is_own else None
            for crop in grid.crops or [common.data.crop_mode]:
                for readout, network in fitting.items():
                    cell = Cell(
                        model.name, model.weights, size, crop, network.parameters, network.macs, readout=readout
                    )  # fmt: skip
                    cells.append(replace(cell, digest=_digest(cell, common, splits, network.model, device, own)))
    return cells, left_out


@dataclass(frozen=True)
class _Network:
    """A network on the device `meta`, with its parameters and multiply-adds."""

    model: TransferModel
    parameters: int
    macs: int | None


def _networks(
    model: ModelConfig, size: int, readouts: Sequence[str], classes: int, later: Mapping[str, StageConfig]
) -> tuple[dict[str, _Network], dict[str, str]]:
    """The network with each read-out that it has; and why it lacks others. Called for the device `meta`.

    The reasons are by the name of the read-out, after a space; by the empty name if it lacks all of them.

    Args:
        later: stages that the network must be able to train after the head.
    """
    found, reasons = dict[str, _Network](), dict[str, str]()
    for readout in readouts:
        try:
            built = build(replace(model, readout=readout), classes, image_size=size, seed=0, pretrained=False)
            built.check_size(size)
            refuse([*_head_problems(built), *stage_problems(built, later)])
            macs = count_macs(built.module, size)
            if macs is None:  # else that was the trial image
                built.try_size(size, "sizes")
        except UserError as error:
            reasons[readout] = str(error)
            continue
        parameters = sum(parameter.numel() for parameter in built.module.parameters())
        found[readout] = _Network(built, parameters, macs)
    if not found:
        return {}, {"": reasons[readouts[0]]}
    if len(found) > 1:
        for readout, reason in _not_beside(model, size, list(found), classes).items():
            reasons[readout] = reason
            del found[readout]
    return found, {f" {name}": reason for name, reason in reasons.items()}


def _head_problems(model: TransferModel) -> Iterator[str]:
    """Why heads can't be compared on the features of a network."""
    heads = [model.module.get_submodule(path) for path in model.heads]
    if len(heads) != 1 or not isinstance(heads[0], nn.Linear):
        kinds = " and ".join(type(head).__name__ for head in heads)
        yield f"its head is no single linear layer, but {kinds}, so heads can't be compared"


def _not_beside(model: ModelConfig, size: int, readouts: list[str], classes: int) -> dict[str, str]:
    """Why some read-outs are not computed beside those before them: they give the same, or they can't be."""
    try:
        columns = build(model, classes, image_size=size, seed=0, pretrained=False, readouts=readouts).columns
    except UserError as error:
        return dict.fromkeys(readouts[1:], str(error))
    reasons, first = dict[str, str](), dict[tuple[int, int], str]()
    for readout in readouts:
        if (same := first.setdefault(columns[readout], readout)) != readout:
            reasons[readout] = f"it gives the same as {same}"
    return reasons


def _own_digest(model: ModelConfig, size: int, classes: int, readout: str) -> str | None:
    """Of the weights that a function of the user loads, which may be any, and of its file; None if it loads none."""
    if model.weights == "none":
        return None
    try:
        built = build(replace(model, readout=readout), classes, image_size=size, seed=0)
    except UserError:  # the search says why
        return secrets.token_hex(8)
    file = getattr(sys.modules.get(model.name.partition(OWN_SEPARATOR)[0]), "__file__", None)
    code = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""
    return weights_hash(built.module) + code


def _without_newer(section: str, tree: dict[str, Any]) -> dict[str, Any]:
    """The settings but those of `NEWER` that have the earlier value, so that results of earlier versions are used."""
    absent = object()
    return {key: value for key, value in tree.items() if NEWER.get(f"{section}.{key}", absent) != value}


def _digest(
    cell: Cell, common: Common, splits: Splits, network: TransferModel, device: str, own: str | None = None
) -> str:
    """Of everything that the result of a cell depends on, other than the number of ranks.

    Args:
        own: as `_own_digest` gives it.
    """
    data, config = common.data, common.model_of(cell)
    file = weights_file(config)[0]
    status = None if file is None else file.stat()
    library = sys.modules[type(network.module).__module__.partition(".")[0]]
    depends: dict[str, Any] = {
        "format": FORMAT,
        "model": _without_newer("model", asdict(config)),
        "weights": None if file is None or status is None else [file.name, status.st_size, status.st_mtime_ns],
        "preprocess": network.preprocess.to_json(),
        "image_size": cell.image_size,
        "crop": [cell.crop_mode, data.crop_pct],
        "stage": [common.stage, _without_newer("stage", asdict(common.config))],
        "optim": _without_newer("optim", asdict(common.optim)),
        "batch": data.global_batch_size,
        "balance": data.balance,
        "hflip": data.hflip,
        "intensity": data.intensity,
        "metric": common.metric if common.metric == "top1" else [common.metric, METRICS],
        "precision": [common.precision, common.tf32, common.deterministic],
        "seed": common.seed,
        "images": {split: [index.fingerprint, index.times] for split, index in splits.as_dict().items()},
        "pixels": unusual_pixels(data),
        "on_bad_image": data.on_bad_image,
        "device": device,
        "call": own,
        "source": source_digest(network.module) if config.is_own else None,
        "versions": [torch.__version__, getattr(library, "__version__", "")],
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]
