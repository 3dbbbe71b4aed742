"""Networks of families of torchvision and timm with few narrow layers: their code without the work of a real size."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torchvision import models as tv
from torchvision.models import efficientnet, resnet, swin_transformer, vgg
from torchvision.models.convnext import CNBlockConfig

WIDTHS = (8, 16, 32, 64)


def alexnet(num_classes: int) -> Any:
    return _narrow(tv.AlexNet, num_classes)


def vgg_bn(num_classes: int) -> Any:
    pools: list[Any] = [part for width in (*WIDTHS, 512) for part in (width, "M")]
    return _narrow(lambda: tv.VGG(vgg.make_layers(pools, batch_norm=True), init_weights=False), num_classes)


def _narrow(build: Any, num_classes: int) -> nn.Module:
    """A network with two hidden linear layers of 16 units before its head in place of 4096."""
    with torch.device("meta"):
        network: nn.Module = build()
    classifier = network.get_submodule("classifier")
    linear = [(name, layer) for name, layer in classifier.named_children() if isinstance(layer, nn.Linear)]
    width = linear[0][1].in_features
    for (name, _), after in zip(linear, (16, 16, num_classes), strict=True):
        setattr(classifier, name, nn.Linear(width, after))
        width = after
    network.to_empty(device="cpu")
    for part in network.modules():
        if (reset := getattr(part, "reset_parameters", None)) is not None:
            reset()
    return network


def resnext(num_classes: int) -> Any:
    return tv.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes, groups=8, width_per_group=1)


def wide_resnet(num_classes: int) -> Any:
    return tv.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes, width_per_group=8)


def efficientnet_v2(num_classes: int) -> Any:
    settings = [
        efficientnet.FusedMBConvConfig(1, 3, 1, 8, 8, 1),
        efficientnet.FusedMBConvConfig(4, 3, 2, 8, 16, 2),
        efficientnet.MBConvConfig(4, 3, 2, 16, 32, 2),
    ]
    return tv.EfficientNet(settings, dropout=0.2, num_classes=num_classes, last_channel=64)


def convnext(num_classes: int) -> Any:
    blocks = [CNBlockConfig(width, after, 2) for width, after in zip(WIDTHS, (*WIDTHS[1:], None), strict=True)]
    return tv.ConvNeXt(blocks, stochastic_depth_prob=0.1, num_classes=num_classes)


def vit(num_classes: int, image_size: int) -> Any:
    return tv.VisionTransformer(image_size, 8, 4, 2, 16, 32, num_classes=num_classes)


def swin(num_classes: int) -> Any:
    return tv.SwinTransformer([4, 4], 8, [2, 2, 2, 2], [1, 2, 4, 8], [7, 7], num_classes=num_classes)


def swin_v2(num_classes: int) -> Any:
    return tv.SwinTransformer(
        [4, 4], 8, [2, 2, 2, 2], [1, 2, 4, 8], [8, 8], num_classes=num_classes,
        block=swin_transformer.SwinTransformerBlockV2, downsample_layer=swin_transformer.PatchMergingV2,
    )  # fmt: skip


def maxvit(num_classes: int, image_size: int) -> Any:
    return tv.MaxVit((image_size, image_size), 8, 2, list(WIDTHS), [1, 1, 1, 1], 8, 0.1, num_classes=num_classes)


def dinov2(num_classes: int, image_size: int) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        image_size, 14, num_classes=num_classes, embed_dim=32, depth=4, num_heads=2, init_values=1e-5, reg_tokens=4
    )


def siglip(num_classes: int, image_size: int) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        image_size, 8, num_classes=num_classes, global_pool="map", embed_dim=32, depth=4, num_heads=2, class_token=False
    )


def caformer(num_classes: int) -> Any:
    from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv

    mixers, norms = [SepConv] * 2 + [Attention] * 2, [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2
    return MetaFormer(
        num_classes=num_classes, depths=(1, 1, 1, 1), dims=(32, 32, 32, 64), token_mixers=mixers, norm_layers=norms
    )


def hiera(num_classes: int, image_size: int) -> Any:
    from timm.models.hiera import Hiera

    return Hiera((image_size, image_size), embed_dim=16, num_heads=1, stages=(1, 1, 2, 1), num_classes=num_classes)


def tnt(num_classes: int, image_size: int) -> Any:
    from timm.models.tnt import TNT

    return TNT(
        image_size, 16, num_classes=num_classes, embed_dim=32, inner_dim=8, depth=4, num_heads_inner=2,
        num_heads_outer=2, legacy=True,
    )  # fmt: skip


class PooledInFunction(nn.Sequential):
    """Three stages of feature maps, which are pooled in a function between them and the head."""

    def forward(self, images: Any) -> Any:
        maps = self.get_submodule("stages")(images)
        return self.get_submodule("fc")(self.get_submodule("norm")(maps.relu().mean((2, 3))))


def pooled_in_function(num_classes: int) -> Any:
    def stage(before: int, after: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after))

    stages = nn.Sequential(stage(3, 4), stage(4, 6), stage(6, 8))
    parts = {"stages": stages, "norm": nn.LayerNorm(8), "fc": nn.Linear(8, num_classes)}
    return PooledInFunction(OrderedDict(parts))


class TokenAt(nn.Module):
    """A transformer without a name for its tokens, whose head reads one of them."""

    def __init__(self, num_classes: int, place: int) -> None:
        super().__init__()
        self.place = place
        self.cut, self.token = nn.Conv2d(3, 8, 8, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.mix, self.fc = nn.Linear(8, 8), nn.Linear(8, num_classes)

    def forward(self, images: Any) -> Any:
        patches = self.cut(images).flatten(2).transpose(1, 2)
        token = self.token.expand(len(images), -1, -1)
        tokens = self.mix(torch.cat([token, patches] if self.place == 0 else [patches, token], 1))
        return self.fc(tokens[:, self.place])


def first_token(num_classes: int) -> Any:
    return TokenAt(num_classes, 0)


def last_token(num_classes: int) -> Any:
    return TokenAt(num_classes, -1)
