"""Real folders: files that are not images, unusual images, splits that are too small."""

from __future__ import annotations

import itertools
import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from distil_tl.data.sampler import epoch_order
from distil_tl.train import main
from tests.helpers.arguments import small_args
from tests.helpers.image_bytes import png
from tests.helpers.images import CLASSES, draw, make_folder
from tests.helpers.ranks import lines, run_ranks, train
from tests.helpers.runs import evaluated, refusal, refused, stopped_train, summary_of, traced_train

HEAD_ALONE = ["stages.full.epochs=0"]


def picture() -> Image.Image:
    return draw("circles", np.random.default_rng(1))


def truncated(path: Path) -> None:
    picture().save(path, quality=95)
    path.write_bytes(path.read_bytes()[:-400])


def renamed(path: Path) -> None:
    path.write_text("These are my notes, and no picture.\n")


def zero_bytes(path: Path) -> None:
    path.touch()


def bomb(path: Path) -> None:
    """A complete PNG of 600 megapixels, all black, in 75 kilobytes."""
    width, height = 25_000, 24_000
    path.write_bytes(png(width, height, 1, 0, bytes((width // 8 + 1) * height)))


def deep(path: Path) -> None:
    Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257).save(path)


def animated(path: Path) -> None:
    picture().save(path, save_all=True, append_images=[picture().rotate(180)], duration=100)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(path, exif=exif)


# Files that cannot be used, and the beginning of the reason.
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated.jpg": (truncated, "damaged image: "),
    "renamed.jpg": (renamed, "not a readable image (JPEG, PNG"),
    "zero.png": (zero_bytes, "the file is empty"),
    "bomb.png": (bomb, "25000 x 24000 pixels are more than the 178,956,970 allowed; make it smaller"),
}

# Unusual images that can be used.
ODD: dict[str, Callable[[Path], None]] = {
    "16-bit.png": deep,
    "palette.png": lambda path: picture().quantize(16).save(path, transparency=3),
    "cmyk.jpg": lambda path: picture().convert("CMYK").save(path),
    "alpha.png": lambda path: picture().convert("RGBA").save(path),
    "exif.jpeg": turned,
    "1x1.png": lambda path: Image.new("RGB", (1, 1), "red").save(path),
    "animated.webp": animated,
    "animated.gif": animated,  # not one of ImageFolder's extensions, so ignored
}


def add(folder: Path, *names: str) -> None:
    for name in names:
        (ODD[name] if name in ODD else BAD[name][0])(folder / name)


def found_folder(root: Path) -> Path:
    """40 images to train on, 4 of them bad, and 13 for validation, 3 of them bad.

    40 images are five complete global batches: no image is dropped from an epoch.
    """
    make_folder(root, {"train": 29, "val": 10})
    add(root / "train" / "circles", *ODD, "truncated.jpg", "renamed.jpg")
    add(root / "train" / "noise", "zero.png", "bomb.png")
    add(root / "val" / "stripes", "truncated.jpg", "renamed.jpg", "zero.png")
    return root


FOUND = {
    "train": ["circles/renamed.jpg", "circles/truncated.jpg", "noise/bomb.png", "noise/zero.png"],
    "val": ["stripes/renamed.jpg", "stripes/truncated.jpg", "stripes/zero.png"],
}


def reason_of(relative: str) -> str:
    return BAD[Path(relative).name][1]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return found_folder(tmp_path_factory.mktemp("found"))


@pytest.fixture(scope="module")
def skipping(found: Path) -> list[str]:
    return [*small_args(found), *HEAD_ALONE, "stages.head.epochs=2", "data.on_bad_image=skip", "data.augment=strong"]


def weigh_and_train(clean: list[str], args: list[str]) -> tuple[Any, float]:
    """`traced_train(args)` after training with `clean`, and by how many MiB the peak of memory use grew."""
    assert train(clean) == 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = traced_train(args)
    return result, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.fixture(scope="module")
def runs(
    found: Path, folder: Path, skipping: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[Path, list[list[tuple[int, str]]]]]:
    """By world size: the run directory, and the sorted (image, hash of its tensor) of each global batch."""
    where = tmp_path_factory.mktemp("skipping")
    by_world = {}
    for world in (1, 2, 4):
        args = [*skipping, f"run_dir={where}/{world}"]
        if world == 1:
            clean = [*small_args(folder), *HEAD_ALONE, f"run_dir={where}/clean"]
            (result, growth), *_ = run_ranks(1, weigh_and_train, clean, args)
            assert growth < 100, f"the peak of memory grew by {growth:.0f} MiB"  # the bomb's pixels: 600 at least
            results = [result]
        else:
            results = run_ranks(world, traced_train, args)
        assert [status for status, _ in results] == [0] * world
        batches = [sorted(itertools.chain(*parts)) for parts in zip(*(seen for _, seen in results), strict=True)]
        by_world[world] = (where / str(world), batches)
    return by_world


@pytest.mark.parametrize("name", BAD)
def test_the_error_for_a_bad_image_names_its_class_the_reason_and_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    root = make_folder(tmp_path / "data", {"train": 7, "val": 3})
    add(root / "train" / "stripes", name)
    message = refused([*small_args(root), f"run_dir={tmp_path}/run"], capsys)
    assert f"can't use the image {root}/train/stripes/{name} of class stripes: {BAD[name][1]}" in message
    assert "Repair or remove it, or skip such images with data.on_bad_image=skip" in message
    assert "`distil-tl doctor --images`, with the arguments of this run, names all of them" in message
    assert len(message.splitlines()) == 1


def test_unusual_images_are_not_bad_images(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"train": 9, "val": 3})
    for split in ("train", "val"):
        add(root / split / "noise", *ODD)
    run_dir = tmp_path / "run"
    assert main([*small_args(root), *HEAD_ALONE, "data.augment=strong", f"run_dir={run_dir}"]) == 0
    assert summary_of(run_dir)["bad_images"] == {}
    assert evaluation_of(run_dir)["n"] == 3 + len(ODD) - 1


def evaluation_of(run_dir: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((run_dir / "evaluation.json").read_text())
    return figures


def test_skipping_completes_the_training_and_lists_the_skipped_images(runs: Any) -> None:
    for world, (run_dir, _) in runs.items():
        summary = summary_of(run_dir)
        assert summary["status"] == "completed"
        assert summary["stages"]["head"]["train_images"] == 2 * 36
        listed = summary["bad_images"]
        assert {split: list(listed[split]["images"]) for split in listed} == FOUND, world
        assert {split: listed[split]["count"] for split in listed} == {"train": 4, "val": 3}
        for images in (listed["train"]["images"], listed["val"]["images"]):
            assert all(reason.startswith(reason_of(name)) for name, reason in images.items())


def test_there_is_one_warning_per_image_over_all_ranks_epochs_and_evaluations(runs: Any, found: Path) -> None:
    for world, (run_dir, _) in runs.items():
        said = "".join(path.read_text() for path in (run_dir / "logs").iterdir())
        warned = [line for line in said.splitlines() if "skipped the image" in line]
        assert len(warned) == 7, (world, warned)
        for split, names in FOUND.items():
            for name in names:
                image = f"skipped the image {found}/{split}/{name} of class {Path(name).parent}: {reason_of(name)}"
                assert sum(image in line for line in warned) == 1, (world, image)


def test_global_batches_are_the_same_on_any_number_of_ranks_and_losses_close(runs: Any) -> None:
    _, alone = runs[1]
    assert [len(batch) for batch in alone] == [8] * 10
    losses = {world: [line["loss"] for line in lines(run_dir)] for world, (run_dir, _) in runs.items()}
    for world, (_, batches) in runs.items():
        assert batches == alone, world
        assert losses[world] == pytest.approx(losses[1], rel=2e-4), world


def test_validation_counts_only_usable_images(runs: Any, found: Path, tmp_path: Path) -> None:
    """The results equal those of an evaluation after the bad files are removed."""
    root = tmp_path / "cleaned"
    shutil.copytree(found, root)
    for name in FOUND["val"]:
        (root / "val" / name).unlink()
    for world, (run_dir, _) in runs.items():
        figures = evaluation_of(run_dir)
        assert figures["n"] == sum(map(sum, figures["confusion_matrix"])) == 10
        assert not {mistake["path"] for mistake in figures["mistakes"]} & {f"{found}/val/{p}" for p in FOUND["val"]}
        out = tmp_path / f"{world}.json"
        assert evaluated([str(run_dir), f"data.root={root}", "--json", str(out)]) == 0
        cleaned = json.loads(out.read_text())
        for key in ("n", "top1", "macro_f1", "confusion_matrix"):
            assert cleaned[key] == figures[key], key
        assert cleaned["loss"] == pytest.approx(figures["loss"], rel=1e-5)


def test_a_resumed_run_keeps_the_list(runs: Any, skipping: list[str], tmp_path: Path) -> None:
    """Stopped after the first epoch, in which all bad images were found: no new ones follow."""
    run_dir = tmp_path / "run"
    assert run_ranks(1, stopped_train, [*skipping, f"run_dir={run_dir}"], 7, 0, signal.SIGUSR2) == [3]
    assert {k: v["count"] for k, v in summary_of(run_dir)["bad_images"].items()} == {"train": 4, "val": 3}
    saved = json.loads((run_dir / "checkpoints" / "last" / "state.json").read_text())
    assert {split: list(images) for split, images in saved["run"]["bad_images"].items()} == FOUND
    assert run_ranks(1, train, [*skipping, f"run_dir={run_dir}"]) == [0]
    assert summary_of(run_dir)["bad_images"] == summary_of(runs[1][0])["bad_images"]
    said = (run_dir / "logs" / "rank-0.log").read_text()
    assert said.count("skipped the image") == 7
    one, two = (load_file(path / "checkpoints" / "last" / "weights.safetensors") for path in (run_dir, runs[1][0]))
    assert all(torch.equal(one[key], two[key]) for key in two)


def test_a_run_stopped_by_a_bad_image_can_be_resumed_with_skipping(tmp_path: Path) -> None:
    """As the message of the stopped run says."""
    root = make_folder(tmp_path / "data", {"train": 16, "val": 3})
    image_at(root, position=9).write_bytes(b"")
    run_dir = tmp_path / "run"
    args = [*small_args(root), *HEAD_ALONE, "checkpoint.every_steps=1", f"run_dir={run_dir}"]
    ((status, message),) = run_ranks(1, refusal, args)  # a process, whose end waits for the checkpoint
    assert status == 2
    assert "data.on_bad_image=skip" in message
    assert (run_dir / "checkpoints" / "step-00000001").exists()
    assert main([*args, "data.on_bad_image=skip"]) == 0
    assert "resuming from step 1" in (run_dir / "logs" / "rank-0.log").read_text()
    assert summary_of(run_dir)["bad_images"]["train"]["count"] == 1


def image_at(root: Path, position: int) -> Path:
    """The image at a position of the first epoch's order."""
    images = sorted((root / "train").rglob("*.png"))
    return images[int(epoch_order(len(images), 0, "head", 0)[position])]


@pytest.mark.parametrize("world", [1, 2])
def test_a_batch_of_only_bad_images_changes_nothing(tmp_path: Path, world: int) -> None:
    root = make_folder(tmp_path / "data", {"train": 16, "val": 3})
    for position in range(8):
        image_at(root, position).write_bytes(b"")
    run_dir = tmp_path / "run"
    args = [*small_args(root), *HEAD_ALONE, "data.on_bad_image=skip", "checkpoint.every_steps=1", "checkpoint.keep=9",
            "optim.weight_decay=0", "optim.momentum=0", f"run_dir={run_dir}"]  # fmt: skip
    assert run_ranks(world, train, args) == [0] * world
    summary = summary_of(run_dir)
    assert summary["bad_images"]["train"]["count"] == 8
    assert summary["stages"]["head"]["train_images"] == 8
    assert [line["images_per_second"] > 0 for line in lines(run_dir, window="interval")] == [False, True]
    assert all(np.isfinite(line["loss"]) for line in lines(run_dir))
    head = [load_file(run_dir / "checkpoints" / f"step-0000000{step}" / "weights.safetensors") for step in (1, 2)]
    fresh = fresh_weights(root)
    assert all(torch.equal(head[0][key], fresh[key]) for key in fresh)
    assert not torch.equal(head[1]["fc.weight"], fresh["fc.weight"])


def fresh_weights(root: Path) -> dict[str, torch.Tensor]:
    from distil_tl.config import load
    from distil_tl.models.transfer import build

    config, _ = load(small_args(root))
    return build(config.model, len(CLASSES), image_size=32, seed=config.seed).module.state_dict()


# Small and empty splits.


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_a_usable_image_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    root = make_folder(tmp_path / "data", {"train": 8, "val": 3})
    for path in (root / split).rglob("*.png"):
        path.write_bytes(b"")
    run_dir = tmp_path / "run"
    message = refused([*small_args(root), "data.on_bad_image=skip", f"run_dir={run_dir}"], capsys)
    assert f"none of the images read from {root}/{split} can be used, for example " in message
    assert ".png: the file is empty" in message
    assert summary_of(run_dir)["status"] == "failed"


def test_one_validation_image_on_three_ranks(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(folder / "train", root / "train")
    make_folder(root, {"val": 1})
    args = [*small_args(root), *HEAD_ALONE, "data.global_batch_size=6"]
    figures = []
    for world in (1, 3):
        run_dir = tmp_path / str(world)
        assert run_ranks(world, train, [*args, f"run_dir={run_dir}"]) == [0] * world
        figures.append(evaluation_of(run_dir))
    assert [f["n"] for f in figures] == [1, 1]
    assert figures[0]["confusion_matrix"] == figures[1]["confusion_matrix"]
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=1e-4)


def test_a_single_class_can_be_trained(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"train": 16, "val": 3}, classes=("noise",))
    run_dir = tmp_path / "run"
    assert main([*small_args(root), *HEAD_ALONE, f"run_dir={run_dir}"]) == 0
    figures = evaluation_of(run_dir)
    assert (figures["n"], figures["top1"], figures["loss"], figures["confusion_matrix"]) == (3, 1.0, 0.0, [[3]])
    assert (run_dir / "report.html").exists()


@pytest.mark.parametrize("leave", [[], ["noise"]], ids=["no class", "a class without images"])
def test_an_empty_validation_split_is_refused_by_all_ranks(tmp_path: Path, leave: list[str]) -> None:
    root = make_folder(tmp_path / "data", {"train": 16})
    (root / "val").mkdir()
    for name in leave:
        (root / "val" / name).mkdir()
    ended = run_ranks(2, refusal, [*small_args(root), f"run_dir={tmp_path}/run"])
    assert [status for status, _ in ended] == [2, 2]
    said = "no images in any of the 1 class folders" if leave else "one sub-folder per class"
    assert said in ended[0][1]
    assert str(root / "val") in ended[0][1]
    assert ended[1][1] == "", "printed once"
    assert not (tmp_path / "run").exists()
