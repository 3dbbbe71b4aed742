"""Tests that run on the CPU and, where there is one, on a GPU; a stage of training on either."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distil_tl.data.bad_images import BadImages
from distil_tl.data.config import DataConfig
from distil_tl.data.loader import BatchPlan
from distil_tl.data.scan import scan
from distil_tl.data.source import ImageSource
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.preemption import Agreement, Request
from distil_tl.distributed.process_group import DistInfo
from distil_tl.models.transfer import TransferModel
from distil_tl.rundir.state import StageRecord
from distil_tl.training.config import OptimConfig, StageConfig
from distil_tl.training.stage import Stage, apply_stage
from distil_tl.training.stage_setup import set_up_stage
from distil_tl.training.stage_start import begin_stage
from distil_tl.training.step import StageTraining

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(*values: Any) -> Any:
    """Parameters of a test that needs a GPU."""
    return pytest.param(*values, marks=NEEDS_GPU)


class _NoReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """On a CPU: an error for each operation whose result the host must know, as for a GPU it would wait there."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pid = os.getpid()  # loader processes are forked with this mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if os.getpid() == self.pid and func.overloadpacket.__name__ in self.READS:
            raise RuntimeError(f"called a synchronizing operation: {func}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """An error where the host waits for the device."""
    if device == "cpu":
        with _NoReads():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class StageOnDevice:
    """A stage of training on a device, with images of a folder in batches of eight, as `distil_tl.train` sets it up."""

    def __init__(
        self,
        model: TransferModel,
        folder: Path,
        device: str,
        *,
        unfreeze: Any = 2,
        image_size: int = 64,
        precision: str = "fp32",
        epochs: int = 1,
    ) -> None:
        self.info = DistInfo(Launch(), torch.device(device, 0), 60.0)
        self.model = model
        train = scan(folder / "train")
        splits = {"train": train, "val": scan(folder / "val", classes=train.classes)}
        data = DataConfig(root=str(folder), global_batch_size=8, image_size=image_size, workers=0, augment="none")
        source = ImageSource(self.info, data, splits, model.preprocess, BadImages("error"))
        stage = Stage(
            "full", StageConfig(unfreeze=unfreeze, epochs=epochs, lr=1e-3, features="off"), OptimConfig(name="sgd"),
            image_size, "none", seed=0, precision=precision, compile="none",
        )  # fmt: skip
        apply_stage(model, stage.config)
        model.module.to(device)
        self.record = StageRecord()
        agreement = Agreement(self.info, lambda: Request.CONTINUE)
        setup = set_up_stage(self.info, stage, model, source, self.record, 8, agreement)
        self.training: StageTraining = begin_stage(
            self.info, stage, model, setup, source, BatchPlan(8, 1), self.record, log_every=100
        )
        self.training.batches.start(0, 0)
        self.at = -1

    def step(self) -> Tensor:
        """One optimizer step. Returns its loss."""
        from distil_tl.train import accumulate_gradients
        from distil_tl.training.step import optimizer_step

        self.at += 1
        loss = accumulate_gradients(self.info, self.training, self.at)
        optimizer_step(self.training, loss, self.at)
        return loss

    def spoil(self, step: int) -> None:
        """Make the logits of a step NaN."""

        def hook(module: Any, args: Any, logits: Tensor) -> Tensor:
            return logits * float("nan") if self.at == step else logits

        self.training.inner.register_forward_hook(hook)

    def weights(self) -> list[Tensor]:
        return [parameter.detach().cpu().clone() for parameter in self.model.module.parameters()]


def without_dropout(model: TransferModel) -> TransferModel:
    """The model with nothing random in it: devices draw different numbers."""
    for module in model.module.modules():
        if "dropout" in type(module).__name__.lower() or "stochasticdepth" in type(module).__name__.lower():
            module.p = 0.0  # type: ignore[assignment]
    return model


@contextlib.contextmanager
def limited_memory(mebibytes: int) -> Iterator[None]:
    """At most so much more GPU memory for torch in this process than it has now."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (mebibytes << 20)) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def watched(original: Callable[..., Any], *, before: Callable[[], Any]) -> Callable[..., Any]:
    """`original`, with a call of `before` first."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before()
        return original(*args, **kwargs)

    return call
