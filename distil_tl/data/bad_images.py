"""Images that can't be used: refused by name, or left out, counted and listed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from distil_tl.data.index import Index
from distil_tl.data.loader import UNREADABLE, Batch
from distil_tl.distributed.collectives import gather_objects
from distil_tl.distributed.process_group import DistInfo
from distil_tl.utils.errors import UserError
from distil_tl.utils.log import logger, printable


class BadImages:
    """The bad images met so far, by split and path below it, with the reason.

    Args:
        policy: `data.on_bad_image`.
        known: what an earlier attempt of the run met.
    """

    def __init__(self, policy: str, known: dict[str, dict[str, str]] | None = None) -> None:
        self.policy = policy
        self.found: dict[str, dict[str, str]] = {split: dict(images) for split, images in (known or {}).items()}

    def read(self, batches: Iterable[Batch], split: str, index: Index) -> Iterator[Batch]:
        """A loader's batches, with the policy applied to what is bad in them.

        Raises:
            UserError: an image can't be used, and the policy is `error`; named by path and class.
        """
        for batch in batches:
            self.meet(batch.faults, split, index)
            yield batch

    def meet(self, faults: Iterable[tuple[int, str]], split: str, index: Index) -> None:
        """Apply the policy to bad images, by their places in the index, with the reasons. Raises as `read` does."""
        for i, reason in faults:
            path, name = printable(index.path(i)), printable(index.classes[int(index.targets[i])])
            unreadable = reason.startswith(UNREADABLE)
            if self.policy == "error" or unreadable:
                way_out = "Repair or remove it, or leave such images out with data.on_bad_image=skip"
                if unreadable:
                    way_out = "That is no fault of the image, so it is not left out; see whether its disk is there"
                raise UserError(f"can't use the image {path} of class {name}: {reason}. {way_out}", one_rank=True)
            met = self.found.setdefault(split, {})
            if index.relative(i) not in met:
                logger.warning("left out the image %s of class %s: %s", path, name, reason)
                met[index.relative(i)] = reason

    def refuse_none_left(self, counted: int, split: str, index: Index) -> None:
        """Raises UserError when nothing was counted, over all ranks: not one image read of a split could be used."""
        met = self.found.get(split, {})
        if counted == 0 and met:
            name, reason = next(iter(met.items()))
            raise UserError(
                f"not one of the images read from {index.root} can be used; {printable(name)}, for one: {reason}. "
                f"Repair them, or give another data.root"
            )

    def share(self, info: DistInfo) -> None:
        """Let every rank know what all have met. A collective."""
        for found in gather_objects(info, self.found):
            for split, images in found.items():
                self.found.setdefault(split, {}).update(images)
        self.found = {split: dict(sorted(images.items())) for split, images in sorted(self.found.items())}
