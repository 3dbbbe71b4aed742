"""Fitting a kind of head over its path of settings, and choosing one by its figures on val."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distil_tl.data.feature_cache import FeatureSubset
from distil_tl.distributed.preemption import Agreement
from distil_tl.distributed.process_group import DistInfo
from distil_tl.training.batched_heads import count_predictions
from distil_tl.training.config import rank_by
from distil_tl.training.head_search import HeadSearch
from distil_tl.training.heads.closed_form import fit_lda, fit_prototypes, fit_ridge
from distil_tl.training.heads.comparison import fit_cosine, fit_knn, fit_mlp
from distil_tl.training.heads.fitted import Fitted, Settings
from distil_tl.training.heads.logistic import fit_logistic, path_to
from distil_tl.training.heads.problem import Problem, open_problem
from distil_tl.training.heads.rows import Group, Part, Rows, Weigh
from distil_tl.training.metrics import ClassificationMetrics, counts
from distil_tl.training.spread import Spread, width
from distil_tl.utils.errors import NonFiniteError


def fit(kind: str, problem: Problem, settings: Settings | None = None) -> Fitted:
    """The candidates of a kind of head. A collective.

    Args:
        settings: of the single candidate that is wanted; None: all of the path.
    """
    wanted = settings or {}
    if kind == "ridge":
        return fit_ridge(problem, [wanted["penalty"]]) if wanted else fit_ridge(problem)
    if kind == "lda":
        return fit_lda(problem, [wanted["shrinkage"]]) if wanted else fit_lda(problem)
    if kind == "logistic":
        return fit_logistic(problem, path_to(wanted["penalty"]), last=1) if wanted else fit_logistic(problem)
    if kind == "knn":
        return fit_knn(problem, (int(wanted["k"]),)) if wanted else fit_knn(problem)
    if kind == "mlp":
        return fit_mlp(problem, wanted["weight_decay"]) if wanted else fit_mlp(problem)
    return fit_prototypes(problem) if kind == "prototypes" else fit_cosine(problem)


@dataclass(frozen=True)
class Choice:
    """The fitted candidates of a kind of head, with the chosen one.

    Attributes:
        heads: settings, scale and figures on val of each candidate; figures are None where they are not finite.
        number: of the chosen one.
    """

    fitted: Fitted
    heads: list[dict[str, Any]]
    number: int

    @property
    def chosen(self) -> dict[str, Any]:
        return self.heads[self.number]

    def to_json(self) -> dict[str, Any]:
        """As that of a head search: the chosen one, and all of them in `heads`."""
        heads = [{key: value for key, value in head.items() if key != "spread"} for head in self.heads]
        return {**self.chosen, "heads": heads}


@torch.no_grad()
def choose(
    kind: str, problem: Problem, val: Rows, metric: str, settings: Settings | None = None, *, spread: bool = False
) -> Choice:
    """Fit a kind of head, and choose by the metric on val; of equal ones the most regularised. A collective.

    Args:
        val: with the features standardised as those of `problem`.
        settings: with `scale`, of the single candidate that is wanted; None: all of the path.
        spread: also counts what intervals need.

    Raises:
        NonFiniteError: no candidate has a finite loss.
        AllRanksStopError: on all ranks alike.
    """
    wanted = None if settings is None else {key: value for key, value in settings.items() if key != "scale"}
    fitted = fit(kind, problem, wanted)
    scales = fitted.scales if settings is None else (settings["scale"],)
    heads = _figures(fitted, scales, val, problem.classes, metric, spread=spread)
    finite = [i for i, head in enumerate(heads) if head["loss"] is not None]
    if not finite:
        raise NonFiniteError(f"no {kind} head has a finite loss: the features of this network may not be finite")
    return Choice(fitted, heads, min(finite, key=lambda i: rank_by(metric, heads[i])))


def _figures(
    fitted: Fitted, scales: tuple[float, ...], val: Rows, classes: int, metric: str, *, spread: bool
) -> list[dict[str, Any]]:
    """Settings, the scale with the lowest loss, and the figures of each candidate on val."""
    candidates, size = len(fitted.settings), width(classes) if spread else counts(classes)

    def of(part: Part) -> Tensor:
        logits = fitted.logits(part.features)
        counted = count_predictions(logits, part.targets, part.weights > 0, spread=spread)
        own = part.targets[:, None].expand(logits.shape[:2])
        losses = [F.cross_entropy(scale * logits.transpose(1, 2), own, reduction="none").double() for scale in scales]
        each = torch.stack([torch.stack([loss, loss**2]).sum(dim=1) for loss in losses], dim=2)  # [2, K, scales]
        return torch.cat([counted, *each], dim=1)

    sums = val.total((candidates, size + 2 * len(scales)), of).cpu()
    found = []
    for settings, row in zip(fitted.settings, sums, strict=True):
        losses, squares = row[size:].nan_to_num(math.inf, posinf=math.inf).view(2, len(scales))
        best = int(losses.argmin())
        row[0] = losses[best]
        figures = ClassificationMetrics.of(row[: counts(classes)], classes).compute()
        valid = math.isfinite(figures["loss"])
        kept: dict[str, Any] = {
            name: figures[name] if valid else None for name in dict.fromkeys(("top1", "loss", metric))
        }
        if spread:
            row[counts(classes)] = squares[best]
            kept["spread"] = Spread.of(row[:size], classes)
        found.append({**settings, "scale": scales[best], **kept})
    return found


def open_fit(info: DistInfo, search: HeadSearch, agreement: Agreement) -> tuple[Problem, Rows]:
    """The problem of a search: train, and val as it is standardised. Of several views the first is used. A collective.

    Raises:
        UserError, NonFiniteError, AllRanksStopError: on all ranks alike.
    """
    group, loss, classes = Group(info, agreement), search.loss, search.head.out_features
    offsets = None if loss.offsets is None else loss.offsets.double()
    raw = Rows(group, search.features.train, _weigh(search))
    problem = open_problem(raw, classes, loss.smoothing, offsets, search.stage.seed)
    return problem, Rows(group, search.features.val).standardized(problem.standard)


def _weigh(search: HeadSearch) -> Weigh | None:
    """The weights that the loss gives images. A sampler that draws all classes equally often is weights, too."""
    loss, train = search.loss, search.features.train
    if loss.weights is None and loss.image_weights is None and not search.sampler.is_balanced:
        return None
    of_classes = torch.ones(search.head.out_features, dtype=torch.float64)
    if search.sampler.is_balanced:
        targets = train.targets[train.images] if isinstance(train, FeatureSubset) else train.targets
        counts = torch.from_numpy(np.bincount(targets, minlength=len(of_classes)))
        of_classes = len(targets) / (counts.count_nonzero() * counts.clamp(min=1).double())

    def weigh(targets: Tensor, positions: Tensor) -> Tensor:
        ones = torch.ones(len(targets), device=targets.device)
        return loss.weighted(ones, targets, positions).double() * of_classes.to(targets.device)[targets]

    return weigh
