"""Whether torch.compile can work on this machine; imports no torch."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable

from distil_tl.utils.import_path import is_installed


def compiler_problem(compile: str, device: str, has_cuda: Callable[[], bool]) -> str | None:
    """Why torch.compile can't work on this machine; None if nothing speaks against it.

    Args:
        device: as `distributed.device`.
        has_cuda: whether torch sees a CUDA device, asked only if needed.
    """
    if compile == "none" or os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):
        return None
    if device == "cuda" or (device == "auto" and has_cuda()):
        if not is_installed("triton"):
            return f"compile={compile} needs triton on a GPU: pip install triton, or use compile=none"
        kind, variable, names = "C", "CC", ["gcc", "clang"]
    else:
        kind, variable, names = "C++", "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    given = shlex.split(os.environ.get(variable, ""))[:1]
    if any(shutil.which(name) for name in given or names):
        return None
    return (
        f"compile={compile} needs a {kind} compiler, and there is no {' or '.join(given or names)} on this machine: "
        f"install one, name one with the environment variable {variable}, or use compile=none"
    )
