"""LogME (You et al., 2021): how well a linear model on features explains the labels, without training one.

The score is the logarithm of the evidence of a Bayesian linear regression, at the variances that maximise it, for each
class against the others, divided by the number of images, and averaged over the classes. Higher is better.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
RATIOS = 64  # of the variances of noise and weights that are tried at first
ROUNDS = 12  # of a closer search around the best one
CLASSES = 32  # at once
_LEAST, _MOST = 1e-12, 1e6  # relative to the largest squared singular value


def logme(features: npt.NDArray[np.generic], targets: npt.NDArray[np.integer]) -> float:
    """The score of features [N, K] of images with these targets [N], in float64 and in a fixed order.

    Classes without an image do not count. For one class y is whether an image is of it, with noise of variance 1 / beta
    and weights of variance 1 / alpha. For a given ratio alpha / beta, the beta of the highest evidence is known.
    """
    squares, projections = _spectrum(np.asarray(features, dtype=np.float64), targets)
    sizes = np.unique(targets, return_counts=True)[1].astype(np.float64)  # also the squared length of y
    found = []
    for first in range(0, len(sizes), CLASSES):  # bounds the memory
        part = slice(first, first + CLASSES)
        found.append(_highest(squares, projections[:, part], sizes[part], len(targets)))
    return float(np.concatenate(found).mean() / len(targets))


def _highest(squares: Array, projections: Array, sizes: Array, n: int) -> Array:
    """The logarithm of the highest evidence of some classes [C]: of a row of ratios, then closer and closer."""
    outside = np.maximum(sizes - projections.sum(axis=0), 0.0)  # what no weights explain
    largest = float(squares.max(initial=0.0)) or 1.0  # of features that are all 0
    low, high = math.log(_LEAST * largest), math.log(_MOST * largest)
    step = (high - low) / (RATIOS - 1)
    ratios = np.repeat((low + step * np.arange(RATIOS))[:, None], len(sizes), axis=1)
    for _ in range(ROUNDS):
        values = _evidence(ratios, squares, projections, outside, n)
        middle = ratios[values.argmax(axis=0), np.arange(len(sizes))]
        step /= 3.0
        ratios = middle + step * np.arange(-3, 4)[:, None]
    highest: Array = values.max(axis=0)
    return highest


def _spectrum(features: Array, targets: npt.NDArray[np.integer]) -> tuple[Array, Array]:
    """The squared singular values of the features [R], and for each class the squared projections of y [R, C]."""
    n, width = features.shape
    labels = (targets[:, None] == np.unique(targets)).astype(np.float64)
    if n <= width:
        squares, left = np.linalg.eigh(features @ features.T)
        return np.maximum(squares, 0.0), (left.T @ labels) ** 2
    squares, right = np.linalg.eigh(features.T @ features)
    kept = squares > n * np.finfo(np.float64).eps * max(float(squares[-1]), 0.0)
    squares, right = squares[kept], right[:, kept]
    return squares, (right.T @ (features.T @ labels)) ** 2 / squares[:, None]


def _evidence(ratios: Array, squares: Array, projections: Array, outside: Array, n: int) -> Array:
    """The logarithm of the evidence [G, C] at ratios alpha / beta [G, C], given as logarithms."""
    stretched = 1.0 + squares[:, None, None] * np.exp(-ratios)  # eigenvalues of the covariance of y, times beta
    errors = (projections[:, None, :] / stretched).sum(axis=0) + outside
    errors = np.maximum(errors, np.finfo(np.float64).tiny)
    spread = np.log(stretched).sum(axis=0)
    values: Array = -0.5 * (n * np.log(2.0 * math.pi * errors / n) + n + spread)
    return values
