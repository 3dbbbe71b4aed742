"""torch.compile for the network of a stage."""

from __future__ import annotations

import torch

from distil_tl.training.network import Network, Prefix, SplitNetwork
from distil_tl.training.stage import Stage

# The same kernels without CUDA graphs.
_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compile_network(network: Network, stage: Stage, *, cuda_graphs: bool) -> None:
    """Compile in place what `stage` says. The first batch of each size takes longer.

    torch compiles a function for a limited number of sizes and modes; another stage does not count towards it.

    Args:
        cuda_graphs: use them if `compile_mode` does.
    """
    torch.compiler.reset()
    mode = stage.compile_mode if cuda_graphs else _WITHOUT_GRAPHS.get(stage.compile_mode, stage.compile_mode)
    part: Network | Prefix
    if stage.compile == "all":
        part = network
    elif isinstance(network, SplitNetwork):
        part = network.prefix
    else:  # the frozen part is not in it
        return
    part.compile(dynamic=False, mode=None if mode == "default" else mode)
    network.is_compiled = True
