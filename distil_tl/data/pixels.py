"""Which pixels the installed decoders give, as digests of decoded reference images.

Most decoders, and most versions of one, give the same pixels for a file. Where they do not, for example with another
libjpeg than libjpeg-turbo, the ranks of a run, a run and its continuation, and the features in a cache must not differ.
So names and versions are recorded, but compared are digests of what the decoders make of a few small images.
"""

from __future__ import annotations

import functools
import hashlib
import socket
from collections.abc import Mapping
from pathlib import Path

from distil_tl.data.config import MORE_EXTENSIONS, DataConfig
from distil_tl.data.decode import ImageError, decode, decoder_name
from distil_tl.data.pillow import INSTALL
from distil_tl.distributed.collectives import gather_objects
from distil_tl.distributed.process_group import DistInfo
from distil_tl.utils.errors import UserError, listed

# FORMAT-*: lossy formats, of which a decoder may choose the pixels. Their names begin with the format.
REFERENCES = Path(__file__).with_name("reference_images")
FORMATS = ("JPEG", "WEBP", "AVIF", "HEIF")

# Of libjpeg-turbo and libwebp. Runs and caches of features from before there were digests have these.
USUAL = {"JPEG": "9e733ac1b83056c2", "WEBP": "63dcdcc21db0859c"}


def formats_of(config: DataConfig) -> list[str]:
    """The formats of `FORMATS` that a configuration reads."""
    read = {"JPEG", "WEBP", *(MORE_EXTENSIONS[extension] for extension in config.extensions)}
    return [name for name in FORMATS if name in read]


def pixel_digests(config: DataConfig) -> dict[str, str]:
    """By format the digest of its decoded reference images; empty for a format that can't be decoded."""
    return {name: digest(name) for name in formats_of(config)}


def unusual_pixels(config: DataConfig) -> dict[str, str]:
    """The part of `pixel_digests` that features depend on, besides all that caches of features depended on before."""
    return {name: found for name, found in pixel_digests(config).items() if found != USUAL.get(name)}


@functools.cache
def digest(name: str) -> str:
    found = hashlib.sha256()
    for path in sorted(REFERENCES.glob(f"{name.lower()}-*")):
        for min_side in (None, 30, 15):
            try:
                image = decode(path, min_side=min_side)
            except ImageError:
                return ""
            found.update(f"{tuple(image.shape)}".encode())
            found.update(image.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def installed_decoders() -> dict[str, dict[str, str | None]]:
    """By format the decoder and the digest of its pixels, for env.json."""
    return {name: {"decoder": decoder_name(name) if digest(name) else None, "pixels": digest(name)} for name in FORMATS}


def agree_on_pixels(info: DistInfo, config: DataConfig) -> None:
    """Check that all ranks decode images to the same pixels. A collective.

    Raises:
        UserError: on all ranks: they do not, or a format of `data.extensions` can't be decoded.
    """
    own = pixel_digests(config)
    names = {name: decoder_name(name) if found else "no decoder" for name, found in own.items()}
    ranks = gather_objects(info, [socket.gethostname(), own, names])
    for name in own:
        by_digest: dict[str, dict[str, str]] = {}
        for host, digests, decoders in ranks:
            by_digest.setdefault(digests[name], {})[host] = decoders[name]
        if len(by_digest) > 1:
            parts = [f"{decoder} on {host}" for hosts in by_digest.values() for host, decoder in hosts.items()]
            raise UserError(
                f"the ranks would decode {name} images to different pixels: {listed(parts, 8)}; use the same Python "
                f"environment, or install the same versions, on all nodes"
            )
    refuse_missing_decoders(config)


def refuse_missing_decoders(config: DataConfig) -> None:
    """Raises UserError if a format of `data.extensions` can't be decoded."""
    digests = pixel_digests(config)
    missing = [extension for extension in config.extensions if digests.get(MORE_EXTENSIONS[extension]) == ""]
    if missing:
        raise UserError(f"no decoder for {', '.join(missing)} (data.extensions) is installed: {INSTALL}")


def refuse_changed_pixels(saved: Mapping[str, str], run_dir: Path) -> None:
    """Refuse to resume a run whose images would be decoded to other pixels than before.

    Args:
        saved: the digests in the checkpoint; empty in one of an early version.

    Raises:
        UserError: naming the formats.
    """
    changed = [name for name, before in saved.items() if digest(name) != before]
    if changed:
        now = ", ".join(f"{name} by {decoder_name(name)}" for name in changed)
        raise UserError(
            f"the installed image decoder ({now}) gives other pixels than the one that {run_dir} was trained "
            f"with; its env.json has the versions: install those again, or choose another run_dir"
        )
