"""Which models there are, with their sizes: from a table, so that torch is not imported where that can be avoided.

For another version of a library than that of the table, the library is asked which models it has, and those that the
table does not have are built without memory.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from distil_tl.models.model_table import Entry, read_table
from distil_tl.models.names import TIMM_PREFIX
from distil_tl.models.weight_packages import PACKAGES
from distil_tl.utils.home import expand_home

LIBRARIES = ("torchvision", "timm")
MOST_BUILT = 40  # models that are built for a list, each in some tenths of a second
_HUB_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def version(library: str) -> str | None:
    """The installed version of a library without its local part, such as +cpu; None if it is not installed."""
    try:
        return metadata.version(library).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def find(pattern: str) -> list[Entry]:
    """The models of the installed libraries that a pattern names, in the order of the libraries.

    The sizes of models that the table lacks are found if they are few.

    Args:
        pattern: of shell wildcards, for the whole name with or without `timm/`; without wildcards, a part of a name.
            With a dot, timm's models are listed with each of their sets of weights, as NAME.TAG.
    """
    found: list[Entry] = []
    for library in LIBRARIES:
        if version(library) is not None:
            by_tag = library == "timm" and "." in pattern
            found += [entry for entry in (_tagged() if by_tag else _entries(library)) if matches(entry.name, pattern)]
    missing = [entry.name for entry in found if entry.parameters is None]
    if len(missing) > MOST_BUILT:
        return found
    built = {name: _measured(name) for name in missing}
    return [known for entry in found if (known := built.get(entry.name, entry)) is not None]


def matches(name: str, pattern: str) -> bool:
    if not any(character in pattern for character in "*?["):
        return pattern in name
    return any(fnmatch.fnmatchcase(each, pattern) for each in (name, name.removeprefix(TIMM_PREFIX)))


def names() -> list[str]:
    """All names of the table, for suggestions."""
    return list(read_table()[1])


def _entries(library: str) -> Iterator[Entry]:
    """The models of a library."""
    versions, table = read_table()
    if version(library) == versions[library]:
        yield from (entry for entry in table.values() if entry.name.startswith(TIMM_PREFIX) == (library == "timm"))
        return
    from distil_tl.models import facts, timm_models, torchvision_models

    if library == "timm":
        every = [TIMM_PREFIX + name for name in timm_models.names()]
    else:
        every = torchvision_models.names()
    for name in every:
        yield table.get(name) or facts.published_entry(name)


def _tagged() -> Iterator[Entry]:
    """timm's models with each of their sets of weights."""
    from distil_tl.models import timm_models

    known = {entry.name: entry for entry in _entries("timm")}
    for name in timm_models.names_with_tags():
        architecture = known.get(TIMM_PREFIX + name.partition(".")[0])
        if architecture is not None:
            size, tag, source = timm_models.published_as(name)
            yield replace(
                architecture, name=TIMM_PREFIX + name, image_size=size, weights=tag, source=source,
                macs=architecture.macs if architecture.image_size == size else None,
            )  # fmt: skip


def _measured(name: str) -> Entry | None:
    """A model that the table does not have; None if it can't be used."""
    from distil_tl.models.facts import entry_of
    from distil_tl.utils.errors import UserError

    try:
        return entry_of(name)
    except UserError:
        return None


def weights_here(entry: Entry) -> bool | None:
    """Whether the default weights of a model are on this machine; None if there are none."""
    package = PACKAGES.get(entry.name)
    if package is not None and package.file() is not None:
        return True
    if not entry.weights:
        return None
    if not entry.name.startswith(TIMM_PREFIX) or entry.source.endswith((".pth", ".pt")):
        return (_torch_hub() / entry.source).is_file()
    repository, _, revision = entry.source.partition("@")
    if not (_hugging_face_hub() / f"models--{repository.replace('/', '--')}").is_dir():
        return False  # the usual case, in which nothing is imported
    from huggingface_hub import try_to_load_from_cache

    return any(
        isinstance(try_to_load_from_cache(repository, file, revision=revision or None), str) for file in _HUB_FILES
    )


def _cache_home() -> Path:
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")


def _torch_hub() -> Path:
    """As `torch.hub.get_dir`."""
    home = os.environ.get("TORCH_HOME")
    return (expand_home(home) if home else _cache_home() / "torch") / "hub" / "checkpoints"


def _hugging_face_hub() -> Path:
    """As in huggingface_hub's `constants`."""
    if own := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return expand_home(own)
    home = os.environ.get("HF_HOME")
    return (expand_home(home) if home else _cache_home() / "huggingface") / "hub"
