"""The steps of the GPU check, most important first. Each returns its last line, and fills in its figures."""

from __future__ import annotations

import importlib
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import distil_tl.train  # noqa: F401  # once for all steps, which are forked
from distil_tl.rundir.directory import git_state
from distil_tl.utils.threads import available_cpus
from tests.gpu_check.check import Check, Forked, completed, expect, figures_of, ranks, summary, train
from tests.gpu_check.speed import pipeline, profile
from tests.gpu_check.stopping import stop_and_resume
from tests.helpers.paths import ROOT
from tests.helpers.ranks import lines

Figures = dict[str, Any]


def facts(check: Check, figures: Figures) -> str:
    """GPU, cores, limits, versions."""
    import torchvision

    if not check.dry:
        expect(torch.cuda.is_available(), f"torch {torch.__version__} sees no CUDA device")
        properties = torch.cuda.get_device_properties(0)
        figures["gpu"] = properties.name
        figures["gpus"] = torch.cuda.device_count()
        figures["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        figures["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,mig.mode.current", "--format=csv,noheader"]
        if shutil.which(query[0]):
            figures["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    shm, git = os.statvfs("/dev/shm"), git_state()
    figures.update(
        commit=git["commit"][:10] + "+" * git["dirty"] if git else None,
        cores=available_cpus(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shm_mb=round(shm.f_bavail * shm.f_frsize / 1e6),
        python=platform.python_version(),
        torch=torch.__version__,
        torchvision=torchvision.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    )
    return ", ".join(f"{name} {value}" for name, value in figures.items())


class Count:
    """A plugin of pytest that counts the results of tests."""

    def __init__(self) -> None:
        self.collected, self.results = 0, {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected = len(session.items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.results[report.outcome] += 1


def tests(check: Check, figures: Figures) -> str:
    """All tests marked `gpu`. On a CPU they are skipped: what can run there is part of the other tests."""
    marked = re.compile(r"mark\.gpu|\bon_gpu\b|\bNEEDS_GPU\b")  # the names in tests/helpers/devices.py
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if marked.search(path.read_text())]
    count = Count()
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "-o", "addopts=-ra", f"--basetemp={check.own}/pytest"]
    status = pytest.main([*options, *files], plugins=[count])
    figures.update(count.results)
    expect(status == 0, f"pytest ended with status {int(status)}: {count.results}")
    expect(count.collected > 0, "no test is marked gpu")
    expect(check.dry or not count.results["skipped"], f"{count.results['skipped']} tests were skipped")
    return f"{count.collected} tests: " + ", ".join(f"{number} {name}" for name, number in count.results.items())


def alone(check: Check, figures: Figures) -> str:
    """Two stages in one process."""
    figures.update(figures_of(completed(check, "alone")))
    return f"top-1 {figures['top1']:.3f}, loss {figures['loss']:.3f}"


def torchrun(check: Check, figures: Figures) -> str:
    """The same under torchrun: on a GPU with NCCL."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    more = [] if check.dry else ["distributed.backend=nccl"]
    command += ["-m", "distil_tl.train", *check.arguments("torchrun", *more)]
    status = subprocess.run(command, check=False, cwd=ROOT).returncode
    expect(status == 0, f"torchrun ended with status {status}")
    figures.update(figures_of(summary(check, "torchrun")))
    return f"top-1 {figures['top1']:.3f}, loss {figures['loss']:.3f}"


EXACT = ("precision=fp32", "tf32=false", "data.augment=none", "optim.name=sgd", "stages.head.lr=1e-3",
         "stages.full.lr=1e-4")  # fmt: skip


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in lines(run_dir, window="epoch")]


def largest_difference(one: list[float], two: list[float]) -> float:
    expect(len(one) == len(two) > 0, f"{len(one)} and {len(two)} losses")
    return max(abs(a - b) / max(abs(a), abs(b), 1e-9) for a, b in zip(one, two, strict=True))


def ranks_share_a_gpu(check: Check, figures: Figures) -> str:
    """One and two ranks over gloo, which share the GPU, have the same losses."""
    for world in (1, 2):
        ended = ranks(check, f"ranks-{world}", world, "distributed.backend=gloo", *EXACT)
        statuses = [status for status, _ in ended]
        expect(statuses == [0] * world, f"{world} ranks ended with status {statuses}")
    one, two = (losses(check.run_dir(f"ranks-{world}")) for world in (1, 2))
    figures["largest_difference"] = found = largest_difference(one, two)
    expect(found < 0.01, f"losses of 1 and 2 ranks differ by {found:.2g}: {one}, {two}")
    return f"losses of 1 and 2 ranks differ by at most {found:.1g} of their value"


def train_as_if_on_one_gpu(args: list[str]) -> int:
    """Train on the CPU, with a device that the other ranks take for the same GPU."""
    module: Any = importlib.import_module("distil_tl.distributed.process_group")
    original = module.describe

    def describe(*given: Any) -> Any:
        return replace(original(*given), kind="cuda", gpu="GPU-0")

    module.describe = describe
    return train(args)


def nccl_refused(check: Check, figures: Figures) -> str:
    """NCCL can't have two ranks on one GPU: the message names both."""
    if check.dry:
        ended = ranks(check, "refused", 2, body=train_as_if_on_one_gpu)
    else:
        ended = ranks(check, "refused", 2, "distributed.backend=nccl")
    statuses = [status for status, _ in ended]
    expect(statuses == [2, 2], f"statuses {statuses} instead of 2 and 2")
    text = "".join(text for _, text in ended)
    expect("Traceback" not in text, "a traceback instead of a message")
    named = re.search(r"rank 0\b.*\brank 1\b|ranks 0, 1\b", text)
    expect(named is not None, "the message does not name both ranks")
    message = next(line for line in text.splitlines() if named and named[0] in line)
    return message.strip()


def features(check: Check, figures: Figures) -> str:
    """A head on features has the same losses as on images."""
    found = {}
    for value in ("on", "off"):
        more = [*EXACT, f"stages.head.features={value}", "stages.head.epochs=2", "stages.full.epochs=0"]
        found[value] = completed(check, f"features-{value}", *more)["stages"]["head"]
        figures[f"seconds_{value}"] = found[value]["seconds"]
    expect(found["on"]["cached"] and not found["off"]["cached"], "features were not used, or used where they are off")
    one, two = (losses(check.run_dir(f"features-{value}")) for value in ("on", "off"))
    figures["largest_difference"] = difference = largest_difference(one, two)
    expect(difference < 0.01, f"losses with and without features differ by {difference:.2g}: {one}, {two}")
    return (
        f"losses differ by at most {difference:.1g}; {found['on']['seconds']:.1f} s and {found['off']['seconds']:.1f} s"
    )


PARTLY = """
data: {root: null}
stages:
  first: {unfreeze: head, features: "off"}
  second: {unfreeze: 2, features: "off"}
  third: {unfreeze: 3, features: "off"}
  fourth: {unfreeze: 4, features: "off"}
"""


def compiled_train(args: list[str]) -> int:
    """Train with torch.compile; without a GPU its graphs are run as they are, as compiling them takes minutes."""
    import distil_tl.train as module

    original = torch.nn.Module.compile

    def compile_without_kernels(network: torch.nn.Module, **options: Any) -> None:
        original(network, backend="eager", dynamic=options["dynamic"])

    if not torch.cuda.is_available():
        torch.nn.Module.compile = compile_without_kernels  # type: ignore[method-assign, assignment]
    status = module.main(args)
    from torch._dynamo.utils import counters

    sys.stdout.write(f"graphs: {counters['stats'].get('unique_graphs')}\n")
    return status


def compile_all(check: Check, figures: Figures) -> str:
    """compile=all over four partly frozen stages, without a warning about the limit of recompilations."""
    path = check.own / "partly.yaml"
    stages = [line for line in PARTLY.splitlines() if not (check.dry and ("second" in line or "third" in line))]
    path.write_text("\n".join(stages))
    args = [arg for arg in check.arguments("compile") if not arg.startswith("stages.")]
    root = [] if check.dry else ["data.root=null", "data.image_size=64", "data.augment=none", "data.hflip=false"]
    status, text = Forked(check.own / "compile.txt", compiled_train, [str(path), *args, *root, "compile=all"]).wait()
    expect(status == 0, f"status {status}")
    expect(not re.search("recompile_limit|cache_size_limit", text), "torch stopped to compile: its limit was reached")
    figures.update(figures_of(summary(check, "compile")))
    graphs = re.search(r"^graphs: (\d+)", text, re.MULTILINE)
    figures["graphs"] = int(graphs[1]) if graphs else None
    return f"{len(figures['stages'])} stages, {figures['graphs']} graphs, no warning"


@dataclass(frozen=True)
class Step:
    """A step and its limit on a GPU, in seconds."""

    body: Callable[[Check, Figures], str]
    limit: int


STEPS = {
    "facts": Step(facts, 30),
    "tests": Step(tests, 150),
    "alone": Step(alone, 60),
    "torchrun": Step(torchrun, 60),
    "ranks-share-a-gpu": Step(ranks_share_a_gpu, 75),
    "nccl-refused": Step(nccl_refused, 40),
    "stop-and-resume": Step(stop_and_resume, 120),
    "features": Step(features, 45),
    "pipeline-resnet50": Step(pipeline("resnet50"), 120),
    "pipeline-vit_b_16": Step(pipeline("vit_b_16"), 100),
    "profile": Step(profile, 45),
    "pipeline-resnet50-32": Step(pipeline("resnet50-32"), 75),
    "pipeline-mobilenet_v2": Step(pipeline("mobilenet_v2"), 60),
    "compile": Step(compile_all, 240),  # a minute for each of its stages
}
