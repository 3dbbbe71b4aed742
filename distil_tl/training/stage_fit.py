"""Whether the stages of a configuration fit its model, before anything takes long."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distil_tl.models.config import ModelConfig
from distil_tl.models.names import LINEAR
from distil_tl.models.transfer import build
from distil_tl.training.config import StageConfig
from distil_tl.training.heads.config import network_head
from distil_tl.training.stage import check_stages
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import logger


def refuse_unfit_stages(config: ModelConfig, stages: Mapping[str, StageConfig], image_size: int | None) -> None:
    """`check_stages` before the images are looked at and weights downloaded, where a stage may not fit the model.

    The model is built without memory for its parameters. Where that does not work, `check_stages` finds the problem.

    Raises:
        UserError: as `check_stages`, or as `models.transfer.build`.
    """
    head = network_head(stages)
    plain = all(stage.unfreeze in ("head", "all") and stage.image_size is None for stage in stages.values())
    if plain and head == LINEAR:
        return
    try:
        with torch.device("meta"):
            model = build(config, 2, image_size=image_size, seed=0, pretrained=False, head_kind=head)
        check_stages(model, stages)
    except UserError:
        raise
    except Exception as error:
        logger.debug("the model can't be built without memory: %s", error)
