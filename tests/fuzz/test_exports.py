"""Exports to any place, models with any class names or damage, and any image for the script beside a model."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from distil_tl.cli import export, predict, predictions
from distil_tl.data.decode import ImageError, decode
from distil_tl.data.transforms import eval_transform
from distil_tl.export import predict as script
from distil_tl.export.comparison import Answer, Comparison
from distil_tl.export.names import PREPROCESS, SIDES
from distil_tl.export.to_onnx import describe
from distil_tl.inference import RestoredModel
from distil_tl.models.preprocess import Preprocess
from distil_tl.utils.errors import UserError
from tests.fuzz.onnx_models import damaged, model
from tests.fuzz.running import End, bounded, explore, fault_of, in_child, run_main
from tests.fuzz.test_targets import each_place
from tests.fuzz.test_trees import fresh, restored  # noqa: F401 - a fixture
from tests.fuzz.trees import Node, build, images, real_images, trees
from tests.helpers.image_bytes import saved

LONG = pytest.mark.fuzz


def run_script(args: list[str]) -> End:
    """The end of `predict.py` with these arguments."""

    def main(args: list[str]) -> int:
        with mock.patch.object(sys, "argv", ["predict.py", *args]):
            return script.main()

    limit = Image.MAX_IMAGE_PIXELS
    try:
        return run_main(main, args)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def quick_export(model: RestoredModel, data: Path) -> Iterator[None]:
    """Exports of this model without the work of torch and onnxruntime, whose outcome does not depend on the place."""
    model.config.data.root = str(data)
    answers = Comparison([Answer(0, 0, 0, 1.0, 0.0)])
    with ExitStack() as stack:
        for name, result in {
            "distil_tl.cli.export.refuse_other_than_run": None,
            "distil_tl.cli.exports.restore_model": model,
            "distil_tl.cli.exports.provenance": {"distil_tl": "1"},
            "distil_tl.cli.exports.to_onnx": one_model(),
            "distil_tl.cli.exports.OnnxModel": None,
            "distil_tl.export.comparison.compare": answers,
            "distil_tl.export.library._check": None,
        }.items():
            stack.enter_context(mock.patch(name, return_value=result))
        yield


def one_model() -> bytes:
    return model(["cat", "dog"])


@LONG
def test_a_model_at_any_place(tmp_path: Path, restored: RestoredModel) -> None:  # noqa: F811 - the fixture
    def run(root: Path, place: Path) -> End:
        with quick_export(restored, root / "data"):
            return run_main(export.main, ["run", f"--output={place}"])

    each_place(tmp_path, run, folder=True, ending=".onnx")


@LONG
def test_a_folder_at_any_place(tmp_path: Path, restored: RestoredModel) -> None:  # noqa: F811 - the fixture
    def run(root: Path, place: Path) -> End:
        with quick_export(restored, root / "data"):
            return run_main(export.main, ["run", "--format=safetensors", f"--output={place}"])

    each_place(tmp_path, run, folder=True)


@pytest.mark.parametrize(
    "kind", ["text", "other script", "link to text", "folder", "pipe", "device", "dangling", "own"]
)
def test_what_is_in_the_place_of_the_script(kind: str, tmp_path: Path, restored: RestoredModel) -> None:  # noqa: F811
    data, place = tmp_path / "x" / "data", tmp_path / "script" / "predict.py"
    build(data, [])
    place.parent.mkdir()
    (tmp_path / "text").write_text("of the user")
    own = Path(script.__file__).read_bytes()
    if kind in ("text", "other script"):
        place.write_text("of the user" if kind == "text" else "import sys\n")
    elif kind == "own":
        place.write_bytes(own[:-1])
    elif kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        targets = {"link to text": tmp_path / "text", "device": Path("/dev/null"), "dangling": tmp_path / "nowhere"}
        place.symlink_to(targets[kind])
    before = os.lstat(place)
    with quick_export(restored, data):
        end = run_main(export.main, ["run", "-o", str(place.parent / "model.onnx")])
    assert fault_of(end) == ""
    assert end.status == (0 if kind in ("own", "dangling") else 2), end
    assert (tmp_path / "text").read_text() == "of the user"
    assert os.lstat(place).st_mode == before.st_mode
    if end.status == 0:
        assert place.read_bytes() == own
    else:
        assert os.lstat(place).st_ino == before.st_ino
        assert list(place.parent.iterdir()) == [place]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("picture") / "1.png"
    path.write_bytes(next(data for data in real_images()["png"] if Image.open(io.BytesIO(data)).mode == "RGB"))
    return path


def by_both(file: Path, picture: Path, *more: str) -> tuple[End, End, str]:
    """The ends of the package and of the script for a model, and what is wrong with them."""
    ends, outputs = [], [file.with_name("1.csv"), file.with_name("2.csv")]
    paths = [str(picture), *more]
    ends.append(run_main(predict.main, [str(file), *paths, "-o", str(outputs[0]), "--workers=0", "--device=cpu"]))
    ends.append(run_script([f"--model={file}", *paths, "-o", str(outputs[1])]))
    fault = fault_of(ends[0]) or fault_of(ends[1])
    for end, output in zip(ends, outputs, strict=True):
        if not fault and (end.status == 0) != output.exists():
            fault = f"status {end.status}, and {'an' if output.exists() else 'no'} output: {end.err}"
    if not fault and ends[0].status == ends[1].status == 0 and outputs[0].read_bytes() != outputs[1].read_bytes():
        fault = f"different rows: {outputs[0].read_text()}{outputs[1].read_text()}"
    for output in outputs:
        output.unlink(missing_ok=True)
    return ends[0], ends[1], fault


@pytest.mark.parametrize("examples", [20, pytest.param(1_000, marks=LONG)])
def test_a_damaged_model(examples: int, picture: Path, tmp_path: Path) -> None:
    import onnxruntime  # noqa: F401 - once, for all processes

    file = tmp_path / "model.onnx"

    def body(content: bytes) -> tuple[None, str, object]:
        file.write_bytes(content)
        fault = in_child(lambda: by_both(file, picture)[2])
        return None, fault or ("changed" if file.read_bytes() != content else ""), content

    explore(damaged(), examples, body)


names = st.lists(
    st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=6)
    | st.sampled_from(["a,b", '"', "a\nb", "\r", "\x1b[31m", "\udce9", "猫", "'", " ", "error", "path", "x" * 5000]),
    min_size=1, max_size=4, unique=True,
)  # fmt: skip


@pytest.mark.parametrize("examples", [15, pytest.param(1500, marks=LONG)])
def test_class_names(examples: int, picture: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"

    def body(classes: list[str]) -> tuple[End, str, object]:
        file.write_bytes(model(classes))
        one, _, fault = by_both(file, picture, "--all")
        return one, fault or ("" if one.status == 0 else f"refused: {one.err}"), classes

    explore(names, examples, body)


preprocesses = st.builds(
    lambda size, interpolation, mode: Preprocess(
        mean=(0.5, 0.25, 0.75), interpolation=interpolation, crop_size=size[0], resize_size=size[1], crop_mode=mode
    ),
    st.sampled_from([(24, 24), (24, 28), (8, 64), (33, 40)]),
    st.sampled_from(["bilinear", "bicubic", "nearest"]),
    st.sampled_from(list(SIDES)),
)


@st.composite
def pictures(draw: st.DrawFn) -> bytes:
    """A JPEG or PNG of any mode, size and orientation, which may be damaged; or another image."""
    if draw(st.integers(0, 2)) == 0:
        return draw(images())[1]
    width, height = draw(st.integers(1, 90)), draw(st.sampled_from([1, 2, 23, 24, 28, 56, 57, 112, 113, 300]))
    width, height = draw(st.permutations([width, height]))
    pixels = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 256, (height, width, 4), dtype=np.uint8)
    kind = draw(st.sampled_from(["JPEG", "PNG"]))
    modes = ["RGB", "RGB", "L", "CMYK", "YCbCr", "P", "RGBA", "LA", "1", "I;16", "I"]
    mode = draw(st.sampled_from(modes))
    image = Image.fromarray(pixels[..., :3])
    options: dict[str, object] = {}
    if draw(st.booleans()):
        exif = Image.Exif()
        exif[0x0112] = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 77, "x"]))
        options["exif"] = exif
    if kind == "JPEG":
        options |= {
            "quality": draw(st.integers(1, 100)),
            "progressive": draw(st.booleans()),
            "subsampling": draw(st.integers(0, 2)),
        }
    with suppress(OSError, ValueError, KeyError, TypeError, struct.error):
        return saved(image.convert("I" if mode == "I;16" else mode), kind, **options)
    options.pop("exif", None)
    return saved(image, kind)


@pytest.mark.parametrize("examples", [60, pytest.param(10_000, marks=LONG)])
def test_an_image_for_the_script(examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is prepared to the bytes of the package, or refused."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as the script does
    path = tmp_path / "image"

    def body(example: tuple[bytes, Preprocess]) -> tuple[End, str, object]:
        content, preprocess = example
        path.write_bytes(content)
        size, own, theirs = preprocess.crop_size, None, None
        settings = json.loads(describe(preprocess, size, [], {})[PREPROCESS])
        with bounded():
            with suppress(script.RefusedError):
                own = script.prepare(path, settings)
            with suppress(ImageError):
                transform = eval_transform(preprocess, size)
                theirs = transform(decode(path, min_side=transform.min_side)).numpy()
        if own is None:
            return End(2, "", ""), "", example
        same = theirs is not None and np.array_equal(own, theirs)
        return End(0, "", ""), "" if same else f"{own}, but by the package {theirs}", example

    explore(st.tuples(pictures(), preprocesses), examples, body)


@pytest.mark.parametrize("examples", [15, pytest.param(3_000, marks=LONG)])
def test_a_folder_for_the_script(examples: int, tmp_path: Path) -> None:
    """It finds the images of the package, or refuses what the package refuses."""

    def body(tree: list[Node]) -> tuple[End, str, object]:
        with fresh(tmp_path / "x") as place:
            build(place / "data", tree, ("",))
            found: list[object] = []
            for find in (script.find_images, predictions.find_images):
                try:
                    with bounded():
                        found.append(find([place / "data"], (".jpg", ".png")))
                except (script.RefusedError, OSError, UserError) as error:
                    found.append(None if isinstance(error, UserError) else error)
            refused = isinstance(found[0], Exception)
            same = found[1] is None or (not refused and found[0] == found[1])  # more broken links are refused by ours
            return End(2 if refused else 0, "", ""), "" if same else f"{found[0]} but {found[1]}", tree

    explore(trees(), examples, body)


def test_the_output_of_the_script(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(one_model())

    def run(root: Path, place: Path) -> End:
        return run_script([f"--model={file}", str(root / "data/val/cat"), f"--output={place}"])

    each_place(tmp_path, run, folder=True)
