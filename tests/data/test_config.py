"""Configuration of the data."""

from __future__ import annotations

import subprocess
import sys

from distil_tl.data.config import DataConfig


def test_the_configuration_imports_no_torch_and_no_numpy() -> None:
    code = "import sys, distil_tl.data.config; print({'torch', 'torchvision', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_all_problems_are_listed() -> None:
    config = DataConfig(
        global_batch_size=0, max_local_batch_size=0, image_size=7, workers=-1, augment="much", on_bad_image="ignore"
    )
    assert [problem.split()[0] for problem in config.problems()] == [
        "data.global_batch_size", "data.max_local_batch_size", "data.image_size", "data.workers", "data.augment",
        "data.on_bad_image",
    ]  # fmt: skip
    assert DataConfig().problems() == []
