"""The demo data: scikit-learn's 1,797 scanned digits, 8 x 8 pixels each, as folders of images."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from distil_tl.utils.errors import UserError
from distil_tl.utils.files import read_json, write_json
from distil_tl.utils.home import cache_dir

_MANIFEST = "manifest.json"  # {"train/0": number of files, ...}


def digits_folder(cache: Path | None = None) -> Path:
    """The folder `digits-v1` in `cache` (default: `cache_dir()`), created by the first call.

    It contains `{train,val}/{0..9}/NNNN.png`: 1,442 and 355 grey 8 x 8 images, where NNNN is the position in
    scikit-learn's data set. Every fifth sample of a class is for validation. Several processes may call this at the
    same time. An interrupted call leaves no incomplete folder.

    Raises:
        UserError: scikit-learn is not installed, or the cache cannot be written.
    """
    cache = cache or cache_dir()
    folder = cache / "digits-v1"
    if not _is_complete(folder):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".digits-", dir=cache) as temporary:
                # A sub-folder, because the temporary folder itself is not readable by other users.
                built = Path(temporary) / "built"
                _write(built)
                _move_into_place(built, folder, aside=Path(temporary) / "old")
        except OSError as error:
            raise UserError(f"cannot write the demo data: {error}. Set DISTIL_TL_CACHE to a writable folder") from error
    return folder


def _write(folder: Path) -> None:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the demo data require scikit-learn: pip install 'distil_tl[demo]'") from error
    digits = load_digits()
    grey = (digits.images.astype(np.int64) * 255 + 8) // 16  # 0..16 to 0..255, rounded
    seen: Counter[int] = Counter()
    files: Counter[str] = Counter()
    for position, (pixels, label) in enumerate(zip(grey, digits.target.tolist(), strict=True)):
        split = "val" if seen[label] % 5 == 4 else "train"
        seen[label] += 1
        files[f"{split}/{label}"] += 1
        path = folder / split / str(label) / f"{position:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Uncompressed: the output of zlib depends on its version, and fingerprints depend on the file sizes.
        Image.fromarray(pixels.astype(np.uint8)).save(path, compress_level=0)
    write_json(folder / _MANIFEST, dict(files))


def _is_complete(folder: Path) -> bool:
    """Whether the number of files is right: a tool that cleans caches may have deleted some."""
    try:
        expected = read_json(folder / _MANIFEST)
        return all(len(list((folder / part).iterdir())) >= count for part, count in expected.items())
    except (OSError, ValueError):
        return False


def _move_into_place(built: Path, folder: Path, aside: Path) -> None:
    """Rename `built` to `folder`. A damaged `folder` is renamed to `aside`; a complete one is kept."""
    if folder.exists() and not _is_complete(folder):
        with contextlib.suppress(FileNotFoundError):  # another process was first
            folder.rename(aside)
    try:
        built.rename(folder)
    except OSError:
        if not _is_complete(folder):
            raise
