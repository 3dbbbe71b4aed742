"""`distil-tl prefetch` downloads and checks weights before a job needs them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distil_tl.cli.main import main as distil_tl
from distil_tl.cli.prefetch import main
from distil_tl.models import torchvision_models
from distil_tl.models.config import ModelConfig
from distil_tl.models.transfer import build


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A local HTTP server with weights of shufflenet_v2_x0_5; the path of the file that it serves."""
    served = tmp_path / "served"
    served.mkdir()
    model = build(ModelConfig("shufflenet_v2_x0_5", weights="none"), 1000, image_size=None, seed=0)
    torch.save(model.module.state_dict(), served / "weights")
    data = (served / "weights").read_bytes()
    path = served / f"shufflenet-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    (served / "weights").rename(path)

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(served), **kwargs)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{path.name}"
    entry = SimpleNamespace(url=url, name="PUBLISHED")
    monkeypatch.setattr(torchvision_models, "published_weights", lambda name, weights: entry)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("torch.hub._hub_dir", None)
    yield path
    server.shutdown()
    server.server_close()


ARGS = ["model.name=shufflenet_v2_x0_5", "model.weights=default", "data.root=anywhere"]


def test_missing_weights_are_downloaded_once_and_checked(published: Path, tmp_path: Path, capsys) -> None:
    assert main(["--check", *ARGS]) == 2
    assert (
        "the weights of shufflenet_v2_x0_5 (torchvision PUBLISHED) are not on this machine" in capsys.readouterr().err
    )
    assert main([*ARGS, "slurm.nodes=2"]) == 0
    cached = tmp_path / "home/hub/checkpoints" / published.name
    assert cached.read_bytes() == published.read_bytes()
    output = capsys.readouterr().out
    assert f"weights of shufflenet_v2_x0_5: {cached}, " in output
    assert "matches the published checksum" in output
    published.unlink()
    assert distil_tl(["prefetch", *ARGS]) == 0
    assert main(["--check", *ARGS]) == 0


def test_a_damaged_file_is_downloaded_again(published: Path, tmp_path: Path, capsys) -> None:
    assert main(ARGS) == 0
    cached = tmp_path / "home/hub/checkpoints" / published.name
    cached.write_bytes(cached.read_bytes()[:-1])
    assert main(["--check", *ARGS]) == 2
    assert f"{cached} is damaged" in capsys.readouterr().err
    assert main(ARGS) == 0
    assert "is damaged; downloading it again" in capsys.readouterr().out
    assert cached.read_bytes() == published.read_bytes()


def test_a_damaged_download_is_refused(published: Path, tmp_path: Path, capsys) -> None:
    published.write_bytes(published.read_bytes()[:-1])
    assert main(ARGS) == 2
    message = capsys.readouterr().err
    assert "could not be downloaded" in message
    assert "distil-tl prefetch" in message
    assert not list((tmp_path / "home").rglob("*.pth")), "part of a download is left"


def test_a_job_without_network_suggests_prefetch(published: Path, folder: Path, tmp_path: Path, capsys) -> None:
    from distil_tl.train import main as train

    published.unlink()
    assert train([*ARGS[:2], f"data.root={folder}", "data.global_batch_size=8", f"run_dir={tmp_path}/run"]) == 2
    assert "Run `distil-tl prefetch` with the same arguments on a machine with network" in capsys.readouterr().err


def test_weights_that_need_no_download(tmp_path: Path, capsys) -> None:
    assert main(["--check", "model.name=resnet18", "model.weights=none", "data.root=anywhere"]) == 0
    assert "none needed" in capsys.readouterr().out
    assert (
        main(["--check", "model.name=timm/tf_efficientnet_lite0", "model.weights=package", "data.root=anywhere"]) == 0
    )
    assert ".pth, 18 MB, SHA-256 " in capsys.readouterr().out
    assert main(["model.name=resnet18", "model.weights=nowhere.pt", "data.root=anywhere"]) == 2
    assert "there is no file nowhere.pt" in capsys.readouterr().err
