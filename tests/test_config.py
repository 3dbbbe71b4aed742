"""The configuration from `[CONFIG.yaml] [key=value ...]`, and the messages for invalid arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from distil_tl.arguments import usage
from distil_tl.config import Config, check, hints, load, problems, run_name
from distil_tl.config.compiler import compiler_problem
from distil_tl.rundir.changes import unsafe_changes
from distil_tl.training.config import default_stages
from distil_tl.utils.args import flatten, plain, to_yaml
from distil_tl.utils.errors import UserError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config_of(*args: str) -> Config:
    return load(args)[0]


def message_of(*args: str) -> str:
    with pytest.raises(UserError) as caught:
        load(args)
    return str(caught.value)


def yaml_file(text: str, name: str = "config.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def of_file(text: str, *args: str) -> Config:
    """The configuration of a file, with some data.root."""
    return config_of(yaml_file(text), "data.root=images", *args)


# Precedence


def test_defaults_then_base_then_file_then_command_line():
    yaml_file("{seed: 1, optim: {weight_decay: 0.1, warmup: 0.1, momentum: 0.1}}", "base.yaml")
    config = of_file("{base: base.yaml, optim: {warmup: 0.2, momentum: 0.2}}", "optim.momentum=0.3")
    assert config.optim.label_smoothing == 0.0
    assert config.seed == 1
    assert (config.optim.weight_decay, config.optim.warmup, config.optim.momentum) == (0.1, 0.2, 0.3)


def test_nothing_of_one_configuration_is_in_the_next():
    before = load(["data.root=x"])
    load(["data.root=x", "seed=5", "stages.full.lr=0.5", "stages.head.search.lr=[7]"])
    assert load(["data.root=x"]) == before


def test_the_last_of_two_values_counts():
    assert config_of("seed=1", "seed=2").seed == 2


def test_a_base_is_found_beside_the_file_that_names_it():
    yaml_file("seed: 7", "shared/deep/root.yaml")
    yaml_file("{base: deep/root.yaml, precision: fp32}", "shared/middle.yaml")
    config = of_file("base: shared/middle.yaml")
    assert (config.seed, config.precision) == (7, "fp32")


def test_a_base_that_includes_itself():
    yaml_file("base: two.yaml", "one.yaml")
    yaml_file("base: one.yaml", "two.yaml")
    assert "one.yaml is its own `base:`, through one.yaml, two.yaml" in message_of("one.yaml")
    assert "is its own `base:`" in message_of(yaml_file("base: config.yaml"))


def test_a_missing_base_is_named_with_its_file():
    message = message_of(yaml_file("base: nowhere.yaml"))
    assert "nowhere.yaml" in message
    assert "config.yaml)" in message


def test_a_files_stages_replace_the_default_ones_in_the_files_order():
    config = of_file("stages: {warm: {unfreeze: head}, top: {unfreeze: 2, lr: 0.5}, all: {unfreeze: all}}")
    assert list(config.stages) == ["warm", "top", "all"]
    assert config.stages["top"].lr == 0.5
    assert config.stages["warm"].epochs == 1  # a stage's own default, not the default head's 3


def test_a_files_stages_replace_its_bases():
    yaml_file("stages: {a: {unfreeze: head, epochs: 4}, b: {unfreeze: all, epochs: 5}}", "base.yaml")
    config = of_file("{base: base.yaml, stages: {b: {unfreeze: 2, lr: 0.5}}}")
    assert list(config.stages) == ["b"]
    assert (config.stages["b"].epochs, config.stages["b"].lr) == (1, 0.5)


def test_the_command_line_edits_stages():
    config = config_of("stages.head.epochs=9")
    assert list(config.stages) == ["head", "full"]
    assert config.stages["head"] == dataclasses.replace(default_stages()["head"], epochs=9)

    config = of_file("stages: {warm: {unfreeze: head, lr: 0.5}}", "stages.warm.epochs=9")
    assert (config.stages["warm"].epochs, config.stages["warm"].lr) == (9, 0.5)


def test_a_list_in_a_file_can_be_replaced_by_a_word():
    """Of keys that take both; others say that they are lists."""
    text = "data: {augment: [crop, trivial]}\nstages: {a: {unfreeze: [head], augment: [hflip]}}"
    assert of_file(text).data.augment == ["crop", "trivial"]
    config = of_file(text, "data.augment=none", "stages.a.unfreeze=all", "stages.a.augment=[rotate(5),erasing]")
    assert (config.data.augment, config.stages["a"].unfreeze) == ("none", "all")
    assert config.stages["a"].augment == ["rotate(5)", "erasing"]


@pytest.mark.parametrize("value", ["head", "all", 2, ["layer4", "head"]])
def test_unfreeze_takes_a_word_a_number_or_a_list(value: Any):
    assert config_of(f"stages.full.unfreeze={value}".replace("'", "")).stages["full"].unfreeze == value


@pytest.mark.parametrize("args", [[], ["seed=1"], ["data.root=null"]])
def test_without_data_the_demo_is_used(args: list[str]):
    data = config_of(*args).data
    assert (data.image_size, data.hflip, data.augment) == (64, False, "none")
    assert config_of(*args, "data.hflip=true").data.hflip is True


def test_demo_defaults_do_not_apply_to_other_data():
    named = [["data.root=."], [yaml_file("data: {root: x}", "x.yaml")], [yaml_file("seed: 1", "y.yaml"), "data.root=x"]]
    for args in (*named, ["y.yaml", "data.root=null"]):
        data = config_of(*args).data
        assert (data.image_size, data.hflip, data.augment) == (None, True, "auto")


def test_a_file_without_data_is_refused():
    assert "config.yaml names no images: add data.root=FOLDER" in message_of(yaml_file("seed: 1"))


# Values


def test_numbers_in_scientific_notation():
    assert config_of("stages.head.lr=1e-4").stages["head"].lr == 1e-4
    assert of_file("stages: {head: {unfreeze: head, lr: 1e-4}}").stages["head"].lr == 1e-4


@pytest.mark.parametrize(
    ("pair", "hint"),
    [
        ("data.split.val=20%", "; write 0.2"), ("data.split.val=12,5 %", "; write 0.125"), ("seed=1,5", "; write 1.5"),
        ("data.split.val=x%", ""), ("data.augment=20%", None),
    ],
)  # fmt: skip
def test_a_percentage_or_a_comma(pair: str, hint: str | None):
    if hint is not None:
        assert message_of(pair).endswith(f"could not be converted to {'Integer' if 'seed' in pair else 'Float'}{hint}")
    else:
        assert config_of(pair).data.augment == "20%"


def test_values_of_the_wrong_type_name_their_keys():
    message = message_of("seed=abc", "optim.warmup=x", "data.hflip=maybe", "data.workers=1.5")
    assert message.startswith("4 problems:\n")
    for key in ("seed", "optim.warmup", "data.hflip", "data.workers"):
        assert f"  - `{key}`: " in message


@pytest.mark.parametrize("args", [["data=5"], ["optim=adamw"], ["stages=head"]])
def test_a_value_where_keys_belong(args: list[str]):
    assert "is a section" in message_of(*args)


@pytest.mark.parametrize("arg", ["data.root=", "data=", "run_dir=", "data.stage_to="])
def test_an_empty_value_is_not_null(arg: str):
    assert f"{arg} is empty, perhaps by an unset variable: give a value, or" in message_of(arg)
    assert config_of(f"{arg}null" if arg != "data=" else "data.root=null").data.root is None


@pytest.mark.parametrize(
    "key",
    ["optim.weight_decay", "optim.clip_norm", "checkpoint.every_minutes", "distributed.timeout_seconds", "optim.warmup",
     "stages.full.lr"],
)  # fmt: skip
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_are_finite(key: str, value: str):
    assert key in complaint_of(f"{key}={value}")


def test_problems_of_all_kinds_are_named_together():
    message = message_of("stages.head.epochs=2.5", "optim.name=adam", "data.image_size=0", "stages.new.epochs=3")
    assert message.startswith("4 problems:")
    for key in ("stages.head.epochs", "optim.name", "data.image_size", "stages.new"):
        assert key in message


def test_a_list_is_asked_for():
    assert message_of("tracking.wandb.tags=a") == "`tracking.wandb.tags` is a list: write tracking.wandb.tags=[a]"


@pytest.mark.parametrize("key", ["stages.head.search.lr", "tracking.wandb.tags", "data.extensions"])
def test_a_list_is_asked_for_whatever_is_given(key: str):
    for value, shown in [("5", "5"), ("a,b", "a,b"), ("null", ""), ("true", "True")]:
        assert message_of(f"{key}={value}") == f"`{key}` is a list: write {key}=[{shown}]"


@pytest.mark.parametrize("key", ["stages.head.search.lr", "stages.full.search.weight_decay", "data.extensions"])
@pytest.mark.parametrize("value", ["[[0.1]]", "[{a: 1}]", "[null]"])
def test_a_list_in_a_list_is_refused(key: str, value: str):
    assert message_of(f"{key}={value}").startswith(f"`{key}` is a list of single values, not of ")


@pytest.mark.parametrize("key", ["tracking.log_every", "stages.head.epochs", "checkpoint.keep", "data.prefetch_mib"])
def test_a_number_that_no_counter_holds_is_refused(key: str):
    config = load([f"{key}=99999999999999999999", "model.name=resnet18", "model.weights=none"])[0]
    assert list(problems(config, 1)) == [f"{key} is 99999999999999999999, too large a number"]


def test_the_number_of_views_is_limited():
    config = load(["stages.head.views=1000000", "model.name=resnet18", "model.weights=none"])[0]
    assert list(problems(config, 1)) == ["stages.head.views must be at least 1 and at most 10,000, or null"]


def test_an_integer_that_no_float_holds_is_refused():
    assert message_of(f"optim.weight_decay={'9' * 400}") == "`optim.weight_decay`: int too large to convert to float"


def test_a_key_below_a_value_is_unknown(tmp_path: Path):
    (tmp_path / "x.yaml").write_text("data.root: null\nstages.full.lr.0: 1\n")
    assert "unknown key `stages.full.lr.0`" in message_of(str(tmp_path / "x.yaml"))


@pytest.mark.parametrize("arg", ["tf32=3", "deterministic=-1", "data.hflip=0.5", "tracking.wandb.artifact=2"])
def test_a_number_is_not_a_truth_value(arg: str):
    key, _, value = arg.partition("=")
    assert message_of(arg) == f"`{key}` is true or false, not {value}"
    assert key in message_of(f"{key}=[1]")
    assert [config_of(f"tf32={value}").tf32 for value in ("1", "0", "yes", "off")] == [True, False, True, False]


def test_what_can_not_be_read_may_be_left_out():
    unread: list[str] = []
    config, _ = load(["seed=x", "data.image_size=64", "no.such=1", "optim.name=adam"], unread=unread)
    assert (config.seed, config.data.image_size, config.optim.name) == (0, 64, "adam")
    assert len(unread) == 2


def test_a_hint_at_what_has_no_effect():
    assert list(hints(config_of("compile_mode=max-autotune"))) == [
        "compile_mode=max-autotune has no effect with compile=none; set compile=prefix or compile=all"
    ]
    assert list(hints(config_of("compile_mode=max-autotune", "compile=all"))) == []
    assert list(hints(config_of())) == []
    assert list(hints(config_of("data.root=x", "data.augment=strong"))) == [], "it is that of stage full"
    assert list(hints(config_of("data.root=x", "data.augment=strong", "stages.full.epochs=0"))) == [
        "data.augment=strong has no effect, as each stage that is trained has an augmentation of its own; set "
        "stages.NAME.augment"
    ]
    (views,) = hints(config_of("data.root=x", "stages.head.views=4"))
    assert views.startswith("stages.head.views=4 has no effect, as nothing is augmented")
    assert list(hints(config_of("data.root=x", "stages.head.views=4", "stages.head.augment=light"))) == []


def test_flips_that_are_not_allowed_are_no_augmentation():
    """So a stage that trains the head alone has features, and a search."""
    text = "data: {root: x, hflip: false, augment: flip}\nstages: {head: {unfreeze: head, search: {lr: [0.1, 0.01]}}}"
    config = config_of(yaml_file(text))
    assert config.augment_of(config.stages["head"]) == "none"
    assert not [problem for problem in problems(config, 1) if "search" in problem]
    config.data.hflip = True
    assert config.augment_of(config.stages["head"]) == "flip"
    assert [problem for problem in problems(config, 1) if "needs a stage that trains on features" in problem]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str):
    for name in ("CC", "CXX", "TORCH_INDUCTOR_INSTALL_GXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("distil_tl.config.compiler.is_installed", lambda name: True)
    message = str(compiler_problem("all", device, lambda: device == "cuda"))
    tool, variable = ("g++", "CXX") if device == "cpu" else ("gcc or clang", "CC")
    assert f"there is no {tool} on this machine: install one, name one with" in message
    assert compiler_problem("all", "auto", lambda: device == "cuda") == message
    assert compiler_problem("none", device, lambda: False) is None
    if device == "cpu":
        assert "compile=prefix needs a C++ compiler" in complaint_of("compile=prefix", "distributed.device=cpu")
    (tmp_path / "mine").touch(0o755)
    monkeypatch.setenv(variable, "mine -m64")
    assert compiler_problem("all", device, lambda: device == "cuda") is None


@pytest.mark.parametrize("key", ["data.root", "data.stage_to", "run_dir", "resume", "model.weights"])
def test_the_home_of_an_unknown_user_is_refused(key: str, tmp_path: Path):
    value = "~no-such-user/x" + (".pth" if key == "model.weights" else "")
    assert complaint_of(f"{key}={value}").startswith(f"{key}={value}: there is no user no-such-user")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args", [["seed", "=", "5"], ["seed=", "5"], ["seed", "=5"], ["optim.name=sgd", "seed", "=", "5"]]
)
def test_spaces_around_the_equals_sign(args: list[str]):
    assert "write seed=5 without spaces" in message_of(*args)


def test_a_folder_in_place_of_a_configuration(tmp_path: Path):
    assert (
        message_of(str(tmp_path))
        == f"{tmp_path} is a folder, not a configuration file; did you mean data.root={tmp_path}?"
    )


def test_a_split_in_place_of_its_folder_and_splits_of_other_names(tmp_path: Path):
    (tmp_path / "data" / "train" / "cat").mkdir(parents=True)
    check(config_of(f"data.root={tmp_path}/data/train"), 1)
    (tmp_path / "data" / "Test" / "cat").mkdir(parents=True)
    assert f"give the folder that holds them: data.root={tmp_path}/data" in complaint_of(
        f"data.root={tmp_path}/data/train"
    )
    (tmp_path / "data" / "Valid" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "train").rename(tmp_path / "data" / "Train")
    message = complaint_of(f"data.root={tmp_path}/data")
    assert message.endswith("(its folders: Test, Train, Valid); rename Train to train; rename Valid to val")


def test_what_is_not_divided_into_splits(tmp_path: Path):
    flat = tmp_path / "flat"
    for name in ("cat", "dog"):
        (flat / name).mkdir(parents=True)
    check(config_of(f"data.root={flat}"), 1)
    assert "among the classes of data.root" in complaint_of(f"data.root={flat}", f"run_dir={flat}/runs/a")
    for usual in ("train", "Train", "valid", "Test", "dev"):
        (flat / usual).mkdir()
        assert "it must hold train/CLASS/*.jpg and val/CLASS/*.jpg" in complaint_of(f"data.root={flat}")
        (flat / usual).rmdir()
    for usual in ("Train", "Val"):
        (flat / "dog" / usual).mkdir()
    assert f"give data.root={flat}/dog" in complaint_of(f"data.root={flat}")
    (flat / "empty").mkdir()
    assert "has no folder; it must hold CLASS/*.jpg" in complaint_of(f"data.root={flat}/empty")
    for image in ("empty/1.JPG", "empty/2.png", "cat/1.jpg"):
        (flat / image).touch()
    message = complaint_of(f"data.root={flat}/empty")
    assert message.endswith(f"has no class folders, only images (2); did you mean data.root={flat}?")


def test_a_table_of_labels(folder: Path, tmp_path: Path):
    table = tmp_path / "labels.csv"
    table.touch()
    config = config_of(f"data.labels={table}")
    check(config, 1)
    assert config.data.root == str(tmp_path)
    assert config.data.image_size is None, "it is not the demo"
    assert "labls.csv is not a file, did you mean `labels.csv`?" in complaint_of(f"data.labels={tmp_path}/labls.csv")
    assert "is a folder, not a file" in complaint_of(f"data.labels={tmp_path}")
    os.mkfifo(tmp_path / "pipe.csv")
    assert "pipe.csv is not a regular file" in complaint_of(f"data.labels={tmp_path}/pipe.csv")
    os.mkfifo(tmp_path / "pipe.pth")
    assert "pipe.pth is not a regular file" in complaint_of(
        f"data.labels={table}", f"model.weights={tmp_path}/pipe.pth"
    )
    assert "with data.labels it must be the folder" in complaint_of(f"data.labels={table}", f"data.root={table}")
    assert "data.columns has no effect" in complaint_of(f"data.root={folder}", "data.columns.label=x")
    one, other = (config_of(f"data.labels={table}", f"data.root={folder}", *more) for more in ([], ["data.labels=x"]))
    assert one.run_dir != other.run_dir
    assert (
        Path(one.run_dir or "").name
        == Path(config_of(f"data.labels={table}", f"data.root={folder}").run_dir or "").name
    )


def test_a_split_for_images_that_have_one_is_refused(folder: Path):
    assert "data.split has no effect" in complaint_of(f"data.root={folder}", "data.split.val=0.3")
    assert "data.split has no effect" in complaint_of("data.split={group: x}")


def test_a_run_directory_among_the_images_is_refused(tmp_path: Path):
    for split in ("train", "val"):
        (tmp_path / "data" / split / "cat").mkdir(parents=True)
    root = f"data.root={tmp_path}/data"
    for inside in ("train/run", "val/cat/run", "train"):
        assert "would become a class" in complaint_of(root, f"run_dir={tmp_path}/data/{inside}")
    check(config_of(root, f"run_dir={tmp_path}/data/run"), 1)


# Unknown keys


@pytest.mark.parametrize(
    ("arg", "unknown", "hint"),
    [
        ("stages.head.lrr=1", "key `stages.head.lrr`", "`lr`"),
        ("data.batch_size=4", "key `data.batch_size`", "`global_batch_size`"),
        ("batch_size=4", "key `batch_size`", "`data.global_batch_size`"),
        ("lr=1", "key `lr`", "`stages.head.lr`"),
        ("stages.ful.lr=1", "stage `stages.ful`", "`full`"),
        ("stages.warm.lr=1", "stage `stages.warm`", "head, full"),
        ("zzz=1", "key `zzz`", "known keys: data, model,"),
    ],
)
def test_unknown_keys_come_with_a_suggestion(arg: str, unknown: str, hint: str):
    message = message_of(arg)
    assert f"unknown {unknown}" in message
    assert hint in message


def test_all_problems_are_listed_together():
    file = yaml_file("{sed: 1, stages: {head: {lrr: 1}, 2b: {}}, optim: {name: [1]}}")
    message = message_of(file, "data.rot=x", "precision={a", "seed=abc")
    assert message.startswith("9 problems:\n")
    assert "stages.head must say what it trains" in message
    for part in (
        "names no images",
        "`sed`",
        "`stages.head.lrr`",
        "'2b'",
        "`optim.name`",
        "`data.rot`",
        "'precision={a'",
        "`seed`",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("stages: {true: {unfreeze: head}}", "the stage name True"),
        ("'foo.bar': 1", "unknown key `foo.bar`"),
        ("data: {'a.b': 1}", "unknown key `data.a.b`"),
        ("1: 2", "unknown key `1`"),
        ("base: [1]", "there is no configuration file"),
    ],
)
def test_odd_keys_in_a_file_are_the_users_error(text: str, part: str):
    assert part in message_of(yaml_file(text), "data.root=images")


@pytest.mark.parametrize("stage", ["", "{}", "{epochs: 3}", "head"])
def test_a_files_stage_says_what_it_trains(stage: str):
    assert message_of(yaml_file(f"stages: {{top: {stage}}}"), "data.root=images").startswith("stages.top must say what")


@pytest.mark.parametrize("text", ["stages: [head]", "stages: {}", "stages: ", "stages: head"])
def test_invalid_stages(text: str):
    assert "`stages` must hold at least one named stage" in message_of(yaml_file(text))


# Arguments and files


def test_keys_are_no_options():
    assert message_of("--data.root=x") == "can't read the argument '--data.root=x': write data.root=x, without --"


@pytest.mark.parametrize("args", [["--foo"], ["-v", "seed=1"], ["a.yaml", "b.yaml"], ["a.yaml", "--lr", "seed=1"]])
def test_odd_arguments(args: list[str]):
    odd = next((arg for arg in args if arg.startswith("-")), args[-1])
    assert message_of(*args) == f"can't read the argument {odd!r}; usage: [CONFIG.yaml] [key=value ...]"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"a: [1,\n b: {", "not valid YAML"),
        (b"- 1\n- 2", "must hold keys and values"),
        (b"\x89PNG\r\n\x1a\n\xff\x00", "can't read the configuration"),
        (b"seed: 1\nseed: 2", "duplicate key seed"),
    ],
)
def test_a_file_that_is_no_configuration(content: bytes, complaint: str):
    Path("picture.png").write_bytes(content)
    message = message_of("picture.png")
    assert complaint in message
    assert "picture.png" in message


def test_a_missing_file_or_a_folder():
    assert "there is no configuration file" in message_of("nothing.yaml")
    assert "is a folder, not a configuration file" in message_of(".")


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(st.sampled_from([*flatten(plain(load(())[1])), "data", "stages"]), st.text("adt.[]{}$: ", max_size=8)),
    st.text("ae1.0[]{}$:,'\"?*&!-\n ", max_size=8),
)
def test_any_value_is_either_read_or_refused(key: str, value: str):
    with contextlib.suppress(UserError):
        load([f"{key}={value}"])


# Interpolation


def test_interpolations_are_resolved_in_the_run_but_not_in_the_saved_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOKEN", "s3cret")
    Path("s3cret.pt").touch()
    file = yaml_file(
        "{run_dir: '${oc.env:TOKEN}/run', data: {root: images}, model: {weights: '${oc.env:TOKEN}.pt'},"
        " tracking: {wandb: {entity: '${oc.env:TOKEN}', name: '${precision}'}}}"
    )
    config, source = load([file])
    assert config.run_dir == "s3cret/run"
    assert config.model.weights == "s3cret.pt"
    assert (config.tracking.wandb.entity, config.tracking.wandb.name) == ("s3cret", "auto")
    assert "s3cret" not in to_yaml(source)
    assert "entity: ${oc.env:TOKEN}" in to_yaml(source)
    assert "s3cret" not in str(plain(source))

    monkeypatch.setenv("TOKEN", "another")
    Path("another.pt").touch()
    assert config_of(yaml_file(to_yaml(source), "saved.yaml")).run_dir == "another/run"


def test_a_missing_variable_is_named_with_its_key():
    file = yaml_file("data: {root: '${oc.env:NOT_THERE}'}")
    message = message_of(file)
    assert "data.root" in message
    assert "NOT_THERE" in message
    assert config_of(file, "data.root=/here").data.root == "/here"


def test_the_configuration_is_read_without_torch():
    code = "import sys; from distil_tl.config import load; load(['data.root=x']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_saved_file_gives_the_same_configuration():
    config, source = load(["stages.head.epochs=9", "seed=3"])
    assert config_of(yaml_file(to_yaml(source))) == config
    assert config.model.weights != "auto"


# Names of runs, and changes on resume


def test_the_run_name_depends_on_what_is_trained():
    name = run_name(config_of("data.root=flowers", "model.name=resnet18"))
    assert name == "flowers-resnet18-" + name[-8:]
    assert config_of("data.root=flowers", "model.name=resnet18").run_dir == f"runs/{name}"
    assert config_of().run_dir == config_of("data.image_size=64").run_dir
    assert Path(str(config_of().run_dir)).name.startswith("digits-")


def test_a_free_key_leaves_the_run_name_and_any_other_changes_it():
    default = run_name(config_of())
    free = ["data.workers=3", "data.max_local_batch_size=4", "checkpoint.keep=5", "distributed.backend=gloo"]
    for arg in [*free, "tracking.wandb.project=x", "resume=never", "run_dir=elsewhere"]:
        assert run_name(config_of(arg)) == default, arg
    for arg in ["seed=1", "stages.head.lr=0.5", "data.global_batch_size=64", "optim.warmup=0.2", "data.root=digits"]:
        assert run_name(config_of(arg)) != default, arg


def changes(args: list[str], started: list[str]) -> list[str]:
    return unsafe_changes(plain(load([])[1]), plain(load(["run_dir=x", *args])[1]), started)


def test_changes_allowed_on_resume():
    assert changes([], ["head"]) == []
    assert changes(["data.root=moved", "data.image_size=64", "data.hflip=false", "data.augment=none"], ["head"]) == []
    assert changes(["data.workers=3", "tracking.log_every=1", "checkpoint.keep=5"], ["head", "full"]) == []


def test_changes_refused_on_resume():
    assert changes(["stages.full.epochs=9"], ["head"]) == []
    assert changes(["data.intensity=[0,4095]"], ["head"]) == ["data.intensity: was 'dtype', now [0, 4095]"]
    assert changes(["stages.full.epochs=9"], ["head", "full"]) == ["stages.full.epochs: was 5, now 9"]
    assert changes(["stages.head.augment=light", "seed=1"], ["head"]) == [
        "seed: was 0, now 1",
        "stages.head.augment: was 'none', now 'light'",
    ]


def test_a_stage_that_has_not_begun_may_be_added_or_removed():
    one = {"stages": {"head": {"lr": 1.0}}}
    two = {"stages": {"head": {"lr": 1.0}, "full": {"lr": 2.0}}}
    assert unsafe_changes(one, two, ["head"]) == unsafe_changes(two, one, ["head"]) == []
    assert unsafe_changes(two, one, ["head", "full"]) == ["stages.full.lr: was 2.0, now null"]


def test_new_stages_may_not_come_before_begun_ones():
    head, full, new = ({"epochs": epochs} for epochs in (1, 2, 3))
    before = {"stages": {"head": head, "full": full}}
    assert unsafe_changes(before, {"stages": {"head": head, "new": new, "full": full}}, ["head"]) == []
    for now in ({"new": new, "head": head, "full": full}, {"full": full, "head": head}):
        (change,) = unsafe_changes(before, {"stages": now}, ["head"])
        assert change.startswith("stages: the order was head, now ")
    skipped = {"skipped": {"epochs": 0}, "head": head, "full": full}
    assert unsafe_changes(before, {"stages": skipped}, ["head"]) == []


# Checks


def complaint_of(*args: str, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        check(config_of(*args), world_size)
    return str(caught.value)


def test_the_default_passes():
    check(config_of(), 1)
    check(config_of(), 8)


def test_an_indivisible_batch_lists_fitting_world_sizes():
    message = complaint_of("data.global_batch_size=30", world_size=4)
    assert "30 can't be divided evenly among 4 processes" in message
    assert "world sizes that fit are 1, 2, 3, 5, 6, 10, 15, or use data.global_batch_size=32" in message


def test_a_missing_root_or_split_is_refused(tmp_path: Path):
    (tmp_path / "flowers" / "train").mkdir(parents=True)
    assert "flower is not a folder, did you mean `flowers`?" in complaint_of(f"data.root={tmp_path / 'flower'}")
    assert "has no val folder" in complaint_of("data.root=flowers")
    run = tmp_path / "runs" / "f"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("data:\n  root: flower\n")
    assert "run directory (of images in flower); give the images' folder" in complaint_of(f"data.root={run}")
    assert "runs holds run directories (f); give" in complaint_of(f"data.root={run.parent}")
    moved = complaint_of("data.root=flower", f"run_dir={run}")
    assert f"the images of {run} were there: if moved, give data.root=NEW_FOLDER run_dir={run}" in moved
    assert "did you mean `flowers`?" in complaint_of("data.root=flowrs", f"run_dir={run}")
    (tmp_path / "flowers" / "val").mkdir()
    check(config_of("data.root=flowers"), 1)
    assert f"is a folder above the splits: give data.root={tmp_path}/flowers" in complaint_of(f"data.root={tmp_path}")


def test_nothing_to_train():
    assert "every stage has 0 epochs" in complaint_of("stages.head.epochs=0", "stages.full.epochs=0")
    check(config_of("stages.head.epochs=0"), 1)


@pytest.mark.parametrize(
    "arg",
    [
        "precision=fp8",
        "resume=runs/gone",
        "data.augment=wild",
        "data.image_size=4",
        "data.global_batch_size=0",
        "data.workers=500",
        "model.name=resnet19",
        "stages.head.unfreeze=tail",
        "stages.head.epochs=-1",
        "stages.head.lr=nan",
        "stages.full.layer_decay=0",
        "optim.name=adam",
        "optim.warmup=1",
        "checkpoint.keep=0",
        "distributed.device=tpu",
        "tracking.log_every=0",
        "tracking.wandb.mode=on",
    ],
)
def test_invalid_values_are_reported_with_their_key(arg: str):
    message = complaint_of(arg)
    assert arg.partition("=")[0] in message
    assert "problems" not in message  # this one alone


def test_all_problems_of_values_are_listed():
    message = complaint_of("precision=fp8", "optim.name=adam", "data.augment=wild", world_size=5)
    assert message.startswith("4 problems:\n  - ")


# Help


def test_usage_shows_every_key_with_its_default_and_comment():
    text = usage("train")
    lines = [line.strip() for line in text.splitlines()]
    for key, value in flatten(plain(OmegaConf.structured(Config))).items():
        shown = "null" if value is None else value
        assert any(line.startswith(f"{key}={shown}") for line in lines), key
    assert "images per optimizer step, all ranks" in next(s for s in lines if s.startswith("data.global_batch_size"))
    assert "peak learning rate of the head" in next(s for s in lines if s.startswith("stages.full.lr"))
    assert "disabled | offline | online" in next(s for s in lines if s.startswith("tracking.wandb.mode"))


def test_the_command_prints_one_message_and_exits_with_2():
    command = [sys.executable, "-m", "distil_tl.train", "stages.head.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "distil_tl.train: unknown key `stages.head.lrr`, did you mean `lr`?\n"


@pytest.mark.parametrize("text", ["2024_01", "007", "1e3", "on", "12:30", "none"])
def test_text_on_the_command_line_is_kept_as_typed(text: str):
    config = config_of(f"data.root={text}", f"run_dir={text}", f"tracking.wandb.name={text}")
    assert (config.data.root, config.run_dir, config.tracking.wandb.name) == (text, text, text)
    assert config_of("run_dir=x", "data.root=null").data.root is None
