"""Weights & Biases: a key, which is never shown, and a server."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest

from distil_tl.doctor import wandb
from distil_tl.doctor.lines import OK, WARN, Report
from distil_tl.doctor.network import reach
from distil_tl.tracking.config import WandbConfig
from tests.helpers.doctor import found
from tests.helpers.ranks import free_port

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory without settings, and no variables of W&B and proxies."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def judged(mode: str) -> Report:
    report = Report()
    wandb.judge_wandb(report, WandbConfig(mode=mode))
    return report


def test_no_key_and_no_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}/")
    key, server = found(judged("online"), WARN)
    assert "tracking/W&B key: there is none for http://127.0.0.1" in key
    assert "run `wandb login`" in key
    assert "can't be reached from here (127.0.0.1:" in server
    assert "Connection refused): use tracking.wandb.mode=offline" in server


def test_a_key_is_found_and_not_shown(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (home / ".config/wandb").mkdir(parents=True)
        (home / ".config/wandb/settings").write_text(f"[default]\nbase_url = http://127.0.0.1:{port}\n")
        netrc = home / ".netrc"
        netrc.write_text(f"machine 127.0.0.1:{port}\n  login user\n  password {KEY}\n")
        netrc.chmod(0o600)
        report = judged("online")
        assert found(report, WARN) == []
        assert len(found(report, OK)) == 2
        netrc.unlink()
        assert len(found(judged("online"), WARN)) == 1
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        assert found(judged("online"), WARN) == []
    assert KEY not in str(report)


def test_other_modes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(judged("disabled"), WARN) + found(judged("offline"), WARN) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "wandb is not installed: pip install 'distil_tl[wandb]'" in found(judged("offline"), WARN)[0]


def test_a_proxy_is_asked_for_the_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{free_port()}")
    problem = reach("https://example.invalid")
    assert problem is not None
    assert "the proxy for" in problem
    assert "Connection refused" in problem
