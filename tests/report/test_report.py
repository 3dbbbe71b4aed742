"""The report of synthetic run directories: its content, and that it is safe, small and self-contained."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from distil_tl.report import main
from distil_tl.report.head_search import fit_tables
from distil_tl.report.images import thumbnail
from distil_tl.report.load import Run, load_run
from distil_tl.report.markup import Markup, h
from distil_tl.report.svg import MAX_POINTS, Scale, downsample, fit_scale, linear_ticks
from distil_tl.report.text import compact, duration, number, percent, percentage_points, timestamp
from tests.helpers.report_runs import EVIL, NAMES, build_evaluation, build_metrics, build_run, report, write_lines


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build_run(tmp_path / "flowers-r50")


def test_it_shows_the_figures_of_the_run(run):
    page, words = report(run)
    best = json.loads((run / "summary.json").read_text())["best"]
    assert f"{best['top1'] * 100:.1f} %" in words
    assert f"val, full epoch {best['epoch']}" in words
    for expected in (
        "flowers-r50",
        "completed",
        "13 min 32 s",
        "2,150",
        "90.1 %",
        "9.1 GiB peak",
        "head",
        "layer4",
    ):
        assert expected in words
    for expected in (
        "node-17",
        "4f1c2a9be77d",
        "${oc.env:DATA}/flowers",
        "head cached",
        "2025-10-09 08:53 UTC",
    ):
        assert expected in words
    order = [page.index(f">{part}</h") for part in ("Loss", "Top-1 accuracy and macro F1", "Learning rate", "Stages")]
    order += [page.index(f">{part}</h2>") for part in ("Classes", "Confusion matrix", "Mistakes", "Throughput")]
    assert order == sorted(order)
    assert not list(run.glob("*.tmp*"))
    assert "nan" not in re.sub(r"<style>.*?</style>|<script>.*?</script>", "", page, flags=re.S).lower().split()


def test_classes_are_sorted_by_f1_with_their_most_frequent_wrong_prediction(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    _, words = report(run)
    table = words[words.index("Most confused with") : words.index("Confusion matrix Rows")]
    ranked = [e["class"] for e in sorted(evaluation["per_class"], key=lambda e: e["f1"])]
    assert re.findall("|".join(NAMES), table)[::2] == ranked


def test_fitted_heads_are_shown_by_the_metric_that_chose_them() -> None:
    heads = [{"penalty": 1.0, "top1": 0.75, "macro_f1": 0.625, "loss": 1.0}]
    summary = {"stages": {"head": {"fit": {"head": "ridge", **heads[0], "heads": heads}}}}
    (table,) = fit_tables(Run("run", Path("run"), [], summary, config="metric: macro_f1\n"))
    assert "62.5\u202f%" in str(table)
    assert "75.0\u202f%" not in str(table)


def add_search(run: Path, rates: list[Any], decays: list[Any], chosen: tuple[Any, Any]) -> None:
    """A head search of stage head in which every second head diverged."""
    summary = json.loads((run / "summary.json").read_text())
    pairs = [(rate, decay) for rate in rates for decay in decays]
    heads = [
        {"lr": rate, "weight_decay": decay, "top1": None if i % 2 else 0.8 + i / 1e4, "loss": None if i % 2 else 0.5}
        for i, (rate, decay) in enumerate(pairs)
    ]
    summary["stages"]["head"]["search"] = {"lr": chosen[0], "weight_decay": chosen[1], "heads": heads}
    (run / "summary.json").write_text(json.dumps(summary))


def test_the_memory_of_each_stage_and_the_parts_of_batches_where_it_ran_out(run):
    summary = json.loads((run / "summary.json").read_text())
    head, *_, last = summary["stages"]
    summary["stages"][head]["peak_memory_mb"] = 2560.0
    summary["stages"][last] |= {"peak_memory_mb": 0, "part_sizes": {"training": 16, "evaluation": 1024}}
    (run / "summary.json").write_text(json.dumps(summary))
    _, words = report(run)
    assert f"Peak memory of a rank, {head} 2.5 GiB" in words
    assert f"Peak memory of a rank, {last}" not in words
    assert (
        f"Memory ran out in stage {last}, so batches went through the network in parts: "
        "16 images at once in training, 1,024 images at once in evaluation." in words
    )
    assert f"Memory ran out in stage {head}" not in words


def test_a_head_search_is_drawn_with_the_chosen_head_outlined(run):
    assert "<h2>Head search" not in report(run)[0]
    add_search(run, [0.1, 1e-4], [0, 0.5, 2], (1e-4, 0.5))
    page, _ = report(run)
    part = page[page.index("<h2>Head search") : page.index("<h2>Evaluation")]
    assert part.count("<rect") == 6
    (frame,) = re.findall(r'<rect class="right chosen"[^>]*><title>([^<]*)', part)
    assert frame == "lr 1e-4, weight decay 0.5: top-1 80.0\u202f%"
    assert re.findall(r'class="count[^>]*>([^<]*)', part) == ["80.0", "\u2014", "80.0", "\u2014", "80.0", "\u2014"]


def test_a_head_that_is_not_the_best_comes_with_the_reason(run):
    add_search(run, [0.1, 1e-4], [0, 0.5, 2], (1e-4, 0.5))
    summary = json.loads((run / "summary.json").read_text())
    summary["stages"]["head"]["search"] |= {
        "prefer": "regularized", "standard_error": 0.0204, "near": 3, "best": {"lr": 0.1, "weight_decay": 2}
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    assert (
        "the most regularized of 3 within one standard error (2.0 points) of the best, lr 0.1 with weight decay 2."
        in report(run)[1]
    )


def test_a_large_head_search_is_a_list(run):
    add_search(run, [1 / (i + 1) for i in range(80)], [0.5], (1.0, 0.5))
    page, words = report(run)
    assert "<rect" not in page[page.index("<h2>Head search") : page.index("<h2>Evaluation")]
    assert words[words.index("Learning rate Weight decay Val top-1") :].split()[6:9] == ["0.0126582", "0.5", "80.8"]


def test_a_head_search_with_unusable_values(run):
    for rates in ([EVIL], [None, 0.1], [1e300, math.inf], []):
        add_search(run, rates, [0.1], (EVIL, None))
        assert EVIL not in report(run)[0]
    summary = json.loads((run / "summary.json").read_text())
    for search in (EVIL, [1], {"heads": EVIL}, {"heads": [EVIL, None]}):
        summary["stages"]["head"]["search"] = search
        (run / "summary.json").write_text(json.dumps(summary))
        assert "<h2>Head search" not in report(run)[0]


def test_everything_from_data_is_escaped(tmp_path):
    run = build_run(tmp_path / "evil", [EVIL, '"><img src=x onerror=alert(1)>', "a&b", "\ud800lone"])
    lines = [line | {"stage": EVIL if line["stage"] == "head" else line["stage"]} for line in build_metrics()]
    write_lines(run, lines)
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"status": EVIL, "error": EVIL, "stages": {EVIL: {"seconds": EVIL, "epochs": EVIL}}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "env.json").write_text(json.dumps({EVIL: EVIL, "host": EVIL, "command": [EVIL], "start_time": EVIL}))
    (run / "config.yaml").write_text(f"</pre>{EVIL}<!--")
    evaluation = build_evaluation([EVIL, '"><img src=x onerror=alert(1)>'])
    evaluation["split"] = EVIL
    evaluation["mistakes"] += [{"path": "http://example.com/\udcff.png", "target": 1, "prediction": None}]
    (run / "evaluation.json").write_text(json.dumps(evaluation).replace("http:", "ftp:"))
    page, words = report(run)
    assert EVIL not in page
    assert words.count(EVIL) > 10
    assert "onerror=alert(1)>" not in page


@pytest.mark.parametrize("kept", [1, 2, 13, 40])
def test_a_run_in_progress(tmp_path, kept):
    run = tmp_path / "young"
    write_lines(run, build_metrics()[:kept])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 990, "epo')
    _, words = report(run)
    assert "in progress" in words
    assert "No summary.json" in words
    assert "could not be read" not in words
    assert len(load_run(run).metrics) == kept


def test_waiting_for_data_is_shown_where_it_was_measured(run):
    assert "Waiting for data" not in report(run)[1]
    summary = json.loads((run / "summary.json").read_text())
    summary["stages"]["full"] |= {"data_wait_seconds": 30.0, "train_seconds": 100.0}
    (run / "summary.json").write_text(json.dumps(summary))
    _, words = report(run)
    assert "Waiting for data, full 30.0 %" in words
    assert "Waiting for data, head" not in words
    assert "Stage full waited for images during 30 % of its training." in words


def test_waiting_for_data_of_a_run_in_progress(tmp_path):
    lines = [line | {"data_wait_seconds": 0.5 * line.get("seconds", 0)} for line in build_metrics()]
    write_lines(tmp_path, lines)
    _, words = report(tmp_path)
    assert words.count("Waiting for data") == words.count("50.0 %") == 3
    assert "Stage layer4 waited for images during 50 % of its training." in words


def test_an_empty_metrics_file(tmp_path):
    write_lines(tmp_path, [])
    _, words = report(tmp_path)
    assert "No metrics yet" in words
    assert "No data yet" in words


def test_damaged_files_and_values_that_are_not_numbers(tmp_path):
    lines = build_metrics()
    for i, line in enumerate(lines):
        if i % 3 == 0:
            line |= {
                "loss": math.nan,
                "top1": None,
                "lr": math.inf,
                "images_per_second": "fast",
                "epoch": None,
            }
    write_lines(tmp_path, lines)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('not json\n[1]\n{"step": null}\n{"step": NaN}\n' + "[" * 100_000 + "\n")
    (tmp_path / "summary.json").write_text(
        '{"status": "failed", "best": null, "stages": [1], "total_seconds": NaN, "world_size": true}'
    )
    broken = {"per_class": [1, {"class": 0, "f1": math.nan}, {}], "confusion_matrix": [[1, 2], [3]]}
    (tmp_path / "evaluation.json").write_text(json.dumps(broken | {"mistakes": [{}, None], "top1": "x", "n": None}))
    (tmp_path / "classes.json").write_text("{}")
    (tmp_path / "env.json").write_text("{")
    page, words = report(tmp_path)
    assert "failed" in words
    assert "non-finite values not drawn" in words
    assert "5 lines of metrics.jsonl could not be read" in words
    assert "env.json could not be read" in words
    assert "classes.json could not be read" in words
    assert "not square" in words
    assert not re.search(r"\b(NaN|nan|inf|Infinity|None)\b", page.split("<main>")[1].split("<script>")[0])


def test_a_run_whose_every_loss_is_nan(tmp_path):
    write_lines(tmp_path, [line | {"loss": math.nan, "top1": None} for line in build_metrics()])
    _, words = report(tmp_path)
    assert "No data yet" in words


def test_a_single_class_and_constant_values(tmp_path):
    run = build_run(tmp_path / "one", ["only"])
    flat = {"loss": 0.0, "top1": 1.0, "macro_f1": 1.0, "lr": 0.0, "images_per_second": 0.0}
    write_lines(run, [line | flat for line in build_metrics()])
    evaluation = build_evaluation(["only"]) | {"confusion_matrix": [[80]]}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    _, words = report(run)
    assert "1 class" in words
    assert "1 classes" not in words
    assert "Most confused pairs" not in words


def test_of_many_classes_those_with_the_most_mistakes_are_drawn(tmp_path):
    names = [f"class-{i}" for i in range(1500)]
    page, words = report(build_run(tmp_path / "many", names))
    assert page.count("class-") < 20_000
    assert "Drawn are the 60 classes with the most mistakes." in words
    assert page.count('class="tick y">class-') == 60
    assert "975 more classes (500 with a higher F1 are not shown)" in words
    pairs = words[words.index("Most confused pairs") : words.index("Mistakes The")]
    assert pairs.count("class-") == 60
    assert len(page) < 800_000


def test_sixty_classes_are_drawn(tmp_path):
    page, _ = report(build_run(tmp_path / "sixty", [f"class-{i}" for i in range(60)]))
    assert 'class="heat small"' in page
    assert "<title>class-0 \u2192 class-1: " in page


def test_images_that_exist_have_thumbnails(run):
    image_module = pytest.importorskip("PIL.Image")
    mistakes = json.loads((run / "evaluation.json").read_text())["mistakes"]
    for i, mistake in enumerate(mistakes):
        path = Path(mistake["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        if i == 0:
            path.write_bytes(b"not an image")
        else:
            image_module.new(("RGB", "RGBA", "L", "P", "I;16")[i % 5], (300, 200), 90).save(path)
    page, _ = report(run)
    assert page.count('src="data:image/jpeg;base64,') == 23
    assert len(page) < 300_000


def test_a_thumbnail_is_the_image_as_the_model_saw_it(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    path = tmp_path / "image.png"

    def shown(image: Any, intensity: Any = "dtype", **options: Any) -> tuple[Any, Any]:
        image.save(path, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow warns of palettes with transparency
            content = base64.b64decode(str(thumbnail(str(path), intensity)).partition(",")[2])
        small = image_module.open(io.BytesIO(content))
        return small.size, small.getpixel((2, 2))

    white = ((64, 43), (255, 255, 255))
    transparent = image_module.new("RGBA", (90, 60), (200, 0, 0, 0))
    assert shown(transparent) == white
    assert shown(transparent.quantize(), transparency=b"\0" * 256) == white
    assert shown(image_module.new("I;16", (90, 60), 4000), (0, 4000)) == white
    exif = image_module.Exif()
    exif[0x0112] = 6
    assert shown(image_module.new("RGB", (90, 60)), exif=exif)[0] == (43, 64), "upright"


def test_thumbnails_are_scaled_by_the_configuration_of_the_run(run):
    assert load_run(run).intensity == "dtype"
    for text, intensity in (("data: {intensity: [0, 4095]}", [0, 4095]), ("data: null", "dtype"), ("]", "dtype")):
        (run / "config.yaml").write_text(text)
        assert load_run(run).intensity == intensity


def test_the_report_of_a_large_run_is_small(tmp_path):
    run = build_run(tmp_path / "large", intervals=5000)
    assert len(load_run(run).metrics) > 100_000
    page, words = report(run)
    assert len(page) < 250_000
    assert "mean of 833 intervals" in words


def test_of_steps_that_a_resumed_run_repeated_the_later_lines_are_shown(tmp_path):
    lines = build_metrics()
    again = [line | {"loss": 7.5} for line in lines[5:9]]
    write_lines(tmp_path, lines[:10] + again)
    metrics = load_run(tmp_path).metrics
    assert [m.step for m in metrics] == [line["step"] for line in lines[:9]]
    assert [m.loss for m in metrics[5:]] == [7.5] * 4


def test_stage_bands_adjoin(run):
    bands = load_run(run).bands
    assert [b.name for b in bands] == ["head", "layer4", "full"]
    assert bands[0].start == 0
    assert [b.start for b in bands[1:]] == [b.end for b in bands[:-1]]


def test_not_a_run_directory(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "not a directory" in capsys.readouterr().err


def test_the_command_prints_the_path_of_the_report(run, capsys):
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert main([str(run)]) == 0


def test_downsampling_keeps_ends_and_extremes():
    noise = random.Random(1)
    points = [(float(i), noise.random()) for i in range(100_000)]
    points[31_234] = (31_234.0, 50.0)
    points[77_777] = (77_777.0, -50.0)
    few = downsample(points)
    assert len(few) <= MAX_POINTS
    assert few == sorted(few)
    assert {points[0], points[-1], points[31_234], points[77_777]} <= set(few)
    assert downsample(points[:600]) == points[:600]
    assert len(downsample(points[:601])) <= MAX_POINTS


@pytest.mark.parametrize("values", [[], [0.0], [1.0], [1.0, 1.0], [-3.0, 5.0], [1e-9, 3.0], [1e-99, 1e99], [5e8]])
def test_scales_include_their_values_and_have_ticks(values):
    for from_zero in (True, False):
        scale = fit_scale(values, from_zero=from_zero)
        assert all(0 <= scale(v) <= 1 for v in values)
        assert 1 <= len(scale.ticks(5)) <= 14


def test_ticks_are_round():
    assert linear_ticks(0.0, 1.0, 5) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Scale(1e-6, 1e-2, log=True).ticks(5) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])


def test_markup_escapes_text_but_not_markup():
    assert h("p", "<b>", Markup("<i></i>"), ["a", None], title='"x"', hidden=True, id=None) == (
        '<p title="&quot;x&quot;" hidden>&lt;b&gt;<i></i>a</p>'
    )


def test_formatting_of_numbers():
    assert percent(0.93456) == "93.5\u202f%"
    assert percent(0.99999) == "99.9\u202f%"
    assert percent(1.0) == "100.0\u202f%"
    assert [duration(s) for s in (0.04, 59.9, 200, 7500, 100_000)] == [
        "0.0\u202fs",
        "1\u202fmin",
        "3\u202fmin 20\u202fs",
        "2\u202fh 5\u202fmin",
        "1\u202fd 3\u202fh",
    ]
    assert compact(25_557_032) == "25.6\u202fM"
    assert percentage_points(-0.012) == "\u22121.2"
    assert timestamp(0) == "1970-01-01 00:00 UTC"
    assert timestamp(1e300) == timestamp(None) == "\u2014"
    assert [number(v) for v in (True, "1", None, math.nan, math.inf, 10**400, 3)] == [None] * 6 + [3.0]
