"""Profiles: the part of the `slurm` section that belongs to a cluster, in a file of its own."""

from __future__ import annotations

import os
from pathlib import Path

from distil_tl.utils.errors import UserError
from distil_tl.utils.home import expand_home
from distil_tl.utils.paths import path_problem


def find_profile(name: str) -> Path:
    """The file of a profile: a path that ends in .yaml, or the name of a file in the user's own folder.

    Raises:
        UserError: there is no such file.
    """
    if problem := path_problem(name):
        raise UserError(f"slurm.profile={name[:60]}: {problem}")
    if name.endswith((".yaml", ".yml")):
        path = expand_home(name)
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
    return Path(os.environ.get("XDG_CONFIG_HOME") or expand_home("~/.config")) / "distil_tl"
