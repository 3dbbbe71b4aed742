"""Configuration of the data and its checks, without torch or numpy."""

from __future__ import annotations

import math
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distil_tl.data.augmentation import augment_problem
from distil_tl.data.class_folder import no_class_folders
from distil_tl.utils.auto import AUTO, whole_number
from distil_tl.utils.errors import did_you_mean
from distil_tl.utils.paths import why_no_file
from distil_tl.utils.run_folders import no_images, recorded_root, runs_in

SPLITS = ("train", "val", "test")
SPLIT_FILE = "split.csv"  # in the run directory of a run that divided its images
# The same as in torchvision.datasets.ImageFolder, so that both see the same images.
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Those of data.extensions: not in ImageFolder, with the format of the content.
MORE_EXTENSIONS = {"avif": "AVIF", "gif": "GIF", "heic": "HEIF", "heif": "HEIF", "jp2": "JPEG2000"}
ALL_EXTENSIONS = (*IMG_EXTENSIONS, *(f".{extension}" for extension in MORE_EXTENSIONS), ".jfif")
ARCHIVES = (".tar", ".tar.gz", ".tgz")
CROP_MODES = ("weights", "center", "squash", "border")
MIN_CROP_PCT = 0.1
BALANCES = ("none", "sampler", "weights", "logit_adjust", "effective_number")
ON_BAD_IMAGE = ("error", "skip")
MAX_WORKERS = 256  # loader processes of a rank
MIN_AUTO_BATCH, MAX_AUTO_BATCH = 8, 128
MOVED = "if the images were moved, add data.root=NEW_FOLDER"  # of a trained run
INTENSITIES = ("dtype", "percentile")
# What people call the folders of splits, in lower case.
USUAL_SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass
class ColumnsConfig:
    path: str | None = None  # column of data.labels with the images' paths; null: found by its name
    label: str | None = None  # column with the classes; null: found by its name
    split: str | None = None  # column with train, val or test; null: found by its name; none: there is none
    weight: str | None = None  # column with a weight of each image in the training loss; as data.columns.split


@dataclass
class SplitConfig:
    val: float = 0.2  # share of each class for val, where the images have no splits
    test: float = 0.0  # the same for test; 0: no test
    group: str | None = None  # images to keep in one split: a column of data.labels, or a regular expression on paths
    seed: int = 0  # of the split

    def problems(self) -> list[str]:
        found = []
        if not 0 < self.val < 1:
            found.append("data.split.val must be a share between 0 and 1, as in 0.2")
        if not 0 <= self.test < 1:
            found.append("data.split.test must be a share from 0 up to, but not including, 1")
        if not found and self.val + self.test >= 1:
            found.append("data.split.val and data.split.test must leave images for train: make one of them smaller")
        return found


@dataclass
class DataConfig:
    root: str | None = None  # a folder with CLASS/*.jpg, or with train/CLASS/*.jpg and val/CLASS/*.jpg; null: digits
    labels: str | None = None  # a table, CSV, TSV or Parquet, with paths below data.root (null: its folder) and labels
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    stage_to: str | None = None  # a folder on each node's own disk, as '$SLURM_TMPDIR', to copy the images to
    global_batch_size: Any = 32  # images per optimizer step, all ranks; auto: by the number of training images
    max_local_batch_size: int | None = None  # images that fit one device; a larger share of a rank is accumulated
    image_size: int | None = None  # pixels; null: that of the pretrained weights
    workers: int | None = None  # loader processes per rank; null: from the number of available CPUs
    prefetch_mib: int = 2048  # MiB of batches that a rank loads ahead, for training and again for evaluation
    crop_mode: str = "auto"  # to a square, without a random crop: auto | weights | center | squash | border
    crop_pct: float | None = None  # share of the resized sides that is kept; null: as for the weights, else 1
    augment: Any = AUTO  # auto | none | flip | light | strong | a list of steps, as in [crop(0.3),hflip,trivial]
    hflip: bool = True  # whether augmentation may mirror an image; false if that changes its class
    balance: str = "none"  # of classes of unequal size: none | sampler | weights | logit_adjust | effective_number
    on_bad_image: str = "error"  # error: stop with an error | skip: do not train on it, and list it in summary.json
    intensity: Any = "dtype"  # of 16-bit and float images: dtype | percentile | [LOW, HIGH], which are black and white
    extensions: list[str] = field(default_factory=list)  # files to read besides those of ImageFolder, as in [heic,avif]

    def __post_init__(self) -> None:
        self.global_batch_size = whole_number(self.global_batch_size)

    @property
    def largest_batch_size(self) -> int:
        """The global batch size, or the largest that `auto` may choose."""
        return MAX_AUTO_BATCH if self.global_batch_size == AUTO else int(self.global_batch_size)

    @property
    def image_extensions(self) -> tuple[str, ...]:
        """How the names of images end, in lower case."""
        return IMG_EXTENSIONS + tuple(f".{extension}" for extension in self.extensions)

    def problems(self) -> list[str]:
        found = []
        if self.global_batch_size != AUTO and type(self.global_batch_size) is not int:
            found.append(f"data.global_batch_size is {self.global_batch_size!r}; give a whole number, or auto")
        elif self.global_batch_size != AUTO and self.global_batch_size < 1:
            found.append("data.global_batch_size must be at least 1")
        if self.max_local_batch_size is not None and self.max_local_batch_size < 1:
            found.append("data.max_local_batch_size must be at least 1, or null for no limit")
        if self.image_size is not None and self.image_size < 8:
            found.append("data.image_size must be at least 8 pixels")
        if self.workers is not None and self.workers < 0:
            found.append("data.workers must be 0 or more, or null to choose by the available CPUs")
        if self.workers is not None and self.workers > MAX_WORKERS:
            found.append(
                f"data.workers={self.workers} is for each rank, and more than any machine has CPUs for: give at most "
                f"{MAX_WORKERS}, or null to choose by the available CPUs"
            )
        if self.prefetch_mib < 1:
            found.append("data.prefetch_mib must be at least 1")
        if self.crop_mode not in (AUTO, *CROP_MODES):
            found.append(f"data.crop_mode is {self.crop_mode!r}; choose one of {', '.join((AUTO, *CROP_MODES))}")
        if self.crop_pct is not None and not MIN_CROP_PCT <= self.crop_pct <= 1:
            found.append(f"data.crop_pct must be a share from {MIN_CROP_PCT} to 1, as in 0.875, or null")
        if problem := augment_problem(self.augment, "data.augment", hflip=self.hflip):
            found.append(problem)
        if self.balance not in BALANCES:
            found.append(f"data.balance is {self.balance!r}; choose one of {', '.join(BALANCES)}")
        if self.on_bad_image not in ON_BAD_IMAGE:
            found.append(f"data.on_bad_image is {self.on_bad_image!r}; choose one of {', '.join(ON_BAD_IMAGE)}")
        if problem := intensity_problem(self.intensity):
            found.append(problem)
        if unknown := sorted(set(self.extensions) - set(MORE_EXTENSIONS)):
            known = ", ".join(MORE_EXTENSIONS)
            found.append(f"data.extensions has {', '.join(map(repr, unknown))}; it may have some of {known}")
        return found + self.split.problems()


def auto_batch_size(images: int) -> int:
    """What `data.global_batch_size=auto` is for a number of training images: a power of two, for any number of ranks.

    An epoch has 16 steps or more, where that is possible with batches of 8 to 128. docs/length.md has the table.
    """
    wanted = max(MIN_AUTO_BATCH, min(MAX_AUTO_BATCH, images // 16))
    return 1 << (min(wanted, images).bit_length() - 1)


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


def root_problems(config: DataConfig, run_dir: str | None) -> Iterator[str]:
    """Why `data.root` can't be used; nothing if it can."""
    root = None if config.root is None else Path(config.root)
    if config.labels is not None:
        yield from _problems_of_table(Path(config.labels), root)
        return
    if config.columns != ColumnsConfig():
        yield "data.columns has no effect without data.labels=FILE; remove data.columns"
    if config.split != SplitConfig() and (root is None or root.is_file() or has_splits(root)):
        yield "data.split has no effect, as data.root has the splits train and val; remove data.split"
    if root is None or str(root).startswith("~"):  # a home that is not known, which is named with those of other paths
        return
    if root.is_file():
        if problem := archive_problem(root, config.stage_to):
            yield problem
        return
    if not root.is_dir():
        near = did_you_mean(root.name, [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else [])
        if run_dir is not None and recorded_root(Path(run_dir)) == config.root:
            near = f"; the images of {run_dir} were there: if moved, give data.root=NEW_FOLDER run_dir={run_dir}"
        yield f"data.root={root} is not a folder{near}"
        return
    if problem := no_images(root):
        yield f"data.root={problem}"
        return
    folders = _folders_in(root)
    missing = [split for split in ("train", "val") if split not in folders]
    beside = _folders_in(root.resolve().parent)
    if (
        missing
        and root.resolve().name in beside
        and len(set(_usual(beside).values())) > 1
        and _usual([root.resolve().name])
    ):
        yield f"data.root={root} is one of the splits; give the folder that holds them: data.root={root.parent}"
    elif missing and (others := _usual(folders)):
        rename = [f"rename {name} to {split}" for name, split in others.items() if split in missing and name != split]
        yield (
            f"data.root={root} has no {' and no '.join(missing)} folder; it must hold train/CLASS/*.jpg and "
            f"val/CLASS/*.jpg (its folders: {', '.join(folders[:5])}){''.join(f'; {advice}' for advice in rename)}"
        )
    elif missing:
        yield from _problems_of_classes(root, folders, config.image_extensions)
    for among in ("train", "val", "test") if not missing else [""]:
        if run_dir is not None and Path(run_dir).resolve().is_relative_to((root / among).resolve()):
            among = f"the images of {among}" if among else f"the classes of data.root={root}"
            yield f"run_dir={run_dir} is among {among}, and would become a class: give another folder"


def evaluation_problems(config: DataConfig) -> Iterator[str]:
    """Why the images can't be used in an evaluation, which may be of a folder without train; nothing if they can."""
    if config.labels is not None:
        yield from (f"{problem}; {MOVED}, or data.labels=FILE" for problem in root_problems(config, None))
    elif config.root is not None and not Path(config.root).is_dir():
        tar = "; unpack it and give the folder" if Path(config.root).is_file() else f"; {MOVED}"
        yield f"data.root={config.root} is not a folder{tar}"
    elif config.root is not None and (problem := no_images(Path(config.root))):
        yield f"data.root={problem}"


def _problems_of_table(table: Path, root: Path | None) -> Iterator[str]:
    """Why `data.labels` can't be used; nothing if its content decides."""
    if not table.is_file():
        near = did_you_mean(table.name, [p.name for p in table.parent.iterdir()] if table.parent.is_dir() else [])
        yield f"data.labels={table} {why_no_file(table) if table.exists() else 'is not a file'}{near}"
    if root is not None and not root.is_dir():
        what = (
            "is a file; with data.labels it must be the folder"
            if root.exists()
            else "is not a folder; it must be the one"
        )
        yield f"data.root={root} {what} that the paths in the table begin in"


def _problems_of_classes(root: Path, folders: list[str], extensions: tuple[str, ...]) -> Iterator[str]:
    """Why a folder without splits can't be divided into some; nothing if it can."""
    if not folders:
        yield no_class_folders(root, extensions)
    elif runs := runs_in(root):
        yield f"data.root={root} holds run directories ({', '.join(runs[:5])}); give the images' folder"
    for name in folders[:20]:
        if len(set(_usual(_folders_in(root / name)).values())) > 1:
            yield f"data.root={root} is a folder above the splits: give data.root={root / name}"


def is_divided(config: DataConfig, root: Path) -> bool:
    """Whether the images are those of a table or a folder of classes, and not of folders train and val."""
    return config.labels is not None or (config.root is not None and not has_splits(root))


def has_splits(root: Path) -> bool:
    """Whether a folder that `root_problems` accepts has the folders train and val; else it has those of the classes."""
    return (root / "train").is_dir()


def _folders_in(folder: Path) -> list[str]:
    """The sorted names of the folders in a folder; empty if it can't be read."""
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def _usual(names: Iterable[str]) -> dict[str, str]:
    """Which of the names are usual for a split, and for which."""
    return {name: USUAL_SPLITS[name.lower()] for name in names if name.lower() in USUAL_SPLITS}
