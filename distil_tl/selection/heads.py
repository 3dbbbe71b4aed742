"""The search of one kind of head after another on the same features."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distil_tl.distributed.preemption import Agreement
from distil_tl.distributed.process_group import DistInfo
from distil_tl.selection.cells import SHARES
from distil_tl.training.config import SearchConfig
from distil_tl.training.head_search import HeadSearch, search_heads
from distil_tl.training.heads.problem import Problem
from distil_tl.training.heads.rows import Rows
from distil_tl.training.heads.search import choose, open_fit

FIGURES = ("heads", "spread", "top1", "loss")  # in the result of a head, beside its settings


@dataclass
class HeadSearches:
    """Heads on the features of `search`, of which all but `linear` share what they compute."""

    info: DistInfo
    search: HeadSearch
    agreement: Agreement

    def result(self, kind: str, chosen: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The settings and figures of the best head of a kind, and those of all in `heads`. A collective.

        With a metric that is no share of images, also a `Spread` of the best one.

        Args:
            chosen: a result, whose settings alone are tried; None: all.

        Raises:
            UserError: memory does not suffice, or no image of train can be used.
            NonFiniteError: no head has a finite loss.
            AllRanksStopError: on all ranks alike.
        """
        metric = self.search.stage.metric
        spread = metric not in SHARES
        if kind == "linear":
            search = replace(self.search, spread=spread)
            if chosen is not None:
                search = with_settings(search, chosen["lr"], chosen["weight_decay"])
            return search_heads(self.info, search, self.agreement)
        settings = None
        if chosen is not None:
            settings = {key: value for key, value in chosen.items() if key not in (*FIGURES, metric)}
        problem, val = self.opened
        return choose(kind, problem, val, metric, settings, spread=spread).to_json()

    @functools.cached_property
    def opened(self) -> tuple[Problem, Rows]:
        """What the other kinds are fitted to, and val."""
        return open_fit(self.info, self.search, self.agreement)


def with_settings(search: HeadSearch, lr: float, weight_decay: float) -> HeadSearch:
    """The same search, of a single head."""
    config = replace(search.stage.config, search=SearchConfig([lr], [weight_decay]))
    return replace(search, stage=replace(search.stage, config=config))
