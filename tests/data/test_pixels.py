"""The digests of what the installed decoders give, and what is refused when they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distil_tl.data import pixels
from distil_tl.data.config import DataConfig
from distil_tl.data.decode import ImageError, decode
from distil_tl.data.pixels import (
    FORMATS,
    REFERENCES,
    USUAL,
    agree_on_pixels,
    digest,
    installed_decoders,
    pixel_digests,
    refuse_changed_pixels,
    unusual_pixels,
)
from distil_tl.distributed.launch_env import Launch
from distil_tl.distributed.process_group import DistInfo
from distil_tl.utils.errors import UserError

ALL = DataConfig(extensions=["avif", "heic"])


@pytest.fixture
def fresh() -> Any:
    digest.cache_clear()
    yield
    digest.cache_clear()


def replace_decode(monkeypatch: pytest.MonkeyPatch, changed: str, change: Any) -> None:
    """Let `change` be what decodes the reference images of format `changed`."""

    def other(path: Path, **how: Any) -> torch.Tensor:
        return change(path, **how) if path.name.startswith(changed.lower()) else decode(path, **how)

    monkeypatch.setattr(pixels, "decode", other)


def brighter(path: Path, **how: Any) -> torch.Tensor:
    image = decode(path, **how).clone()
    image[0, 0, 0] ^= 1
    return image


def missing(path: Path, **_: Any) -> torch.Tensor:
    raise ImageError(path, "no decoder")


def test_there_are_reference_images_of_each_format() -> None:
    names = sorted(path.name for path in REFERENCES.iterdir())
    assert {name.partition("-")[0] for name in names} == {name.lower() for name in FORMATS}


def test_the_decoders_here_give_the_usual_pixels() -> None:
    """Fails with a libjpeg other than libjpeg-turbo: caches of features are then not shared with other machines."""
    assert pixel_digests(DataConfig()) == USUAL
    assert unusual_pixels(DataConfig()) == {}, "the keys of caches of features are those from before there were digests"


def test_one_bit_of_one_pixel_changes_the_digest(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    replace_decode(monkeypatch, "JPEG", brighter)
    found = unusual_pixels(DataConfig())
    assert list(found) == ["JPEG"]
    assert len(found["JPEG"]) == 16
    assert found["JPEG"] != USUAL["JPEG"]


def test_a_format_without_a_decoder_has_an_empty_digest(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    replace_decode(monkeypatch, "HEIF", missing)
    assert pixel_digests(ALL)["HEIF"] == ""
    assert installed_decoders()["HEIF"] == {"decoder": None, "pixels": ""}
    alone = DistInfo(Launch(), torch.device("cpu"), 1.0)
    with pytest.raises(UserError, match=r"no decoder for heic \(data\.extensions\) is installed: pip install"):
        agree_on_pixels(alone, ALL)
    agree_on_pixels(alone, DataConfig())


def test_ranks_that_decode_differently_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = DistInfo(Launch(), torch.device("cpu"), 1.0)

    def others(_: DistInfo, own: list[Any]) -> list[Any]:
        _, digests, names = own
        return [own, ["node7", digests | {"JPEG": "f" * 16}, names | {"JPEG": "Pillow 9.0"}], ["node8", digests, names]]

    monkeypatch.setattr(pixels, "gather_objects", others)
    with pytest.raises(UserError, match=r"decode JPEG images to different pixels: .* on .*, Pillow 9\.0 on node7;"):
        agree_on_pixels(alone, DataConfig())
    monkeypatch.setattr(pixels, "gather_objects", lambda _, own: [own, ["node7", own[1], {"JPEG": "x", "WEBP": "y"}]])
    agree_on_pixels(alone, DataConfig())  # another decoder, the same pixels


def test_a_changed_decoder_is_refused_on_resume(monkeypatch: pytest.MonkeyPatch, fresh: None, tmp_path: Path) -> None:
    saved = pixel_digests(DataConfig())
    refuse_changed_pixels(saved, tmp_path)
    refuse_changed_pixels({}, tmp_path)  # a checkpoint of an early version
    digest.cache_clear()
    replace_decode(monkeypatch, "JPEG", brighter)
    with pytest.raises(UserError, match=r"image decoder \(JPEG by .*\) gives other pixels than the one that .* was tr"):
        refuse_changed_pixels(saved, tmp_path)
