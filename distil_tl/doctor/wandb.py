"""Weights & Biases: package, key and server. No key is ever shown."""

from __future__ import annotations

import configparser
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from distil_tl.doctor.lines import Report
from distil_tl.doctor.network import reach
from distil_tl.tracking.config import WandbConfig
from distil_tl.utils.home import expand_home
from distil_tl.utils.import_path import is_installed

GROUP = "tracking"
_LATER = "training continues without it, and `python -m launch.sync RUN_DIR` sends the run later"


def judge_wandb(report: Report, config: WandbConfig) -> None:
    """Lines about W&B. Nothing here stops a run: metrics.jsonl is complete without it."""
    if config.mode == "disabled":
        report.ok(GROUP, "W&B", "disabled; metrics.jsonl and report.html have every figure")
        return
    if not is_installed("wandb"):
        report.warn(GROUP, "W&B", f"tracking.wandb.mode={config.mode}, but wandb is not installed: pip install "
                    f"'distil_tl[wandb]'; {_LATER}")  # fmt: skip
        return
    if config.mode == "offline":
        report.ok(GROUP, "W&B", f"offline; {_LATER.rpartition('and ')[2]}")
        return
    url = server()
    if has_key(url):
        report.ok(GROUP, "W&B key", f"there is one for {url}")
    else:
        report.warn(GROUP, "W&B key", f"there is none for {url}: run `wandb login`, or set WANDB_API_KEY; {_LATER}")
    problem = reach(url)
    if problem is None:
        report.ok(GROUP, "W&B server", f"{url} can be reached from here; project {config.project}")
    else:
        report.warn(GROUP, "W&B server", f"{url} can't be reached from here ({problem}): use "
                    f"tracking.wandb.mode=offline where there is no network; {_LATER}")  # fmt: skip


def server() -> str:
    """The URL of the server, from the environment or W&B's settings files."""
    url = os.environ.get("WANDB_BASE_URL")
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or expand_home("~") / ".config/wandb")
    for file in (Path("wandb/settings"), folder / "settings"):
        parser = configparser.ConfigParser()
        try:
            parser.read(file)
            url = url or parser.get("default", "base_url", fallback=None)
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue
    return (url or "https://api.wandb.ai").rstrip("/")


def has_key(url: str) -> bool:
    """Whether there is a key for this server, in the environment or in ~/.netrc."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    named = os.environ.get("NETRC")
    for file in [Path(named)] if named else [expand_home("~") / ".netrc", expand_home("~") / "_netrc"]:
        try:
            if netrc.netrc(str(file)).authenticators(urlsplit(url).netloc):
                return True
        except (netrc.NetrcParseError, OSError):
            continue
    return False
