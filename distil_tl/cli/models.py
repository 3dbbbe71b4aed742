"""`distil-tl models [PATTERN]`: the models that can be used, their sizes, and whether their weights are here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from distil_tl.models import catalogue
from distil_tl.models.model_table import Entry
from distil_tl.models.names import INSTALL_TIMM
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError, did_you_mean
from distil_tl.utils.files import json_text

HERE = {True: "yes", False: "no", None: "-"}


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="distil-tl models",
        description="List the models of torchvision and timm that can be used as model.name, with their parameters and "
        "multiply-accumulate operations (both without the head), the image size of their weights, and whether these "
        "are on this machine.",
    )
    parser.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="such as 'resnet*' or convnextv2 (a part of the "
        "name); with a dot, such as 'timm/vit_small*.*', timm's models with each of their sets of weights",
    )  # fmt: skip
    parser.add_argument("--here", action="store_true", help="only those whose weights are on this machine")
    parser.add_argument("--json", action="store_true", help="as JSON, to standard output")
    options = parser.parse_args(args)
    return run_command("distil-tl models", lambda: run(options.pattern, here=options.here, as_json=options.json))


def run(pattern: str, *, here: bool = False, as_json: bool = False) -> None:
    """List the models.

    Raises:
        UserError: there are none of this name.
    """
    rows = [(entry, catalogue.weights_here(entry)) for entry in catalogue.find(pattern)]
    if here:
        rows = [(entry, found) for entry, found in rows if found]
    no_timm = catalogue.version("timm") is None
    if not rows:
        hint = did_you_mean(pattern, catalogue.names()) or "; without PATTERN all are listed"
        timm = f". timm is not installed, and has most models: {INSTALL_TIMM}" if no_timm else ""
        where = " with weights on this machine" if here else ""
        raise UserError(f"no model{where} matches {pattern!r}{hint}{timm}")
    if as_json:
        sys.stdout.write(json_text([_as_json(entry, found) for entry, found in rows]))
        return
    sys.stdout.write("\n".join(_table(rows)) + "\n")
    timm = f" timm, which has most models, is not installed: {INSTALL_TIMM}." if no_timm else ""
    sys.stderr.write(
        f"{len(rows):,} {'model' if len(rows) == 1 else 'models'}. Use one as model.name=NAME; "
        f"`distil-tl prefetch model.name=NAME` downloads its weights.{timm}\n"
    )


def _as_json(entry: Entry, here: bool | None) -> dict[str, Any]:
    return {
        "name": entry.name,
        "parameters": entry.parameters,
        "macs": entry.macs,
        "image_size": entry.image_size,
        "weights": entry.weights or None,
        "weights_here": here,
    }


def _table(rows: Sequence[tuple[Entry, bool | None]]) -> list[str]:
    lines = [("name", "parameters", "GMACs", "image size", "weights", "here")]
    for entry, here in rows:
        parameters = "-" if entry.parameters is None else f"{entry.parameters / 1e6:.1f} M"
        macs = "-" if entry.macs is None else f"{entry.macs / 1e9:.2f}"
        lines.append((entry.name, parameters, macs, str(entry.image_size), entry.weights or "none", HERE[here]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = (False, True, True, True, False, False)
    return [
        "  ".join(
            text.rjust(width) if end else text.ljust(width)
            for text, width, end in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]


if __name__ == "__main__":
    sys.exit(main())
