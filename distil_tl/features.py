"""The frozen backbone runs once: its outputs are computed for each view of each image, kept on disk, and trained on.

A stage that trains only the head sees the same backbone in every epoch. What the head sees of an image is then a
function of the image's view alone, and is read instead of computed. The order of the images stays what it is.

The cache is a folder named by all that its numbers depend on. It is made of chunks, each written by one rank and valid
on its own: an extraction that was interrupted goes on, and jobs that need the same features share the work.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from distil_tl.checkpoint import weights_hash
from distil_tl.data.index import Index
from distil_tl.data.loader import Batch, DataConfig, ImageDataset, Loader, default_workers, make_loader
from distil_tl.data.sampler import SampleKey
from distil_tl.data.splits import Splits
from distil_tl.data.transforms import train_transform
from distil_tl.distributed import DistInfo, max_over_ranks, on_rank_zero
from distil_tl.engine import ImageNetwork, Network
from distil_tl.errors import UserError
from distil_tl.files import cache_dir, sha256_file, write_json
from distil_tl.log import Progress, logger
from distil_tl.models import TransferModel
from distil_tl.stages import StageConfig, trainable_groups
from distil_tl.stopping import Agreement

CHUNK = 256  # images whose features are written, and can be lost, at once
BATCH = 32  # images that the backbone sees at once
FORMAT = 1


class FeatureNetwork(Network):
    """What is left of an ImageNetwork to run on features [N, D]: the head, and a dropout before it."""

    def __init__(self, network: ImageNetwork, dropout: nn.Module | None, head: nn.Module) -> None:
        super().__init__(network.dtype)
        self.tail = nn.Sequential(*[module for module in (dropout, head) if module is not None])

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, self.dtype, enabled=self.dtype is not None):
            logits: Tensor = self.tail(features)
        return logits.float()


@dataclass(frozen=True)
class Cut:
    """Where a network is cut in two: `features` of the call of the first part, and the second part."""

    where: nn.Module  # whose input they are
    network: FeatureNetwork


def wanted(stage: StageConfig, augment: str) -> bool:
    """Whether a stage's settings ask for features; `auto` does where the result is the same with and without."""
    if stage.features == "auto":
        return stage.unfreeze == "head" and (augment == "none" or stage.views is not None)
    return stage.features == "on"


def find_cut(model: TransferModel, network: ImageNetwork, stage: StageConfig, image_size: int) -> Cut | str:
    """Where the frozen part of a network ends, with the stage applied; or the reason why there is no such place."""
    if trainable_groups(stage.unfreeze, list(model.group_names)) != {len(model.groups) - 1}:
        return "it trains more than the head"
    if len(model.heads) != 1:
        return "the model has several heads"
    head = model.module.get_submodule(model.heads[0])
    dropouts = [
        m for m in model.module.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p
    ]
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen.setdefault(module, []).append((inputs[0], output))

    device = next(network.module.parameters()).device
    images = torch.randint(0, 256, (2, 3, image_size, image_size), dtype=torch.uint8, generator=torch.manual_seed(0))
    hooks = [module.register_forward_hook(note) for module in (head, *dropouts)]
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            whole = network(images.to(device))
            called = {module: calls for module, calls in seen.items() if len(calls) == 1}
            if head not in called or called[head][0][0].ndim != 2:
                return "its head takes something else than one vector of an image"
            before = [m for m in dropouts if m in called and called[m][0][1] is called[head][0][0]]
            if len(before) != len([m for m in seen if m is not head]):
                return "a dropout stands where the backbone is"
            where = before[0] if before else head
            cut = Cut(where, FeatureNetwork(network, before[0] if before else None, head))
            features = called[where][0][0]
            torch.manual_seed(0)
            if not torch.allclose(cut.network(features), whole, rtol=1e-4, atol=1e-5):
                return "the head is not all that comes after the backbone"
    finally:
        for hook in hooks:
            hook.remove()
    return cut


def cache_key(
    model: TransferModel, network: ImageNetwork, index: Index, *, image_size: int, augment: str, hflip: bool,
    seed: int, views: int,
) -> str:  # fmt: skip
    """A digest of all that features depend on: not of the head, nor of a seed where nothing is drawn."""
    heads = tuple(f"{path}." for path in model.heads)
    depends = {
        "format": FORMAT,
        "backbone": weights_hash(model.module, without=heads),
        "architecture": type(model.module).__qualname__,
        "images": index.fingerprint,
        "image_size": image_size,
        "augment": augment,
        "hflip": hflip if augment != "none" else None,
        "seed": seed if augment != "none" else None,
        "views": views,
        "preprocess": asdict(model.preprocess),
        "dtype": str(network.dtype),
        "device": next(model.module.parameters()).device.type,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]


class Cache:
    """Features [N, D] of the images of an index, for each of some views, in a folder of chunks."""

    def __init__(self, folder: Path, length: int, views: int) -> None:
        self.folder = folder
        self.length = length
        self.views = views

    def chunks(self) -> list[tuple[int, int]]:
        """(view, first image) of each."""
        return [(view, first) for view in range(self.views) for first in range(0, self.length, CHUNK)]

    def rows(self, first: int) -> range:
        return range(first, min(first + CHUNK, self.length))

    def path(self, view: int, first: int) -> Path:
        return self.folder / f"view-{view:03d}-from-{first:09d}"

    def is_sound(self, view: int, first: int) -> bool:
        """Whether a chunk is there, whole and as it was written."""
        path = self.path(view, first)
        try:
            note = json.loads(path.with_suffix(".json").read_text())
            return bool(
                note["sha256"] == sha256_file(path.with_suffix(".npy")) and note["rows"] == len(self.rows(first))
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def write(self, view: int, first: int, features: Tensor, faults: dict[int, str]) -> None:
        """The array first, then the note that says what it must be, each under its name only when it is whole."""
        path = self.path(view, first)
        self.folder.mkdir(parents=True, exist_ok=True)
        dtype = str(features.dtype).removeprefix("torch.")
        array = (features.view(torch.int16) if features.dtype == torch.bfloat16 else features).numpy()
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.npy")
        try:
            np.save(partial, array, allow_pickle=False)
            digest = sha256_file(partial)
            partial.replace(path.with_suffix(".npy"))
        finally:
            partial.unlink(missing_ok=True)
        note = {"sha256": digest, "rows": len(array), "dtype": dtype, "faults": faults}
        write_json(path.with_suffix(".json"), note)

    def open(self, targets: np.ndarray) -> FeatureDataset:
        arrays, faults = [], dict[tuple[int, int], str]()
        dtype = "float32"
        for view, first in self.chunks():
            path = self.path(view, first)
            note = json.loads(path.with_suffix(".json").read_text())
            dtype = note["dtype"]
            arrays.append(np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False))
            faults |= {(view, int(image)): reason for image, reason in note["faults"].items()}
        return FeatureDataset(self, arrays, getattr(torch, dtype), faults, targets)


class FeatureDataset(Dataset[Batch]):
    """Features in the place of images. All ranks of a node read the same pages of memory."""

    def __init__(
        self,
        cache: Cache,
        arrays: Sequence[np.ndarray],
        dtype: torch.dtype,
        faults: dict[tuple[int, int], str],
        targets: np.ndarray,
    ) -> None:
        self.cache = cache
        self.arrays = arrays
        self.dtype = dtype
        self.faults = faults
        self.per_view = len(arrays) // cache.views
        self.targets = targets

    def __len__(self) -> int:
        return self.cache.length

    def __getitems__(self, keys: list[SampleKey]) -> Batch:
        """A batch at once. Epoch `e` sees view `e` modulo their number."""
        where = [(key.epoch % self.cache.views, key.image) for key in keys]
        rows = [self.arrays[view * self.per_view + image // CHUNK][image % CHUNK] for view, image in where]
        features = torch.from_numpy(np.stack(rows))
        bad = [(image, self.faults[view, image]) for view, image in where if (view, image) in self.faults]
        images = torch.tensor([key.image for key in keys])
        return Batch(
            features.view(self.dtype) if self.dtype == torch.bfloat16 else features,
            torch.from_numpy(self.targets[images.numpy()].astype(np.int64)),
            images,
            torch.tensor([pair not in self.faults for pair in where]),
            bad,
        )


def feature_loader(dataset: FeatureDataset, instead_of: Loader) -> Loader:
    """A loader of features in the order and the batches of one of images."""
    sampler: Any = instead_of.sampler
    loader: Loader = DataLoader(dataset, batch_size=instead_of.batch_size, sampler=sampler, collate_fn=_as_it_is)
    return loader


def _as_it_is(batch: Any) -> Any:
    return batch


@torch.no_grad()
def compute(
    info: DistInfo,
    network: ImageNetwork,
    cut: Cut,
    cache: Cache,
    dataset: ImageDataset,
    *,
    what: str,
    workers: int,
    agreement: Agreement,
) -> OSError | None:
    """Compute what the cache lacks, each rank some chunks; on all ranks the error that kept one from writing.

    Batches are the same whichever rank computes them, so features do not depend on how many there are.

    Raises:
        StopAgreedError: on all ranks alike. What is computed is kept.
    """

    def look() -> list[tuple[int, int]]:
        return [chunk for chunk in cache.chunks() if not cache.is_sound(*chunk)]

    missing = [(view, first) for view, first in on_rank_zero(info, f"looking for features of {what}", look)]
    if not missing:
        logger.info("features of %s: found in %s", what, cache.folder)
        return None
    mine = missing[info.rank :: info.world_size]
    keys = [[SampleKey(image, view, image) for image in cache.rows(first)] for view, first in mine]
    parts = [chunk[i : i + BATCH] for chunk in keys for i in range(0, len(chunk), BATCH)]
    pinned = info.device.type == "cuda"
    batches = iter(make_loader(dataset, parts, batch_size=None, workers=workers if parts else 0, pin_memory=pinned))
    turns = math.ceil(len(missing) / info.world_size)
    bar = Progress(f"features of {what}", turns, show=info.is_main)
    found: list[Tensor] = []
    hook = cut.where.register_forward_hook(lambda module, inputs, output: found.append(inputs[0]))
    failed: OSError | None = None
    try:
        for turn in range(turns):
            agreement.check()
            if turn < len(mine) and failed is None:
                failed = _compute_chunk(info, network, cache, mine[turn], batches, found)
            bar.advance()
    finally:
        hook.remove()
        bar.close()
    any_failed = max_over_ranks(info, float(failed is not None))
    return failed or (OSError("another rank could not write") if any_failed else None)


def _compute_chunk(
    info: DistInfo,
    network: ImageNetwork,
    cache: Cache,
    chunk: tuple[int, int],
    batches: Iterator[Batch],
    found: list[Tensor],
) -> OSError | None:
    """Compute a chunk and write it; the error if the disk did not take it."""
    features, faults = [], dict[int, str]()
    for _ in range(math.ceil(len(cache.rows(chunk[1])) / BATCH)):
        batch = next(batches)
        network(batch.images.to(info.device, non_blocking=True))
        features.append(found.pop().cpu())
        faults |= dict(batch.faults)
    try:
        cache.write(*chunk, torch.cat(features), faults)
    except OSError as error:
        return error
    return None


@dataclass(frozen=True)
class Features:
    """A stage's training and validation images, as features."""

    network: FeatureNetwork
    train: FeatureDataset
    val: FeatureDataset
    seconds: float


def open_features(
    info: DistInfo,
    data: DataConfig,
    model: TransferModel,
    network: ImageNetwork,
    splits: Splits,
    name: str,
    stage: StageConfig,
    *,
    image_size: int,
    seed: int,
    agreement: Agreement,
) -> Features | None:
    """Features for a stage, whose freezing is applied, computed as far as they are not there; None to do without.

    Raises:
        UserError: the stage wants them whatever happens, and can't have them.
        StopAgreedError: on all ranks alike.
    """
    augment = stage.augment or data.augment
    if stage.views is None:
        augment = "none"
    if not wanted(stage, stage.augment or data.augment):
        return None
    began = time.monotonic()
    cut = find_cut(model, network, stage, image_size)
    if isinstance(cut, str):
        _do_without(stage, name, cut)
        return None
    found = {}
    for split, views, how in (("train", stage.views or 1, augment), ("val", 1, "none")):
        index = splits[split]
        assert index is not None
        key = cache_key(model, network, index, image_size=image_size, augment=how, hflip=data.hflip, seed=seed,
                        views=views)  # fmt: skip
        cache = Cache(cache_dir() / "features" / key, len(index), views)
        transform = train_transform(model.preprocess, image_size, how, data.hflip)
        dataset = ImageDataset(index, transform, image_size, seed=seed, stage="features")
        workers = data.workers if data.workers is not None else default_workers(info.launch.local_world_size)
        failed = compute(info, network, cut, cache, dataset, what=f"{split} for stage {name}", workers=workers,
                         agreement=agreement)  # fmt: skip
        reason = None
        if failed is not None:
            reason = f"they can't be written to {cache.folder}: {failed.strerror or failed}"
        elif max_over_ranks(info, float(not all(cache.is_sound(*chunk) for chunk in cache.chunks()))):
            reason = f"not all ranks find them in {cache.folder}; let DISTIL_TL_CACHE be on shared storage"
        if reason is not None:
            _do_without(stage, name, reason)
            return None
        found[split] = cache.open(index.targets)
    return Features(cut.network, found["train"], found["val"], time.monotonic() - began)


def _do_without(stage: StageConfig, name: str, reason: str) -> None:
    if stage.features == "on" or stage.views is not None:
        raise UserError(f"stages.{name}.features: {reason}; use stages.{name}.features=off and views=null")
    logger.info("stage %s: the backbone runs in each epoch, as %s", name, reason)
