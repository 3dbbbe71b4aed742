"""A stage that fits its head to features, in place of epochs of steps."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from distil_tl.data.source import ImageSource
from distil_tl.distributed.preemption import Agreement
from distil_tl.distributed.process_group import DistInfo
from distil_tl.report.text import settings_of
from distil_tl.rundir.state import StageRecord
from distil_tl.training.batched_heads import count_predictions
from distil_tl.training.head_search import prepare_search
from distil_tl.training.heads.rows import Part
from distil_tl.training.heads.search import choose, open_fit
from distil_tl.training.metrics import counts
from distil_tl.training.stage import Stage
from distil_tl.training.stage_setup import StageSetup
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import logger


@torch.no_grad()
def fit_head(
    info: DistInfo, stage: Stage, setup: StageSetup, source: ImageSource, record: StageRecord, agreement: Agreement
) -> Tensor:
    """Fit the head of a stage, and put it into the model. A collective.

    What it was before does not matter, so a resumed run fits the same one.

    Args:
        record: of the stage; the choice is noted in it.

    Returns:
        The counts of its predictions on train, as in `ClassificationMetrics.of`, on all ranks alike.

    Raises:
        UserError: the stage trains something other than a head that can be fitted, or memory does not suffice.
        NonFiniteError: no head has a finite loss.
        AllRanksStopError: on all ranks alike. Nothing is changed.
    """
    began, kind = time.monotonic(), stage.config.head
    search = prepare_search(info, stage, setup, source)
    key = f"stages.{stage.name}.head"
    if isinstance(search.head, nn.Linear) and search.head.bias is None:
        raise UserError(f"{key}={kind}: the head of this model has no bias, which a fit needs; use {key}=linear")
    problem, val = open_fit(info, search, agreement)
    choice = choose(kind, problem, val, stage.metric)
    chosen, number = choice.chosen, choice.number

    def of(part: Part) -> Tensor:
        logits = choice.fitted.logits(part.features)[:, [number]] * chosen["scale"]
        return count_predictions(logits, part.targets, part.weights.isfinite())[0]

    predicted = problem.rows.total((counts(problem.classes),), of)
    found = choice.fitted.tensors(number, chosen["scale"], problem.standard)
    for name, tensor in search.head.state_dict().items():
        tensor.copy_(problem.group.share(found[name].float()))
    record.fit = {"head": kind, **choice.to_json(), "seconds": time.monotonic() - began}
    record.train_images += problem.count
    record.seconds += record.fit["seconds"]
    record.train_seconds += record.fit["seconds"]
    record.epoch_seconds += record.fit["seconds"]
    logger.info(
        "\nstage %s: %s head of %d images, %d tried in %.1f s; best is %s, %s %.4f on val", stage.name, kind,
        problem.count, len(choice.heads), record.fit["seconds"], settings_of(chosen) or "the only one", stage.metric,
        chosen[stage.metric],
    )  # fmt: skip
    return predicted
