from __future__ import annotations

import gc
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import durations
from tests.helpers.arguments import small_args
from tests.helpers.fake_slurm import FakeSlurm, instead_of_slurm
from tests.helpers.images import make_folder
from tests.helpers.wandb_server import Server, serving


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("distil_tl")
    group.addoption("--fast", action="store_true", help="leave out slow tests, which are most that start processes")
    group.addoption("--record-durations", action="store_true", help="write tests/durations.json")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") == "loadgroup" and pytest.version_tuple[:2] >= (9, 2):
        raise pytest.UsageError("pytest-xdist ignores groups of tests with pytest 9.2: pip install 'pytest<9.2'")
    if config.getoption("--record-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(durations.Recorder())


def pytest_collection(session: pytest.Session) -> None:
    gc.disable()  # the imports of the tests only add objects: to search them for cycles again and again takes long


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()  # so that no test searches the objects of torch and of all tests
    gc.enable()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, which reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        items[:], slow = durations.fast(items)
        config.hook.pytest_deselected(items=slow)
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        durations.arrange(items)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache that is not the user's, for all processes of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTIL_TL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _handle_ctrl_c() -> None:
    """A shell starts background commands with SIGINT ignored, and nohup with SIGHUP; their processes inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """52 training images, 31 for validation (which divides by no small number), 3 classes."""
    return make_folder(tmp_path_factory.mktemp("images"), {"train": 52, "val": 31})


@pytest.fixture
def data(folder: Path, tmp_path: Path) -> Path:
    """A copy of the images that the test may change."""
    shutil.copytree(folder, tmp_path / "flowers")
    return tmp_path / "flowers"


@pytest.fixture
def near(tmp_path: Path) -> Path:
    """A folder to copy images to."""
    return tmp_path / "near"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Stand-ins for Slurm's commands, and a new current folder."""
    return instead_of_slurm(tmp_path, monkeypatch)


@pytest.fixture
def small(folder: Path) -> list[str]:
    return small_args(folder)


@pytest.fixture(scope="session")
def wandb_server() -> Iterator[Server]:
    """A W&B-compatible server."""
    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def telling_server() -> Iterator[Server]:
    """A W&B-compatible server that also tells a resumed run what it already has, as W&B's own servers do."""
    with serving(tells=True) as server:
        yield server
