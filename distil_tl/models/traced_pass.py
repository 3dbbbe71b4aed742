"""One pass of images through a network, with a function called after each of its layers and blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distil_tl.models.graph.equivalence import preserve_state
from distil_tl.models.readout_parts import CannotReadOutError
from distil_tl.models.size_trial import first_line


@torch.no_grad()
def run_traced(
    module: nn.Module,
    images: Tensor,
    ended: Callable[[str, Any, Any], None],
    mode: contextlib.AbstractContextManager[Any] | None = None,
) -> Any:
    """The output of `module` for `images`, in evaluation mode. Its own modes, statistics and hooks stay as they are.

    Args:
        images: of the shape [N, 3, H, W], on the device of the network.
        ended: called with the path of a layer or block, its arguments and its output; "" is `module` itself.
        mode: entered for the pass.

    Raises:
        CannotReadOutError: the network fails.
    """
    handles = []
    for path, part in module.named_modules():

        def call(_: nn.Module, args: Any, output: Any, path: str = path) -> None:
            ended(path, args, output)

        handles.append(part.register_forward_hook(call))
    try:
        with preserve_state(module, images.device), mode or contextlib.nullcontext():
            return module.eval()(images)
    except MemoryError:
        raise
    except Exception as error:  # the model's code may raise anything
        raise CannotReadOutError(f"its layers do not take it ({first_line(error)})") from error
    finally:
        for handle in handles:
            handle.remove()
