"""Linear heads in closed form: ridge regression, linear discriminant analysis and class prototypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distil_tl.training.heads.fitted import GAP, SCALES, Fitted, Settings, below_others, stacked
from distil_tl.training.heads.problem import Problem
from distil_tl.training.heads.rows import Group
from distil_tl.utils.errors import NonFiniteError

# Penalties of the squared weights, relative to the mean squared error.
RIDGE_PENALTIES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.5, 0.3, 0.1, 0.03, 0.01)
SHRINKAGES = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.03, 0.01)
NO_SPREAD = 1e-9  # share of all squares below which the spread within classes is rounding


def fit_ridge(problem: Problem, penalties: Sequence[float] = RIDGE_PENALTIES) -> Fitted:
    """Ridge regression of each class against the rest, with targets 0 and 1."""
    moments = problem.moments
    # Sums of (x - mean) (y - its mean)^T: as those of y alone, with the mean taken from the features.
    cross = (moments.class_sum - moments.class_weight[:, None] * moments.mean) / moments.weight
    solved = _solve_path(problem, None, [(1.0, penalty) for penalty in penalties], cross)
    layers = [(weight, moments.class_weight / moments.weight - weight @ moments.mean) for weight in solved]
    return Fitted.of_linear([{"penalty": penalty} for penalty in penalties], SCALES, *stacked(layers))


def fit_lda(problem: Problem, shrinkages: Sequence[float] = SHRINKAGES) -> Fitted:
    """Linear discriminant analysis: one covariance within the classes, shrunk towards a multiple of the identity."""
    moments, width = problem.moments, problem.width
    means = moments.class_mean
    trace = _trace_within(problem) / width
    pairs = [(1 - shrinkage, shrinkage * trace) for shrinkage in shrinkages]
    layers = []
    for weight in _solve_path(problem, means, pairs, means):
        bias = moments.class_weight.log() - moments.weight.log() - (weight * means).sum(dim=1) / 2
        layers.append(_below_others(weight, bias, moments.class_weight))
    return Fitted.of_linear([{"shrinkage": shrinkage} for shrinkage in shrinkages], SCALES, *stacked(layers))


def fit_prototypes(problem: Problem) -> Fitted:
    """The nearest class mean, by the squared distance divided by the number of features."""
    moments, width = problem.moments, problem.width
    means = moments.class_mean
    layer = _below_others(means / width, -means.square().sum(dim=1) / 2 / width, moments.class_weight)
    settings: list[Settings] = [{}]
    return Fitted.of_linear(settings, SCALES, *stacked([layer]))


def _below_others(weight: Tensor, bias: Tensor, class_weight: Tensor) -> tuple[Tensor, Tensor]:
    """A layer [C, D], [C] in which classes without images are as in `below_others`."""
    columns, lower = below_others(torch.cat([weight, bias[:, None]], dim=1), class_weight, GAP)
    return columns[:, :-1], columns[:, -1] + lower


def _trace_within(problem: Problem) -> float:
    """The trace of the covariance within the classes; the width, as of an identity, if features don't vary there."""
    moments = problem.moments
    squares = problem.rows.total((1,), lambda part: (part.features.double().square().sum(1) * part.weights).sum()[None])
    between = (moments.class_weight * moments.class_mean.square().sum(dim=1)).sum()
    within = problem.group.share(squares[0] - between)
    return float(within / moments.weight) if within > NO_SPREAD * squares[0] else float(problem.width)


def _solve_path(
    problem: Problem, centres: Tensor | None, pairs: Sequence[tuple[float, float]], right: Tensor
) -> list[Tensor]:
    """`right (a S + b I)^-1` for each (a, b), [C, D] each, with the covariance S of the rows.

    A factorisation for each pair costs less than one eigendecomposition, as long as there are about ten. With fewer
    images than features the matrix of inner products of the images is factorised instead (Woodbury).

    Args:
        centres: means of the classes, [C, D], around which the covariance is taken; None: around the mean of all.
        right: [C, D].
    """
    if problem.count >= problem.width:
        covariance = problem.second_moment - _of_centres(problem, centres)
        identity = torch.eye(problem.width, dtype=torch.float64, device=right.device)
        return [problem.group.share(_solve(problem.group, a * covariance + b * identity, right.T).T) for a, b in pairs]
    rows = problem.everything
    centred = rows.features.double() - (problem.moments.mean if centres is None else centres[rows.targets])
    centred *= (rows.weights / problem.moments.weight).sqrt()[:, None]
    inner, projected = centred @ centred.T, centred @ right.T
    identity = torch.eye(len(inner), dtype=torch.float64, device=right.device)
    found = []
    for a, b in pairs:
        inside = _solve(problem.group, a * inner + b * identity, projected)
        found.append(problem.group.share((right - a * inside.T @ centred) / b))
    return found


def _of_centres(problem: Problem, centres: Tensor | None) -> Tensor:
    """The part of the second moment that is of the centres, [D, D]."""
    moments = problem.moments
    if centres is None:
        return torch.outer(moments.mean, moments.mean)
    return (centres * (moments.class_weight / moments.weight)[:, None]).T @ centres


def _solve(group: Group, matrix: Tensor, right: Tensor) -> Tensor:
    """The solution with a symmetric, positive definite matrix. A collective.

    Raises:
        NonFiniteError: rank 0 can't factorise it, as it is not finite. On all ranks alike.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(group.share(failed)):
        raise NonFiniteError("the covariance of the features is not finite: their numbers are too large for a fit")
    return torch.cholesky_solve(right, factor)
