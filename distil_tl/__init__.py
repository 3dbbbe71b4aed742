"""Staged transfer learning of image classifiers on many GPUs.

`distil_tl.load(RUN_DIR)` gives a trained model, its transform and its class names.
"""

from __future__ import annotations

from distil_tl.utils.import_path import leave_current_folder, use_utf8

use_utf8()  # before anything else is imported, so that to start again costs little
leave_current_folder()

from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

from distil_tl.utils.version import __version__  # noqa: E402

if TYPE_CHECKING:
    from distil_tl.inference import TrainedModel

__all__ = ["__version__", "load"]


def load(run_dir: str | Path, checkpoint: str = "best", *, allow_own: bool = False) -> TrainedModel:
    """A trained model, ready to use: `model, transform, classes = distil_tl.load(RUN_DIR)`.

    The model is on the CPU in evaluation mode and gives logits [N, C] for `transform(image)[None]`, where `image`
    is a path, a PIL image, a uint8 tensor [3, H, W] or a uint8 array [H, W, 3]. What is returned also has a
    `temperature` (1 if none was fitted): `(logits / temperature).softmax(1)` are calibrated probabilities.

    Args:
        run_dir: what `distil_tl.train` wrote.
        checkpoint: `best`, `last`, or the name of a folder in RUN_DIR/checkpoints.
        allow_own: import the code of a run with `model.name=MODULE:FUNCTION`. Only for a run whose author you trust.

    Raises:
        distil_tl.utils.errors.UserError: there is no such run or checkpoint, it is damaged, or it names code.
    """
    from distil_tl.inference import load_trained  # torch takes seconds to import, and the version needs none of it

    return load_trained(run_dir, checkpoint, allow_own=allow_own)
