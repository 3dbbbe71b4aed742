"""One trial image: whether the code of a network takes images of a size, and which other sizes it takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from distil_tl.models.graph.equivalence import preserve_state
from distil_tl.utils.errors import UserError

STEP = 32  # pixels, the stride of most networks
FIRST_LINE = 120  # characters of an error


def failure_at(module: nn.Module, size: int) -> str | None:
    """Why a network can't take images of `size` pixels; None if it can.

    On the device `meta` nothing is computed, and an operation that is unknown there is no reason.
    """
    device = next(module.parameters()).device
    with torch.no_grad(), preserve_state(module, device):
        module.eval()
        try:
            module(torch.zeros(1, 3, size, size, device=device))
        except MemoryError:
            raise
        except NotImplementedError as error:
            return None if device.type == "meta" else first_line(error)
        except Exception as error:  # the model's code may raise anything
            unknown = device.type == "meta" and "meta tensor" in str(error)  # its value is asked for
            return None if unknown else first_line(error)
    return None


def first_line(error: BaseException) -> str:
    """The type of an error and the beginning of its message."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:FIRST_LINE]}" if line else type(error).__name__


def size_error(
    key: str, name: str, size: int, reason: str, own_size: int, build_at: Callable[[int], nn.Module]
) -> UserError:
    """The refusal of an image size, with sizes that work.

    Args:
        key: of the configuration, such as `data.image_size`.
        own_size: pixels; that of the model's published weights.
        build_at: the architecture for a size, on the device `meta`; it may raise anything.
    """
    below = size // STEP * STEP
    nearest = (below - STEP, below, below + STEP, below + 2 * STEP)
    working = [each for each in sorted({own_size, *nearest}) if each >= 8 and each != size and _works(each, build_at)]
    if not working:
        return UserError(f"{name} fails with images of {size} px ({reason}), and of others; choose another model.name")
    sizes = " or ".join(filter(None, [", ".join(map(str, working[:-1])), str(working[-1])]))
    return UserError(f"{key}={size} does not fit {name}: its code fails at this size ({reason}); use {sizes}")


def _works(size: int, build_at: Callable[[int], nn.Module]) -> bool:
    try:
        return failure_at(build_at(size), size) is None
    except MemoryError:
        raise
    except Exception:  # the code of some models fails while they are built
        return False
