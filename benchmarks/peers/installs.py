"""An environment for each peer, with the PyTorch of this one, so that all compute with the same kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.measure import say
from distil_tl.utils.errors import UserError

# name: (module that runs it, what to install for it beside what distil_tl has)
PEERS = {
    "plain": ("benchmarks.peers.plain", ()),
    "timm": ("benchmarks.peers.with_timm", ()),
    "fastai": ("benchmarks.peers.with_fastai", ("fastai",)),
    "lightning": ("benchmarks.peers.with_lightning", ("lightning",)),
}


def interpreters(peers: list[str], given: dict[str, str], folder: Path) -> dict[str, str]:
    """The Python of each peer: the one given, this one where nothing is missing, else that of a new environment.

    Raises:
        UserError: a given one is no program, or an installation failed.
    """
    found = {}
    for name in peers:
        if name in given:
            found[name] = _checked(name, given[name])
        elif not PEERS[name][1]:
            found[name] = sys.executable
        else:
            found[name] = str(_environment(folder / name, PEERS[name][1]))
    return found


def _checked(name: str, path: str) -> str:
    if not os.access(path, os.X_OK) or Path(path).is_dir():
        raise UserError(f"--python {name}={path}: there is no program of this name; give a venv's bin/python")
    return str(Path(path).absolute())


def _environment(folder: Path, packages: tuple[str, ...]) -> Path:
    python = folder.absolute() / "bin" / "python"
    if (folder / "complete").exists():
        return python
    say(f"installing {' '.join(packages)} in {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        mine = folder / "lib" / version / "site-packages" / "zz-base.pth"  # pip finds there what is installed here
        mine.write_text(sysconfig.get_path("purelib") + "\n")
        _run([str(python), "-m", "pip", "install", "--quiet", *packages])
    except (subprocess.CalledProcessError, OSError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise UserError(
            f"can't install {' '.join(packages)} for a peer: {said.strip()[-500:]}\nLeave it out with --peers, or name "
            f"an interpreter that has it with --python {folder.name}=PATH"
        ) from error
    (folder / "complete").touch()
    return python


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
