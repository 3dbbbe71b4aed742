"""Checkpoints that are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distil_tl.errors import UserError
from distil_tl.files import fsync_directory, sha256_file, write_atomic, write_json
from distil_tl.log import logger

WEIGHTS, TRAIN_STATE, STATE, CHECKSUMS = "weights.safetensors", "train_state.pt", "state.json", "checksums"


@dataclass
class CheckpointConfig:
    keep: int = 2  # how many to keep besides the best

    def problems(self) -> list[str]:
        return [] if self.keep >= 1 else ["checkpoint.keep must be at least 1"]


@dataclass
class Position:
    """Where a run is. `epoch` counts from 0 within the stage; `consumed` samples of it are done, over all ranks."""

    stage: str
    epoch: int
    consumed: int
    step: int


class Checkpoints:
    """The checkpoints of one run: `step-XXXXXXXX` folders, and the links `last` and `best`. One process writes."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(
        self,
        step: int,
        *,
        weights: Mapping[str, Tensor],
        train_state: dict[str, Any],
        state: dict[str, Any],
        is_best: bool,
    ) -> Path:
        """Write a checkpoint, then let `last` (and `best`) name it, then remove those that are too many.

        Args:
            weights: the model's state dict, on any device.
            train_state: tensors, numbers and strings only; must load with `weights_only=True`.
            state: JSON-able.
        """
        target = self.path(step)
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, partial / WEIGHTS)
        torch.save(train_state, partial / TRAIN_STATE)
        write_json(partial / STATE, state)
        sums = [f"{sha256_file(partial / name)}  {name}\n" for name in (WEIGHTS, TRAIN_STATE, STATE)]
        write_atomic(partial / CHECKSUMS, "".join(sums))
        for name in (WEIGHTS, TRAIN_STATE):
            with (partial / name).open("rb") as file:
                os.fsync(file.fileno())
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        fsync_directory(self.folder)
        self._point("last", target)
        if is_best:
            self._point("best", target)
        self._prune()
        return target

    def _point(self, name: str, target: Path) -> None:
        link = self.folder / f".{name}.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(self.folder / name)
        fsync_directory(self.folder)

    def _prune(self) -> None:
        kept = {self.named(name) for name in ("last", "best")}
        for path in self.all()[: -self.keep]:
            if path not in kept:
                shutil.rmtree(path)

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def named(self, name: str) -> Path | None:
        """What the link `last` or `best` names, if it is there."""
        link = self.folder / name
        return self.folder / link.readlink() if link.is_symlink() and link.exists() else None

    def newest_sound(self) -> Path | None:
        """The newest checkpoint whose checksums hold; those passed over are said in the log."""
        for path in reversed(self.all()):
            fault = find_fault(path)
            if fault is None:
                return path
            logger.warning("checkpoint %s is damaged (%s); going back to the one before", path.name, fault)
        return None


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        lines = (path / CHECKSUMS).read_text().splitlines()
        for line in lines:
            digest, name = line.split("  ", 1)
            if sha256_file(path / name) != digest:
                return f"{name} does not match its checksum"
    except (OSError, ValueError) as error:
        return str(error)
    return None if lines else "no checksums"


def load_weights(path: Path, module: nn.Module) -> None:
    """Fill `module` from a checkpoint folder, in place, keeping devices and memory formats.

    Raises:
        UserError: when the weights are of another model.
    """
    try:
        module.load_state_dict(load_file(path / WEIGHTS))
    except RuntimeError as error:
        raise UserError(f"{path / WEIGHTS} does not fit the model: {str(error).splitlines()[0]}") from None


def load_train_state(path: Path) -> dict[str, Any]:
    """Optimizer state and counters, on the CPU; no pickled code runs."""
    state: dict[str, Any] = torch.load(path / TRAIN_STATE, map_location="cpu", weights_only=True)
    return state


def load_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return state


def weights_hash(module: nn.Module) -> str:
    """A digest of every parameter and buffer, to compare ranks and runs byte by byte."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tuple(data.shape)}{data.dtype}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
