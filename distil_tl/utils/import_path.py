"""What a command needs of Python before anything else is imported: from where to import, and names in UTF-8.

`python -m` looks first in the current folder: a `random.py` or a folder `timm/` of the user would be imported in place
of the library. Imported before everything else, so it imports only what Python has already loaded.
"""

from __future__ import annotations

import os
import sys

PACKAGES, SCRIPT = ("distil_tl", "launch"), "distil-tl"
_UTF8 = "PYTHONUTF8"
LIBRARIES = (
    "numpy", "omegaconf", "optuna", "PIL", "pi_heif", "safetensors", "sklearn", "submitit", "timm", "torch",
    "torchcodec", "torchvision", "triton", "wandb", "yaml",
)  # fmt: skip


def use_utf8() -> None:
    """For a command of this package: start again in Python's UTF-8 mode where the locale has another encoding.

    The names of files are bytes, and nearly always UTF-8. Python reads and writes them, as all other text, in the
    encoding of the locale, such as ASCII, and the mode can't be changed later. The process id stays the same.
    """
    if sys.getfilesystemencoding() == "utf-8" or not sys.executable or os.environ.get(_UTF8) == "1":
        return
    args = sys.orig_argv
    module = next((args[i + 1] for i, arg in enumerate(args[:-1]) if arg == "-m"), "")
    started = sys.argv[:1] == ["-m"] and module.partition(".")[0] in PACKAGES  # so it is while `python -m` imports it
    if not started and not (sys.argv and os.path.basename(sys.argv[0]) == SCRIPT):  # noqa: PTH119
        return
    os.environ[_UTF8] = "1"  # for the processes that this one starts, too
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *args[1:]])


def leave_current_folder() -> None:
    """For a command of this package: import no more from the current folder, unless the package itself is in it."""
    args = sys.orig_argv
    module = next((args[i + 1] for i, arg in enumerate(args[:-1]) if arg == "-m"), "")
    is_script = bool(sys.argv) and os.path.basename(sys.argv[0]) == SCRIPT  # noqa: PTH119
    if not is_script and module.partition(".")[0] not in PACKAGES:
        return
    here = _current_folder()
    if here is not None and sys.path[:1] in ([""], [here]) and not _is_home_of_package(here):
        del sys.path[0]
    refuse_shadowed_libraries()


def refuse_shadowed_libraries() -> None:
    """Exit with a message if the current folder is still looked at, and would replace a library."""
    here = _current_folder()
    if here is None or not any(path in ("", ".", here) for path in sys.path):
        return
    names = LIBRARIES if _is_home_of_package(here) else (*LIBRARIES, *sys.stdlib_module_names)
    for name in names:
        for file in (f"{name}.py", os.path.join(name, "__init__.py")):  # noqa: PTH118
            path = os.path.join(here, file)  # noqa: PTH118
            if os.path.isfile(path):  # noqa: PTH113
                sys.stderr.write(
                    f"distil_tl: {path} would be imported in place of the library {name}: rename it, or start the "
                    f"command in another folder"
                    f"{'' if _is_home_of_package(here) else ' and without the current folder in PYTHONPATH'}\n"
                )
                sys.exit(2)


def is_installed(name: str) -> bool:
    """Whether a library is installed, without importing it. A folder of that name without Python code is none."""
    from importlib.util import find_spec  # not at the top: see above

    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def _current_folder() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:  # it was removed
        return None


def _is_home_of_package(folder: str) -> bool:
    """Whether this package is imported from that folder, as in a checkout."""
    return os.path.realpath(folder) == os.path.dirname(  # noqa: PTH120
        os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # noqa: PTH120
    )
