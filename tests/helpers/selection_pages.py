"""The content of select.json for tests of its page."""

from __future__ import annotations

from typing import Any


def row(name: str, top1: float, gmacs: float | None, **more: Any) -> dict[str, Any]:
    """A line of the table."""
    heads = [{"lr": lr, "weight_decay": 0.1, "top1": top1 - lr, "loss": 1.0} for lr in (0.0, 0.01)]
    return {
        "model": name, "image_size": 64, "crop_mode": "weights", "parameters": 1_234_567, "gmacs": gmacs,
        "weights": "none", "features": 8, "precision": "fp32", "n": 100, "lr": 0.01, "weight_decay": 0.1, "top1": top1,
        "loss": 1.0, "interval": (top1 - 0.1, top1 + 0.05), "near_best": top1 > 0.7, "pareto": gmacs is not None,
        "images_per_second": 321.0, "seconds": 12.0, "heads": heads, **more,
    }  # fmt: skip


def content() -> dict[str, Any]:
    """select.json of three results, with something in every part."""
    rows = [row("timm/<best>", 0.8, 2.0), row("second", 0.75, 0.5), row("uncounted", 0.4, None)]
    estimate = {"split": "test", "method": "images of test", "n": 50, "value": 0.77, "interval": (0.64, 0.86)}
    effect = {"key": "crop_mode", "value": "squash", "compared_with": "weights", "pairs": 3, "mean": 0.021}
    return {
        "metric": "top1", "classes": ["a", "b"], "images": {"train": 400, "val": 100, "test": 50}, "best": rows[0],
        "estimate": estimate, "no_estimate": None, "near_best": 2, "rows": rows, "device": "cpu", "ranks": 1,
        "effects": [{**effect, "lowest": -0.01, "highest": 0.05}], "seconds": 60.0, "budget_seconds": None,
        "not_tried": [{"model": "late", "image_size": 96, "crop_mode": "squash", "parameters": 1, "gmacs": 9.0}],
        "pruning": None, "left_out": {"odd 64 px": "it can't be cut"}, "missing_weights": {"far": "timm far.tag"},
    }  # fmt: skip


def large_content() -> dict[str, Any]:
    """The same with many results and long names, as from a real list."""
    names = ["timm/convnext_base.dinov3_lvd1689m", "timm/swin_tiny_patch4_window7_224", "timm/mobilenetv4_conv_small"]
    rows = [
        row(
            name, 0.83 - 0.0123 * i - 0.03 * (size == 224), 0.037 * (i + 1) * size / 100, image_size=size,
            crop_mode="squash", parameters=86_567_656, images_per_second=1234.5, seconds=4321.0, lr=0.00012,
            weight_decay=0.001,
        )
        for i, name in enumerate([*names, "timm/" + "a_network_with_a_name_that_does_not_end_" * 2])
        for size in (224, 384)
    ]  # fmt: skip
    scores = [
        {
            "model": each["model"],
            "image_size": 224,
            "logme": 0.4567 - i / 7,
            "images": 2000,
            "kept": i < 4,
            "seconds": 1.0,
        }
        for i, each in enumerate([*rows[::2], row("timm/tf_efficientnet_lite0", 0.5, 1.0)])
    ]
    whole = content()
    whole |= {"rows": rows, "best": rows[0], "pruning": {"keep": 4, "scores": scores, "pairs": 6, "same_order": 4}}
    left = {"timm/vit_base_patch14_dinov2 224 px": "the image size must be a multiple of 14; " * 3}
    return whole | {"metric": "top1", "classes": [f"class {i}" for i in range(37)], "left_out": left}
