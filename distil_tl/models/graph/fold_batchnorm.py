"""Folding BatchNorm into the convolution before it, which saves a pass over large activations.

With fixed statistics BatchNorm scales and shifts each channel, and so does a convolution with other weights and a bias.
Frozen layers are folded once. Trained layers are folded at each call, by a few operations on the weights, which are
small compared with the activations; their parameters stay the same objects, and in float32 their gradients stay the
same up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from distil_tl.models.graph.equivalence import (
    NotEquivalentError,
    check_equivalent,
    preserve_state,
    without_report,
)
from distil_tl.models.graph.trace import LayerTracer, Whole, trace


class CannotFoldError(Exception):
    """BatchNorm cannot be folded in this network; the message is the reason."""


class ConvNorm(nn.Module):
    """A convolution and the BatchNorm after it, computed as one convolution where `folds` and statistics are fixed."""

    def __init__(self, conv: nn.Conv2d, norm: _BatchNorm) -> None:
        super().__init__()
        self.conv, self.norm, self.after = conv, norm, _activation(norm)
        self.folds = True

    def forward(self, maps: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        if norm.training or not self.folds:
            unfolded: Tensor = norm(conv(maps))
            return unfolded
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
        shift = shift * scale if norm.bias is None else torch.addcmul(norm.bias, shift, scale)
        # Through the convolution's own forward, as some pad the maps first.
        folded = functional_call(conv, {"weight": conv.weight * scale[:, None, None, None], "bias": shift}, (maps,))
        result: Tensor = self.after(folded)
        return result


def fold_batchnorm(module: nn.Module, images: Tensor, *, trains: bool) -> nn.Module:
    """A network of the layers of `module` that folds BatchNorm at each call and computes the same up to rounding.

    Args:
        images: normalised [N, 3, H, W], at least two, to compare both with. Conditions in the code that depend on
            their size are fixed for it.
        trains: whether it will run in training mode, too.

    Raises:
        CannotFoldError: there is nothing to fold, the code cannot be traced, or the folded network differs.
    """
    whole = Whole(module)
    try:
        with preserve_state(whole, images.device):
            if not trains:
                whole.eval()
            folded = fold_at_each_call(fx.GraphModule(whole, trace(LayerTracer, whole, images[:-1])))
        if has_folded_batchnorm(folded):
            modes = (True, False) if trains else (False,)
            check_equivalent(without_report(folded), whole, images, called="its folded layers", modes=modes)
    except NotEquivalentError as error:
        raise CannotFoldError(str(error)) from error
    except Exception as error:  # the model's code may raise anything when it is called with a proxy
        raise CannotFoldError(f"its code can't be traced ({type(error).__name__})") from error
    if not has_folded_batchnorm(folded):
        raise CannotFoldError("no convolution is followed by a BatchNorm only")
    return folded


def has_folded_batchnorm(network: nn.Module) -> bool:
    """Whether it holds a convolution with BatchNorm folded at each call."""
    return any(isinstance(part, ConvNorm) for part in network.modules())


def fold_at_each_call(network: fx.GraphModule) -> fx.GraphModule:
    """Replace, in place, each convolution and the BatchNorm right after it by a ConvNorm that shares both layers."""
    for conv_at, conv, norm_at, norm in _pairs(network):
        _replace(network, conv_at, ConvNorm(conv, norm))
        _replace(network, norm_at, nn.Identity())
    network.recompile()
    return network


def fold_frozen(network: fx.GraphModule) -> fx.GraphModule:
    """Replace, in place, each frozen convolution and the BatchNorm right after it by one new convolution."""
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
        _replace(network, norm_at, _activation(norm))
    network.recompile()
    return network


def _pairs(network: fx.GraphModule) -> Iterator[tuple[str, nn.Conv2d, str, _BatchNorm]]:
    """(path, convolution, path, BatchNorm) of each convolution whose output goes only to that BatchNorm."""
    modules = dict(network.named_modules())
    for node in network.graph.nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        before = node.args[0] if norm is not None and node.args else None
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv = modules[str(before.target)]
        if not isinstance(conv, nn.Conv2d) or not _is_linear_in_weight(conv):
            continue
        if _calls(network, before) == 1 and _calls(network, node) == 1:
            yield str(before.target), conv, str(node.target), norm


@torch.no_grad()
def _is_linear_in_weight(conv: nn.Conv2d) -> bool:
    """Whether twice the weight gives twice the output. Weight standardisation would undo a folded scale."""
    if type(conv).forward is nn.Conv2d.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    sides = [2 * d * k for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    maps = torch.randn(1, conv.in_channels, *sides, generator=generator).to(conv.weight)
    bias = {} if conv.bias is None else {"bias": torch.zeros_like(conv.bias)}
    try:
        once, twice = (functional_call(conv, {"weight": factor * conv.weight, **bias}, (maps,)) for factor in (1, 2))
    except Exception:  # the model's code may raise anything for maps of another size
        return False
    return torch.allclose(2 * once, twice, rtol=1e-3, atol=1e-6)


def _activation(norm: _BatchNorm) -> nn.Module:
    """The activation that timm's BatchNormAct2d includes; an empty Sequential for other norms."""
    parts = (getattr(norm, "drop", None), getattr(norm, "act", None))
    return nn.Sequential(*[part for part in parts if part is not None])


def _calls(network: fx.GraphModule, node: fx.Node) -> int:
    return sum(other.op == "call_module" and other.target == node.target for other in network.graph.nodes)


def _replace(network: fx.GraphModule, path: str, part: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(network.get_submodule(owner), name, part)
