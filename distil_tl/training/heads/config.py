"""The kinds of heads that a stage can fit, and what does not go with that; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from distil_tl.models.names import BUILT_HEADS, LINEAR
from distil_tl.utils.errors import did_you_mean

if TYPE_CHECKING:
    from distil_tl.training.config import StageConfig

# Heads whose fit has no loss of logits that could be adjusted.
UNADJUSTED = ("ridge", "lda", "prototypes", "cosine", "knn")
LINEAR_FITS = ("logistic", "ridge", "lda", "prototypes")  # linear layers
FITTED_HEADS = (*LINEAR_FITS, *BUILT_HEADS)
HEADS = (LINEAR, *FITTED_HEADS)


def head_problems(key: str, head: str, others: Sequence[str]) -> Iterator[str]:
    """Messages for a kind of head that does not exist, or that does not go with other settings of its stage.

    Args:
        key: of the stage.
        others: keys that are set and concern the steps of an optimizer.
    """
    if head not in HEADS:
        only = " (knn is only compared, by distil-tl select)" if head == "knn" else ""
        yield f"{key}.head is {head!r}; choose one of {', '.join(HEADS)}{only}{did_you_mean(head, HEADS)}"
    elif head != LINEAR and others:
        yield (
            f"{key}.head={head} is fitted without steps of an optimizer, and its penalty is chosen on val: remove "
            f"{', '.join(f'{key}.{other}' for other in others)}, or use {key}.head=linear"
        )


def network_head(stages: Mapping[str, StageConfig]) -> str:
    """The kind of head that the network of a run is built with: what its first stage fits, else `linear`.

    Stages of 0 epochs are skipped, so they do not count.
    """
    first = next((stage.head for stage in stages.values() if stage.epochs != 0), LINEAR)
    return first if first in BUILT_HEADS else LINEAR


def network_head_problems(stages: Mapping[str, StageConfig]) -> Iterator[str]:
    """Messages for stages that need another kind of head than the network has."""
    kind = network_head(stages)
    for name, stage in stages.items():
        key = f"stages.{name}"
        if stage.epochs == 0:
            continue
        if stage.head in BUILT_HEADS and stage.head != kind:
            yield (
                f"{key}.head={stage.head}: a network has one kind of head, that of its first stage, which is {kind}: "
                f"let the first stage fit it, or use {key}.head=linear"
            )
        elif kind != LINEAR and stage.head in LINEAR_FITS:
            yield (
                f"{key}.head={stage.head} fits a linear layer, and the head is the {kind} head of the first stage: use "
                f"{key}.head={kind} to fit it again, or {key}.head=linear to train it"
            )
        elif kind != LINEAR and stage.search.wanted and not stage.fits_head:  # of which StageConfig complains itself
            yield f"{key}.search is for linear heads, and the first stage fits a {kind} head: remove {key}.search"


def balance_problem(key: str, heads: Iterable[str], balance: str) -> str | None:
    """A message for heads on which `data.balance` has no effect; None if there is none.

    Args:
        key: of these heads.
    """
    found = [head for head in heads if head in UNADJUSTED]
    if balance != "logit_adjust" or not found:
        return None
    return (
        f"data.balance=logit_adjust has no effect on {key}={','.join(found)}: choose other heads, such as logistic, or "
        f"data.balance=weights"
    )
