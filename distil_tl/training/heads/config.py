"""The kinds of heads that a stage can fit, and what does not go with that; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

FITTED_HEADS = ("logistic", "ridge", "lda", "prototypes")  # linear layers
HEADS = ("linear", *FITTED_HEADS)


def head_problems(key: str, head: str, others: Sequence[str]) -> Iterator[str]:
    """Messages for a kind of head that does not exist, or that does not go with other settings of its stage.

    Args:
        key: of the stage.
        others: keys that are set and concern the steps of an optimizer.
    """
    if head not in HEADS:
        yield f"{key}.head is {head!r}; choose one of {', '.join(HEADS)}"
    elif head != "linear" and others:
        yield (
            f"{key}.head={head} is fitted without steps of an optimizer, and its penalty is chosen on val: remove "
            f"{', '.join(f'{key}.{other}' for other in others)}, or use {key}.head=linear"
        )
