"""Where the weights of a backbone come from: a package, a file, a run, or the library that publishes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from distil_tl.models import timm_models, torchvision_models
from distil_tl.models.config import ModelConfig, resolve_weights
from distil_tl.models.head import seeded
from distil_tl.models.weight_packages import PACKAGES
from distil_tl.models.weights import (
    StateDict,
    load_backbone,
    log_old_head,
    match_by_position,
    read_state_dict,
    strip_prefixes,
)
from distil_tl.utils.files import sha256_file


@dataclass(frozen=True)
class WeightsInfo:
    """The source of the backbone's weights.

    Attributes:
        source: such as "torchvision IMAGENET1K_V2", "file run.safetensors" or "none".
        sha256: of the file, None if there is none.
    """

    source: str
    sha256: str | None


def load_weights(
    config: ModelConfig, module: nn.Module, head: tuple[str, ...], skip: tuple[str, ...], seed: int
) -> WeightsInfo:
    """Load the weights, unless they are there already.

    Args:
        head: paths of the layers that are the new head.
        skip: paths of the layers that keep what they have: the head and auxiliary classifiers.
        seed: of random numbers that a network draws while it gets its weights.

    Returns:
        Their source.

    Raises:
        UserError: they can't be read, or don't fit the network.
    """
    state, info = _read_weights(config, module, head)
    if state is None:
        return info
    state = strip_prefixes(state, module.state_dict())
    if config.from_timm:
        state = timm_models.adapt_state_dict(state, module, skip, config.library_name)
    elif not config.is_own:
        state = torchvision_models.adapt_state_dict(state, module)
    if config.path is not None:
        log_old_head(state, skip, info.source)
    # For weights of its first version MNASNet rebuilds its stem, with random numbers.
    with seeded(seed, "model"):
        load_backbone(module, state, skip=skip, source=info.source)
    return info


def _read_weights(
    config: ModelConfig, module: nn.Module, head: tuple[str, ...]
) -> tuple[StateDict | None, WeightsInfo]:
    """The state dict to load, None if the module already has its weights, and the source of the weights."""
    weights = resolve_weights(config)
    if weights == "none":
        return None, WeightsInfo("none", None)
    if config.is_own and config.path is None:
        return None, WeightsInfo(f"those of {config.name}", None)
    if config.path is not None:
        is_run = config.path.suffix != Path(config.weights).suffix
        source = f"the run {config.weights}" if is_run else f"file {config.path.name}"
        return read_state_dict(config.path), WeightsInfo(source, sha256_file(config.path))
    if weights == "package":
        package = PACKAGES[config.name]
        file = package.file()
        assert file is not None, "checked by config.problems()"
        info = WeightsInfo(f"package {package.distribution} {package.version}", sha256_file(file))
        return match_by_position(read_state_dict(file), module, skip_shape=head, source=info.source), info
    if config.from_timm:
        cached = timm_models.cached_file(config.library_name)
        return None, WeightsInfo(timm_models.source(config.library_name), sha256_file(cached) if cached else None)
    file = torchvision_models.download(config.name, weights)
    published = torchvision_models.published_weights(config.name, weights)
    return read_state_dict(file), WeightsInfo(f"torchvision {published.name}", sha256_file(file))


def download_weights(config: ModelConfig) -> None:
    """Download the weights into the cache of their library, so that `build` only reads, on all ranks.

    One process per cache calls it before `build`. It does nothing for weights that need no download.

    Raises:
        UserError: the download failed; the message names the source and the alternatives.
    """
    weights = resolve_weights(config)
    if weights in ("none", "package") or config.is_own or config.path is not None:
        return
    if config.from_timm:
        timm_models.download(config.library_name)
    else:
        torchvision_models.download(config.name, weights)


def missing_weights(config: ModelConfig) -> str | None:
    """The name of the weights that must be downloaded before `build`; None if they are on this machine."""
    weights = resolve_weights(config)
    if weights in ("none", "package") or config.is_own or config.path is not None:
        return None
    if config.from_timm:
        return None if timm_models.cached_file(config.library_name) else timm_models.source(config.library_name)
    if torchvision_models.cache_path(config.name, weights).is_file():
        return None
    return f"torchvision {torchvision_models.published_weights(config.name, weights).name}"


def weights_file(config: ModelConfig) -> tuple[Path | None, str | None]:
    """The file of the weights and the first characters of its SHA-256; None for what does not exist or is unknown."""
    weights = resolve_weights(config)
    if weights == "none" or (config.is_own and config.path is None):
        return None, None
    if config.path is not None:
        return config.path, None
    if weights == "package":
        return PACKAGES[config.name].file(), None
    if config.from_timm:
        return timm_models.cached_file(config.library_name), None
    path = torchvision_models.cache_path(config.name, weights)
    return path, torchvision_models.published_digest(path)
