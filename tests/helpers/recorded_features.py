"""The recorded feature cache: its folders, and the model that it was computed with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from distil_tl.config import load
from distil_tl.models.transfer import build

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "feature_cache_v5"
ABOUT: dict[str, Any] = json.loads((RECORDED / "about.json").read_text())
TRAIN, VAL = (RECORDED / "cache" / "features" / ABOUT["keys"][split] for split in ("train", "val"))


def copy_of_images(folder: Path) -> Path:
    """The recorded images in a new folder, with the modification time that is part of the key."""
    shutil.copytree(RECORDED / "images", folder)
    for path in folder.rglob("*.png"):
        os.utime(path, ns=(10**18, 10**18))
    return folder


def keys_are_comparable(args: list[str]) -> bool:
    """Whether this torch initializes the model with the recorded weights; its version is part of the key, too."""
    config, _ = load(args)
    state = build(config.model, 2, image_size=32, seed=config.seed).module.state_dict()
    return [ABOUT["torch"], ABOUT["weights"]] == [torch.__version__, digest_of(state)]


def digest_of(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
