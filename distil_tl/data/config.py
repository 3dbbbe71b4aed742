"""Configuration of the data and its checks, without torch or numpy."""

from __future__ import annotations

import math
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distil_tl.utils.errors import did_you_mean

SPLITS = ("train", "val", "test")
# The same as in torchvision.datasets.ImageFolder, so that both see the same images.
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Those of data.extensions: not in ImageFolder, with the format of the content.
MORE_EXTENSIONS = {"avif": "AVIF", "gif": "GIF", "heic": "HEIF", "heif": "HEIF", "jp2": "JPEG2000"}
ALL_EXTENSIONS = (*IMG_EXTENSIONS, *(f".{extension}" for extension in MORE_EXTENSIONS), ".jfif")
ARCHIVES = (".tar", ".tar.gz", ".tgz")
AUGMENTATIONS = ("none", "light", "strong")
ON_BAD_IMAGE = ("error", "skip")
INTENSITIES = ("dtype", "percentile")


@dataclass
class DataConfig:
    root: str | None = None  # a folder with train/CLASS/*.jpg and val/CLASS/*.jpg; null: scikit-learn's digits
    stage_to: str | None = None  # a folder on each node's own disk, as '$SLURM_TMPDIR', to copy the images to
    global_batch_size: int = 32  # images per optimizer step, all ranks
    max_local_batch_size: int | None = None  # images that fit one device; a larger share of a rank is accumulated
    image_size: int | None = None  # pixels; null: that of the pretrained weights
    workers: int | None = None  # loader processes per rank; null: from the number of available CPUs
    prefetch_mib: int = 2048  # MiB of batches that a rank loads ahead, for training and again for evaluation
    augment: str = "light"  # none | light | strong
    hflip: bool = True  # whether augmentation may mirror an image; false if that changes its class
    on_bad_image: str = "error"  # error: stop with an error | skip: do not train on it, and list it in summary.json
    intensity: Any = "dtype"  # of 16-bit and float images: dtype | percentile | [LOW, HIGH], which are black and white
    extensions: list[str] = field(default_factory=list)  # files to read besides those of ImageFolder, as in [heic,avif]

    @property
    def image_extensions(self) -> tuple[str, ...]:
        """How the names of images end, in lower case."""
        return IMG_EXTENSIONS + tuple(f".{extension}" for extension in self.extensions)

    def problems(self) -> list[str]:
        found = []
        if self.global_batch_size < 1:
            found.append("data.global_batch_size must be at least 1")
        if self.max_local_batch_size is not None and self.max_local_batch_size < 1:
            found.append("data.max_local_batch_size must be at least 1, or null for no limit")
        if self.image_size is not None and self.image_size < 8:
            found.append("data.image_size must be at least 8 pixels")
        if self.workers is not None and self.workers < 0:
            found.append("data.workers must be 0 or more, or null to choose by the available CPUs")
        if self.prefetch_mib < 1:
            found.append("data.prefetch_mib must be at least 1")
        if self.augment not in AUGMENTATIONS:
            found.append(f"data.augment is {self.augment!r}; choose one of {', '.join(AUGMENTATIONS)}")
        if self.on_bad_image not in ON_BAD_IMAGE:
            found.append(f"data.on_bad_image is {self.on_bad_image!r}; choose one of {', '.join(ON_BAD_IMAGE)}")
        if problem := intensity_problem(self.intensity):
            found.append(problem)
        if unknown := sorted(set(self.extensions) - set(MORE_EXTENSIONS)):
            known = ", ".join(MORE_EXTENSIONS)
            found.append(f"data.extensions has {', '.join(map(repr, unknown))}; it may have some of {known}")
        return found


def intensity_problem(intensity: Any) -> str | None:
    """Why a value can't be `data.intensity`; None if it can."""
    if isinstance(intensity, str) and intensity in INTENSITIES:
        return None
    numbers = isinstance(intensity, list) and all(type(value) in (int, float) for value in intensity)
    if numbers and len(intensity) == 2 and -math.inf < intensity[0] < intensity[1] < math.inf:
        return None
    return (
        f"data.intensity is {intensity!r}; give {' or '.join(INTENSITIES)}, or the values that become black and white, "
        f"such as [0,4095]"
    )


def fitting_world_sizes(global_batch_size: int) -> list[int]:
    """The world sizes that divide the global batch size."""
    return [n for n in range(1, global_batch_size + 1) if global_batch_size % n == 0]


def default_workers(cpus: int) -> int:
    """Number of loader processes for a rank with `cpus` CPUs, one of which is left to the rank itself."""
    return max(0, min(16, cpus - 1))


def data_name(root: Path) -> str:
    """The name of a folder or a tar file of images, without the extension of the tar file."""
    name = root.resolve().name
    suffix = next((s for s in ARCHIVES if name.endswith(s)), "") if root.is_file() else ""
    return name.removesuffix(suffix)


def archive_problem(root: Path, stage_to: str | None) -> str | None:
    """Why a file cannot be used as `data.root`; None if it can. Only the beginning of the file is read."""
    if not root.name.endswith(ARCHIVES):
        return f"data.root={root} is neither a folder nor a tar file ({', '.join(ARCHIVES)})"
    if stage_to is None:
        return (
            f"data.root={root} is a tar file, but training reads a folder: let each node unpack it, for example "
            f"with 'data.stage_to=$SLURM_TMPDIR', or unpack it and set data.root to the folder"
        )
    try:
        valid = tarfile.is_tarfile(root)
    except (OSError, EOFError, zlib.error) as error:
        return f"data.root={root} can't be read: {error}"
    return None if valid else f"data.root={root} is not a tar file, or is damaged; create it again"


def root_problems(root: Path, stage_to: str | None, run_dir: str | None) -> Iterator[str]:
    """Why `data.root` can't be used; nothing if it can."""
    if root.is_file():
        if problem := archive_problem(root, stage_to):
            yield problem
        return
    if not root.is_dir():
        near = did_you_mean(root.name, [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else [])
        yield f"data.root={root} is not a folder{near}"
        return
    for split in SPLITS:
        if run_dir is not None and Path(run_dir).resolve().is_relative_to((root / split).resolve()):
            yield f"run_dir={run_dir} is among the images of {split}, and would become a class: give another folder"
    missing = [split for split in ("train", "val") if not (root / split).is_dir()]
    if missing and root.name in SPLITS and (root.parent / "train").is_dir():
        yield f"data.root={root} is one of the splits; give the folder that holds them: data.root={root.parent}"
    elif missing:
        similar = {"validation": "val", "valid": "val", "dev": "val", "training": "train", "testing": "test"}
        others = [folder.name for folder in root.iterdir() if folder.is_dir()]
        named = {similar.get(name.lower(), name.lower()): name for name in others if name not in SPLITS}
        rename = [f"rename {named[split]} to {split}" for split in missing if split in named]
        have = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:5]) or "none"
        yield (
            f"data.root={root} has no {' and no '.join(missing)} folder; it must hold train/CLASS/*.jpg and "
            f"val/CLASS/*.jpg (its folders: {have}){''.join(f'; {advice}' for advice in rename)}"
        )
