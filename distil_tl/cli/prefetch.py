"""`distil-tl prefetch [CONFIG.yaml] [key=value ...]`: download and check what a job needs, on a machine with network.

The nodes of the job must see the same caches, as on a file system that they share.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import sha256_file
from distil_tl.utils.log import logger, setup_console

if TYPE_CHECKING:
    from distil_tl.models.config import ModelConfig


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="distil-tl prefetch",
        usage="distil-tl prefetch [--check] [CONFIG.yaml] [key=value ...]",
        description="Download and check the pretrained weights of a configuration. Keys of slurm. are ignored.",
    )
    parser.add_argument("--check", action="store_true", help="download nothing; fail if something is missing")
    options, rest = parser.parse_known_args(args)
    return run_command("distil-tl prefetch", lambda: prefetch(rest, check=options.check))


def prefetch(args: Sequence[str], *, check: bool = False) -> None:
    """Fetch the weights of a configuration, and the demo's images if it sets no data.root.

    Raises:
        UserError: the arguments are wrong, or a download failed; with `check`, something is missing or damaged.
    """
    from distil_tl import config as configuration

    setup_console(True)
    config, _ = configuration.load([arg for arg in args if not arg.startswith("slurm.")])
    problems = config.model.problems()
    if problems:
        raise UserError("\n".join(problems))
    fetch_weights(config.model, check=check)
    if config.data.root is None and not check:
        from distil_tl.data.digits import digits_folder

        logger.info("images: %s", digits_folder())


def fetch_weights(model: ModelConfig, *, check: bool) -> None:
    """Download the weights if they are missing or damaged, and log where they are. With `check`, raise instead."""
    from distil_tl.models.weight_sources import download_weights, missing_weights, weights_file  # torch: after checks

    missing = missing_weights(model)
    if missing is not None and check:
        raise UserError(f"the weights of {model.name} ({missing}) are not on this machine; run without --check")
    if missing is not None:
        logger.info("downloading the weights of %s (%s)", model.name, missing)
    download_weights(model)
    path, expected = weights_file(model)
    if path is None:
        logger.info("weights of %s: none needed", model.name)
        return
    digest = sha256_file(path)
    if expected is not None and not digest.startswith(expected):
        if check or missing is not None:
            raise UserError(f"{path} is damaged: its SHA-256 begins with {digest[:8]}, not {expected}; delete it")
        logger.info("%s is damaged; downloading it again", path)
        path.unlink()
        fetch_weights(model, check=check)
        return
    logger.info(
        "weights of %s: %s, %d MB, SHA-256 %s (%s)", model.name, path, path.stat().st_size // 10**6, digest[:16],
        "no published checksum to compare with" if expected is None else "matches the published checksum",
    )  # fmt: skip
    logger.info("the nodes must see this folder, with the same TORCH_HOME or HF_HOME as here")


if __name__ == "__main__":
    sys.exit(main())
