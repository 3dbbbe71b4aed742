"""Atomic checkpoints: after a crash there is the old or the new one, never an incomplete one."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distil_tl.utils.errors import CheckpointError, UserError
from distil_tl.utils.files import fsync_directory, read_json, read_text, sha256_file, write_atomic, write_json
from distil_tl.utils.job_outcome import SAVED, note
from distil_tl.utils.log import logger

WEIGHTS, TRAIN_STATE, STATE, CHECKSUMS = "weights.safetensors", "train_state.pt", "state.json", "checksums"
CALIBRATION = "calibration.json"  # added to the best checkpoint by the last evaluation of the run


class Checkpoints:
    """The checkpoints of one run: `step-XXXXXXXX` folders, and the links `last` and `best`.

    Only rank 0 writes, in a background thread: `save` copies to host memory and returns; an error is raised by the
    next `save` or `wait`.

    Args:
        folder: RUN_DIR/checkpoints.
        keep: newest checkpoints kept, besides the best.
        check: called before anything is written; raises when this process may no longer write.
    """

    def __init__(self, folder: Path, keep: int = 2, check: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self.keep = keep
        self._check = check
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

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
        kept_step: int | None = None,
    ) -> None:
        """Write a checkpoint, point `last` (and `best`) at it, then remove old ones.

        Args:
            weights: the model's state dict, on any device.
            train_state: tensors, numbers and strings only; must load with `weights_only=True`.
            state: JSON-able.
            kept_step: of a checkpoint that is not removed, beside the best and the newest.

        Raises:
            CheckpointError: the previous save failed.
        """
        self.wait()
        # Copied to host memory, so that training may change the originals. The memory format stays: that is fastest.
        snapshot = map_tensors(lambda t: t.detach().to("cpu", copy=True), (dict(weights), train_state, state))
        self._pending = self._writer.submit(self._write, self.path(step), snapshot, is_best, kept_step)

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
            CheckpointError: it could not be written. Earlier checkpoints are unchanged.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(
        self,
        target: Path,
        snapshot: tuple[dict[str, Tensor], Any, dict[str, Any]],
        is_best: bool,
        kept_step: int | None,
    ) -> None:
        partial = target.with_name(f".{target.name}.partial")
        self._check()
        try:
            self._fill(partial, *snapshot)
            self._check()
            # A checkpoint of the same step is renamed first, so that one of the two always exists.
            replaced = target.with_name(f"{target.name}.replaced")
            if target.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                target.rename(replaced)
            partial.rename(target)
            fsync_directory(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)
            self._point("last", target)
            if is_best:
                self._point("best", target)
            self._prune(target, kept_step)
            note(SAVED)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            left = self.named("last")
            kept = f"the last good one, {left.name}, is kept" if left else "there is no earlier one"
            raise CheckpointError(f"can't write the checkpoint {target}: {error.strerror or error}; {kept}") from error

    def _fill(self, partial: Path, weights: dict[str, Tensor], train_state: Any, state: dict[str, Any]) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights, train_state = map_tensors(Tensor.contiguous, (weights, train_state))
        try:
            save_file(weights, partial / WEIGHTS)
            torch.save(train_state, partial / TRAIN_STATE)
        except (SafetensorError, RuntimeError) as error:  # raised by safetensors and torch when the disk is full
            raise OSError(str(error).partition("\n")[0]) from error
        write_json(partial / STATE, state)
        shutil.copymode(
            partial / TRAIN_STATE, partial / WEIGHTS
        )  # safetensors makes it private, but colleagues read it
        sums = [f"{sha256_file(partial / name)}  {name}\n" for name in (WEIGHTS, TRAIN_STATE, STATE)]
        write_atomic(partial / CHECKSUMS, "".join(sums))
        for name in (WEIGHTS, TRAIN_STATE):
            with (partial / name).open("rb") as file:
                os.fsync(file.fileno())

    def _point(self, name: str, target: Path) -> None:
        link = self.folder / f".{name}.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(self.folder / name)
        fsync_directory(self.folder)

    def _prune(self, newest: Path, kept_step: int | None) -> None:
        kept = {self.named(name) for name in ("last", "best")}
        kept |= set() if kept_step is None else {self.path(kept_step)}
        # Later checkpoints are damaged and were skipped: valid ones must not be removed to keep them.
        for path in [path for path in self.all() if path <= newest][: -self.keep]:
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(".step-*.partial"):  # left by a process that was killed while saving
            shutil.rmtree(path, ignore_errors=True)

    def repair_links(self, newest: Path, best: Path | None) -> None:
        """Point `last` and `best` at what the run resumes from, and remove partial files that a kill left behind.

        In a copy of a run directory they may be folders, copies of what they pointed to.
        """
        for name in ("last", "best"):
            folder = self.folder / name
            if folder.is_dir() and not folder.is_symlink():
                folder.rename(self.folder / f".{name}.copy.partial")  # removed below
        for name, path in (("last", newest), ("best", best)):
            if path is not None and path.is_dir() and self.named(name) != path:
                self._point(name, path)
        for path in self.folder.glob(".*.partial"):
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def named(self, name: str) -> Path | None:
        """The checkpoint that the link `last` or `best` points to, or its copy in a copied run; None without one."""
        link = self.folder / name
        if not link.is_dir():
            return None
        return self.folder / link.readlink() if link.is_symlink() else link

    def newest_valid(self) -> Path | None:
        """The newest checkpoint with valid checksums. Logs a warning for each one skipped."""
        found = self.all()
        for path in reversed(found):
            damage = find_damage(path)
            if damage is None:
                return path
            instead = "using the one before" if path != found[0] else "there is no earlier one"
            logger.warning("checkpoint %s is damaged (%s); %s", path.name, damage, instead)
        return None


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Nested containers with `function` of each tensor in its place."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([map_tensors(function, value) for value in tree])
    return tree


def find_damage(path: Path) -> str | None:
    """What is damaged in a checkpoint, None if nothing is."""
    try:
        lines = read_text(path / CHECKSUMS).splitlines()
        for line in lines:
            digest, name = line.split("  ", 1)
            if sha256_file(path / name) != digest:
                return f"{name} does not match its checksum"
    except (OSError, ValueError) as error:
        return str(error)
    return None if len(lines) == len((WEIGHTS, TRAIN_STATE, STATE)) else "checksums are missing"


def load_weights(path: Path, module: nn.Module) -> None:
    """Fill `module` from a checkpoint folder, in place, keeping devices and memory formats.

    Raises:
        UserError: the file holds the weights of another model, or no weights.
    """
    try:
        state = OrderedDict(load_file(path / WEIGHTS))
        # MNASNet requires the version of its root, which the file does not keep.
        state.__dict__["_metadata"] = {"": {"version": module._version}}
        module.load_state_dict(state)
    except RuntimeError as error:
        _, *details = map(str.strip, str(error).splitlines())
        raise UserError(
            f"{path / WEIGHTS} does not fit the model ({details[0] if details else error}): it is of another model, "
            f"read-out or head"
        ) from None
    except SafetensorError as error:
        raise UserError(f"{path / WEIGHTS} can't be read: {error}") from None


def load_train_state(path: Path) -> dict[str, Any]:
    """Optimizer state and counters, on the CPU. No pickled code is run.

    Raises:
        UserError: the file holds other objects than tensors, numbers and strings, so this package did not write it.
    """
    try:
        state: dict[str, Any] = torch.load(path / TRAIN_STATE, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own message explains how to run the code
        raise UserError(
            f"{path / TRAIN_STATE} can't be read with weights_only=True: it holds Python objects other than tensors. "
            f"Checkpoints of this package never do: the file was changed, and loading it could run hidden code"
        ) from None
    return state


def load_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = read_json(path / STATE)
    return state


def load_temperature(path: Path) -> float | None:
    """The temperature by which the logits of a checkpoint are divided for probabilities; None without one.

    Raises:
        UserError: the file that has it is damaged.
    """
    file = path / CALIBRATION
    if not file.is_file():
        return None
    try:
        found = read_json(file)["temperature"]
        if found is None or (type(found) is float and math.isfinite(found) and found > 0):
            return found
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    raise UserError(f"{file} is damaged: restore it, or remove it for probabilities that are not calibrated")


def weights_hash(module: nn.Module, without: tuple[str, ...] = ()) -> str:
    """A digest of the bytes of every parameter and buffer, except those below the paths `without`."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if name.startswith(without) and without:
            continue
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tuple(data.shape)}{data.dtype}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
