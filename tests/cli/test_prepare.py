"""A copy of an image folder with its large images made smaller."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distil_tl.cli.main import main as distil_tl
from distil_tl.cli.prepare import main
from distil_tl.data import pixels
from distil_tl.data import resize as shrink
from distil_tl.data.decode import decode
from distil_tl.data.resize import resized_name
from distil_tl.data.scan import scan
from distil_tl.train import main as train
from tests.helpers.arguments import small_args
from tests.helpers.image_bytes import png
from tests.helpers.images import draw, make_folder
from tests.helpers.runs import summary_of

BAD = b"this is no image"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Class a has every kind of image, class b plain JPEGs. All bad images are in train."""
    root = tmp_path / "source"
    for folder in ("train/a/deep", "train/b", "val/a", "val/b", "test/b"):
        (root / folder).mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(400, 300).save(root / "train/a/photo.JPG", exif=exif)
    picture(300, 400).save(root / "train/a/drawing.png")
    picture(300, 400).convert("L").save(root / "train/a/deep/scan.tif")
    picture(200, 200).save(root / "train/a/web.webp")
    picture(100, 50).save(root / "train/a/small.bmp")
    picture(300, 64).save(root / "train/a/just right.jpeg")
    (root / "train/a/bad.jpg").write_bytes(BAD)
    (root / "train/a/notes.txt").write_text("left behind")
    for i, folder in enumerate(("train/b", "val/a", "val/b", "test/b")):
        picture(300, 200, i).save(root / folder / "1.jpg")
    whole = (root / "train/b/1.jpg").read_bytes()
    (root / "train/b/cut.jpg").write_bytes(whole[: len(whole) // 2])
    return root


def arguments(source: Path, out: Path, *more: str, workers: int = 0) -> list[str]:
    return [str(source), "--out", str(out), "--resize", "64", f"--workers={workers}", *more]


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "prepared.json").read_text())
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


EXPECTED = {
    "train/a/photo.JPG": ("JPEG", "RGB", (64, 85)),  # upright
    "train/a/drawing.png": ("PNG", "RGB", (64, 85)),
    "train/a/deep/scan.tif.png": ("PNG", "L", (64, 85)),
    "train/a/web.webp.jpg": ("JPEG", "RGB", (64, 64)),
    "train/a/small.bmp": ("BMP", "RGB", (100, 50)),
    "train/a/just right.jpeg": ("JPEG", "RGB", (300, 64)),
    "train/b/1.jpg": ("JPEG", "RGB", (96, 64)),
    "val/a/1.jpg": ("JPEG", "RGB", (96, 64)),
    "val/b/1.jpg": ("JPEG", "RGB", (96, 64)),
    "test/b/1.jpg": ("JPEG", "RGB", (96, 64)),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_large_images_are_made_smaller_and_all_others_copied(source: Path, tmp_path: Path, capsys, workers) -> None:
    out = tmp_path / "new" / "copy"
    assert main(arguments(source, out, workers=workers)) == 0
    files = contents(out)
    assert set(files) == {*EXPECTED, "train/a/bad.jpg", "train/b/cut.jpg", "prepared.json"}
    for name, expected in EXPECTED.items():
        with Image.open(out / name) as image:
            assert (image.format, image.mode, image.size) == expected, name
            assert not image.getexif()
    for name in ("train/a/small.bmp", "train/a/just right.jpeg", "train/a/bad.jpg", "train/b/cut.jpg"):
        assert files[name] == (source / name).read_bytes()
    output = capsys.readouterr().out
    assert f"data.root={out}" in output
    assert "can't be decoded, copied unchanged: " + str(source / "train/a/bad.jpg") in output
    assert "resized: 8; copied unchanged: 4; already done: 0" in output


def test_what_is_not_copied_is_reported(source: Path, tmp_path: Path, capsys) -> None:
    (source / "train/a/._1.jpg").write_bytes(b"x")
    (source / "val/notes.txt").write_bytes(b"x")
    assert main(arguments(source, tmp_path / "copy")) == 0
    output = capsys.readouterr().out
    assert "train: not copied: 2 other files ignored: 1 ._*, 1 .txt\n" in output
    assert "val: not copied: 1 other file ignored: 1 .txt\n" in output


def test_more_extensions(source: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "copy"
    image = picture(300, 200)
    image.save(source / "train" / "b" / "moving.GIF")
    assert main(arguments(source, out)) == 0
    assert not (out / "train/b/moving.GIF.png").exists()
    assert "made from other images" in refused(capsys, *arguments(source, out, "--extensions", "gif"))
    shutil.rmtree(out)
    assert main(arguments(source, out, "--extensions", "gif")) == 0
    assert (out / "train/b/moving.GIF.png").exists()
    assert manifest(out)["images"]["train"] == 10
    assert "--extensions has 'xcf'" in refused(capsys, *arguments(source, out, "--extensions", "xcf"))
    assert resized_name(tmp_path, "a/x.heic") == "a/x.heic.jpg"


def test_a_copy_is_not_continued_with_other_pixels(source: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "copy"
    assert main(arguments(source, out)) == 0
    assert "pixels" not in manifest(out), "usual pixels: copies made before there were digests are continued"
    monkeypatch.setattr(pixels, "digest", lambda _: "0123456789abcdef")
    before = contents(out)
    assert "decoder that gives other pixels" in refused(capsys, *arguments(source, out))
    assert contents(out) == before


def test_the_copy_shows_the_same_images(source: Path, tmp_path: Path) -> None:
    assert main(arguments(source, tmp_path / "copy", "--quality=100")) == 0
    for name, twin in (("a/photo.JPG", "a/photo.JPG"), ("a/drawing.png", "a/drawing.png"), ("a/web.webp",) * 2):
        twin += ".jpg" if name.endswith(".webp") else ""
        whole, small = decode(source / "train" / name), decode(tmp_path / "copy/train" / twin)
        expected = shrink.smaller(whole, 64).float()
        assert (small.float() - expected).abs().mean() < 3, name


def test_prepared_json_describes_the_copy(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    assert main(arguments(source, out)) == 0
    found = manifest(out)
    assert found["complete"] is True
    assert (found["resize"], found["quality"]) == (64, 95)
    assert found["images"] == {"train": 9, "val": 2, "test": 1}
    assert set(found["bad"]) == {"train"}
    assert set(found["bad"]["train"]) == {"a/bad.jpg", "b/cut.jpg"}
    assert "not a readable image" in found["bad"]["train"]["a/bad.jpg"]
    for split in ("train", "val", "test"):
        before = scan(source / split, classes=("a", "b"))
        after = scan(out / split, classes=("a", "b"))
        assert found["source"][split] == before.fingerprint
        assert found["copy"][split] == after.fingerprint
        assert after.targets.tolist() == before.targets.tolist()
    sizes = [scan(root / split).sizes.sum() for root in (source, out) for split in ("train", "val", "test")]
    assert [found["bytes_before"], found["bytes_after"]] == [sum(sizes[:3]), sum(sizes[3:])]


def test_the_bytes_do_not_depend_on_the_number_of_processes(source: Path, tmp_path: Path) -> None:
    assert main(arguments(source, tmp_path / "one")) == 0
    assert main(arguments(source, tmp_path / "two", workers=2)) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_killed_copy_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "copy"
    for i in range(120):
        folder = source / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(600, 500, i).save(folder / f"{i}.jpg")
    command = [sys.executable, "-m", "distil_tl.cli.prepare", *arguments(source, out, workers=1)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(list(out.rglob("*.jpg"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(0.5)
    written = {name: data for name, data in contents(out).items() if name.endswith(".jpg")}
    assert len(written) >= 3
    assert manifest(out)["complete"] is False
    files = {name: (out / name).stat().st_ino for name in written}
    left = out / "train/a" / ".shrink-0123456789abcdef.tmp"
    left.write_bytes(b"half")
    assert main(arguments(source, out)) == 0
    assert manifest(out)["complete"] is True
    assert not left.exists()
    assert contents(out).items() >= written.items()
    assert {name: (out / name).stat().st_ino for name in written} == files  # not made again
    assert main(arguments(source, tmp_path / "whole")) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_ctrl_c_ends_with_status_three_and_keeps_finished_images(
    source: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    out, real, calls = tmp_path / "copy", shrink.ShrinkDataset.__getitem__, list[int]()

    def interrupted(self: shrink.ShrinkDataset, i: int) -> shrink.Outcome:
        calls.append(i)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, i)

    monkeypatch.setattr(shrink.ShrinkDataset, "__getitem__", interrupted)
    assert main(arguments(source, out)) == 3
    assert "run the same command to resume" in capsys.readouterr().err
    assert main(arguments(source, out)) == 0
    assert manifest(out)["complete"] is True
    assert set(manifest(out)["bad"]["train"]) == {"a/bad.jpg", "b/cut.jpg"}


def test_a_complete_copy_is_left_alone_and_lost_files_are_restored(source: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "copy"
    assert main(arguments(source, out)) == 0
    before = contents(out)
    (out / "train/a/drawing.png").unlink()
    (out / "train/a/bad.jpg").unlink()
    assert main(arguments(source, out)) == 0
    assert contents(out) == before
    monkeypatch.setattr(shrink.ShrinkDataset, "__getitem__", None)  # it must not be called
    assert main(arguments(source, out)) == 0
    assert contents(out) == before


def test_training_on_the_copy(tmp_path: Path) -> None:
    source, out = make_folder(tmp_path / "source", {"train": 24, "val": 9}), tmp_path / "copy"
    (source / "train/noise/bad.png").write_bytes(BAD)
    assert distil_tl(["prepare", str(source), "--out", str(out), "--resize=24", "--workers=0"]) == 0
    run_dir = tmp_path / "run"
    args = [*small_args(out), f"run_dir={run_dir}", "stages.full.epochs=0", "data.on_bad_image=skip"]
    assert train(args) == 0
    assert list(summary_of(run_dir)["bad_images"]["train"]["images"]) == ["noise/bad.png"]


# Refusals.


def refused(capsys: Any, *args: str) -> str:
    assert main(list(args)) == 2
    message: str = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_an_unsuitable_output_folder_is_refused(source: Path, tmp_path: Path, capsys) -> None:
    for out in (source, source / "train", source / "copy", tmp_path):
        assert "must not contain each other" in refused(capsys, *arguments(source, out))
    (tmp_path / "link").symlink_to(source)
    assert "must not contain each other" in refused(capsys, *arguments(source, tmp_path / "link" / "copy"))
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(capsys, *arguments(source, tmp_path / "file"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert "holds other files" in refused(capsys, *arguments(source, tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_wrong_options_are_refused_together(source: Path, tmp_path: Path, capsys) -> None:
    message = refused(capsys, str(source), "--out", str(tmp_path / "copy"), "--resize=7", "--quality=0", "--workers=-1")
    for part in ("--resize must", "--quality must", "--workers must"):
        assert part in message
    assert "is not a folder" in refused(capsys, *arguments(tmp_path / "nowhere", tmp_path / "copy"))
    with pytest.raises(SystemExit):
        main([str(source), "--out", str(tmp_path / "copy"), "--val", "20%"])
    assert "argument --val: '20%' is not a number; write 0.2" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()


def test_a_copy_with_other_settings_is_not_resumed(source: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "copy"
    assert main(arguments(source, out)) == 0
    before = contents(out)
    assert "made with another --quality" in refused(capsys, *arguments(source, out, "--quality=90"))
    picture(99, 99).save(source / "train/a/more.png")
    assert "made from other images" in refused(capsys, *arguments(source, out))
    (source / "train/a/more.png").unlink()
    assert contents(out) == before
    (out / "prepared.json").write_text("{")
    assert "can't be read" in refused(capsys, *arguments(source, out))


def test_too_little_disk_space_is_refused_before_copying(source: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000))
    assert "the copy will take about" in refused(capsys, *arguments(source, tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


def test_a_copy_on_a_full_disk_stops_and_can_be_resumed(source: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    real, count = Path.replace, list[Path]()

    def full(self: Path, target: Path) -> Path:
        if self.name.startswith(".shrink"):
            count.append(self)
            if len(count) > 3:
                raise OSError(28, "No space left on device", str(self))
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        message = refused(capsys, *arguments(source, tmp_path / "copy"))
    assert "No space left on device; run the same command to resume" in message
    assert str(tmp_path / "copy/train/a") in message
    assert not list((tmp_path / "copy").rglob("*.tmp"))
    assert main(arguments(source, tmp_path / "copy")) == 0


def test_a_read_error_does_not_make_a_bad_image(source: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    real = Path.read_bytes

    def read(self: Path) -> bytes:
        if self.name == "drawing.png":
            raise OSError(5, "Input/output error", str(self))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert "drawing.png: Input/output error" in refused(capsys, *arguments(source, tmp_path / "copy"))


def test_nothing_is_written_through_links(source: Path, tmp_path: Path, capsys) -> None:
    out, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    assert main(arguments(source, out)) == 0
    shutil.move(out / "train/a", elsewhere)
    (out / "train/a").symlink_to(elsewhere)
    (elsewhere / "drawing.png").unlink()
    assert "is a symbolic link to another place" in refused(capsys, *arguments(source, out))
    assert not (elsewhere / "drawing.png").exists()


def test_odd_file_names_are_kept(tmp_path: Path, capsys) -> None:
    source, out = tmp_path / "source", tmp_path / "copy"
    names = [os.fsdecode(b"\xff.bmp"), "a\nb.png", "\u00fc" * 120 + ".jpg", "..png", "$(touch it).png"]
    (source / "train/a").mkdir(parents=True)
    for name in names:
        draw("noise", np.random.default_rng(0)).resize((99, 99)).save(source / "train/a/x.png")
        (source / "train/a/x.png").rename(source / "train/a" / name)
    assert main(arguments(source, out)) == 0
    assert {path.name for path in (out / "train/a").iterdir()} == {names[0] + ".png", *names[1:]}


def test_names_of_resized_images(tmp_path: Path) -> None:
    for name, expected in (
        ("a/x.JPEG", "a/x.JPEG"), ("a/x.png", "a/x.png"), ("a/x.bmp", "a/x.bmp.png"), ("a/x.WebP", "a/x.WebP.jpg")
    ):  # fmt: skip
        assert resized_name(tmp_path, name) == expected
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.bmp.png").write_text("")
    (tmp_path / "a/x.bmp_.png").write_text("")
    assert resized_name(tmp_path, "a/x.bmp") == "a/x.bmp__.png"


# Whether a copy helps.


def test_it_warns_when_a_copy_will_hardly_help(tmp_path: Path, capsys) -> None:
    source = make_folder(tmp_path / "source", {"train": 12, "val": 3})
    assert main(arguments(source, tmp_path / "copy")) == 0
    assert "of 12 sampled images, 0 have a shorter side of more than 64" in capsys.readouterr().out


def test_it_says_up_to_which_size_no_crop_is_enlarged(source: Path, tmp_path: Path, capsys) -> None:
    assert main(arguments(source, tmp_path / "copy")) == 0
    output = capsys.readouterr().out
    assert "hardly" not in output
    assert "up to data.image_size=39 with data.augment=light, 24 with strong" in output


def test_a_picture_too_long_for_a_jpeg_is_copied(tmp_path: Path) -> None:
    path = tmp_path / "source/train/a/long.png"
    path.parent.mkdir(parents=True)
    Image.new("L", (70_000, 65)).save(path)
    assert main(arguments(tmp_path / "source", tmp_path / "copy")) == 0
    assert (tmp_path / "copy/train/a/long.png").read_bytes() == path.read_bytes()
    assert torch.equal(decode(path), decode(tmp_path / "copy/train/a/long.png"))


def test_values_of_more_than_8_bits_are_kept_or_it_is_said(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "source/train/a"
    folder.mkdir(parents=True)
    ramp = np.linspace(1000, 4095, 300 * 200).reshape(300, 200)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ramp.astype(np.uint16)).save(folder / "deep.png", exif=exif)
    Image.fromarray(ramp.astype(np.uint16)).save(folder / "deep.tif")
    Image.fromarray(ramp.astype(np.uint16)).save(folder / "called.jpg", "PNG")
    Image.fromarray((ramp - 2000).astype(np.int32)).save(folder / "hounsfield.tif")
    Image.fromarray(ramp.astype(np.float32)).save(folder / "float.tif")
    (folder / "colour.png").write_bytes(png(70, 70, 16, 2, (b"\0" + b"\x0f\xff\x00\x10\x00\x20" * 70) * 70))
    out = tmp_path / "copy"
    assert main(arguments(tmp_path / "source", out)) == 0
    for name, size in (("deep.png", (96, 64)), ("deep.tif.png", (64, 96))):
        with Image.open(out / "train/a" / name) as image:
            assert (image.mode, image.size) == ("I;16", size)
            values = np.rot90(np.asarray(image)) if name == "deep.png" else np.asarray(image)
        expected = ramp.reshape(100, 3, 200).mean(axis=(1, 2))  # the rows of the copy, but for a factor of 96 / 100
        assert np.abs(values.mean(axis=1) - np.interp(np.linspace(0, 99, 96), range(100), expected)).max() < 20
        assert values.max() <= 4095 + 1
        assert len(np.unique(values)) > 1000
    for name in ("called.jpg", "hounsfield.tif", "float.tif"):
        assert (out / "train/a" / name).read_bytes() == (folder / name).read_bytes()
    output = capsys.readouterr().out
    assert "\n2 16-bit grey images: resized, as PNG of 16 bits\n" in output
    assert "\n3 images of floats or 32-bit integers: copied unchanged, " in output
    assert "\n1 images of 16 bits per colour: resized to 8 bits, " in output
