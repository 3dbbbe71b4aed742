"""The table of models that `distil-tl models` reads, and docs/backbones.md: what is known of each family of networks.

    python -m benchmarks.backbones table [MODEL ...] writes distil_tl/models/models.tsv
    python -m benchmarks.backbones docs [MODEL ...]  writes the table in docs/backbones.md
    python -m benchmarks.backbones survey [MODEL ...]  prints which networks can't be cut, and why

The first one builds every model of torchvision and timm without memory for its weights, in about ten minutes; it
resumes with those that the table lacks. The second one cuts a small network of each family, with random weights, in a
few minutes. The third one cuts the smallest network of each of timm's modules, in ten minutes. None needs a network or
images.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import init

from distil_tl.models import catalogue, timm_models, torchvision_models
from distil_tl.models.config import ModelConfig
from distil_tl.models.facts import entry_of, look_at, published_entry
from distil_tl.models.graph.frozen_prefix import CannotCutError, cut_frozen_prefix
from distil_tl.models.model_table import TABLE, Entry, read_table
from distil_tl.models.names import READOUTS, TIMM_PREFIX
from distil_tl.models.size_trial import failure_at
from distil_tl.models.transfer import build
from distil_tl.training.config import StageConfig
from distil_tl.training.stage import apply_stage
from distil_tl.utils.errors import UserError

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "backbones.md"
BEGIN, END = "<!-- written by python -m benchmarks.backbones docs -->", "<!-- end -->"
COLUMNS = "name\tparameters\timage_size\tmacs\tweights\tsource"
INITS = ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_uniform_")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table", "docs", "survey"))
    parser.add_argument("models", nargs="*", metavar="MODEL", help="only these")
    parser.add_argument("--anew", action="store_true", help="build all models, not only those that the table lacks")
    parser.add_argument("--minutes", type=float, default=60, help="of table: build no more models after that")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.what == "table":
        write_catalogue(options.models, anew=options.anew, minutes=options.minutes)
    elif options.what == "docs":
        write_document(options.models)
    else:
        survey(options.models)
    return 0


def write_catalogue(only: Sequence[str], *, anew: bool, minutes: float) -> None:
    """Rewrite the table of all models that can be used, for the installed versions of the libraries."""
    for name in INITS:  # tensors without values need none, and this takes most of the time
        setattr(init, name, lambda tensor, *_args, **_options: tensor)
    versions = {library: catalogue.version(library) for library in catalogue.LIBRARIES}
    first = "# " + ", ".join(f"{library} {number}" for library, number in versions.items())
    known = {} if anew or not TABLE.is_file() else read_table()[1]
    names = [*torchvision_models.names(), *(TIMM_PREFIX + name for name in timm_models.names())]
    entries = {name: known.get(name) or published_entry(name) for name in names}
    missing = [name for name, entry in entries.items() if entry.parameters is None and (not only or name in only)]
    began = time.monotonic()
    for number, name in enumerate(missing):
        if number % 50 == 0:
            write_lines(first, entries.values())
        if time.monotonic() - began > 60 * minutes:
            break
        try:
            entries[name] = entry_of(name)
        except UserError as error:
            if "image_size" not in str(error):  # else it can be used, for other sizes
                del entries[name]
            sys.stdout.write(f"{error}\n")
    write_lines(first, entries.values())
    measured = sum(entry.parameters is not None for entry in entries.values())
    sys.stdout.write(f"{TABLE}: {len(entries)} models, {measured} of them measured\n")


def write_lines(first: str, entries: Iterable[Entry]) -> None:
    TABLE.write_text("\n".join([first, COLUMNS, *(entry.line for entry in entries)]) + "\n", encoding="utf-8")


FAMILIES = (
    ("MobileNetV3", "mobilenet_v3_small"),
    ("ConvNeXt-V2", "timm/convnextv2_atto"),
    ("MobileNetV4", "timm/mobilenetv4_conv_small"),
    ("EfficientViT (MIT)", "timm/efficientvit_b0"),
    ("EfficientViT (MSRA)", "timm/efficientvit_m0"),
    ("EVA-02", "timm/eva02_tiny_patch14_224"),
    ("CAFormer", "timm/caformer_s18"),
    ("GhostNet", "timm/ghostnet_100"),
    ("DINOv2", "timm/vit_small_patch14_dinov2"),
    ("DINOv3", "timm/vit_small_patch16_dinov3"),
    ("Hiera", "timm/hiera_tiny_224"),
    ("SigLIP2", "timm/vit_base_patch16_siglip_224"),
    ("ResNet", "resnet18"),
    ("EfficientNet-Lite", "timm/tf_efficientnet_lite0"),
    ("ViT", "timm/vit_tiny_patch16_224"),
    ("DeiT, distilled", "timm/deit_tiny_distilled_patch16_224"),
    ("LeViT, distilled", "timm/levit_128s"),
    ("Swin (timm)", "timm/swin_tiny_patch4_window7_224"),
    ("FastViT", "timm/fastvit_t8"),
    ("RepViT", "timm/repvit_m0_9"),
    ("XCiT", "timm/xcit_nano_12_p8_224"),
    ("MViTv2", "timm/mvitv2_tiny"),
    ("CrossViT", "timm/crossvit_tiny_240"),
    ("AlexNet", "alexnet"),
    ("VGG", "vgg11_bn"),
    ("ResNeXt", "resnext50_32x4d"),
    ("Wide ResNet", "wide_resnet50_2"),
    ("DenseNet", "densenet121"),
    ("GoogLeNet", "googlenet"),
    ("Inception v3", "inception_v3"),
    ("SqueezeNet", "squeezenet1_1"),
    ("ShuffleNetV2", "shufflenet_v2_x0_5"),
    ("MobileNetV2", "mobilenet_v2"),
    ("MNASNet", "mnasnet0_5"),
    ("EfficientNet", "efficientnet_b0"),
    ("EfficientNetV2", "efficientnet_v2_s"),
    ("RegNet X", "regnet_x_400mf"),
    ("RegNet Y", "regnet_y_400mf"),
    ("ConvNeXt", "convnext_tiny"),
    ("ViT (torchvision)", "vit_b_32"),
    ("Swin", "swin_t"),
    ("Swin v2", "swin_v2_t"),
    ("MaxViT", "maxvit_t"),
)
HEADER = (
    *("family", "model", "parameters", "GMACs", "px", "layer groups", "features", "cuts"),
    *("sizes", "smallest", "read-outs"),
)
SMALL = (64, 96, 128, 224)  # pixels that are tried in a survey
STEPS = (1, 2, 4, 7, 8, 14, 16, 28, 32, 56, 64, 224)  # pixels between sizes that are tried


@dataclass(frozen=True)
class Sizes:
    """Which image sizes a network takes.

    Attributes:
        step: the sizes are multiples of it.
        smallest: pixels.
        fixed: the network is built for one of them, which all stages of a run then have.
    """

    step: int
    smallest: int
    fixed: bool

    def __str__(self) -> str:
        text = "any" if self.step == 1 else f"multiples of {self.step}"
        return f"{text}, one in a run" if self.fixed else text


def find_sizes(name: str) -> Sizes:
    """Which sizes the code of a network takes, by trials without values; the smallest one also with values."""
    own = look_at(name).model

    def works(size: int, device: str = "meta") -> bool:
        try:
            model = own
            if own.fixed_image_size or device != "meta":
                with torch.device(device):
                    model = build(ModelConfig(name, "none"), 2, image_size=size, seed=0, pretrained=False)
            model.check_size(size)
        except UserError:
            return False
        return failure_at(model.module, size) is None

    step = next((step for step in STEPS if works(own.image_size + step)), own.image_size)
    multiples = range(step, own.image_size + 1, step)
    smallest = next(size for size in multiples if works(size) and works(size, "cpu"))
    return Sizes(step, smallest, own.fixed_image_size)


@dataclass(frozen=True)
class Cuts:
    """Which of the tried cuts of a network are found: below the head, in the middle, and after the first group.

    Attributes:
        shape: of the features below the head, for one image.
        found: how many.
        reasons: of those that are not found.
    """

    shape: str
    found: int
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.found} of {self.found + len(self.reasons)}"


def find_cuts(name: str, size: int) -> Cuts:
    """Cut a network; a cut is found only where both parts together give the same as the whole network."""
    model = build(ModelConfig(name, "none"), 3, image_size=size, seed=0)
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    shapes: list[str] = []
    reasons: list[str] = []
    for trained in sorted({1, len(model.groups) // 2, len(model.groups) - 1}):
        apply_stage(model, StageConfig(unfreeze=trained))
        try:
            cut = cut_frozen_prefix(model.module, images)
        except CannotCutError as error:
            reasons.append(f"{trained} of {len(model.groups)} groups trained: {error}")
            continue
        shapes.append("x".join(map(str, cut.prefix(images).shape[1:])) if trained == 1 else "")
    return Cuts(next(filter(None, shapes), "none"), len(shapes), tuple(reasons))


def survey(only: Sequence[str]) -> None:
    """Print the networks that can't be cut: of these, or of the smallest one of each of timm's modules."""
    for name in only or smallest_of_modules():
        try:
            size = next((size for size in SMALL if takes(name, size)), None) or look_at(name).model.image_size
            cuts = find_cuts(name, size)
        except UserError as error:
            sys.stdout.write(f"{name}: {error}\n")
            continue
        sys.stdout.write("\n  ".join([f"{name} at {size} px: {cuts}", *cuts.reasons]) + "\n")
        sys.stdout.flush()


def smallest_of_modules() -> Iterator[str]:
    """The smallest network of each of timm's modules."""
    import timm

    table = read_table()[1]
    for module in timm.list_modules():
        names = [TIMM_PREFIX + name for name in timm.list_models(module=module)]
        known = [(entry.parameters, name) for name in names if (entry := table.get(name)) and entry.parameters]
        if known:
            yield min(known)[1]


def takes(name: str, size: int) -> bool:
    """Whether a network can be built for images of a size, and takes them."""
    try:
        with torch.device("meta"):
            model = build(ModelConfig(name, "none"), 2, image_size=size, seed=0, pretrained=False)
        model.check_size(size)
    except UserError:
        return False
    return failure_at(model.module, size) is None


def group_text(names: Sequence[str]) -> str:
    """Names of layer groups, with those that are counted shortened: `stem, blocks.0-11, head`."""
    parts: list[list[str]] = []
    for name in names:
        base = name.rstrip("0123456789")
        if parts and base != name and parts[-1][0].rstrip("0123456789") == base:
            parts[-1].append(name)
        else:
            parts.append([name])
    return ", ".join(
        part[0] if len(part) == 1 else f"{part[0]}-{part[-1][len(part[-1].rstrip('0123456789')) :]}" for part in parts
    )


def facts_row(family: str, name: str) -> list[str]:
    """The columns that need no values: they are cheap."""
    facts = look_at(name)
    macs = "-" if facts.macs is None else f"{facts.macs / 1e9:.2f}"
    groups = group_text(facts.model.group_names)
    return [family, f"`{name}`", f"{facts.parameters / 1e6:.1f} M", macs, str(facts.model.image_size), groups]


def row(family: str, name: str) -> list[str]:
    sizes = find_sizes(name)
    cuts = find_cuts(name, max(sizes.smallest, 32 // sizes.step * sizes.step))
    read_outs = ", ".join(find_readouts(name)) or "-"
    return [*facts_row(family, name), cuts.shape, str(cuts), str(sizes), str(sizes.smallest), read_outs]


def find_readouts(name: str) -> list[str]:
    """The read-outs that a network has beside its pooled output."""
    return [readout for readout in READOUTS if readout != "pooled" and has_readout(name, readout)]


def has_readout(name: str, readout: str) -> bool:
    try:
        with torch.device("meta"):
            build(ModelConfig(name, "none", readout=readout), 2, image_size=None, seed=0, pretrained=False)
    except UserError:
        return False
    return True


def read_rows() -> dict[str, list[str]]:
    """The rows of the document by model."""
    text = DOCUMENT.read_text(encoding="utf-8")
    lines = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {line[1].strip("`"): line for line in cells}


def write_document(names: Sequence[str]) -> None:
    """Rewrite the rows of these models in docs/backbones.md; of those that it lacks, where none are named."""
    rows = read_rows()
    for family, name in FAMILIES:
        if name in names or name not in rows:
            rows[name] = row(family, name)
            sys.stdout.write(f"{' | '.join(rows[name])}\n")
            sys.stdout.flush()
            save_rows([rows[known] for _, known in FAMILIES if known in rows])


def save_rows(rows: Sequence[Sequence[str]]) -> None:
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    lines = [f"| {' | '.join(line)} |" for line in (HEADER, ["---"] * len(HEADER), *rows)]
    table = "\n".join(lines).replace("| --- ", "|---").replace("---|", "---|").replace("|--- |", "|---|")
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
