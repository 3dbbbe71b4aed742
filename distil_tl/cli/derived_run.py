"""What `distil-tl distil` and `distil-tl extend` share: a run that is trained with the configuration of another one."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distil_tl.data.config import ALL_EXTENSIONS
from distil_tl.utils.home import path_argument
from distil_tl.utils.log import printable
from distil_tl.utils.outputs import check_output, open_output


def read_arguments(
    args: Sequence[str] | None, program: str, description: str, epilog: str, *, run_dir: str, needed: str
) -> argparse.Namespace:
    """The arguments `RUN_DIR key=value... [--config FILE]`, as `run_dir`, `overrides` and `config`.

    Args:
        run_dir: the help of RUN_DIR.
        needed: the key without which there is nothing to do, for the help.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description=f"{description} Under torchrun: torchrun ... -m {program.replace('-', '_', 1)} ...",
        epilog=f"Further arguments change {epilog}.",
    )
    parser.add_argument("run_dir", type=path_argument, metavar="RUN_DIR", help=run_dir)
    parser.add_argument("overrides", nargs="+", metavar="key=value", help=f"{needed}, and others")
    parser.add_argument(
        "--config", type=path_argument, metavar="FILE", help="only write the configuration, to submit it"
    )
    return parser.parse_intermixed_args(args)


def train_derived(tree: Mapping[str, Any], overrides: Sequence[str], run_dir: Path, config_file: Path | None) -> None:
    """Train a configuration, or write it to `config_file`.

    Args:
        overrides: `key=value` arguments that change it.
        run_dir: that it is derived from.

    Raises:
        UserError: the file can't be written, or what training refuses.
    """
    content = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)
    if config_file is not None:
        check_output("--config", config_file, [run_dir / "config.yaml"], ALL_EXTENSIONS, earlier=())
        with open_output(config_file) as file:
            file.write(content)
        command = printable(shlex.join([str(config_file), *overrides]))
        sys.stdout.write(f"{printable(config_file)}: submit it with distil-tl submit {command}\n")
        return
    from distil_tl import config as configuration

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(content, encoding="utf-8")
        config = configuration.load([str(path), *overrides], saved=True)
    from distil_tl.train import train

    train(*config)
