"""From a decoded image to what the model sees."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from distil_tl.data.augmentation import AUGMENTATIONS, PRESETS, augment_problem
from distil_tl.data.decode import decode_bytes
from distil_tl.data.transforms import eval_transform, min_crop_side, train_transform
from distil_tl.models.preprocess import Preprocess
from tests.helpers.image_bytes import saved

PREPROCESS = Preprocess()


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def waves(height: int, width: int) -> Tensor:
    """A smooth image: shifted by a pixel, it is another one."""
    rows, columns = torch.arange(height)[:, None] / height, torch.arange(width)[None] / width
    planes = [torch.sin(9 * rows + 4) + torch.cos(11 * columns + shift) for shift in range(3)]
    return (127 + 60 * torch.stack(planes)).byte()


def view(image: Tensor, augment: Any, seed: int, *, hflip: bool = True, size: int = 32) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        result: Tensor = train_transform(PREPROCESS, size, augment, hflip)(image)
    return result


# The evaluation view


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([8, 17, 32, 64]))
def test_the_evaluation_view_is_square_and_uint8_for_any_image(height: int, width: int, size: int):
    result = eval_transform(PREPROCESS, size)(noise(height, width))
    assert result.shape == (3, size, size)
    assert result.dtype == torch.uint8


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (3, 1000)])
def test_the_evaluation_view_of_a_tiny_or_very_long_image_has_no_padding(height: int, width: int):
    image = torch.full((3, height, width), 200, dtype=torch.uint8)
    assert torch.equal(eval_transform(PREPROCESS, 16)(image), torch.full((3, 16, 16), 200, dtype=torch.uint8))


def test_the_evaluation_view_is_of_the_centre():
    image = torch.zeros(3, 100, 300, dtype=torch.uint8)
    image[:, 40:60, 140:160] = 255
    result = eval_transform(PREPROCESS, 56)(image)
    assert result[:, 26:30, 26:30].min() == 255
    assert result[:, :16].max() == 0
    assert result[:, :, -16:].max() == 0


def test_the_evaluation_view_of_an_image_of_its_size_is_the_image():
    image = noise(24, 24)
    assert torch.equal(eval_transform(Preprocess(crop_size=224, resize_size=224), 24)(image), image)


SHAPES = [(40, 64), (64, 40), (33, 200), (200, 33), (128, 128), (90, 31), (20, 20), (3, 900)]


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("share", [1.0, 0.875, 0.6])
def test_the_evaluation_view_is_that_of_timm(mode: str, share: float):
    """Up to rounding: Pillow rounds after each direction of a resize."""
    from timm.data.transforms_factory import transforms_imagenet_eval

    preprocess = Preprocess(interpolation="bicubic").with_crop(mode, share)
    theirs = transforms_imagenet_eval(
        32, crop_pct=share, crop_mode=mode, interpolation="bicubic", mean=preprocess.mean, normalize=False
    )
    for height, width in SHAPES[: 7 if mode == "border" else 8]:  # for border, timm makes the last one 0 pixels high
        image = waves(height, width)
        found = eval_transform(preprocess, 32)(image)
        expected = theirs(Image.fromarray(image.permute(1, 2, 0).numpy()))
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= 3, (height, width)
        assert difference.float().mean() < 0.5, (height, width)


def test_borders_have_the_mean_colour_of_the_weights():
    preprocess = Preprocess(mean=(0.1, 0.5, 0.9)).with_crop("border", None)
    result = eval_transform(preprocess, 20)(torch.zeros(3, 30, 61, dtype=torch.uint8))
    colours = torch.tensor([26, 128, 230], dtype=torch.uint8)[:, None, None]
    assert torch.equal(result[:, :5], colours.expand(3, 5, 20))
    assert torch.equal(result[:, 15:], colours.expand(3, 5, 20))
    assert result[:, 5:15].max() == 0


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["squash", "border"]), st.floats(0.1, 1))
def test_every_crop_mode_gives_a_square_for_any_image(height: int, width: int, mode: str, share: float):
    result = eval_transform(PREPROCESS.with_crop(mode, share), 17)(noise(height, width))
    assert result.shape == (3, 17, 17)
    assert result.dtype == torch.uint8


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("shape", [(300, 420), (900, 250), (250, 900)])
def test_a_jpeg_decoded_at_a_reduced_size_gives_nearly_the_same_view(mode: str, shape: tuple[int, int]):
    transform = eval_transform(PREPROCESS.with_crop(mode, None), 32)
    data = saved(Image.fromarray(waves(*shape).permute(1, 2, 0).numpy()), "JPEG")
    whole, reduced = decode_bytes(data), decode_bytes(data, min_side=transform.min_side)
    assert min(reduced.shape[1:]) < min(whole.shape[1:])
    assert min(reduced.shape[1:]) >= 64, "two pixels for each pixel of the view, in both directions"
    assert (transform(whole).int() - transform(reduced).int()).abs().float().mean() < 1.5


def test_no_augmentation_is_the_evaluation_view():
    image = noise(40, 50)
    expected = eval_transform(PREPROCESS, 32)(image)
    assert torch.equal(view(image, "none", 0), expected)
    assert torch.equal(view(image, "none", 1), expected)


# The training view


@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize(("height", "width"), [(40, 50), (7, 90), (1, 1), (200, 20)])
def test_the_training_view_is_square_and_uint8(augment: str, height: int, width: int):
    image = noise(height, width)
    before = image.clone()
    for seed in range(20):
        result = view(image, augment, seed)
        assert result.shape == (3, 32, 32)
        assert result.dtype == torch.uint8
    assert torch.equal(image, before)


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_the_training_view_is_a_function_of_the_seed(augment: str):
    image = noise(40, 50)
    views = [view(image, augment, seed) for seed in range(20)]
    assert all(torch.equal(view(image, augment, seed), views[seed]) for seed in range(20))
    assert len({one.numpy().tobytes() for one in views}) == 20


def brightens_to_the_right(image: Tensor) -> bool:
    return bool((image.float().mean(dim=(0, 1)).diff() >= 0).all())


def test_a_mirror_image_only_where_it_is_allowed():
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).expand(3, 48, 64)
    assert all(brightens_to_the_right(view(ramp, "light", seed, hflip=False)) for seed in range(60))
    mirrored = sum(not brightens_to_the_right(view(ramp, "light", seed)) for seed in range(60))
    assert 15 < mirrored < 45


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_hflip_is_one_step_and_changes_no_other(augment: str):
    """Structural, because TrivialAugment's rotations would make a mirrored ramp look like a rotated one."""
    plain = list(train_transform(PREPROCESS, 32, augment, hflip=False))
    mirroring = list(train_transform(PREPROCESS, 32, augment, hflip=True))
    assert not any(isinstance(step, v2.RandomHorizontalFlip) for step in plain)
    assert [type(step) for step in mirroring if not isinstance(step, v2.RandomHorizontalFlip)] == list(map(type, plain))
    assert len(mirroring) == len(plain) + 1


@pytest.mark.parametrize(("augment", "least"), [("light", 0.5), ("strong", 0.2)])
def test_the_area_of_a_crop(augment: str, least: float):
    """Each pixel of the 64x64 image encodes its row and column, so the area of a crop can be computed."""
    column = torch.arange(64, dtype=torch.uint8) * 4
    image = torch.stack([column.expand(64, 64), column[:, None].expand(64, 64), torch.zeros(64, 64, dtype=torch.uint8)])
    crop = train_transform(PREPROCESS, 64, augment, hflip=False)[0]
    shares = []
    for seed in range(60):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            cropped = crop(image).float() / 4
        width, height = (float(cropped[i].max() - cropped[i].min()) + 1 for i in (0, 1))
        shares.append(width * height / 64**2)
    assert min(shares) > least * 0.85  # resampling blurs the edges
    assert min(shares) < least + 0.15
    assert max(shares) > 0.9


# Lists of steps

ONE_OF_EACH = [
    "crop(0.3)", "hflip(1)", "vflip(1)", "rotate(30)", "color(0.5)", "grayscale(1)", "trivial", "rand_augment",
    "erasing(1)",
]  # fmt: skip


@pytest.mark.parametrize("preset", ["light", "strong"])
def test_a_list_of_the_same_steps_is_the_preset(preset: str):
    image, steps = noise(40, 50), PRESETS[preset]
    for seed in range(5):
        assert torch.equal(view(image, steps, seed), view(image, preset, seed))
    assert min_crop_side(steps) == min_crop_side(preset)
    assert (
        train_transform(PREPROCESS, 32, steps, True).min_side == train_transform(PREPROCESS, 32, preset, True).min_side
    )


@pytest.mark.parametrize("step", ONE_OF_EACH)
def test_each_step_is_a_function_of_the_seed(step: str):
    """It changes the image, and draws from torch's default generator alone, whatever other generators do."""
    image, plain = noise(40, 50), view(noise(40, 50), "none", 0)
    random.seed(0), np.random.seed(0)
    first = [view(image, [step], seed) for seed in range(12)]
    random.seed(1), np.random.seed(1)
    assert all(torch.equal(view(image, [step], seed), first[seed]) for seed in range(12))
    assert all(one.dtype == torch.uint8 and one.shape == plain.shape for one in first)
    assert any(not torch.equal(one, plain) for one in first)
    varied = len({one.numpy().tobytes() for one in first})
    assert varied == 1 if step in ("hflip(1)", "vflip(1)", "grayscale(1)") else varied > 6


def test_all_steps_together_in_their_order_and_a_crop_first():
    made = train_transform(PREPROCESS, 32, [*ONE_OF_EACH[1:], ONE_OF_EACH[0]], hflip=True)
    expected = [
        v2.RandomResizedCrop, v2.RandomHorizontalFlip, v2.RandomVerticalFlip, v2.RandomRotation, v2.ColorJitter,
        v2.RandomGrayscale, v2.TrivialAugmentWide, v2.RandAugment, v2.RandomErasing,
    ]  # fmt: skip
    assert [type(step) for step in made] == expected
    assert made(noise(40, 50)).shape == (3, 32, 32)


def test_without_a_crop_it_is_the_view_of_the_evaluation():
    made, image = train_transform(PREPROCESS, 32, ["hflip(1)"], hflip=True), noise(70, 50)
    evaluation = eval_transform(PREPROCESS, 32)
    assert torch.equal(made(image), evaluation(image).flip(2))
    assert made.min_side == evaluation.min_side
    assert min_crop_side(["hflip(1)"]) == 1


@pytest.mark.parametrize("augment", ["strong", ["rotate", "rand_augment(30)"]])
def test_a_model_that_resizes_bicubically_is_augmented_too(augment: Any):
    """torchvision refuses to rotate and shear bicubically."""
    made = train_transform(Preprocess(interpolation="bicubic"), 32, augment, hflip=True)
    for seed in range(40):
        torch.manual_seed(seed)
        assert made(noise(40, 50)).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ("trivial", "a step is written in a list: data.augment=[trivial]"),
        ("lite", "choose one of auto, none, flip, light, strong, or a list of steps such as [crop(0.3),hflip,trivial]"),
        ([], "is an empty list; write data.augment=none"),
        (["light", "erasing"], "light is not a step but a list of steps: write data.augment=[crop(0.5),erasing]"),
        (["croop"], "there is no step 'croop', did you mean `crop`"),
        (["crop(0)"], "the number of 'crop(0)' must be from 0.01 to 1: the least share of the area"),
        (["crop(x)"], "the number of 'crop(x)' must be"),
        (["rotate(nan)"], "the number of 'rotate(nan)' must be"),
        (["trivial(2)"], "trivial takes no number"),
        (["rand_augment(2.5)"], "from 0 to 30: the strength, a whole number"),
        (["hflip", "hflip(0.3)"], "has the step hflip twice"),
        ([{"crop": 0.3}], "there is no step {'crop': 0.3}"),
        (["hflip"], "has the step hflip, but data.hflip=false"),
    ],
)
def test_what_is_no_augmentation_is_refused(augment: Any, message: str):
    assert message in (augment_problem(augment, "data.augment", hflip=False) or "")
    assert augment_problem(ONE_OF_EACH, "data.augment") is None


@pytest.mark.parametrize(
    ("augment", "hflip", "steps"),
    [
        (["light", "hflip", "trivial"], True, "[crop(0.5),hflip,trivial]"),
        (["crop(0.3)", "strong"], True, "[crop(0.3),hflip,trivial,erasing(0.1)]"),
        (["flip"], False, "none"),
    ],
)
def test_a_preset_in_a_list_is_answered_with_a_list_that_works(augment: list[str], hflip: bool, steps: str) -> None:
    found = augment_problem(augment, "data.augment", hflip=hflip) or ""
    assert found.endswith(f"write data.augment={steps}")
    given = steps if steps == "none" else steps.strip("[]").split(",")
    assert augment_problem(given, "data.augment", hflip=hflip) is None


# The required size of an image


def test_enough_is_twice_what_the_evaluation_view_resizes_to():
    assert eval_transform(PREPROCESS, 224).min_side == 512
    assert train_transform(PREPROCESS, 224, "none", hflip=True).min_side == 512


@pytest.mark.parametrize("augment", ["light", "strong"])
@settings(deadline=None, max_examples=30)
@given(st.integers(20, 200), st.integers(20, 200), st.integers(0, 2**60))
def test_even_the_smallest_crop_has_two_pixels_per_output_pixel(augment, height: int, width: int, seed: int):
    """Images of any shape whose shorter side is exactly `enough` for an output of 8 pixels."""
    steps = train_transform(PREPROCESS, 8, augment, hflip=False)
    scale = steps.min_side / min(height, width)
    shape = torch.empty(3, round(height * scale), round(width * scale), dtype=torch.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        crop: Any = steps[0]
        box = crop.make_params([shape])
    assert min(box["height"], box["width"]) >= 15.5  # a box has whole pixels
