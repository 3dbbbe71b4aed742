from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import durations
from tests.helpers.fake_slurm import FakeSlurm, instead_of_slurm
from tests.helpers.slurm_cluster import Cluster, brought_up
from tests.helpers.wandb_server import Server, serving


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("distil_tl")
    group.addoption("--fast", action="store_true", help="leave out slow tests, which are most that start processes")
    group.addoption("--record-durations", action="store_true", help="write tests/durations.json")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(durations.Recorder())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        items[:], slow = durations.fast(items)
        config.hook.pytest_deselected(items=slow)
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        durations.arrange(items)


CLASSES = ("circles", "noise", "stripes")


def draw(kind: str, rng: np.random.Generator) -> Image.Image:
    """A small picture of a class that a network can learn to tell: 40x36 pixels, RGB."""
    height, width = 36, 40
    y, x = np.mgrid[:height, :width]
    if kind == "stripes":
        grey = 127 + 120 * np.sin(x * rng.uniform(0.6, 1.2) + rng.uniform(0, 6))
    elif kind == "circles":
        grey = 127 + 120 * np.cos(np.hypot(x - rng.uniform(10, 30), y - rng.uniform(10, 26)) * rng.uniform(0.6, 1.0))
    else:
        grey = rng.uniform(0, 255, (height, width))
    colour = rng.uniform(0.5, 1.0, 3)
    return Image.fromarray((grey[..., None] * colour).clip(0, 255).astype(np.uint8))


def make_folder(root: Path, splits: dict[str, int], classes: tuple[str, ...] = CLASSES) -> Path:
    """An ImageFolder with so many images a split, dealt out to the classes in turn."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for i in range(count):
            kind = classes[i % len(classes)]
            folder = root / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            draw(kind, rng).save(folder / f"{i:04d}.png")
    return root


@pytest.fixture(scope="session", autouse=True)
def _cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Not the user's; set before the first process is started, so that all have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTIL_TL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """A shell starts what is to run in the background with SIGINT ignored, and processes inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """52 training images, 31 for validation (which divides by no small number), 3 classes."""
    return make_folder(tmp_path_factory.mktemp("images"), {"train": 52, "val": 31})


@pytest.fixture
def data(folder: Path, tmp_path: Path) -> Path:
    """The images, in a folder to change."""
    shutil.copytree(folder, tmp_path / "flowers")
    return tmp_path / "flowers"


@pytest.fixture
def near(tmp_path: Path) -> Path:
    """Where images may be staged to."""
    return tmp_path / "near"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Commands in place of Slurm's, and a current folder of the test's own."""
    return instead_of_slurm(tmp_path, monkeypatch)


@pytest.fixture
def small(folder: Path) -> list[str]:
    return small_args(folder)


def small_args(folder: Path) -> list[str]:
    """Arguments of a two-stage run that takes seconds: 6 steps of 8 images an epoch."""
    return [
        f"data.root={folder}",
        "data.image_size=32",
        "data.global_batch_size=8",
        "data.workers=0",
        "model.name=shufflenet_v2_x0_5",
        "model.weights=none",
        "stages.head.epochs=1",
        "stages.full.epochs=2",
        "stages.head.lr=0.01",
        "stages.full.lr=0.001",
        "stages.full.unfreeze=2",
        "optim.name=sgd",
        "tracking.log_every=1",
        "distributed.timeout_seconds=60",
        "distributed.device=cpu",
    ]


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """A real Slurm of two nodes, for all tests with the marker `slurm`."""
    with brought_up() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def wandb_server() -> Iterator[Server]:
    """What W&B's client takes for its server."""
    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def telling_server() -> Iterator[Server]:
    """One that says, as W&B's own do, what it has of a run that goes on."""
    with serving(tells=True) as server:
        yield server
