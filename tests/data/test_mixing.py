"""Mixup and CutMix: against torchvision and timm, and the same pairs for any division of the work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.mixup import Mixup, mixup_target
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torchvision.transforms import v2

from distil_tl.data import loader as loading
from distil_tl.data.config import fitting_world_sizes
from distil_tl.data.decode import ImageError
from distil_tl.data.loader import Batch
from distil_tl.data.mixed_batches import MixedBatches, MixedDataset, dominant, mix
from distil_tl.data.mixing import Mixing, Partners, cut
from distil_tl.data.sampler import NO_PARTNER, SampleKey, TrainSampler
from distil_tl.data.transforms import ImageTransform
from distil_tl.training.losses import Loss
from distil_tl.training.memory import PartSize

SIZE, CLASSES = 24, 5
BOTH = Mixing(mixup=0.4, cutmix=1.0, epochs=2)


def images(count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def batch_of(rows: list[int], share: float, box: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Batch:
    """A batch in which all have the same share and box."""
    count, targets = len(rows), torch.arange(len(rows)) % CLASSES
    partners = Partners(
        torch.tensor(rows), targets[rows], torch.tensor(rows), torch.full((count,), share),
        torch.tensor([box] * count, dtype=torch.int32),
    )  # fmt: skip
    return Batch(images(count), targets, torch.arange(count), torch.ones(count, dtype=torch.bool), [], partners)


# The arithmetic.


def test_mixup_is_that_of_torchvision_and_of_timm() -> None:
    batch, share = batch_of([5, 0, 1, 2, 3, 4], 0.3), 0.3  # torchvision's partner is the one before
    params = {"labels": batch.targets, "batch_size": 6, "lam": share}
    mixed = mix(batch, Mixing(0.2, 0, 1)).images
    torch.testing.assert_close(mixed, v2.MixUp(num_classes=CLASSES).transform(batch.images.float(), params))

    batch = batch_of([5, 4, 3, 2, 1, 0], share)  # timm's are those from the other end
    theirs, library = batch.images.float(), Mixup(mixup_alpha=1.0, num_classes=CLASSES)
    library._params_per_batch = lambda *_: (share, False)
    library._mix_batch(theirs)
    torch.testing.assert_close(mix(batch, Mixing(0.2, 0, 1)).images, theirs)


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_is_that_of_torchvision(seed: int) -> None:
    library = v2.CutMix(alpha=1.0, num_classes=CLASSES)
    torch.manual_seed(seed)
    params = library.make_params([images()])
    torch.manual_seed(seed)
    share = float(library._dist.sample(()))
    x, y = (int(torch.randint(SIZE, (1,))) for _ in "xy")
    drawn = cut(share, x, y, SIZE)
    left, top, right, bottom = params["box"]
    assert drawn.box == (top, left, bottom, right)
    assert drawn.share == pytest.approx(params["lam_adjusted"])

    batch = batch_of([5, 0, 1, 2, 3, 4], drawn.share, drawn.box)
    mixed = mix(batch, Mixing(0, 1.0, 1)).images
    assert mixed.dtype == torch.uint8
    assert torch.equal(mixed, library.transform(batch.images, {**params, "labels": batch.targets, "batch_size": 6}))
    with_mixup = mix(batch, Mixing(0.2, 1.0, 1)).images
    assert torch.equal(with_mixup, mixed.float()), "a box is not blended"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_mixed_targets(smoothing: float) -> None:
    batch, logits = batch_of([5, 4, 3, 2, 1, 0], 0.3), torch.randn(6, CLASSES)
    found = Loss(smoothing)(logits, batch.targets, batch.indices, batch.partners).mean()
    torch.testing.assert_close(
        found, SoftTargetCrossEntropy()(logits, mixup_target(batch.targets, CLASSES, 0.3, smoothing))
    )


def test_weights_and_focal_are_of_each_target_and_adjusted_logits_of_both() -> None:
    batch, logits = batch_of([1, 2, 3, 4, 5, 0], 0.3), torch.randn(6, CLASSES)
    weights, offsets, of_images = torch.rand(CLASSES), torch.randn(CLASSES), torch.rand(6)
    found = Loss(gamma=2.0, weights=weights, offsets=offsets, image_weights=of_images)(
        logits, batch.targets, batch.indices, batch.partners
    )
    p = (logits + offsets).softmax(1)

    def focal(targets: Tensor, indices: Tensor) -> Tensor:
        q = p[range(6), targets]
        return of_images[indices] * weights[targets] * (1 - q) ** 2 * -q.log()

    assert batch.partners is not None
    expected = 0.3 * focal(batch.targets, batch.indices) + 0.7 * focal(batch.partners.targets, batch.partners.indices)
    torch.testing.assert_close(found, expected)


def test_an_image_with_the_whole_share_is_as_it_was() -> None:
    batch = batch_of([1, 2, 0], 1.0)
    assert torch.equal(mix(batch, BOTH).images, batch.images.float())
    assert mix(batch, None) is batch
    logits = torch.randn(3, CLASSES)
    assert torch.equal(Loss()(logits, batch.targets, None, batch.partners), Loss()(logits, batch.targets))


def test_training_metrics_count_the_larger_share() -> None:
    partners = batch_of([1, 2, 0], 0.3).partners
    assert partners is not None
    partners = partners._replace(shares=torch.tensor([0.3, 0.5, 0.9]))
    assert dominant(torch.tensor([0, 1, 2]), partners).tolist() == [1, 1, 2]
    assert dominant(torch.tensor([0, 1, 2]), None).tolist() == [0, 1, 2]


# What is drawn.


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_have_the_distribution_of_the_paper(alpha: float) -> None:
    shares = np.array([Mixing(alpha, 0, 1).draw(seed, SIZE).share for seed in range(4000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_boxes_have_the_area_of_their_share_and_lie_anywhere() -> None:
    drawn = [Mixing(0, 1.0, 1).draw(seed, SIZE) for seed in range(2000)]
    for share, (top, left, bottom, right) in drawn:
        assert 0 <= top <= bottom <= SIZE
        assert 0 <= left <= right <= SIZE
        assert share == pytest.approx(1 - (bottom - top) * (right - left) / SIZE**2)
    centres = np.array([(left + right) / 2 for _, (_, left, _, right) in drawn if right > left])
    assert centres.mean() == pytest.approx(SIZE / 2, abs=0.5)


def test_a_stage_with_both_uses_each_for_half_of_its_images() -> None:
    boxes = [BOTH.draw(seed, SIZE).box for seed in range(2000)]
    # A few boxes are empty.
    assert 0.4 < np.mean([any(box) for box in boxes]) < 0.53
    assert BOTH.draw(7, SIZE) == BOTH.draw(7, SIZE)


# Batches.


def dataset_of(count: int) -> MixedDataset:
    index: Any = SimpleNamespace(targets=[i % CLASSES for i in range(count)], local_path=lambda i: i, copy=None)
    found = MixedDataset(index, ImageTransform([Noise()], 8), 8, seed=5, stage="full")
    found.mixing = BOTH
    return found


class Noise(nn.Module):
    """A stand-in for an augmentation."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.randint(256, (3, 8, 8), dtype=torch.uint8)


@pytest.fixture(autouse=True)
def _no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(path: int, **_: object) -> Tensor:
        if path in BAD:
            raise ImageError(str(path), "damaged image")
        return torch.zeros(1)

    monkeypatch.setattr(loading, "decode", decode)


BAD = {11}


def batches_of(
    count: int, batch: int, world: int, micro: int, epochs: int
) -> Iterator[tuple[int, list[SampleKey], Batch]]:
    """The batches of all ranks: (rank, keys, batch)."""
    dataset = dataset_of(count)
    for rank in range(world):
        sampler = TrainSampler(
            count, global_batch_size=batch, world_size=world, rank=rank, seed=1, stage="full", epochs=epochs
        )
        batches = MixedBatches(sampler, micro, BOTH)
        made = list(batches)
        assert len(made) == len(batches)
        assert max(map(len, made)) <= batches.largest
        for keys in made:
            yield rank, keys, dataset.collate(dataset.__getitems__(keys))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_pairs_images_and_losses_are_the_same_on_any_number_of_ranks(data: st.DataObject) -> None:
    batch = data.draw(st.integers(2, 12))
    count = data.draw(st.integers(batch, 2 * batch + 3))
    world = data.draw(st.sampled_from(fitting_world_sizes(batch)))
    micro = data.draw(st.sampled_from(fitting_world_sizes(batch // world)))
    weight = torch.randn(3 * 64, CLASSES, generator=torch.Generator().manual_seed(0))

    def seen(world: int, micro: int) -> tuple[dict[tuple[int, int], Any], dict[tuple[int, int], float]]:
        """By (epoch, position): the partner, share, box and mixed image; by (epoch, step): the sum of losses."""
        found: dict[tuple[int, int], Any] = {}
        sums: dict[tuple[int, int], float] = {}
        for _, keys, made in batches_of(count, batch, world, micro, epochs=3):
            own, mixed = keys[: len(made.targets)], mix(made, BOTH)
            assert len({key.position for key in keys}) == len(keys), "no image is loaded twice"
            assert len(mixed.images) == len(own) == micro
            losses = Loss()((mixed.images.float() / 255).flatten(1) @ weight, made.targets, None, made.partners)
            step = own[0].epoch, own[0].position // batch
            sums[step] = sums.get(step, 0.0) + float((losses * made.valid).sum())
            for row, key in enumerate(own):
                with_whom: tuple[Any, ...] = (key.image, key.partner)
                if made.partners is not None:
                    assert keys[int(made.partners.rows[row])].position == key.partner
                    with_whom += tuple(part[row].tolist() for part in made.partners if part is not made.partners.rows)
                digest = hashlib.sha256(mixed.images[row].contiguous().numpy().tobytes()).hexdigest()
                assert found.setdefault((key.epoch, key.position), (*with_whom, digest)) == (*with_whom, digest)
        return found, sums

    expected, sums = seen(1, batch)
    found, theirs = seen(world, micro)
    assert found == expected
    assert theirs == pytest.approx(sums, rel=1e-4, abs=1e-4)
    assert len(expected) == 3 * (count // batch) * batch
    for (epoch, position), (_, partner, *_) in expected.items():
        assert epoch < BOTH.epochs or partner == NO_PARTNER, "the last epochs do not mix"
        if epoch < BOTH.epochs:
            assert partner // batch == position // batch
            assert batch % 2 or expected[epoch, partner][1] == position, "pairs, in a batch of even size"


def test_where_the_ranks_divide_half_a_batch_no_image_is_loaded_twice() -> None:
    for world, micro in ((1, 12), (2, 6), (2, 2), (6, 2)):
        assert all(len(keys) == micro for _, keys, _ in batches_of(24, 12, world, micro, epochs=1))
    assert all(len(keys) == 2 for _, keys, _ in batches_of(24, 12, 12, 1, epochs=1)), "else each with its partner"


def test_a_bad_image_is_not_mixed_and_neither_is_its_partner() -> None:
    for _, keys, made in batches_of(12, 6, 1, 6, epochs=1):
        assert made.partners is not None
        for row, key in enumerate(keys):
            pair = {key.image, keys[int(made.partners.rows[row])].image}
            assert bool(made.valid[row]) == (key.image not in BAD)
            assert (float(made.partners.shares[row]) == 1) == bool(pair & BAD)
        assert {image for image, _ in made.faults} == BAD & {key.image for key in keys}


def test_a_batch_is_sent_between_processes_and_divided_with_its_partners() -> None:
    _, _, made = next(iter(batches_of(24, 12, 4, 3, epochs=1)))
    rebuild, parts = loading._reduced(made)
    received = rebuild(*parts)
    assert made.partners is not None
    assert len(made.images) > len(made.targets)
    for sent, got in zip([*made[:4], *made.partners], [*received[:4], *received.partners], strict=True):
        assert torch.equal(sent, got)
    assert ForkingPickler.dumps(made)

    mixed = mix(received, BOTH)
    halves = PartSize("training", "training", {"training": 2}).split(mixed)
    assert [len(half.images) for half in halves] == [2, 1]
    logits = torch.randn(3, CLASSES)
    whole = Loss()(logits, mixed.targets, mixed.indices, mixed.partners)
    losses = [
        Loss()(part, half.targets, half.indices, half.partners)
        for part, half in zip(torch.split(logits, 2), halves, strict=True)
    ]
    assert torch.equal(torch.cat(losses), whole)
    assert set(made.all_indices.tolist()) == {*made.indices.tolist(), *made.partners.indices.tolist()}
