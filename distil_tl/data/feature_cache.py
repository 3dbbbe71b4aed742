"""Features on disk: an array for each view of each image, in a folder of chunks.

Each chunk is written by one rank and is valid without the others: an interrupted extraction is continued, and jobs
that need the same features share the work.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import shutil
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distil_tl.data.loader import Batch, Loader
from distil_tl.data.prefetch import batches_of_thread
from distil_tl.data.read_ahead import PinnedLoader
from distil_tl.data.sampler import SampleKey
from distil_tl.distributed.launch_env import Launch
from distil_tl.utils.files import read_json, sha256_file, write_json

# Before Python 3.13, its mmap keeps a file descriptor open for each mapping.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

CHUNK = 256  # images per chunk, the unit that is written and can be lost


class FeatureCache:
    """Features [N, ...] of the images of an index, for one or more views of each, in a folder of chunks."""

    def __init__(self, folder: Path, length: int, views: int) -> None:
        self.folder = folder
        self.length = length
        self.views = views

    def chunks(self) -> list[tuple[int, int]]:
        """(view, first image) of each chunk."""
        return [(view, first) for view in range(self.views) for first in range(0, self.length, CHUNK)]

    def rows(self, first: int) -> range:
        """The images of the chunk that begins with image `first`."""
        return range(first, min(first + CHUNK, self.length))

    def path(self, view: int, first: int) -> Path:
        """The path of a chunk, to which .npy and .json are appended."""
        return self.folder / f"view-{view:03d}-from-{first:09d}"

    def is_valid(self, view: int, first: int) -> bool:
        """Whether a chunk exists and has the checksum that was recorded when it was written."""
        path = self.path(view, first)
        try:
            meta = read_json(path.with_suffix(".json"))
            return bool(
                meta["sha256"] == sha256_file(path.with_suffix(".npy")) and meta["rows"] == len(self.rows(first))
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def has_full_length(self, view: int, first: int) -> bool:
        """Whether a chunk exists with its full length; unlike `is_valid`, without reading it."""
        path = self.path(view, first)
        try:
            recorded = read_json(path.with_suffix(".json"))["bytes"]
            return bool(path.with_suffix(".npy").stat().st_size == recorded)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def write(self, view: int, first: int, features: Tensor, faults: dict[int, str]) -> None:
        """Write a chunk: the array, then the JSON file with its checksum. Each file is renamed when it is complete."""
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
        meta = {"sha256": digest, "bytes": size, "rows": len(array), "dtype": dtype, "faults": faults}
        write_json(path.with_suffix(".json"), meta)

    def open(self, targets: np.ndarray) -> FeatureDataset:
        """A dataset of all features, of images with these targets. All chunks must exist.

        Raises:
            OSError: the kernel does not map more files into this process.
        """
        arrays, faults = [], dict[tuple[int, int], str]()
        dtype = "float32"
        for view, first in self.chunks():
            path = self.path(view, first)
            meta = read_json(path.with_suffix(".json"))
            dtype = meta["dtype"]
            arrays.append(_mapped(path.with_suffix(".npy")))
            faults |= {(view, int(image)): reason for image, reason in meta["faults"].items()}
        return FeatureDataset(self, arrays, getattr(torch, dtype), faults, targets)


def _mapped(path: Path) -> np.ndarray:
    """The array in an .npy file, memory-mapped read-only.

    Unlike with np.load, no file descriptor stays open: there may be thousands of chunks.

    Raises:
        OSError: the file cannot be mapped.
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
    array.flags.writeable = False  # the mapping is read-only
    return array


class FeatureDataset(Dataset[Batch]):
    """Features instead of images, memory-mapped: all ranks of a node read the same pages of memory."""

    def __init__(
        self,
        cache: FeatureCache,
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
        """Images of which at least one view cannot be used, with the reason."""
        return {image: reason for (_, image), reason in self.faults.items()}

    def example(self, count: int) -> Tensor:
        """A dummy batch [count, ...] with the shape and type of these features."""
        return torch.randn(count, *self.arrays[0].shape[1:], generator=torch.Generator().manual_seed(0)).to(self.dtype)

    def columns(self, first: int, end: int) -> FeatureDataset:
        """The same images with these columns of their features [N, C, ...], without copying them."""
        arrays = [array[:, first:end] for array in self.arrays]
        return FeatureDataset(self.cache, arrays, self.dtype, self.faults, self.targets)

    @property
    def bytes_per_image(self) -> int:
        return int(self.arrays[0][0].nbytes)

    def __getitems__(self, keys: list[SampleKey]) -> Batch:
        """The batch of these samples. Epoch `e` uses view `e` modulo the number of views."""
        pairs = [(key.epoch % self.cache.views, key.image) for key in keys]
        rows = [self.arrays[view * self.per_view + image // CHUNK][image % CHUNK] for view, image in pairs]
        features = torch.from_numpy(np.stack(rows))
        bad = [(image, self.faults[view, image]) for view, image in pairs if (view, image) in self.faults]
        images = torch.tensor([key.image for key in keys])
        return Batch(
            features.view(self.dtype) if self.dtype == torch.bfloat16 else features,
            torch.from_numpy(self.targets[images.numpy()].astype(np.int64)),
            images,
            torch.tensor([pair not in self.faults for pair in pairs]),
            bad,
        )


class FeatureSubset(FeatureDataset):
    """Some images of a dataset: image `i` is `images[i]` of the whole. Batches have positions in the whole."""

    def __init__(self, whole: FeatureDataset, images: np.ndarray) -> None:
        super().__init__(whole.cache, whole.arrays, whole.dtype, whole.faults, whole.targets)
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def bad(self) -> dict[int, str]:
        own = set(self.images.tolist())
        return {image: reason for image, reason in super().bad().items() if image in own}

    def __getitems__(self, keys: list[SampleKey]) -> Batch:
        return super().__getitems__([key._replace(image=int(self.images[key.image])) for key in keys])


def feature_loader(
    dataset: FeatureDataset,
    batches: Iterable[list[SampleKey]],
    batch_size: int,
    *,
    launch: Launch,
    device: torch.device,
    limit_mib: int,
) -> Iterable[Batch]:
    """A loader of features in the given batches, of at most `batch_size` images.

    On CUDA a thread reads ahead into pinned memory, as far as `limit_mib` (`data.prefetch_mib`) permits.
    """
    given: Any = batches
    loader: Loader = DataLoader(dataset, batch_sampler=given, collate_fn=_identity, generator=torch.Generator())
    if device.type != "cuda":
        return loader
    ahead = batches_of_thread(launch, batch_size * dataset.bytes_per_image, limit_mib=limit_mib)
    return PinnedLoader(loader, device, ahead)


def _identity(batch: Any) -> Any:
    return batch


def free_space(folder: Path) -> int:
    """Free bytes on the file system of `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
