"""Before a job: `distil-tl prefetch [CONFIG.yaml] [key=value ...]`, on a machine with network that shares its caches.

Fetches what training would fetch, checks it, and says where the nodes must find it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distil_tl import config as configuration
from distil_tl.config import Config
from distil_tl.data.digits import digits_folder
from distil_tl.models.transfer import missing_weights, prepare_weights, weights_file
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.files import sha256_file
from distil_tl.utils.log import logger, setup_console


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "distil-tl prefetch", usage="distil-tl prefetch [--check] [CONFIG.yaml] [key=value ...]",
        description="Fetch and check what training needs; slurm.key=value is passed over.",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="only look, and fail when something is missing")
    known, rest = parser.parse_known_args(args)
    return run_command("distil_tl.cli.prefetch", lambda: prefetch(rest, check=known.check))


def prefetch(args: Sequence[str], *, check: bool = False) -> None:
    """See to the weights of a configuration, and to the digits where it names no images.

    Raises:
        UserError: something can't be fetched; with `check`, something is missing or damaged.
    """
    setup_console(True)
    config, _ = configuration.load([arg for arg in args if not arg.startswith("slurm.")])
    problems = config.model.problems()
    if problems:
        raise UserError("\n".join(problems))
    weights(config, check=check)
    if config.data.root is None and not check:
        logger.info("images: %s", digits_folder())


def weights(config: Config, *, check: bool) -> None:
    """Fetch the weights if they are missing, and again if they are damaged; say where they are."""
    missing = missing_weights(config.model)
    if missing is not None and check:
        raise UserError(f"the weights of {config.model.name} ({missing}) are not on this machine; leave out --check")
    if missing is not None:
        logger.info("fetching the weights of %s (%s)", config.model.name, missing)
    prepare_weights(config.model)
    path, expected = weights_file(config.model)
    if path is None:
        logger.info("weights of %s: none are needed", config.model.name)
        return
    digest = sha256_file(path)
    if expected is not None and not digest.startswith(expected):
        if check or missing is not None:
            raise UserError(f"{path} is damaged: its SHA-256 begins with {digest[:8]}, not {expected}; delete it")
        logger.info("%s is damaged, and is fetched again", path)
        path.unlink()
        weights(config, check=check)
        return
    verified = "as published" if expected is not None else "no published checksum to compare with"
    logger.info("weights of %s: %s, %d MB, SHA-256 %s, %s", config.model.name, path,
                path.stat().st_size // 10**6, digest[:16], verified)  # fmt: skip
    logger.info("the nodes must see that folder, under the same TORCH_HOME or HF_HOME as here")


if __name__ == "__main__":
    sys.exit(main())
