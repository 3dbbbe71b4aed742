"""The kinds of heads that a stage can fit, and what does not go with that; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

# Heads whose fit has no loss of logits that could be adjusted.
UNADJUSTED = ("ridge", "lda", "prototypes", "cosine", "knn")
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
