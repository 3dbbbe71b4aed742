"""The weights that a stage keeps besides those that it trains: their average, and the ends of an interpolation."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from distil_tl.training.averaging import WeightAverage, trained_tensors
from distil_tl.training.config import StageConfig
from distil_tl.training.interpolation import Interpolation


@dataclass
class StageWeights:
    """The weights that a stage keeps, none by default.

    Attributes:
        average: over the steps, which is evaluated instead of the raw weights.
        interpolation: the first weights of the stage, and those of its last or best epoch.
    """

    average: WeightAverage | None = None
    interpolation: Interpolation | None = None

    @classmethod
    def of(cls, config: StageConfig, module: nn.Module) -> StageWeights:
        """Those of a stage that begins, and is applied to `module`."""
        trained = trained_tensors(module)
        return cls(
            None if config.ema is None else WeightAverage(config.ema, trained),
            Interpolation(trained) if config.wise_ft else None,
        )

    def after_step(self, step: int) -> None:
        """Take the weights after a step of the stage, from 0, into the average."""
        if self.average is not None:
            self.average.update(step)

    def evaluated(self) -> contextlib.AbstractContextManager[None]:
        """The model holds the weights that are evaluated in the block."""
        return contextlib.nullcontext() if self.average is None else self.average.in_model()

    def adopt_average(self) -> None:
        """Leave the average in the model for good: nothing is trained any more."""
        if self.average is not None:
            self.average.adopt()
            self.average = None

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """The state dict of the model with the weights that are evaluated."""
        return module.state_dict() if self.average is None else self.average.state_dict(module)

    def offer(self, figures: Mapping[str, Any] | None, metric: str, *, preferred: bool) -> None:
        """Keep the weights that were evaluated for the interpolation, if they are the best so far, or preferred."""
        if self.interpolation is not None and figures is not None:
            with self.evaluated():
                self.interpolation.offer(figures, metric, preferred=preferred)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides the weights that are evaluated."""
        raw = {} if self.average is None else {"raw": self.average.state()}
        return raw if self.interpolation is None else {**raw, "interpolation": self.interpolation.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore from a checkpoint whose weights are in the model."""
        if self.average is not None and "raw" in state:
            self.average.load_state(state["raw"])
        if self.interpolation is not None:
            self.interpolation.load_state(state["interpolation"])
