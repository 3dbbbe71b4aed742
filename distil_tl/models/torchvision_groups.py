"""Layer groups of torchvision models: one short rule for each family, with the names that its paper uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn
from torchvision import models as tv

from distil_tl.models.layer_groups import HEAD, LayerGroup, groups_from_parts, parameters_by_child


def torchvision_groups(module: nn.Module, head: tuple[str, ...]) -> tuple[LayerGroup, ...]:
    """Groups of a torchvision classifier from stem to head; `head` is the dotted path of its classifier.

    A family without a rule in this module gets one group for each top-level child.
    """
    for family, rule in _RULES:
        if isinstance(module, family):
            return (*rule(module), LayerGroup(HEAD, head))
    return groups_from_parts(module, parameters_by_child(module), head)


def _resnet(_: nn.Module) -> list[LayerGroup]:
    layers = [LayerGroup(name, (name,)) for name in ("layer1", "layer2", "layer3", "layer4")]
    return [LayerGroup("stem", ("conv1", "bn1")), *layers]


def _vgg(module: nn.Module) -> list[LayerGroup]:
    fc6, fc7, _ = _children(module, "classifier")
    blocks = [LayerGroup(f"block{i}", part) for i, part in enumerate(_between_pools(module), 1)]
    return [*blocks, LayerGroup("fc6", (fc6,)), LayerGroup("fc7", (fc7,))]


def _squeezenet(module: nn.Module) -> list[LayerGroup]:
    stem, *blocks = _between_pools(module)
    return [LayerGroup("stem", stem), *(LayerGroup(f"block{i}", part) for i, part in enumerate(blocks, 1))]


def _densenet(_: nn.Module) -> list[LayerGroup]:
    ends = {4: "features.norm5"}
    blocks = [
        LayerGroup(f"block{i}", (f"features.denseblock{i}", ends.get(i, f"features.transition{i}")))
        for i in range(1, 5)
    ]
    return [LayerGroup("stem", ("features.conv0", "features.norm0")), *blocks]


def _efficientnet(module: nn.Module) -> list[LayerGroup]:
    stem, *stages, top = _children(module, "features")
    return [LayerGroup("stem", (stem,)), *_stages((stage,) for stage in stages), LayerGroup("top", (top,))]


def _mobilenet(module: nn.Module) -> list[LayerGroup]:
    """MobileNet v2 and v3: each stage begins with the block that halves the resolution."""
    stem, *blocks, top = _children(module, "features")
    stages: list[tuple[str, ...]] = []
    for path in blocks:
        if not stages or _downsamples(module.get_submodule(path)):
            stages.append(())
        stages[-1] = (*stages[-1], path)
    groups = [LayerGroup("stem", (stem,)), *_stages(stages), LayerGroup("top", (top,))]
    *hidden, _ = _children(module, "classifier")
    return [*groups, LayerGroup("fc", tuple(hidden))] if hidden else groups


def _mnasnet(module: nn.Module) -> list[LayerGroup]:
    paths = _children(module, "layers")
    stages = [path for path in paths if isinstance(module.get_submodule(path), nn.Sequential)]
    first, last = paths.index(stages[0]), paths.index(stages[-1])
    return [
        LayerGroup("stem", tuple(paths[:first])),
        *_stages((stage,) for stage in stages),
        LayerGroup("top", tuple(paths[last + 1 :])),
    ]


def _convnext(module: nn.Module) -> list[LayerGroup]:
    return _alternating(module, "classifier.0")


def _swin(module: nn.Module) -> list[LayerGroup]:
    return _alternating(module, "norm")


def _alternating(module: nn.Module, final_norm: str) -> list[LayerGroup]:
    """`features` is stem, stage, downsampling, stage, ...: each downsampling is grouped with the stage after it."""
    stem, first, *rest = _children(module, "features")
    stages = [(first,), *zip(rest[0::2], rest[1::2], strict=True)]
    stages[-1] = (*stages[-1], final_norm)
    return [LayerGroup("stem", (stem,)), *_stages(stages)]


def _vit(module: nn.Module) -> list[LayerGroup]:
    layers = [(path,) for path in _children(module, "encoder.layers")]
    blocks = [*layers[:-1], (*layers[-1], "encoder.ln")]
    stem = LayerGroup("stem", ("class_token", "conv_proj", "encoder.pos_embedding"))
    return [stem, *(LayerGroup(f"block{i}", block) for i, block in enumerate(blocks, 1))]


def _regnet(module: nn.Module) -> list[LayerGroup]:
    blocks = [LayerGroup(path.rpartition(".")[2], (path,)) for path in _children(module, "trunk_output")]
    return [LayerGroup("stem", ("stem",)), *blocks]


def _shufflenet(_: nn.Module) -> list[LayerGroup]:
    stages = [LayerGroup(name, (name,)) for name in ("stage2", "stage3", "stage4")]
    return [LayerGroup("stem", ("conv1",)), *stages, LayerGroup("top", ("conv5",))]


def _googlenet(module: nn.Module) -> list[LayerGroup]:
    named = [LayerGroup(name, _starting(module, name)) for name in ("inception3", "inception4", "inception5")]
    return [LayerGroup("stem", _starting(module, "conv")), *named]


def _inception(module: nn.Module) -> list[LayerGroup]:
    named = [LayerGroup(f"mixed{i}", _starting(module, f"Mixed_{i}")) for i in (5, 6, 7)]
    return [LayerGroup("stem", _starting(module, "Conv2d_")), *named]


def _maxvit(module: nn.Module) -> list[LayerGroup]:
    blocks = [LayerGroup(f"block{i}", (path,)) for i, path in enumerate(_children(module, "blocks"), 1)]
    *hidden, _ = _children(module, "classifier")
    return [LayerGroup("stem", ("stem",)), *blocks, LayerGroup("fc", tuple(hidden))]


_RULES: tuple[tuple[type[nn.Module], Callable[[nn.Module], list[LayerGroup]]], ...] = (
    (tv.ResNet, _resnet),
    (tv.VGG, _vgg),
    (tv.AlexNet, _vgg),
    (tv.SqueezeNet, _squeezenet),
    (tv.DenseNet, _densenet),
    (tv.EfficientNet, _efficientnet),
    (tv.MobileNetV2, _mobilenet),
    (tv.MobileNetV3, _mobilenet),
    (tv.MNASNet, _mnasnet),
    (tv.ConvNeXt, _convnext),
    (tv.SwinTransformer, _swin),
    (tv.VisionTransformer, _vit),
    (tv.RegNet, _regnet),
    (tv.ShuffleNetV2, _shufflenet),
    (tv.GoogLeNet, _googlenet),
    (tv.Inception3, _inception),
    (tv.MaxVit, _maxvit),
)


def _children(module: nn.Module, path: str) -> list[str]:
    """Dotted paths of the children of `path` with parameters, in order."""
    children = module.get_submodule(path).named_children()
    return [f"{path}.{name}" for name, child in children if next(child.parameters(), None) is not None]


def _starting(module: nn.Module, start: str) -> tuple[str, ...]:
    return tuple(name for name, _ in module.named_children() if name.startswith(start))


def _stages(parts: list[tuple[str, ...]] | Iterator[tuple[str, ...]]) -> list[LayerGroup]:
    return [LayerGroup(f"stage{i}", part) for i, part in enumerate(parts, 1)]


def _between_pools(module: nn.Module) -> list[tuple[str, ...]]:
    """Children of `features` with parameters, in parts divided by the max poolings."""
    parts: list[tuple[str, ...]] = [()]
    for name, child in module.get_submodule("features").named_children():
        if isinstance(child, nn.MaxPool2d):
            parts.append(())
        elif next(child.parameters(), None) is not None:
            parts[-1] = (*parts[-1], f"features.{name}")
    return [part for part in parts if part]


def _downsamples(block: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) and max(part.stride) > 1 for part in block.modules())
