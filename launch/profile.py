"""Profiles: the part of the `slurm` section that belongs to a cluster, in a file of its own."""

from __future__ import annotations

import os
from pathlib import Path

from distil_tl.utils.errors import UserError


def find_profile(name: str) -> Path:
    """The file of a profile: a path that ends in .yaml, or the name of a file in the user's own folder.

    Raises:
        UserError: there is no such file.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(os.path.expanduser(name))  # noqa: PTH111  leaves `~` as it is where there is no home
        if not path.is_file():
            raise UserError(f"slurm.profile={name}: there is no such file")
        return path
    folder = own_folder()
    path = folder / f"{name}.yaml"
    if path.is_file():
        return path
    known = ", ".join(sorted(found.stem for found in folder.glob("*.yaml"))) or "none"
    raise UserError(
        f"slurm.profile={name}: there is no file {path} (profiles there: {known}); a path must end in .yaml"
    )


def own_folder() -> Path:
    """The folder with the profiles of this user."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")  # noqa: PTH111  as above
    return Path(base) / "distil_tl"
