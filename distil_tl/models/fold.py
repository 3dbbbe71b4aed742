"""BatchNorm as part of the convolution before it, which spares a pass over the largest tensors there are.

While its statistics stand still BatchNorm scales and shifts each channel, and so does a convolution with other weights
and a bias. What is frozen is folded once. What trains is folded anew in each call, which costs as much as the weights
are large and not as the maps are; its parameters stay what they are and get the gradients that they would get.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from distil_tl.models.tracing import Layers, difference, trace


class ConvNorm(nn.Module):
    """A convolution and the BatchNorm after it, in one where its statistics stand still."""

    def __init__(self, conv: nn.Conv2d, norm: _BatchNorm) -> None:
        super().__init__()
        self.conv, self.norm, self.after = conv, norm, _after(norm)

    def forward(self, maps: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        if norm.training:
            moved: Tensor = norm(conv(maps))
            return moved
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
        shift = shift * scale if norm.bias is None else torch.addcmul(norm.bias, shift, scale)
        # By its own forward, as some pad the maps first.
        found = functional_call(conv, {"weight": conv.weight * scale[:, None, None, None], "bias": shift}, (maps,))
        result: Tensor = self.after(found)
        return result


def folded(module: nn.Module, images: Tensor) -> nn.Module:
    """What does as `module` does, in training and in evaluation, to rounding, with its modules, each BatchNorm folded.

    That is `module` itself, if there is nothing to fold or its code can't be followed.

    Args:
        images: normalised [N, 3, H, W], at least two, to try it on. What depends on their size is settled.
    """
    if not any(isinstance(part, _BatchNorm) for part in module.modules()):
        return module
    whole = nn.Sequential(module)  # which calls it with images alone, whatever else it could take
    try:
        found = fold_as_it_trains(fx.GraphModule(whole, trace(Layers, whole, images[:-1])))
        return module if difference(whole, found, images) else found
    except Exception:  # whatever the code of some model does with the stand-in for an image
        return module


def fold_as_it_trains(network: fx.GraphModule) -> fx.GraphModule:
    """Make each BatchNorm right after a convolution one module with it. In place; the layers themselves are shared."""

    def joined(conv: nn.Conv2d, norm: _BatchNorm) -> tuple[nn.Module, nn.Module]:
        return ConvNorm(conv, norm), nn.Identity()

    return _join(network, lambda _: True, joined)


def fold_frozen(network: fx.GraphModule) -> fx.GraphModule:
    """Make each BatchNorm right after a convolution part of a copy of it, once and for all. In place, but for those."""

    def joined(conv: nn.Conv2d, norm: _BatchNorm) -> tuple[nn.Module, nn.Module]:
        conv = copy.deepcopy(conv)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        conv.weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.register_parameter("bias", bias)
        conv.requires_grad_(False)
        return conv, _after(norm)

    return _join(network, lambda part: not part.training, joined)


def _join(
    network: fx.GraphModule,
    wanted: Callable[[nn.Module], bool],
    joined: Callable[[nn.Conv2d, _BatchNorm], tuple[nn.Module, nn.Module]],
) -> fx.GraphModule:
    """Put what `joined` gives in the places of each convolution and the BatchNorm that alone takes its result."""
    modules = dict(network.named_modules())
    for node in network.graph.nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        before = node.args[0] if norm is not None and node.args else None
        if not isinstance(norm, _BatchNorm) or not wanted(norm) or norm.running_mean is None:
            continue
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv = modules[str(before.target)]
        if not isinstance(conv, nn.Conv2d) or not wanted(conv):
            continue
        if _calls(network, before) > 1 or _calls(network, node) > 1:
            continue
        for place, part in zip((before, node), joined(conv, norm), strict=True):
            _replace(network, str(place.target), part)
    network.recompile()
    return network


def _after(norm: _BatchNorm) -> nn.Module:
    """The activation that follows, where a norm of timm's holds it."""
    parts = (getattr(norm, "drop", None), getattr(norm, "act", None))
    return nn.Sequential(*[part for part in parts if part is not None])


def _calls(network: fx.GraphModule, node: fx.Node) -> int:
    return sum(other.op == "call_module" and other.target == node.target for other in network.graph.nodes)


def _replace(network: fx.GraphModule, path: str, part: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(network.get_submodule(owner), name, part)
