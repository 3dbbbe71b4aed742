"""Features on disk: an array of numbers for each view of each image, in a folder of chunks.

Each chunk is written by one rank and valid on its own: an extraction that was interrupted goes on, and jobs that need
the same features share the work.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import secrets
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distil_tl.data.loader import Batch, Loader
from distil_tl.data.sampler import SampleKey
from distil_tl.utils.files import sha256_file, write_json

# Python's own mmap keeps a descriptor for each map before 3.13.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

CHUNK = 256  # images whose features are written, and can be lost, at once


class Cache:
    """Features [N, ...] of the images of an index, for each of some views, in a folder of chunks."""

    def __init__(self, folder: Path, length: int, views: int) -> None:
        self.folder = folder
        self.length = length
        self.views = views

    def chunks(self) -> list[tuple[int, int]]:
        """(view, first image) of each."""
        return [(view, first) for view in range(self.views) for first in range(0, self.length, CHUNK)]

    def rows(self, first: int) -> range:
        return range(first, min(first + CHUNK, self.length))

    def path(self, view: int, first: int) -> Path:
        return self.folder / f"view-{view:03d}-from-{first:09d}"

    def is_sound(self, view: int, first: int) -> bool:
        """Whether a chunk is there, whole and as it was written."""
        path = self.path(view, first)
        try:
            note = json.loads(path.with_suffix(".json").read_text())
            return bool(
                note["sha256"] == sha256_file(path.with_suffix(".npy")) and note["rows"] == len(self.rows(first))
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def is_there(self, view: int, first: int) -> bool:
        """Whether this process finds a chunk in its full length; `is_sound` reads it as well."""
        path = self.path(view, first)
        try:
            return bool(
                path.with_suffix(".npy").stat().st_size == json.loads(path.with_suffix(".json").read_text())["bytes"]
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def write(self, view: int, first: int, features: Tensor, faults: dict[int, str]) -> None:
        """The array first, then the note that says what it must be, each under its name only when it is whole."""
        path = self.path(view, first)
        self.folder.mkdir(parents=True, exist_ok=True)
        dtype = str(features.dtype).removeprefix("torch.")
        array = (features.view(torch.int16) if features.dtype == torch.bfloat16 else features).numpy()
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.npy")
        try:
            np.save(partial, array, allow_pickle=False)
            digest, size = sha256_file(partial), partial.stat().st_size
            partial.replace(path.with_suffix(".npy"))
        finally:
            partial.unlink(missing_ok=True)
        note = {"sha256": digest, "bytes": size, "rows": len(array), "dtype": dtype, "faults": faults}
        write_json(path.with_suffix(".json"), note)

    def open(self, targets: np.ndarray) -> FeatureDataset:
        """All of it, as images with these targets.

        Raises:
            OSError: the kernel maps no more files into this process.
        """
        arrays, faults = [], dict[tuple[int, int], str]()
        dtype = "float32"
        for view, first in self.chunks():
            path = self.path(view, first)
            note = json.loads(path.with_suffix(".json").read_text())
            dtype = note["dtype"]
            arrays.append(_mapped(path.with_suffix(".npy")))
            faults |= {(view, int(image)): reason for image, reason in note["faults"].items()}
        return FeatureDataset(self, arrays, getattr(torch, dtype), faults, targets)


def _mapped(path: Path) -> np.ndarray:
    """The array in an .npy file, mapped. Unlike np.load's, the map keeps no descriptor open: there may be thousands.

    Raises:
        OSError: it can't be mapped.
    """
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        begin, size = file.tell(), os.fstat(file.fileno()).st_size
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    content = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(content, _libc.munmap, address, size).atexit = False
    array: np.ndarray = np.frombuffer(memoryview(content), dtype, offset=begin)
    array = array.reshape(shape, order="F" if fortran else "C")
    array.flags.writeable = False  # nor is the memory
    return array


class FeatureDataset(Dataset[Batch]):
    """Features in the place of images. All ranks of a node read the same pages of memory."""

    def __init__(
        self,
        cache: Cache,
        arrays: Sequence[np.ndarray],
        dtype: torch.dtype,
        faults: dict[tuple[int, int], str],
        targets: np.ndarray,
    ) -> None:
        self.cache = cache
        self.arrays = arrays
        self.dtype = dtype
        self.faults = faults
        self.per_view = len(arrays) // cache.views
        self.targets = targets

    def __len__(self) -> int:
        return self.cache.length

    def bad(self) -> dict[int, str]:
        """Images that can't be used in one view or another, with the reason."""
        return {image: reason for (_, image), reason in self.faults.items()}

    def example(self, count: int) -> Tensor:
        """A batch [count, ...] of this shape and type, for a trial."""
        return torch.randn(count, *self.arrays[0].shape[1:], generator=torch.Generator().manual_seed(0)).to(self.dtype)

    def __getitems__(self, keys: list[SampleKey]) -> Batch:
        """A batch at once. Epoch `e` sees view `e` modulo their number."""
        where = [(key.epoch % self.cache.views, key.image) for key in keys]
        rows = [self.arrays[view * self.per_view + image // CHUNK][image % CHUNK] for view, image in where]
        features = torch.from_numpy(np.stack(rows))
        bad = [(image, self.faults[view, image]) for view, image in where if (view, image) in self.faults]
        images = torch.tensor([key.image for key in keys])
        return Batch(
            features.view(self.dtype) if self.dtype == torch.bfloat16 else features,
            torch.from_numpy(self.targets[images.numpy()].astype(np.int64)),
            images,
            torch.tensor([pair not in self.faults for pair in where]),
            bad,
        )


def feature_loader(dataset: FeatureDataset, instead_of: Loader) -> Loader:
    """A loader of features in the order and the batches of one of images."""
    sampler: Any = instead_of.sampler
    loader: Loader = DataLoader(dataset, batch_size=instead_of.batch_size, sampler=sampler, collate_fn=_as_it_is)
    return loader


def _as_it_is(batch: Any) -> Any:
    return batch


def free_space(folder: Path) -> int:
    """Bytes that can be written where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def available_memory() -> int:
    """Bytes that this process may still fill: of the machine's, and of what its control group (a Slurm job's) has."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        group = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
        for folder in (Path("/sys/fs/cgroup") / group, *(Path("/sys/fs/cgroup") / group).parents):
            limit = folder / "memory.max"
            if limit.exists() and limit.read_text().strip() != "max":
                found.append(int(limit.read_text()) - int((folder / "memory.current").read_text()))
    except (OSError, ValueError, IndexError):  # another system, or an older one
        pass
    return max(0, min(found))
