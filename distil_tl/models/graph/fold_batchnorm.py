"""BatchNorm as part of the convolution before it, which spares a pass over the largest tensors there are.

While its statistics stand still BatchNorm scales and shifts each channel, and so does a convolution with other weights
and a bias. What is frozen is folded for good. What trains is folded at each call, by a few operations on the weights,
which are small next to the maps; its parameters stay what they are, and in float32 get the gradients that they would
get, to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from distil_tl.models.graph.equivalence import fault_of, undisturbed
from distil_tl.models.graph.trace import Layers, trace


class ConvNorm(nn.Module):
    """A convolution and the BatchNorm after it, in one where `folds` and its statistics stand still."""

    def __init__(self, conv: nn.Conv2d, norm: _BatchNorm) -> None:
        super().__init__()
        self.conv, self.norm, self.after = conv, norm, _after(norm)
        self.folds = True

    def forward(self, maps: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        if norm.training or not self.folds:
            apart: Tensor = norm(conv(maps))
            return apart
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


def folding(module: nn.Module, images: Tensor, *, trains: bool) -> nn.Module | str:
    """What does as `module` does, to rounding, with its layers, but folds at each call; or why there is no such.

    Args:
        images: normalised [N, 3, H, W], at least two, to try it on. What depends on their size is settled.
        trains: whether it will run in training mode, too.
    """
    whole = nn.Sequential(module)  # which calls it with images alone, whatever else it could take
    try:
        with undisturbed(whole, images.device):
            if not trains:
                whole.eval()
            found = fold_at_each_call(fx.GraphModule(whole, trace(Layers, whole, images[:-1])))
        if not folds(found):
            return "no convolution of it has a BatchNorm alone behind it"
        modes = (True, False) if trains else (False,)
        return fault_of(found, whole, images, called="its layers, folded,", modes=modes) or found
    except Exception as error:  # whatever the code of some model does with the stand-in for an image
        return f"its code can't be followed ({type(error).__name__})"


def folds(network: nn.Module) -> bool:
    """Whether anything of it is folded at each call."""
    return any(isinstance(part, ConvNorm) for part in network.modules())


def fold_at_each_call(network: fx.GraphModule) -> fx.GraphModule:
    """Make each convolution and the BatchNorm right after it one module. In place; the layers themselves are shared."""
    for conv_at, conv, norm_at, norm in _pairs(network):
        _replace(network, conv_at, ConvNorm(conv, norm))
        _replace(network, norm_at, nn.Identity())
    network.recompile()
    return network


def fold_for_good(network: fx.GraphModule) -> fx.GraphModule:
    """Make each BatchNorm right after a convolution, both frozen, part of a copy of that. In place, but for those."""
    for conv_at, conv, norm_at, norm in _pairs(network):
        if norm.training or conv.training:
            continue
        conv = copy.deepcopy(conv)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        conv.weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.register_parameter("bias", bias)
        conv.requires_grad_(False)
        _replace(network, conv_at, conv)
        _replace(network, norm_at, _after(norm))
    network.recompile()
    return network


def _pairs(network: fx.GraphModule) -> Iterator[tuple[str, nn.Conv2d, str, _BatchNorm]]:
    """Each convolution with the BatchNorm that alone takes its result, and where they are."""
    modules = dict(network.named_modules())
    for node in network.graph.nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        before = node.args[0] if norm is not None and node.args else None
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv = modules[str(before.target)]
        if not isinstance(conv, nn.Conv2d) or not _takes_weight_as_it_is(conv):
            continue
        if _calls(network, before) == 1 and _calls(network, node) == 1:
            yield str(before.target), conv, str(node.target), norm


@torch.no_grad()
def _takes_weight_as_it_is(conv: nn.Conv2d) -> bool:
    """Whether twice the weight makes twice the maps. One that standardises it undoes what is folded into it."""
    if type(conv).forward is nn.Conv2d.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    sides = [2 * d * k for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    maps = torch.randn(1, conv.in_channels, *sides, generator=generator).to(conv.weight)
    bias = {} if conv.bias is None else {"bias": torch.zeros_like(conv.bias)}
    try:
        once, twice = (functional_call(conv, {"weight": factor * conv.weight, **bias}, (maps,)) for factor in (1, 2))
    except Exception:  # whatever the code of some model makes of maps of another size
        return False
    return torch.allclose(2 * once, twice, rtol=1e-3, atol=1e-6)


def _after(norm: _BatchNorm) -> nn.Module:
    """The activation that follows, where a norm of timm's holds it."""
    parts = (getattr(norm, "drop", None), getattr(norm, "act", None))
    return nn.Sequential(*[part for part in parts if part is not None])


def _calls(network: fx.GraphModule, node: fx.Node) -> int:
    return sum(other.op == "call_module" and other.target == node.target for other in network.graph.nodes)


def _replace(network: fx.GraphModule, path: str, part: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(network.get_submodule(owner), name, part)
