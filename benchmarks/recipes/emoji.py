"""Two tasks for benchmarks.recipes that no rule was made with: emoji, of other vendors in val and test than in train.

    npm pack emoji-datasource-apple@16.0.0 emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
        emoji-datasource-facebook@16.0.0
    python -m benchmarks.recipes.emoji ARCHIVES OUTPUT

- categories: 31 of their categories, such as fruit, tools or faces; other emoji in each split. Train has those of Apple
  and Google, val and test those of Twitter and Facebook.
- people: 40 activities and professions, of both sexes and six colours of skin. Train has those of Apple and Google, val
  of Facebook, test of Twitter.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError

VENDORS = ("apple", "google", "twitter", "facebook")
SIZE = 64  # pixels
LEAST, MOST = 16, 32  # emoji of a category
MIXED = (
    "alphanum",
    "country-flag",
    "family",
    "hand-fingers-open",
    "other-symbol",
    "person",
    "skin-tone",
)  # and their like
PREFIXES = ("male-", "female-", "man-", "woman-", "man_", "woman_")
PEOPLE, SHOWN, FEWEST = 40, 20, 10  # classes; images of a class in train; and what a class must have

Place = tuple[str, str, str, str]  # split, class, vendor, name of the image


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path, help="the folder of the four .tgz files")
    parser.add_argument("output", type=Path, help="the folder to make, with `categories` and `people`")
    options = parser.parse_args(args)
    return run_command("benchmarks.recipes.emoji", lambda: make(options.archives, options.output))


def make(archives: Path, output: Path) -> None:
    """Write the images of both tasks. Raises UserError without the four archives."""
    emoji, images = read(archives)
    for name, places in (("categories", list(categories(emoji))), ("people", list(people(emoji)))):
        written = 0
        for split, label, vendor, image in places:
            if (vendor, image) in images:
                target = output / name / split / label / f"{vendor}-{image}"
                target.parent.mkdir(parents=True, exist_ok=True)
                on_white(images[vendor, image]).save(target)
                written += 1
        sys.stdout.write(f"{output / name}: {written:,} images\n")


def read(archives: Path) -> tuple[list[dict[str, Any]], dict[tuple[str, str], bytes]]:
    """The list of emoji, and the images by vendor and name."""
    emoji: list[dict[str, Any]] = []
    images: dict[tuple[str, str], bytes] = {}
    for vendor in VENDORS:
        found = sorted(archives.glob(f"emoji-datasource-{vendor}-*.tgz"))
        if len(found) != 1:
            raise UserError(
                f"{archives} has {len(found)} files emoji-datasource-{vendor}-*.tgz: get one with `npm pack`"
            )
        with tarfile.open(found[0]) as archive:
            for member in archive:
                path = Path(member.name)
                wanted = path.name == "emoji.json" and not emoji
                if not member.isfile() or not (wanted or (path.suffix == ".png" and path.parent.name == str(SIZE))):
                    continue
                file = archive.extractfile(member)
                assert file is not None
                if wanted:
                    emoji = json.load(file)
                else:
                    images[vendor, path.name] = file.read()
    return emoji, images


def categories(emoji: Sequence[dict[str, Any]]) -> Iterator[Place]:
    """Three fifths of the emoji of each category for train, a fifth for each of val and test."""
    by_category: dict[str, list[str]] = {}
    for one in emoji:
        by_category.setdefault(one["subcategory"], []).append(one["image"])
    rng = random.Random(7)
    for category, names in by_category.items():
        if len(names) < LEAST or category.startswith(MIXED):
            continue
        rng.shuffle(names)
        names, label = names[:MOST], category.replace(" & ", "-")
        first, second = round(0.6 * len(names)), round(0.8 * len(names))
        yield from (("train", label, vendor, name) for name in names[:first] for vendor in ("apple", "google"))
        for split, part in (("val", names[first:second]), ("test", names[second:])):
            yield from ((split, label, vendor, name) for name in part for vendor in ("twitter", "facebook"))


def people(emoji: Sequence[dict[str, Any]]) -> Iterator[Place]:
    """Activities and professions, each with all of its emoji in one class."""
    by_name: dict[str, list[str]] = {}
    for one in emoji:
        variations = one.get("skin_variations", {})
        if one["category"] != "People & Body" or not variations or one["subcategory"] in ("family", "person"):
            continue
        name = one["short_name"]
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        by_name.setdefault(name[len(prefix) :], []).extend(
            [one["image"], *(variation["image"] for variation in variations.values())]
        )
    rng = random.Random(11)
    labels = [label for label, names in sorted(by_name.items()) if len(names) >= FEWEST]
    rng.shuffle(labels)
    for label in sorted(labels[:PEOPLE]):
        names = by_name[label]
        rng.shuffle(names)
        train = [(vendor, name) for vendor in ("apple", "google") for name in names]
        rng.shuffle(train)
        yield from (("train", label, vendor, name) for vendor, name in train[:SHOWN])
        for split, vendor in (("val", "facebook"), ("test", "twitter")):
            yield from ((split, label, vendor, name) for name in names[:6])


def on_white(image: bytes) -> Image.Image:
    """The image on a white ground."""
    with Image.open(io.BytesIO(image)) as opened:
        shown = opened.convert("RGBA")
    ground = Image.new("RGBA", shown.size, "white")
    ground.alpha_composite(shown)
    return ground.convert("RGB")


if __name__ == "__main__":
    sys.exit(main())
