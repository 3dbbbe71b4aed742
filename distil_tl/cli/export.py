"""`distil-tl export RUN_DIR -o model.onnx`: a trained model in a file that other programs read."""

from __future__ import annotations

import argparse
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path

from distil_tl.data.config import ALL_EXTENSIONS
from distil_tl.distributed.launch_env import refuse_several_processes
from distil_tl.export.names import ONNX, PROVENANCE, SCRIPT
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from distil_tl.utils.home import path_argument
from distil_tl.utils.log import printable
from distil_tl.utils.outputs import check_output
from distil_tl.utils.run_folders import refuse_other_than_run

FORMATS = ("onnx", "safetensors")


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="distil-tl export",
        description="Write a trained model as ONNX: uint8 images [N, 3, S, S] in, probabilities out. The file is left "
        "only if onnxruntime answers every image of val as PyTorch does. A script predict.py is written beside it.",
        epilog="key=value changes the configuration of the run, for example data.root=OTHER_FOLDER.",
    )
    parser.add_argument("run_dir", type=path_argument, metavar="RUN_DIR", help="a run directory with a checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("-o", "--output", type=path_argument, required=True, metavar="PATH",
                        help="a file, as model.onnx; a folder for --format safetensors")  # fmt: skip
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="safetensors: model.safetensors and "
                        "config.json, which timm or torchvision load")  # fmt: skip
    parser.add_argument("--checkpoint", default="best", help="best, last, or a folder in RUN_DIR/checkpoints")
    parser.add_argument("--uncalibrated", action="store_true", help="probabilities without the temperature that was "
                        "fitted on val")  # fmt: skip
    options = parser.parse_intermixed_args(args)
    return run_command("distil-tl export", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Export with the options that `main` has read.

    Raises:
        UserError: no such run or images, an output that can't be written or would destroy something, or a library is
            missing.
        ExportError: the model can't be exported, or the exported one answers otherwise.
    """
    refuse_several_processes("distil-tl export")
    output: Path = options.output
    if options.format != "onnx" and options.uncalibrated:
        raise UserError("--uncalibrated is for probabilities; the models of --format safetensors give logits")
    if options.format == "onnx":
        if output.suffix != ONNX:
            raise UserError(f"-o {printable(output)}: name a file that ends in {ONNX}")
        check_model(output)
        check_script(output.parent / SCRIPT)
    refuse_other_than_run(options.run_dir)
    from distil_tl.cli import exports  # imports torch, which takes seconds; --help does not need it

    if options.format == "onnx":
        exports.export_onnx(
            options.run_dir, options.checkpoint, options.overrides, output, calibrated=not options.uncalibrated
        )
    else:
        exports.export_library(options.run_dir, options.checkpoint, options.overrides, output)


def check_model(path: Path) -> None:
    """Raises UserError if the model can't be written, or would replace another file than an earlier one."""
    check_output("-o", path, (), ALL_EXTENSIONS, earlier=(b"\x08",), whole=True)  # of a protobuf: the version of ONNX
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(PROVENANCE.encode()) < 0:
                raise UserError(
                    f"-o {printable(path)} exists, and is another program's model: name another file, or remove it"
                )


def check_script(path: Path) -> None:
    """Raises UserError if the script would replace another file than an earlier one of this command."""
    check_output("the script", path, whole=True)
    if path.exists() and b"`distil-tl export` wrote both" not in path.read_bytes():
        raise UserError(
            f"{printable(path)} is in the way: a script of that name is written beside the model. Rename it, or name "
            f"a file in another folder with -o"
        )


if __name__ == "__main__":
    sys.exit(main())
