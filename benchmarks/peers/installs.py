"""A virtual environment for each peer, with the PyTorch of this one, so that all use the same kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.measure import log
from distil_tl.utils.errors import UserError

# name: (the module that runs it, packages to install in addition to those of distil_tl)
PEERS = {
    "plain": ("benchmarks.peers.plain", ()),
    "timm": ("benchmarks.peers.with_timm", ()),
    "fastai": ("benchmarks.peers.with_fastai", ("fastai",)),
    "lightning": ("benchmarks.peers.with_lightning", ("lightning",)),
}


def interpreters(peers: list[str], given: dict[str, str], folder: Path) -> dict[str, str]:
    """The Python interpreter of each peer: the given one, this one if it needs no more packages, or that of a new venv.

    Raises:
        UserError: a given one is not an executable file, or an installation failed.
    """
    pythons = {}
    for name in peers:
        if name in given:
            pythons[name] = _checked(name, given[name])
        elif not PEERS[name][1]:
            pythons[name] = sys.executable
        else:
            pythons[name] = str(_environment(folder / name, PEERS[name][1]))
    return pythons


def _checked(name: str, path: str) -> str:
    if not os.access(path, os.X_OK) or Path(path).is_dir():
        raise UserError(f"--python {name}={path} is not an executable file; give the bin/python of a venv")
    return str(Path(path).absolute())


def _environment(folder: Path, packages: tuple[str, ...]) -> Path:
    python = folder.absolute() / "bin" / "python"
    if (folder / "complete").exists():
        return python
    log(f"installing {' '.join(packages)} in {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        base = folder / "lib" / version / "site-packages" / "zz-base.pth"  # makes the packages of this venv importable
        base.write_text(sysconfig.get_path("purelib") + "\n")
        _run([str(python), "-m", "pip", "install", "--quiet", *packages])
    except (subprocess.CalledProcessError, OSError) as error:
        output = getattr(error, "stderr", "") or str(error)
        raise UserError(
            f"can't install {' '.join(packages)}: {output.strip()[-500:]}\nLeave this peer out with --peers, or give "
            f"an interpreter that has it with --python {folder.name}=PATH"
        ) from error
    (folder / "complete").touch()
    return python


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
