"""The `slurm` section beside a training configuration: what reads it, and what leaves it alone."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from distil_tl import config as configuration
from distil_tl import train
from distil_tl.utils.command import run_command
from distil_tl.utils.errors import UserError
from launch import adaptive, status, sync
from launch import args as options
from launch.slurm_config import SlurmConfig, parse_minutes


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def yaml_file(text: str, name: str = "config.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def slurm_of(*args: str) -> SlurmConfig:
    return options.read_run([*args, "data.root=images", "model.weights=none"])[2]


def of_file(text: str, *args: str) -> SlurmConfig:
    return slurm_of(yaml_file(text), *args)


def message_of(*args: str) -> str:
    with pytest.raises(UserError) as caught:
        options.read_run(args)
    return str(caught.value)


# Precedence


def test_without_a_section_the_defaults_are_used() -> None:
    assert slurm_of() == SlurmConfig()
    assert of_file("seed: 1") == SlurmConfig()
    assert of_file("slurm:") == SlurmConfig()


def test_defaults_then_base_then_file_then_command_line() -> None:
    yaml_file("slurm: {partition: a, account: a, qos: a, extra: {x: a, y: a, z: a}}", "shared/base.yaml")
    yaml_file("{base: shared/base.yaml, slurm: {account: b, qos: b, extra: {y: b, z: b}}}", "middle.yaml")
    found = of_file("base: middle.yaml", "slurm.qos=c", "slurm.extra.z=c")
    assert (found.nodes, found.partition, found.account, found.qos) == (1, "a", "b", "c")
    assert found.extra == {"x": "a", "y": "b", "z": "c"}


def test_the_training_is_read_from_the_same_arguments() -> None:
    path = yaml_file("{seed: 5, slurm: {nodes: 2}}")
    config, source, slurm = options.read_run([path, "slurm.gpus_per_node=8", "data.root=images", "model.weights=none"])
    assert (config.seed, slurm.nodes, slurm.gpus_per_node) == (5, 2, 8)
    assert "slurm" not in source


# Values


def test_times_of_a_file_are_read_as_they_are_written() -> None:
    """To YAML 24:00:00 is 86400: a number of base 60, and of minutes sixty days."""
    for text, minutes in (("24:00:00", 1440), ("08:00:00", 480), ("90", 90), ("90:30", 91), ("1-12", 2160)):
        for written in (text, f"'{text}'"):
            found = of_file(f"slurm: {{time: {written}}}").time
            assert (found, parse_minutes(found)) == (text, minutes)
    yaml_file("slurm: {time: 12:00:00}", "base.yaml")
    assert of_file("{base: base.yaml, slurm: {nodes: 2}}").time == "12:00:00"
    assert of_file("{}", "slurm.time=1:30:00").time == "1:30:00"


def test_further_options_are_text_as_sbatch_wants_it() -> None:
    pairs = {"begin": "16:00", "comment": "2024_01", "nice": "010", "mail-type": "END", "gres": "gpu:a100:2"}
    section = ", ".join(f"{key}: {value}" for key, value in pairs.items())
    assert of_file(f"slurm: {{extra: {{{section}}}}}").extra == pairs
    assert slurm_of(*(f"slurm.extra.{key}={value}" for key, value in pairs.items())).extra == pairs


def test_further_options_are_switched_on_and_off() -> None:
    switches = {"exclusive": True, "requeue": False, "comment": None}
    assert of_file("slurm: {extra: {exclusive: true, requeue: false, comment: null}}").extra == switches
    args = ["slurm.extra.exclusive=true", "slurm.extra.requeue=false", "slurm.extra.comment=null"]
    assert slurm_of(*args).extra == switches


def test_numbers_switches_lists_and_null() -> None:
    text = "nodes: 2, nodes_download: true, mem: null, exclude: 'n[3-4]', setup: [module load cuda, export A=1:30]"
    expected = SlurmConfig(nodes=2, nodes_download=True, exclude="n[3-4]", setup=["module load cuda", "export A=1:30"])
    assert of_file(f"slurm: {{{text}}}") == expected
    pairs = [
        "nodes=2",
        "nodes_download=true",
        "mem=null",
        "exclude=n[3-4]",
        "setup=[module load cuda, 'export A=1:30']",
    ]
    assert slurm_of(*(f"slurm.{pair}" for pair in pairs)) == expected


def test_a_value_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB", "biology")
    assert of_file("slurm: {account: '${oc.env:LAB}'}").account == "biology"
    monkeypatch.delenv("LAB")
    assert "LAB" in message_of(yaml_file("slurm: {account: '${oc.env:LAB}'}"), "data.root=x")


def test_gpus_with_or_without_a_type() -> None:
    for written, found in (("4", 4), ("a100:4", "a100:4")):
        assert of_file(f"slurm: {{gpus_per_node: {written}}}").gpus_per_node == found
        assert slurm_of(f"slurm.gpus_per_node={written}").gpus_per_node == found
    path = yaml_file("slurm: {gpus_per_node: a100:4}")
    assert options.read_run([path, "slurm.gpus_per_node=8", "data.root=x", "model.weights=none"])[2].gpus == 8


def test_options_of_srun_as_a_list_or_as_text() -> None:
    wanted = ["--cpu-bind=verbose,cores", "--comment=a b"]
    for pair in ("slurm.srun_args=--cpu-bind=verbose,cores '--comment=a b'", f"slurm.srun_args={json.dumps(wanted)}"):
        assert slurm_of(pair).srun_args == wanted
    assert of_file("slurm:\n  srun_args: --cpu-bind=verbose,cores '--comment=a b'").srun_args == wanted
    assert "slurm.srun_args=it's: No closing quotation" in message_of("slurm.srun_args=it's")


# Profiles


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a profile in the folder of the user."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(Path("home").absolute()))
    text = "slurm: {partition: a, account: a, qos: a, setup: [module load cuda], extra: {x: a, y: a}}"
    yaml_file(text, "home/distil_tl/juwels.yaml")
    return "juwels"


def test_a_profile_is_below_the_file_and_the_command_line(site: str) -> None:
    found = of_file(f"slurm: {{profile: {site}, account: b, qos: b, extra: {{y: b}}}}", "slurm.qos=c")
    assert (found.partition, found.account, found.qos, found.setup) == ("a", "b", "c", ["module load cuda"])
    assert found.extra == {"x": "a", "y": "b"}
    assert slurm_of(f"slurm.profile={site}", "slurm.account=c").account == "c"
    assert of_file(f"slurm: {{profile: {site}}}", "slurm.profile=null").partition is None


def test_a_profile_by_its_path_is_relative_to_the_file_that_names_it() -> None:
    yaml_file("slurm: {partition: a}", "configs/site/here.yaml")
    path = yaml_file("slurm: {profile: site/here.yaml}", "configs/run.yaml")
    assert options.read_run([path, "data.root=x", "model.weights=none"])[2].partition == "a"
    assert slurm_of("slurm.profile=configs/site/here.yaml").partition == "a"


def test_profiles_that_can_not_be_read(site: str) -> None:
    message = message_of("slurm.profile=juwls")
    assert "slurm.profile=juwls: there is no file" in message
    assert "(profiles there: juwels)" in message
    assert "slurm.profile=no.yaml: there is no such file" in message_of("slurm.profile=no.yaml")
    assert "slurm.profile=xxx" in message_of(f"slurm.profile={'x' * 5000}")
    assert "slurm.profile=~nobody-here/a.yaml: there is no such file" in message_of("slurm.profile=~nobody-here/a.yaml")
    for text, why in (("seed: 1", "has no section `slurm`"), ("slurm: {profile: juwels}", "names another profile")):
        assert why in message_of(f"slurm.profile={yaml_file(text, 'odd.yaml')}")
    yaml_file("slurm: {nods: 1}", "home/distil_tl/juwels.yaml")
    assert "unknown key `slurm.nods`" in message_of("slurm.profile=juwels")


# Mistakes


@pytest.mark.parametrize(
    ("key", "hint"),
    [("nods", "did you mean `nodes`?"), ("gpus", "`slurm.gpus_per_node`"), ("times", "did you mean `time`?")],
)
def test_unknown_keys_come_with_a_suggestion(key: str, hint: str) -> None:
    for message in (
        message_of(yaml_file(f"slurm: {{{key}: 1}}"), "data.root=x"),
        message_of(f"slurm.{key}=1"),
    ):
        assert f"unknown key `slurm.{key}`" in message
        assert hint in message


@pytest.mark.parametrize(
    "pair",
    ["nodes=two", "gpus_per_node=1.5", "nodes_download=maybe", "setup=module load cuda", "nodes=null", "extra=1"],
)
def test_values_of_the_wrong_type_name_their_keys(pair: str) -> None:
    assert f"`slurm.{pair.partition('=')[0]}`" in message_of(f"slurm.{pair}")


@pytest.mark.parametrize("section", ["5", "[nodes]", "two nodes"])
def test_a_section_must_hold_keys(section: str) -> None:
    assert "`slurm` is a section: set `slurm.nodes=2`" in message_of(yaml_file(f"slurm: {section}"), "data.root=x")


def test_mistakes_in_both_are_listed_together() -> None:
    message = message_of(yaml_file("{sed: 1, slurm: {nods: 2, mem: [1]}}"), "data.rot=x", "slurm.nodes=two")
    for part in ("`sed`", "`slurm.nods`", "`slurm.mem`", "`data.rot`", "`slurm.nodes`"):
        assert part in message


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["nowhere.yaml"], "there is no configuration file"),
        (["--foo"], "can't read the argument '--foo'"),
        (["a.yaml", "b.yaml"], "can't read the argument"),
        (["slurm=5"], "unknown key `slurm`"),
    ],
)
def test_invalid_arguments(args: list[str], part: str) -> None:
    yaml_file("seed: 1", "a.yaml")
    yaml_file("seed: 1", "b.yaml")
    message = message_of(*args)
    assert message.count(part) == 1


# Who else reads such a file


def test_training_reads_a_file_with_a_slurm_section(capsys) -> None:
    path = yaml_file("{seed: 5, slurm: {nodes: 2, anything: at all}}")
    assert configuration.load([path, "data.root=x", "model.weights=none"])[0].seed == 5
    assert train.main([path, "data.root=nowhere", "model.weights=none"]) == 2
    said = capsys.readouterr().err
    assert "nowhere is not a folder" in said
    assert "slurm" not in said


def test_help_explains_every_key_of_the_section(capsys) -> None:
    """`--help` of the launchers lists every key, as that of training does."""
    from launch import submit, sweep

    for command in (submit, sweep):
        with pytest.raises(SystemExit) as ended:
            command.main(["--help"])
        assert ended.value.code == 0
        said = capsys.readouterr().out
        for key in ("slurm.partition=null", "slurm.signal_delay_s=120", "slurm.extra={}"):
            assert key in said
        assert "seconds before the time limit" in said


def test_a_closed_pipe_ends_the_command_without_an_error(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """As with `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert run_command("launch.submit", lambda: options.print_line("a line")) == 0
        assert sys.stdout is not gone
    assert capsys.readouterr().err == ""


def test_launch_uses_only_what_is_public_in_training() -> None:
    for path in sorted(Path(options.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        ours = [name for node in imports if (node.module or "").startswith("distil_tl") for name in node.names]
        known = {name.asname or name.name for name in ours}
        used = [
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known
        ]
        assert [name for name in [*(n.name for n in ours), *used] if "._" in f".{name}"] == [], path


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1e400", "x", ""])
@pytest.mark.parametrize(("command", "option"), [(status, "--watch"), (sync, "--timeout"), (adaptive, "--poll")])
def test_a_time_that_nobody_can_wait_for_is_refused(
    command: Any, option: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["somewhere", f"{option}={text}"])
    assert ended.value.code == 2
    assert "is not a number of seconds" in capsys.readouterr().err
