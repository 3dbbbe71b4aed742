"""Which column of a table of labels is which: as configured, or guessed by its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from distil_tl.data.config import ALL_EXTENSIONS, ColumnsConfig, DataConfig
from distil_tl.utils.errors import UserError, did_you_mean

# Names that are looked for, in this order, without regard to case, with "_" for spaces and hyphens.
USUAL = {
    "path": (
        "path", "file_path", "filepath", "image_path", "img_path", "file", "file_name", "filename", "image_file",
        "image_name", "image", "img", "image_id", "dateipfad", "datei", "dateiname", "pfad", "bild", "name", "id",
    ),
    "label": (
        "label", "class", "class_name", "label_name", "labels", "category", "target", "species", "diagnosis", "klasse",
        "kategorie", "art", "y",
    ),
    "split": ("split", "subset", "partition", "set"),
    "group": ("group", "group_id", "gruppe"),
    "weight": ("weight", "sample_weight", "gewicht"),
}  # fmt: skip
NO_COLUMN = "none"
RELATED = ("patient", "subject", "participant", "case_id", "plant", "specimen", "slide", "site", "location", "video")


class Columns(NamedTuple):
    """Positions of the columns; None for one that is not there."""

    path: int
    label: int
    split: int | None
    group: int | None
    weight: int | None
    notes: list[str]


def choose_columns(names: Sequence[str], first: Sequence[str], config: DataConfig) -> Columns:
    """The columns of a table.

    Args:
        names: of all columns.
        first: cells of the first row.

    Raises:
        UserError: the column of paths or labels is not found, a configured one does not exist, or two have one name.
    """
    given: ColumnsConfig = config.columns
    has = f"data.labels={config.labels} has the columns {', '.join(map(repr, names))}"
    if any(cell.lower().endswith(ALL_EXTENSIONS) for cell in names):
        raise UserError(f"{has}: its first line must name the columns, such as path,label")
    if len(set(names)) < len(names):
        raise UserError(f"{has}, of which some have the same name: rename them")
    found: dict[str, int | None] = {}
    for kind in ("path", "label", "split", "weight"):
        wanted = getattr(given, kind)
        if wanted not in (None, NO_COLUMN) and wanted not in names:
            raise UserError(f"{has}, but not data.columns.{kind}={wanted}{did_you_mean(wanted, names)}")
        found[kind] = _guess(kind, names) if wanted is None else None if wanted == NO_COLUMN else names.index(wanted)
    group = config.split.group
    if group is not None and group not in names and re.fullmatch(r"[\w -]+", group):
        near = did_you_mean(group, names)
        if near:
            raise UserError(f"{has}, but not data.split.group={group}{near}")
    found["group"] = _guess("group", names) if group is None else names.index(group) if group in names else None
    if found["path"] is None:
        images = [i for i, cell in enumerate(first) if cell.strip().lower().endswith(ALL_EXTENSIONS)]
        found["path"] = images[0] if len(images) == 1 and images[0] < len(names) else None
    if found["label"] is None and found["path"] is not None and len(names) == 2:
        found["label"] = 1 - found["path"]
    missing = [kind for kind in ("path", "label") if found[kind] is None]
    if missing:
        name = " and ".join(f"data.columns.{kind}=NAME" for kind in missing)
        raise UserError(f"{has}: say which one has the {' and the '.join(missing)}s with {name}")
    path, label = found["path"], found["label"]
    assert path is not None
    assert label is not None
    used = [(kind, position) for kind, position in found.items() if position is not None]
    for position in {position for _, position in used}:
        if len(kinds := [kind for kind, own in used if own == position]) > 1:
            raise UserError(f"{has}: {names[position]!r} can't be {' and '.join(kinds)} at once; set data.columns.KIND")
    notes = [", ".join(f"{kind} from column {names[position]!r}" for kind, position in used)]
    related = [name for name in names if any(word in _plain(name) for word in RELATED)]
    if found["group"] is None and group is None and found["split"] is None and related:
        notes.append(f"if images of one {related[0]} belong together, add data.split.group={related[0]}")
    return Columns(path, label, found["split"], found["group"], found["weight"], notes)


def _guess(kind: str, names: Sequence[str]) -> int | None:
    plain = [_plain(name) for name in names]
    return next((plain.index(usual) for usual in USUAL[kind] if usual in plain), None)


def _plain(name: str) -> str:
    return name.strip().casefold().replace(" ", "_").replace("-", "_")
