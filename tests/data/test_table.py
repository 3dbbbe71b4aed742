"""Tables of labels: their forms, their columns, and the rows that are refused."""

from __future__ import annotations

import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from distil_tl.data import table as table_module
from distil_tl.data import table_file, walk
from distil_tl.data.config import ColumnsConfig, DataConfig, SplitConfig
from distil_tl.data.find_splits import find_split, find_splits
from distil_tl.data.index import Index, differences
from distil_tl.data.scan import scan
from distil_tl.data.split_file import write_split_file
from distil_tl.data.splits import open_splits
from distil_tl.data.table import Table, read_table
from distil_tl.data.table_order import folder_order
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import logger
from tests.helpers.image_folders import assert_equal, plant
from tests.helpers.staging import ALONE

FILES = ("a/x.jpg", "a/y.jpg", "a-b/x.jpg", "a/deep/z.jpg", "b/x.jpg", "b/ä ö.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return plant(tmp_path / "images", *FILES)


def read(root: Path, content: str | bytes, name: str = "labels.csv", **config: object) -> Table:
    file = root / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(DataConfig(root=str(root), labels=str(file), **config), root)  # type: ignore[arg-type]


def refusal(root: Path, content: str | bytes, name: str = "labels.csv", **config: object) -> str:
    with pytest.raises(UserError) as caught:
        read(root, content, name, **config)
    return str(caught.value)


def paths(index: Index) -> list[str]:
    return [index.relative_path(i) for i in range(len(index))]


def test_a_table_of_an_image_folder_gives_the_index_of_the_folder(root: Path) -> None:
    rows = [f"{name},{name.split('/')[0]}" for name in FILES]
    random.Random(0).shuffle(rows)
    found = read(root, "\n".join(["path,label", *rows]))
    (root / "labels.csv").unlink()
    assert_equal(found.index, scan(root))


@pytest.mark.parametrize("long", ["c/d", "c" * 31, "c" * 33, "c/" * 20 + "d"])
def test_order_of_classes_of_many_images(long: str) -> None:
    rng = random.Random(1)
    names = sorted(
        {"/".join(rng.choices(["a", "b-", "b", long, "ä"], k=rng.randint(1, 4))) + ".jpg" for _ in range(400)}
    )
    packed = [name.encode() for name in names]
    rng.shuffle(packed)
    targets = np.array([rng.randint(0, 2) for _ in packed])
    joined = np.frombuffer(b"".join(packed), dtype=np.uint8)
    offsets = np.concatenate([[0], np.cumsum([len(name) for name in packed])])
    order = folder_order(joined, offsets, targets)

    def key(i: int) -> tuple[int, str]:
        folder, slash, name = packed[i].decode().rpartition("/")
        return int(targets[i]), folder + ("\0" if slash else "") + name

    assert order.tolist() == sorted(range(len(packed)), key=key)


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ("\ufeffPfad;Klasse;Notiz\r\na\\x.jpg;Gänse;\r\n\"b/ä ö.png\";Häher;\"x\n;y\"\r\n", "l.csv", "semicolons"),
        ("Pfad;Klasse\r\na/x.jpg;Gänse\r\nb/ä ö.png;Häher\r\n".encode("cp1252"), "l.csv", "Windows-1252"),
        ("sep=;\r\nPfad;Klasse\r\na/x.jpg;Gänse\r\nb/ä ö.png;Häher;;\r\n", "l.csv", "semicolons"),
        ("path\tclass\na/x.jpg\tGänse\n\nb/ä ö.png\tHäher\n".encode("utf-16"), "l.txt", "tabs"),
        ("Image Path,Class\n./a/x.jpg, Gänse \na/../b/ä ö.png,Häher\n", "l.csv", "'Image Path'"),
        ('"Notiz\nzum Bild";Pfad;Klasse\nx;a/x.jpg;Gänse\nx;b/ä ö.png;Häher\n', "l.csv", "semicolons"),
    ],
    ids=["excel", "windows-1252", "sep", "utf-16", "unusual paths", "line break in a name"],
)  # fmt: skip
def test_forms_of_text(root: Path, content: str | bytes, name: str, said: str) -> None:
    found = read(root, content, name)
    assert said in found.note
    assert found.index.classes == ("Gänse", "Häher")
    assert paths(found.index) == ["a/x.jpg", "b/ä ö.png"]
    assert found.index.sizes.tolist() == [7, 9]


def test_a_parquet_file_gives_the_same(root: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"file": ["b/x.jpg", "a/x.jpg"], "label": [3, 10], "split": ["valid", "train"]}
    parquet.write_table(pyarrow.table(columns), root / "l.parquet")
    config = DataConfig(root=str(root), labels=str(root / "l.parquet"))
    found = read_table(config, root)
    same = read(root, "file,label,split\nb/x.jpg,3,val\na/x.jpg,10,Training\n")
    assert found.index.classes == ("10", "3")
    assert_equal(found.index, same.index)
    assert found.splits is not None
    assert same.splits is not None
    assert found.splits.tolist() == same.splits.tolist() == [0, 1]
    parquet.write_table(pyarrow.table({"file": ["a/x.jpg", None], "label": ["a", "b"]}), root / "l.parquet")
    with pytest.raises(UserError, match="row 2: the path is empty"):
        read_table(config, root)


def test_paths_of_another_machine(root: Path) -> None:
    for prefix in ("C:\\Users\\anna\\images\\", "/home/anna/images/", "images/", f"{root}/"):
        found = read(root, f"path,label\n{prefix}a\\x.jpg,a\n{prefix}b/x.jpg,b\n")
        assert paths(found.index) == ["a/x.jpg", "b/x.jpg"]
    assert "C:/Users/anna/ in the paths means" in read(root, "path,label\nC:\\Users\\anna\\b\\x.jpg,b\n").note
    found = read(root, "image_id,label\na/x,a\nb/x,b\n")
    assert paths(found.index) == ["a/x.jpg", "b/x.jpg"]
    assert "the paths lack .jpg" in found.note
    assert f"'x.jpg' is in {root}/a: give data.root={root}/a" in refusal(root, "path,label\nx.jpg,a\n")


def test_a_wrong_first_row_does_not_hide_how_paths_are_written(root: Path) -> None:
    rows = "path,label\nC:\\x\\lost.jpg,a\nC:\\x\\a\\x.jpg,a\nC:\\x\\b\\x.jpg,b\n"
    message = refusal(root, rows)
    assert "has 1 rows that can't be used" in message
    assert "line 2: there is no file" in message


def test_a_split_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    names = ["a/ x.jpg", "a/x.jpg ", "a/back\\slash.jpg", "b/caf\udce9.jpg", " b /\r.jpg", " b /y.png"]
    root = plant(tmp_path / "images", *(name if name.endswith(("jpg", "png")) else f"{name}.jpg" for name in names))
    splits, _ = find_splits(DataConfig(root=str(root), split=SplitConfig(val=0.5)), root)
    write_split_file(tmp_path / "split.csv", splits)
    again, _ = find_splits(DataConfig(root=str(root), labels=str(tmp_path / "split.csv")), root)
    for split, index in splits.items():
        assert_equal(again[split], index)


def test_umlauts_in_the_other_form(root: Path) -> None:
    plant(root, unicodedata.normalize("NFD", "b/ü.jpg"))
    found = read(root, "path,label\n" + unicodedata.normalize("NFC", "b/ü.jpg,b\n"))
    assert paths(found.index) == [unicodedata.normalize("NFD", "b/ü.jpg")]


def test_all_wrong_rows_are_refused_together_by_line(root: Path) -> None:
    (root / "c.jpg").mkdir()
    message = refusal(
        root,
        'path,label,split,group\na/x.jpg,a,train,1\na/lost.jpg,a,val,1\n"b/x.jpg",,train,1\n\n../x.jpg,a,train,1\n'
        "a/notes.txt,a,train,1\na/y.jpg,a,later,1\na-b/x.jpg,a\na/deep/z.jpg,a,train,\na/./x.jpg,b,train,1\nc.jpg,a,val,1\n",
    )
    assert message.splitlines()[0].endswith("has 9 rows that can't be used; correct or remove them:")
    assert [line.strip("- ").split(": ")[0] for line in message.splitlines()[1:]] == [
        f"line {number}" for number in (3, 4, 6, 7, 8, 9, 10, 11, 12)
    ]  # fmt: skip
    for reason in (
        "line 9: 2 cells instead of 4",
        f"line 3: there is no file '{root}/a/lost.jpg'",
        "line 4: the label is empty",
        f"line 6: '../x.jpg' is outside {root}",
        "line 7: 'a/notes.txt' does not end as the name of an image",
        "line 8: the split 'later' is not train, val or test",
        "line 10: the group is empty",
        "line 11: the same image as in line 2, with another label: an image has one label",
        "line 12: 'c.jpg' is not a regular file",
    ):
        assert reason in message


def test_a_table_whose_images_are_elsewhere_is_refused_in_one_line(root: Path) -> None:
    rows = "path,label\n" + "".join(f"deep/{name}.jpg,a\n" for name in ("z", "lost", "gone"))
    message = refusal(root, rows)
    assert f"none of its 3 images exists, such as '{root}/deep/z.jpg' in line 2; give the folder" in message
    assert message.splitlines()[1:] == [f"'deep/z.jpg' is in {root}/a: give data.root={root}/a"]
    message = refusal(root, rows.replace("deep/", "other/"))
    assert message.splitlines()[1:] == [
        f"a file 'z.jpg' is in {root}/a/deep: correct the paths, or give data.root={root}/a/deep"
    ]
    assert "can't be used; correct or remove them" in refusal(root, rows + "a/x.jpg,a\n")


def test_labels_that_look_like_missing_values_are_named(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    read(root, "path,label\na/x.jpg,a\na/y.jpg,nan\na-b/x.jpg,nan\nb/x.jpg,?\n")
    record = caplog.records[0]  # it is there once for each logger that the tests listen to
    assert record.levelname == "WARNING"
    assert "look like missing values, and are classes here: 'nan' of 2 images, '?' of 1 images;" in caplog.text
    caplog.clear()
    read(root, "path,label\na/x.jpg,a\na/y.jpg,nandina\n")
    assert not caplog.records


def test_columns_that_can_not_be_told(root: Path) -> None:
    assert "say which one has the labels with data.columns.label=NAME" in refusal(root, "path,x,y2\na/x.jpg,a,b\n")
    assert "its first line must name the columns" in refusal(root, "a/x.jpg,a\nb/x.jpg,b\n")
    assert "of which some have the same name" in refusal(root, "path,label,label\na/x.jpg,a,b\n")
    assert "is empty" in refusal(root, "\n\n")
    assert "has no rows" in refusal(root, "path,label\n")
    assert "save it as CSV" in refusal(root, b"PK", "labels.xlsx")
    assert "is not a Parquet file" in refusal(root, b"PK", "labels.parquet")
    assert "after line 1: " in refusal(root, "path,label\na/x.jpg," + "x" * 200_000)
    assert "label from column 'what'" in read(root, "where,what\na/x.jpg,a\n").note
    config = DataConfig(root=str(root), labels="x")
    config.columns.label = "kinds"
    (root / "labels.csv").write_text("path,kind,label\na/x.jpg,a,b\n")
    config.labels = str(root / "labels.csv")
    with pytest.raises(UserError, match=r"not data.columns.label=kinds, did you mean `kind`"):
        read_table(config, root)
    config.columns.label = "kind"
    assert read_table(config, root).index.classes == ("a",)
    config.split.group = "kin"
    with pytest.raises(UserError, match=r"not data.split.group=kin, did you mean"):
        read_table(config, root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x" * 200_000 + ",label\na/x.jpg,a\n", "can't read the first line of .*field larger than field limit"),
        ("x" * (1 << 20) + ",label\n", "the first line has more than 1,048,576 characters, so it is no table"),
        ("path,label\na/x.jpg,a\n".encode("utf-16-le"), "the first line has NUL characters, so it is no table"),
        (b"\xff\xfep\0a\0\0\xd8x", "can't read the first line of .*codec can't decode"),
        ("path,label\na/x.jpg,a\0b\n", "line 2: the label has a NUL character"),
        ("path,label,weight\na/x.jpg,a,1e300\n", r"line 2: the weight '1e300' is not a number from 0 to 3e\+38"),
        (f"path,label\n{'x' * 300}.jpg,a\n", "line 2: .*File name too long"),
    ],
)  # fmt: skip
def test_damage_is_named(root: Path, content: str | bytes, message: str) -> None:
    assert re.search(message, refusal(root, content))


def test_a_parquet_file_without_rows(root: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"path": pyarrow.array([], "string"), "label": []}), root / "l.parquet")
    with pytest.raises(UserError, match="has no rows"):
        read_table(DataConfig(root=str(root), labels=str(root / "l.parquet")), root)


def test_reading_ends_after_many_wrong_rows(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "MOST_COUNTED", 29)
    monkeypatch.setattr(table_file, "ROWS_AT_ONCE", 10)
    message = refusal(root, "path,label\na/x.jpg,a\n" + "".join(f"{i}.jpg,a\n" for i in range(1000)))
    assert "has at least 29 rows that can't be used" in message
    assert len(message.splitlines()) == 22
    assert message.endswith("and 9 more")


# Splits.


def many(tmp_path: Path, rows: list[str]) -> tuple[dict[str, Index], str]:
    root = plant(tmp_path / "many", *(row.split(",")[0] for row in rows[1:]))
    for i, path in enumerate(root.iterdir()):
        path.write_bytes(b"x" * i)
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    return find_splits(DataConfig(root=str(root), labels=str(tmp_path / "labels.csv")), root)


def test_a_column_decides_the_split(tmp_path: Path) -> None:
    found, note = many(
        tmp_path, ["path,label,subset", "1.jpg,a,train", "2.jpg,b,TRAIN", "3.jpg,b,validation", "4.jpg,a,test"]
    )
    assert {split: paths(index) for split, index in found.items()} == {
        "train": ["1.jpg", "2.jpg"], "val": ["3.jpg"], "test": ["4.jpg"],
    }  # fmt: skip
    assert "split from column 'subset'" in note
    root = tmp_path / "many"
    config = DataConfig(root=str(root), labels=str(tmp_path / "labels.csv"))
    config.split.seed = 1
    with pytest.raises(UserError, match="has a column with the split; remove data.split"):
        find_splits(config, root)


def test_a_class_without_training_images_is_refused(tmp_path: Path) -> None:
    """As a class folder of val is that train does not have: weights of classes would not be finite."""
    rows = ["path,label,split", "1.jpg,a,train", "2.jpg,b,train", "3.jpg,c,val", "4.jpg,d,test"]
    with pytest.raises(UserError, match="has no image in train of the classes 'c', 'd'; correct its column"):
        many(tmp_path / "one", rows)
    with pytest.raises(UserError, match="has no image in train of the classes 'd'"):  # where val is made
        many(tmp_path / "two", [row for row in rows if "val" not in row])


def test_an_edited_label_is_named_where_a_split_of_the_run_is_evaluated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    rows = ["path,label,split", "1.jpg,a,train", "2.jpg,b,train", "3.jpg,b,val", "4.jpg,a,val"]
    found, _ = many(tmp_path, rows)
    write_split_file(tmp_path / "split.csv", found)
    config = DataConfig(root=str(tmp_path / "many"), labels=str(tmp_path / "labels.csv"))

    def warnings() -> list[str]:
        caplog.clear()
        assert len(find_split(config, tmp_path / "many", "val", ["a", "b"], tmp_path)) == 2
        return list(dict.fromkeys(r.getMessage() for r in caplog.records if r.levelname == "WARNING"))

    assert warnings() == []
    (tmp_path / "labels.csv").write_text("\n".join(rows).replace("3.jpg,b", "3.jpg,a").replace("1.jpg,a", "1.jpg,b"))
    assert warnings() == [
        "val: since the run was made, 1 label changed: '3.jpg' was b, now a; the labels of now are used"
    ]


def test_images_that_a_table_does_not_name_are_counted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(root, "notes.txt", ".ipynb_checkpoints/x.jpg", "b/._x.jpg")
    some = read(root, "path,label\n" + "".join(f"{name},a\n" for name in FILES[:4])).index
    assert walk.images_beside(some, (".jpg", ".png")) == 2
    assert walk.images_beside(some, (".jpg",)) == 1
    every = read(root, "path,label\n" + "".join(f"{name},a\n" for name in FILES)).index
    assert walk.images_beside(every, (".jpg", ".png")) == 0
    monkeypatch.setattr(walk, "MOST_ENTRIES", 7)
    assert walk.images_beside(some, (".jpg", ".png")) == 0, "too many files to look at"


def test_images_that_a_table_does_not_name_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", logger.name)
    plant(tmp_path / "many", "9.jpg")
    many(tmp_path, ["path,label,split", "1.jpg,a,train", "2.jpg,a,val"])
    assert f"1 image is below {tmp_path}/many, but not in data.labels={tmp_path}/labels.csv" in caplog.text


@pytest.mark.parametrize(("label", "warned"), [("a", True), ("b", False)])
def test_a_single_class_causes_a_warning(
    root: Path, label: str, warned: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    table = root / "labels.csv"
    table.write_text(f"path,label,split\na/x.jpg,a,train\na/y.jpg,{label},train\nb/x.jpg,a,val\n")
    open_splits(ALONE, DataConfig(root=str(root), labels=str(table), global_batch_size=2, workers=0))
    assert ("one class only: a classifier of one class learns nothing" in caplog.text) == warned


def test_val_is_made_where_a_table_has_only_train_and_test(tmp_path: Path) -> None:
    rows = [f"{i:02d}.jpg,{'ab'[i % 2]},{'test' if i < 10 else 'train'}" for i in range(50)]
    found, note = many(tmp_path, ["path,label,split", *rows])
    assert {split: len(index) for split, index in found.items()} == {"train": 32, "val": 8, "test": 10}
    assert paths(found["test"])[0] == "00.jpg"
    assert "it has no val, so one is made: 20% val of each class, seed 0" in note
    config = DataConfig(root=f"{tmp_path}/many", labels=f"{tmp_path}/labels.csv", split=SplitConfig(test=0.25))
    with pytest.raises(UserError, match="data.split.test has no effect, as the table has test"):
        find_splits(config, tmp_path / "many")
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *rows]).replace("test", "train"))
    found, _ = find_splits(config, tmp_path / "many")
    assert {split: len(index) for split, index in found.items()} == {"train": 28, "val": 10, "test": 12}


def test_groups_of_a_column_stay_together(tmp_path: Path) -> None:
    rows = [f"{i:02d}.jpg,{'ab'[i % 2]},plant {i // 4}" for i in range(80)]
    found, note = many(tmp_path, ["path,label,group", *rows])
    assert len(found["val"]) == 16
    plants = {split: {int(path[:2]) // 4 for path in paths(index)} for split, index in found.items()}
    assert not plants["train"] & plants["val"]
    assert "by group, seed 0" in note
    _, note = many(tmp_path, ["path,label,Patient-ID", *rows])
    assert "add data.split.group=Patient-ID" in note


def test_weights(root: Path) -> None:
    rows = "path;label;weight\nb/x.jpg;b;2\na/x.jpg;a;0,5\n"
    found = read(root, rows).index
    assert found.weights is not None
    assert found.weights.tolist() == [0.5, 2.0]
    other = read(root, rows.replace("0,5", "1")).index
    assert found.fingerprint != other.fingerprint
    assert str(differences(found, other)) == "the weights of images changed"
    assert_equal(Index.from_arrays(found.to_arrays()), found)
    part = found.selected(np.array([False, True]))
    assert part.weights is not None
    assert part.weights.tolist() == [2.0]
    assert "line 3: the weight 'much' is not a number from 0 to 3e+38" in refusal(root, rows.replace("0,5", "much"))
    config = ColumnsConfig(weight="none")
    assert read(root, rows, columns=config).index.weights is None
