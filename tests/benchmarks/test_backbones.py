"""docs/backbones.md has what the code finds."""

from __future__ import annotations

import pytest

from benchmarks.backbones import FAMILIES, facts_row, find_readouts, find_sizes, group_text, read_rows
from distil_tl.models import catalogue
from distil_tl.models.model_table import read_table


def test_the_names_of_groups_are_shortened() -> None:
    assert group_text(["stem", "blocks.0", "blocks.1", "blocks.2", "head"]) == "stem, blocks.0-2, head"
    assert group_text(["stem", "block1", "fc6", "fc7", "head"]) == "stem, block1, fc6-7, head"


def test_every_family_has_a_row() -> None:
    assert list(read_rows()) == [name for _, name in FAMILIES]


@pytest.mark.parametrize("name", ["timm/convnextv2_atto", "timm/vit_small_patch14_dinov2", "mobilenet_v3_small"])
def test_a_row_is_what_the_code_finds(name: str) -> None:
    if any(catalogue.version(library) != made for library, made in read_table()[0].items()):
        pytest.skip("the table is of another version")
    family = next(family for family, each in FAMILIES if each == name)
    row = facts_row(family, name)
    assert read_rows()[name][: len(row)] == row


def test_the_sizes_are_those_that_the_code_takes() -> None:
    found = find_sizes("mobilenet_v3_small")
    assert [str(found), str(found.smallest)] == read_rows()["mobilenet_v3_small"][-3:-1]
    assert ", ".join(find_readouts("mobilenet_v3_small")) == read_rows()["mobilenet_v3_small"][-1]


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_1", "timm/xcit_nano_12_p8_224"])
def test_the_read_outs_are_those_of_the_code(name: str) -> None:
    assert (", ".join(find_readouts(name)) or "-") == read_rows()[name][-1]
