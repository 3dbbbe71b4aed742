"""Layer groups: a partition in execution order for every architecture, and the group of a parameter or module."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import regnet

from distil_tl.models.config import ModelConfig
from distil_tl.models.layer_groups import LayerGroup, groups_from_parts, groups_of_parameters, parameters_by_child
from distil_tl.models.torchvision_models import names
from distil_tl.models.transfer import TransferModel, build

TIMM = [
    "timm/resnet18",
    "timm/tf_efficientnet_lite0",
    "timm/vit_tiny_patch16_224",
    "timm/convnext_atto",
    "timm/swin_tiny_patch4_window7_224",
    "timm/mobilenetv3_small_050",
    "timm/deit_tiny_distilled_patch16_224",
    "timm/densenet121",
    "timm/selecsls42",
    "timm/poolformer_s12",
]

# The smallest of each family and of each variant of its structure; the others differ in depth and width only.
FAMILIES = [
    "alexnet",
    "vgg11",
    "vgg11_bn",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "squeezenet1_0",
    "squeezenet1_1",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "shufflenet_v2_x0_5",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_16",
    "vit_b_32",
    "swin_t",
    "swin_v2_t",
    "maxvit_t",
]


@cache
def on_meta(name: str) -> TransferModel:
    real = regnet.BlockParams.from_init_params.__func__

    @classmethod  # type: ignore[misc]
    def on_cpu(cls, *args, **kwargs):
        with torch.device("cpu"):
            return real(cls, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        # RegNet's constructor computes its widths with tensors.
        patch.setattr(regnet.BlockParams, "from_init_params", on_cpu)
        # Meta tensors have no values, and initialising them takes most of the time.
        for init in ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_uniform_"):
            patch.setattr(f"torch.nn.init.{init}", lambda tensor, *_args, **_options: tensor)
        return build(ModelConfig(name, "none"), 7, image_size=None, seed=0)


@pytest.mark.parametrize("name", [*names(), *TIMM])
def test_groups_partition_the_parameters_and_end_with_the_new_head(name: str):
    model = on_meta(name)
    module = model.module
    counts = [sum(_under(p, g) for g in model.groups) for p, _ in module.named_parameters()]
    assert set(counts) == {1}
    assert len(set(model.group_names)) == len(model.groups) >= 4 or name == "timm/poolformer_s12"
    assert model.group_names[-1] == "head"

    weights = [(path, module.get_submodule(path)) for path in model.heads]
    assert all(len(layer.weight) == 7 for _, layer in weights)  # type: ignore[arg-type]
    expected = {f"{path}.{key}" for path, layer in weights for key in layer.state_dict()}
    assert {p for p, _ in module.named_parameters() if _under(p, model.groups[-1])} == expected
    assert not [path for path, _ in module.named_modules() if "aux" in path.lower()]


def _under(parameter: str, group: LayerGroup) -> bool:
    return any(parameter == p or parameter.startswith(p + ".") for p in group.prefixes)


@pytest.mark.parametrize("name", [*FAMILIES, *TIMM])
def test_groups_are_in_depth_order(name: str):
    model = on_meta(name)
    ran: list[int] = []

    def record(path: str) -> None:
        group = model.group_of(path)
        assert group is not None
        model.module.get_submodule(path).register_forward_pre_hook(lambda *_: ran.append(group))

    for path, part in model.module.named_modules():
        if next(part.parameters(), None) is not None and not list(part.children()):
            record(path)
    with torch.no_grad():
        output = model.module(torch.empty(2, 3, model.image_size, model.image_size, device="meta"))
    assert isinstance(output, Tensor)
    order = [group for group, _ in itertools.groupby(ran)]
    assert order == sorted(order), [model.group_names[i] for i in order]
    assert set(order) == set(range(len(model.groups)))


NAMES = {
    "resnet50": "stem layer1 layer2 layer3 layer4 head",
    "vgg16": "block1 block2 block3 block4 block5 fc6 fc7 head",
    "alexnet": "block1 block2 block3 fc6 fc7 head",
    "densenet121": "stem block1 block2 block3 block4 head",
    "efficientnet_b0": "stem stage1 stage2 stage3 stage4 stage5 stage6 stage7 top head",
    "convnext_tiny": "stem stage1 stage2 stage3 stage4 head",
    "swin_v2_t": "stem stage1 stage2 stage3 stage4 head",
    "regnet_y_400mf": "stem block1 block2 block3 block4 head",
    "mobilenet_v2": "stem stage1 stage2 stage3 stage4 stage5 top head",
    "mobilenet_v3_small": "stem stage1 stage2 stage3 stage4 top fc head",
    "mnasnet1_0": "stem stage1 stage2 stage3 stage4 stage5 stage6 top head",
    "squeezenet1_1": "stem block1 block2 block3 head",
    "shufflenet_v2_x1_0": "stem stage2 stage3 stage4 top head",
    "googlenet": "stem inception3 inception4 inception5 head",
    "inception_v3": "stem mixed5 mixed6 mixed7 head",
    "maxvit_t": "stem block1 block2 block3 block4 fc head",
    "vit_b_16": " ".join(["stem", *(f"block{i}" for i in range(1, 13)), "head"]),
    "timm/tf_efficientnet_lite0": " ".join(["stem", *(f"blocks.{i}" for i in range(7)), "head"]),
    "timm/vit_tiny_patch16_224": " ".join(["stem", *(f"blocks.{i}" for i in range(12)), "head"]),
    "timm/convnext_atto": "stem stages.0 stages.1 stages.2 stages.3 head",
    "timm/poolformer_s12": "stem stages head",
}


@pytest.mark.parametrize("name", NAMES)
def test_group_names_are_what_users_expect(name: str):
    assert " ".join(on_meta(name).group_names) == NAMES[name]


@pytest.mark.parametrize(
    ("model", "part", "group"),
    [
        ("vgg16", "classifier.2", "fc7"),
        ("vgg16", "classifier.5", "head"),
        ("vgg16", "features.4", "block2"),
        ("alexnet", "classifier.0", "fc6"),
        ("vit_b_16", "encoder.dropout", "block1"),
        ("vit_b_16", "encoder.layers.encoder_layer_1", "block2"),
        ("vit_b_16", "encoder.layers.encoder_layer_10.dropout", "block11"),
        ("vit_b_16", "encoder.pos_embedding", "stem"),
        ("vit_b_16", "encoder", None),
        ("googlenet", "dropout", "head"),
        ("efficientnet_b0", "classifier.0", "head"),
        ("efficientnet_b0", "features.1.0.stochastic_depth", "stage1"),
        ("convnext_tiny", "classifier.0.weight", "stage4"),
        ("convnext_tiny", "features.2", "stage2"),
        ("convnext_tiny", "features.7.2.stochastic_depth", "stage4"),
        ("swin_t", "features.2.reduction", "stage2"),
        ("swin_t", "norm", "stage4"),
        ("swin_t", "features.1.0.attn.relative_position_index", "stage1"),
        ("densenet121", "features.transition1.conv.weight", "block1"),
        ("densenet121", "features.norm5.running_mean", "block4"),
        ("resnet50", "bn1.running_var", "stem"),
        ("resnet50", "", None),
        ("maxvit_t", "classifier.2", "fc"),
        ("timm/tf_efficientnet_lite0", "bn2", "blocks.6"),
        ("timm/tf_efficientnet_lite0", "classifier", "head"),
        ("timm/convnext_atto", "head.norm.weight", "stages.3"),
        ("timm/convnext_atto", "head.drop", "head"),
        ("timm/vit_tiny_patch16_224", "pos_drop", "blocks.0"),
        ("timm/vit_tiny_patch16_224", "head_drop", "head"),
    ],
)
def test_group_of_a_parameter_buffer_or_module(model: str, part: str, group: str | None):
    found = on_meta(model)
    index = found.group_of(part)
    assert (None if index is None else found.group_names[index]) == group


def test_group_of_an_unknown_name_is_an_error():
    with pytest.raises(KeyError):
        on_meta("resnet50").group_of("layer5")


@pytest.mark.parametrize("name", ["vgg11", "efficientnet_b0", "convnext_tiny", "timm/vit_tiny_patch16_224"])
def test_every_module_has_a_group_or_contains_several(name: str):
    model = on_meta(name)
    for path, part in model.module.named_modules():
        inside = {index for p, index in model.parameter_groups.items() if p.startswith(path + "." if path else "")}
        if len(inside) == 1:
            assert model.module_groups[path] in inside
        else:
            assert (model.module_groups[path] is None) == bool(inside), (path, type(part))


class UnknownFamily(nn.Module):
    """An architecture without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1))
        self.begin = nn.Linear(2, 2)
        self.trunk = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.classifier = nn.Sequential(nn.LayerNorm(2), nn.Dropout(), nn.Linear(2, 7))


def test_unknown_families_are_split_into_their_children():
    module = UnknownFamily()
    groups = groups_from_parts(module, parameters_by_child(module), ("classifier.2",))
    assert groups == (
        LayerGroup("stem", ("token", "begin")),
        LayerGroup("trunk", ("trunk", "classifier.0")),
        LayerGroup("head", ("classifier.2",)),
    )
    groups_of_parameters(module, groups)


@pytest.mark.parametrize(
    "groups",
    [
        (LayerGroup("a", ("token", "begin", "trunk")), LayerGroup("head", ("classifier.2",))),
        (LayerGroup("a", ("token", "begin", "trunk", "classifier")), LayerGroup("head", ("classifier.2",))),
        (LayerGroup("head", ("classifier",)), LayerGroup("a", ("token", "begin", "trunk"))),
        (LayerGroup("a", ("token", "begin", "trunk", "classifier")), LayerGroup("head", ("gone",))),
    ],
)
def test_groups_that_are_not_a_partition_are_refused(groups: tuple[LayerGroup, ...]):
    with pytest.raises(ValueError, match="group"):
        groups_of_parameters(UnknownFamily(), groups)
