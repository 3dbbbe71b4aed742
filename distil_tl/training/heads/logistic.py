"""Logistic regression by L-BFGS (Liu and Nocedal, 1989), over a path of penalties."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distil_tl.training.heads.fitted import Fitted, stacked
from distil_tl.training.heads.problem import Problem
from distil_tl.training.heads.rows import Part

# Half of the penalty of the squared weights, relative to the mean loss. 1 / (n C) in scikit-learn.
PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
ALWAYS = 1e-3  # tried with any number of images; smaller ones down to one image's share of the loss
HISTORY, ITERATIONS = 10, 60
TOLERANCE = 5e-4  # of the largest element of the gradient, relative to that of a network without weights
SUFFICIENT = 1e-4  # share of the expected decrease that a step must reach (Armijo)
MAX_HALVINGS = 12
SMALLEST_GAIN = 1e-8  # relative; float32 products do not resolve a smaller one

Objective = Callable[[Tensor], "tuple[Tensor, Tensor]"]  # a point to the value and its gradient


def fit_logistic(problem: Problem, penalties: Sequence[float] | None = None, last: int = 0) -> Fitted:
    """Multinomial logistic regression for each penalty, each starting from the solution of the one before.

    Args:
        penalties: None: those of `path_of`.
        last: how many of the penalties are wanted, from the last on; 0: all.
    """
    penalties = path_of(problem.count) if penalties is None else penalties
    point = torch.zeros(problem.classes * (problem.width + 1), dtype=torch.float64, device=problem.counts.device)
    _, gradient = _objective(problem, 0.0, point)
    tolerance, layers = TOLERANCE * float(gradient.abs().max()), []
    for penalty in penalties:
        point = minimize(functools.partial(_objective, problem, penalty), point, problem.group.share, tolerance)
        weight = point.view(problem.classes, -1)
        layers.append((weight[:, :-1].clone(), weight[:, -1].clone()))
    wanted = [{"penalty": penalty} for penalty in penalties][-last:]
    return Fitted.of_linear(wanted, (1.0,), *stacked(layers[-last:]))


def path_of(images: int) -> list[float]:
    """The penalties that are tried: the more training images, the smaller is the best one."""
    return [each for each in PENALTIES if each >= min(ALWAYS, 1 / images)]


def path_to(penalty: float) -> list[float]:
    """The path that ends with a penalty, so that its solution is the same as on the whole path."""
    return [each for each in PENALTIES if each > penalty] + [penalty]


def _objective(problem: Problem, penalty: float, point: Tensor) -> tuple[Tensor, Tensor]:
    """The mean weighted loss with half the penalty of the squared weights, and its gradient. A collective."""
    point = problem.group.share(point)
    weight = point.view(problem.classes, -1)[:, :-1]
    layer, bias = weight.float().T.contiguous(), point.view(problem.classes, -1)[:, -1]
    smoothing, classes = problem.smoothing, problem.classes

    def of(part: Part) -> Tensor:
        logits = (part.features @ layer).double() + bias
        if problem.offsets is not None:
            logits = logits + problem.offsets
        losses = F.cross_entropy(logits, part.targets, label_smoothing=smoothing, reduction="none")
        slopes = logits.softmax(dim=1) - part.one_hot(classes) * (1 - smoothing) - smoothing / classes
        slopes *= part.weights[:, None]
        of_weight = slopes.float().T @ part.features
        of_bias = slopes.sum(dim=0)[:, None]
        gradient = torch.cat([of_weight.double(), of_bias], dim=1).flatten()
        return torch.cat([(losses * part.weights).sum()[None], gradient])

    sums = problem.rows.total((1 + len(point),), of) / problem.moments.weight
    sums[0] += penalty / 2 * weight.square().sum()
    sums[1:].view(classes, -1)[:, :-1] += penalty * weight
    sums = problem.group.share(sums)
    return sums[0], sums[1:]


def minimize(objective: Objective, point: Tensor, share: Callable[[Tensor], Tensor], tolerance: float) -> Tensor:
    """The minimum of a smooth convex function, found from `point`.

    All decisions are by values that are equal on all ranks, so that they call `objective` equally often.

    Args:
        objective: gives the same on all ranks.
        share: the values of rank 0, on all ranks.
        tolerance: of the largest element of the gradient.
    """
    value, gradient = objective(point)
    pairs: collections.deque[tuple[Tensor, Tensor]] = collections.deque(maxlen=HISTORY)
    for _ in range(ITERATIONS):
        if float(gradient.abs().max()) <= tolerance or not bool(value.isfinite()):
            break
        direction = _direction(gradient, pairs)
        shared = share(torch.cat([direction, torch.stack([gradient @ direction, gradient.norm()])]))
        direction, slope = shared[:-2], float(shared[-2])
        step = 1.0 if len(pairs) > 0 else min(1.0, 1.0 / float(shared[-1]))
        for _ in range(MAX_HALVINGS):
            trial = point + step * direction
            new_value, new_gradient = objective(trial)
            if float(new_value) <= float(value) + SUFFICIENT * step * slope:
                break
            step /= 2
        else:
            break  # the gain is below what float32 resolves
        moved, change = trial - point, new_gradient - gradient
        if float(moved @ change) > 1e-12 * float(change @ change):
            pairs.append((moved, change))
        gain = float(value) - float(new_value)
        point, value, gradient = trial, new_value, new_gradient
        if gain <= SMALLEST_GAIN * max(1e-3, abs(float(value))):
            break
    return share(point)


def _direction(gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The step that the last pairs of movements and changes of the gradient suggest: two loops."""
    direction, factors = -gradient, []
    for moved, change in reversed(pairs):
        rho = 1 / (change @ moved)
        alpha = rho * (moved @ direction)
        direction = direction - alpha * change
        factors.append((rho, alpha))
    if pairs:
        moved, change = pairs[-1]
        direction = direction * ((moved @ change) / (change @ change))
    for (moved, change), (rho, alpha) in zip(pairs, reversed(factors), strict=True):
        direction = direction + (alpha - rho * (change @ direction)) * moved
    return direction
