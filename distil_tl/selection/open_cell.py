"""A cell that is ready for the search of heads: its model, cut once for several cells, and its features."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from distil_tl.data.feature_cache import FeatureDataset
from distil_tl.data.source import ImageSource
from distil_tl.distributed.preemption import Agreement
from distil_tl.distributed.process_group import DistInfo
from distil_tl.models.graph.frozen_prefix import CutNetwork
from distil_tl.models.head import init_layer
from distil_tl.models.transfer import TransferModel
from distil_tl.rundir.state import StageRecord
from distil_tl.selection.cells import Cell
from distil_tl.training.feature_extraction import FeatureExtractor
from distil_tl.training.features import Features
from distil_tl.training.network import FeatureNetwork
from distil_tl.training.stage import Stage
from distil_tl.training.stage_setup import StageSetup


@dataclass(frozen=True)
class OpenCell:
    """A cell with its model and its features.

    Attributes:
        columns: of the features that the prefix computes, the first one and the one after the last of the read-out of
            the cell; None: all.
    """

    cell: Cell
    stage: Stage
    model: TransferModel
    source: ImageSource
    record: StageRecord
    setup: StageSetup
    columns: tuple[int, int] | None = None

    def read_out(self, readout: str, seed: int) -> OpenCell:
        """The cell with one of the read-outs that its model has side by side, and a head for it alone.

        Args:
            seed: of the head.
        """
        columns, features, network = self.model.columns.get(readout), self.setup.features, self.setup.network
        layers = network.suffix if isinstance(network, FeatureNetwork) else None
        if len(self.model.columns) < 2 or columns is None or features is None:
            return self
        if not isinstance(layers, nn.Sequential) or not isinstance(layers[-1], nn.Linear):
            return self  # the search refuses it
        whole = layers[-1]
        head = nn.Linear(columns[1] - columns[0], whole.out_features, bias=whole.bias is not None)
        init_layer(head, self.model.heads[0], seed)
        assert self.setup.prefix is not None
        cut = CutNetwork(self.setup.prefix.prefix, nn.Sequential(*layers[:-1], head.to(whole.weight.device)))
        found = replace(self, cell=replace(self.cell, readout=readout), columns=columns)
        parts = Features(found.read(features.train), found.read(features.val))
        setup = replace(self.setup, network=FeatureNetwork(cut, network.compute), features=parts)
        return replace(found, setup=setup)

    def read(self, features: FeatureDataset) -> FeatureDataset:
        """Those of the features of the prefix that the cell reads out."""
        return features if self.columns is None else features.columns(*self.columns)

    def extractor(self, info: DistInfo, agreement: Agreement) -> FeatureExtractor:
        """Computes features of other images, which are to be `read`."""
        assert self.setup.prefix is not None
        return FeatureExtractor(
            info, self.model, self.setup.prefix, self.source, self.stage, self.record, agreement, limit_memory=False
        )
