"""The work of a cell: features of all images, and the grid of heads on them, divided among the ranks."""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from distil_tl.data.bad_images import BadImages
from distil_tl.data.loader import plan_batches
from distil_tl.data.splits import Splits
from distil_tl.distributed.collectives import gather_objects
from distil_tl.distributed.preemption import Agreement
from distil_tl.distributed.process_group import DistInfo
from distil_tl.models.transfer import TransferModel, build
from distil_tl.report.text import metric_name, settings_of
from distil_tl.rundir.state import StageRecord
from distil_tl.selection.cells import SHARES, Cell, Result, metric_interval
from distil_tl.selection.common import Common
from distil_tl.selection.costs import images_per_second
from distil_tl.selection.heads import HeadSearches
from distil_tl.selection.open_cell import OpenCell
from distil_tl.selection.shared_images import ImageMemory, SharedImages, image_memory
from distil_tl.training.features import FeaturesNeededError, FeaturesUnavailableError, refuse_without_features
from distil_tl.training.head_search import prepare_search
from distil_tl.training.stage_setup import set_up_stage
from distil_tl.utils.errors import NonFiniteError, UserError, listed
from distil_tl.utils.log import logger


class UnfitError(Exception):
    """A network can't be used, on all ranks alike. The text is the reason."""


class RanksDifferError(UserError):
    """A network can be built on some ranks alone, so it is not the network that is unfit."""


class CellSearch:
    """Searches one cell after another. All methods are collectives."""

    def __init__(
        self, info: DistInfo, common: Common, splits: Splits, agreement: Agreement, cells: Sequence[Cell] = ()
    ) -> None:
        self.info = info
        self.common = common
        self.splits = splits
        self.agreement = agreement
        self.bad_images = BadImages(common.data.on_bad_image)
        self.cells = cells
        self._opened: OpenCell | None = None  # the last one, with all read-outs: cells with other ones or crops follow
        self._images = image_memory(info) if len({cell.name for cell in cells}) > 1 else ImageMemory(0)
        self._speeds: dict[tuple[str, int], float | None] = {}  # by network

    def search(self, cell: Cell, kinds: Sequence[str], keep: Callable[[Result], None]) -> dict[str, str]:
        """Search heads of several kinds on the features of a cell. Returns why some kinds have no result.

        Args:
            keep: gets the result of each kind as soon as it is there.

        Raises:
            UnfitError: the weights don't fit the network, it has no frozen part, or its head is no linear layer.
            UserError: an image can't be used, or some ranks can't build the network.
            AllRanksStopError: on all ranks alike. Features and results that are complete are kept.
        """
        began, failed = time.monotonic(), dict[str, str]()
        try:
            found = self.open_cell(cell)
            search = prepare_search(self.info, found.stage, found.setup, found.source)
        except UserError as error:
            self.refuse_cell(error)
        searches, metric = HeadSearches(self.info, search, self.agreement), found.stage.metric
        for kind in kinds:
            self.info.phase = f"the search of the {kind} head"
            try:
                chosen = searches.result(kind)
            except (UserError, NonFiniteError) as error:  # on all ranks alike
                if isinstance(error, UserError) and not self.is_of_cell(error):
                    raise
                failed[kind] = str(error)
                logger.info("%s head: left out: %s", kind, error)
                continue
            seconds, settings = time.monotonic() - began, settings_of(chosen)
            logger.info(
                "%s head: %d tried in %.1f s, %s %.4f on val%s", kind, len(chosen["heads"]), seconds,
                metric_name(metric), chosen[metric], f" with {settings}" if settings else "",
            )  # fmt: skip
            keep(self._result(cell, found, kind, chosen, seconds))
            began = time.monotonic()
        return failed

    def _result(self, cell: Cell, found: OpenCell, kind: str, chosen: dict[str, Any], seconds: float) -> Result:
        """The result of a cell from that of a search. A collective."""
        features = found.setup.features
        assert features is not None
        n, metric = len(features.val) - len(features.val.bad()), self.common.metric
        self.bad_images.refuse_none_usable(n, "val", self.splits.val)
        return Result(
            cell=cell,
            source=found.model.weights.source,
            n=n,
            head={key: value for key, value in chosen.items() if key not in ("heads", "best", "spread")},
            heads=chosen["heads"],
            precision=str(found.record.prefix_precision),
            features=features.train.example(1)[0].numel(),
            images_per_second=self._images_per_second(cell, found),
            seconds=seconds,
            kind=kind,
            other_interval=None if metric in SHARES else metric_interval(metric, chosen, n),
            trained=len(features.train) - len(features.train.bad()),
        )

    @staticmethod
    def is_of_cell(error: UserError) -> bool:
        """Whether an error is of a network or of all ranks alike, so that others may be tried."""
        return not (error.one_rank or isinstance(error, RanksDifferError))

    def refuse_cell(self, error: UserError) -> NoReturn:
        """Raises UnfitError with its reason if it is of the cell, else the error itself."""
        if not self.is_of_cell(error):
            raise error
        reason = f"no features: {error.reason}" if isinstance(error, FeaturesNeededError) else str(error)
        raise UnfitError(reason) from error

    def open_cell(self, cell: Cell) -> OpenCell:
        """The model of a cell, and the features of train and val. Raises UserError as `set_up_stage` does.

        Cells of the same network share what was traced, and those of the same images their forward passes.
        """
        opened = self._opened
        if opened is None or opened.cell.passes != cell.passes:
            self._opened = None
            if opened is not None and opened.cell.network == cell.network:
                opened = self._with_crop(opened, cell)
            else:
                del opened  # frees its memory first
                opened = self._with_network(cell)
            self._opened = opened
        return opened.read_out(cell.readout, self.common.seed)

    def _with_network(self, cell: Cell) -> OpenCell:
        info, common, data = self.info, self.common, self.common.data
        gc.collect()  # the graphs of the last network refer to themselves
        stage, model, record = common.stage_of(cell), self._built(cell), StageRecord()
        model.preprocess = model.preprocess.with_crop(cell.crop_mode, data.crop_pct)
        source = SharedImages(info, data, self.splits, model.preprocess, self.bad_images, self._images)
        micro = plan_batches(data.global_batch_size, info.world_size, data.max_local_batch_size).micro
        setup = set_up_stage(info, stage, model, source, record, micro, self.agreement)
        return OpenCell(cell, stage, model, source, record, setup)

    def _with_crop(self, opened: OpenCell, cell: Cell) -> OpenCell:
        """The same network with the features of other crops."""
        data, before = self.common.data, opened.model
        model = replace(before, preprocess=before.preprocess.with_crop(cell.crop_mode, data.crop_pct))
        source = SharedImages(self.info, data, self.splits, model.preprocess, self.bad_images, self._images)
        found = replace(opened, cell=cell, model=model, source=source)
        try:
            features = found.extractor(self.info, self.agreement).open_all()
        except FeaturesUnavailableError as error:
            refuse_without_features(found.stage, str(error))
        return replace(found, setup=replace(found.setup, features=features))

    def _images_per_second(self, cell: Cell, found: OpenCell) -> float | None:
        """The speed of a network, measured once."""
        if cell.network not in self._speeds:
            assert found.setup.prefix is not None
            self._speeds[cell.network] = images_per_second(self.info, found.setup.prefix, cell.image_size)
        return self._speeds[cell.network]

    def _readouts(self, cell: Cell) -> list[str]:
        """The read-outs of all cells of a network, in their order; of a cell that is not planned its own."""
        planned = dict.fromkeys(each.readout for each in self.cells if each.network == cell.network)
        return list(planned) or [cell.readout]

    def _built(self, cell: Cell) -> TransferModel:
        """The model of a cell, with the read-outs of all cells of this network if there are several."""
        readouts, config = self._readouts(cell), self.common.model_of(cell)
        together = readouts if len(readouts) > 1 else None
        model, failed = None, None
        try:
            model = build(
                config, len(self.splits.classes), image_size=cell.image_size, seed=self.common.seed, readouts=together
            )
        except UserError as error:
            failed = error
        self._refuse_alike(cell, failed)
        assert model is not None
        model.module.to(self.info.device)
        return model

    def _refuse_alike(self, cell: Cell, failed: UserError | None) -> None:
        """Raise what `build` raised if it was the same on all ranks; RanksDifferError if it was not. A collective."""
        own = [socket.gethostname(), None if failed is None else str(failed)]
        answers = gather_objects(self.info, own)
        errors = {text for _, text in answers}
        if errors == {None}:
            return
        if len(errors) == 1:
            raise UserError(answers[0][1])
        where = [f"rank {rank} on {host}" for rank, (host, text) in enumerate(answers) if text is not None]
        reason = next(text for _, text in answers if text is not None)
        raise RanksDifferError(
            f"{cell.name} can be used on some ranks, but not on {listed(where, 8)}: {reason}. All nodes need the same "
            f"packages and weights: share the caches (TORCH_HOME, HF_HOME), or run `distil-tl prefetch` on each node"
        )
